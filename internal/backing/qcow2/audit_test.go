package qcow2_test

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/store"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/storetest"
)

// patchedBytes is b with the bytes in hex at off.
func patchedBytes(t *testing.T, b []byte, off int, digits string) []byte {
	t.Helper()
	p, err := hex.DecodeString(digits)
	if err != nil {
		t.Fatal(err)
	}
	b = append([]byte(nil), b...)
	copy(b[off:], p)
	return b
}

// TestDamagedImageIsServedReadOnlyOrNotAtAll has the rows of refcounts and
// what else stands against writing.
func TestDamagedImageIsServedReadOnlyOrNotAtAll(t *testing.T) {
	data := made(t, "cluster_size=64k", "64M", written)
	snap := made(t, "cluster_size=64k", "64M", written, "snapshot s1")
	outside := made(t, "cluster_size=64k,data_file=t.data", "64M", written)
	table := int(u64(snap, format.OffSnapshots+4))
	for _, tt := range []struct {
		name   string
		b      []byte
		off    int
		digits string
	}{
		{"R1 no refcount block", data, 0x10000, "0000000000000000"},
		{"R2 block not aligned", data, 0x10000, "0000000000022a00"},
		{"R3 block beyond the end", data, 0x10000, "00ffffffffff0000"},
		{"R4 header is free", data, 0x20000, "0000000000000000"},
		{"R5 live L2 table is free", data, 0x20008, "0000"},
		{"R6 live cluster is free", data, 0x2000a, "0000"},
		{"R7 copied, with more references", data, 0x2000a, "ffff"},
		{"R8 block listed twice", data, 0x10008, "0000000000020000"},
		{"R8 block is an L2 table", data, 0x10008, overL2},
		{"R9 block out of bounds", data, 0x10008, "00ffffff00000000"},
		{"M cluster twice", data, 0x40008, "8000000000050000"},
		{"E10 cluster elsewhere in the data file", outside, 0x40000, "8000000000030000"},
		{"E10 zero cluster elsewhere in the data file", outside, 0x40000, "8000000000030001"},
		{"S1 snapshot table not aligned", snap, table, "0000000000400200"},
		{"S2 L1 of a snapshot too large", snap, table + 8, "10000000"},
		{"S3 extra data too large", snap, table + 36, "00000401"},
		{"S4 long ID", snap, table + 12, "ffff"},
		{"S5 L1 of the disk", snap, table, "0000000000030000"},
		{"dirty", data, format.OffIncompat, "0000000000000001"},
		{"corrupt", data, format.OffIncompat, "0000000000000002"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			st := storetest.New(patchedBytes(t, tt.b, tt.off, tt.digits))
			before := st.Contents()
			o := quiet()
			o.DataFile = dataFor(t, st)
			d, err := qcow2.Open(t.Context(), st, o)
			if err == nil {
				_ = d.Close()
			}
			if !errors.Is(err, backing.ErrInvalid) {
				t.Fatalf("open for writing: got %v, want %v", err, backing.ErrInvalid)
			}
			if string(st.Contents()) != string(before) {
				t.Error("the image was changed")
			}
			st.Reopen()
			o.ReadOnly, o.DataFile = true, dataFor(t, st)
			d, err = qcow2.Open(t.Context(), st, o)
			if err != nil {
				t.Fatalf("open read-only: %v", err)
			}
			defer d.Close()
			if err := d.ReadAt(t.Context(), make([]byte, 512), 64<<10); err != nil && tt.digits != overL2 {
				t.Errorf("read: %v", err)
			}
		})
	}
}

// dataFor is an empty data file if the image in st needs one, else nil.
func dataFor(t *testing.T, st store.Store) store.Store {
	t.Helper()
	h, err := qcow2.ReadHeader(t.Context(), st)
	if err != nil {
		t.Fatal(err)
	}
	if !qcow2.NamesOf(h).NeedsDataFile {
		return nil
	}
	return storetest.New(nil)
}

// overL2 makes a refcount block of the L2 table of the first clusters.
const overL2 = "0000000000040000"

// TestUnknownAutoclearBitsAreClearedBeforeWriting: those that stand for what
// stays true are kept.
func TestUnknownAutoclearBitsAreClearedBeforeWriting(t *testing.T) {
	b := patchedBytes(t, made(t, "cluster_size=64k", "64M", written), format.OffAutoclear, "00000000000000f0")
	st := storetest.New(b)
	d, err := qcow2.Open(t.Context(), st, qcow2.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if got := u64(st.Contents(), format.OffAutoclear); got != 0 {
		t.Errorf("autoclear bits: got %#x, want none", got)
	}
}

// TestKeptClustersStayWhereTheyAre: with KeepCluster a trim frees storage and
// no clusters.
func TestKeptClustersStayWhereTheyAre(t *testing.T) {
	st := storetest.New(made(t, "cluster_size=64k", "64M", "write -q -P 17 0 1M"))
	d, err := qcow2.Open(t.Context(), st, qcow2.Options{Discard: qcow2.KeepCluster})
	if err != nil {
		t.Fatal(err)
	}
	full, end := st.Allocated(), len(st.Contents())
	if err := d.Trim(t.Context(), 100, 1<<20-100, 0); err != nil {
		t.Fatal(err)
	}
	if got := st.Allocated(); got > full-(15<<16) {
		t.Errorf("storage after the trim: got %d bytes, want %d less than %d", got, 15<<16, full)
	}
	mustMatch(t, d, 64<<10, make([]byte, 15<<16))
	mustMatch(t, d, 0, []byte(strings.Repeat("\x11", 100)))
	if err := d.WriteAt(t.Context(), []byte(strings.Repeat("\x22", 1<<20)), 0, 0); err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if got := len(st.Contents()); got != end {
		t.Errorf("end of the file after writing again: got %#x, want %#x as before", got, end)
	}
	qemuCheck(t, st.Contents())
}

// TestTableMayEndWithTheFile: of an L2 table that the end of the file cuts off
// the rest is zero, to QEMU as well, whether the table is the disk's own or is
// copied because a snapshot has it too.
func TestTableMayEndWithTheFile(t *testing.T) {
	own := made(t, "cluster_size=64k", "512M", "write -q -z -u 0 64k")[:l2Table+4096]
	shared := made(t, "cluster_size=64k", "512M", "write -q -z -u 0 64k", "snapshot s1")
	shared = append(shared, make([]byte, -len(shared)&0xffff)...)
	end := len(shared) // here is the table now; its old place leaks
	shared = append(shared, own[l2Table:]...)
	for _, l1 := range []int{base, int(u64(shared, int(u64(shared, format.OffSnapshots+4))))} {
		binary.BigEndian.PutUint64(shared[l1:], uint64(end))
	}
	binary.BigEndian.PutUint16(shared[0x20000+end>>16*2:], 2)
	for name, b := range map[string][]byte{"own": own, "shared": shared} {
		t.Run(name, func(t *testing.T) {
			mustMatch(t, openQuiet(t, storetest.New(b), true), 0, make([]byte, 48<<20))
			st := storetest.New(b)
			d := openQuiet(t, st, false)
			data := []byte(strings.Repeat("\x05", 64<<10))
			if err := d.WriteAt(t.Context(), data, 400<<20, 0); err != nil {
				t.Fatal(err)
			}
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
			st.Reopen()
			wantSound(t, st, 2)
			d = openQuiet(t, st, true)
			mustMatch(t, d, 380<<20, make([]byte, 20<<20))
			mustMatch(t, d, 400<<20, data)
		})
	}
}
