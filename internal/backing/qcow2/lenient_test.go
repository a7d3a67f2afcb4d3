package qcow2_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
)

// TestLenientReadsAsQEMUReads are the rows of damage whose strict answer is an
// error and QEMU's is not.
func TestLenientReadsAsQEMUReads(t *testing.T) {
	d := made(t, "cluster_size=64k", "64M", written, "write -q -P 34 1M 64k")
	x := made(t, "cluster_size=64k,extended_l2=on", "64M", written)
	for _, tt := range []struct {
		name  string
		image []byte
		off   int
		hex   string
	}{
		{"M1 L1 table as L2 table", d, base, "8000000000030000"},
		{"M3 reserved bits in L1", d, base, "c000000000040001"},
		{"M3 all reserved bits in L1", d, base, "ff000000000401ff"},
		{"M4 refcount table as L2 table", d, base, "8000000000010000"},
		{"M5 L2 table beyond the end", d, base, "8000001000000000"},
		{"M5 L2 table at the largest offset", d, base, "80ffffffffff0000"},
		{"M7 cluster in refcount block", d, l2Table, "8000000000020000"},
		{"M7 cluster in L1 table", d, l2Table, "8000000000030000"},
		{"M7 cluster in L2 table", d, l2Table, "8000000000040000"},
		{"M8 reserved bits in L2", d, l2Table, "b0000000000500fe"},
		{"M8 all reserved bits in L2", d, l2Table, "bf000000000501fe"},
		{"M8 reserved bits in an extended entry", x, l2Table, "bf000000000501fe"},
		{"M9 cluster at 64 GiB", d, l2Table, "8000001000000000"},
		{"M10 cluster at the largest offset", d, l2Table, "80ffffffffff0000"},
		{"copied flag without a cluster", d, l2Table, "8000000000000000"},
		{"copied flag of a zero cluster without storage", d, l2Table, "8000000000000001"},
		{"reserved bits and copied flag without a cluster", d, l2Table, "bf000000000001fe"},
		{"copied flag in an extended entry without a cluster", x, l2Table, "8000000000000000 0000000000000000"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := patch(t, tt.image, tt.off, tt.hex)
			p := make([]byte, 1<<20+128<<10)
			if err := leniently(t, b, false).ReadAt(t.Context(), p, 0); !errors.Is(err, backing.ErrIO) {
				t.Errorf("strict read: got %v, want %v", err, backing.ErrIO)
			}
			if err := leniently(t, b, true).ReadAt(t.Context(), p, 0); err != nil {
				t.Fatalf("lenient read: %v", err)
			}
			dir := t.TempDir()
			if err := os.WriteFile(filepath.Join(dir, "t"), b, 0o600); err != nil {
				t.Fatal(err)
			}
			qemu(t, dir, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", "t", "raw")
			want, err := os.ReadFile(filepath.Join(dir, "raw"))
			if err != nil || !bytes.Equal(p, want[:len(p)]) {
				t.Errorf("lenient read: got other bytes than QEMU (%v)", err)
			}
		})
	}
}

// leniently serves an image.
func leniently(t *testing.T, b []byte, lenient bool) backing.Device {
	t.Helper()
	o := quiet()
	o.Lenient = lenient
	return qcow2.NewChainDevice(open(t, b, o), o)
}

// TestLenientReadsNoMoreThanQEMU are rows that are errors in QEMU too.
func TestLenientReadsNoMoreThanQEMU(t *testing.T) {
	d := made(t, "cluster_size=64k", "64M", written)
	c := made(t, "cluster_size=64k", "64M", "write -q -c -P 65 0 64k")
	x := made(t, "cluster_size=64k,extended_l2=on", "64M", written)
	for _, tt := range []struct {
		name  string
		image []byte
		off   int
		hex   string
	}{
		{"M2 unaligned L2 table", d, base, "8000000000042a00"},
		{"M6 unaligned cluster", d, l2Table, "8000000000052a00"},
		{"M11 zero flag in version 2", patch(t, patch(t, d, 4, "00000002"), 100, "00000000"), l2Table, "8000000000050001"},
		{"C1 data beyond the end", c, l2Table, "4000001000000000"},
		{"C5 data at the header", c, l2Table, "4000000000000000"},
		{"X1 allocated and zero", x, l2Table + 8, "0000000100000001"},
		{"X2 allocated without cluster", x, l2Table, "0000000000000000 0000000000000001"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := patch(t, tt.image, tt.off, tt.hex)
			if err := leniently(t, b, true).ReadAt(t.Context(), make([]byte, 512), 0); !errors.Is(err, backing.ErrIO) {
				t.Errorf("lenient read: got %v, want %v", err, backing.ErrIO)
			}
		})
	}
}

// TestTableThatTheFileCuts reads the entries that are there, and zeroes after
// them.
func TestTableThatTheFileCuts(t *testing.T) {
	d := made(t, "cluster_size=64k", "64M", written)
	end := int64(len(d))
	entry := format.EncodeL1(end, true)
	for i := range 8 {
		d[base+i] = byte(entry >> (56 - 8*i))
	}
	d = append(d, 0x80, 0, 0, 0, 0, 5, 0, 0, 0x80, 0, 0)
	for _, lenient := range []bool{false, true} {
		o := quiet()
		o.Lenient = lenient
		m := open(t, d, o)
		if s := at(t, m, 0); s.Kind != qcow2.Data || s.Off != 0x50000 {
			t.Errorf("lenient %v: entry in the file: span %+v", lenient, s)
		}
		if s := at(t, m, 128<<10); s.Kind != qcow2.Absent {
			t.Errorf("lenient %v: entry behind the end of the file: span %+v", lenient, s)
		}
	}
}
