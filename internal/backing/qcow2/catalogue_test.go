package qcow2_test

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/check"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/storetest"
)

// withBitmap is an image with data at 0 and an empty bitmap, and where its
// extension, its directory and its table lie.
func withBitmap(t *testing.T) (b []byte, extension, dir, table int) {
	t.Helper()
	d := made(t, "cluster_size=64k", "64M", written)
	path := filepath.Join(t.TempDir(), "t")
	if err := os.WriteFile(path, d, 0o600); err != nil {
		t.Fatal(err)
	}
	qemu(t, filepath.Dir(path), "qemu-img", "bitmap", "--add", "-g", "64k", path, "b0")
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if extension = bytes.Index(b, []byte{0x23, 0x85, 0x28, 0x75}); extension < 0 {
		t.Fatal("the image has no bitmaps extension")
	}
	dir = int(u64(b, extension+24))
	return b, extension, dir, int(u64(b, dir))
}

// TestBrokenBitmapsLeaveTheDisk has the rows V1 to V5: the disk is read, the
// check names what is wrong, and QEMU and whoever wants to write refuse all but
// V5.
func TestBrokenBitmapsLeaveTheDisk(t *testing.T) {
	b, ext, dir, table := withBitmap(t)
	for _, tt := range []struct {
		name   string
		off    int
		hex    string
		broken bool
	}{
		{"nothing", 0, "", false},
		{"V1 no bitmaps", ext + 8, "00000000", true},
		{"V1 too many bitmaps", ext + 8, "00010000", true},
		{"V1 more than there are", ext + 8, "00000002", true},
		{"V2 reserved field", ext + 12, "00000001", true},
		{"V2 empty directory", ext + 16, "0000000000000000", true},
		{"V2 directory too large", ext + 16, "00000000ffffffff", true},
		{"V2 directory too short", ext + 16, "0000000000000019", true},
		{"V2 unaligned directory", ext + 24, "0000000000000200", true},
		{"V2 directory beyond the end", ext + 24, "0000001000000000", true},
		{"V2 length of the extension", ext + 4, "00000017", true},
		{"V3 no table", dir, "0000000000000000", true},
		{"V3 unaligned table", dir, "0000000000010200", true},
		{"V3 table too large", dir + 8, "7fffffff", true},
		{"V3 table of another size", dir + 8, "00000002", true},
		{"V3 reserved flag", dir + 12, "00000008", true},
		{"V3 type", dir + 16, "02", true},
		{"V3 granularity too small", dir + 17, "08", true},
		{"V3 granularity too large", dir + 17, "20", true},
		{"V3 no name", dir + 18, "0000", true},
		{"V3 long name", dir + 18, "ffff", true},
		{"V3 extra data", dir + 20, "00000008", true},
		{"V4 reserved bits", table, "0000000000000002", true},
		{"V4 offset and ones", table, "0000000000050001", true},
		{"V5 in use", dir + 12, "00000003", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			image := patch(t, b, tt.off, tt.hex)
			served(t, image)
			r := checked(t, image)
			if (r.Corruptions > 0) != tt.broken || r.Errors > 0 {
				t.Errorf("check: %d corruptions, %d errors, %v", r.Corruptions, r.Errors, r.Problems)
			}
			if got := opensInQEMU(t, image); got == tt.broken {
				t.Errorf("QEMU opens it: %v", got)
			}
			if got := opensForWriting(t, image); got == tt.broken {
				t.Errorf("it is opened for writing: %v", got)
			}
			writableWithoutBitmaps(t, image, tt.broken)
		})
	}
}

// writableWithoutBitmaps drops the bitmaps of an image if they are broken: the disk
// is what it was then, and both we and QEMU write to it.
func writableWithoutBitmaps(t *testing.T, image []byte, broken bool) {
	t.Helper()
	st := storetest.New(image)
	h, err := qcow2.ReadHeader(t.Context(), st)
	if err != nil {
		t.Fatal(err)
	}
	dropped, err := qcow2.DropBitmaps(t.Context(), st, h)
	if err != nil || dropped != broken {
		t.Fatalf("drop: %v, %v, want %v", dropped, err, broken)
	}
	if !broken {
		if !bytes.Equal(st.Contents(), image) {
			t.Error("drop: an image with sound bitmaps was changed")
		}
		return
	}
	image = st.Contents()
	served(t, image)
	if r := checked(t, image); r.Corruptions+r.Errors > 0 {
		t.Errorf("check without bitmaps: %v", r.Problems)
	}
	if !opensInQEMU(t, image) || !opensForWriting(t, image) {
		t.Error("without bitmaps it is not opened, by QEMU or for writing")
	}
}

// TestDropLeavesCorruptImagesAlone: what else is wrong with an image may be worse
// when its header changes.
func TestDropLeavesCorruptImagesAlone(t *testing.T) {
	b, ext, _, _ := withBitmap(t)
	b = patch(t, patch(t, b, ext+8, "00000002"), 0x2000a, "0000")
	st := storetest.New(b)
	h, err := qcow2.ReadHeader(t.Context(), st)
	if err != nil {
		t.Fatal(err)
	}
	if dropped, err := qcow2.DropBitmaps(t.Context(), st, h); dropped || err != nil || !bytes.Equal(st.Contents(), b) {
		t.Errorf("drop: %v, %v, and the image is as it was: %v", dropped, err, bytes.Equal(st.Contents(), b))
	}
}

// opensForWriting reports whether an image is not refused. One that is must not
// be touched.
func opensForWriting(t *testing.T, image []byte) bool {
	t.Helper()
	st := storetest.New(image)
	d, err := qcow2.Open(t.Context(), st, qcow2.Options{Path: "image", Log: slog.New(slog.DiscardHandler)})
	if err == nil {
		if err := d.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
		return true
	}
	if !errors.Is(err, backing.ErrInvalid) || !strings.Contains(err.Error(), "`vmdiskctl image check --repair=bitmaps IMAGE` drops them") {
		t.Errorf("open for writing: got %v, want %v and what helps", err, backing.ErrInvalid)
	}
	if !bytes.Equal(st.Contents(), image) {
		t.Error("open for writing: the image that it refuses was changed")
	}
	return false
}

// TestBitmapsThatSomebodyIgnoredAreNoMore is V6: the autoclear bit says that the
// image was written to by a program that does not know bitmaps.
func TestBitmapsThatSomebodyIgnoredAreNoMore(t *testing.T) {
	b, _, _, _ := withBitmap(t)
	st := storetest.New(patch(t, b, format.OffAutoclear, "0000000000000000"))
	served(t, st.Contents())
	leaks := checked(t, st.Contents()).Leaks
	if leaks == 0 {
		t.Error("check: what the bitmaps had is not leaked")
	}
	var log bytes.Buffer
	o := qcow2.Options{Path: "image", Log: slog.New(slog.NewTextHandler(&log, nil))}
	d, err := qcow2.Open(t.Context(), st, o)
	if err != nil {
		t.Fatalf("open for writing: %v", err)
	}
	if got := d.(backing.Describer).Descriptions(); slices.ContainsFunc(got, func(s string) bool { return strings.HasPrefix(s, "qemu:dirty") }) {
		t.Errorf("contexts: got %q, want none of a bitmap", got)
	}
	if err := d.WriteAt(t.Context(), bytes.Repeat([]byte{9}, 3<<16), 1<<20, 0); err != nil {
		t.Fatalf("write: %v", err)
	}
	if err := d.Close(); err != nil {
		t.Fatalf("close: %v", err)
	}
	if !strings.Contains(log.String(), fmt.Sprintf("leaked clusters\" path=image clusters=%d", leaks)) {
		t.Errorf("the log does not name %d leaked clusters: %s", leaks, log.String())
	}
	image := st.Contents()
	if r := checked(t, image); r.Corruptions > 0 || r.Leaks != leaks {
		t.Errorf("check: %d corruptions, %d leaks, want %d leaks: %v", r.Corruptions, r.Leaks, leaks, r.Problems)
	}
	if !opensInQEMU(t, image) {
		t.Error("QEMU does not open it")
	}
}

// TestLongSnapshotIDReachesIntoOthers is S4: the table goes on where another
// cluster is.
func TestLongSnapshotIDReachesIntoOthers(t *testing.T) {
	b := made(t, "cluster_size=64k", "64M", written, "snapshot s1", "write -q -P 34 1M 64k")
	image := patch(t, b, u64(b, 64)+12, "ffff")
	served(t, image)
	if r := checked(t, image); r.Corruptions == 0 {
		t.Errorf("check: clean, %v", r.Problems)
	}
	if !opensInQEMU(t, image) {
		t.Error("QEMU does not open it")
	}
}

// served fails unless the disk has what was written to it.
func served(t *testing.T, image []byte) {
	t.Helper()
	o := quiet()
	p := make([]byte, 128<<10)
	if err := qcow2.NewChainDevice(open(t, image, o), o).ReadAt(t.Context(), p, 0); err != nil {
		t.Fatalf("read: %v", err)
	}
	if !bytes.Equal(p, append(bytes.Repeat([]byte{17}, 64<<10), make([]byte, 64<<10)...)) {
		t.Error("read: not what was written")
	}
}

func checked(t *testing.T, image []byte) *check.Report {
	t.Helper()
	st := storetest.New(image)
	h, err := qcow2.ReadHeader(t.Context(), st)
	if err != nil {
		t.Fatalf("header: %v", err)
	}
	r, err := check.Run(t.Context(), st, h, check.Options{})
	if err != nil {
		t.Fatalf("check: %v", err)
	}
	return r
}

func opensInQEMU(t *testing.T, image []byte) bool {
	t.Helper()
	path := filepath.Join(t.TempDir(), "t")
	if err := os.WriteFile(path, image, 0o600); err != nil {
		t.Fatal(err)
	}
	return exec.Command("qemu-img", "info", "-f", "qcow2", path).Run() == nil
}
