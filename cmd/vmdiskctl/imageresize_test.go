package main

import (
	"bytes"
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing/backingtest"
)

// contents is what QEMU finds in an image.
func contents(t *testing.T, format, path string) []byte {
	t.Helper()
	to := filepath.Join(t.TempDir(), "raw")
	tool(t, "qemu-img", "convert", "-f", format, "-O", "raw", path, to)
	b, err := os.ReadFile(to)
	must(t, err)
	return b
}

func TestImageResizeIsWhatQEMUResizes(t *testing.T) {
	for _, options := range []string{
		"cluster_size=64k", "cluster_size=512", "compat=0.10", "extended_l2=on,cluster_size=16k", "refcount_bits=1", "data_file=data",
	} {
		t.Run(options, func(t *testing.T) {
			t.Chdir(t.TempDir())
			tool(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", options, "image", "1000000")
			tool(t, "qemu-io", "-f", "qcow2", "-c", "write -P 1 0 300k", "-c", "write -P 2 990000 10000", "image")
			wanted := contents(t, "qcow2", "image")
			for _, step := range []struct {
				size string
				n    int
			}{{"+512", 1000960}, {"1000960", 1000960}, {"+1M", 2049536}, {"64M", 64 << 20}} {
				var said created
				out := want(t, exitDone, "image", "resize", "--backing=same-dir", "--json", "image", step.size)
				must(t, json.Unmarshal([]byte(out), &said))
				if said != (created{Filename: "image", Format: "qcow2", VirtualSize: int64(step.n)}) {
					t.Errorf("resize %s: said %+v", step.size, said)
				}
				if j := judge(t, "image"); j.VirtualSize != int64(step.n) {
					t.Errorf("resize %s: qemu-img finds %d bytes, want %d", step.size, j.VirtualSize, step.n)
				}
				wanted = append(wanted, make([]byte, step.n-len(wanted))...)
				if !bytes.Equal(contents(t, "qcow2", "image"), wanted) {
					t.Errorf("resize %s: the disk is not what it was and zeroes", step.size)
				}
			}
		})
	}
}

func TestImageResizeHidesWhatTheBackingFileHasBehindTheDisk(t *testing.T) {
	t.Chdir(t.TempDir())
	must(t, os.WriteFile("base", bytes.Repeat([]byte{1}, 1<<20), 0o600))
	tool(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "top", "100k")
	want(t, exitRefused, "image", "resize", "top", "2M")
	want(t, exitDone, "image", "resize", "--backing=same-dir", "top", "2M")
	judge(t, "top")
	wanted := append(bytes.Repeat([]byte{1}, 100<<10), make([]byte, 2<<20-100<<10)...)
	if !bytes.Equal(contents(t, "qcow2", "top"), wanted) {
		t.Error("the disk is not what it was and zeroes")
	}
}

func TestImageResizeRaw(t *testing.T) {
	path := filepath.Join(t.TempDir(), "raw")
	must(t, os.WriteFile(path, []byte("disk"), 0o600))
	for size, wanted := range map[string]string{"4": "disk", "+1": "disk\x00"} {
		want(t, exitDone, "image", "resize", "-f", "raw", path, size)
		if got, err := os.ReadFile(path); err != nil || string(got) != wanted {
			t.Errorf("resize %s: got %q, %v, want %q", size, got, err, wanted)
		}
		must(t, os.WriteFile(path, []byte("disk"), 0o600))
	}
	want(t, exitDone, "image", "resize", "-f", "raw", path, "1T")
	if i, err := os.Stat(path); err != nil || i.Size() != 1<<40 {
		t.Errorf("size: got %v, %v, want 1 TiB", i, err)
	}
}

func TestImageResizeRefuses(t *testing.T) {
	path := qemuImage(t)
	raw := filepath.Join(t.TempDir(), "raw")
	must(t, os.WriteFile(raw, make([]byte, 1024), 0o600))
	before, err := os.ReadFile(path)
	must(t, err)
	for _, tt := range []struct {
		code int
		args []string
	}{
		{exitRefused, []string{path, "1M"}},
		{exitRefused, []string{"-f", "raw", raw, "512"}},
		{exitUsage, []string{"--shrink", path, "1M"}},
		{exitUsage, []string{path, "--", "-1M"}},
		{exitUsage, []string{path, "++1M"}},
		{exitUsage, []string{path, "+9223372036854775807"}},
		{exitUsage, []string{path, "+"}},
		{exitUsage, []string{"-f", "vmdk", path, "65M"}},
		{exitUsage, []string{"-f", "raw", "--backing=same-dir", raw, "2K"}},
		{exitFailed, []string{path, "+1"}},
		{exitUsage, []string{path, "8E"}},
		{exitFailed, []string{path, "7E"}},
		{exitFailed, []string{raw, "2K"}},
		{exitFailed, []string{path + "none", "2K"}},
	} {
		want(t, tt.code, append([]string{"image", "resize"}, tt.args...)...)
		if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, before) {
			t.Fatalf("%q changed the image: %v", tt.args, err)
		}
		if i, err := os.Stat(raw); err != nil || i.Size() != 1024 {
			t.Fatalf("%q changed the raw image: %v, %v", tt.args, i, err)
		}
	}
}

func TestImageResizeLeavesAnImageInUseAlone(t *testing.T) {
	path := qemuImage(t)
	for _, args := range [][]string{{"-f", "qcow2", path}, {"-f", "raw", path}} {
		cmd := exec.CommandContext(t.Context(), "qemu-io", args...)
		in, out := backingtest.Converse(t, cmd)
		_, err := io.WriteString(in, "length\n")
		must(t, err)
		if line, err := out.ReadString('\n'); err != nil || !strings.Contains(line, "iB") { // the image is open
			t.Fatalf("qemu-io: %q, %v", line, err)
		}
		want(t, exitFailed, "image", "resize", args[0], args[1], path, "1G")
		must(t, in.Close())
		must(t, cmd.Wait())
	}
	want(t, exitDone, "image", "resize", path, "1G")
}
