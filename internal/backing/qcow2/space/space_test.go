package space

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/check"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/create"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/store"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/storetest"
)

var ctx = context.Background()

// rig is an image in memory with its Space. The guest's cluster i of a
// preallocated L2 table is linked by hand.
type rig struct {
	testing.TB
	mem *storetest.Mem
	st  store.Store // what Space has
	h   *format.Header
	g   format.Geometry
	s   *Space

	l2   []int64         // offsets of L2 tables, by guest table
	free []int64         // guest clusters without a mapping
	maps map[int64]int64 // guest cluster to host offset
}

// newRig makes an image with room for guest clusters and its L2 tables.
func newRig(t testing.TB, clusterSize, bits, guest int64) *rig {
	t.Helper()
	mem := storetest.New(nil)
	o := create.Options{Size: guest * clusterSize, ClusterSize: clusterSize, RefcountBits: int(bits), Version: 3}
	if err := create.Image(ctx, mem, o); err != nil {
		t.Fatal(err)
	}
	r := &rig{TB: t, mem: mem, st: mem, maps: map[int64]int64{}}
	r.open()
	for i := guest - 1; i >= 0; i-- {
		r.free = append(r.free, i)
	}
	return r
}

// header parses the image as it stands.
func (r *rig) header() *format.Header {
	r.Helper()
	p := make([]byte, 1<<16)
	n, err := r.mem.ReadAt(ctx, p, 0)
	if err != nil {
		r.Fatal(err)
	}
	h, err := format.ParseHeader(p[:n])
	if err != nil {
		r.Fatal(err)
	}
	return h
}

// open makes a new Space of the image as it stands.
func (r *rig) open() {
	r.Helper()
	r.h = r.header()
	r.g = r.h.Geometry()
	report := r.check()
	s, err := New(r.st, r.h, report, slog.New(slog.DiscardHandler))
	if err != nil {
		r.Fatal(err)
	}
	r.s = s
}

// check is a report on the image as it stands, which has no corruption.
func (r *rig) check() *check.Report {
	r.Helper()
	report, err := check.Run(ctx, storetest.New(r.mem.Contents()), r.header(), check.Options{})
	if err != nil {
		r.Fatal(err)
	}
	if report.Corruptions > 0 || report.Errors > 0 {
		r.Fatalf("%d corruptions, %d errors: %+v", report.Corruptions, report.Errors, report.Problems)
	}
	return report
}

// sound is check without leaks.
func (r *rig) sound() *check.Report {
	r.Helper()
	report := r.check()
	if report.Leaks > 0 {
		r.Fatalf("%d leaks: %+v", report.Leaks, report.Problems)
	}
	return report
}

func (r *rig) write() {
	r.Helper()
	if err := r.s.Write(ctx); err != nil {
		r.Fatalf("Write: %v", err)
	}
	if r.s.Pending() {
		r.Fatal("Pending after Write")
	}
}

func (r *rig) reserve(n int64) Run {
	r.Helper()
	run, err := r.s.Reserve(n)
	if err != nil {
		r.Fatalf("Reserve(%d): %v", n, err)
	}
	if run.Len <= 0 || run.Len > r.g.Clusters(n)<<r.g.ClusterBits || !r.g.Aligned(run.Off) || !r.g.Aligned(run.Len) {
		r.Fatalf("Reserve(%d) = %+v", n, run)
	}
	if r.s.IsMeta(run.Off, run.Len) {
		r.Fatalf("Reserve(%d) = %+v has metadata", n, run)
	}
	return run
}

// table is the L2 table of guest cluster i, made with its own reservation if
// need be.
func (r *rig) table(i int64) int64 {
	r.Helper()
	k := i / r.g.L2Entries
	for int64(len(r.l2)) <= k {
		r.l2 = append(r.l2, 0)
	}
	if r.l2[k] == 0 {
		run, err := r.s.ReserveMeta(r.g.ClusterSize)
		if err != nil {
			r.Fatalf("ReserveMeta: %v", err)
		}
		if !r.s.IsMeta(run.Off+5, 1) {
			r.Fatalf("ReserveMeta = %+v is no metadata", run)
		}
		r.mustExtend(run)
		r.mem.Patch(run.Off, make([]byte, run.Len))
		r.write()
		r.mem.Patch(int64(r.h.L1Offset)+k*8, be(format.EncodeL1(run.Off, true)))
		r.l2[k] = run.Off
	}
	return r.l2[k]
}

func (r *rig) mustExtend(run Run) {
	r.Helper()
	if err := r.s.Extend(ctx, run.Off+run.Len); err != nil {
		r.Fatalf("Extend: %v", err)
	}
}

func be(n uint64) []byte { return binary.BigEndian.AppendUint64(nil, n) }

// put maps guest cluster i to host, or to nothing.
func (r *rig) put(i, host int64, copied bool) {
	r.Helper()
	word := uint64(0)
	if host != 0 {
		word, _ = r.g.EncodeL2(format.Cluster{Host: host, Data: r.g.AllSubs(), Copied: copied})
	}
	r.mem.Patch(r.table(i)+i%r.g.L2Entries*r.g.EntrySize, be(word))
}

// link maps unused guest clusters to a run that was written.
func (r *rig) link(run Run) {
	r.Helper()
	for off := run.Off; off < run.Off+run.Len; off += r.g.ClusterSize {
		i := r.free[len(r.free)-1]
		r.free = r.free[:len(r.free)-1]
		r.table(i)
		r.mustExtend(Run{Off: off, Len: r.g.ClusterSize})
		r.put(i, off, true)
		r.maps[i] = off
	}
}

func TestReservedIsCountedOnceWritten(t *testing.T) {
	for _, clusterSize := range []int64{512, 4 << 10, 64 << 10, 2 << 20} {
		for _, bits := range []int64{1, 2, 4, 8, 16, 32, 64} {
			t.Run(fmt.Sprintf("%d/%d", clusterSize, bits), func(t *testing.T) {
				r := newRig(t, clusterSize, bits, 64)
				run := r.reserve(3 * clusterSize)
				if run.Len != 3*clusterSize || !run.Zeroed {
					t.Errorf("got %+v at the end of the file, want 3 zeroed clusters", run)
				}
				if !r.s.Pending() {
					t.Error("nothing is pending after Reserve")
				}
				r.write()
				if n := r.check().Leaks; n != 0 && n != 3 {
					t.Errorf("%d leaks before the link, want 3 or, behind the end of the file, none", n)
				}
				r.link(run)
				r.write()
				r.sound()
			})
		}
	}
}

func TestDroppedIsFreeAndNotZeroed(t *testing.T) {
	r := newRig(t, 512, 16, 64)
	for _, write := range []bool{false, true} {
		run := r.reserve(1024)
		if write {
			r.mustExtend(run)
			r.write()
			if n := r.check().Leaks; n != 2 {
				t.Errorf("%d leaks, want 2", n)
			}
		}
		r.s.Drop(run.Off, run.Len)
		again := r.reserve(1024)
		if again.Off != run.Off || again.Zeroed {
			t.Errorf("after Drop of %+v: Reserve = %+v, want the same, not zeroed", run, again)
		}
		r.s.Drop(again.Off, again.Len)
		r.write()
		r.sound()
	}
}

func TestReleasedIsPunchedAndZeroed(t *testing.T) {
	r := newRig(t, 4096, 16, 64)
	run := r.reserve(2 * 4096)
	r.write()
	r.link(run)
	r.mem.Patch(run.Off, bytes.Repeat([]byte{7}, int(run.Len)))
	r.put(r.free[0], 0, false)
	for i := range r.maps {
		r.put(i, 0, false)
	}
	if err := r.s.Release(ctx, []Ref{{run.Off, run.Len}}); err != nil {
		t.Fatal(err)
	}
	if n := r.mem.Count(storetest.Punch); n != 1 {
		t.Errorf("%d punches of one run, want 1", n)
	}
	r.write()
	r.sound()
	r.s.mu.Lock()
	r.s.hint = 0
	r.s.mu.Unlock()
	if again := r.reserve(2 * 4096); again.Off != run.Off || !again.Zeroed {
		t.Errorf("Reserve = %+v, want the released %+v, zeroed", again, run)
	}
	p := r.mem.Contents()[run.Off:][:run.Len]
	if !bytes.Equal(p, make([]byte, run.Len)) {
		t.Error("a zeroed run is not zero in the file")
	}
}

func TestFullDeviceHasNoSpace(t *testing.T) {
	r := newRig(t, 512, 64, 200)
	size, _ := r.mem.Size()
	r.mem.Cut(size + 20*512 + 100)
	r.mem.SetFixed(true)
	r.open()
	n := 0
	for {
		run, err := r.s.Reserve(512)
		if errors.Is(err, backing.ErrNoSpace) {
			break
		}
		if err != nil || run.Zeroed || run.Off+run.Len > size+20*512 {
			t.Fatalf("Reserve = %+v, %v", run, err)
		}
		n++
	}
	if n != 20 {
		t.Errorf("%d clusters of 20 could be reserved", n)
	}
	r.write()
	r.check()
}
