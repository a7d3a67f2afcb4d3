package qcow2_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/create"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/disktest"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/store"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/storetest"
	"github.com/vmdiskd/vmdiskd/internal/backing/raw"
	"github.com/vmdiskd/vmdiskd/internal/engine"
)

// TestFullHostFailsWritesAndNoFlush runs scripts on hosts that have room for a
// part of them: whatever fails, each flush brings what was written, and once
// there is room everything goes on. What one session leaves the next one takes for
// holes where nothing was written.
func TestFullHostFailsWritesAndNoFlush(t *testing.T) {
	list := append(created(t), compressedImage(t, "", 4096, 256<<10), compressedImage(t, ",extended_l2=on", 16<<10, 512<<10),
		fromQEMUIO(t, "512,snapshots", "", 512, "1M", "write -P 1 0 700k", "snapshot a", "write -P 2 300k 200k", "snapshot b"),
		blank(t, "512, larger table", create.Options{Size: 6 << 20, ClusterSize: 512, RefcountBits: 64}))
	for _, s := range kinds(list) {
		if strings.Contains(s.name, "block device") {
			continue
		}
		t.Run(s.name, func(t *testing.T) {
			t.Parallel()
			refused := 0
			for seed, last := seedOf(t), 0; last < max(1, 6/thinner); last++ {
				n, err := s.onFullHost(t, seed+uint64(last))
				if err != nil {
					t.Fatalf("-disk.seed %d: %v", seed+uint64(last), err)
				}
				refused += n
			}
			if refused == 0 && s.data == nil { // the table of a data file may be there
				t.Error("the host was never full")
			}
		})
	}
}

// onFullHost runs scripts on a host of s, one for each session, and says how many
// times it was full.
func (s *specimen) onFullHost(t *testing.T, seed uint64) (refused int, err error) {
	h, o := s.host(), disktest.NewOracle(bytes.Clone(s.first))
	for session := range uint32(2) {
		n, err := s.sessionOnFullHost(t, h, o, seed, session)
		if err != nil {
			return 0, fmt.Errorf("session %d: %w", session, err)
		}
		refused += n
	}
	return refused, reread(t.Context(), h, o)
}

// sessionOnFullHost runs a script while the room of the host changes.
func (s *specimen) sessionOnFullHost(t *testing.T, h *host, o *disktest.Oracle, seed uint64, session uint32) (refused int, err error) {
	ctx, rnd, version := t.Context(), rand.New(rand.NewPCG(seed, uint64(session))), 1+session<<16
	f := h.again()
	host, err := storetest.NewFull(ctx, h.files[0])
	if err != nil {
		return 0, err
	}
	host.CannotZero = seed%2 == 0
	f.Image = host
	dev, err := s.open(ctx, f, false)
	if err != nil {
		return 0, err
	}
	r := disktest.Run{Dev: dev, Oracle: o, Faulty: true}
	shape := disktest.Shape{Size: int64(len(s.first)), Cluster: s.cluster, Ops: 60, Largest: 256 << 10, Version: version}
	for i, batch := range shape.Random(rnd) {
		if i%4 == 0 {
			host.SetRoom(rnd.Int64N(512<<10) * rnd.Int64N(2))
		}
		if err := r.Carry(ctx, batch); err != nil {
			return 0, err
		}
		done := r.Oracle.BeginFlush()
		if err := dev.Flush(ctx); err != nil {
			return 0, errors.Join(errors.New("flush"), err)
		}
		done()
		if _, err := audit(ctx, disktest.Files{Image: h.files[0]}); err != nil {
			return 0, err
		}
		host.SetRoom(0)
		p := make([]byte, 4096)
		off := rnd.Int64N(int64(len(s.first)) - 4096)
		mark := 1<<20 + version + uint32(i)
		disktest.Fill(p, off, mark)
		c := r.Oracle.Begin(off, 4096, mark, false, false)
		if err := dev.WriteAt(ctx, p, off, 0); err == nil {
			r.Oracle.End(c)
		} else if errors.Is(err, backing.ErrNoSpace) {
			r.Oracle.Fail(c)
			refused++
		} else {
			return 0, err
		}
		r.Oracle.Prune()
	}
	if err := r.ReadAll(ctx); err != nil {
		return 0, err
	}
	host.SetRoom(1 << 30)
	r.Faulty = false
	if err := r.Do(ctx, shape.Random(rnd)); err != nil {
		return 0, errors.Join(errors.New("with room"), err)
	}
	return refused, errors.Join(dev.Close(), h.closed(ctx))
}

// sparseCopy is a disk of 8 GiB whose first part is written, with clusters of 64 KiB,
// or with a data file. Its image has a hole wherever it is zero, and the host is full.
func sparseCopy(t *testing.T, written int, data bool) (st *storetest.Mem, host *storetest.Full, d backing.Device) {
	t.Helper()
	st, o, opt := storetest.New(nil), create.Options{Size: 8 << 30}, quiet()
	guest := storetest.New(nil)
	if data {
		o.DataFile, o.Data, opt.DataFile = "data", guest, guest
	}
	if err := create.Image(t.Context(), st, o); err != nil {
		t.Fatal(err)
	}
	d, err := qcow2.Open(t.Context(), st, opt)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(d.WriteAt(t.Context(), bytes.Repeat([]byte{1}, written), 0, 0), d.Close()); err != nil {
		t.Fatal(err)
	}
	guest.Reopen()
	st = storetest.New(st.Contents())
	if host, err = storetest.NewFull(t.Context(), st); err != nil {
		t.Fatal(err)
	}
	if d, err = qcow2.Open(t.Context(), host, opt); err != nil {
		t.Fatal(err)
	}
	return st, host, d
}

// TestHolesOfTablesFailChangesAndNoFlush: on a full host, what changes an entry of an
// L2 table where the file has a hole, as in a sparse copy, says that there is no
// room. What frees clusters has no need of any.
func TestHolesOfTablesFailChangesAndNoFlush(t *testing.T) {
	const written, hole, cluster = 1 << 20, 400 << 20, 64 << 10
	zero := func(d backing.Device) error { return d.Zero(t.Context(), hole, cluster, 0) }
	write := func(d backing.Device) error { return d.WriteAt(t.Context(), make([]byte, cluster), hole, 0) }
	for _, tt := range []struct {
		name string
		data bool
		do   func(d backing.Device) error
		want error
	}{
		{"zero", false, zero, backing.ErrNoSpace},
		{"zero, data file", true, zero, backing.ErrNoSpace},
		{"write, data file", true, write, backing.ErrNoSpace},
		{"zero of what was written", false, func(d backing.Device) error { return d.Zero(t.Context(), 0, written, 0) }, nil},
		{"trim", false, func(d backing.Device) error { return d.Trim(t.Context(), 0, d.Info().Size, 0) }, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			st, _, d := sparseCopy(t, written, tt.data)
			if err := tt.do(d); !errors.Is(err, tt.want) {
				t.Errorf("without room: got %v, want %v", err, tt.want)
			}
			if err := errors.Join(d.Flush(t.Context()), d.Close()); err != nil {
				t.Errorf("flush and close: %v", err)
			}
			st.Reopen()
			wantSound(t, st, 0)
			if tt.want != nil {
				return
			}
			p := make([]byte, written)
			d = openQuiet(t, st, true)
			if err := errors.Join(d.ReadAt(t.Context(), p, 0), d.Close()); err != nil || !backing.AllZero(p) {
				t.Errorf("read: got %v, and zeroes: %t", err, backing.AllZero(p))
			}
		})
	}
}

// TestRefusedWriteLeavesTablesTheirStorage: a write for whose tables there is too
// little room, by any number of blocks, takes none from a change that was done.
func TestRefusedWriteLeavesTablesTheirStorage(t *testing.T) {
	const block, tables, hole, cluster = 4096, 1 << 20, 400 << 20, 64 << 10
	refused, short := 0, true
	for n := int64(0); short; n++ {
		_, host, d := sparseCopy(t, cluster, false)
		host.Crowded = true
		host.SetRoom(block)
		if err := d.Zero(t.Context(), hole, cluster, 0); err != nil {
			t.Fatal(err)
		}
		host.SetRoom(tables + n*block)
		err := d.WriteAt(t.Context(), make([]byte, cluster), 2*hole, 0)
		host.SetRoom(0)
		if err := errors.Join(d.Flush(t.Context()), d.Close()); err != nil {
			t.Errorf("flush and close with %d blocks: %v", n, err)
		}
		if short = errors.Is(err, backing.ErrNoSpace); short {
			refused++
		}
	}
	if refused < tables/block/16 {
		t.Errorf("the write was refused with %d blocks at most", refused)
	}
}

// fullSubclusters is an image of 15 compressed clusters with subclusters of 512
// bytes, on a host that is full. The disk ends after size bytes, in the last one.
func fullSubclusters(t *testing.T, size int64) (*storetest.Mem, *storetest.Full) {
	t.Helper()
	st := compressedImage(t, ",extended_l2=on", 16<<10, 240<<10).image
	st.Patch(format.OffSize, binary.BigEndian.AppendUint64(nil, uint64(size)))
	host, err := storetest.NewFull(t.Context(), st)
	if err != nil {
		t.Fatal(err)
	}
	return st, host
}

// TestZeroOfCompressedSubclustersNeedsRoom: what a compressed cluster has of a
// range is zero when Zero returns, or Zero says that there was no room.
func TestZeroOfCompressedSubclustersNeedsRoom(t *testing.T) {
	const cluster, size = 16 << 10, 240 << 10
	for _, tt := range []struct{ off, end int64 }{
		{512, 1024},
		{size - 2*cluster, size - cluster + 512}, // ends within one
		{2*cluster + 512, 5 * cluster},           // begins within one
		{2*cluster + 512, 6*cluster + 512},       // both
	} {
		t.Run(fmt.Sprint(tt.off, "-", tt.end), func(t *testing.T) {
			st, host := fullSubclusters(t, size)
			d, err := qcow2.Open(t.Context(), host, quiet())
			if err != nil {
				t.Fatal(err)
			}
			n := tt.end - tt.off
			if err := d.Zero(t.Context(), tt.off, n, 0); !errors.Is(err, backing.ErrNoSpace) {
				t.Errorf("zero without room: got %v, want %v", err, backing.ErrNoSpace)
			}
			if err := d.Flush(t.Context()); err != nil {
				t.Errorf("flush: %v", err)
			}
			host.SetRoom(1 << 30)
			if err := d.Zero(t.Context(), tt.off, n, 0); err != nil {
				t.Errorf("zero with room: %v", err)
			}
			p := make([]byte, n)
			if err := errors.Join(d.ReadAt(t.Context(), p, tt.off), d.Close()); err != nil || !backing.AllZero(p) {
				t.Errorf("read: got %v, and zeroes: %t", err, backing.AllZero(p))
			}
			st.Reopen()
			wantSound(t, st, 0)
		})
	}
}

// TestGrowthOverCompressedTailNeedsRoom: a disk that ends within a compressed
// cluster does not grow before what lies behind its end is zero.
func TestGrowthOverCompressedTailNeedsRoom(t *testing.T) {
	const cluster, size = 16 << 10, 240 << 10
	const end = size - cluster + 512
	st, host := fullSubclusters(t, end)
	d, err := qcow2.Open(t.Context(), host, quiet())
	if err != nil {
		t.Fatal(err)
	}
	if err := d.(backing.Resizer).Resize(t.Context(), size); !errors.Is(err, backing.ErrNoSpace) || d.Info().Size != end {
		t.Errorf("growth without room: got %v and %d bytes, want %v and %d", err, d.Info().Size, backing.ErrNoSpace, end)
	}
	host.SetRoom(1 << 30)
	if err := d.(backing.Resizer).Resize(t.Context(), size); err != nil {
		t.Errorf("growth with room: %v", err)
	}
	p := make([]byte, size-end)
	if err := errors.Join(d.ReadAt(t.Context(), p, end), d.Close()); err != nil || !backing.AllZero(p) {
		t.Errorf("read: got %v, and zeroes: %t", err, backing.AllZero(p))
	}
	st.Reopen()
	wantSound(t, st, 0)
}

// TestGrowthWithoutRoomTakesNone: a mapping for which a full host has no storage
// leaves it what there was, but for what is set aside.
func TestGrowthWithoutRoomTakesNone(t *testing.T) {
	const room, table, aside = 128 << 10, 256 << 10, 32 << 10
	for _, cannotZero := range []bool{false, true} {
		host, err := storetest.NewFull(t.Context(), blank(t, "small", create.Options{Size: 1 << 20, ClusterSize: 512}).image)
		if err != nil {
			t.Fatal(err)
		}
		host.CannotZero = cannotZero
		d, err := qcow2.Open(t.Context(), host, quiet())
		if err != nil {
			t.Fatal(err)
		}
		host.SetRoom(1 << 30)
		if err := errors.Join(d.WriteAt(t.Context(), []byte{1}, 0, 0), d.Flush(t.Context())); err != nil {
			t.Fatal(err)
		}
		host.SetRoom(room)
		err = d.(backing.Resizer).Resize(t.Context(), table/8*32<<10)
		if got := host.Room(); !errors.Is(err, backing.ErrNoSpace) || got < room-aside {
			t.Errorf("growth without room: got %v with %d left, want %v with %d at least", err, got, backing.ErrNoSpace, room-aside)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestTrimNeedsNoRoom: where a snapshot shares the tables of a disk, a trim on a
// full host frees what the tables have that are the disk's own, durably if that
// is wanted, and nothing of the others.
func TestTrimNeedsNoRoom(t *testing.T) {
	const cluster, shared, own, size = 512, 2 << 20, 64 << 10, 3 << 20
	s := fromQEMUIO(t, "snapshot", "", cluster, "3M", "write -P 1 0 3M", "snapshot a")
	for _, discard := range []qcow2.Discard{qcow2.Unmap, qcow2.KeepCluster} {
		t.Run(string(discard), func(t *testing.T) {
			st := storetest.New(s.image.Contents())
			host, err := storetest.NewFull(t.Context(), st)
			if err != nil {
				t.Fatal(err)
			}
			host.SetRoom(2 * own)
			o := quiet()
			o.Discard = discard
			d, err := qcow2.Open(t.Context(), host, o)
			if err != nil {
				t.Fatal(err)
			}
			written := bytes.Repeat([]byte{2}, own)
			if err := errors.Join(d.WriteAt(t.Context(), written, shared, 0), d.Flush(t.Context())); err != nil {
				t.Fatal(err)
			}
			host.SetRoom(0)
			if err := d.Trim(t.Context(), 0, shared+own, backing.FUA); err != nil {
				t.Errorf("trim: %v", err)
			}
			again := openQuiet(t, storetest.New(st.Contents()), true)
			p := make([]byte, own)
			if err := errors.Join(again.ReadAt(t.Context(), p, shared), again.Close()); err != nil || !backing.AllZero(p) {
				t.Errorf("read what was trimmed with FUA: got %v, and zeroes: %t", err, backing.AllZero(p))
			}
			if err := d.Trim(t.Context(), 0, size, 0); err != nil {
				t.Errorf("trim all: %v", err)
			}
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
			st.Reopen()
			wantSound(t, st, 0)
		})
	}
}

// TestZeroWithoutHolesTakesStorage: what was zeroed with NoHole, to the byte, can
// be written when the host is full; one that is full before says so.
func TestZeroWithoutHolesTakesStorage(t *testing.T) {
	const size = 2<<20 + 512
	for _, s := range []*specimen{
		blank(t, "4k", create.Options{Size: size, ClusterSize: 4096}),
		blank(t, "64k", create.Options{Size: size, ClusterSize: 64 << 10}),
		blank(t, "subclusters", create.Options{Size: size, ClusterSize: 64 << 10, ExtendedL2: true}),
		fromQEMUIO(t, "subclusters, snapshot", ",extended_l2=on", 64<<10, fmt.Sprint(size), "write -P 1 0 1M", "snapshot a"),
	} {
		for _, cannotZero := range []bool{false, true} {
			for _, r := range [][2]int64{{0, size}, {5000, size - 3000}, {100, 300}, {70 << 10, 75 << 10}} {
				t.Run(fmt.Sprint(s.name, cannotZero, r), func(t *testing.T) {
					host, err := storetest.NewFull(t.Context(), s.image.Clone())
					if err != nil {
						t.Fatal(err)
					}
					host.CannotZero = cannotZero
					host.SetRoom(1 << 30)
					d, err := qcow2.Open(t.Context(), host, quiet())
					if err != nil {
						t.Fatal(err)
					}
					defer d.Close()
					off, n := r[0], r[1]-r[0]
					if err := errors.Join(d.WriteAt(t.Context(), []byte{1}, size/2, 0), d.Flush(t.Context())); err != nil {
						t.Fatal(err)
					}
					host.SetRoom(0)
					if err := d.Zero(t.Context(), off, n, backing.NoHole); !errors.Is(err, backing.ErrNoSpace) {
						t.Errorf("zero without room: got %v, want %v", err, backing.ErrNoSpace)
					}
					host.SetRoom(1 << 30)
					if err := errors.Join(d.Zero(t.Context(), off, n, backing.NoHole), d.Flush(t.Context())); err != nil {
						t.Fatal(err)
					}
					host.SetRoom(0)
					if err := errors.Join(d.WriteAt(t.Context(), bytes.Repeat([]byte{1}, int(n)), off, 0), d.Flush(t.Context())); err != nil {
						t.Errorf("write without room of what was zeroed: %v", err)
					}
				})
			}
		}
	}
}

// TestFailedZeroKeepsStorage: a zero for which a full host has no storage leaves the
// disk what it had, written or only zeroed, and the host the rest.
func TestFailedZeroKeepsStorage(t *testing.T) {
	const had, room, size = 2 << 20, 1 << 20, 8 << 20
	for _, o := range []create.Options{{Size: size}, {Size: size, ExtendedL2: true}} {
		for _, cannotZero := range []bool{false, true} {
			t.Run(fmt.Sprint(o.ExtendedL2, cannotZero), func(t *testing.T) {
				host, err := storetest.NewFull(t.Context(), blank(t, "zeroes", o).image)
				if err != nil {
					t.Fatal(err)
				}
				host.CannotZero = cannotZero
				host.SetRoom(1 << 30)
				d, err := qcow2.Open(t.Context(), host, quiet())
				if err != nil {
					t.Fatal(err)
				}
				defer d.Close()
				data := bytes.Repeat([]byte{1}, had)
				if err := errors.Join(d.Zero(t.Context(), 0, had/2, backing.NoHole), d.WriteAt(t.Context(), data[:had/2], had/2, 0),
					d.Flush(t.Context())); err != nil {
					t.Fatal(err)
				}
				host.SetRoom(room)
				if err := d.Zero(t.Context(), 0, size, backing.NoHole); !errors.Is(err, backing.ErrNoSpace) {
					t.Errorf("zero without room: got %v, want %v", err, backing.ErrNoSpace)
				}
				if got := host.Room(); got != room {
					t.Errorf("it left the host %d, want %d", got, room)
				}
				host.SetRoom(0)
				if err := errors.Join(d.WriteAt(t.Context(), data, 0, 0), d.Flush(t.Context())); err != nil {
					t.Errorf("write of what had storage: %v", err)
				}
			})
		}
	}
}

// TestZeroesFindWhatWasTrimmed: on a device that is full, a zero that needs host
// clusters has those that are free after a commit, as a write does.
func TestZeroesFindWhatWasTrimmed(t *testing.T) {
	const cluster, trimmed, size = 4096, 16 * 4096, 2 << 20
	st := blank(t, "device", create.Options{Size: size, ClusterSize: cluster}).image
	st.Cut(1 << 20)
	st.SetFixed(true)
	d := openQuiet(t, st, false)
	end, err := fillUp(t.Context(), d, 0, size-trimmed, 1)
	if !errors.Is(err, backing.ErrNoSpace) {
		t.Fatalf("filling the device: got %v, want %v", err, backing.ErrNoSpace)
	}
	for _, f := range []func() error{
		func() error { return d.Flush(t.Context()) },
		func() error { return d.Trim(t.Context(), 0, trimmed, 0) },
		func() error { return d.Zero(t.Context(), size-trimmed, trimmed, backing.NoHole) },
	} {
		if err := f(); err != nil {
			t.Fatal(err)
		}
	}
	err = d.Zero(t.Context(), end+64<<10, size-trimmed-end-64<<10, backing.NoHole)
	if !errors.Is(err, backing.ErrNoSpace) {
		t.Errorf("zero without room: got %v, want %v", err, backing.ErrNoSpace)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	st.Reopen()
	wantSound(t, st, 0)
}

// TestGrownDeviceTakesWhatItRefused: who makes the volume below an image larger
// when it is full, need not open the image anew.
func TestGrownDeviceTakesWhatItRefused(t *testing.T) {
	for _, tt := range []struct{ cluster, size int64 }{{512, 3 << 20}, {4096, 8 << 20}, {64 << 10, 64 << 20}} {
		t.Run(fmt.Sprint(tt.cluster), func(t *testing.T) {
			st := blank(t, "device", create.Options{Size: tt.size, ClusterSize: tt.cluster}).image
			st.Cut(tt.size / 16)
			st.SetFixed(true)
			d := openQuiet(t, st, false)
			at := int64(0)
			for grown := tt.size / 16; grown < tt.size; grown *= 2 {
				to, err := fillUp(t.Context(), d, at, tt.size, 1)
				if !errors.Is(err, backing.ErrNoSpace) || to > grown {
					t.Fatalf("a device of %d bytes: wrote %d to %d, got %v, want %v", grown, at, to, err, backing.ErrNoSpace)
				}
				if err := d.Flush(t.Context()); err != nil {
					t.Fatal(err)
				}
				at = to
				st.Cut(2 * grown)
			}
			st.Cut(2 * tt.size)
			if to, err := fillUp(t.Context(), d, at, tt.size, 1); err != nil || to < tt.size {
				t.Fatalf("with room for all: wrote %d to %d, got %v", at, to, err)
			}
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
			st.Reopen()
			wantSound(t, st, 0)
			d = openQuiet(t, st, true)
			got, want := make([]byte, tt.size), make([]byte, tt.size)
			for off := int64(0); off < tt.size; off += 64 << 10 {
				disktest.Fill(want[off:off+64<<10], off, 1)
			}
			if err := d.ReadAt(t.Context(), got, 0); err != nil || !bytes.Equal(got, want) {
				t.Errorf("read: got %v, and other bytes: %t", err, !bytes.Equal(got, want))
			}
			if err := d.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestGrownDeviceHasRoomForTables: one that becomes larger before anything failed
// takes the bitmaps when the disk is closed, and the L1 table of a larger disk.
func TestGrownDeviceHasRoomForTables(t *testing.T) {
	const device = 256 << 10
	marked := emptyMarked(t)
	open := func() (*storetest.Mem, backing.Device) {
		st := storetest.New(marked)
		st.Cut(device)
		st.SetFixed(true)
		return st, openQuiet(t, st, false)
	}
	// fill writes so many clusters, or all that there is room for.
	fill := func(d backing.Device, most int64) (n int64) {
		for p := bytes.Repeat([]byte{1}, 512); n < most && d.WriteAt(t.Context(), p, n*512, 0) == nil; n++ {
			if err := d.Flush(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		return n
	}
	_, d := open()
	room := fill(d, device)
	_ = d.Close() // there is no room for the bitmap
	for _, size := range []int64{1 << 20, 64 << 20} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			st, d := open()
			if n := fill(d, room); n < room {
				t.Fatalf("wrote %d of %d clusters", n, room)
			}
			st.Cut(1 << 20)
			if err := d.(backing.Resizer).Resize(t.Context(), size); err != nil {
				t.Errorf("resize: %v", err)
			}
			if err := d.Close(); err != nil {
				t.Errorf("close: %v", err)
			}
			st.Reopen()
			wantSound(t, st, 0)
			if h, err := qcow2.ReadHeader(t.Context(), st); err != nil || int64(h.Size) != size || h.Autoclear == 0 {
				t.Errorf("got a disk of %d bytes, bitmaps %v, %v", h.Size, h.Autoclear != 0, err)
			}
		})
	}
}

// TestGrowthThatIsGoneIsAnError: of what a file or device got after it was opened,
// data and tables alike, nothing is read as zeroes when it is gone.
func TestGrowthThatIsGoneIsAnError(t *testing.T) {
	const size, cluster, part = 48 << 20, 512, 1 << 20
	for _, fixed := range []bool{true, false} {
		t.Run(fmt.Sprint("device: ", fixed), func(t *testing.T) {
			st := blank(t, "growing", create.Options{Size: size, ClusterSize: cluster}).image
			end, err := st.Size()
			if err != nil {
				t.Fatal(err)
			}
			if fixed {
				end = part
				st.Cut(end)
				st.SetFixed(true)
			}
			o := quiet()
			o.CacheBytes = 1 // every table is read again
			d, err := qcow2.Open(t.Context(), st, o)
			if err != nil {
				t.Fatal(err)
			}
			defer d.Close()
			to, err := fillUp(t.Context(), d, 0, size, 1)
			if fixed {
				st.Cut(2 * size)
				to, err = fillUp(t.Context(), d, to, size, 1)
			}
			if err := errors.Join(err, d.Flush(t.Context())); err != nil || to != size {
				t.Fatalf("wrote to %d: %v", to, err)
			}
			st.Cut(end)
			zeroes, p := 0, make([]byte, cluster)
			for off := int64(0); off < size; off += part / 4 {
				if err := d.ReadAt(t.Context(), p, off); err == nil && backing.AllZero(p) {
					zeroes++
				}
			}
			if zeroes > 0 {
				t.Errorf("read: got zeroes at %d of %d places, want an error", zeroes, size/(part/4))
			}
		})
	}
}

// smallHost mounts an ext4 or a tmpfs, which cannot zero in place, of so many
// bytes, on which only a file of ballast is.
func smallHost(t *testing.T, kind string, size, ballast int64) (dir string) {
	t.Helper()
	dir = t.TempDir()
	mount := []string{"-t", kind, "-o", fmt.Sprint("size=", size), "none", dir}
	if kind == "ext4" {
		image := filepath.Join(t.TempDir(), "ext4")
		if out, err := exec.Command("mkfs.ext4", "-q", "-m", "0", image, fmt.Sprint(size>>10, "k")).CombinedOutput(); err != nil {
			t.Fatalf("mkfs.ext4: %v\n%s", err, out)
		}
		mount = []string{"-o", "loop", image, dir}
	}
	if out, err := exec.Command("mount", mount...).CombinedOutput(); err != nil {
		t.Skipf("needs root to mount, and a loop device: %v\n%s", err, out)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Errorf("unmount: %v", err)
		}
	})
	if err := os.WriteFile(filepath.Join(dir, "ballast"), make([]byte, ballast), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

// fileIn is a store of a file that is there.
func fileIn(t *testing.T, path string, e engine.Engine) store.Store {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	d, err := raw.Open(f, e, raw.Options{Path: path, Container: true})
	if err != nil {
		t.Fatal(err)
	}
	return store.NewFile(d)
}

// fillUp writes 64 KiB at a time until a write fails.
func fillUp(ctx context.Context, d backing.Device, from, end int64, version uint32) (to int64, err error) {
	p := make([]byte, 64<<10)
	for to = from; to < end && err == nil; {
		disktest.Fill(p, to, version)
		if err = d.WriteAt(ctx, p, to, 0); err == nil {
			to += int64(len(p))
		}
	}
	return to, err
}

// TestFullFileSystemFailsWritesAndNoFlush is the same on file systems that are
// full before the first table is written.
func TestFullFileSystemFailsWritesAndNoFlush(t *testing.T) {
	const size, ballast = 48 << 20, 16 << 20
	for _, kind := range []string{"ext4", "tmpfs"} {
		for _, cluster := range []int64{512, 64 << 10} {
			t.Run(fmt.Sprint(kind, ",", cluster), func(t *testing.T) {
				dir := smallHost(t, kind, size, ballast)
				fillTwice(t, filepath.Join(dir, "disk.qcow2"), cluster, filepath.Join(dir, "ballast"), ballast)
			})
		}
	}
}

// fillTwice writes an image until its host is full, and goes on when the file
// of ballast is gone.
func fillTwice(t *testing.T, path string, cluster int64, ballast string, size int64) {
	const disk = 40 << 20
	ctx := t.Context()
	e := engine.NewPool(2)
	defer e.Close()
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	st := fileIn(t, path, e)
	if err := create.Image(ctx, st, create.Options{Size: disk, ClusterSize: cluster}); err != nil {
		t.Fatal(err)
	}
	d, err := qcow2.Open(ctx, st, quiet())
	if err != nil {
		t.Fatal(err)
	}
	full, err := fillUp(ctx, d, 0, disk, 1)
	if !errors.Is(err, backing.ErrNoSpace) || full == 0 {
		t.Fatalf("write to a full file system at %d: got %v, want ErrNoSpace", full, err)
	}
	if err := d.Flush(ctx); err != nil {
		t.Fatalf("flush: %v", err)
	}
	wantVersion(t, d, 0, full, 1)
	if _, err := judgedFile(t, path); err != nil {
		t.Error(err)
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	more, err := fillUp(ctx, d, full, full+size/2, 1)
	if err := errors.Join(err, d.Flush(ctx)); err != nil {
		t.Fatalf("with room: %v", err)
	}
	wantVersion(t, d, 0, more, 1)
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if leaks, err := judgedFile(t, path); err != nil || leaks {
		t.Errorf("at the end: leaks %v, %v", leaks, err)
	}
}

// judgedFile is judged of what a file says now.
func judgedFile(t *testing.T, path string) (leaks bool, err error) {
	t.Helper()
	image, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return judged(t.TempDir(), image)
}

// wantVersion holds a range against what Fill makes.
func wantVersion(t *testing.T, d backing.Device, from, end int64, version uint32) {
	t.Helper()
	p, want := make([]byte, 64<<10), make([]byte, 64<<10)
	for ; from < end; from += int64(len(p)) {
		disktest.Fill(want, from, version)
		if err := d.ReadAt(t.Context(), p, from); err != nil || !bytes.Equal(p, want) {
			t.Fatalf("read at %d: other bytes than were written, %v", from, err)
		}
	}
}
