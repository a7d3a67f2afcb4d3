package space

import (
	"context"
	"encoding/binary"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/check"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/create"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/storetest"
)

var ctx = context.Background()

const sector = 512

// tape is a file in memory that knows what would be left of it after a crash:
// all that was there at the last Sync, and any of the sectors written since.
type tape struct {
	*storetest.Mem
	rnd  *rand.Rand
	step func() // after every call that changes something; may be nil

	mu      sync.Mutex
	cur     map[int64][sector]byte // guarded by mu: the file, without zeroes
	old     map[int64][sector]byte // guarded by mu: before the last Sync, of dirty
	dirty   map[int64]bool         // guarded by mu: sectors written since
	size    int64                  // guarded by mu
	oldSize int64                  // guarded by mu
}

func newTape(m *storetest.Mem, rnd *rand.Rand) *tape {
	t := &tape{Mem: m, rnd: rnd, cur: map[int64][sector]byte{}}
	t.patch(m.Contents(), 0)
	t.settle()
	return t
}

// settle makes everything durable.
func (t *tape) settle() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.old, t.dirty, t.oldSize = map[int64][sector]byte{}, map[int64]bool{}, t.size
}

// patch writes into the file beside the store; it is durable with the next Sync.
func (t *tape) patch(p []byte, off int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.size = max(t.size, off+int64(len(p)))
	for len(p) > 0 {
		i, at := off/sector, off%sector
		n := min(sector-at, int64(len(p)))
		if !t.dirty[i] && t.dirty != nil {
			t.dirty[i], t.old[i] = true, t.cur[i]
		}
		s := t.cur[i]
		copy(s[at:], p[:n])
		t.cur[i] = s
		if s == [sector]byte{} {
			delete(t.cur, i)
		}
		p, off = p[n:], off+n
	}
}

func (t *tape) stepped() {
	if t.step != nil {
		t.step()
	}
}

// WriteAt may land although it fails.
func (t *tape) WriteAt(ctx context.Context, p []byte, off int64, durable bool) error {
	err := t.Mem.WriteAt(ctx, p, off, durable)
	if err == nil || t.rnd.IntN(2) == 0 {
		t.Mem.Patch(off, p)
		t.patch(p, off)
	}
	t.stepped()
	return err
}

func (t *tape) Sync(ctx context.Context) error {
	err := t.Mem.Sync(ctx)
	if err == nil {
		t.settle()
	}
	t.stepped()
	return err
}

func (t *tape) Punch(ctx context.Context, off, n int64) error {
	err := t.Mem.Punch(ctx, off, n)
	if err == nil {
		t.mu.Lock()
		n = min(n, max(0, t.size-off))
		t.mu.Unlock()
		t.patch(make([]byte, n), off)
	}
	t.stepped()
	return err
}

func (t *tape) Truncate(size int64) error {
	err := t.Mem.Truncate(size)
	if err == nil {
		t.mu.Lock()
		for i, s := range t.cur {
			if i*sector >= size {
				t.dirty[i], t.old[i] = true, s
				delete(t.cur, i)
			}
		}
		t.size = size
		t.mu.Unlock()
	}
	t.stepped()
	return err
}

// image is the file as it stands, or what a crash leaves of it.
func (t *tape) image(crash bool) *storetest.Mem {
	t.mu.Lock()
	defer t.mu.Unlock()
	m := storetest.New(nil)
	size := t.size
	if crash && t.rnd.IntN(2) == 0 {
		size = t.oldSize
	}
	m.Cut(size)
	for i, s := range t.cur {
		if !t.dirty[i] {
			m.Patch(i*sector, s[:])
		}
	}
	for _, i := range slices.Sorted(maps.Keys(t.dirty)) {
		s := t.cur[i]
		if crash && t.rnd.IntN(2) == 0 {
			s = t.old[i]
		}
		m.Patch(i*sector, s[:])
	}
	return m
}

// rig is an image on a tape with its Space, and its guest's mapping.
type rig struct {
	testing.TB
	rnd  *rand.Rand
	tape *tape
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
	r.tape = newTape(m, r.rnd)
	r.open()
	return r
}

// clone is a rig of the image as it stands.
func (r *rig) clone() *rig { return rigOf(r.TB, r.tape.image(false), r.rnd.Uint64()) }

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
	m := r.tape.image(false)
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
	r.tape.mu.Lock()
	defer r.tape.mu.Unlock()
	s := r.tape.cur[off/sector]
	return binary.BigEndian.Uint64(s[off%sector:])
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
	return r.judge(r.tape.image(false))
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
	r.tape.step = func() {
		r.Helper()
		if r.rnd.IntN(n) > 0 {
			return
		}
		r.judge(r.tape.image(false))
		r.judge(r.tape.image(true))
	}
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
	r.tape.mu.Lock()
	defer r.tape.mu.Unlock()
	for i := run.Off / sector; i < (run.Off+run.Len)/sector; i++ {
		if _, ok := r.tape.cur[i]; ok {
			r.Fatalf("%+v is not zero in sector %d", run, i)
		}
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
	b := binary.BigEndian.AppendUint64(nil, n)
	r.tape.Mem.Patch(off, b)
	r.tape.patch(b, off)
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
	r.tape.Mem.Patch(run.Off, make([]byte, run.Len))
	r.tape.patch(make([]byte, run.Len), run.Off)
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
