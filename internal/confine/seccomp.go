package confine

import (
	"errors"
	"fmt"
	"math"
	"os"
	"runtime"
	"slices"
	"unsafe"

	seccomp "github.com/elastic/go-seccomp-bpf"
	"github.com/elastic/go-seccomp-bpf/arch"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// System calls of the worker. What stands nowhere is answered with ENOSYS, as
// an older kernel would: Go's runtime asks for what is new and does without.
var (
	callsOfRuntime = []string{
		"brk", "clock_gettime", "clock_getres", "clock_nanosleep", "epoll_create1", "epoll_ctl", "epoll_pwait", "epoll_pwait2",
		"eventfd2", "exit", "exit_group", "futex", "getegid", "geteuid", "getgid", "getpid", "getppid", "getrandom",
		"getrlimit", "getrusage", "gettid", "gettimeofday", "getuid", "madvise", "membarrier", "mincore", "mmap", "mprotect", "mremap",
		"munmap", "nanosleep", "pipe2", "restart_syscall", "rseq", "rt_sigaction", "rt_sigpending", "rt_sigprocmask",
		"rt_sigreturn", "sched_getaffinity", "sched_yield", "set_robust_list", "sigaltstack", "sysinfo", "uname",
	}

	// callsOfDisks read and write what is open, and open what Landlock allows.
	callsOfDisks = []string{
		"cachestat", "copy_file_range", "dup", "fadvise64", "fallocate", "fdatasync", "flock", "fstat", "fstatfs",
		"fsync", "ftruncate", "getcwd", "getdents64", "io_uring_enter", "lseek", "memfd_create", "newfstatat", "openat",
		"openat2", "pread64", "preadv", "preadv2", "pwrite64", "pwritev", "read", "readahead", "readlinkat",
		"readv", "sendfile", "splice", "statx", "sync_file_range", "unlinkat", "write", "writev",
	}

	callsOfPeers = []string{
		"accept4", "getpeername", "getsockname", "getsockopt", "recvfrom", "recvmsg", "setsockopt", "shutdown",
	}

	// callsOfService are for exports and listeners that come later, and for
	// the folder of kept exports. Modes change by descriptors only: Landlock says
	// what can be opened, but lets the mode of any path be changed.
	callsOfService = []string{
		"bind", "fchmod", "fchown", "fchownat", "fgetxattr", "lgetxattr", "linkat", "listen", "mkdirat", "renameat", "renameat2",
	}

	// callsOfCommand wait for the command of --run.
	callsOfCommand = []string{"pidfd_open", "wait4", "waitid"}

	// killed are those that only an intruder makes.
	killed = []string{
		"add_key", "bpf", "chroot", "delete_module", "execve", "execveat", "finit_module", "fsconfig", "fsmount", "fsopen",
		"fspick", "init_module", "io_uring_setup", "kcmp", "kexec_file_load", "kexec_load", "keyctl", "mount", "mount_setattr",
		"move_mount", "open_by_handle_at", "open_tree", "perf_event_open", "personality", "pidfd_getfd", "pivot_root",
		"process_madvise", "process_vm_readv", "process_vm_writev", "ptrace", "quotactl", "reboot", "request_key", "setdomainname",
		"setgid", "setgroups", "sethostname", "setns", "setregid", "setresgid", "setresuid", "setreuid", "setuid",
		"swapoff", "swapon", "syslog", "umount2", "unshare", "userfaultfd",
	}
)

// Filter says what the worker will do.
type Filter struct {
	Service bool // serves a configuration, and so opens listeners and folders later
	Command bool // waits for a command

	// Probe is the only descriptor that connect(2) is allowed for, or 0: one
	// that is connected for good, so that it can only ask whether there is a
	// server (transport.Probe). Nothing else can take its number.
	Probe int
}

// Load filters the system calls of all threads, for good.
func (f Filter) Load() error {
	if seccompMode() == seccompFilter && !seccomp.Supported() {
		return errors.New("a filter that stands already forbids another")
	}
	p, err := f.program()
	if err != nil {
		return err
	}
	// The thread that loads must have no_new_privs.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	return load(p)
}

const seccompFilter = 2

// seccompMode is how this thread is filtered: 2 by programs.
func seccompMode() int {
	n, _, e := unix.Syscall(unix.SYS_PRCTL, unix.PR_GET_SECCOMP, 0, 0)
	if e != 0 {
		return -1
	}
	return int(n)
}

func load(p []bpf.RawInstruction) error {
	list := make([]unix.SockFilter, 0, len(p))
	for _, i := range p {
		list = append(list, unix.SockFilter{Code: i.Op, Jt: i.Jt, Jf: i.Jf, K: i.K})
	}
	prog := &unix.SockFprog{Len: uint16(len(list)), Filter: unsafe.SliceData(list)}
	n, _, e := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC,
		uintptr(unsafe.Pointer(prog)))
	runtime.KeepAlive(list)
	switch {
	case e != 0:
		return os.NewSyscallError("seccomp", e)
	case n != 0:
		return fmt.Errorf("seccomp: thread %d has a filter of its own", n)
	}
	return nil
}

// denial is a call that is answered with EPERM if its arguments are any of
// those; the conditions of one row must all hold.
type denial struct {
	call string
	if_  []seccomp.ArgumentConditions
}

// program is the filter: a part for each call whose arguments are looked at,
// and then one that knows calls by their names. What a part does not answer goes
// on to the next. They are parts because the library, after it has compared an
// argument, goes on as if that were the number of the call, and one program
// because each costs some 25 ns at a call whose arguments any of them looks at.
func (f Filter) program() ([]bpf.RawInstruction, error) {
	var all []bpf.RawInstruction
	allowed := slices.Concat(callsOfPeers, callsOfDisks, callsOfRuntime)
	for _, d := range f.denials() {
		part, err := d.part()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", d.call, err)
		}
		all = append(all, part...)
		allowed = append(allowed, d.call)
	}
	if f.Service {
		allowed = append(allowed, callsOfService...)
	}
	if f.Command {
		allowed = append(allowed, callsOfCommand...)
	}
	info, err := arch.GetInfo("")
	if err != nil {
		return nil, err
	}
	names, err := assemble(&seccomp.Policy{DefaultAction: seccomp.ActionErrno, Syscalls: []seccomp.SyscallGroup{
		{Action: seccomp.ActionAllow, Names: known(info, allowed)},
		{Action: seccomp.ActionKillProcess, Names: known(info, killed)},
	}})
	if err != nil {
		return nil, err
	}
	// The library answers everything else with EPERM.
	if err := endsWith(names, uint32(seccomp.ActionErrno)|uint32(unix.EPERM)); err != nil {
		return nil, err
	}
	names[len(names)-1].K = uint32(seccomp.ActionErrno) | uint32(unix.ENOSYS)
	return append(all, names...), nil
}

// part is the program of a denial without its end, which everything else jumps
// to: what comes in its place goes on.
func (d denial) part() ([]bpf.RawInstruction, error) {
	g := seccomp.SyscallGroup{Action: seccomp.ActionErrno}
	for _, c := range d.if_ {
		g.NamesWithCondtions = append(g.NamesWithCondtions, seccomp.NameWithConditions{Name: d.call, Conditions: c})
	}
	raw, err := assemble(&seccomp.Policy{DefaultAction: seccomp.ActionAllow, Syscalls: []seccomp.SyscallGroup{g}})
	if err != nil {
		return nil, err
	}
	return raw[:len(raw)-1], endsWith(raw, uint32(seccomp.ActionAllow))
}

// endsWith is an error unless the last instruction returns an answer.
func endsWith(p []bpf.RawInstruction, answer uint32) error {
	last, err := bpf.RetConstant{Val: answer}.Assemble()
	if err != nil || p[len(p)-1] != last {
		return errors.New("the filter does not end as it should")
	}
	return nil
}

// known leaves out calls that this architecture never had.
func known(info *arch.Info, names []string) (list []string) {
	for _, n := range names {
		if _, ok := info.SyscallNames[n]; ok {
			list = append(list, n)
		}
	}
	return list
}

func assemble(p *seccomp.Policy) ([]bpf.RawInstruction, error) {
	list, err := p.Assemble()
	if err != nil {
		return nil, err
	}
	return bpf.Assemble(list)
}

// Operations of a ring that may still be registered: files and buffers come
// and go with exports, and a thread leaves its ring's table when it ends.
const (
	ringFilesUpdate2   = 14
	ringBuffersUpdate  = 16
	ringUnregisterSelf = 21
)

// namespaces are the flags of clone(2) that make any.
const namespaces = unix.CLONE_NEWNS | unix.CLONE_NEWCGROUP | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC | unix.CLONE_NEWUSER |
	unix.CLONE_NEWPID | unix.CLONE_NEWNET

// fcntls are the commands of fcntl(2) that the worker and Go's libraries give.
// None names who gets the signals of a file, which are any signal to any process
// of the user (F_SETOWN, F_SETSIG), nor takes a lease, which holds up others.
var fcntls = []uint64{
	unix.F_DUPFD_CLOEXEC, unix.F_GETFD, unix.F_SETFD, unix.F_GETFL, unix.F_SETFL, unix.F_ADD_SEALS,
	unix.F_OFD_GETLK, unix.F_OFD_SETLK,
}

// sockTypeMask is SOCK_TYPE_MASK of the kernel: what else is in the type of a
// socket are flags.
const sockTypeMask = 0xf

// noDescriptor is the number of no descriptor, and has no upper half.
const noDescriptor = math.MaxUint32

func (f Filter) denials() []denial {
	pid := uint64(os.Getpid())
	families := []uint64{unix.AF_UNIX}
	if f.Service {
		families = append(families, unix.AF_INET, unix.AF_INET6, unix.AF_VSOCK)
	}
	probe := uint64(f.Probe)
	if f.Probe <= 0 {
		probe = noDescriptor
	}
	return []denial{
		{"clone", []seccomp.ArgumentConditions{
			{{Argument: 0, Operation: seccomp.BitsNotSet, Value: unix.CLONE_THREAD}},
			{{Argument: 0, Operation: seccomp.BitsSet, Value: namespaces}},
		}},
		// Streams only, of the plain protocol: datagrams have addresses that no
		// filter sees, and Landlock does not know MPTCP, SMC and SCTP.
		{"socket", slices.Concat(noneOf(0, families...), noneOf(2, 0, unix.IPPROTO_TCP), []seccomp.ArgumentConditions{
			{{Argument: 1, Operation: seccomp.BitsSet, Value: sockTypeMask &^ unix.SOCK_STREAM}},
		})},
		{"connect", noneOf(0, probe)},
		{"close", number(0, probe)},
		{"dup3", number(1, probe)},
		// A stream connects by sending.
		{"sendto", fastOpen(3)},
		{"sendmsg", fastOpen(2)},
		{"sendmmsg", fastOpen(3)},
		{"prctl", noneOf(0, unix.PR_SET_VMA, unix.PR_GET_SECCOMP, unix.PR_GET_DUMPABLE, unix.PR_GET_NO_NEW_PRIVS, unix.PR_CAPBSET_READ)},
		{"ioctl", noneOf(1, unix.BLKDISCARD, unix.BLKZEROOUT, unix.BLKGETSIZE64, unix.BLKROGET, unix.BLKSSZGET)},
		// O_ASYNC at a terminal names its foreground by itself.
		{"fcntl", append(noneOf(1, fcntls...), seccomp.ArgumentConditions{
			{Argument: 1, Operation: seccomp.Equal, Value: unix.F_SETFL},
			{Argument: 2, Operation: seccomp.BitsSet, Value: unix.O_ASYNC},
		})},
		{"io_uring_register", noneOf(1, ringFilesUpdate2, ringBuffersUpdate, ringUnregisterSelf)},
		{"prlimit64", noneOf(0, 0, pid)},
		{"kill", noneOf(0, pid)},
		{"tgkill", noneOf(0, pid)},
	}
}

// noneOf holds if an argument has none of the values.
func noneOf(argument uint32, values ...uint64) []seccomp.ArgumentConditions {
	var all seccomp.ArgumentConditions
	for _, v := range values {
		all = append(all, seccomp.Condition{Argument: argument, Operation: seccomp.NotEqual, Value: v})
	}
	return []seccomp.ArgumentConditions{all}
}

// number holds if an argument of 32 bits is v. The kernel does not look at the
// upper half, which must be 0 here.
func number(argument uint32, v uint64) []seccomp.ArgumentConditions {
	return []seccomp.ArgumentConditions{
		{{Argument: argument, Operation: seccomp.Equal, Value: v}},
		{{Argument: argument, Operation: seccomp.GreaterThan, Value: math.MaxUint32}},
	}
}

// fastOpen holds if the flags of a message connect its socket.
func fastOpen(argument uint32) []seccomp.ArgumentConditions {
	return []seccomp.ArgumentConditions{{{Argument: argument, Operation: seccomp.BitsSet, Value: unix.MSG_FASTOPEN}}}
}
