package confine_test

import (
	"errors"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"

	seccomp "github.com/elastic/go-seccomp-bpf"
	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/confine"
)

// gapEnv makes the test binary be a worker whose cage has the gap that it names,
// and print what its self-test says.
const gapEnv = "CONFINE_TEST_GAP"

// gaps are what a cage may lack, and what the self-test says to it.
var gaps = map[string]struct {
	close func() error // all but the gap
	want  string
}{
	"no filter":            {noNewPrivs, "the thread has seccomp mode 0, want 2"},
	"a filter of nothing":  {filterOf("mount"), "a netlink socket could be had"},
	"a filter of sockets":  {filterOf("socket"), "connect was not refused"},
	"no paths":             {whole, `"/" could be opened`},
	"an answer that lies":  {filterOf("prctl"), "the thread has seccomp mode -1"},
	"rights that may grow": {filterWithRights, "no_new_privs is 0"},
}

func noNewPrivs() error { return unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }

// whole is the filter of the worker; no Landlock is with it.
func whole() error { return errors.Join(noNewPrivs(), confine.Filter{}.Load()) }

// filterOf forbids some calls and lets all others be.
func filterOf(names ...string) func() error {
	return func() error { return loadFilter(true, names...) }
}

// filterWithRights does not give up the right to get more by an exec. For that the
// kernel wants CAP_SYS_ADMIN; who has not got it is refused the filter.
func filterWithRights() error {
	err := loadFilter(false, "socket", "connect")
	if errors.Is(err, unix.EACCES) {
		return errors.New("no_new_privs is 0, and the kernel itself refuses it")
	}
	return err
}

func loadFilter(noNewPrivs bool, names ...string) error {
	return seccomp.LoadFilter(seccomp.Filter{NoNewPrivs: noNewPrivs, Flag: seccomp.FilterFlagTSync,
		Policy: seccomp.Policy{DefaultAction: seccomp.ActionAllow, Syscalls: []seccomp.SyscallGroup{
			{Action: seccomp.ActionErrno, Names: names}}}})
}

// gapWorker closes a cage that has a gap and tries it. The thread that closes it
// is the one that tries it.
func gapWorker(name string) error {
	runtime.LockOSThread()
	if err := gaps[name].close(); err != nil {
		return err
	}
	return confine.SelfTest([]string{"/no/such/place", "/", "/proc"})
}

// TestSelfTestRefusesACageWithAGap has a process for each: what holds a process
// holds it for good.
func TestSelfTestRefusesACageWithAGap(t *testing.T) {
	for name, gap := range gaps {
		t.Run(name, func(t *testing.T) {
			cmd := exec.Command(os.Args[0])
			cmd.Env = append(os.Environ(), gapEnv+"="+name, "GORACE=atexit_sleep_ms=0")
			out, err := cmd.CombinedOutput()
			if err != nil || !strings.Contains(string(out), gap.want) {
				t.Errorf("the self-test says %q, %v; want %q", out, err, gap.want)
			}
		})
	}
}
