package main

import (
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/cmd/vmdiskctl/internal/copier"
	"github.com/vmdiskd/vmdiskd/internal/backing/backingtest"
)

// judged is what qemu-img says of a sound image.
type judged struct {
	Format      string `json:"format"`
	VirtualSize int64  `json:"virtual-size"`
	ClusterSize int64  `json:"cluster-size"`
	Backing     string `json:"backing-filename"`
	Specific    struct {
		Data struct {
			Compat      string `json:"compat"`
			Compression string `json:"compression-type"`
			Refcount    int    `json:"refcount-bits"`
			Extended    bool   `json:"extended-l2"`
			DataFile    string `json:"data-file"`
			Raw         bool   `json:"data-file-raw"`
		} `json:"data"`
	} `json:"format-specific"`
}

// judge fails unless qemu-img finds the qcow2 image sound.
func judge(t *testing.T, path string) judged {
	t.Helper()
	if out, err := exec.Command("qemu-img", "check", "-f", "qcow2", path).CombinedOutput(); err != nil {
		t.Errorf("qemu-img check: %v\n%s", err, out)
	}
	out, err := exec.Command("qemu-img", "info", "-f", "qcow2", "--output=json", path).Output()
	must(t, err)
	var j judged
	must(t, json.Unmarshal(out, &j))
	return j
}

func TestImageCreateMakesWhatWasAskedFor(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	out := want(t, exitDone, "image", "create", "--json", "--cluster-size=128K", "--refcount-bits=8", "--extended-l2",
		"--compression-type=zstd", "--preallocation=metadata", path, "5M")
	var said created
	must(t, json.Unmarshal([]byte(out), &said))
	if wanted := (created{Filename: path, Format: "qcow2", VirtualSize: 5 << 20, ClusterSize: 128 << 10}); said != wanted {
		t.Errorf("said %+v, want %+v", said, wanted)
	}
	j := judge(t, path)
	d := j.Specific.Data
	if j.VirtualSize != 5<<20 || j.ClusterSize != 128<<10 || d.Compat != "1.1" || d.Compression != "zstd" ||
		d.Refcount != 8 || !d.Extended {
		t.Errorf("qemu-img says %+v", j)
	}
	old := filepath.Join(t.TempDir(), "old")
	want(t, exitDone, "image", "create", "--compat=0.10", old, "1G")
	if j := judge(t, old); j.Specific.Data.Compat != "0.10" || j.VirtualSize != 1<<30 {
		t.Errorf("qemu-img says %+v", j)
	}
}

func TestImageCreateTakesTheSizeOfTheBackingFile(t *testing.T) {
	dir := t.TempDir()
	base, top := filepath.Join(dir, "base"), filepath.Join(dir, "top")
	must(t, os.WriteFile(base, []byte(strings.Repeat("x", 70001)), 0o600))
	want(t, exitDone, "image", "create", "--backing-file=base", "--backing-format=raw", top, "1M")
	next := filepath.Join(dir, "next")
	want(t, exitDone, "image", "create", "--backing-file=top", "--backing-format=qcow2", next)
	if j := judge(t, next); j.VirtualSize != 1<<20 || j.Backing != "top" {
		t.Errorf("qemu-img says %+v", j)
	}
	small := filepath.Join(dir, "small")
	want(t, exitDone, "image", "create", "--backing-file=base", "--backing-format=raw", small)
	if j := judge(t, small); j.VirtualSize != 137*512 {
		t.Errorf("size is %d, want that of the backing file rounded up, %d", j.VirtualSize, 137*512)
	}
}

func TestImageCreateMakesTheDataFile(t *testing.T) {
	dir := t.TempDir()
	path, data := filepath.Join(dir, "disk"), filepath.Join(dir, "data")
	want(t, exitDone, "image", "create", "--data-file="+data, "--data-file-raw", path, "1M")
	if j := judge(t, path); j.Specific.Data.DataFile != data || !j.Specific.Data.Raw {
		t.Errorf("qemu-img says %+v", j)
	}
	fi, err := os.Stat(data)
	must(t, err)
	if fi.Size() != 1<<20 {
		t.Errorf("data file has %d bytes, want %d", fi.Size(), 1<<20)
	}
}

// TestImageCreateThatIsRefusedLeavesFilesAlone: whatever is wrong with the options is
// found before a file is emptied.
func TestImageCreateThatIsRefusedLeavesFilesAlone(t *testing.T) {
	dir := t.TempDir()
	path, long := filepath.Join(dir, "disk"), strings.Repeat("b", 250)
	data := filepath.Join(dir, long, long)
	must(t, os.Mkdir(filepath.Dir(data), 0o700))
	for _, args := range [][]string{
		{"-f", "raw", "--preallocation=flloc", path, "1M"},
		{"-f", "raw", "--preallocation=metadata", path, "1M"},
		{"--cluster-size=512", "--backing-format=raw", "--backing-file=" + long + long, path, "1M"},
		{"--cluster-size=512", "--data-file=" + data, path, "1M"},
		{"--preallocation=flloc", "--data-file=" + data, path, "1M"},
	} {
		for _, file := range []string{path, data} {
			must(t, os.WriteFile(file, []byte("what was there"), 0o600))
		}
		want(t, exitUsage, append([]string{"image", "create", "--force"}, args...)...)
		for _, file := range []string{path, data} {
			if got, err := os.ReadFile(file); err != nil || string(got) != "what was there" {
				t.Errorf("%q: %s has %q, %v", args, filepath.Base(file), got, err)
			}
		}
	}
}

// TestImageCreateFollowsLinksAsTheKernelDoes: what ".." is in the name of an image's
// other file is no matter of text.
func TestImageCreateFollowsLinksAsTheKernelDoes(t *testing.T) {
	dir := t.TempDir()
	deep := filepath.Join(dir, "real", "deep")
	must(t, os.MkdirAll(deep, 0o700))
	must(t, os.Symlink(deep, filepath.Join(dir, "link")))
	must(t, os.WriteFile(filepath.Join(dir, "real", "base"), make([]byte, 4<<20), 0o600))
	for _, name := range []string{"base", "data"} {
		must(t, os.WriteFile(filepath.Join(dir, name), make([]byte, 1<<20), 0o600))
	}
	top := filepath.Join(dir, "link", "top")
	want(t, exitDone, "image", "create", top, "--backing-file=../base", "--backing-format=raw")
	if j := judge(t, top); j.VirtualSize != 4<<20 {
		t.Errorf("the disk has %d bytes, its backing file %d", j.VirtualSize, 4<<20)
	}
	want(t, exitDone, "image", "create", "--force", top, "2M", "--data-file=../data")
	for name, size := range map[string]int64{"data": 1 << 20, "real/data": 2 << 20} {
		if fi, err := os.Stat(filepath.Join(dir, name)); err != nil || fi.Size() != size {
			t.Errorf("%s: %v, %v, want %d bytes", name, fi, err, size)
		}
	}
	want(t, exitRefused, "image", "create", "--force", top, "1M", "--data-file=../deep/top")
}

// TestImageCreateMakesNoLoop: a file that the chain of its backing file has stays.
func TestImageCreateMakesNoLoop(t *testing.T) {
	t.Chdir(t.TempDir())
	want(t, exitDone, "image", "create", "a", "1M", "--data-file=a.data")
	want(t, exitDone, "image", "create", "b", "--backing-file=a", "--backing-format=qcow2")
	want(t, exitDone, "image", "create", "c", "--backing-file=b", "--backing-format=qcow2")
	must(t, os.Symlink("b", "link"))
	for _, file := range []string{"a", "a.data", "b", "c", "link"} {
		want(t, exitRefused, "image", "create", "--force", file, "1M", "--backing-file=c", "--backing-format=qcow2")
		if qemu := exec.Command("qemu-img", "check", "-q", "c"); qemu.Run() != nil {
			t.Fatalf("%s is not what it was: c is broken", file)
		}
	}
	must(t, os.Remove("a"))
	want(t, exitDone, "image", "create", "d", "1M", "--backing-file=c", "--backing-format=qcow2")
	want(t, exitRefused, "image", "create", "e", "1M", "--backing-file=./e", "--backing-format=qcow2")
}

func TestImageCreateRoundsTheSizeUpAsQEMUDoes(t *testing.T) {
	for _, size := range []string{"1", "513", "1048577", "1049088"} {
		dir := t.TempDir()
		ours, theirs := filepath.Join(dir, "ours"), filepath.Join(dir, "theirs")
		want(t, exitDone, "image", "create", ours, size)
		tool(t, "qemu-img", "create", "-q", "-f", "qcow2", theirs, size)
		if got, wanted := judge(t, ours).VirtualSize, judge(t, theirs).VirtualSize; got != wanted {
			t.Errorf("size %s: the disk has %d bytes, qemu-img's %d", size, got, wanted)
		}
	}
	path := filepath.Join(t.TempDir(), "raw")
	want(t, exitDone, "image", "create", "-f", "raw", path, "513")
	if i, err := os.Stat(path); err != nil || i.Size() != 513 {
		t.Errorf("raw image of 513 bytes: got %v, %v", i, err)
	}
	want(t, exitUsage, "image", "create", filepath.Join(t.TempDir(), "huge"), "9223372036854775807")
}

// TestImageCreateThatCannotReportLeavesNoFile: the command fails, and a second
// one would be refused.
func TestImageCreateThatCannotReportLeavesNoFile(t *testing.T) {
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	must(t, err)
	defer full.Close()
	for _, format := range []string{"qcow2", "raw"} {
		path := filepath.Join(t.TempDir(), "disk")
		if code := run(t.Context(), []string{"image", "create", "-f", format, path, "1M"}, full, os.Stderr); code != exitFailed {
			t.Errorf("%s: exit code %d, want %d", format, code, exitFailed)
		}
		if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: the file is there: %v", format, err)
		}
	}
}

func TestImageCreateRaw(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	want(t, exitDone, "image", "create", "-f", "raw", "--preallocation=falloc", path, "1M")
	if n := allocated(t, path); n < 1<<20 {
		t.Errorf("%d bytes are allocated, want %d", n, 1<<20)
	}
}

func TestImageCreateOverwritesWithForceOnly(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	must(t, os.WriteFile(path, []byte("precious"), 0o600))
	want(t, exitRefused, "image", "create", path, "1M")
	got, err := os.ReadFile(path)
	must(t, err)
	if string(got) != "precious" {
		t.Fatalf("the file has %q", got)
	}
	want(t, exitRefused, "image", "create", "--force", "--backing-file="+path, "--backing-format=raw", path, "1M")
	if got, err = os.ReadFile(path); err != nil || string(got) != "precious" {
		t.Fatalf("the backing file has %q, error %v", got, err)
	}
	want(t, exitDone, "image", "create", "--force", path, "1M")
	judge(t, path)
}

func TestImageCreateLeavesNothingWhenItFails(t *testing.T) {
	dir := t.TempDir()
	data := filepath.Join(dir, "data")
	must(t, os.WriteFile(data, []byte("precious"), 0o600))
	want(t, exitRefused, "image", "create", "--data-file=data", filepath.Join(dir, "disk"), "1M")
	left, err := os.ReadDir(dir)
	must(t, err)
	if len(left) != 1 || left[0].Name() != "data" {
		t.Errorf("left are %v", left)
	}
}

// TestImageCreateEmptiesNothingWhenAFileIsInUse, whichever of the two it is.
func TestImageCreateEmptiesNothingWhenAFileIsInUse(t *testing.T) {
	for _, used := range []string{"disk", "data"} {
		dir := t.TempDir()
		for _, name := range []string{"disk", "data"} {
			must(t, os.WriteFile(filepath.Join(dir, name), []byte("precious "+name), 0o600))
		}
		user, err := copier.Claim{}.Open(filepath.Join(dir, used))
		must(t, err)
		want(t, exitFailed, "image", "create", "--force", "--data-file=data", filepath.Join(dir, "disk"), "1M")
		must(t, user.Close())
		for _, name := range []string{"disk", "data"} {
			if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(got) != "precious "+name {
				t.Errorf("%s is in use: %s has %q, %v", used, name, got, err)
			}
		}
		want(t, exitDone, "image", "create", "--force", "--data-file=data", filepath.Join(dir, "disk"), "1M")
	}
}

// TestImageCreateEmptiesNothingWhenADeviceIsTooSmall, which only turns out when both
// files are open.
func TestImageCreateEmptiesNothingWhenADeviceIsTooSmall(t *testing.T) {
	dir := t.TempDir()
	disk, small := filepath.Join(dir, "disk"), filepath.Join(dir, "small")
	must(t, os.WriteFile(disk, []byte("precious"), 0o600))
	must(t, os.WriteFile(small, make([]byte, 1<<20), 0o600))
	device := backingtest.Loop(t, small, 512)
	want(t, exitFailed, "image", "create", "--force", "--data-file="+device, disk, "2M")
	if got, err := os.ReadFile(disk); err != nil || string(got) != "precious" {
		t.Errorf("the image has %d bytes, %v, want what it had", len(got), err)
	}
	want(t, exitDone, "image", "create", "--force", "--data-file="+device, disk, "1M")
}

func TestImageCreateRefusesBadUsage(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	for _, args := range [][]string{
		{path}, {path, "1X"}, {"-f", "vmdk", path, "1M"}, {"--cluster-size=3K", path, "1M"},
		{"--cluster-size=0", path, "1M"}, {"--compat=1.0", path, "1M"}, {"--compression-type=lzo", path, "1M"},
		{"--preallocation=some", path, "1M"}, {"--backing-file=b", path, "1M"}, {"--backing-file=/dev/null", path},
		{"-f", "raw", "--cluster-size=64K", path, "1M"}, {"-f", "raw", "--preallocation=metadata", path, "1M"},
		{"--extended-l2", "--compat=0.10", path, "1M"}, {"--data-file-raw", path, "1M"},
	} {
		want(t, exitUsage, append([]string{"image", "create"}, args...)...)
		if _, err := os.Stat(path); err == nil {
			t.Fatalf("%q left a file", args)
		}
	}
	want(t, exitFailed, "image", "create", "--backing-file=/dev/null", "--backing-format=raw", path)
	want(t, exitUsage, "image")
}

// TestImageThatWasMadeIsThere, also when another command was to make it at the
// same time.
func TestImageThatWasMadeIsThere(t *testing.T) {
	for _, format := range []string{"qcow2", "raw"} {
		twice(t, func(path string) []string { return []string{"image", "create", "--force", "-f", format, path, "1M"} })
	}
}
