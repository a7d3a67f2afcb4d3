package raw_test

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/raw"
	"github.com/vmdiskd/vmdiskd/internal/engine"
)

func TestMap(t *testing.T) {
	const size = 1<<20 + 100
	for _, tt := range []struct {
		name     string
		opt      raw.Options
		direct   bool
		op       engine.Op
		off, n   int64
		want     error
		hasLease bool
	}{
		{"read", raw.Options{}, false, engine.OpRead, 1, 5000, nil, false},
		{"read to the end", raw.Options{}, false, engine.OpRead, 0, size, nil, false},
		{"read past the end", raw.Options{}, false, engine.OpRead, 1, size, backing.ErrNotMappable, false},
		{"read at huge offset", raw.Options{}, false, engine.OpRead, 1<<63 - 1, 1, backing.ErrNotMappable, false},
		{"write", raw.Options{}, false, engine.OpWrite, 1, 5000, nil, true},
		{"write of read-only", raw.Options{ReadOnly: true}, false, engine.OpWrite, 0, 512, backing.ErrReadOnly, false},
		{"write that must be durable", raw.Options{Writethrough: true}, false, engine.OpWrite, 0, 512, backing.ErrNotMappable, false},
		{"read of writethrough", raw.Options{Writethrough: true}, false, engine.OpRead, 0, 512, nil, false},
		{"punch", raw.Options{}, false, engine.OpPunch, 0, 512, backing.ErrNotMappable, false},
		{"direct aligned read", raw.Options{}, true, engine.OpRead, 4096, 8192, nil, false},
		{"direct unaligned read", raw.Options{}, true, engine.OpRead, 4097, 8192, backing.ErrNotMappable, false},
		{"direct aligned write", raw.Options{}, true, engine.OpWrite, 4096, 8192, nil, true},
		{"direct unaligned write", raw.Options{}, true, engine.OpWrite, 4096, 100, backing.ErrNotMappable, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := newRaw(t, size, newEngine(t, "pool"), tt.direct, tt.opt)
			var m backing.Mapping
			err := d.Map(tt.op, tt.off, tt.n, &m)
			if !errors.Is(err, tt.want) {
				t.Fatalf("map: got %v, want %v", err, tt.want)
			}
			if err != nil {
				return
			}
			if r := m.Runs[0]; m.N != 1 || r.Off != tt.off || r.Len != tt.n || r.File == nil {
				t.Errorf("map: got %d runs, first %+v, want %d+%d", m.N, r, tt.off, tt.n)
			}
			if (m.Lease != nil) != tt.hasLease {
				t.Errorf("map: got lease %v, want one: %v", m.Lease, tt.hasLease)
			}
			m.Release()
		})
	}
}

func TestMapDoesNotAllocate(t *testing.T) {
	forKinds(t, func(t *testing.T, k kind) {
		d := newRaw(t, 1<<20, newEngine(t, k.engine), k.direct, raw.Options{})
		var m backing.Mapping
		for _, op := range []engine.Op{engine.OpRead, engine.OpWrite} {
			n := testing.AllocsPerRun(1000, func() {
				if err := d.Map(op, 4096, 4096, &m); err != nil {
					t.Fatalf("map: %v", err)
				}
				m.Release()
			})
			if n >= 1 {
				t.Errorf("map for %v: got %v allocations, want none", op, n)
			}
		}
	})
}

func TestMappedDirectWriteExcludesPartialWritesOfItsBlocks(t *testing.T) {
	d := newRaw(t, 1<<20, newEngine(t, "pool"), true, raw.Options{})
	var m backing.Mapping
	if err := d.Map(engine.OpWrite, 4096, 4096, &m); err != nil {
		t.Fatalf("map: %v", err)
	}
	done := make(chan error, 1)
	go func() { done <- d.WriteAt(t.Context(), []byte{1}, 8191, 0) }()
	waitBlocked(t, 1, "select", "(*rangeLocks).lock(")
	var second backing.Mapping
	if err := d.Map(engine.OpWrite, 4096, 4096, &second); !errors.Is(err, backing.ErrNotMappable) {
		t.Errorf("map of a block that is about to be modified: got %v, want %v", err, backing.ErrNotMappable)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := d.WriteAt(ctx, []byte{1}, 4096, 0); !errors.Is(err, context.Canceled) {
		t.Errorf("write by one who gave up: got %v, want %v", err, context.Canceled)
	}
	m.Release()
	if err := <-done; err != nil {
		t.Errorf("write: %v", err)
	}
	if err := d.Map(engine.OpWrite, 4096, 4096, &second); err != nil {
		t.Errorf("map afterwards: %v", err)
	}
	second.Release()
}

// TestExtentsNeverCallWrittenBytesAHole races writers with queries: whoever
// asks after a write was answered must not hear of a hole there.
func TestExtentsNeverCallWrittenBytesAHole(t *testing.T) {
	const block, blocks, rounds = 4096, 64, 30
	forKinds(t, func(t *testing.T, k kind) {
		d := newRaw(t, block*blocks, newEngine(t, k.engine), k.direct, raw.Options{})
		stop := make(chan struct{})
		var askers, writers sync.WaitGroup
		for range 2 { // keep what the device remembers full
			askers.Go(func() {
				for {
					select {
					case <-stop:
						return
					default:
						_ = holes(t, d, 0, block*blocks)
					}
				}
			})
		}
		for w := range int64(2) {
			writers.Go(func() {
				rnd := rand.New(rand.NewPCG(uint64(w), 7))
				for range rounds {
					at := block * (rnd.Int64N(blocks/2)*2 + w)
					if rnd.IntN(2) == 0 {
						writeMapped(t, d, at, block)
					} else if err := d.WriteAt(t.Context(), make([]byte, block), at, 0); err != nil {
						t.Errorf("write at %d: %v", at, err)
					}
					if holes(t, d, at, block) {
						t.Errorf("extents at %d+%d after a write: got a hole", at, block)
					}
					if err := d.Zero(t.Context(), at, block, 0); err != nil {
						t.Errorf("zero at %d: %v", at, err)
					}
					if !holes(t, d, at, block) {
						t.Errorf("extents at %d+%d after a zero: got data, want a hole", at, block)
					}
				}
			})
		}
		writers.Wait()
		close(stop)
		askers.Wait()
	})
}

// holes reports whether the range has a hole.
func holes(t *testing.T, d backing.Device, off, n int64) (found bool) {
	err := d.Extents(t.Context(), off, n, 0, func(x backing.Extent) bool {
		found = found || x.Hole
		return true
	})
	if err != nil {
		t.Errorf("extents at %d+%d: %v", off, n, err)
	}
	return found
}

// writeMapped writes past the device and answers before the lease ends: the
// order that is hardest for Extents.
func writeMapped(t *testing.T, d backing.Device, off, n int64) {
	var m backing.Mapping
	if err := d.Map(engine.OpWrite, off, n, &m); err != nil {
		t.Errorf("map at %d+%d: %v", off, n, err)
		return
	}
	b := buffers.TryGet(int(n))
	defer b.Release()
	if _, err := m.Runs[0].File.OS.WriteAt(b.Bytes(), m.Runs[0].Off); err != nil {
		t.Errorf("write at %d+%d: %v", off, n, err)
	}
	if holes(t, d, off, n) {
		t.Errorf("extents at %d+%d after a mapped write: got a hole", off, n)
	}
	m.Release()
}

func TestGrowthIsAdopted(t *testing.T) {
	path := tempImage(t, 1<<20)
	d := openRaw(t, path, newEngine(t, "pool"), false, raw.Options{})
	closeAfter(t, d)
	for _, size := range []int64{2 << 20, 2<<20 + 1, 1 << 20} {
		if err := os.Truncate(path, size); err != nil {
			t.Fatal(err)
		}
		want := max(size, 2<<20)
		if size == 1<<20 {
			want = 2<<20 + 1
		}
		if got := d.Info().Size; got != want {
			t.Errorf("size after the file got %d: got %d, want %d", size, got, want)
		}
	}
}

// TestTruncatedFileFailsBeyondItsEnd is fault BE-09.
func TestTruncatedFileFailsBeyondItsEnd(t *testing.T) {
	forKinds(t, func(t *testing.T, k kind) {
		path := tempImage(t, 1<<20)
		d := openRaw(t, path, newEngine(t, k.engine), k.direct, raw.Options{})
		closeAfter(t, d)
		fill(t, d, 1)
		if !bytes.Equal(contents(t, d)[:3], []byte{1, 1, 1}) || holes(t, d, 0, 1<<20) {
			t.Fatal("image is not full")
		}
		const end = 500<<10 + 100
		if err := os.Truncate(path, end); err != nil {
			t.Fatal(err)
		}
		p := make([]byte, 8192)
		for _, tt := range []struct {
			off  int64
			want error
		}{{0, nil}, {end - 8192, nil}, {end - 8191, backing.ErrIO}, {end, backing.ErrIO}, {1<<20 - 8192, backing.ErrIO}} {
			if err := d.ReadAt(t.Context(), p, tt.off); !errors.Is(err, tt.want) {
				t.Errorf("read at %d of a file that ends at %d: got %v, want %v", tt.off, end, err, tt.want)
			}
		}
		if holes(t, d, 0, 1<<20) {
			t.Error("extents: what is beyond the end is said to be a hole, which reads as zeroes")
		}
		if err := d.WriteAt(t.Context(), p, 0, backing.FUA); err != nil {
			t.Errorf("write inside: %v", err)
		}
	})
}

func TestHoleThatWasCutOffIsNoHole(t *testing.T) {
	path := tempImage(t, 1<<20)
	d := openRaw(t, path, newEngine(t, "pool"), false, raw.Options{})
	closeAfter(t, d)
	if !holes(t, d, 0, 1<<20) {
		t.Fatal("sparse image has no holes")
	}
	if err := os.Truncate(path, 4096); err != nil {
		t.Fatal(err)
	}
	if holes(t, d, 8192, 4096) {
		t.Error("extents: got a hole where reading fails")
	}
}

func TestUnlinkedFileIsServedOn(t *testing.T) {
	path := tempImage(t, 1<<20)
	d := openRaw(t, path, newEngine(t, "pool"), false, raw.Options{})
	closeAfter(t, d)
	if err := os.Rename(tempImage(t, 4096), path); err != nil {
		t.Fatal(err)
	}
	fill(t, d, 3)
	if got := contents(t, d); got[1<<20-1] != 3 {
		t.Errorf("read: got %d, want 3", got[1<<20-1])
	}
}

func TestReadOnlyDevice(t *testing.T) {
	d := newRaw(t, 1<<20, newEngine(t, "pool"), false, raw.Options{ReadOnly: true})
	if got := d.Info().Caps; got&(backing.CanWrite|backing.CanTrim|backing.CanZero|backing.CanFastZero|backing.CanFUA) != 0 {
		t.Errorf("caps: got %#x, want none that change", got)
	}
	for name, err := range map[string]error{
		"write": d.WriteAt(t.Context(), make([]byte, 1), 0, 0),
		"zero":  d.Zero(t.Context(), 0, 1, 0),
		"trim":  d.Trim(t.Context(), 0, 1, 0),
	} {
		if !errors.Is(err, backing.ErrReadOnly) {
			t.Errorf("%s: got %v, want %v", name, err, backing.ErrReadOnly)
		}
	}
	if err := d.Flush(t.Context()); err != nil {
		t.Errorf("flush: %v", err)
	}
}

func TestOpenRefusesWhatIsNoImage(t *testing.T) {
	e := newEngine(t, "pool")
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{"/dev/null", fifo} {
		if _, err := tryRaw(t, path, e, false, raw.Options{}); !errors.Is(err, backing.ErrInvalid) {
			t.Errorf("open %s: got %v, want %v", path, err, backing.ErrInvalid)
		}
	}
	f := openFile(t, tempImage(t, 4096), unix.O_RDWR)
	if _, err := raw.Open(f, e, raw.Options{Direct: true, Buffers: buffers}); !errors.Is(err, backing.ErrNotSupported) {
		t.Errorf("open for direct I/O without O_DIRECT: got %v, want %v", err, backing.ErrNotSupported)
	}
	if f.Close() == nil {
		t.Error("the file is still open after Open failed")
	}
}

func TestOddSizesKeepTheirSize(t *testing.T) {
	forKinds(t, func(t *testing.T, k kind) {
		for _, size := range []int64{1, 511, 513, 4095, 4097, 100001} {
			path := tempImage(t, size)
			d := openRaw(t, path, newEngine(t, k.engine), k.direct, raw.Options{})
			for _, fl := range []backing.Flags{0, backing.FUA} {
				p := bytes.Repeat([]byte{byte(5 + fl)}, int(size))
				if err := d.WriteAt(t.Context(), p, 0, fl); err != nil {
					t.Fatalf("write of all %d bytes: %v", size, err)
				}
				if got := contents(t, d); !bytes.Equal(got, p) {
					t.Errorf("read of all %d bytes: not what was written", size)
				}
			}
			if err := d.Close(); err != nil {
				t.Errorf("close: %v", err)
			}
			if st, err := os.Stat(path); err != nil || st.Size() != size {
				t.Errorf("size of the file: got %d, %v, want %d", st.Size(), err, size)
			}
		}
	})
}

// TestClosedDeviceIsNotTheNextOne: what is done with a device that was closed
// fails, and has nothing to do with the one that serves the image after it.
func TestClosedDeviceIsNotTheNextOne(t *testing.T) {
	forKinds(t, func(t *testing.T, k kind) {
		e, path := newEngine(t, k.engine), tempImage(t, 64<<10)
		var told error
		gone := openRaw(t, path, e, k.direct, raw.Options{Poisoned: func(err error) { told = err }})
		if err := gone.Close(); err != nil {
			t.Fatal(err)
		}
		next := openRaw(t, path, e, k.direct, raw.Options{})
		closeAfter(t, next)
		for name, err := range callAll(gone) {
			if !errors.Is(err, os.ErrClosed) || backing.KindOf(err) != backing.ErrIO {
				t.Errorf("%s of a closed device: %v, want %v", name, err, os.ErrClosed)
			}
		}
		if told != nil {
			t.Errorf("a closed device tells of lost writes: %v", told)
		}
		if size := gone.Info().Size; size != 64<<10 {
			t.Errorf("size of a closed device: %d", size)
		}
		if err := gone.Close(); err != nil {
			t.Errorf("closing a closed device: %v", err)
		}
		if d, err := tryRaw(t, path, e, k.direct, raw.Options{}); !errors.Is(err, backing.ErrLocked) {
			t.Errorf("another device of the same image: %v, want %v", err, backing.ErrLocked)
			if err == nil {
				_ = d.Close()
			}
		}
		if err := next.WriteAt(t.Context(), []byte("next"), 0, backing.FUA); err != nil {
			t.Errorf("write to the next one: %v", err)
		}
	})
}

// callAll has the errors of all calls that may fail.
func callAll(d *raw.Device) map[string]error {
	ctx, p := context.Background(), make([]byte, 4096)
	var m backing.Mapping
	_, end := d.End()
	_, some := d.ReadSome(ctx, p[:100], 0)
	all := map[string]error{
		"ReadAt":   d.ReadAt(ctx, p[:100], 0),
		"WriteAt":  d.WriteAt(ctx, p[:100], 0, 0),
		"FUA":      d.WriteAt(ctx, p, 0, backing.FUA),
		"Zero":     d.Zero(ctx, 0, 4096, 0),
		"Trim":     d.Trim(ctx, 0, 4096, 0),
		"Flush":    d.Flush(ctx),
		"Extents":  d.Extents(ctx, 0, 4096, 0, func(backing.Extent) bool { return true }),
		"read map": d.Map(engine.OpRead, 0, 4096, &m), "write map": d.Map(engine.OpWrite, 0, 4096, &m),
		"Resize": d.Resize(ctx, 128<<10), "Truncate": d.Truncate(0), "Append": d.Append(ctx, p, 64<<10, 0),
		"Punch": d.Punch(ctx, 0, 4096), "End": end, "ReadSome": some,
	}
	if d.Info().Caps.Has(backing.CanCache) {
		all["Cache"] = d.Cache(ctx, 0, 4096)
	}
	return all
}
