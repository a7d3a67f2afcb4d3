// Command hog takes MIB mebibytes of memory, writes a value of its own to each
// word of it, and then reads all of them back and changes them, PASSES times.
// Memory that was swapped out has to come back as it was. It ends with status
// 2 when a word is not what was written.
package main

import (
	"fmt"
	"os"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "hog:", err)
		os.Exit(2)
	}
}

func run(args []string) error {
	if len(args) != 2 {
		return fmt.Errorf("want MIB PASSES")
	}
	mib, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	passes, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	mem, err := unix.Mmap(-1, 0, mib<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return err
	}
	words := unsafe.Slice((*uint64)(unsafe.Pointer(unsafe.SliceData(mem))), len(mem)/8)
	for i := range words {
		words[i] = value(i, 0)
	}
	fmt.Println("hog: filled", mib, "MiB")
	for p := range passes {
		for i := range words {
			if words[i] != value(i, p) {
				return fmt.Errorf("pass %d: word %d is %#x, want %#x", p, i, words[i], value(i, p))
			}
			words[i] = value(i, p+1)
		}
		fmt.Println("hog: pass", p+1, "verified")
	}
	return nil
}

// value is what word i has after pass p: no two words of a page are alike.
func value(i, p int) uint64 { return (uint64(i) + uint64(p)<<48) * 0x9E3779B97F4A7C15 }
