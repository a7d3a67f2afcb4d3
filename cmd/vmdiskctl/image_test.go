package main

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// qemuImage makes a qcow2 image in a directory of its own.
func qemuImage(t *testing.T, args ...string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image")
	tool(t, "qemu-img", append(append([]string{"create", "-q", "-f", "qcow2"}, args...), path, "64M")...)
	tool(t, "qemu-io", "-f", "qcow2", "-c", "write -P 1 0 200k", path)
	return path
}

func tool(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %q: %v: %s", name, args, err, out)
	}
}

// fieldsOf is the JSON object that a command of qemu-img writes.
func fieldsOf(t *testing.T, args ...string) (fields map[string]any, code int) {
	t.Helper()
	out, err := exec.Command("qemu-img", args...).Output()
	var failed *exec.ExitError
	if errors.As(err, &failed) {
		code = failed.ExitCode()
	} else {
		must(t, err)
	}
	must(t, json.Unmarshal(out, &fields))
	return fields, code
}

func patchImage(t *testing.T, path string, off int64, b ...byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	must(t, err)
	_, err = f.WriteAt(b, off)
	must(t, errors.Join(err, f.Close()))
}

func agreeOnCheck(t *testing.T, path string) {
	t.Helper()
	theirs, code := fieldsOf(t, "check", "-f", "qcow2", "--output=json", path)
	var ours map[string]any
	must(t, json.Unmarshal([]byte(want(t, code, "image", "check", "--json", path)), &ours))
	if !reflect.DeepEqual(ours, theirs) {
		t.Errorf("got %v, want %v", ours, theirs)
	}
}

func TestImageCheckHasFieldsAndExitCodesOfQEMU(t *testing.T) {
	path := qemuImage(t)
	agreeOnCheck(t, path)
	must(t, os.Truncate(path, 0xa0000))
	patchImage(t, path, 0x20000+2*9, 0, 1) // a free cluster gets a refcount
	agreeOnCheck(t, path)
	want(t, exitLeaks, "image", "check", path)
	want(t, exitDone, "image", "check", "--repair=leaks", path)
	agreeOnCheck(t, path)
	patchImage(t, path, 0x2000a, 0, 0) // a data cluster loses its own
	agreeOnCheck(t, path)
	if got := want(t, exitCorrupt, "image", "check", "--repair=leaks", path); !strings.Contains(got, "cluster 5: refcount is 0, references are 1\n") {
		t.Errorf("the corruption is not named: %s", got)
	}
}

// TestImageCheckTellsOfMarks that keep the image from being served for writing.
func TestImageCheckTellsOfMarks(t *testing.T) {
	for mark, bit := range map[string]byte{"dirty": 1, "corrupt": 2} {
		path := qemuImage(t)
		patchImage(t, path, incompatByte, bit)
		code, stdout, stderr := ctl(t, "image", "check", path)
		if code != exitCorrupt || !strings.Contains(stdout, "marked "+mark+": it is not served for writing\n") || !strings.Contains(stderr, "`--repair=leaks` takes the mark away") {
			t.Errorf("%s: exit code %d, want %d:\n%s%s", mark, code, exitCorrupt, stdout, stderr)
		}
		var fields map[string]any
		must(t, json.Unmarshal([]byte(want(t, exitCorrupt, "image", "check", "--json", path)), &fields))
		if key := map[string]string{"dirty": "dirty-flag", "corrupt": "corrupt"}[mark]; fields[key] != true {
			t.Errorf("%s: got %v, want %s", mark, fields, key)
		}
		if code, _, stderr := ctl(t, "image", "resize", path, "+1M"); code == exitDone || !strings.Contains(stderr, "`vmdiskctl image check --repair=leaks IMAGE`") {
			t.Errorf("%s: resize: exit code %d: %s", mark, code, stderr)
		}
	}
}

// incompatByte is the offset of the incompatible features that are in use.
const incompatByte = 72 + 7

// TestRepairTakesMarksAwayLikeQEMU: of an image in which the check finds nothing
// but leaks, and of no other. It is served for writing then.
func TestRepairTakesMarksAwayLikeQEMU(t *testing.T) {
	for _, tt := range []struct {
		name string
		bits byte
		leak bool
	}{{"dirty", 1, false}, {"corrupt", 2, false}, {"dirty and corrupt", 3, false}, {"dirty, leaks", 1, true}} {
		path := qemuImage(t)
		if tt.leak {
			must(t, os.Truncate(path, 0xa0000))
			patchImage(t, path, 0x20000+2*9, 0, 1)
		}
		patchImage(t, path, incompatByte, tt.bits)
		theirs := filepath.Join(t.TempDir(), "theirs")
		tool(t, "cp", path, theirs)
		want(t, exitDone, "image", "check", "--repair=leaks", path)
		want(t, exitDone, "image", "check", path)
		tool(t, "qemu-img", "check", "-q", "-r", "leaks", theirs)
		if a, b := fileBytes(t, path), fileBytes(t, theirs); !bytes.Equal(a, b[:len(a)]) {
			t.Errorf("%s: the image is not what `qemu-img check -r leaks` makes of it", tt.name)
		}
		want(t, exitDone, "image", "resize", path, "+1M")
	}
	path := qemuImage(t)
	patchImage(t, path, incompatByte, 1)
	patchImage(t, path, 0x2000a, 0, 0) // a data cluster loses its refcount
	before := fileBytes(t, path)
	if got := want(t, exitCorrupt, "image", "check", "--repair=leaks", path); !strings.Contains(got, "marked dirty") {
		t.Errorf("the mark is not named: %s", got)
	}
	if !bytes.Equal(fileBytes(t, path), before) {
		t.Error("the corrupt image was changed")
	}
	if _, _, stderr := ctl(t, "image", "check", path); !strings.Contains(stderr, "`qemu-img check -r all` repairs it") {
		t.Errorf("what repairs it is not named: %s", stderr)
	}
}

// TestRepairDropsDamagedBitmaps and no others: QEMU opens the image again, and it can
// be written to.
func TestRepairDropsDamagedBitmaps(t *testing.T) {
	path := qemuImage(t)
	tool(t, "qemu-img", "bitmap", "--add", path, "b0")
	sound := fileBytes(t, path)
	want(t, exitDone, "image", "check", "--repair=bitmaps", path)
	if !bytes.Equal(fileBytes(t, path), sound) {
		t.Error("an image with sound bitmaps was changed")
	}
	ext := bytes.Index(sound, []byte{0x23, 0x85, 0x28, 0x75})
	patchImage(t, path, int64(ext+8), 0, 0, 0, 2)
	for _, repair := range []string{"", "leaks"} {
		want(t, exitCorrupt, "image", "check", "--repair="+repair, path)
	}
	if code, _, stderr := ctl(t, "image", "resize", path, "+1M"); code == exitDone || !strings.Contains(stderr, "--repair=bitmaps") {
		t.Errorf("resize: exit code %d: %s", code, stderr)
	}
	want(t, exitDone, "image", "check", "--repair=bitmaps", path)
	tool(t, "qemu-img", "check", "-q", path)
	tool(t, "qemu-io", "-f", "qcow2", "-c", "read -P 1 0 200k", path)
	want(t, exitDone, "image", "resize", path, "+1M")
}

func fileBytes(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	must(t, err)
	return b
}

func TestImageCheckRefusesWhatIsNoImage(t *testing.T) {
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	must(t, unix.Mkfifo(fifo, 0o600))
	plain := filepath.Join(dir, "plain")
	must(t, os.WriteFile(plain, make([]byte, 1<<20), 0o600))
	for _, path := range []string{fifo, dir, plain, filepath.Join(dir, "none"), "/dev/zero"} {
		want(t, exitFailed, "image", "check", path)
	}
	want(t, exitUsage, "image", "check", "-f", "raw", plain)
	want(t, exitUsage, "image", "check", "--repair=all", plain)
}

func TestImageInfoHasFieldsOfQEMU(t *testing.T) {
	for _, args := range [][]string{
		nil, {"-o", "compat=0.10"}, {"-o", "cluster_size=4k,lazy_refcounts=on,refcount_bits=64"},
		{"-o", "extended_l2=on,compression_type=zstd"}, {"-u", "-b", "none", "-F", "raw"},
		{"-u", "-b", "/nowhere/none", "-F", "qcow2"},
	} {
		t.Run(strings.Join(args, " "), func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "image")
			tool(t, "qemu-img", append(append([]string{"create", "-q", "-f", "qcow2"}, args...), path, "64M")...)
			agreeOnInfo(t, path)
		})
	}
}

func TestImageInfoOfRawFileIsNotGuessed(t *testing.T) {
	path := qemuImage(t)
	i, err := os.Stat(path)
	must(t, err)
	var r imageReport
	must(t, json.Unmarshal([]byte(want(t, exitDone, "image", "info", "-f", "raw", "--json", path)), &r))
	if r.VirtualSize != i.Size() || r.Format != "raw" || r.Specific != nil {
		t.Errorf("a raw file of %d bytes is %+v", i.Size(), r)
	}
	want(t, exitUsage, "image", "info", "-f", "vmdk", path)
}

func agreeOnInfo(t *testing.T, path string) {
	t.Helper()
	theirs, _ := fieldsOf(t, "info", "-f", "qcow2", "--output=json", path)
	var ours map[string]any
	must(t, json.Unmarshal([]byte(want(t, exitDone, "image", "info", "--json", path)), &ours))
	if !reflect.DeepEqual(ours, theirs) {
		t.Errorf("got %v, want %v", ours, theirs)
	}
}

func TestImageInfoHasSnapshotsOfQEMU(t *testing.T) {
	path := qemuImage(t)
	tool(t, "qemu-img", "snapshot", "-c", "one", path)
	tool(t, "qemu-img", "snapshot", "-c", "two", path)
	agreeOnInfo(t, path)
	if got := want(t, exitDone, "image", "info", path); !strings.Contains(got, "snapshots:\n  1          one ") {
		t.Errorf("the snapshots are not shown: %s", got)
	}
	table := snapshotTable(t, path)
	patchImage(t, path, table+36, 0, 0, 0, 16) // what was the ICount begins the ID
	patchImage(t, path, table+12, 0, 9)
	patchImage(t, path, table+40+16, []byte("12345678")...)
	agreeOnInfo(t, path)
	patchImage(t, path, table+36, 0, 0, 4, 1) // more than an entry may have
	if got := want(t, exitFailed, "image", "info", "--json", path); !strings.Contains(got, `"virtual-size": 67108864`) {
		t.Errorf("the rest is not shown: %s", got)
	}
}

// snapshotTable is where the snapshot table of an image lies.
func snapshotTable(t *testing.T, path string) int64 {
	t.Helper()
	b, err := os.ReadFile(path)
	must(t, err)
	return int64(binary.BigEndian.Uint64(b[64:]))
}

func TestImageSnapshotListHasFieldsOfQEMU(t *testing.T) {
	path := qemuImage(t)
	if got := want(t, exitDone, "image", "snapshot", "list", "--json", path); got != "[]\n" {
		t.Errorf("an image without snapshots has %s", got)
	}
	tool(t, "qemu-img", "snapshot", "-c", "one", path)
	tool(t, "qemu-img", "snapshot", "-c", "two\x1b[1m", path)
	info, _ := fieldsOf(t, "info", "-f", "qcow2", "--output=json", path)
	var ours []map[string]any
	must(t, json.Unmarshal([]byte(want(t, exitDone, "image", "snapshot", "list", "--json", path)), &ours))
	theirs := info["snapshots"].([]any)
	if len(ours) != len(theirs) {
		t.Fatalf("%d snapshots, want %d", len(ours), len(theirs))
	}
	for k := range ours {
		if ours[k]["disk-size"] != float64(64<<20) {
			t.Errorf("disk size is %v", ours[k]["disk-size"])
		}
		for name, v := range theirs[k].(map[string]any) {
			if !reflect.DeepEqual(ours[k][name], v) {
				t.Errorf("snapshot %d: %s is %v, want %v", k, name, ours[k][name], v)
			}
		}
	}
	if got := want(t, exitDone, "image", "snapshot", "list", path); strings.Contains(got, "\x1b") {
		t.Errorf("control characters reach the terminal: %q", got)
	}
	want(t, exitUsage, "image", "snapshot", "list", "-f", "raw", path)
}
