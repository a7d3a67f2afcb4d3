package main

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	nbdclient "github.com/vmdiskd/vmdiskd/internal/nbd/client"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

// mallocsPrefix is what the line starts with that a server of swap, when it is
// the test binary, answers SIGWINCH with on standard error: how often it has
// allocated until then. Its command line is all that the worker knows of a test.
const mallocsPrefix = "mallocs "

func answerWithMallocs() {
	asked := make(chan os.Signal, 1)
	signal.Notify(asked, unix.SIGWINCH)
	var m runtime.MemStats
	line := make([]byte, 0, 64)
	for range asked {
		runtime.ReadMemStats(&m)
		line = strconv.AppendUint(append(line[:0], mallocsPrefix...), m.Mallocs, 10)
		if _, err := unix.Write(unix.Stderr, append(line, '\n')); err != nil {
			panic(err)
		}
	}
}

// unprivileged is program without the capabilities that --swap takes, and with
// a limit of locked memory that is no use to a Go program.
func unprivileged(args ...string) *exec.Cmd {
	cmd := program(args...)
	words := []string{"--memlock=8388608:8388608"}
	if os.Geteuid() == 0 {
		const all = "-ipc_lock,-sys_resource,-sys_nice"
		words = append(words, "setpriv", "--bounding-set="+all, "--inh-caps="+all)
	}
	out := exec.Command("prlimit", append(words, cmd.Args...)...)
	out.Env, out.SysProcAttr = cmd.Env, cmd.SysProcAttr
	return out
}

// wantRefusal fails the test unless cmd ends with status 1 and says all of
// want.
func wantRefusal(t *testing.T, cmd *exec.Cmd, want ...string) {
	t.Helper()
	out, err := cmd.CombinedOutput()
	if cmd.ProcessState.ExitCode() != exitFailed {
		t.Errorf("%v, want status %d: %s", err, exitFailed, out)
	}
	for _, w := range want {
		if !strings.Contains(string(out), w) {
			t.Errorf("the message does not say %q: %s", w, out)
		}
	}
}

// TestSwapIsRefusedWhereItIsNotSafe: what has a safe alternative is refused
// with it, by best-effort too.
func TestSwapIsRefusedWhereItIsNotSafe(t *testing.T) {
	t.Parallel()
	disk := image(t, 1<<20)
	socket := "--unix=" + filepath.Join(shortDir(t), "s")
	for _, tt := range []struct {
		args []string
		want []string
	}{
		{nil, []string{"tcp", "-U"}},
		{[]string{"--port=0"}, []string{"tcp", "-U"}},
		{[]string{"--vsock", "--vsock-trust-cid"}, []string{"vsock", "-U"}},
		{[]string{"--single"}, []string{"standard input", "-U"}},
		{[]string{socket, "--tls=on"}, []string{"encryption", "--tls=off"}},
		{[]string{socket, "--format=qcow2"}, []string{`"qcow2"`, "--format=raw"}},
		{[]string{socket, "--format=mem"}, []string{`"mem"`, "--format=raw"}},
		{[]string{socket, "--cache=writeback"}, []string{`"writeback"`, "--cache=none"}},
		{[]string{socket, "--cache=unsafe"}, []string{`"unsafe"`, "--cache=none"}},
		{[]string{socket, "--engine=uring"}, []string{"ring", "--engine=pool"}},
		{[]string{socket, "--run=true"}, []string{"--run"}},
		{[]string{socket, "--verbose"}, []string{"--verbose"}},
		{[]string{socket, "--debug=nbd=debug"}, []string{"--debug"}},
	} {
		for _, mode := range []string{"--swap", "--swap=best-effort"} {
			t.Run(fmt.Sprint(mode, tt.args), func(t *testing.T) {
				wantRefusal(t, program(append(append([]string{mode}, tt.args...), disk)...), tt.want...)
			})
		}
	}
}

func TestSwapNamesTheCapabilitiesThatItMisses(t *testing.T) {
	t.Parallel()
	socket := "--unix=" + filepath.Join(shortDir(t), "s")
	wantRefusal(t, unprivileged("--swap", "--swap-headroom=skip", socket, image(t, 1<<20)),
		"io-flusher: operation not permitted: it takes CAP_SYS_RESOURCE (in a unit: AmbientCapabilities=CAP_SYS_RESOURCE)",
		"CAP_SYS_NICE (in a unit: CPUSchedulingPolicy=rr",
		"(in a unit: OOMScoreAdjust=-1000)",
		"memlock: ", "CAP_IPC_LOCK", "(in a unit: LimitMEMLOCK=infinity)",
		"--swap=best-effort")
}

func TestSwapRefusesFilesThatTakeMemory(t *testing.T) {
	t.Parallel()
	dir, err := os.MkdirTemp("/dev/shm", "vmd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	disk := filepath.Join(dir, "disk")
	if err := os.WriteFile(disk, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	wantRefusal(t, program("--swap", "--swap-headroom=skip", "--unix="+filepath.Join(dir, "s"), disk),
		`is on tmpfs, which takes memory to write: use a block device, or a file on ext4 or XFS`)
}

// threads is how many threads the server has.
func (d *daemonProcess) threads() int {
	d.t.Helper()
	list, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", d.cmd.Process.Pid))
	if err != nil {
		d.t.Fatal(err)
	}
	return len(list)
}

// TestSwapTellsNoBlockStatus: each reply would take memory that comes back to
// nobody.
func TestSwapTellsNoBlockStatus(t *testing.T) {
	t.Parallel()
	d := serve(t, "--swap=best-effort", image(t, 1<<20))
	conn, err := net.Dial("unix", d.socket)
	if err != nil {
		t.Fatal(err)
	}
	c, err := nbdclient.New(t.Context(), conn, nbdclient.Options{Contexts: []string{wire.ContextAllocation}})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if got := c.Export().Contexts; len(got) != 0 {
		t.Errorf("contexts %q, want none", got)
	}
}

// TestBestEffortServesWithoutWhatIsMissing: and says so. All memory is locked
// if that is allowed.
func TestBestEffortServesWithoutWhatIsMissing(t *testing.T) {
	t.Parallel()
	d := serve(t, "--swap=best-effort", image(t, 1<<20))
	before := d.threads()
	if before < limits.SwapThreads {
		t.Errorf("%d threads, want %d from the start", before, limits.SwapThreads)
	}
	c := d.dial()
	for range 100 {
		c.works()
	}
	if after := d.threads(); after != before {
		t.Errorf("%d threads, %d after some requests", before, after)
	}
	d.signal(unix.SIGTERM)
	if status := d.wait(); status != 0 {
		t.Errorf("status %d", status)
	}
	said := d.stderr.String()
	if !strings.Contains(said, "memory is locked") || !strings.Contains(said, "engine=pool") {
		t.Errorf("log:\n%s", said)
	}
}
