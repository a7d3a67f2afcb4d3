package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// tool runs a program in dir.
func tool(t *testing.T, dir, program string, args ...string) (string, error) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), program, args...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	if errors.Is(err, exec.ErrNotFound) {
		t.Fatalf("needs %s (packages qemu-utils, libnbd-bin)", program)
	}
	return string(out), err
}

// qcow2Chain makes top.qcow2, with an internal snapshot, compressed clusters
// and zeroes, above base.qcow2.
func qcow2Chain(t *testing.T) string {
	t.Helper()
	dir := shortDir(t)
	for _, line := range []string{
		"qemu-img create -q -f qcow2 base.qcow2 64M",
		"qemu-io -f qcow2 -c write|-P|0x11|0|3M -c write|-c|-P|0x22|8M|256k base.qcow2",
		"qemu-img create -q -f qcow2 -F qcow2 -b base.qcow2 top.qcow2 96M",
		"qemu-io -f qcow2 -c write|-P|0x33|1M|100k -c write|-P|0x44|90M|1M top.qcow2",
		"qemu-img snapshot -c before top.qcow2",
		"qemu-io -f qcow2 -c write|-z|2M|1M -c write|-P|0x55|1M|4k top.qcow2",
	} {
		args := strings.Fields(line)
		for i := range args {
			args[i] = strings.ReplaceAll(args[i], "|", " ")
		}
		if out, err := tool(t, dir, args[0], args[1:]...); err != nil {
			t.Fatalf("%s: %v: %s", line, err, out)
		}
	}
	return dir
}

func TestQcow2ChainIsServedAsQEMUReadsIt(t *testing.T) {
	t.Parallel()
	dir := qcow2Chain(t)
	top := filepath.Join(dir, "top.qcow2")
	if out, err := tool(t, dir, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", top, "want"); err != nil {
		t.Fatalf("qemu-img convert: %v: %s", err, out)
	}
	want, err := os.ReadFile(filepath.Join(dir, "want"))
	if err != nil {
		t.Fatal(err)
	}
	for name, args := range map[string][]string{
		"same directory, pool":     {"--backing=same-dir", "--engine=pool"},
		"same directory, io_uring": {"--backing=same-dir", "--engine=auto"},
		"beneath, direct":          {"--backing=beneath=" + dir, "--cache=none"},
		"explicit":                 {"--backing-file=" + filepath.Join(dir, "base.qcow2") + ":qcow2"},
	} {
		t.Run(name, func(t *testing.T) {
			d := serve(t, append(args, "-r", "--format=qcow2", top)...)
			uri := "nbd+unix:///?socket=" + d.socket
			if out, err := tool(t, dir, "qemu-img", "compare", "-f", "raw", "-F", "qcow2", uri, top); err != nil || !strings.Contains(out, "identical") {
				t.Errorf("qemu-img compare: %q, %v, want identical images", out, err)
			}
			copied := filepath.Join(t.TempDir(), "copy")
			if out, err := tool(t, dir, "nbdcopy", uri, copied); err != nil {
				t.Fatalf("nbdcopy: %v: %s", err, out)
			}
			if got, err := os.ReadFile(copied); err != nil || !bytes.Equal(got, want) {
				t.Errorf("nbdcopy: got %d bytes, %v, want the %d that QEMU reads", len(got), err, len(want))
			}
			d.signal(syscall.SIGTERM)
			if got := d.wait(); got != 0 {
				t.Errorf("exit status: got %d, want 0: %s", got, d.stderr.String())
			}
		})
	}
}

func TestQcow2SnapshotIsServed(t *testing.T) {
	t.Parallel()
	dir := qcow2Chain(t)
	top := filepath.Join(dir, "top.qcow2")
	if out, err := tool(t, dir, "qemu-img", "convert", "-f", "qcow2", "-l", "before", "-O", "raw", top, "want"); err != nil {
		t.Fatalf("qemu-img convert: %v: %s", err, out)
	}
	d := serve(t, "-r", "--format=qcow2", "--backing=same-dir", "--snapshot=before", top)
	out, err := tool(t, dir, "qemu-img", "compare", "-f", "raw", "-F", "raw", "nbd+unix:///?socket="+d.socket, "want")
	if err != nil || !strings.Contains(out, "identical") {
		t.Errorf("qemu-img compare: %q, %v, want identical images", out, err)
	}
}

func TestDamagedQcow2IsServedLeniently(t *testing.T) {
	t.Parallel()
	dir := qcow2Chain(t)
	top := filepath.Join(dir, "top.qcow2")
	b, err := os.ReadFile(top)
	if err != nil {
		t.Fatal(err)
	}
	b[binary.BigEndian.Uint64(b[40:])+7] |= 1 // a reserved bit of the first L1 entry
	if err := os.WriteFile(top, b, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, lenient := range []bool{false, true} {
		d := serve(t, "-r", "--format=qcow2", "--backing=same-dir", fmt.Sprintf("--lenient=%v", lenient), top)
		out, err := tool(t, dir, "qemu-img", "compare", "-f", "raw", "-F", "qcow2", "nbd+unix:///?socket="+d.socket, top)
		if (err == nil) != lenient {
			t.Errorf("lenient %v: qemu-img compare: %q, %v", lenient, out, err)
		}
	}
}

func TestQcow2IsRefusedWithAReason(t *testing.T) {
	t.Parallel()
	dir := qcow2Chain(t)
	top := filepath.Join(dir, "top.qcow2")
	for _, tt := range []struct {
		name string
		args []string
		want string
	}{
		{"backing file by default", []string{"-r"}, "--backing=same-dir"},
		{"other directory", []string{"-r", "--backing=beneath=/usr"}, "--backing=beneath=/usr"},
		{"no such snapshot", []string{"-r", "--backing=same-dir", "--snapshot=after"}, "after"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			out, err := program(append(tt.args, "--format=qcow2", "-U", filepath.Join(dir, "s"), top)...).CombinedOutput()
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.ExitCode() != exitFailed || !strings.Contains(string(out), tt.want) {
				t.Errorf("got %v: %s; want exit status %d and %q", err, out, exitFailed, tt.want)
			}
		})
	}
}

func TestKilledServerLeavesNoLockBehind(t *testing.T) {
	t.Parallel()
	dir := qcow2Chain(t)
	d := serve(t, "-r", "--format=qcow2", "--backing=same-dir", filepath.Join(dir, "top.qcow2"))
	write := func() (string, error) {
		return tool(t, dir, "qemu-io", "-f", "qcow2", "-c", "write 0 512", "base.qcow2")
	}
	if out, err := write(); err == nil || !strings.Contains(out, "lock") {
		t.Fatalf("qemu-io writes to the backing file of a disk that is served: %q, %v", out, err)
	}
	d.signal(syscall.SIGKILL)
	d.wait()
	// The kernel lets go of what its io_uring had a while after the process.
	var out string
	err := errors.New("not tried")
	for tries := 0; err != nil && tries < 100; tries++ {
		out, err = write()
	}
	if err != nil {
		t.Errorf("qemu-io writes after the server was killed: %v: %s", err, out)
	}
}
