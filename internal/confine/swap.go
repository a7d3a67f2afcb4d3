package confine

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// Protections of a server that the machine's own swap depends on. The kernel
// waits for such a server while it looks for memory, so the server must never
// wait for memory itself.
const (
	// SwapIOFlusher: what the thread allocates in the kernel starts no I/O
	// (PR_SET_IO_FLUSHER).
	SwapIOFlusher = "io-flusher"
	// SwapRealtime: the thread runs when it can, and may use the memory that
	// is kept back from others (SCHED_RR).
	SwapRealtime = "realtime"
	// SwapOOM: the process is not killed to gain memory.
	SwapOOM = "oom"
	// SwapMemlock: LockMemory is allowed to lock everything.
	SwapMemlock = "memlock"
	// SwapLocked: LockMemory has done it.
	SwapLocked = "locked-memory"
	// SwapDirect: the disk is not read and written through the page cache.
	SwapDirect = "direct-io"
)

// without names protections that are left out, separated by commas. It is
// empty but in programs that tests link to show what each one is for.
var without string

// Without tells whether a protection is left out.
func Without(protection string) bool {
	for w := range strings.SplitSeq(without, ",") {
		if w == protection && w != "" {
			return true
		}
	}
	return false
}

// Missing is a protection that a process does not have.
type Missing struct {
	Protection string // one of the names above
	Err        error  // why
	Remedy     string // what gives it, "" if that is not known
}

// Error says what is missing, why, and what to change.
func (m *Missing) Error() string {
	s := m.Protection + ": " + m.Err.Error()
	if m.Remedy != "" {
		s += ": " + m.Remedy
	}
	return s
}

// Unwrap is the reason.
func (m *Missing) Unwrap() error { return m.Err }

// swapStep is a protection that is had before the program is executed anew:
// all threads have then what one thread had before.
type swapStep struct {
	protection string
	has        func(t task) (bool, error)
	set        func() error
	remedy     string
}

var swapSteps = [...]swapStep{
	{SwapIOFlusher, task.isFlusher, setIOFlusher,
		"it takes CAP_SYS_RESOURCE (in a unit: AmbientCapabilities=CAP_SYS_RESOURCE)"},
	{SwapRealtime, task.isRealtime, setRealtime,
		"it takes CAP_SYS_NICE (in a unit: CPUSchedulingPolicy=rr, or AmbientCapabilities=CAP_SYS_NICE)"},
	{SwapOOM, func(task) (bool, error) { return isSpared() }, setSpared,
		"it takes CAP_SYS_RESOURCE (in a unit: OOMScoreAdjust=-1000)"},
	{SwapMemlock, func(task) (bool, error) { return mayLock() }, raiseMemlock,
		"RLIMIT_MEMLOCK is finite, and it takes CAP_SYS_RESOURCE to raise it or CAP_IPC_LOCK to do without (in a unit: LimitMEMLOCK=infinity)"},
}

// PrepareSwap gives the calling thread, which must be locked to its goroutine,
// and its process what a server of swap needs. What it has stays when the
// thread executes a program, for all threads of that program. It returns what
// could not be had, and goes on after each failure. Nothing that the thread
// has already is asked for again.
func PrepareSwap() (missing []*Missing) {
	self, err := readTask(unix.Getpid(), unix.Gettid())
	for _, s := range swapSteps {
		if Without(s.protection) {
			continue
		}
		has, e := false, err
		if e == nil {
			has, e = s.has(self)
		}
		if e == nil && !has {
			e = s.set()
		}
		if e != nil {
			missing = append(missing, s.missing(e))
		}
	}
	return missing
}

func (s *swapStep) missing(err error) *Missing {
	m := &Missing{Protection: s.protection, Err: err}
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) || errors.Is(err, errNotOnAll) {
		m.Remedy = s.remedy
	}
	return m
}

var errNotOnAll = errors.New("a thread of the process does not have it")

// VerifySwap looks at all threads of the process for what PrepareSwap gives
// and returns what is not there.
func VerifySwap() (missing []*Missing) {
	tasks, err := readTasks()
	for _, s := range swapSteps {
		has, e := true, err
		for i := 0; i < len(tasks) && has && e == nil; i++ {
			has, e = s.has(tasks[i])
		}
		if e == nil && !has {
			e = errNotOnAll
		}
		if e != nil {
			missing = append(missing, s.missing(e))
		}
	}
	return missing
}

// Reexec executes the running program anew, with its arguments and env for the
// environment, by the calling thread, whose attributes all threads have
// then. It returns only an error. Descriptors that are closed on exec are
// gone; the process keeps its number.
func Reexec(env []string) error {
	runtime.LockOSThread()
	// By its path: the name of the process comes from it.
	path, err := os.Executable()
	if err != nil {
		return err
	}
	return fmt.Errorf("execute %q: %w", path, syscall.Exec(path, os.Args, env))
}

// Flags of a thread in /proc/PID/task/TID/stat that PR_SET_IO_FLUSHER sets
// (PR_IO_FLUSHER in kernel/sys.c): PF_MEMALLOC_NOIO and PF_LOCAL_THROTTLE.
const flusherFlags = 0x80000 | 0x100000

// task is what the kernel says of a thread.
type task struct {
	flags  uint64
	policy int
}

func (t task) isFlusher() (bool, error) { return t.flags&flusherFlags == flusherFlags, nil }

func (t task) isRealtime() (bool, error) {
	return t.policy == unix.SCHED_RR || t.policy == unix.SCHED_FIFO, nil
}

// readTasks reads all threads of the process.
func readTasks() ([]task, error) {
	dir, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return nil, err
	}
	var out []task
	for _, e := range dir {
		tid, err := strconv.Atoi(e.Name())
		if err != nil {
			return nil, err
		}
		t, err := readTask(unix.Getpid(), tid)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue // it has ended
		}
		if err != nil {
			return nil, err
		}
		out = append(out, t)
	}
	return out, nil
}

func readTask(pid, tid int) (task, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/stat", pid, tid))
	if err != nil {
		return task{}, err
	}
	return parseTask(b)
}

// Places of fields in /proc/PID/stat behind the name, which may have any
// characters but ends at the last parenthesis (proc(5)).
const (
	statFlags  = 9 - 3
	statPolicy = 41 - 3
)

func statFields(b []byte) ([][]byte, error) {
	f := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:])
	if len(f) <= statPolicy {
		return nil, fmt.Errorf("stat: %d fields behind the name, want more than %d", len(f), statPolicy)
	}
	return f, nil
}

func parseTask(b []byte) (t task, err error) {
	f, err := statFields(b)
	if err != nil {
		return t, err
	}
	if t.flags, err = strconv.ParseUint(string(f[statFlags]), 10, 64); err == nil {
		t.policy, err = strconv.Atoi(string(f[statPolicy]))
	}
	return t, err
}

func setIOFlusher() error {
	err := unix.Prctl(unix.PR_SET_IO_FLUSHER, 1, 0, 0, 0)
	if errors.Is(err, unix.EINVAL) {
		return errors.New("the kernel is older than Linux 5.6")
	}
	return err
}

// setRealtime takes a low priority: above all ordinary threads, below those of
// the kernel.
func setRealtime() error {
	return unix.SchedSetAttr(0, &unix.SchedAttr{
		Size: unix.SizeofSchedAttr, Policy: unix.SCHED_RR, Priority: limits.SwapPriority,
	}, 0)
}

const (
	oomFile = "/proc/self/oom_score_adj"
	oomLow  = -1000 // never killed
)

func isSpared() (bool, error) {
	b, err := os.ReadFile(oomFile)
	if err != nil {
		return false, err
	}
	n, err := strconv.Atoi(string(bytes.TrimSpace(b)))
	return n == oomLow, err
}

func setSpared() error { return os.WriteFile(oomFile, strconv.AppendInt(nil, oomLow, 10), 0) }

// mayLock tells whether everything may be locked. A finite limit never does:
// what counts are addresses, and Go reserves more than a gigabyte.
func mayLock() (bool, error) {
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &l); err != nil {
		return false, err
	}
	if l.Cur == unix.RLIM_INFINITY {
		return true, nil
	}
	return hasCapability(unix.CAP_IPC_LOCK)
}

func raiseMemlock() error {
	return unix.Setrlimit(unix.RLIMIT_MEMLOCK, &unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY})
}

// hasCapability tells whether the calling thread may use a capability below 32.
func hasCapability(number uint) (bool, error) {
	h := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&h, &data[0]); err != nil {
		return false, err
	}
	return data[0].Effective&(1<<number) != 0, nil
}
