package confine

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// Plan is what stage 0 has decided about the worker.
type Plan struct {
	Mode        Mode   // Strict or Auto
	User, Group string // to become, by name or number; "" leaves it

	Files []*os.File // go to the worker, under their numbers
	State any        // what Handover.Take has; gob makes it, of exported fields

	// Paths is what the worker may go on using. OpenPaths, if not "", says why
	// it may go on using all: it can only not execute.
	Paths     []Path
	OpenPaths string

	// AbstractSockets lets the worker reach sockets of other processes that
	// have no file.
	AbstractSockets bool

	// BindTCP lets the worker open new TCP ports.
	BindTCP bool

	// RootKeeps are capabilities that a worker keeps which goes on as root,
	// because what it is asked for later needs them.
	RootKeeps []uintptr

	// Lock lets the worker lock memory by CAP_IPC_LOCK, if it cannot by its
	// limit.
	Lock bool

	// Thread, if not nil, is called on the thread whose attributes the worker
	// inherits, with all rights still there.
	Thread func() error
}

// Exec makes the process the worker: the same program with the same arguments,
// confined. It returns only if that is impossible, and then the process may
// have lost rights already and has to end.
//
// All attributes are those of one locked thread: after the exec it is the only
// one, and every later thread inherits from it.
func (p *Plan) Exec() error {
	self, err := openSelf()
	if err != nil {
		return fmt.Errorf("own program: %w", err)
	}
	to, err := resolveIDs(p.User, p.Group)
	if err != nil {
		return err
	}
	h := &Handover{Mode: p.Mode, Procs: runtime.GOMAXPROCS(0)}
	if err := h.keep(p.State); err != nil {
		return err
	}
	runtime.LockOSThread()
	// All files that the worker makes have a mode of their own, and that of a
	// socket must not be cut: the worker cannot change it.
	unix.Umask(0)
	if err := setLimits(); err != nil {
		return err
	}
	if p.Thread != nil {
		if err := p.Thread(); err != nil {
			return err
		}
	}
	h.Controls = append(h.Controls, Control{Name: ControlStages, State: Enforced})
	for _, step := range [...]func() (Control, error){
		func() (Control, error) { return p.paths(self) },
		func() (Control, error) { return p.capabilities(to) },
		func() (Control, error) { return p.user(to) },
		noNewPrivs,
	} {
		c, err := step()
		if err != nil {
			return fmt.Errorf("%s: %w", c.Name, err)
		}
		if p.Mode == Strict && c.State != Enforced {
			return fmt.Errorf("%s is %s: %s; --confine=strict refuses that", c.Name, c.State, c.Reason)
		}
		h.Controls = append(h.Controls, c)
	}
	f, err := h.seal()
	if err != nil {
		return err
	}
	return p.become(self, f)
}

// CanExec says why Plan.Exec would be impossible from the start: there is no
// /proc, or there are no files in memory.
func CanExec() error {
	p, err := openSelf()
	if p.file != nil {
		err = errors.Join(err, p.file.Close())
	}
	if err != nil {
		return err
	}
	f, err := (&Handover{}).seal()
	if err != nil {
		return err
	}
	return f.Close()
}

// program is the program that runs.
type program struct {
	path string // "" if it cannot be found by that any more
	file *os.File
}

// openSelf finds the program by its path, so that the worker has its name, and
// makes sure that it is this one.
func openSelf() (program, error) {
	f, err := os.Open("/proc/self/exe")
	if err != nil {
		return program{}, err
	}
	p := program{file: f}
	path, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return p, err
	}
	running, err := f.Stat()
	if err != nil {
		return p, err
	}
	if there, err := os.Stat(path); err == nil && os.SameFile(there, running) {
		p.path = path
	}
	return p, nil
}

// setLimits forbids core files, and allows files of any size as far as that
// can be: writes by a ring would end short at the limit.
func setLimits() error {
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("limit of core files: %w", err)
	}
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_FSIZE, &l); err != nil {
		return fmt.Errorf("limit of file sizes: %w", err)
	}
	l.Cur = l.Max
	return unix.Setrlimit(unix.RLIMIT_FSIZE, &l)
}

// paths is Landlock. The program stays executable for the exec that is to
// come; the filter of the worker kills who tries another.
func (p *Plan) paths(self program) (Control, error) {
	c := Control{Name: ControlLandlock, State: Enforced}
	abi, err := landlockABI()
	if err != nil {
		c.State, c.Reason = Off, fmt.Sprintf("the kernel does not offer it: %v", err)
		return c, nil
	}
	paths := p.Paths
	if p.OpenPaths != "" {
		c.State, c.Reason = Degraded, p.OpenPaths
		paths = append(paths[:len(paths):len(paths)], Path{"/", Images | Socket | Rmdir})
	}
	name := self.path
	if name == "" {
		name = "/proc/self/exe"
	}
	paths = append(append(paths[:len(paths):len(paths)], Path{name, Read | Run}), libraries(self.file)...)
	if p.AbstractSockets && c.State == Enforced {
		c.State, c.Reason = Degraded, "abstract sockets of others can be reached: NOTIFY_SOCKET is one"
	}
	if err := p.restrict(paths); err != nil {
		return c, err
	}
	if abi < abiComplete && c.State == Enforced {
		// Not known to the kernel is less than what an operator may expect,
		// but is no hole in what is asked for paths.
		c.Reason = fmt.Sprintf("version %d of the kernel knows less than version %d", abi, abiComplete)
	}
	return c, nil
}

// capabilities empties the bounding set, without which no exec gives any.
func (p *Plan) capabilities(to identity) (Control, error) {
	c := Control{Name: ControlCapabilities, State: Enforced}
	root := to.uid == 0 || to.uid == keep && os.Geteuid() == 0
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return c, fmt.Errorf("clear ambient set: %w", err)
	}
	kept := map[uintptr]bool{}
	if root {
		for _, k := range p.RootKeeps {
			kept[k] = true
		}
	}
	p.Lock = p.Lock && needsLockCapability()
	if p.Lock {
		kept[unix.CAP_IPC_LOCK] = true
		c.Reason = "it keeps CAP_IPC_LOCK, because the limit of locked memory is finite"
	}
	for k := uintptr(0); k <= unix.CAP_LAST_CAP; k++ {
		if kept[k] {
			continue
		}
		err := unix.Prctl(unix.PR_CAPBSET_DROP, k, 0, 0, 0)
		switch {
		case errors.Is(err, unix.EINVAL): // this kernel has fewer
		case errors.Is(err, unix.EPERM) && !root:
			// It has no capability, and no_new_privs lets no exec give it one.
			return c, nil
		case errors.Is(err, unix.EPERM):
			c.State, c.Reason = Degraded, "the bounding set cannot be emptied without CAP_SETPCAP"
			return c, nil
		case err != nil:
			return c, fmt.Errorf("drop capability %d: %w", k, err)
		}
	}
	if root && len(p.RootKeeps) > 0 {
		c.State = Degraded
		c.Reason = "it runs as root and keeps the capabilities to open and own the files of others: --user takes them too"
	}
	return c, nil
}

// needsLockCapability tells whether memory can be locked, and only because of
// the capability.
func needsLockCapability() bool {
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &l); err != nil || l.Cur == unix.RLIM_INFINITY {
		return false
	}
	has, err := hasCapability(unix.CAP_IPC_LOCK)
	return err == nil && has
}

// keepLock leaves the thread with CAP_IPC_LOCK alone, which the exec keeps.
func keepLock() error {
	h := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	const bit = 1 << unix.CAP_IPC_LOCK
	d := [2]unix.CapUserData{{Effective: bit, Permitted: bit, Inheritable: bit}}
	if err := unix.Capset(&h, &d[0]); err != nil {
		return err
	}
	return unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_RAISE, unix.CAP_IPC_LOCK, 0, 0)
}

// user changes the ids of this thread.
func (p *Plan) user(to identity) (Control, error) {
	c := Control{Name: ControlUser, State: Enforced}
	if p.Lock {
		if err := unix.Prctl(unix.PR_SET_KEEPCAPS, 1, 0, 0, 0); err != nil {
			return c, err
		}
	}
	if p.User != "" || p.Group != "" {
		if err := to.becomeThread(); err != nil {
			return c, fmt.Errorf("become user %q, group %q: %w", p.User, p.Group, err)
		}
	}
	if p.Lock {
		if err := keepLock(); err != nil {
			return c, fmt.Errorf("keep CAP_IPC_LOCK: %w", err)
		}
	}
	if os.Geteuid() == 0 || os.Getuid() == 0 {
		c.State, c.Reason = Off, "it runs as root: --user names another"
	}
	return c, nil
}

func noNewPrivs() (Control, error) {
	c := Control{Name: ControlNoNewPrivs, State: Enforced}
	return c, unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
}

// environment is what the worker sees. What a caller may set to change how Go
// programs run is not in it.
func environment(handover uintptr) []string {
	env := []string{handoverVar + "=" + strconv.Itoa(int(handover))}
	for _, name := range [...]string{"LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "FDSTORE",
		"NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "TMPDIR", "TZ"} {
		if v, ok := os.LookupEnv(name); ok && !strings.ContainsRune(v, 0) {
			env = append(env, name+"="+v)
		}
	}
	return env
}

// firstOwn is the first descriptor that is neither a standard stream nor a
// socket that systemd passed (sd_listen_fds(3)): those the worker takes.
func firstOwn() int {
	const first = 3
	pid, err := strconv.Atoi(os.Getenv("LISTEN_PID"))
	if err != nil || pid != os.Getpid() {
		return first
	}
	n, err := strconv.Atoi(os.Getenv("LISTEN_FDS"))
	if err != nil || n < 0 || n > limits.HandoverSockets {
		return first
	}
	return first + n
}

// become execs. Nothing stays open but the files of the plan, the standard
// streams and the sockets of systemd.
func (p *Plan) become(self program, handover *os.File) error {
	// The collector closes what nobody uses any more, until the exec as well.
	defer runtime.KeepAlive([...]any{p, self.file, handover})
	if err := unix.CloseRange(uint(firstOwn()), ^uint(0), unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return os.NewSyscallError("close_range", err)
	}
	for _, f := range append([]*os.File{handover}, p.Files...) {
		if _, err := unix.FcntlInt(f.Fd(), unix.F_SETFD, 0); err != nil {
			return os.NewSyscallError("fcntl", err)
		}
	}
	env := environment(handover.Fd())
	if self.path != "" {
		err := syscall.Exec(self.path, os.Args, env)
		// The new user may not be able to come to the path.
		if !errors.Is(err, unix.EACCES) && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("exec %q: %w", self.path, err)
		}
	}
	return fmt.Errorf("exec: %w", execFile(self.file, os.Args, env))
}

// execFile is execveat(2) with AT_EMPTY_PATH.
func execFile(f *os.File, args, env []string) error {
	argv, err := syscall.SlicePtrFromStrings(args)
	if err != nil {
		return err
	}
	envv, err := syscall.SlicePtrFromStrings(env)
	if err != nil {
		return err
	}
	empty, err := unix.BytePtrFromString("")
	if err != nil {
		return err
	}
	_, _, e := unix.RawSyscall6(unix.SYS_EXECVEAT, f.Fd(), uintptr(unsafe.Pointer(empty)),
		uintptr(unsafe.Pointer(unsafe.SliceData(argv))), uintptr(unsafe.Pointer(unsafe.SliceData(envv))), unix.AT_EMPTY_PATH, 0)
	return e
}
