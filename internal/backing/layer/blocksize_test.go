package layer_test

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/backingtest"
	"github.com/vmdiskd/vmdiskd/internal/backing/layer"
	"github.com/vmdiskd/vmdiskd/internal/backing/mem"
	"github.com/vmdiskd/vmdiskd/internal/engine"
)

// conformInBlocks runs the suite on a disk of whole blocks.
func conformInBlocks(t *testing.T, bases []base, block int64, wrap func(d backing.Device) backing.Device) {
	for _, b := range bases {
		t.Run(b.name, func(t *testing.T) {
			t.Parallel()
			backingtest.Run(t, backingtest.Maker{Granule: block, New: func(t testing.TB, size int64) backing.Device {
				return closing(t, wrap(b.make(t, size)))
			}})
		})
	}
}

func TestLargerBlocksConform(t *testing.T) {
	conformInBlocks(t, bases, 4096, func(d backing.Device) backing.Device {
		return must(layer.NewBlockSize(d, layer.BlockSizeOptions{Min: 4096, Preferred: 65536, Max: 32768}))
	})
}

// checkedBlocks is a disk that takes whole blocks only: whatever else comes
// through to it is an error.
func checkedBlocks(d backing.Device, block int64) backing.Device {
	return owned{backing.NewChecked(must(layer.NewBlockSize(d, layer.BlockSizeOptions{Min: block})), 0), d}
}

// owned is a view that closes its disk.
type owned struct {
	*backing.Checked
	disk backing.Device
}

func (o owned) Close() error { return o.disk.Close() }

func TestSmallerBlocksConform(t *testing.T) {
	for i, o := range []layer.BlockSizeOptions{{Min: 1}, {Min: 512, Max: 8192}} {
		t.Run(fmt.Sprintf("min=%d", o.Min), func(t *testing.T) {
			conformInBlocks(t, bases[i:2+i], 4096, func(d backing.Device) backing.Device {
				return must(layer.NewBlockSize(checkedBlocks(d, 4096), o))
			})
		})
	}
}

func TestBlockSizesAreShown(t *testing.T) {
	d := mem.New(100000, nil)
	for _, tt := range []struct {
		dev                  backing.Device
		opt                  layer.BlockSizeOptions
		min, preferred, size int64
	}{
		{d, layer.BlockSizeOptions{}, 1, 4096, 100000},
		{d, layer.BlockSizeOptions{Min: 512}, 512, 4096, 99840},
		{d, layer.BlockSizeOptions{Min: 8192}, 8192, 8192, 98304},
		{d, layer.BlockSizeOptions{Min: 1, Preferred: 1}, 1, 512, 100000},
		{d, layer.BlockSizeOptions{Preferred: 65536}, 1, 65536, 100000},
		{checkedBlocks(d, 4096), layer.BlockSizeOptions{Min: 1}, 1, 4096, 98304},
		{checkedBlocks(d, 4096), layer.BlockSizeOptions{}, 4096, 4096, 98304},
	} {
		i := must(layer.NewBlockSize(tt.dev, tt.opt)).Info()
		if i.MinBlock != tt.min || i.Preferred != tt.preferred || i.Size != tt.size {
			t.Errorf("%+v: got %+v, want block %d, preferred %d, size %d", tt.opt, i, tt.min, tt.preferred, tt.size)
		}
	}
}

func TestBadBlockSizesAreRefused(t *testing.T) {
	for _, o := range []layer.BlockSizeOptions{
		{Min: 3}, {Min: -1}, {Min: 128 << 10}, {Preferred: 1000}, {Preferred: 1 << 40}, {Max: 5000}, {Min: 4096, Max: 2048},
		{Min: -1 << 63},
	} {
		_, err := layer.NewBlockSize(mem.New(1<<20, nil), o)
		isKind(t, fmt.Sprintf("%+v", o), err, backing.ErrInvalid)
	}
	_, err := layer.NewBlockSize(checkedBlocks(mem.New(1<<20, nil), 4096), layer.BlockSizeOptions{Min: 1, Max: 2048})
	isKind(t, "largest request smaller than a block of the disk", err, backing.ErrInvalid)
}

// pieces notes the lengths of writes.
type pieces struct {
	backing.Device
	lens []int
}

func (p *pieces) WriteAt(ctx context.Context, b []byte, off int64, f backing.Flags) error {
	p.lens = append(p.lens, len(b))
	return p.Device.WriteAt(ctx, b, off, f)
}

func TestLargeRequestsAreSplit(t *testing.T) {
	p := &pieces{Device: mem.New(1<<20, nil)}
	b := must(layer.NewBlockSize(p, layer.BlockSizeOptions{Max: 8192}))
	want := fill(t, b, 100, 20000, 4)
	if !slices.Equal(p.lens, []int{8192, 8192, 3616}) {
		t.Errorf("a write of 20000 bytes: got pieces %v", p.lens)
	}
	holds(t, b, 100, want)
	var m backing.Mapping
	isKind(t, "map of 8193 bytes", b.Map(engine.OpRead, 0, 8193, &m), backing.ErrNotMappable)
}

func TestBlockOfSeveralStatesIsData(t *testing.T) {
	d := mem.New(256<<10, nil)
	fill(t, d, 32<<10, 32<<10, 1)
	b := must(layer.NewBlockSize(d, layer.BlockSizeOptions{Min: 64 << 10}))
	var got []backing.Extent
	yield := func(x backing.Extent) bool { got = append(got, x); return true }
	if err := b.Extents(t.Context(), 0, 256<<10, 0, yield); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(got, []backing.Extent{{Len: 64 << 10}, {Len: 192 << 10, Hole: true, Zero: true}}) {
		t.Errorf("extents: got %+v, want a block of data and 192 KiB of hole", got)
	}
}

// told is a disk with a description: statuses from its beginning on.
type told struct {
	backing.Device
	list []backing.Status
}

func (d told) Descriptions() []string { return []string{"x"} }

func (d told) Describe(_ context.Context, _ string, off, n int64, _ backing.Flags, yield func(backing.Status) bool) error {
	for end := off + n; off < end; {
		at := int64(0)
		for _, s := range d.list {
			if at += s.Len; at > off {
				s.Len = min(at, end) - off
				off += s.Len
				if !yield(s) {
					return nil
				}
				break
			}
		}
	}
	return nil
}

// statuses are runs of bytes, each a length and a value.
func statuses(p ...int64) (list []backing.Status) {
	for i := 0; i < len(p); i += 2 {
		list = append(list, backing.Status{Len: p[i], Value: uint32(p[i+1])})
	}
	return list
}

// A client rounds what is shorter than a block, and may forget what is marked there.
func TestBlockOfSeveralStatusesIsMarked(t *testing.T) {
	for _, tt := range []struct {
		name   string
		f      backing.Flags
		list   []backing.Status
		off, n int64
		want   []backing.Status
	}{
		{"marked in the middle", 0, statuses(512, 0, 512, 1, 15360, 0), 0, 16384, statuses(4096, 1, 12288, 0)},
		{"one alone", backing.ReqOne, statuses(512, 0, 512, 1, 15360, 0), 0, 16384, statuses(4096, 1)},
		{"marked across blocks", 0, statuses(5000, 0, 4000, 1, 7384, 0), 0, 16384, statuses(4096, 0, 4096, 1, 4096, 1, 4096, 0)},
		{"the topmost of a chain", 0, statuses(6144, 3, 1024, 1, 1024, 2, 8192, 0), 4096, 8192, statuses(4096, 1, 4096, 0)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := must(layer.NewBlockSize(told{mem.New(16384, nil), tt.list}, layer.BlockSizeOptions{Min: 4096}))
			var got []backing.Status
			err := b.Describe(t.Context(), "x", tt.off, tt.n, tt.f, func(s backing.Status) bool { got = append(got, s); return true })
			if err != nil || !slices.Equal(got, tt.want) {
				t.Errorf("describe %d+%d: got %v, %v, want %v", tt.off, tt.n, got, err, tt.want)
			}
		})
	}
}

func TestFastZeroOfPartsIsRefusedUntouched(t *testing.T) {
	d := mem.New(1<<20, nil)
	b := must(layer.NewBlockSize(checkedBlocks(d, 4096), layer.BlockSizeOptions{Min: 1}))
	want := fill(t, d, 0, 16384, 5)
	isKind(t, "fast zero", b.Zero(t.Context(), 4000, 8000, backing.FastZero), backing.ErrNotSupported)
	holds(t, d, 0, want)
	if err := b.Zero(t.Context(), 4096, 8192, backing.FastZero); err != nil {
		t.Fatal(err)
	}
	holds(t, d, 0, slices.Concat(want[:4096], make([]byte, 8192), want[:4096]))
}

// A lease of a whole block keeps writers of its parts out until it ends.
func TestPartIsNotModifiedUnderAMappedWrite(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		disk := &slow{Device: mem.New(1<<20, nil), gate: make(chan struct{})}
		close(disk.gate)
		b := must(layer.NewBlockSize(checkedBlocks(disk, 4096), layer.BlockSizeOptions{Min: 1}))
		var m, beside backing.Mapping
		if err := b.Map(engine.OpWrite, 4096, 4096, &m); err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		go func() { done <- b.WriteAt(t.Context(), []byte{1, 2}, 4100, 0) }()
		synctest.Wait()
		if len(done) != 0 {
			t.Fatal("a part of the block was written under the lease")
		}
		isKind(t, "map behind the writer", b.Map(engine.OpWrite, 0, 8192, &beside), backing.ErrNotMappable)
		m.Release()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		holds(t, b, 4100, []byte{1, 2})
	})
}

func TestBlockSizeMapsWithoutAllocating(t *testing.T) {
	raw := newRaw(t, "pool", 1<<20, 0)
	b := closing(t, must(layer.NewBlockSize(checkedBlocks(raw, 4096), layer.BlockSizeOptions{Min: 1})))
	if n := mapAllocates(t, b); n != 0 {
		t.Errorf("map: got %v allocations, want none", n)
	}
}
