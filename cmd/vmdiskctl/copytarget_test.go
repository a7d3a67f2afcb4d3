package main

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/backingtest"
	"github.com/vmdiskd/vmdiskd/internal/backing/raw"
)

// allocatedClusters is how many clusters of an image have data.
func allocatedClusters(t *testing.T, path string) float64 {
	t.Helper()
	fields, code := fieldsOf(t, "check", "-f", "qcow2", "--output=json", path)
	n, _ := fields["allocated-clusters"].(float64)
	if code != 0 {
		t.Errorf("qemu-img check: exit code %d, %v", code, fields)
	}
	return n
}

func TestCopyToImageIsWhatQEMUConverts(t *testing.T) {
	img := disk(t)
	for _, tt := range []struct{ flags, options string }{
		{"", "cluster_size=64k"},
		{"--compat=0.10", "compat=0.10"},
		{"--cluster-size=4K --refcount-bits=1", "cluster_size=4k,refcount_bits=1"},
		{"--cluster-size=2M", "cluster_size=2M"},
		{"--extended-l2 --cluster-size=128K", "extended_l2=on,cluster_size=128k"},
		{"--compression-type=zstd", "compression_type=zstd"},
	} {
		t.Run(tt.flags, func(t *testing.T) {
			dir := t.TempDir()
			ours, theirs := filepath.Join(dir, "ours"), filepath.Join(dir, "theirs")
			args := append([]string{"copy", "--verify", "-O", "qcow2"}, strings.Fields(tt.flags)...)
			want(t, exitDone, append(args, img, ours)...)
			tool(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-o", tt.options, img, theirs)
			if !strings.Contains(tt.flags, "2M") { // where we leave holes of the host file within clusters
				tool(t, "qemu-img", "compare", "-s", "-f", "qcow2", "-F", "qcow2", ours, theirs)
			}
			got, wanted := judge(t, ours), judge(t, theirs)
			got.Specific.Data.DataFile, wanted.Specific.Data.DataFile = "", ""
			if got != wanted {
				t.Errorf("qemu-img info: got %+v, want %+v", got, wanted)
			}
			if got, wanted := allocatedClusters(t, ours), allocatedClusters(t, theirs); got != wanted {
				t.Errorf("allocated clusters: got %v, want %v", got, wanted)
			}
			sameDisk(t, ours, img)
		})
	}
}

// TestAllocatedImageHasItsStorage: also for zeroes, and beside data that do not
// fill their clusters.
func TestAllocatedImageHasItsStorage(t *testing.T) {
	const size = 8<<20 + 4096
	img := filepath.Join(t.TempDir(), "source")
	must(t, os.WriteFile(img, nil, 0o600))
	must(t, os.Truncate(img, size))
	f, err := os.OpenFile(img, os.O_WRONLY, 0)
	must(t, err)
	_, err = f.WriteAt(bytes.Repeat([]byte{1}, 100<<10), 3<<20+8192)
	must(t, errors.Join(err, f.Close()))
	for _, flags := range []string{"", "--compat=0.10", "--cluster-size=512", "--cluster-size=2M", "--extended-l2 --cluster-size=128K"} {
		t.Run(flags, func(t *testing.T) {
			to := filepath.Join(t.TempDir(), "image")
			want(t, exitDone, append(append([]string{"copy", "--allocated", "-O", "qcow2"}, strings.Fields(flags)...), img, to)...)
			var st unix.Stat_t
			must(t, unix.Stat(to, &st))
			if got := st.Blocks * 512; got < size {
				t.Errorf("the image has %d bytes of storage, want the %d of the disk", got, size)
			}
			judge(t, to)
			sameDisk(t, to, img)
		})
	}
}

// sameDisk fails unless qemu-img finds in the image what the raw file has.
func sameDisk(t *testing.T, image, raw string) {
	t.Helper()
	tool(t, "qemu-img", "compare", "-f", "qcow2", "-F", "raw", image, raw)
}

func TestCopyToImageFromEverySource(t *testing.T) {
	img := disk(t)
	image := filepath.Join(t.TempDir(), "image")
	tool(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", img, image)
	for _, source := range [][]string{
		{nbdkit(t, "file", img)}, {nbdkit(t, "--no-sr", "file", img)}, {"-f", "qcow2", image},
	} {
		to := filepath.Join(t.TempDir(), "copy")
		want(t, exitDone, append([]string{"copy", "--verify", "-O", "qcow2", "--request-size=4K"}, append(source, to)...)...)
		judge(t, to)
		sameDisk(t, to, img)
	}
}

// TestClaimedDeviceKeepsWhatItHas: nothing is written to one that is mounted, or
// otherwise in use by the kernel.
func TestClaimedDeviceKeepsWhatItHas(t *testing.T) {
	img, dir := disk(t), t.TempDir()
	file := filepath.Join(dir, "file")
	i, err := os.Stat(img)
	must(t, err)
	tool(t, "qemu-img", "create", "-q", "-f", "qcow2", file, "4M")
	must(t, os.Truncate(file, 2*i.Size()))
	before, err := os.ReadFile(file)
	must(t, err)
	device := backingtest.Loop(t, file, 512)
	free := backingtest.Claim(t, device)
	commands := [][]string{
		{"copy", img, device},
		{"copy", "-O", "qcow2", img, device},
		{"image", "create", "--force", device, "1M"},
		{"image", "create", "--force", "-f", "raw", device, "1M"},
		{"image", "create", "--force", "--data-file=" + device, filepath.Join(dir, "disk"), "1M"},
		{"image", "resize", device, "5M"},
		{"image", "check", "--repair=leaks", device},
	}
	for _, c := range commands {
		if code, _, stderr := ctl(t, c...); code != exitFailed || !strings.Contains(stderr, string(backing.ErrLocked)) {
			t.Errorf("%q: got exit code %d and %q, want %d and %q", c, code, stderr, exitFailed, backing.ErrLocked)
		}
		if now, err := os.ReadFile(file); err != nil || !bytes.Equal(now, before) {
			t.Errorf("%q has written to the device, %v", c, err)
			must(t, os.WriteFile(file, before, 0o600))
		}
	}
	if _, err := openImageFile(raw.Options{Path: device}); !errors.Is(err, backing.ErrLocked) {
		t.Errorf("open for an export: got %v, want %v", err, backing.ErrLocked)
	}
	free()
	want(t, exitDone, commands[0]...)
}

func TestCopyToImageRoundsTheSizeUp(t *testing.T) {
	dir := t.TempDir()
	raw, image := filepath.Join(dir, "raw"), filepath.Join(dir, "image")
	p := bytes.Repeat([]byte{5}, 100001)
	must(t, os.WriteFile(raw, p, 0o600))
	want(t, exitDone, "copy", "--verify", "-O", "qcow2", raw, image)
	if j := judge(t, image); j.VirtualSize != 100352 {
		t.Errorf("size: got %d, want 100352", j.VirtualSize)
	}
	if got := contents(t, "qcow2", image); !bytes.Equal(got, append(p, make([]byte, 351)...)) {
		t.Error("the disk is not the source and zeroes")
	}
	must(t, os.Truncate(raw, 0))
	empty := filepath.Join(dir, "empty")
	want(t, exitDone, "copy", "-O", "qcow2", raw, empty)
	if j := judge(t, empty); j.VirtualSize != 0 {
		t.Errorf("copy of nothing: got %d bytes", j.VirtualSize)
	}
}

func TestCopyIntoAnImageThatIsThere(t *testing.T) {
	img := disk(t)
	image := filepath.Join(t.TempDir(), "image")
	tool(t, "qemu-img", "create", "-q", "-f", "qcow2", image, "5M")
	tool(t, "qemu-io", "-f", "qcow2", "-c", "write -P 9 0 5M", image)
	want(t, exitDone, "copy", "--verify", "-O", "qcow2", img, image)
	judge(t, image)
	wanted, err := os.ReadFile(img)
	must(t, err)
	if got := contents(t, "qcow2", image); !bytes.Equal(got, append(wanted, bytes.Repeat([]byte{9}, 1<<20)...)) {
		t.Error("the disk is not the source followed by what was there")
	}
	full := filepath.Join(t.TempDir(), "full")
	want(t, exitDone, "copy", "-O", "qcow2", "--allocated", img, full)
	if n := allocatedClusters(t, full); n != 64 {
		t.Errorf("clusters of a copy that is allocated: got %v, want 64", n)
	}
	sameDisk(t, full, img)
}

// TestAdviceAboutADestinationIsNotThatOfTheSource: to do what it says makes a difference.
func TestAdviceAboutADestinationIsNotThatOfTheSource(t *testing.T) {
	img, dir := disk(t), t.TempDir()
	base, top := filepath.Join(dir, "base"), filepath.Join(dir, "top")
	must(t, os.WriteFile(base, make([]byte, 4<<20), 0o600))
	tool(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", top)
	for to, says := range map[string]string{
		base: "if it is raw, say so: -O raw\n",
		top:  "but those are for the source: of a destination no other file is opened\n",
	} {
		if _, _, stderr := ctl(t, "copy", "-O", "qcow2", img, to); !strings.HasSuffix(stderr, says) {
			t.Errorf("copy to %q: got %q, want an end of %q", to, stderr, says)
		}
	}
}

func TestCopyToImageIsRefused(t *testing.T) {
	img := disk(t)
	dir := t.TempDir()
	base, top, small, link := filepath.Join(dir, "base"), filepath.Join(dir, "top"), filepath.Join(dir, "small"), filepath.Join(dir, "link")
	must(t, os.WriteFile(base, bytes.Repeat([]byte{1}, 4<<20), 0o600))
	tool(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", top)
	tool(t, "qemu-img", "create", "-q", "-f", "qcow2", small, "1M")
	must(t, os.Link(top, link))
	for _, tt := range []struct {
		code int
		args []string
	}{
		{exitRefused, []string{img, top}}, // it names a backing file
		{exitRefused, []string{img, small}},
		{exitRefused, []string{top, link}},
		{exitRefused, []string{"-f", "qcow2", "--backing=same-dir", top, link}},
		{exitRefused, []string{"-f", "qcow2", "--backing=same-dir", top, base}},
		{exitFailed, []string{img, base}}, // a raw file
		{exitFailed, []string{img, dir}},
		{exitUsage, []string{"--cluster-size=4K", img, small}},
		{exitUsage, []string{"--cluster-size=3K", img, filepath.Join(dir, "new")}},
		{exitUsage, []string{"--compat=1.0", img, filepath.Join(dir, "new")}},
		{exitUsage, []string{"-O", "raw", "--compat=1.1", img, filepath.Join(dir, "new")}},
		{exitUsage, []string{"-O", "vmdk", img, filepath.Join(dir, "new")}},
		{exitUsage, []string{img, "nbd://localhost"}},
		{exitFailed, []string{"-f", "qcow2", base, filepath.Join(dir, "new")}},
	} {
		before := map[string][]byte{}
		for _, path := range []string{base, top, small} {
			b, err := os.ReadFile(path)
			must(t, err)
			before[path] = b
		}
		want(t, tt.code, append([]string{"copy", "-O", "qcow2"}, tt.args...)...)
		for path, b := range before {
			if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, b) {
				t.Fatalf("%q changed %q: %v", tt.args, path, err)
			}
		}
		if _, err := os.Stat(filepath.Join(dir, "new")); err == nil {
			t.Fatalf("%q left an image", tt.args)
		}
	}
}

func TestCopyToImageThatFailsLeavesNothing(t *testing.T) {
	to := filepath.Join(t.TempDir(), "copy")
	want(t, exitFailed, "copy", "-O", "qcow2", "--request-size=32K",
		nbdkit(t, "--filter=error", "file", disk(t), "error-pread=EIO", "error-pread-rate=30%"), to)
	if _, err := os.Stat(to); err == nil {
		t.Error("half a copy was left behind")
	}
}

// TestImageThatWasCopiedIsThere, also when another copy was to go there at the
// same time.
func TestImageThatWasCopiedIsThere(t *testing.T) {
	twice(t, func(path string) []string { return []string{"copy", "-O", "qcow2", disk(t), path} })
}
