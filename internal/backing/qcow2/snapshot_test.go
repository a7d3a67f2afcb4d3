package qcow2_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/check"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/storetest"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

func snapshotOf(name string) qcow2.Options {
	o := quiet()
	o.Snapshot = name
	return o
}

func TestSnapshotIsServedAsItWas(t *testing.T) {
	b := made(t, "cluster_size=64k", "64M", written, "snapshot first", "write -q -P 2 0 128k", "snapshot second",
		"write -q -z 0 64k", "truncate 128M", "write -q -P 3 100M 64k")
	active, first, second := open(t, b, quiet()), open(t, b, snapshotOf("first")), open(t, b, snapshotOf("2"))
	if active.Size() != 128<<20 || first.Size() != 64<<20 || second.Size() != 64<<20 {
		t.Errorf("sizes %d, %d, %d", active.Size(), first.Size(), second.Size())
	}
	if at(t, active, 0).Kind != qcow2.Zero || at(t, active, 100<<20).Kind != qcow2.Data {
		t.Errorf("the disk itself: %+v, %+v", at(t, active, 0), at(t, active, 100<<20))
	}
	if s := at(t, first, 0); s.Kind != qcow2.Data || s.Off != 0x50000 || at(t, first, 64<<10).Kind != qcow2.Absent {
		t.Errorf("the first snapshot: %+v", s)
	}
	if s := at(t, second, 0); s.Kind != qcow2.Data || s.Off == 0x50000 || at(t, second, 64<<10).Kind != qcow2.Data {
		t.Errorf("the second snapshot: %+v", s)
	}
	for _, m := range []*qcow2.Image{active, first, second} {
		list, err := m.Snapshots(context.Background())
		if err != nil || len(list) != 2 || list[0].Name != "first" || list[1].ID != "2" {
			t.Errorf("Snapshots: %+v, %v", list, err)
		}
		for _, s := range spans(t, m, 0, m.Size()) {
			if s.Err != nil {
				t.Error(s.Err)
			}
		}
	}
}

func TestUnknownSnapshotNamesThoseThereAre(t *testing.T) {
	b := made(t, "cluster_size=64k", "64M", written, "snapshot first", "snapshot second")
	_, err := qcow2.OpenImage(context.Background(), storetest.New(b), snapshotOf("third"))
	if !errors.Is(err, backing.ErrInvalid) || !strings.Contains(fmt.Sprint(err), `"first" (ID "1"), "second" (ID "2")`) {
		t.Errorf("OpenImage: %v", err)
	}
	none := made(t, "cluster_size=64k", "64M")
	_, err = qcow2.OpenImage(context.Background(), storetest.New(none), snapshotOf("x"))
	if !errors.Is(err, backing.ErrInvalid) || !strings.Contains(fmt.Sprint(err), "has none") {
		t.Errorf("OpenImage without snapshots: %v", err)
	}
}

// TestBadSnapshotsLeaveTheDisk is S1 to S5 and S8: the disk is read, what is
// wrong with the snapshots refuses only them.
func TestBadSnapshotsLeaveTheDisk(t *testing.T) {
	b := made(t, "cluster_size=64k", "64M", written, "snapshot s1")
	sn := u64(b, 64)
	for _, tt := range []struct {
		name    string
		image   []byte
		off     int
		hex     string
		served  bool // the snapshot
		listing bool // the snapshot table
	}{
		{"nothing", b, 0, "", true, true},
		{"S1 unaligned L1 table", b, sn, "0000000000400200", false, true},
		{"S1 L1 table beyond the end", b, sn, "0000000000400000", false, true},
		{"S2 L1 table too large", b, sn + 8, "10000000", false, true},
		{"S2 L1 table too small", b, sn + 8, "00000000", false, true},
		{"S3 too much extra data", b, sn + 36, "00000401", false, false},
		{"S4 long ID", b, sn + 12, "ffff", false, false},
		{"S5 L1 table of the disk", b, sn, "0000000000030000", true, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			image := patch(t, tt.image, tt.off, tt.hex)
			m := open(t, image, quiet())
			if s := at(t, m, 0); s.Kind != qcow2.Data {
				t.Errorf("the disk: %+v", s)
			}
			if _, err := m.Snapshots(context.Background()); (err == nil) != tt.listing ||
				err != nil && !errors.Is(err, backing.ErrInvalid) {
				t.Errorf("Snapshots: %v", err)
			}
			s, err := qcow2.OpenImage(context.Background(), storetest.New(image), snapshotOf("s1"))
			if (err == nil) != tt.served || err != nil && !errors.Is(err, backing.ErrInvalid) {
				t.Errorf("OpenImage of the snapshot: %v", err)
			}
			if err == nil && at(t, s, 0).Kind != qcow2.Data {
				t.Errorf("the snapshot: %+v", at(t, s, 0))
			}
		})
	}
}

// TestLargeSnapshotTablesAreReadInPart is S7 and S8.
func TestLargeSnapshotTablesAreReadInPart(t *testing.T) {
	b := made(t, "cluster_size=64k", "64M", written)
	for _, tt := range []struct {
		name, count string
		names       bool
		kind        backing.Kind
		most        int64
	}{
		{"S7 empty entries", "00010000", false, "", 16 << 20},
		{"S8 64 MiB of names", "00000400", true, backing.ErrInvalid, 16 << 20},
	} {
		t.Run(tt.name, func(t *testing.T) {
			st := storetest.New(patch(t, b, 60, tt.count+"0000000001000000"))
			st.Cut(128 << 20)
			for i := range int64(1024) {
				if tt.names {
					st.Patch(16<<20+i*(40+65535+1), []byte{14: 0xff, 15: 0xff, 39: 0})
				}
			}
			m, err := qcow2.OpenImage(context.Background(), st, quiet())
			if err != nil {
				t.Fatal(err)
			}
			if s := at(t, m, 0); s.Kind != qcow2.Data {
				t.Errorf("the disk: %+v", s)
			}
			if got := st.Bytes(storetest.Read); got > tt.most {
				t.Errorf("%d bytes read, want at most %d", got, tt.most)
			}
			if _, err := m.Snapshots(context.Background()); tt.kind == "" && err != nil || tt.kind != "" && !errors.Is(err, tt.kind) {
				t.Errorf("Snapshots: %v, want %q", err, tt.kind)
			}
		})
	}
}

// TestManySnapshotsTakeOneRead is S7: a table of 65536 entries without names is
// read as one of a single entry is, also where the file ends within it.
func TestManySnapshotsTakeOneRead(t *testing.T) {
	b := made(t, "cluster_size=64k", "64M", written)
	const table, all = 16 << 20, 65536 * 40
	for name, read := range map[string]func(st *storetest.Mem) error{
		"open": func(st *storetest.Mem) error {
			_, err := qcow2.OpenImage(t.Context(), st, quiet())
			return err
		},
		"list": func(st *storetest.Mem) error {
			h, err := qcow2.ReadHeader(t.Context(), st)
			if err == nil {
				_, _, err = qcow2.ReadSnapshots(t.Context(), st, h, limits.SnapshotTable)
			}
			if kind := format.Corrupt(""); errors.As(err, &kind) {
				err = nil // the file ends within the table
			}
			return err
		},
		"check": func(st *storetest.Mem) error {
			h, err := qcow2.ReadHeader(t.Context(), st)
			if err == nil {
				_, err = check.Run(t.Context(), st, h, check.Options{})
			}
			return err
		},
	} {
		counts := func(digits string, end int64) (reads int, bytes int64) {
			st := storetest.New(patch(t, b, format.OffSnapshots, digits+"0000000001000000"))
			st.Cut(end)
			if err := read(st); err != nil {
				t.Fatalf("%s: %s snapshots in a file of %d bytes: %v", name, digits, end, err)
			}
			return st.Count(storetest.Read), st.Bytes(storetest.Read)
		}
		want, few := counts("00000001", table+all)
		for _, end := range []int64{table + all, table + all + 100<<20, table + all/2, table + 100<<10, table + 40} {
			if got, n := counts("00010000", end); got != want || n > few+all {
				t.Errorf("%s: %d reads of %d bytes in a file that ends %d bytes into the table, want %d reads", name, got, n, end-table, want)
			}
		}
	}
}
