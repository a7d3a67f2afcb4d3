package interop

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/vmdiskd/vmdiskd/test/testenv"
)

func TestFioVerifiesItsChecksums(t *testing.T) {
	testenv.Require(t, "fio")
	for _, tt := range []struct{ name, rw, bs, depth string }{
		{"small random", "randwrite", "4k", "32"},
		{"unequal sizes", "randwrite", "512-64k", "16"},
		{"large sequential", "write", "1m", "8"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := serve(t, testenv.Options{})
			args := []string{"fio", "--name=verify", "--ioengine=nbd", "--uri=" + s.URI, "--size=16m",
				"--rw=" + tt.rw, "--iodepth=" + tt.depth, "--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--verify_state_save=0"}
			if strings.Contains(tt.bs, "-") {
				args = append(args, "--bsrange="+tt.bs, "--verify_interval=512")
			} else {
				args = append(args, "--bs="+tt.bs)
			}
			testenv.Run(t, args...)
		})
	}
}

func TestNbdClientListsTheExport(t *testing.T) {
	vmdiskdOnly(t) // nbdkit's -e is not a name that it lists
	testenv.Require(t, "nbd-client")
	port := testenv.FreePort(t)
	serve(t, testenv.Options{Port: port, Export: "disk"})
	out := testenv.Run(t, "nbd-client", "-l", "127.0.0.1", fmt.Sprint(port))
	if !strings.Contains("\n"+out, "\ndisk") {
		t.Errorf("nbd-client lists:\n%s", out)
	}
}

func TestRunGivesTheCommandTheURIAndItsStatusBack(t *testing.T) {
	testenv.Require(t, "nbdinfo")
	image := testenv.PatternImage(t, diskSize)
	ctx := testenv.Context(t)
	args := command(t, image, "-U", "-", "--run", `nbdinfo --size "$uri"`)
	size, err := exec.CommandContext(ctx, args[0], args[1:]...).Output()
	if err != nil || strings.TrimSpace(string(size)) != fmt.Sprint(diskSize) {
		t.Errorf("got %q, %v; want %d", size, err, diskSize)
	}
	out, err := run(ctx, command(t, image, "-U", "-", "-r", "--run", `test -S "$unixsocket" && exit 7`))
	if exit, ok := err.(*exec.ExitError); !ok || exit.ExitCode() != 7 {
		t.Errorf("got %q, %v; want the command's status 7", out, err)
	}
}

func TestStandardInputIsAConnection(t *testing.T) {
	argv := command(t, testenv.PatternImage(t, diskSize), "-s")
	python(t, append([]string{argv[0], "command"}, argv[1:]...)...)
}

func TestToolsStartTheServerBySocketActivation(t *testing.T) {
	testenv.Require(t, "nbdinfo", "nbdcopy")
	image := testenv.PatternImage(t, diskSize)
	bracketed := append(append([]string{"["}, command(t, image, "-f")...), "]")
	var got info
	decode(t, testenv.Run(t, append([]string{"nbdinfo", "--json", "--"}, bracketed...)...), &got)
	if len(got.Exports) != 1 || got.Exports[0].Size != diskSize {
		t.Errorf("got %+v", got)
	}
	out := filepath.Join(testenv.TempDir(t), "out.img")
	testenv.Run(t, append(append([]string{"nbdcopy", "--"}, bracketed...), out)...)
	sameFiles(t, image, out, -1)
}

func TestSystemdHandsOverTheSocket(t *testing.T) {
	testenv.Require(t, "systemd-socket-activate", "nbdinfo")
	socket := filepath.Join(testenv.TempDir(t), "disk.sock")
	argv := append([]string{"-l", socket}, command(t, testenv.PatternImage(t, diskSize), "-f")...)
	cmd := exec.Command(testenv.Path(t, "systemd-socket-activate"), argv...)
	var log strings.Builder
	cmd.Stderr = &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM)
		cmd.Wait()
		if t.Failed() {
			t.Logf("server's log:\n%s", log.String())
		}
	})
	if err := testenv.Await(testenv.Context(t), func() bool { return testenv.Listens(socket) }); err != nil {
		t.Fatal(err)
	}
	uri := "nbd+unix:///?socket=" + socket
	for range 3 {
		if size := strings.TrimSpace(testenv.Run(t, "nbdinfo", "--size", uri)); size != fmt.Sprint(diskSize) {
			t.Errorf("size %s, want %d", size, diskSize)
		}
	}
}

func TestPidFileNamesTheServer(t *testing.T) {
	file := filepath.Join(testenv.TempDir(t), "pid")
	s := serve(t, testenv.Options{Extra: []string{"-P", file}})
	text, err := os.ReadFile(file)
	if err != nil || strings.TrimSpace(string(text)) != fmt.Sprint(s.Pid()) {
		t.Errorf("the file holds %q, %v; want %d", text, err, s.Pid())
	}
}
