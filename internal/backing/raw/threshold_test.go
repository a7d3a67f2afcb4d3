package raw_test

import (
	"context"
	"errors"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/backingtest"
	"github.com/vmdiskd/vmdiskd/internal/backing/raw"
	"github.com/vmdiskd/vmdiskd/internal/engine"
)

// heard is what a threshold told: where it was, and by how much it was exceeded.
type heard [][2]int64

// watched is newRaw with a threshold that is armed at an offset.
func watched(t *testing.T, k kind, size, at int64) (*raw.Device, *raw.Threshold, *heard) {
	t.Helper()
	h := new(heard)
	th := raw.NewThreshold(at, func(at, beyond int64) { *h = append(*h, [2]int64{at, beyond}) })
	d := newRaw(t, size, newEngine(t, k.engine), k.direct, raw.Options{})
	d.SetThreshold(th)
	return d, th, h
}

// ways are all by which bytes come to a file.
var ways = map[string]func(ctx context.Context, d *raw.Device, off, n int64) error{
	"write": func(ctx context.Context, d *raw.Device, off, n int64) error {
		return d.WriteAt(ctx, make([]byte, n), off, 0)
	},
	"durable write": func(ctx context.Context, d *raw.Device, off, n int64) error {
		return d.WriteAt(ctx, make([]byte, n), off, backing.FUA)
	},
	"append": func(ctx context.Context, d *raw.Device, off, n int64) error {
		return d.Append(ctx, make([]byte, n), off, 0)
	},
	"zeroes that stay allocated": func(ctx context.Context, d *raw.Device, off, n int64) error {
		return backing.NewEmulate(d).Zero(ctx, off, n, backing.NoHole)
	},
	"mapped write": func(_ context.Context, d *raw.Device, off, n int64) error {
		var m backing.Mapping
		defer m.Release()
		return d.Map(engine.OpWrite, off, n, &m)
	},
}

func TestThresholdIsReachedOnceByEveryKindOfWrite(t *testing.T) {
	const at, block = 64 << 10, 4096
	forKinds(t, func(t *testing.T, k kind) {
		for name, write := range ways {
			d, th, h := watched(t, k, 1<<20, at)
			for _, w := range [][2]int64{{0, at}, {at - block, block}, {at - block, 3 * block}, {at, block}, {1<<20 - block, block}} {
				if err := write(t.Context(), d, w[0], w[1]); err != nil {
					t.Fatalf("%s of %d+%d: %v", name, w[0], w[1], err)
				}
			}
			if want := (heard{{at, 2 * block}}); !slices.Equal(*h, want) || th.At() != 0 {
				t.Errorf("%s: told %v, armed at %d; want %v, disarmed", name, *h, th.At(), want)
			}
			th.Set(at + block)
			for _, off := range []int64{at, at + block, at + 2*block} {
				if err := write(t.Context(), d, off, block); err != nil {
					t.Fatalf("%s at %d: %v", name, off, err)
				}
			}
			if want := (heard{{at, 2 * block}, {at + block, block}}); !slices.Equal(*h, want) {
				t.Errorf("%s: armed anew it told %v, want %v", name, *h, want)
			}
		}
	})
}

// TestThresholdIsForWhatTakesStorage: what reads, or gives storage back, does not
// reach it, nor does what is written when it is disarmed.
func TestThresholdIsForWhatTakesStorage(t *testing.T) {
	d, th, h := watched(t, kind{engine: "pool"}, 1<<20, 4096)
	var m backing.Mapping
	p := make([]byte, 8192)
	for name, err := range map[string]error{
		"read": d.ReadAt(t.Context(), p, 8192), "trim": d.Trim(t.Context(), 8192, 8192, 0), "flush": d.Flush(t.Context()),
		"punch": d.Punch(t.Context(), 8192, 8192), "zero": d.Zero(t.Context(), 8192, 8192, 0),
		"map": d.Map(engine.OpRead, 8192, 8192, &m), "truncate": d.Truncate(2 << 20),
	} {
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
	}
	m.Release()
	if len(*h) > 0 || th.At() != 4096 {
		t.Errorf("told %v, armed at %d", *h, th.At())
	}
	th.Set(0)
	if err := d.WriteAt(t.Context(), p, 8192, 0); err != nil || len(*h) > 0 {
		t.Errorf("write when it is disarmed: got %v, told %v", err, *h)
	}
}

// TestThresholdIsReachedWhereADeviceEnds: the device has no room for the write, and
// who would make some is told.
func TestThresholdIsReachedWhereADeviceEnds(t *testing.T) {
	const size = 1 << 20
	h := heard{}
	d := openRaw(t, backingtest.Loop(t, tempImage(t, size), 512), newEngine(t, "pool"), false, raw.Options{Container: true})
	closeAfter(t, d)
	d.SetThreshold(raw.NewThreshold(size-512, func(at, beyond int64) { h = append(h, [2]int64{at, beyond}) }))
	if err := d.Append(t.Context(), make([]byte, 4096), size, 0); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("write beyond the end: got %v, want %v", err, unix.ENOSPC)
	}
	if want := (heard{{size - 512, 512 + 4096}}); !slices.Equal(h, want) {
		t.Errorf("told %v, want %v", h, want)
	}
}

// TestZeroesOfABlockDeviceReachItsThreshold, parts of blocks and whole ones.
func TestZeroesOfABlockDeviceReachItsThreshold(t *testing.T) {
	const size, at = 1 << 20, 64 << 10
	d := openRaw(t, backingtest.Loop(t, tempImage(t, size), 512), newEngine(t, "pool"), false, raw.Options{})
	closeAfter(t, d)
	told := 0
	th := raw.NewThreshold(0, func(int64, int64) { told++ })
	d.SetThreshold(th)
	for i, w := range [][2]int64{{at + 100, 50}, {at - 4096, 8192}, {at - 100, 200}} {
		th.Set(at)
		if err := d.Zero(t.Context(), w[0], w[1], backing.NoHole); err != nil {
			t.Fatalf("zero of %d+%d: %v", w[0], w[1], err)
		}
		if told != i+1 {
			t.Errorf("zero of %d+%d: told %d times in all, want %d", w[0], w[1], told, i+1)
		}
	}
}

func TestWritersThatRaceReachAThresholdOnce(t *testing.T) {
	const times, block = 50000, 4096
	forKinds(t, func(t *testing.T, k kind) {
		var told atomic.Int64
		d := newRaw(t, 1<<20, newEngine(t, k.engine), k.direct, raw.Options{})
		th := raw.NewThreshold(0, func(int64, int64) { told.Add(1) })
		d.SetThreshold(th)
		var writers sync.WaitGroup
		done := make(chan struct{})
		for i := range int64(4) {
			writers.Go(func() {
				for off := (i + 1) * block; ; runtime.Gosched() {
					select {
					case <-done:
						return
					default:
					}
					if err := ways["mapped write"](t.Context(), d, off, block); err != nil {
						t.Errorf("write at %d: %v", off, err)
						return
					}
				}
			})
		}
		for range times {
			for th.Set(block); th.At() != 0 && !t.Failed(); {
				runtime.Gosched()
			}
		}
		close(done)
		writers.Wait()
		if told.Load() != times {
			t.Errorf("armed %d times, it told %d times", times, told.Load())
		}
	})
}

// TestThresholdThatMovesIsAnother: a write that has found it where it was before
// looks again.
func TestThresholdThatMovesIsAnother(t *testing.T) {
	d := newRaw(t, 1<<20, newEngine(t, "pool"), false, raw.Options{})
	var told atomic.Int64
	th := raw.NewThreshold(0, func(int64, int64) { told.Add(1) })
	d.SetThreshold(th)
	for range 1000 {
		before := told.Load()
		th.Set(8192)
		var all sync.WaitGroup
		all.Go(func() {
			var m backing.Mapping
			if err := d.Map(engine.OpWrite, 8192, 4096, &m); err != nil {
				t.Error(err)
			}
			m.Release()
		})
		all.Go(func() { th.Set(4096) })
		all.Wait()
		if n := told.Load() - before; n == 0 && th.At() == 0 || n > 1 {
			t.Fatalf("told %d times, and is at %d", n, th.At())
		}
	}
}
