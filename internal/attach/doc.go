// Package attach plugs served disks into running machines and out of them, as
// plans of steps that can be taken back: what fails half way leaves nothing
// behind, and a plan whose ends are reached already changes nothing.
//
// Nothing that a QEMU or a guest says decides over the server: which export
// belongs to a disk follows from the names of the machine and of the disk
// alone.
package attach
