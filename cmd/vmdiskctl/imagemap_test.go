package main

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/qcowtest"
)

// chains are images of all kinds, above others and alone.
func chains(t *testing.T) []qcowtest.Image {
	t.Helper()
	var few []qcowtest.Options
	for i, o := range qcowtest.Pairwise(qcowtest.Seed) {
		if i%3 == 1 && o.Size() <= 16<<20 {
			few = append(few, o)
		}
	}
	return qcowtest.Make(t, qcowtest.Seed, few)
}

// above are the flags with which vmdiskctl opens what an image stands on.
func above(image *qcowtest.Image) string { return "--backing=beneath=" + filepath.Dir(image.Path) }

// agreeOnMap compares the maps of an image, ours made with flags.
func agreeOnMap(t *testing.T, path, format string, flags ...string) (lines int) {
	t.Helper()
	out, err := exec.Command("qemu-img", "map", "-f", format, "--output=json", path).Output()
	must(t, err)
	var ours []map[string]any
	must(t, json.Unmarshal([]byte(want(t, exitDone, append(flags, "image", "map", "--json", "-f", format, path)...)), &ours))
	theirs, holes := comparable(t, out)
	ours, more := joined(ours)
	holes = holes || more
	if len(ours) != len(theirs) {
		t.Fatalf("got %d lines %v\nwant %d %v", len(ours), ours, len(theirs), theirs)
	}
	for i, e := range ours {
		if (e["filename"] != nil) != (e["offset"] != nil) {
			t.Errorf("offset and file do not go together: %v", e)
		}
		delete(e, "filename")
		delete(e, "compressed")
		if !reflect.DeepEqual(e, theirs[i]) {
			t.Errorf("got %v, want %v", e, theirs[i])
		}
	}
	table, err := exec.Command("qemu-img", "map", "-f", format, path).Output()
	if got := want(t, exitDone, append(flags, "image", "map", "-f", format, path)...); err == nil && !holes && got != string(table) {
		t.Errorf("got %s\nwant %s", got, table)
	}
	return len(ours)
}

// comparable takes from QEMU's map what ours never says: a place of bytes that
// are not there, in subclusters.
func comparable(t *testing.T, out []byte) (list []map[string]any, holes bool) {
	t.Helper()
	var all []map[string]any
	must(t, json.Unmarshal(out, &all))
	for _, e := range all {
		if e["present"] == false {
			delete(e, "offset")
		}
	}
	return joined(all)
}

// joined takes from a map that data lie in a hole of the file: QEMU asks for
// that only where it takes the metadata for preallocated.
func joined(all []map[string]any) (list []map[string]any, holes bool) {
	for _, e := range all {
		if e["data"] == true && e["zero"] == true {
			e["zero"], holes = false, true
		}
		if last := len(list) - 1; last < 0 || !follows(list[last], e) {
			list = append(list, e)
		} else {
			list[last]["length"] = list[last]["length"].(float64) + e["length"].(float64)
		}
	}
	return list, holes
}

// TestImageMapFindsHolesUnderPreallocatedClusters has images for which QEMU asks
// the file, too.
func TestImageMapFindsHolesUnderPreallocatedClusters(t *testing.T) {
	for _, options := range []string{"preallocation=metadata", "preallocation=metadata,extended_l2=on", "preallocation=metadata,compat=0.10"} {
		path := filepath.Join(t.TempDir(), "image")
		tool(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, "8M")
		tool(t, "qemu-io", "-f", "qcow2", "-c", "write -P 1 1M 192k", "-c", "write -P 1 4M 64k", path)
		table, err := exec.Command("qemu-img", "map", "-f", "qcow2", path).Output()
		must(t, err)
		if got := want(t, exitDone, "image", "map", path); got != string(table) {
			t.Errorf("%s: got %s\nwant %s", options, got, table)
		}
		var ours, theirs []map[string]any
		out, err := exec.Command("qemu-img", "map", "-f", "qcow2", "--output=json", path).Output()
		must(t, err)
		must(t, json.Unmarshal(out, &theirs))
		must(t, json.Unmarshal([]byte(want(t, exitDone, "image", "map", "--json", path)), &ours))
		for _, e := range ours {
			delete(e, "filename")
			delete(e, "compressed")
		}
		for _, e := range theirs {
			if e["present"] == false {
				delete(e, "offset")
			}
		}
		if !reflect.DeepEqual(ours, theirs) || len(ours) < 5 {
			t.Errorf("%s: got %v\nwant %v", options, ours, theirs)
		}
	}
}

func follows(a, b map[string]any) bool {
	for _, name := range []string{"depth", "present", "zero", "data"} {
		if a[name] != b[name] {
			return false
		}
	}
	if a["offset"] == nil || b["offset"] == nil {
		return a["offset"] == b["offset"]
	}
	return a["offset"].(float64)+a["length"].(float64) == b["offset"]
}

func TestImageMapIsThatOfQEMU(t *testing.T) {
	lines := 0
	for _, image := range chains(t) {
		t.Run(image.Name, func(t *testing.T) {
			lines += agreeOnMap(t, image.Path, "qcow2", above(&image))
		})
	}
	raw := filepath.Join(t.TempDir(), "raw")
	must(t, os.WriteFile(raw, append(make([]byte, 1<<20), bytes.Repeat([]byte{1}, 64<<10)...), 0o600))
	tool(t, "fallocate", "-p", "-l", "1M", raw)
	lines += agreeOnMap(t, raw, "raw")
	if lines < 100 {
		t.Errorf("only %d lines were compared", lines)
	}
}

func TestImageMapOpensOnlyWhatIsAllowed(t *testing.T) {
	dir := t.TempDir()
	base, top := filepath.Join(dir, "base"), filepath.Join(dir, "top")
	must(t, os.WriteFile(base, bytes.Repeat([]byte{1}, 1<<20), 0o600))
	tool(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", top)
	want(t, exitRefused, "image", "map", top)
	got := want(t, exitDone, "image", "map", "--backing-file="+base+":raw", top)
	if !strings.HasSuffix(got, "\n0               0x100000        0               "+base+"\n") {
		t.Errorf("got %s", got)
	}
	for _, args := range [][]string{
		{"-f", "vmdk", top}, {"-f", "raw", "--backing=deny", top}, {"--snapshot=", top}, {"--backing=all", top}, {"--backing=explicit", top},
	} {
		want(t, exitUsage, append([]string{"image", "map"}, args...)...)
	}
}

func TestImageMapOfOneSnapshot(t *testing.T) {
	path := qemuImage(t)
	tool(t, "qemu-img", "snapshot", "-c", "before", path)
	before := want(t, exitDone, "image", "map", path)
	tool(t, "qemu-io", "-f", "qcow2", "-c", "write 0 1M", path)
	if got := want(t, exitDone, "image", "map", "--snapshot=before", path); got != before {
		t.Errorf("got %s\nwant %s", got, before)
	}
	if got := want(t, exitDone, "image", "map", path); got == before {
		t.Errorf("the disk has the map of the snapshot: %s", got)
	}
}

func TestImageMapStopsAtDamage(t *testing.T) {
	path := qemuImage(t)
	patchImage(t, path, 0x40008, 0x80, 0, 0, 0, 0, 5, 2, 0) // the second cluster lies askew
	code, got, stderr := ctl(t, "image", "map", path)
	if code != exitFailed || !strings.Contains(got, "\n0               0x10000         0x50000         "+path+"\n") || !strings.Contains(stderr, "65536") {
		t.Errorf("exit code %d: %s%s", code, got, stderr)
	}
}
