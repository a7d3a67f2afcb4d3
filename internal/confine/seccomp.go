package confine

import (
	"errors"
	"fmt"
	"os"
	"runtime"
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
		"cachestat", "close", "copy_file_range", "dup", "dup3", "fadvise64", "fallocate", "fcntl", "fdatasync", "flock", "fstat", "fstatfs",
		"fsync", "ftruncate", "getcwd", "getdents64", "io_uring_enter", "lseek", "memfd_create", "newfstatat", "openat",
		"openat2", "pread64", "preadv", "preadv2", "pwrite64", "pwritev", "pwritev2", "read", "readahead", "readlinkat",
		"readv", "sendfile", "splice", "statx", "sync_file_range", "unlinkat", "write", "writev",
	}

	callsOfPeers = []string{
		"accept4", "connect", "getpeername", "getsockname", "getsockopt", "recvfrom", "recvmsg", "sendmmsg", "sendmsg",
		"sendto", "setsockopt", "shutdown",
	}

	// callsOfService are for exports and listeners that come later, and for
	// the folder of kept exports.
	callsOfService = []string{
		"bind", "chmod", "fchmod", "fchmodat", "fchown", "fchownat", "fgetxattr", "lgetxattr", "linkat", "listen", "mkdirat", "renameat", "renameat2",
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
}

// Load filters the system calls of all threads, for good.
//
// Several programs stand one upon the other and the strictest answer counts: one
// that knows calls by their names, and one for each call whose arguments are
// looked at. They are apart because the library, after it has compared an
// argument, goes on as if that were the number of the call.
func (f Filter) Load() error {
	if seccompMode() == seccompFilter && !seccomp.Supported() {
		return errors.New("a filter that stands already forbids another")
	}
	programs, err := f.programs()
	if err != nil {
		return err
	}
	// The thread that loads must have no_new_privs.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	for _, p := range programs {
		if err := load(p); err != nil {
			return err
		}
	}
	return nil
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

// programs are the filters, the most general last: it is looked at first.
func (f Filter) programs() ([][]bpf.RawInstruction, error) {
	info, err := arch.GetInfo("")
	if err != nil {
		return nil, err
	}
	var list [][]bpf.RawInstruction
	for _, d := range f.denials() {
		g := seccomp.SyscallGroup{Action: seccomp.ActionErrno}
		for _, c := range d.if_ {
			g.NamesWithCondtions = append(g.NamesWithCondtions, seccomp.NameWithConditions{Name: d.call, Conditions: c})
		}
		p := seccomp.Policy{DefaultAction: seccomp.ActionAllow, Syscalls: []seccomp.SyscallGroup{g}}
		raw, err := assemble(&p)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", d.call, err)
		}
		list = append(list, raw)
	}
	allowed := append(append(append([]string{}, callsOfDisks...), callsOfPeers...), callsOfRuntime...)
	for _, d := range f.denials() {
		allowed = append(allowed, d.call)
	}
	if f.Service {
		allowed = append(allowed, callsOfService...)
	}
	if f.Command {
		allowed = append(allowed, callsOfCommand...)
	}
	p := seccomp.Policy{DefaultAction: seccomp.ActionErrno, Syscalls: []seccomp.SyscallGroup{
		{Action: seccomp.ActionAllow, Names: known(info, allowed)},
		{Action: seccomp.ActionKillProcess, Names: known(info, killed)},
	}}
	raw, err := assemble(&p)
	if err != nil {
		return nil, err
	}
	// The library answers everything else with EPERM.
	last := &raw[len(raw)-1]
	if last.K != uint32(seccomp.ActionErrno)|uint32(unix.EPERM) {
		return nil, errors.New("the filter does not end as it should")
	}
	last.K = uint32(seccomp.ActionErrno) | uint32(unix.ENOSYS)
	return append(list, raw), nil
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

func (f Filter) denials() []denial {
	pid := uint64(os.Getpid())
	families := []uint64{unix.AF_UNIX}
	if f.Service {
		families = append(families, unix.AF_INET, unix.AF_INET6, unix.AF_VSOCK)
	}
	return []denial{
		{"clone", []seccomp.ArgumentConditions{
			{{Argument: 0, Operation: seccomp.BitsNotSet, Value: unix.CLONE_THREAD}},
			{{Argument: 0, Operation: seccomp.BitsSet, Value: namespaces}},
		}},
		{"socket", noneOf(0, families...)},
		{"prctl", noneOf(0, unix.PR_SET_VMA, unix.PR_GET_SECCOMP, unix.PR_GET_DUMPABLE, unix.PR_GET_NO_NEW_PRIVS, unix.PR_CAPBSET_READ)},
		{"ioctl", noneOf(1, unix.BLKDISCARD, unix.BLKZEROOUT, unix.BLKGETSIZE64, unix.BLKROGET, unix.BLKSSZGET)},
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
