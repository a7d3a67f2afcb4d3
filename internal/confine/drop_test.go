package confine_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/confine"
)

// childEnv makes the test binary call Drop with its arguments and print the
// ids of all its threads.
const childEnv = "CONFINE_TEST_CHILD"

func TestMain(m *testing.M) {
	if name := os.Getenv(gapEnv); name != "" {
		fmt.Print(gapWorker(name))
		os.Exit(0)
	}
	if word := os.Getenv(attackEnv); word != "" {
		if err := attackStage0(word); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if confine.IsWorker() {
		if err := attackWorker(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if stage := os.Getenv(confine.SwapChildEnv); stage != "" {
		if err := confine.SwapChild(stage); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if os.Getenv(childEnv) == "" {
		os.Exit(m.Run())
	}
	if err := childDrop(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// childDrop has several threads before it drops.
func childDrop(user, group string) error {
	running, stop := make(chan bool), make(chan bool)
	for range 4 {
		go func() {
			runtime.LockOSThread()
			running <- true
			<-stop
		}()
	}
	for range 4 {
		<-running
	}
	defer close(stop)
	if err := confine.Drop(user, group); err != nil {
		return err
	}
	tasks, err := filepath.Glob("/proc/self/task/*/status")
	if err != nil || len(tasks) < 5 {
		return fmt.Errorf("threads: %v, %v; want at least 5", tasks, err)
	}
	var seen []string
	for _, path := range tasks {
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		seen = append(seen, ids(string(data)))
	}
	slices.Sort(seen)
	fmt.Print(strings.Join(slices.Compact(seen), "; "))
	return nil
}

// ids are the fields of a status file that Drop is about.
func ids(status string) string {
	var out []string
	for line := range strings.Lines(status) {
		f := strings.Fields(line)
		if len(f) > 0 && slices.Contains([]string{"Uid:", "Gid:", "Groups:", "CapEff:"}, f[0]) {
			out = append(out, strings.Join(f, " "))
		}
	}
	return strings.Join(out, ", ")
}

// run starts a child as the given credential (nil: as this user) and returns
// what it printed on both streams.
func run(t *testing.T, cred *syscall.Credential, user, group string) (out, msg string, ok bool) {
	t.Helper()
	cmd := exec.Command(testBinary(t), user, group)
	cmd.Env = append(os.Environ(), childEnv+"=1", "GORACE=atexit_sleep_ms=0")
	var o, e strings.Builder
	cmd.Stdout, cmd.Stderr = &o, &e
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: cred}
	err := cmd.Run()
	return o.String(), strings.TrimSpace(e.String()), err == nil
}

// testBinary is a copy that other users can run.
func testBinary(t *testing.T) string {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(exe)
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "confine")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	to := filepath.Join(dir, "child")
	if err := os.WriteFile(to, data, 0o755); err != nil {
		t.Fatal(err)
	}
	return to
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root to become another user")
	}
}

const noCaps = "CapEff: 0000000000000000"

func TestDropChangesEveryThreadForGood(t *testing.T) {
	needRoot(t)
	withGroups := &syscall.Credential{Uid: 0, Gid: 0, Groups: []uint32{4, 6}}
	for _, tt := range []struct {
		name, user, group, want string
	}{
		{"name", "nobody", "", "Uid: 65534 65534 65534 65534, Gid: 65534 65534 65534 65534, Groups:, " + noCaps},
		{"name and group", "nobody", "daemon", "Uid: 65534 65534 65534 65534, Gid: 1 1 1 1, Groups:, " + noCaps},
		{"number of a user", "1", "", "Uid: 1 1 1 1, Gid: 1 1 1 1, Groups:, " + noCaps},
		{"numbers of nobody", "54321", "54322", "Uid: 54321 54321 54321 54321, Gid: 54322 54322 54322 54322, Groups:, " + noCaps},
		{"root's group", "nobody", "0", "Uid: 65534 65534 65534 65534, Gid: 0 0 0 0, Groups:, " + noCaps},
	} {
		t.Run(tt.name, func(t *testing.T) {
			out, msg, ok := run(t, withGroups, tt.user, tt.group)
			if !ok || out != tt.want {
				t.Errorf("threads are\n%s\nwant\n%s\nerror %q", out, tt.want, msg)
			}
		})
	}
}

func TestDropOfTheGroupAloneKeepsTheUser(t *testing.T) {
	needRoot(t)
	out, msg, ok := run(t, &syscall.Credential{Groups: []uint32{4}}, "", "daemon")
	if want := "Uid: 0 0 0 0, Gid: 1 1 1 1, Groups:, "; !ok || !strings.HasPrefix(out, want) {
		t.Errorf("threads are %q, want %q; error %q", out, want, msg)
	}
}

func TestDropWithoutNamesDoesNothing(t *testing.T) {
	needRoot(t)
	out, msg, ok := run(t, &syscall.Credential{Groups: []uint32{4}}, "", "")
	if want := "Uid: 0 0 0 0, Gid: 0 0 0 0, Groups: 4, "; !ok || !strings.HasPrefix(out, want) {
		t.Errorf("threads are %q, want %q; error %q", out, want, msg)
	}
}

func TestDropWithoutRights(t *testing.T) {
	needRoot(t)
	nobody := &syscall.Credential{Uid: 65534, Gid: 65534}
	for _, tt := range []struct {
		name, user, group string
		ok                bool
	}{
		{"to itself", "nobody", "", true},
		{"to another user", "daemon", "", false},
		{"to another group", "nobody", "daemon", false},
		{"to root", "root", "", false},
	} {
		out, msg, ok := run(t, nobody, tt.user, tt.group)
		if ok != tt.ok {
			t.Errorf("%s: %q, %q; want success: %v", tt.name, out, msg, tt.ok)
		}
		if !tt.ok && !strings.Contains(msg, `"`+tt.user+`"`) {
			t.Errorf("%s: error %q does not name the user", tt.name, msg)
		}
	}
}

// TestDropRefusesToBeReversible keeps the capability to set ids across the
// change, as an ambient one does.
func TestDropRefusesToBeReversible(t *testing.T) {
	needRoot(t)
	cmd := exec.Command(testBinary(t), "daemon", "daemon")
	cmd.Env = append(os.Environ(), childEnv+"=1", "GORACE=atexit_sleep_ms=0")
	const capSetGID, capSetUID = 6, 7
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Credential:  &syscall.Credential{Uid: 65534, Gid: 65534},
		AmbientCaps: []uintptr{capSetGID, capSetUID},
	}
	out, err := cmd.CombinedOutput()
	if err == nil || !strings.Contains(string(out), "regained") {
		t.Errorf("drop with ambient capabilities: %v, %q; want it refused", err, out)
	}
}

func TestDropNamesWhatItDoesNotKnow(t *testing.T) {
	for _, tt := range []struct{ user, group, want string }{
		{"no-such-user", "", `user "no-such-user": no such user`},
		{"root", "no-such-group", `group "no-such-group": no such group`},
		{"54321", "", `user "54321": has no group`},
		{"4294967295", "0", `user "4294967295": no such user`},
		{"0", "4294967295", `group "4294967295": no such group`},
		{"-1", "", `user "-1": no such user`},
		{"99999999999", "0", `user "99999999999": no such user`},
	} {
		err := confine.Drop(tt.user, tt.group)
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("drop to %q, %q: error %v, want %q", tt.user, tt.group, err, tt.want)
		}
	}
}
