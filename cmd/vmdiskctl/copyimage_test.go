package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestCopyFromImageIsWhatQEMUConverts(t *testing.T) {
	for _, image := range chains(t) {
		t.Run(image.Name, func(t *testing.T) {
			to := filepath.Join(t.TempDir(), "raw")
			want(t, exitDone, "copy", "--verify", "--source-format=qcow2", above(&image), image.Path, to)
			sameBytes(t, to, image.Raw())
		})
	}
}

func sameBytes(t *testing.T, path, wanted string) {
	t.Helper()
	got, err := os.ReadFile(path)
	must(t, err)
	b, err := os.ReadFile(wanted)
	must(t, err)
	if !bytes.Equal(got, b) {
		t.Errorf("%q has %d bytes that are not the %d of %q", path, len(got), len(b), wanted)
	}
}

func TestCopyFromImageToServer(t *testing.T) {
	path := qemuImage(t)
	dir := t.TempDir()
	raw, served := filepath.Join(dir, "raw"), filepath.Join(dir, "served")
	tool(t, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, raw)
	must(t, os.WriteFile(served, bytes.Repeat([]byte{7}, 64<<20), 0o600))
	socket := serve(t, "qemu-nbd", "-f", "raw", served)
	want(t, exitDone, "copy", "-f", "qcow2", path, "nbd+unix:///?socket="+socket)
	sameBytes(t, served, raw)
}

func TestCopyFromImageNeverOverwritesItsChain(t *testing.T) {
	dir := t.TempDir()
	base, top, link := filepath.Join(dir, "base"), filepath.Join(dir, "top"), filepath.Join(dir, "link")
	precious := bytes.Repeat([]byte{1}, 1<<20)
	must(t, os.WriteFile(base, precious, 0o600))
	tool(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", top)
	must(t, os.Link(base, link))
	want(t, exitRefused, "copy", "-f", "qcow2", top, filepath.Join(dir, "new"))
	for _, to := range []string{base, link} {
		want(t, exitRefused, "copy", "-f", "qcow2", "--backing=same-dir", top, to)
		if got, err := os.ReadFile(base); err != nil || !bytes.Equal(got, precious) {
			t.Fatalf("copy to %q changed the backing file: %v", to, err)
		}
	}
	for _, args := range [][]string{
		{"-f", "vmdk", top}, {"--backing=same-dir", top}, {"-f", "qcow2", "--snapshot=", top}, {"-f", "qcow2", "nbd://localhost"},
	} {
		want(t, exitUsage, append(append([]string{"copy"}, args...), filepath.Join(dir, "new"))...)
	}
	if _, err := os.Stat(filepath.Join(dir, "new")); err == nil {
		t.Error("a copy that was refused left a file")
	}
}

func TestCopyFromDamagedImageFails(t *testing.T) {
	path := qemuImage(t)
	patchImage(t, path, 0x40008, 0x80, 0, 0, 0, 0, 5, 2, 0)
	to := filepath.Join(t.TempDir(), "raw")
	want(t, exitFailed, "copy", "-f", "qcow2", path, to)
	if _, err := os.Stat(to); err == nil {
		t.Error("half a copy was left")
	}
}

func TestCopyFromDamagedImageLeniently(t *testing.T) {
	dir := t.TempDir()
	base, top, raw := filepath.Join(dir, "base"), filepath.Join(dir, "top"), filepath.Join(dir, "raw")
	must(t, os.WriteFile(base, bytes.Repeat([]byte{1}, 1<<20), 0o600))
	tool(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", top)
	tool(t, "qemu-io", "-f", "qcow2", "-c", "write -P 2 0 64k", top)
	patchImage(t, top, 0x30000, 0x80, 0, 0, 0x10, 0, 0, 0, 0) // the L2 table lies beyond the end
	tool(t, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", top, raw)
	ours := filepath.Join(dir, "ours")
	want(t, exitFailed, "copy", "-f", "qcow2", "--backing=same-dir", top, ours)
	want(t, exitDone, "copy", "-f", "qcow2", "--backing=same-dir", "--lenient", top, ours)
	sameBytes(t, ours, raw)
}

// TestCopyOfAContainerIsTold: it is what was asked for, and hardly what was meant.
func TestCopyOfAContainerIsTold(t *testing.T) {
	dir := t.TempDir()
	img, empty := filepath.Join(dir, "disk.qcow2"), filepath.Join(dir, "empty")
	must(t, os.WriteFile(empty, nil, 0o600))
	want(t, exitDone, "image", "create", img, "1M")
	for _, tt := range []struct {
		name string
		args []string
		told bool
	}{
		{"not said", []string{img}, true},
		{"raw", []string{"-f", "raw", img}, false},
		{"qcow2", []string{"-f", "qcow2", img}, false},
		{"a raw disk", []string{disk(t)}, false},
		{"an empty file", []string{empty}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			code, _, stderr := ctl(t, append(append([]string{"copy"}, tt.args...), filepath.Join(t.TempDir(), "copy"))...)
			if code != exitDone || strings.Contains(stderr, "begins as a qcow2 image") != tt.told {
				t.Errorf("exit %d, stderr %q; want that it tells: %t", code, stderr, tt.told)
			}
		})
	}
}
