package space

import (
	"context"
	"encoding/binary"
	"log/slog"
	"math/rand/v2"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/check"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/create"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/storetest"
)

var ctx = context.Background()

// tape is a file whose writes may land although they fail.
type tape struct {
	*storetest.Crash
	rnd *rand.Rand
}

func (t tape) WriteAt(ctx context.Context, p []byte, off int64, durable bool) error {
	err := t.Crash.WriteAt(ctx, p, off, durable)
	if err != nil && t.rnd.IntN(2) == 0 {
		t.Patch(off, p)
	}
	return err
}

// rig is an image on a tape with its Space, and its guest's mapping.
type rig struct {
	testing.TB
	rnd  *rand.Rand
	tape tape
	hook func(storetest.Call) // of the tape; may be nil
	h    *format.Header
	g    format.Geometry
	s    *Space

	hosts map[int64]int64 // guest cluster to host offset
	free  []int64         // guest clusters without a mapping
}

// newRig makes an image for guest clusters, of which all that preallocation
// asks for are mapped.
func newRig(t testing.TB, clusterSize, bits, guest int64, mode create.Preallocation) *rig {
	t.Helper()
	seed := rand.Uint64()
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("seed %d", seed)
		}
	})
	m := storetest.New(nil)
	err := create.Image(ctx, m, create.Options{Size: guest * clusterSize, ClusterSize: clusterSize,
		RefcountBits: int(bits), Version: 3, Preallocation: mode})
	if err != nil {
		t.Fatal(err)
	}
	return rigOf(t, m, seed)
}

func rigOf(t testing.TB, m *storetest.Mem, seed uint64) *rig {
	t.Helper()
	r := &rig{TB: t, rnd: rand.New(rand.NewPCG(seed, 0))}
	r.load(m)
	return r
}

// load goes on with m, which it takes over.
func (r *rig) load(m *storetest.Mem) {
	r.Helper()
	r.tape = tape{storetest.NewCrash(m), r.rnd}
	r.tape.SetHook(r.hook)
	r.open()
}

// clone is a rig of the image as it stands.
func (r *rig) clone() *rig { return rigOf(r.TB, r.tape.Clone(), r.rnd.Uint64()) }

// crash is what a crash now may leave of the image.
func (r *rig) crash() (left *storetest.Mem) {
	for _, left = range r.tape.Crashes(r.rnd, 1) {
	}
	return left
}

// device makes the image a block device of size bytes.
func (r *rig) device(size int64) {
	r.Helper()
	m := r.tape.Clone()
	m.Cut(size)
	m.SetFixed(true)
	r.load(m)
}

func (r *rig) header(m *storetest.Mem) *format.Header {
	r.Helper()
	p := make([]byte, 1<<16)
	n, err := m.ReadAt(ctx, p, 0)
	if err != nil {
		r.Fatal(err)
	}
	h, err := format.ParseHeader(p[:n])
	if err != nil {
		r.Fatalf("the header is broken: %v", err)
	}
	return h
}

// open makes a new Space of the image as it stands.
func (r *rig) open() {
	r.Helper()
	m := r.tape.Clone()
	r.h = r.header(m)
	r.g = r.h.Geometry()
	s, err := New(r.tape, r.h, r.judge(m), slog.New(slog.DiscardHandler))
	if err != nil {
		r.Fatal(err)
	}
	r.s, r.hosts, r.free = s, map[int64]int64{}, nil
	for i := r.g.Clusters(int64(r.h.Size)) - 1; i >= 0; i-- {
		at, ok := r.entry(i)
		if ok {
			if c, err := r.g.DecodeL2(r.word(at), 0); err != nil {
				r.Fatal(err)
			} else if c.HasHost() {
				r.hosts[i] = c.Host
				continue
			}
		}
		r.free = append(r.free, i)
	}
}

// word is 8 bytes of the file.
func (r *rig) word(off int64) uint64 {
	return binary.BigEndian.Uint64(r.tape.Peek(off, 8))
}

// entry is where the L2 entry of guest cluster i lies, if there is a table.
func (r *rig) entry(i int64) (off int64, ok bool) {
	r.Helper()
	l2, _, err := r.g.DecodeL1(r.word(int64(r.h.L1Offset) + i/r.g.L2Entries*8))
	if err != nil {
		r.Fatal(err)
	}
	return l2 + i%r.g.L2Entries*r.g.EntrySize, l2 != 0
}

// judge is the report on an image, which has no corruption.
func (r *rig) judge(m *storetest.Mem) *check.Report {
	r.Helper()
	report, err := check.Run(ctx, m, r.header(m), check.Options{})
	if err != nil {
		r.Fatal(err)
	}
	if report.Corruptions > 0 || report.Errors > 0 {
		r.Fatalf("%d corruptions, %d errors: %+v", report.Corruptions, report.Errors, report.Problems)
	}
	return report
}

func (r *rig) check() *check.Report {
	r.Helper()
	return r.judge(r.tape.Clone())
}

// sound is check without leaks.
func (r *rig) sound() {
	r.Helper()
	if report := r.check(); report.Leaks > 0 {
		r.Fatalf("%d leaks: %+v", report.Leaks, report.Problems)
	}
}

// watch holds the image, and what crashes would leave of it, for sound but
// for leaks, after one call of every n from now on, at random.
func (r *rig) watch(n int) {
	r.hook = func(x storetest.Call) {
		r.Helper()
		if !x.Done || r.rnd.IntN(n) > 0 {
			return
		}
		r.judge(r.tape.Clone())
		r.judge(r.crash())
	}
	r.tape.SetHook(r.hook)
}

// commit writes and syncs.
func (r *rig) commit() {
	r.Helper()
	if err := r.s.Write(ctx); err != nil {
		r.Fatalf("Write: %v", err)
	}
	if r.s.Pending() {
		r.Fatal("Pending after Write")
	}
	if err := r.tape.Sync(ctx); err != nil {
		r.Fatal(err)
	}
}

func (r *rig) reserve(n int64) Run {
	r.Helper()
	run, err := r.s.Reserve(n)
	if err != nil {
		r.Fatalf("Reserve(%d): %v", n, err)
	}
	r.examine(run, n)
	if r.s.IsMeta(run.Off, run.Len) {
		r.Fatalf("Reserve(%d) = %+v is metadata", n, run)
	}
	return run
}

func (r *rig) reserveMeta(n int64) Run {
	r.Helper()
	run, err := r.s.ReserveMeta(n)
	if err != nil {
		r.Fatalf("ReserveMeta(%d): %v", n, err)
	}
	r.examine(run, n)
	if run.Len != r.g.Clusters(n)<<r.g.ClusterBits || !r.s.IsMeta(run.Off+run.Len-1, 1) {
		r.Fatalf("ReserveMeta(%d) = %+v", n, run)
	}
	return run
}

// examine looks at what was reserved for n bytes.
func (r *rig) examine(run Run, n int64) {
	r.Helper()
	if run.Len <= 0 || run.Len > r.g.Clusters(n)<<r.g.ClusterBits || !r.g.Aligned(run.Off) || !r.g.Aligned(run.Len) {
		r.Fatalf("reserved %+v for %d bytes", run, n)
	}
	if run.Zeroed {
		r.zeroed(run)
	}
	// Whoever reserves writes.
	for off := run.Off; off < run.Off+run.Len; off += r.g.ClusterSize {
		r.extend(Run{Off: off, Len: r.g.ClusterSize})
		r.patch(off, uint64(off)|1)
	}
}

func (r *rig) zeroed(run Run) {
	r.Helper()
	if !backing.AllZero(r.tape.Peek(run.Off, run.Len)) {
		r.Fatalf("%+v is not zero", run)
	}
}

func (r *rig) extend(run Run) {
	r.Helper()
	if err := r.s.Extend(ctx, run.Off+run.Len); err != nil {
		r.Fatalf("Extend: %v", err)
	}
}

// patch puts 8 bytes into the file.
func (r *rig) patch(off int64, n uint64) {
	r.tape.Patch(off, binary.BigEndian.AppendUint64(nil, n))
}

// link maps guest clusters to a run that is counted.
func (r *rig) link(run Run) {
	r.Helper()
	for off := run.Off; off < run.Off+run.Len; off += r.g.ClusterSize {
		i := r.free[len(r.free)-1]
		r.free = r.free[:len(r.free)-1]
		r.table(i)
		word, _ := r.g.EncodeL2(format.Cluster{Host: off, Data: r.g.AllSubs(), Copied: true})
		at, _ := r.entry(i)
		r.patch(at, word)
		r.hosts[i] = off
	}
}

// table makes sure that guest cluster i has an L2 table.
func (r *rig) table(i int64) {
	r.Helper()
	if _, ok := r.entry(i); ok {
		return
	}
	run := r.reserveMeta(r.g.ClusterSize)
	r.tape.Patch(run.Off, make([]byte, run.Len))
	r.commit()
	r.patch(int64(r.h.L1Offset)+i/r.g.L2Entries*8, format.EncodeL1(run.Off, true))
}

// unlink takes the mapping of guest cluster i away, durably.
func (r *rig) unlink(i int64) Ref {
	r.Helper()
	at, _ := r.entry(i)
	r.patch(at, 0)
	if err := r.tape.Sync(ctx); err != nil {
		r.Fatal(err)
	}
	off := r.hosts[i]
	delete(r.hosts, i)
	r.free = append(r.free, i)
	return Ref{off, r.g.ClusterSize}
}
