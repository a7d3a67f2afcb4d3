package confine

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

func TestTaskIsReadBehindAnyName(t *testing.T) {
	const rest = " S 1 2 3 4 5 1572864 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32 33 34 35 0 2 2 0 0\n"
	for _, name := range []string{"vmdiskd", ") R 1 1", "a (b) c"} {
		got, err := parseTask([]byte("7 (" + name + ")" + rest))
		if want := (task{flags: flusherFlags, policy: unix.SCHED_RR}); err != nil || got != want {
			t.Errorf("%q: got %+v, %v; want %+v", name, got, err, want)
		}
	}
	for _, bad := range []string{"", "7 (x", "7 (x) S 1 2", "7 (x)" + strings.Replace(rest, "1572864", "-1", 1), "7 (x)" + strings.Replace(rest, " 2 2 0 0", " 2 x 0 0", 1)} {
		if got, err := parseTask([]byte(bad)); err == nil {
			t.Errorf("%q: got %+v, want an error", bad, got)
		}
	}
}

func TestMissingProtectionNamesItsRemedy(t *testing.T) {
	for _, s := range swapSteps {
		m := s.missing(fmt.Errorf("set: %w", unix.EPERM))
		if text := m.Error(); !strings.Contains(text, s.protection) || !strings.Contains(text, "CAP_SYS_") || !strings.Contains(text, "in a unit: ") {
			t.Errorf("%s: %q names no capability or directive", s.protection, text)
		}
		if m := s.missing(unix.EINVAL); m.Remedy != "" || !errors.Is(m, unix.EINVAL) {
			t.Errorf("%s: a capability is said to cure %v", s.protection, m)
		}
	}
}

func TestOnlyNamedProtectionsAreLeftOut(t *testing.T) {
	defer func(old string) { without = old }(without)
	for _, tt := range []struct {
		list, ask string
		want      bool
	}{{"", SwapOOM, false}, {"", "", false}, {SwapOOM, SwapOOM, true}, {SwapDirect + "," + SwapOOM, SwapOOM, true}, {SwapDirect, SwapOOM, false}, {",", "", false}} {
		without = tt.list
		if got := Without(tt.ask); got != tt.want {
			t.Errorf("Without(%q) among %q: got %v", tt.ask, tt.list, got)
		}
	}
}

// SwapChildEnv makes the test binary prepare a thread, execute itself, and
// tell what its threads are missing.
const SwapChildEnv = "CONFINE_TEST_SWAP"

// SwapChild prints the protections that could not be had, and after "exec"
// those that a thread lacks.
func SwapChild(stage string) error {
	names := func(list []*Missing) (out []string) {
		for _, m := range list {
			out = append(out, m.Protection)
		}
		return out
	}
	if stage == "prepare" {
		runtime.LockOSThread()
		fmt.Println("prepare", names(PrepareSwap()))
		if err := os.Setenv(SwapChildEnv, "exec"); err != nil {
			return err
		}
		return Reexec(os.Environ())
	}
	// Threads that are made now have it too.
	running, stop := make(chan bool), make(chan bool)
	for range 4 {
		go func() {
			runtime.LockOSThread()
			running <- true
			<-stop
		}()
		<-running
	}
	fmt.Println("exec", names(VerifySwap()))
	locked, err := LockMemory()
	fmt.Println("locked", locked > 1<<20, err)
	close(stop)
	return nil
}

// TestPreparationReachesAllThreads: whatever a thread could get is there on
// all threads of the program that it executes, and nothing else is missing.
func TestPreparationReachesAllThreads(t *testing.T) {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), SwapChildEnv+"=prepare")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	if len(lines) != 3 {
		t.Fatalf("got %q", out)
	}
	missing, ok := strings.CutPrefix(lines[0], "prepare ")
	if !ok || lines[1] != "exec "+missing {
		t.Errorf("the thread lacked %s, the threads after exec %s", lines[0], lines[1])
	}
	if strings.Contains(missing, SwapMemlock) {
		if !strings.Contains(lines[2], "RLIMIT_MEMLOCK must be infinite") {
			t.Errorf("without the right to lock memory: %s", lines[2])
		}
	} else if lines[2] != "locked true <nil>" {
		t.Errorf("memory may be locked: %s", lines[2])
	}
}

// TestFiniteLimitDoesNotAllowLocking: 8 MiB are not enough for a Go program,
// and that is known before it is tried.
func TestFiniteLimitDoesNotAllowLocking(t *testing.T) {
	args := []string{"--memlock=8388608:8388608"}
	if os.Geteuid() == 0 {
		args = append(args, "setpriv", "--bounding-set=-ipc_lock,-sys_resource", "--inh-caps=-ipc_lock,-sys_resource")
	}
	cmd := exec.Command("prlimit", append(args, os.Args[0])...)
	cmd.Env = append(os.Environ(), SwapChildEnv+"=prepare")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	first, _, _ := strings.Cut(string(out), "\n")
	if !strings.Contains(first, SwapMemlock) || !strings.Contains(first, SwapIOFlusher) {
		t.Errorf("missing without the capabilities: %s", first)
	}
}

func TestLongUntouchedRunsAreLeftOut(t *testing.T) {
	const page = 4096
	const run, margin = limits.SwapUntouched / page, limits.SwapMargin / page
	pages := func(spans ...[2]int) (out []span) {
		for _, s := range spans {
			out = append(out, span{uintptr(1<<30 + s[0]*page), uintptr(1<<30 + s[1]*page)})
		}
		return out
	}
	for _, tt := range []struct {
		name   string
		length int
		there  []int
		want   []span
	}{
		{"all absent", run, nil, pages([2]int{0, margin}, [2]int{run - margin, run})},
		{"one less", run - 1, nil, pages([2]int{0, run - 1})},
		{"behind a page", run + 1, []int{0}, pages([2]int{0, 1 + margin}, [2]int{run + 1 - margin, run + 1})},
		{"before a page", run + 1, []int{run}, pages([2]int{0, margin}, [2]int{run - margin, run + 1})},
		{"both a page too short", 2*run - 1, []int{run - 1}, pages([2]int{0, 2*run - 1})},
		{"twice", 2*run + 1, []int{run}, pages([2]int{0, margin}, [2]int{run - margin, run + 1 + margin}, [2]int{2*run + 1 - margin, 2*run + 1})},
	} {
		present := make([]byte, tt.length)
		for _, i := range tt.there {
			present[i] = 1
		}
		got := pages([2]int{0, tt.length})[0].without(present, page)
		if !slices.Equal(got, tt.want) {
			t.Errorf("%s: got %x, want %x", tt.name, got, tt.want)
		}
	}
}

func TestMappingsAreParsed(t *testing.T) {
	for _, tt := range []struct {
		line string
		want span
		ok   bool
	}{
		{"00400000-008d0000 r-xp 00000000 fe:00 10609601                           /bin/vmdiskd", span{0x400000, 0x8d0000}, true},
		{"3ce1e800000-3ce1f800000 rw-p 00000000 00:00 0", span{0x3ce1e800000, 0x3ce1f800000}, true},
		{"3ce1f800000-3ce22800000 ---p 00000000 00:00 0", span{0x3ce1f800000, 0x3ce22800000}, false},
		{"7ffd1000-7ffd5000 r--p 00000000 00:00 0 [vvar]", span{0x7ffd1000, 0x7ffd5000}, false},
		{"7ffd1000-7ffd5000 rw-p 00000000 00:00 0 [stack]", span{0x7ffd1000, 0x7ffd5000}, true},
	} {
		if got, ok, err := parseMapping(tt.line); err != nil || got != tt.want || ok != tt.ok {
			t.Errorf("%q: got %x, %v, %v", tt.line, got, ok, err)
		}
	}
	for _, bad := range []string{"", "a-b", "x-1 rw-p 0 0:0 0", "1 rw-p 0 0:0 0"} {
		if got, _, err := parseMapping(bad); err == nil {
			t.Errorf("%q: got %x, want an error", bad, got)
		}
	}
}
