package main

import (
	"bytes"
	"context"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"go.uber.org/goleak"

	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// asMain makes the test binary vmdiskctl itself.
const asMain = "VMDISKCTL_TEST_MAIN"

func TestMain(m *testing.M) {
	if os.Getenv(asMain) != "" {
		main()
	}
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		testenv.Cleanup()
		os.Exit(code)
	}))
}

// ctl runs one command line and returns its exit code, standard output and
// standard error.
func ctl(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	r, w, err := os.Pipe()
	must(t, err)
	said := make(chan string)
	go func() {
		b, _ := io.ReadAll(r)
		said <- string(b)
	}()
	var out bytes.Buffer
	code = run(context.Background(), args, &out, w)
	w.Close()
	stderr = <-said
	r.Close()
	return code, out.String(), stderr
}

// want runs one command line that must end with the code given and returns
// its standard output.
func want(t *testing.T, code int, args ...string) string {
	t.Helper()
	got, stdout, stderr := ctl(t, args...)
	if got != code {
		t.Fatalf("vmdiskctl %s: exit code %d, want %d\n%s%s", strings.Join(args, " "), got, code, stdout, stderr)
	}
	if code != exitDone && !strings.HasPrefix(stderr, "vmdiskctl: ") {
		t.Errorf("vmdiskctl %s: standard error is %q", strings.Join(args, " "), stderr)
	}
	return stdout
}

// TestOutputThatIsLostIsAFailure, whatever is printed.
func TestOutputThatIsLostIsAFailure(t *testing.T) {
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	must(t, err)
	defer full.Close()
	for _, args := range [][]string{{"--version"}, {"version"}, {"--help"}, {"help"}, {"help", "copy"}, {"image", "info", "--help"}, {"completion", "bash"}} {
		if code := run(t.Context(), args, full, os.Stderr); code != exitFailed {
			t.Errorf("vmdiskctl %s: exit code %d, want %d", strings.Join(args, " "), code, exitFailed)
		}
	}
}

// TestWorkThatIsDoneAndNotReportedIsToldFromFailure: whoever takes it for one
// does it twice.
func TestWorkThatIsDoneAndNotReportedIsToldFromFailure(t *testing.T) {
	d := startDaemon(t)
	vm := startQEMU(t, "-device", "virtio-scsi-pci,id=scsi0")
	image, alone := d.image(t, "disk"), d.image(t, "alone")
	for _, tt := range []struct {
		args string
		code int
	}{
		{"attach --bus=scsi --dry-run " + vm + " " + image, exitFailed},
		{"attach --bus=scsi " + vm + " " + image, exitHalf},
		{"attach --bus=scsi " + vm + " " + image, exitFailed}, // nothing had to be done
		{"resize " + vm + " " + image + " +1M", exitHalf},
		{"detach --json " + vm + " " + image, exitHalf},
		{"export add one " + image, exitHalf},
		{"export show one", exitFailed},
		{"export set --dry-run one description=text", exitFailed},
		{"export set --json one description=text", exitHalf},
		{"export resize one +1M", exitHalf},
		{"export pause one", exitHalf},
		{"export remove one", exitHalf},
		{"reload --dry-run", exitFailed},
		{"reload", exitHalf},
		{"image resize -f raw " + alone + " +1M", exitHalf},
		{"image resize -f raw --json " + alone + " +1M", exitHalf},
	} {
		code, said := unheard(t, strings.Fields(tt.args)...)
		if code != tt.code || strings.Contains(said, "it is done") != (tt.code == exitHalf) {
			t.Errorf("vmdiskctl %s: exit code %d, want %d; %q", tt.args, code, tt.code, said)
		}
	}
	for path, size := range map[string]int64{image: 3 << 20, alone: 3 << 20} {
		if i, err := os.Stat(path); err != nil || i.Size() != size {
			t.Errorf("%s: %v, %v, want %d bytes", path, i, err, size)
		}
	}
}

// unheard runs one command line without room for its output, and returns its
// exit code and standard error.
func unheard(t *testing.T, args ...string) (code int, said string) {
	t.Helper()
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	must(t, err)
	defer full.Close()
	stderr, err := os.Create(filepath.Join(t.TempDir(), "stderr"))
	must(t, err)
	defer stderr.Close()
	code = run(t.Context(), args, full, stderr)
	b, err := os.ReadFile(stderr.Name())
	must(t, err)
	return code, string(b)
}

// TestOutputThatNobodyReadsIsAnError: what was begun is finished or taken back,
// and the exit code says which.
func TestOutputThatNobodyReadsIsAnError(t *testing.T) {
	dir, img := t.TempDir(), disk(t)
	exe, err := os.Executable()
	must(t, err)
	for _, tt := range []struct {
		stdout bool // else standard error
		args   []string
		code   int
		left   bool // a whole copy
	}{
		{true, []string{"image", "create", filepath.Join(dir, "image"), "1M"}, exitFailed, false},
		{false, []string{"copy", "--progress", img, filepath.Join(dir, "copy")}, exitDone, true},
		{false, []string{"copy", "--progress", filepath.Join(dir, "missing"), filepath.Join(dir, "none")}, exitFailed, false},
	} {
		r, w, err := os.Pipe()
		must(t, err)
		r.Close()
		cmd := exec.Command(exe, tt.args...)
		cmd.Env = append(os.Environ(), asMain+"=1")
		if cmd.Stderr = w; tt.stdout {
			cmd.Stdout, cmd.Stderr = w, nil
		}
		_ = cmd.Run() // the state says it
		w.Close()
		if got := cmd.ProcessState.ExitCode(); got != tt.code {
			t.Errorf("vmdiskctl %s: %v, want exit code %d", strings.Join(tt.args, " "), cmd.ProcessState, tt.code)
		}
		left, err := os.ReadDir(dir)
		must(t, err)
		if (len(left) == 1) != tt.left {
			t.Errorf("vmdiskctl %s: left are %v", strings.Join(tt.args, " "), left)
		}
		for _, f := range left {
			same(t, img, filepath.Join(dir, f.Name()))
			must(t, os.Remove(filepath.Join(dir, f.Name())))
		}
	}
}

func TestProgramsThatAreStartedHaveTheirPipes(t *testing.T) {
	outlivePipes()
	defer signal.Reset(syscall.SIGPIPE)
	cmd := exec.Command("/bin/sh", "-c", "kill -PIPE $$; exit 0")
	if err := cmd.Run(); err == nil {
		t.Error("a program ignores SIGPIPE because it was started from here")
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// serve runs a server on a socket that the test has bound, handed over as
// systemd does, and returns the socket's path: a connection can be made at
// once and waits in its queue.
func serve(t testing.TB, argv ...string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	must(t, err)
	l.SetUnlinkOnClose(false)
	f, err := l.File()
	must(t, err)
	l.Close()
	cmd := exec.Command("/bin/sh", append([]string{"-c", `LISTEN_PID=$$ exec "$@"`, "sh"}, argv...)...)
	cmd.Env = append(os.Environ(), "LISTEN_FDS=1")
	cmd.ExtraFiles = []*os.File{f}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err = cmd.Start()
	f.Close()
	must(t, err)
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if t.Failed() {
			t.Logf("%s: %s", argv[0], out.String())
		}
	})
	return path
}

// uri is that of an export on a socket.
func uri(sock, export string) string { return "nbd+unix:///" + export + "?socket=" + sock }

// nbdkit serves what the arguments say.
func nbdkit(t testing.TB, args ...string) string {
	t.Helper()
	return uri(serve(t, append([]string{"nbdkit", "-f"}, args...)...), "")
}

// disk makes a file of 4 MiB with data, a hole, and data with zeroes in it.
func disk(t testing.TB) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.img")
	f, err := os.Create(path)
	must(t, err)
	defer f.Close()
	must(t, f.Truncate(4<<20))
	p := make([]byte, 1<<20)
	for i := range p {
		p[i] = byte(i*7) ^ byte(i>>8) | 1
	}
	for _, off := range []int64{0, 2 << 20} {
		_, err := f.WriteAt(p, off)
		must(t, err)
	}
	clear(p)
	_, err = f.WriteAt(p, 3<<20)
	must(t, err)
	return path
}

// twice runs a command that makes the file at a path beside itself, again and
// again, and fails unless the file is there when one of the two has succeeded.
func twice(t *testing.T, command func(path string) []string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "made")
	args := command(path)
	for range 20 {
		var codes [2]int
		var both sync.WaitGroup
		for i := range codes {
			both.Go(func() { codes[i], _, _ = ctl(t, args...) })
		}
		both.Wait()
		if _, err := os.Stat(path); err != nil && slices.Contains(codes[:], exitDone) {
			t.Fatalf("vmdiskctl %s twice: exit codes %v, and no file: %v", strings.Join(args, " "), codes, err)
		}
		_ = os.Remove(path) // where both have failed there is none
	}
}
