package main

import (
	"bufio"
	"errors"
	"io"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// overlays are two images above one backing file, and an image with a data
// file of its own.
func overlays(t *testing.T) (dir string) {
	t.Helper()
	dir = shortDir(t)
	for _, args := range [][]string{
		{"create", "-q", "-f", "qcow2", "base.qcow2", "16M"},
		{"create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "base.qcow2", "top.qcow2"},
		{"create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "base.qcow2", "other.qcow2"},
		{"create", "-q", "-f", "qcow2", "-o", "data_file=data.raw", "split.qcow2", "16M"},
	} {
		if out, err := tool(t, dir, "qemu-img", args...); err != nil {
			t.Fatalf("qemu-img %q: %v: %s", args, err, out)
		}
	}
	return dir
}

// tryServe runs vmdiskd until it has said that it serves, or not.
func tryServe(t *testing.T, args ...string) (served bool, log string) {
	t.Helper()
	socket := filepath.Join(shortDir(t), "s")
	args = append([]string{"-U", socket, "--format=qcow2", "--backing=same-dir", "--run", "true"}, args...)
	out, err := program(args...).CombinedOutput()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() == exitFailed {
		return false, string(out)
	}
	if err != nil {
		t.Fatalf("vmdiskd %q: %v: %s", args, err, out)
	}
	return true, string(out)
}

func TestWritableQcow2IsLockedAgainstOthers(t *testing.T) {
	t.Parallel() // a server waits a while before it gives up
	dir := overlays(t)
	at := func(name string) string { return filepath.Join(dir, name) }
	serve(t, "--format=qcow2", "--backing=same-dir", at("top.qcow2"))
	serve(t, "--format=qcow2", "--backing=same-dir", at("split.qcow2"))
	for _, tt := range []struct {
		line string
		free bool
	}{
		{"qemu-io -f qcow2 -c length top.qcow2", false},
		{"qemu-io -r -f qcow2 -c length top.qcow2", false},
		{"qemu-img info -f qcow2 top.qcow2", false},
		{"qemu-img check -f qcow2 top.qcow2", false},
		{"qemu-img resize -f qcow2 top.qcow2 32M", false},
		{"qemu-img snapshot -c now top.qcow2", false},
		{"qemu-img commit -f qcow2 top.qcow2", false},
		{"qemu-img info -U -f qcow2 top.qcow2", true},
		{"qemu-io -r -U -f qcow2 -c length top.qcow2", true},
		{"qemu-io -f qcow2 -c length base.qcow2", false},
		{"qemu-img resize -f qcow2 base.qcow2 32M", false},
		{"qemu-io -r -f qcow2 -c length base.qcow2", true},
		{"qemu-img info -f qcow2 base.qcow2", true},
		{"qemu-img check -f qcow2 base.qcow2", true},
		{"qemu-io -f qcow2 -c length split.qcow2", false},
		{"qemu-io -f raw -c length data.raw", false},
		{"qemu-io -r -f raw -c length data.raw", true}, // raw disks may be read while others write
	} {
		args := strings.Fields(tt.line)
		out, err := tool(t, dir, args[0], args[1:]...)
		if (err == nil) != tt.free || !tt.free && !strings.Contains(out, "lock") {
			t.Errorf("%s: got %q, %v; want success %v or that it finds a lock", tt.line, out, err, tt.free)
		}
	}
	for _, tt := range []struct {
		args []string
		free bool
	}{
		{[]string{at("top.qcow2")}, false},
		{[]string{"-r", at("top.qcow2")}, false},
		{[]string{at("base.qcow2")}, false},
		{[]string{"-r", at("base.qcow2")}, true},
		{[]string{at("other.qcow2")}, true},
		{[]string{at("split.qcow2")}, false},
		{[]string{"-r", at("split.qcow2")}, false},
	} {
		free, log := tryServe(t, tt.args...)
		if free != tt.free || !free && !strings.Contains(log, "lock") {
			t.Errorf("a second vmdiskd %q: got success %v, want %v or that it finds a lock: %s", tt.args, free, tt.free, log)
		}
	}
}

// hold keeps an image open in qemu-io until the test ends.
func hold(t *testing.T, dir string, args ...string) {
	t.Helper()
	cmd := exec.Command("qemu-io", args...)
	cmd.Dir = dir
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = in.Close(); _ = cmd.Wait() })
	if _, err := io.WriteString(in, "length\n"); err != nil {
		t.Fatal(err)
	}
	// The answer says that the image is open.
	for r, line := bufio.NewReader(out), ""; !strings.Contains(line, "MiB"); {
		if line, err = r.ReadString('\n'); err != nil {
			t.Fatalf("qemu-io %q: %q, %v", args, line, err)
		}
	}
}

func TestQcow2ThatQEMUHasIsNotWrittenTo(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		held       string // arguments of qemu-io
		image      string
		read, both bool // may be served read-only; for writing
	}{
		{"-f qcow2 top.qcow2", "top.qcow2", false, false},
		{"-r -f qcow2 top.qcow2", "top.qcow2", true, false},
		{"-f qcow2 base.qcow2", "top.qcow2", false, false},
		{"-r -f qcow2 base.qcow2", "top.qcow2", true, true},
		{"-f qcow2 other.qcow2", "top.qcow2", true, true},
		{"-f qcow2 top.qcow2", "base.qcow2", true, false},
		{"-f raw data.raw", "split.qcow2", false, false},
		{"-r -f raw data.raw", "split.qcow2", true, true},
	} {
		t.Run(tt.held+" against "+tt.image, func(t *testing.T) {
			t.Parallel()
			dir := overlays(t)
			hold(t, dir, strings.Fields(tt.held)...)
			image := filepath.Join(dir, tt.image)
			if free, log := tryServe(t, "-r", image); free != tt.read {
				t.Errorf("read-only: got success %v, want %v: %s", free, tt.read, log)
			}
			if free, log := tryServe(t, image); free != tt.both || !free && !strings.Contains(log, "lock") {
				t.Errorf("for writing: got success %v, want %v or that it finds a lock: %s", free, tt.both, log)
			}
		})
	}
}

// TestKilledWriterIsFollowedAtOnce: the kernel lets go of what an io_uring had
// a while after the process; the next server waits for that.
func TestKilledWriterIsFollowedAtOnce(t *testing.T) {
	dir := overlays(t)
	top := filepath.Join(dir, "top.qcow2")
	for _, engine := range []string{"auto", "pool", "auto"} {
		d := serve(t, "--format=qcow2", "--backing=same-dir", "--engine="+engine, top)
		if out, err := tool(t, dir, "qemu-io", "-f", "raw", "-c", "write -P 5 1M 3M", "-c", "flush", "-c", "write -P 6 8M 1M", "nbd+unix:///?socket="+d.socket); err != nil {
			t.Fatalf("qemu-io: %v: %s", err, out)
		}
		d.signal(syscall.SIGKILL)
		d.wait()
	}
	d := serve(t, "--format=qcow2", "--backing=same-dir", top)
	if out, err := tool(t, dir, "qemu-io", "-r", "-f", "raw", "-c", "read -P 5 1M 3M", "nbd+unix:///?socket="+d.socket); err != nil || strings.Contains(out, "failed") {
		t.Errorf("what was flushed is gone: %v: %s", err, out)
	}
	d.signal(syscall.SIGTERM)
	if got := d.wait(); got != 0 {
		t.Errorf("exit status: got %d, want 0: %s", got, d.stderr.String())
	}
}

// TestUntakenRepliesLeaveAWholeQcow2: the server ends while replies are stuck
// that lease clusters, and what was answered but not flushed is kept.
func TestUntakenRepliesLeaveAWholeQcow2(t *testing.T) {
	dir := shortDir(t)
	image := filepath.Join(dir, "disk.qcow2")
	if out, err := tool(t, dir, "qemu-img", "create", "-q", "-f", "qcow2", image, "64M"); err != nil {
		t.Fatalf("qemu-img create: %v: %s", err, out)
	}
	d := serve(t, "--format=qcow2", drainTimeout, image)
	uri := "nbd+unix:///?socket=" + d.socket
	if out, err := tool(t, dir, "qemu-io", "-f", "raw", "-t", "unsafe", "-d", "unmap", "-c", "write -P 5 0 32M", uri); err != nil {
		t.Fatalf("qemu-io: %v: %s", err, out)
	}
	d.stuck()
	if out, err := tool(t, dir, "qemu-io", "-f", "raw", "-t", "unsafe", "-d", "unmap", "-c", "discard 1M 4M", "-c", "write -P 6 40M 1M", uri); err != nil {
		t.Fatalf("qemu-io: %v: %s", err, out)
	}
	d.signal(syscall.SIGTERM)
	if got := d.wait(); got != 0 {
		t.Errorf("exit status: got %d, want 0: %s", got, d.stderr.String())
	}
	out, err := "lock", errors.New("not tried")
	// The kernel lets go of what an io_uring had a while after the process.
	for tries := 0; strings.Contains(out, "lock") && tries < 100; tries++ {
		out, err = tool(t, dir, "qemu-img", "check", "-f", "qcow2", image)
	}
	if err != nil {
		t.Errorf("qemu-img check: %v: %s", err, out)
	}
	if out, err := tool(t, dir, "qemu-io", "-r", "-f", "qcow2", "-c", "read -P 5 0 1M", "-c", "read -P 0 1M 4M", "-c", "read -P 5 5M 27M", "-c", "read -P 6 40M 1M", image); err != nil || strings.Contains(out, "failed") {
		t.Errorf("what was answered is gone: %v: %s", err, out)
	}
}
