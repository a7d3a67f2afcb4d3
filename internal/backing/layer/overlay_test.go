package layer_test

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/layer"
	"github.com/vmdiskd/vmdiskd/internal/backing/mem"
	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// costs are those of a cluster and of a page of the table.
const (
	clusterBytes = 32 << 10
	pageBytes    = 32 << 10
)

func tempFile(t testing.TB) *os.File {
	t.Helper()
	return must(layer.OpenTemporary(t.TempDir()))
}

// overlays makes one of each kind above d.
func overlays(t testing.TB, d backing.Device, quota int64) map[string]*layer.Overlay {
	return map[string]*layer.Overlay{
		"memory": must(layer.NewOverlay(d, layer.OverlayOptions{Quota: quota})),
		"file":   must(layer.NewOverlay(d, layer.OverlayOptions{Quota: quota, File: tempFile(t)})),
	}
}

func TestOverlayConforms(t *testing.T) {
	for _, file := range []bool{false, true} {
		conform(t, 0, func(t testing.TB, d backing.Device) backing.Device {
			o := layer.OverlayOptions{Quota: 8 << 20}
			if file {
				o.File = tempFile(t)
			}
			return must(layer.NewOverlay(d, o))
		})
	}
}

// pattern is a disk that is full of bytes which tell their place.
func pattern(n int) (*mem.Disk, []byte) {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(i>>8 ^ i | 1)
	}
	return mem.New(int64(n), p), p
}

func TestOverlayOfAFullDiskMatchesAModel(t *testing.T) {
	const size = 700<<10 + 100
	base, model := pattern(size)
	below := bytes.Clone(model)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	for name, o := range overlays(t, base, 8<<20) {
		t.Run(name, func(t *testing.T) {
			model := bytes.Clone(model)
			rnd := rand.New(rand.NewPCG(seed, 0))
			for range 500 {
				off := rnd.Int64N(size)
				n := min(rnd.Int64N([]int64{10, 5000, 100 << 10}[rnd.IntN(3)])+1, size-off)
				var err error
				switch rnd.IntN(5) {
				case 0, 1:
					p := bytes.Repeat([]byte{byte(rnd.IntN(255))}, int(n))
					copy(model[off:], p)
					err = o.WriteAt(t.Context(), p, off, 0)
				case 2:
					clear(model[off : off+n])
					err = o.Zero(t.Context(), off, n, backing.Flags(rnd.IntN(2))*backing.NoHole)
				case 3:
					if err = o.Trim(t.Context(), off, n, 0); err == nil {
						err = o.ReadAt(t.Context(), model[off:off+n], off)
					}
				default:
					holds(t, o, off, model[off:off+n])
				}
				if err != nil {
					t.Fatalf("at %d+%d: %v", off, n, err)
				}
			}
			holds(t, o, 0, model)
			if err := o.Zero(t.Context(), 0, size, 0); err != nil || o.Used() != 0 {
				t.Errorf("zero all: %v, %d bytes are used, want none", err, o.Used())
			}
			holds(t, o, 0, make([]byte, size))
		})
	}
	holds(t, base, 0, below)
}

func TestOverlayStopsAtItsQuota(t *testing.T) {
	base, want := pattern(1 << 20)
	for name, o := range overlays(t, base, pageBytes+3*clusterBytes+100) {
		t.Run(name, func(t *testing.T) {
			for i := range int64(3) {
				fill(t, o, i*clusterBytes, 10, 1)
			}
			isKind(t, "fourth cluster", o.WriteAt(t.Context(), make([]byte, 10), 5*clusterBytes, 0), backing.ErrNoSpace)
			isKind(t, "zeroes that stay allocated", o.Zero(t.Context(), 5*clusterBytes, 10, backing.NoHole), backing.ErrNoSpace)
			fill(t, o, clusterBytes+20, 10, 2) // in a cluster that is there
			holds(t, o, 5*clusterBytes, want[5*clusterBytes:6*clusterBytes])
			if err := o.Trim(t.Context(), 0, clusterBytes, 0); err != nil {
				t.Fatal(err)
			}
			fill(t, o, 5*clusterBytes, 10, 3)
			holds(t, o, 0, make([]byte, clusterBytes))
			if got := o.Used(); got != pageBytes+3*clusterBytes {
				t.Errorf("used: got %d, want %d", got, pageBytes+3*clusterBytes)
			}
		})
	}
}

// TestOverlayGoesOnWithADelta: another has what was written to one that is closed, with
// its own quota, and the size that the disk had. What nobody holds is forgotten.
func TestOverlayGoesOnWithADelta(t *testing.T) {
	const size = 4 * clusterBytes
	for _, f := range []*os.File{nil, tempFile(t)} {
		base, written := pattern(size)
		o := must(layer.NewOverlay(base, layer.OverlayOptions{Quota: 1 << 20, File: f}))
		want := bytes.Clone(written)
		copy(want[10:], fill(t, o, 10, 2*clusterBytes, 1))
		d := o.Hold()
		if err := o.Close(); err != nil {
			t.Fatal(err)
		}
		_, err := layer.NewOverlay(mem.New(size-1, nil), layer.OverlayOptions{Quota: 1 << 20, Delta: d})
		isKind(t, "a smaller disk", err, backing.ErrInvalid)
		o = must(layer.NewOverlay(mem.New(size+clusterBytes, written), layer.OverlayOptions{Quota: 1, Delta: d}))
		if err := d.Close(); err != nil || o.Info().Size != size {
			t.Errorf("%v, a disk of %d bytes, want %d", err, o.Info().Size, size)
		}
		holds(t, o, 0, want)
		isKind(t, "more than the quota", o.WriteAt(t.Context(), want[:10], 3*clusterBytes, 0), backing.ErrNoSpace)
		if err := o.Close(); err != nil {
			t.Fatal(err)
		}
		if f == nil {
			continue
		}
		if _, err := f.Stat(); !errors.Is(err, os.ErrClosed) {
			t.Errorf("file of what nobody holds: %v, want it closed", err)
		}
	}
}

// A guest that zeroes all of a huge disk, or touches it here and there, pays
// for the tables too.
func TestTablesOfAnOverlayCountForItsQuota(t *testing.T) {
	const size, quota = 1 << 40, 1 << 20
	o := must(layer.NewOverlay(mem.Null(size), layer.OverlayOptions{Quota: quota}))
	if err := o.Zero(t.Context(), 0, size, 0); err != nil || o.Used() != 0 {
		t.Errorf("zero all: %v, used %d, want nothing", err, o.Used())
	}
	var err error
	n := int64(0)
	for ; err == nil; n++ {
		err = o.Zero(t.Context(), n<<28+3*clusterBytes, clusterBytes, backing.NoHole)
	}
	isKind(t, "a cluster in each 256 MiB", err, backing.ErrNoSpace)
	if n != quota/(pageBytes+clusterBytes)+1 || o.Used() > quota {
		t.Errorf("got %d clusters in as many pages, %d bytes used", n-1, o.Used())
	}
	if err := o.Trim(t.Context(), 0, size, 0); err != nil {
		t.Errorf("trim with a full quota: %v", err)
	}
}

func TestFileOfAnOverlayShrinksWithIt(t *testing.T) {
	base, _ := pattern(1 << 20)
	f := tempFile(t)
	o := closing(t, must(layer.NewOverlay(base, layer.OverlayOptions{Quota: 8 << 20, File: f})))
	blocks := func() int64 { return must(allocated(f)) }
	fill(t, o, 0, 1<<20, 1)
	full := blocks()
	if err := o.Trim(t.Context(), 0, 1<<20, 0); err != nil {
		t.Fatal(err)
	}
	if now := blocks(); full < 1<<20 || now > full/4 {
		t.Errorf("file: got %d bytes on the storage, and %d after a trim of all", full, now)
	}
}

func TestOverlayLeavesNoFile(t *testing.T) {
	dir := t.TempDir()
	f := must(layer.OpenTemporary(dir))
	o := must(layer.NewOverlay(mem.New(100, nil), layer.OverlayOptions{Quota: 1 << 20, File: f}))
	fill(t, o, 0, 100, 1)
	if list := must(os.ReadDir(dir)); len(list) != 0 {
		t.Errorf("folder: got %v, want nothing", list)
	}
	if err := o.Close(); err != nil {
		t.Error(err)
	}
	if _, err := f.Stat(); err == nil {
		t.Error("the file is still open")
	}
	t.Setenv("TMPDIR", dir)
	f = must(layer.OpenTemporary(""))
	if name := f.Name(); !strings.HasPrefix(name, dir) {
		t.Errorf("file of no folder in particular: got %s, want one in %s", name, dir)
	}
	_ = f.Close()
	if _, err := layer.OpenTemporary(dir + "/none"); err == nil {
		t.Error("a file in no folder: got none, want an error")
	}
}

func TestOverlayWritesABrokenFileAsAnError(t *testing.T) {
	f := tempFile(t)
	base, want := pattern(100 << 10)
	o := must(layer.NewOverlay(base, layer.OverlayOptions{Quota: 1 << 20, File: f}))
	_ = f.Close()
	if err := o.WriteAt(t.Context(), make([]byte, 10), 0, 0); err == nil {
		t.Error("write: got none, want an error")
	}
	holds(t, o, 0, want)
	if got := o.Used(); got != pageBytes {
		t.Errorf("used after a failed write: got %d, want the table", got)
	}
}

func TestOverlayShowsWhatIsWrittenInExtents(t *testing.T) {
	base := mem.New(256<<10, nil)
	fill(t, base, 192<<10, 64<<10, 1)
	o := must(layer.NewOverlay(base, layer.OverlayOptions{Quota: 1 << 20}))
	fill(t, o, 30<<10, 40<<10, 1)
	if err := o.Zero(t.Context(), 224<<10, 32<<10, 0); err != nil {
		t.Fatal(err)
	}
	var got []backing.Extent
	if err := o.Extents(t.Context(), 0, 256<<10, 0, func(x backing.Extent) bool { got = append(got, x); return true }); err != nil {
		t.Fatal(err)
	}
	hole := func(n int64) backing.Extent { return backing.Extent{Len: n, Hole: true, Zero: true} }
	want := []backing.Extent{{Len: 96 << 10}, hole(96 << 10), {Len: 32 << 10}, hole(32 << 10)}
	if !slices.Equal(got, want) {
		t.Errorf("extents: got %+v, want %+v", got, want)
	}
}

// brief is a disk whose partial answers have n bytes.
type brief struct {
	backing.Device
	n int64
}

func (d brief) Extents(ctx context.Context, off, n int64, f backing.Flags, yield func(backing.Extent) bool) error {
	if f&backing.Partial != 0 {
		n = min(n, d.n)
	}
	return d.Device.Extents(ctx, off, n, f, yield)
}

// TestLayersPassPartialAnswersOn: an answer ends where that of the disk below
// does, and whoever goes on there sees all that a whole answer has.
func TestLayersPassPartialAnswersOn(t *testing.T) {
	base := mem.New(256<<10, nil)
	fill(t, base, 192<<10, 64<<10, 1)
	o := must(layer.NewOverlay(brief{base, 20 << 10}, layer.OverlayOptions{Quota: 1 << 20}))
	fill(t, o, 30<<10, 40<<10, 1)
	for name, d := range map[string]backing.Device{
		"overlay": o,
		"blocks":  must(layer.NewBlockSize(brief{base, 20 << 10}, layer.BlockSizeOptions{Min: 16 << 10})),
	} {
		var whole, got []byte // the states of each KiB
		into := func(list *[]byte) func(backing.Extent) bool {
			return func(x backing.Extent) bool {
				state := byte('d')
				if x.Zero {
					state = 'z'
				}
				*list = append(*list, bytes.Repeat([]byte{state}, int(x.Len>>10))...)
				return true
			}
		}
		if err := d.Extents(t.Context(), 0, 256<<10, 0, into(&whole)); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		answers := 0
		for ; len(got) < len(whole); answers++ {
			off := int64(len(got)) << 10
			if err := d.Extents(t.Context(), off, 256<<10-off, backing.Partial, into(&got)); err != nil || int64(len(got))<<10 == off {
				t.Fatalf("%s: extents at %d: no answer, %v", name, off, err)
			}
		}
		if answers < 4 || !bytes.Equal(got, whole) {
			t.Errorf("%s: got %s in %d answers, want %s in several", name, got, answers, whole)
		}
	}
}

// TestOverlayShowsNoEmptyExtent while what it shows is trimmed away.
func TestOverlayShowsNoEmptyExtent(t *testing.T) {
	const size = 64 * clusterBytes
	o := must(layer.NewOverlay(mem.New(size, nil), layer.OverlayOptions{Quota: 2 * size}))
	defer o.Close()
	stop, stopped := make(chan struct{}), make(chan error)
	go func() {
		p, err := make([]byte, clusterBytes), error(nil)
		for n := int64(0); err == nil; n++ {
			select {
			case <-stop:
				stopped <- nil
				return
			default:
			}
			off := n % 64 * clusterBytes
			err = errors.Join(o.WriteAt(t.Context(), p, off, 0), o.Trim(t.Context(), off, clusterBytes, 0))
		}
		stopped <- err
	}()
	for range 20000 {
		at := int64(0)
		err := o.Extents(t.Context(), 0, size, 0, func(x backing.Extent) bool {
			if x.Len <= 0 {
				t.Errorf("extent at %d: length %d", at, x.Len)
			}
			at += x.Len
			return !t.Failed()
		})
		if err != nil || t.Failed() || at != size {
			t.Errorf("extents of %d bytes: %v, want %d", at, err, size)
			break
		}
	}
	close(stop)
	if err := <-stopped; err != nil {
		t.Error(err)
	}
}

func TestOverlayMapsWhatWasNotWritten(t *testing.T) {
	raw := newRaw(t, "pool", 1<<20, 0)
	o := closing(t, must(layer.NewOverlay(raw, layer.OverlayOptions{Quota: 1 << 20})))
	fill(t, o, 64<<10, 100, 1)
	if err := o.Zero(t.Context(), 128<<10, 64<<10, 0); err != nil {
		t.Fatal(err)
	}
	var m backing.Mapping
	isKind(t, "map of what was written", o.Map(engine.OpRead, 90<<10, 10<<10, &m), backing.ErrNotMappable)
	isKind(t, "map of what was written in part", o.Map(engine.OpRead, 60<<10, 10<<10, &m), backing.ErrNotMappable)
	isKind(t, "map for a write", o.Map(engine.OpWrite, 0, 4096, &m), backing.ErrNotMappable)
	if err := o.Map(engine.OpRead, 128<<10, 64<<10, &m); err != nil || m.N != 1 || m.Runs[0].File != nil {
		t.Errorf("map of zeroes: got %+v, %v", m, err)
	}
	if n := testing.AllocsPerRun(200, func() {
		if err := o.Map(engine.OpRead, 0, 64<<10, &m); err != nil || m.Runs[0].File == nil {
			t.Fatalf("map of the disk below: got %+v, %v", m, err)
		}
		m.Release()
	}); n != 0 {
		t.Errorf("map: got %v allocations, want none", n)
	}
}

func TestOverlayHidesWhatIsTrueOnlyBelow(t *testing.T) {
	g := &growing{Device: mem.New(1<<20, nil)}
	o := must(layer.NewOverlay(unwritable{g}, layer.OverlayOptions{Quota: 1 << 20}))
	isKind(t, "describe", o.Describe(t.Context(), "x", 0, 10, 0, func(backing.Status) bool { return true }), backing.ErrInvalid)
	isKind(t, "resize", o.Resize(t.Context(), 1<<21), backing.ErrNotSupported)
	if list := o.Descriptions(); len(list) != 0 {
		t.Errorf("descriptions: got %v, want none", list)
	}
	if c := o.Info().Caps; !c.Has(backing.CanWrite | backing.CanFUA) {
		t.Errorf("caps above a read-only disk: got %#x, want the right to write", c)
	}
	g.size = 1 << 22
	if got := o.Info().Size; got != 1<<20 {
		t.Errorf("size after growth below: got %d, want %d", got, 1<<20)
	}
}

func TestBadOverlaysAreRefused(t *testing.T) {
	small := mem.New(1<<20, nil)
	coarse := must(layer.NewBlockSize(small, layer.BlockSizeOptions{Min: 64 << 10}))
	for what, err := range map[string]error{
		"no quota":    second(layer.NewOverlay(small, layer.OverlayOptions{})),
		"huge quota":  second(layer.NewOverlay(small, layer.OverlayOptions{Quota: limits.OverlayQuota + 1})),
		"huge disk":   second(layer.NewOverlay(mem.Null(limits.OverlayDisk+1), layer.OverlayOptions{Quota: 1})),
		"huge blocks": second(layer.NewOverlay(coarse, layer.OverlayOptions{Quota: 1})),
	} {
		isKind(t, what, err, backing.ErrInvalid)
	}
}

func second[T any](_ T, err error) error { return err }
