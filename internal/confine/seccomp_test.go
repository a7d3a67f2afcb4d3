package confine

import (
	"encoding/binary"
	"os"
	"slices"
	"testing"

	seccomp "github.com/elastic/go-seccomp-bpf"
	"github.com/elastic/go-seccomp-bpf/arch"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// verdict is what the kernel makes of a call.
func verdict(t *testing.T, f Filter, nr int, args ...uint64) uint32 {
	t.Helper()
	p, err := f.program()
	if err != nil {
		t.Fatal(err)
	}
	info, err := arch.GetInfo("")
	if err != nil {
		t.Fatal(err)
	}
	// The VM of the library reads in network order, the kernel in its own.
	data := make([]byte, 64)
	words := []uint32{uint32(nr), uint32(info.ID), 0, 0}
	for i := range 6 {
		var v uint64
		if i < len(args) {
			v = args[i]
		}
		words = append(words, uint32(v), uint32(v>>32))
	}
	for i, w := range words {
		binary.BigEndian.PutUint32(data[4*i:], w)
	}
	list, ok := bpf.Disassemble(p)
	if !ok {
		t.Fatal("the program cannot be read back")
	}
	vm, err := bpf.NewVM(list)
	if err != nil {
		t.Fatal(err)
	}
	got, err := vm.Run(data)
	if err != nil {
		t.Fatal(err)
	}
	return uint32(got)
}

const (
	allow = uint32(seccomp.ActionAllow)
	kill  = uint32(seccomp.ActionKillProcess)
	eperm = uint32(seccomp.ActionErrno) | uint32(unix.EPERM)
	nosys = uint32(seccomp.ActionErrno) | uint32(unix.ENOSYS)
)

// TestFilterAnswersEveryCall compares all numbers with the lists, whatever
// their first argument is: also one that is the number of another call.
func TestFilterAnswersEveryCall(t *testing.T) {
	info, err := arch.GetInfo("")
	if err != nil {
		t.Fatal(err)
	}
	f := Filter{Service: true, Command: true}
	free := slices.Concat(callsOfRuntime, callsOfDisks, callsOfPeers, callsOfService, callsOfCommand)
	var looked []string
	for _, d := range f.denials() {
		looked = append(looked, d.call)
	}
	for nr := range 700 {
		name := info.SyscallNumbers[nr]
		want := nosys
		switch {
		case slices.Contains(looked, name):
			continue
		case slices.Contains(free, name):
			want = allow
		case slices.Contains(killed, name):
			want = kill
		}
		for _, arg := range []uint64{0, uint64(info.SyscallNames["read"]), 1 << 40} {
			if got := verdict(t, f, nr, arg); got != want {
				t.Errorf("call %d (%s) with %#x: %#x, want %#x", nr, name, arg, got, want)
			}
		}
	}
}

func TestFilterLooksAtArguments(t *testing.T) {
	pid := uint64(os.Getpid())
	const thread = unix.CLONE_VM | unix.CLONE_FS | unix.CLONE_FILES | unix.CLONE_SIGHAND | unix.CLONE_SYSVSEM | unix.CLONE_THREAD
	const fioSetOwn, fioAsync = 0x8901, 0x5452 // asm-generic/sockios.h, asm-generic/ioctls.h
	const stream = unix.SOCK_STREAM | unix.SOCK_NONBLOCK | unix.SOCK_CLOEXEC
	one, service := Filter{}, Filter{Service: true, Probe: 7}
	for _, tt := range []struct {
		name string
		f    Filter
		nr   int
		args []uint64
		want uint32
	}{
		{"thread", one, unix.SYS_CLONE, []uint64{thread}, allow},
		{"process", one, unix.SYS_CLONE, []uint64{uint64(unix.SIGCHLD)}, eperm},
		{"process with a call's number as flags", one, unix.SYS_CLONE, []uint64{0}, eperm},
		{"user namespace", one, unix.SYS_CLONE, []uint64{thread | unix.CLONE_NEWUSER}, eperm},
		{"clone3, which hides its flags", one, unix.SYS_CLONE3, nil, nosys},
		{"unix socket", one, unix.SYS_SOCKET, []uint64{unix.AF_UNIX, stream}, allow},
		{"tcp socket for one disk", one, unix.SYS_SOCKET, []uint64{unix.AF_INET, stream}, eperm},
		{"tcp socket of a service", service, unix.SYS_SOCKET, []uint64{unix.AF_INET, stream, unix.IPPROTO_TCP}, allow},
		{"vsock of a service", service, unix.SYS_SOCKET, []uint64{unix.AF_VSOCK, stream}, allow},
		{"netlink", service, unix.SYS_SOCKET, []uint64{unix.AF_NETLINK}, eperm},
		{"packet", service, unix.SYS_SOCKET, []uint64{unix.AF_PACKET}, eperm},
		{"unix socket with high bits", one, unix.SYS_SOCKET, []uint64{1<<32 | unix.AF_UNIX, stream}, eperm},
		{"unix datagrams", service, unix.SYS_SOCKET, []uint64{unix.AF_UNIX, unix.SOCK_DGRAM}, eperm},
		{"unix sequenced packets", service, unix.SYS_SOCKET, []uint64{unix.AF_UNIX, unix.SOCK_SEQPACKET | unix.SOCK_CLOEXEC}, eperm},
		{"unix raw, which is datagrams", service, unix.SYS_SOCKET, []uint64{unix.AF_UNIX, unix.SOCK_RAW}, eperm},
		{"datagrams with high bits", service, unix.SYS_SOCKET, []uint64{unix.AF_UNIX, 1<<32 | unix.SOCK_DGRAM}, eperm},
		{"udp", service, unix.SYS_SOCKET, []uint64{unix.AF_INET6, unix.SOCK_DGRAM}, eperm},
		{"mptcp", service, unix.SYS_SOCKET, []uint64{unix.AF_INET, stream, unix.IPPROTO_MPTCP}, eperm},
		{"sctp", service, unix.SYS_SOCKET, []uint64{unix.AF_INET, stream, unix.IPPROTO_SCTP}, eperm},
		{"vsock datagrams", service, unix.SYS_SOCKET, []uint64{unix.AF_VSOCK, unix.SOCK_DGRAM}, eperm},
		{"connect", service, unix.SYS_CONNECT, []uint64{8}, eperm},
		{"connect of the probe", service, unix.SYS_CONNECT, []uint64{7}, allow},
		{"connect without a probe", one, unix.SYS_CONNECT, []uint64{0}, eperm},
		{"close", service, unix.SYS_CLOSE, []uint64{8}, allow},
		{"close of the probe", service, unix.SYS_CLOSE, []uint64{7}, eperm},
		{"close of the probe with high bits", service, unix.SYS_CLOSE, []uint64{1<<32 | 7}, eperm},
		{"close without a probe", one, unix.SYS_CLOSE, []uint64{0}, allow},
		{"duplicate", service, unix.SYS_DUP3, []uint64{7, 8}, allow},
		{"duplicate over the probe", service, unix.SYS_DUP3, []uint64{8, 7}, eperm},
		{"duplicate over the probe with high bits", service, unix.SYS_DUP3, []uint64{8, 1<<32 | 7}, eperm},
		{"send", service, unix.SYS_SENDTO, []uint64{8, 0, 1, unix.MSG_NOSIGNAL | unix.MSG_DONTWAIT}, allow},
		{"fast open", service, unix.SYS_SENDTO, []uint64{8, 0, 1, unix.MSG_FASTOPEN | unix.MSG_NOSIGNAL}, eperm},
		{"fast open of a message", service, unix.SYS_SENDMSG, []uint64{8, 0, unix.MSG_FASTOPEN}, eperm},
		{"fast open of messages", service, unix.SYS_SENDMMSG, []uint64{8, 0, 1, unix.MSG_FASTOPEN}, eperm},
		{"bind of one disk", one, unix.SYS_BIND, nil, nosys},
		{"bind of a service", service, unix.SYS_BIND, nil, allow},
		{"rename of one disk", one, unix.SYS_RENAMEAT2, nil, nosys},
		{"wait without a command", one, unix.SYS_WAIT4, nil, nosys},
		{"name of a mapping", one, unix.SYS_PRCTL, []uint64{unix.PR_SET_VMA}, allow},
		{"dumpable again", one, unix.SYS_PRCTL, []uint64{unix.PR_SET_DUMPABLE, 1}, eperm},
		{"discard", one, unix.SYS_IOCTL, []uint64{3, unix.BLKDISCARD}, allow},
		{"input to a terminal", one, unix.SYS_IOCTL, []uint64{0, unix.TIOCSTI}, eperm},
		{"files of a ring", one, unix.SYS_IO_URING_REGISTER, []uint64{3, ringFilesUpdate2}, allow},
		{"restrictions of a ring", one, unix.SYS_IO_URING_REGISTER, []uint64{3, 11}, eperm},
		{"another ring", one, unix.SYS_IO_URING_SETUP, nil, kill},
		{"signal to itself", one, unix.SYS_TGKILL, []uint64{pid, 1, 0}, allow},
		{"signal to another", one, unix.SYS_TGKILL, []uint64{pid + 1, 1, 0}, eperm},
		{"signal to all", one, unix.SYS_KILL, []uint64{^uint64(0), 9}, eperm},
		{"flags of a file", one, unix.SYS_FCNTL, []uint64{3, unix.F_SETFL, unix.O_NONBLOCK | unix.O_DIRECT}, allow},
		{"flags that have signals sent", one, unix.SYS_FCNTL, []uint64{3, unix.F_SETFL, unix.O_NONBLOCK | unix.O_ASYNC}, eperm},
		{"flag of a descriptor with the bit of those", one, unix.SYS_FCNTL, []uint64{3, unix.F_DUPFD_CLOEXEC, unix.O_ASYNC}, allow},
		{"lock of an open file", one, unix.SYS_FCNTL, []uint64{3, unix.F_OFD_SETLK, 1 << 40}, allow},
		{"owner of signals", one, unix.SYS_FCNTL, []uint64{3, unix.F_SETOWN, pid}, eperm},
		{"owner of signals with high bits", one, unix.SYS_FCNTL, []uint64{3, 1<<32 | unix.F_SETOWN, pid + 1}, eperm},
		{"flags with high bits in the command", one, unix.SYS_FCNTL, []uint64{3, 1<<32 | unix.F_SETFL, unix.O_ASYNC}, eperm},
		{"owner of another kind", one, unix.SYS_FCNTL, []uint64{3, unix.F_SETOWN_EX, 1 << 40}, eperm},
		{"signal of a file", one, unix.SYS_FCNTL, []uint64{3, unix.F_SETSIG, 9}, eperm},
		{"lease", one, unix.SYS_FCNTL, []uint64{3, unix.F_SETLEASE, unix.F_WRLCK}, eperm},
		{"notes about a folder", one, unix.SYS_FCNTL, []uint64{3, unix.F_NOTIFY, 1}, eperm},
		{"owner of a socket's signals", service, unix.SYS_IOCTL, []uint64{7, unix.SIOCSPGRP}, eperm},
		{"owner by another name", service, unix.SYS_IOCTL, []uint64{7, fioSetOwn}, eperm},
		{"signals of a socket", service, unix.SYS_IOCTL, []uint64{7, fioAsync}, eperm},
		{"signal of a timer", service, unix.SYS_TIMER_CREATE, nil, nosys},
		{"signal at the end of the parent", one, unix.SYS_PRCTL, []uint64{unix.PR_SET_PDEATHSIG, 9}, eperm},
		{"own limits", one, unix.SYS_PRLIMIT64, []uint64{0}, allow},
		{"limits of another", one, unix.SYS_PRLIMIT64, []uint64{pid + 1}, eperm},
		{"exec", service, unix.SYS_EXECVE, nil, kill},
		{"exec of a descriptor", service, unix.SYS_EXECVEAT, nil, kill},
		{"other 32-bit calls", one, 0x40000000, nil, nosys},
	} {
		if got := verdict(t, tt.f, tt.nr, tt.args...); got != tt.want {
			t.Errorf("%s: %#x, want %#x", tt.name, got, tt.want)
		}
	}
}
