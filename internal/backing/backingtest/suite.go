// Package backingtest is one conformance suite for every backing.Device, and
// the faults that tests put under one.
package backingtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/engine"
)

// Maker tells the suite about a kind of device.
type Maker struct {
	// New makes a writable device of size bytes that reads as zeroes, with
	// Emulate above it where the format needs that, and closes it in a
	// Cleanup.
	New func(t testing.TB, size int64) backing.Device

	// Reopen closes the device and opens its image again; nil where there is
	// no image. The Cleanup closes what is open then.
	Reopen func(t testing.TB, d backing.Device) backing.Device

	// Granule is what sizes are multiples of; 0 is 1.
	Granule int64

	// Forgets: writes are dropped.
	Forgets bool

	// Ends: what is called after Close fails, and a second Close does nothing.
	Ends bool
}

// Run checks everything that backing.Device promises.
func Run(t *testing.T, m Maker) {
	for _, tt := range []struct {
		name string
		fn   func(*testing.T, *fixture)
	}{
		{"InfoIsSane", infoIsSane},
		{"FreshDiskIsZero", freshDiskIsZero},
		{"ReadsBackWhatWasWritten", readsBackWhatWasWritten},
		{"RandomOperationsMatchModel", randomOperations},
		{"ZeroedRangeReadsZero", zeroedRangeReadsZero},
		{"RefusedFastZeroTouchesNothing", refusedFastZero},
		{"TrimRoundsInwards", trimRoundsInwards},
		{"ExtentsTileTheRange", extentsTile},
		{"ExtentsObeyReqOneAndYield", extentsStop},
		{"WriteEndsAHoleBeforeItReturns", writeEndsHole},
		{"MapNamesWhatReadAtReads", mapMatchesRead},
		{"MappedWriteIsReadBack", mappedWrite},
		{"CacheChangesNothing", cacheChangesNothing},
		{"ReadOnlyViewRefusesChanges", readOnlyView},
		{"OutOfRangeIsRefused", outOfRange},
		{"NeighboursDoNotDisturbEachOther", neighbours},
		{"EverythingAtOnce", everythingAtOnce},
		{"ContentsOutliveReopen", outliveReopen},
	} {
		t.Run(tt.name, func(t *testing.T) { tt.fn(t, newFixture(t, m)) })
	}
	if m.Ends {
		t.Run("ClosedDeviceFails", func(t *testing.T) { closedFails(t, newFixture(t, m)) })
	}
}

// diskBytes is deliberately a multiple of nothing much.
const diskBytes = 1<<20 + 3*4096 + 512 + 7

// fixture is one fresh device and a model of what it holds.
type fixture struct {
	t     *testing.T
	maker Maker
	dev   backing.Device
	c     *backing.Checked
	info  backing.Info
	model []byte
	rnd   *rand.Rand
}

func newFixture(t *testing.T, m Maker) *fixture {
	t.Helper()
	size := int64(diskBytes)
	if m.Granule > 1 {
		size -= size % m.Granule
	}
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	f := &fixture{t: t, maker: m, dev: m.New(t, size), rnd: rand.New(rand.NewPCG(seed, 0))}
	f.check()
	f.model = make([]byte, f.info.Size)
	return f
}

// check looks at the device anew.
func (f *fixture) check() {
	f.c = backing.NewChecked(f.dev, 0)
	f.info = f.c.Info()
}

func (f *fixture) ctx() context.Context { return f.t.Context() }

// fit makes a legal request of any numbers: 0 < n, in the disk, on blocks.
func (f *fixture) fit(off, n int64) (int64, int64) {
	b := f.info.MinBlock
	off = min(max(off, 0), f.info.Size-b) / b * b
	n = min(max(n, 1), f.info.Size-off)
	return off, max(n/b*b, b)
}

// somewhere picks a range that likes boundaries.
func (f *fixture) somewhere() (int64, int64) {
	off := f.rnd.Int64N(f.info.Size)
	if f.rnd.IntN(2) == 0 {
		off = off&^4095 + f.rnd.Int64N(3) - 1
	}
	n := f.rnd.Int64N([]int64{16, 600, 5000, 200 << 10}[f.rnd.IntN(4)]) + 1
	if f.rnd.IntN(2) == 0 {
		n = (n + 4095) &^ 4095
	}
	return f.fit(off, n)
}

func (f *fixture) bytes(n int64) []byte {
	at := f.rnd.Int64N(int64(len(noise)) - n)
	return bytes.Clone(noise[at : at+n])
}

// noise is what is written: random bytes, none of them zero.
var noise = func() []byte {
	p := make([]byte, 2*diskBytes)
	_, _ = rand.NewChaCha8([32]byte{}).Read(p) // never fails
	for i := range p {
		p[i] |= 1
	}
	return p
}()

// nothing is as many zeroes as a disk has.
var nothing [diskBytes]byte

// must ends the test if the operation failed.
func (f *fixture) must(err error, op string, off, n int64) {
	f.t.Helper()
	if err != nil {
		f.t.Fatalf("%s at %d+%d: got error %v, want none", op, off, n, err)
	}
}

func (f *fixture) write(off int64, p []byte, fl backing.Flags) {
	f.t.Helper()
	f.must(f.c.WriteAt(f.ctx(), p, off, fl), "write", off, int64(len(p)))
	if !f.maker.Forgets {
		copy(f.model[off:], p)
	}
}

func (f *fixture) zero(off, n int64, fl backing.Flags) {
	f.t.Helper()
	f.must(f.c.Zero(f.ctx(), off, n, fl), "zero", off, n)
	clear(f.model[off : off+n])
}

// trim adopts what the device left in the range.
func (f *fixture) trim(off, n int64, fl backing.Flags) {
	f.t.Helper()
	f.must(f.c.Trim(f.ctx(), off, n, fl), "trim", off, n)
	f.must(f.c.ReadAt(f.ctx(), f.model[off:off+n], off), "read", off, n)
}

// same compares a range with the model.
func (f *fixture) same(off, n int64) {
	f.t.Helper()
	p := f.bytes(n)
	f.must(f.c.ReadAt(f.ctx(), p, off), "read", off, n)
	diff(f.t, off, p, f.model[off:off+n])
}

func (f *fixture) sameAll() {
	f.t.Helper()
	f.same(0, f.info.Size)
}

func diff(t *testing.T, off int64, got, want []byte) {
	t.Helper()
	if bytes.Equal(got, want) {
		return
	}
	for i := range got {
		if got[i] != want[i] {
			t.Fatalf("read at %d+%d: byte %d is %#x, want %#x", off, len(got), off+int64(i), got[i], want[i])
		}
	}
}

func infoIsSane(t *testing.T, f *fixture) {
	i := f.info
	powerOf2 := func(n int64) bool { return n > 0 && n&(n-1) == 0 }
	if !powerOf2(i.MinBlock) || !powerOf2(i.Preferred) || i.Preferred < 512 || i.Preferred < i.MinBlock {
		t.Errorf("info: got block sizes %d, %d; want powers of two ≥ 1, ≥ 512", i.MinBlock, i.Preferred)
	}
	if i.Size < diskBytes-f.maker.Granule || i.Size > diskBytes {
		t.Errorf("info: got size %d, want about %d", i.Size, diskBytes)
	}
	all := backing.CanWrite | backing.CanFlush | backing.CanFUA | backing.CanTrim | backing.CanZero | backing.CanExtents
	if !i.Caps.Has(all) {
		t.Errorf("info: got caps %#x, want at least %#x", i.Caps, all)
	}
	if again := f.dev.Info(); again != i {
		t.Errorf("info asked again: got %+v, want %+v", again, i)
	}
}

func freshDiskIsZero(_ *testing.T, f *fixture) { f.sameAll() }

func readsBackWhatWasWritten(_ *testing.T, f *fixture) {
	size := f.info.Size
	for _, at := range []int64{0, 512, 4096, 32 << 10, 64 << 10, 128 << 10, 1 << 20, size} {
		for _, d := range []int64{-4097, -513, -1, 0, 1} {
			for _, n := range []int64{1, 2, 511, 512, 513, 4095, 4096, 4097, 70000} {
				off, n := f.fit(at+d, n)
				fl := backing.Flags(0)
				if n%2 == 1 {
					fl = backing.FUA
				}
				f.write(off, f.bytes(n), fl)
				f.same(off, n)
			}
		}
	}
	f.sameAll()
	f.write(0, f.bytes(size), 0)
	f.sameAll()
}

func randomOperations(_ *testing.T, f *fixture) {
	flags := []backing.Flags{0, backing.FUA, backing.NoHole, backing.NoHole | backing.FUA}
	for range 400 {
		off, n := f.somewhere()
		switch f.rnd.IntN(8) {
		case 0, 1, 2:
			f.write(off, f.bytes(n), flags[f.rnd.IntN(2)])
		case 3:
			f.zero(off, n, flags[f.rnd.IntN(4)])
		case 4:
			f.trim(off, n, flags[f.rnd.IntN(2)])
		case 5:
			f.extents(off, n)
		case 6:
			f.must(f.c.Flush(f.ctx()), "flush", 0, 0)
		default:
			f.same(off, n)
		}
	}
	f.sameAll()
	f.extents(0, f.info.Size)
}

// extents checks one query: the extents tile the range, and what is said to
// be zero is.
func (f *fixture) extents(off, n int64) []backing.Extent {
	f.t.Helper()
	var list []backing.Extent
	at := off
	err := f.c.Extents(f.ctx(), off, n, 0, func(x backing.Extent) bool {
		if x.Len <= 0 || x.Len > off+n-at {
			f.t.Fatalf("extents at %d+%d: got length %d at %d", off, n, x.Len, at)
		}
		if x.Zero && !bytes.Equal(f.model[at:at+x.Len], nothing[:x.Len]) {
			f.t.Fatalf("extents at %d+%d: %d+%d is said to be zero, is not", off, n, at, x.Len)
		}
		at += x.Len
		list = append(list, x)
		return true
	})
	f.must(err, "extents", off, n)
	if at != off+n {
		f.t.Fatalf("extents at %d+%d: got the end %d, want %d", off, n, at, off+n)
	}
	return list
}

func zeroedRangeReadsZero(t *testing.T, f *fixture) {
	for _, fl := range []backing.Flags{0, backing.FUA, backing.NoHole, backing.NoHole | backing.FUA} {
		for _, r := range [][2]int64{{0, 1}, {511, 2}, {4096, 4096}, {4095, 8194}, {100, 70001}, {f.info.Size - 5, 5}, {0, f.info.Size}} {
			t.Run(fmt.Sprintf("flags=%d/%d+%d", fl, r[0], r[1]), func(t *testing.T) {
				f.t = t
				f.write(0, f.bytes(f.info.Size), 0)
				off, n := f.fit(r[0], r[1])
				f.zero(off, n, fl)
				f.sameAll()
				f.extents(0, f.info.Size)
			})
		}
	}
}

func refusedFastZero(t *testing.T, f *fixture) {
	if !f.info.Caps.Has(backing.CanFastZero) {
		if err := f.c.Zero(f.ctx(), 0, f.info.MinBlock, backing.FastZero); !errors.Is(err, backing.ErrInvalid) {
			t.Errorf("fast zero that was not offered: got %v, want %v", err, backing.ErrInvalid)
		}
		return
	}
	for _, fl := range []backing.Flags{backing.FastZero, backing.FastZero | backing.NoHole} {
		for _, r := range [][2]int64{{4096, 65536}, {1, 3}, {511, 70000}} {
			off, n := f.fit(r[0], r[1])
			f.write(0, f.bytes(f.info.Size), 0)
			err := f.c.Zero(f.ctx(), off, n, fl)
			if err == nil {
				clear(f.model[off : off+n])
			} else if !errors.Is(err, backing.ErrNotSupported) {
				t.Errorf("fast zero %d at %d+%d: got %v, want none or %v", fl, off, n, err, backing.ErrNotSupported)
			}
			f.sameAll()
		}
	}
}

func trimRoundsInwards(_ *testing.T, f *fixture) {
	for _, r := range [][2]int64{{0, 1}, {4095, 2}, {4095, 4098}, {1, 300000}, {f.info.Size - 5000, 4999}, {0, f.info.Size}} {
		off, n := f.fit(r[0], r[1])
		f.write(0, f.bytes(f.info.Size), 0)
		f.trim(off, n, backing.FUA)
		f.sameAll()
		f.extents(0, f.info.Size)
	}
}

func extentsTile(_ *testing.T, f *fixture) {
	for i := range int64(8) {
		off, n := f.fit(i*128<<10+i, 5000*i+1)
		f.write(off, f.bytes(n), 0)
		for range 10 {
			off, n := f.somewhere()
			f.extents(off, n)
		}
		f.extents(0, f.info.Size)
	}
}

func extentsStop(t *testing.T, f *fixture) {
	for i := range int64(4) {
		off, n := f.fit(i*256<<10, 64<<10)
		f.write(off, f.bytes(n), 0)
	}
	f.must(f.c.Flush(f.ctx()), "flush", 0, 0)
	calls := 0
	count := func(backing.Extent) bool { calls++; return true }
	f.must(f.c.Extents(f.ctx(), 0, f.info.Size, backing.ReqOne, count), "extents", 0, f.info.Size)
	if calls == 0 {
		t.Error("extents with ReqOne: got none, want at least one")
	}
	calls = 0
	once := func(backing.Extent) bool { calls++; return false }
	f.must(f.c.Extents(f.ctx(), 0, f.info.Size, 0, once), "extents", 0, f.info.Size)
	if calls != 1 {
		t.Errorf("extents after yield returned false: got %d calls, want 1", calls)
	}
}

// writeEndsHole is the promise that backups rest on, with queries in between
// that fill whatever the device remembers.
func writeEndsHole(t *testing.T, f *fixture) {
	const step = 32 << 10
	for off := int64(0); off+step <= f.info.Size; off += step {
		f.extents(0, f.info.Size)
		f.write(off, f.bytes(step), 0)
		if !f.maker.Forgets {
			if list := f.extents(off, step); list[0].Zero || len(list) > 1 {
				t.Fatalf("extents at %d+%d after a write: got %+v, want data", off, step, list)
			}
		}
		if off%(2*step) == 0 {
			f.extents(0, f.info.Size)
			f.zero(off, step, 0)
			f.extents(off, step)
		}
	}
}

func mapMatchesRead(t *testing.T, f *fixture) {
	const piece = 64 << 10
	for at := int64(piece); at+piece <= f.info.Size; at += 2 * piece {
		f.write(at, f.bytes(piece), 0)
	}
	var m backing.Mapping
	mapped := 0
	for i := range int64(100) {
		off, n := f.somewhere()
		if hole := 2 * piece * (i / 4 % 8); i%4 == 0 { // nearly all of it, and what follows
			off, n = f.fit(hole+1, 2*piece-1)
		}
		err := f.c.Map(engine.OpRead, off, n, &m)
		if errors.Is(err, backing.ErrNotMappable) {
			continue
		}
		f.must(err, "map", off, n)
		mapped++
		diff(t, off, f.readRuns(&m, n), f.model[off:off+n])
		m.Release()
		if m.N != 0 || m.Lease != nil {
			t.Fatalf("mapping after Release: got %d runs, lease %v, want none", m.N, m.Lease)
		}
	}
	t.Logf("%d of 100 ranges were mappable", mapped)
}

// aligned is memory that suits any direct file.
func aligned(t testing.TB, n int) []byte {
	t.Helper()
	p, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatalf("mmap %d bytes: %v", n, err)
	}
	t.Cleanup(func() { _ = unix.Munmap(p) })
	return p
}

// readRuns reads what a mapping of n bytes names.
func (f *fixture) readRuns(m *backing.Mapping, n int64) []byte {
	f.t.Helper()
	p := aligned(f.t, int(n))
	f.eachRun(m, p, func(r *backing.Run, p []byte) {
		if r.File == nil {
			return
		}
		if k, err := r.File.OS.ReadAt(p, r.Off); err != nil {
			f.t.Fatalf("read run at %d+%d: %d bytes, %v", r.Off, r.Len, k, err)
		}
	})
	return p
}

// eachRun calls fn for each run of a mapping with its part of p, the buffer of
// the request, which suits the file of the run.
func (f *fixture) eachRun(m *backing.Mapping, p []byte, fn func(r *backing.Run, p []byte)) {
	f.t.Helper()
	at := int64(0)
	for i := range m.Runs[:m.N] {
		r := &m.Runs[i]
		if r.File != nil && r.File.Direct && (at|r.Off|r.Len)%int64(r.File.Align) != 0 {
			f.t.Fatalf("run at %d+%d for byte %d of a request: not aligned to %d", r.Off, r.Len, at, r.File.Align)
		}
		if r.Len > int64(len(p))-at {
			f.t.Fatalf("mapping: runs have more than %d bytes", len(p))
		}
		fn(r, p[at:at+r.Len])
		at += r.Len
	}
	if at != int64(len(p)) {
		f.t.Fatalf("mapping: runs have %d bytes, want %d", at, len(p))
	}
}

func mappedWrite(t *testing.T, f *fixture) {
	f.write(0, f.bytes(f.info.Size), 0)
	var m backing.Mapping
	for range 50 {
		off, n := f.somewhere()
		f.extents(off, n)
		err := f.c.Map(engine.OpWrite, off, n, &m)
		if errors.Is(err, backing.ErrNotMappable) {
			continue
		}
		f.must(err, "map", off, n)
		data := f.bytes(n)
		copy(f.model[off:], data)
		f.writeRuns(&m, data)
		m.Release()
		f.same(off, n)
		f.extents(off, n)
	}
	f.sameAll()
}

func (f *fixture) writeRuns(m *backing.Mapping, data []byte) {
	f.t.Helper()
	buf := aligned(f.t, len(data))
	copy(buf, data)
	f.eachRun(m, buf, func(r *backing.Run, p []byte) {
		if _, err := r.File.OS.WriteAt(p, r.Off); err != nil {
			f.t.Fatalf("write run at %d+%d: %v", r.Off, r.Len, err)
		}
	})
}

func cacheChangesNothing(_ *testing.T, f *fixture) {
	f.write(0, f.bytes(f.info.Size), 0)
	f.must(f.c.Cache(f.ctx(), 0, f.info.Size), "cache", 0, f.info.Size)
	off, n := f.fit(5000, 1)
	f.must(f.c.Cache(f.ctx(), off, n), "cache", off, n)
	f.sameAll()
}

func readOnlyView(t *testing.T, f *fixture) {
	v := backing.NewChecked(f.dev, backing.CanWrite)
	b := f.info.MinBlock
	var m backing.Mapping
	for name, err := range map[string]error{
		"write": v.WriteAt(f.ctx(), make([]byte, b), 0, 0),
		"zero":  v.Zero(f.ctx(), 0, b, 0),
		"trim":  v.Trim(f.ctx(), 0, b, 0),
		"map":   v.Map(engine.OpWrite, 0, b, &m),
	} {
		if !errors.Is(err, backing.ErrReadOnly) {
			t.Errorf("%s of a read-only view: got %v, want %v", name, err, backing.ErrReadOnly)
		}
	}
	f.must(v.ReadAt(f.ctx(), make([]byte, b), 0), "read", 0, b)
	f.must(v.Flush(f.ctx()), "flush", 0, 0)
}

func outOfRange(t *testing.T, f *fixture) {
	size, b := f.info.Size, f.info.MinBlock
	for _, r := range [][2]int64{{size, b}, {size - b, 2 * b}, {math.MaxInt64 - math.MaxInt64%b - b, b}, {0, size + b}} {
		off, n := r[0], r[1]
		p := make([]byte, n)
		var m backing.Mapping
		for name, err := range map[string]error{
			"read":    f.c.ReadAt(f.ctx(), p, off),
			"write":   f.c.WriteAt(f.ctx(), p, off, 0),
			"zero":    f.c.Zero(f.ctx(), off, n, 0),
			"trim":    f.c.Trim(f.ctx(), off, n, 0),
			"cache":   f.c.Cache(f.ctx(), off, n),
			"extents": f.c.Extents(f.ctx(), off, n, 0, func(backing.Extent) bool { return true }),
			"map":     f.c.Map(engine.OpRead, off, n, &m),
		} {
			if !errors.Is(err, backing.ErrOutOfRange) {
				t.Errorf("%s at %d+%d of %d: got %v, want %v", name, off, n, size, err, backing.ErrOutOfRange)
			}
		}
	}
	f.sameAll()
}

// neighbours lets writers share blocks, never bytes: each owns every k-th
// piece of a length that is no divisor of any block.
func neighbours(t *testing.T, f *fixture) {
	const writers, rounds = 4, 8
	piece := max(500/f.info.MinBlock, 1) * f.info.MinBlock
	pieces := min(f.info.Size/piece, 64)
	var wg sync.WaitGroup
	for w := range int64(writers) {
		wg.Go(func() {
			got := make([]byte, piece)
			for round := range int64(rounds) {
				for i := w; i < pieces; i += writers {
					p := bytes.Repeat([]byte{byte(1 + w + round*writers)}, int(piece))
					if err := f.c.WriteAt(f.ctx(), p, i*piece, 0); err != nil {
						t.Errorf("write at %d+%d: %v", i*piece, piece, err)
					}
					if f.maker.Forgets {
						clear(p)
					}
					if err := f.c.ReadAt(f.ctx(), got, i*piece); err != nil || !bytes.Equal(got, p) {
						t.Errorf("read at %d+%d: got %v, %v, want %v", i*piece, piece, got[0], err, p[0])
					}
				}
			}
		})
	}
	wg.Wait()
}

// everythingAtOnce is for the race detector, and for deadlocks.
func everythingAtOnce(t *testing.T, f *fixture) {
	type op func(rnd *rand.Rand, off, n int64) error
	ops := map[string]op{
		"write": func(r *rand.Rand, off, n int64) error {
			return f.c.WriteAt(f.ctx(), make([]byte, n), off, backing.Flags(r.IntN(2)))
		},
		"read":  func(_ *rand.Rand, off, n int64) error { return f.c.ReadAt(f.ctx(), make([]byte, n), off) },
		"zero":  func(r *rand.Rand, off, n int64) error { return f.c.Zero(f.ctx(), off, n, backing.Flags(r.IntN(4))) },
		"trim":  func(_ *rand.Rand, off, n int64) error { return f.c.Trim(f.ctx(), off, n, 0) },
		"flush": func(*rand.Rand, int64, int64) error { return f.c.Flush(f.ctx()) },
		"extents": func(_ *rand.Rand, off, n int64) error {
			return f.c.Extents(f.ctx(), off, n, 0, func(backing.Extent) bool { return true })
		},
		"map": func(r *rand.Rand, off, n int64) error {
			var m backing.Mapping
			err := f.c.Map(engine.Op(r.IntN(2)), off, n, &m)
			m.Release()
			if errors.Is(err, backing.ErrNotMappable) {
				return nil
			}
			return err
		},
		"info": func(*rand.Rand, int64, int64) error { f.dev.Info(); return nil },
	}
	var wg sync.WaitGroup
	for name, do := range ops {
		seed := f.rnd.Uint64()
		wg.Go(func() {
			r := rand.New(rand.NewPCG(seed, 1))
			for range 60 {
				off, n := f.fit(r.Int64N(f.info.Size), r.Int64N(20000))
				if err := do(r, off, n); err != nil {
					t.Errorf("%s at %d+%d: %v", name, off, n, err)
				}
			}
		})
	}
	wg.Wait()
	f.sameAll()
}

func outliveReopen(t *testing.T, f *fixture) {
	if f.maker.Reopen == nil {
		return
	}
	f.write(0, f.bytes(f.info.Size), 0)
	off, n := f.fit(100000, 70000)
	f.zero(off, n, 0)
	f.must(f.c.Flush(f.ctx()), "flush", 0, 0)
	size := f.info.Size
	f.dev = f.maker.Reopen(t, f.dev)
	f.check()
	if f.info.Size != size {
		t.Fatalf("size after reopen: got %d, want %d", f.info.Size, size)
	}
	f.sameAll()
}

// closedFails asks for what the device may have in memory: a part that was
// never written, and one that was.
func closedFails(t *testing.T, f *fixture) {
	off, n := f.fit(0, 4096)
	p := f.bytes(n)
	f.must(f.dev.WriteAt(f.ctx(), p, off, 0), "write", off, n)
	f.must(f.dev.ReadAt(f.ctx(), p, off), "read", off, n)
	f.must(f.dev.Close(), "close", 0, 0)
	var m backing.Mapping
	last, tail := f.fit(f.info.Size-4096, 4096)
	for name, err := range map[string]error{
		"read":       f.dev.ReadAt(f.ctx(), p, off),
		"empty read": f.dev.ReadAt(f.ctx(), p[:tail], last),
		"write":      f.dev.WriteAt(f.ctx(), p, off, 0),
		"zero":       f.dev.Zero(f.ctx(), off, n, 0),
		"trim":       f.dev.Trim(f.ctx(), off, n, 0),
		"flush":      f.dev.Flush(f.ctx()),
		"cache":      f.dev.Cache(f.ctx(), off, n),
		"extents":    f.dev.Extents(f.ctx(), off, n, 0, func(backing.Extent) bool { return true }),
		"map":        f.dev.Map(engine.OpRead, last, tail, &m),
	} {
		if backing.KindOf(err) != backing.ErrIO {
			t.Errorf("%s after close: got error %v, want %v", name, err, backing.ErrIO)
		}
	}
	if got := f.dev.Info(); got != f.info {
		t.Errorf("info after close: got %+v, want %+v", got, f.info)
	}
	f.must(f.dev.Close(), "close again", 0, 0)
}
