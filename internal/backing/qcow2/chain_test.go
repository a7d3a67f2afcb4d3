package qcow2_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/codec"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/create"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/layertest"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/qcowtest"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/storetest"
	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

func stats(d backing.Device) qcow2.MapStats {
	return d.(interface{ Stats() qcow2.MapStats }).Stats()
}

// scattered is a layer of n clusters of 512 bytes, none where it would
// continue the one before. Byte i of cluster c is its low byte.
func scattered(n int) (*layertest.Layer, func(off, n int64) []byte) {
	host := make([]byte, 512*n)
	spans := make([]qcow2.Span, n)
	st := storetest.New(nil)
	for c := range n {
		at := (n - 1 - c) * 512
		for i := range 512 {
			host[at+i] = byte(c)
		}
		spans[c] = qcow2.Span{Kind: qcow2.Data, Len: 512, Store: st, Off: int64(at)}
	}
	st.Patch(0, host)
	return layertest.New(nil, spans...), func(off, n int64) []byte {
		p := make([]byte, n)
		for i := range p {
			p[i] = byte((off + int64(i)) / 512)
		}
		return p
	}
}

func TestFragmentedPageIsKeptInPieces(t *testing.T) {
	const clusters = 3 * limits.MapSubPage / 512
	top, want := scattered(clusters)
	d := newDevice(t, top, qcow2.Options{})
	mustMatch(t, d, 0, want(0, clusters*512))
	if got := stats(d).Pages; got != 4 {
		t.Errorf("pages: got %d, want a marker and three pieces", got)
	}
	calls := top.Calls()
	mustMatch(t, d, 1<<20-700, want(1<<20-700, 1400))
	if got := top.Calls(); got != calls {
		t.Errorf("read of what is cached asked the layer %d times", got-calls)
	}
}

func TestMapStaysWithinItsBound(t *testing.T) {
	const clusters = 12 * limits.MapSubPage / 512
	top, want := scattered(clusters)
	const bound = 16 * 100 << 10 // a piece takes 64 KiB
	d := newDevice(t, top, qcow2.Options{CacheBytes: bound})
	for range 3 {
		for off := int64(0); off < clusters*512; off += limits.MapSubPage {
			mustMatch(t, d, off+5000, want(off+5000, 100))
			if got := stats(d).Bytes; got > bound {
				t.Fatalf("map: got %d bytes, want at most %d", got, bound)
			}
		}
	}
	s := stats(d)
	if s.Misses == 0 || s.Hits == 0 || s.Pages == 0 {
		t.Errorf("stats: got %+v, want some of each", s)
	}
}

func TestPageIsLoadedOnceForAllWhoWait(t *testing.T) {
	top := layertest.New(nil, qcow2.Span{Kind: qcow2.Zero, Len: 1 << 20})
	begun, gate := make(chan struct{}), make(chan struct{})
	var once sync.Once
	top.SetHook(func(int64, int64) error {
		once.Do(func() { close(begun) })
		<-gate
		return nil
	})
	d := newDevice(t, top, qcow2.Options{})
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if err := d.ReadAt(t.Context(), make([]byte, 512), 0); err != nil {
				t.Errorf("read: %v", err)
			}
		})
	}
	<-begun
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := d.ReadAt(ctx, make([]byte, 512), 0); !errors.Is(err, context.Canceled) {
		t.Errorf("read by one who gave up: got %v, want %v", err, context.Canceled)
	}
	close(gate)
	wg.Wait()
	if got := top.Calls(); got != 1 {
		t.Errorf("layer was asked %d times, want once", got)
	}
}

func TestErrorsOfLoadingAreNotKept(t *testing.T) {
	top := layertest.New(nil, qcow2.Span{Kind: qcow2.Zero, Len: 1 << 20})
	bad := errors.New("host has a bad day")
	top.SetHook(func(int64, int64) error { return bad })
	d := newDevice(t, top, qcow2.Options{})
	if err := d.ReadAt(t.Context(), make([]byte, 512), 0); !errors.Is(err, bad) {
		t.Fatalf("read: got %v, want %v", err, bad)
	}
	top.SetHook(nil)
	mustMatch(t, d, 0, make([]byte, 512))
}

// TestTableThatCannotBeReadConcernsItsRangeOnly: a page fails as a whole, the
// pieces that can be loaded are served.
func TestTableThatCannotBeReadConcernsItsRangeOnly(t *testing.T) {
	top := layertest.New(nil, qcow2.Span{Kind: qcow2.Zero, Len: 4 << 20})
	bad := errors.New("bad sector")
	top.SetHook(func(off, n int64) error {
		if off <= 3<<20 && 3<<20 < off+n {
			return bad
		}
		return nil
	})
	d := newDevice(t, top, qcow2.Options{})
	mustMatch(t, d, 1<<20, make([]byte, 2<<20))
	if err := d.ReadAt(t.Context(), make([]byte, 512), 3<<20); !errors.Is(err, bad) {
		t.Errorf("read behind the bad sector: got %v, want %v", err, bad)
	}
}

func TestFileThatShrankIsAnError(t *testing.T) {
	st := storetest.New(bytes.Repeat([]byte{7}, 8192))
	d := newDevice(t, layertest.New(nil, qcow2.Span{Kind: qcow2.Data, Len: 8192, Store: st}), qcow2.Options{})
	mustMatch(t, d, 0, bytes.Repeat([]byte{7}, 8192))
	st.Cut(4096)
	mustMatch(t, d, 0, bytes.Repeat([]byte{7}, 4096))
	if err := d.ReadAt(t.Context(), make([]byte, 512), 6000); backing.KindOf(err) != backing.ErrIO || err == nil {
		t.Errorf("read of what is gone: got %v, want %v", err, backing.ErrIO)
	}
}

// TestBaseThatIsGoneIsNotCopiedUp: a base that goes away below a disk fails reads
// and the writes that would copy from it, whether or not it was read before.
func TestBaseThatIsGoneIsNotCopiedUp(t *testing.T) {
	const size = 8 << 20
	e := engine.NewPool(2)
	defer e.Close()
	for _, warm := range []bool{false, true} {
		t.Run(fmt.Sprint("read before: ", warm), func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "base")
			if err := os.WriteFile(path, bytes.Repeat([]byte{7}, size), 0o600); err != nil {
				t.Fatal(err)
			}
			below, err := qcow2.NewRawLayer(fileIn(t, path, e))
			if err != nil {
				t.Fatal(err)
			}
			o := quiet()
			o.Backing = below
			image := blank(t, "overlay", create.Options{Size: size, Backing: "base", BackingFormat: "raw"}).image
			d, err := qcow2.Open(t.Context(), image, o)
			if err != nil {
				t.Fatal(err)
			}
			defer d.Close()
			if warm {
				mustMatch(t, d, 0, bytes.Repeat([]byte{7}, 512))
			}
			if err := os.Truncate(path, 0); err != nil {
				t.Fatal(err)
			}
			p := make([]byte, 512)
			for name, err := range map[string]error{
				"read":  d.ReadAt(t.Context(), p, size/2),
				"write": d.WriteAt(t.Context(), p, 1<<20, 0),
			} {
				if err == nil || backing.KindOf(err) != backing.ErrIO {
					t.Errorf("%s: got %v, want %v", name, err, backing.ErrIO)
				}
			}
			if err := os.WriteFile(path, bytes.Repeat([]byte{7}, size), 0o600); err != nil { // it is back
				t.Fatal(err)
			}
			mustMatch(t, d, 1<<20, bytes.Repeat([]byte{7}, 64<<10))
		})
	}
}

// compressedLayer has clusters of 64 KiB that hold their number plus 1.
func compressedLayer(t testing.TB, n int) (*layertest.Layer, *storetest.Mem) {
	t.Helper()
	st := storetest.New(nil)
	var host []byte
	var spans []qcow2.Span
	for c := range n {
		off := int64(len(host))
		var ok bool
		if host, ok = codec.Encode(format.Deflate, host, bytes.Repeat([]byte{byte(c + 1)}, 64<<10)); !ok {
			t.Fatal("cluster of one byte was not compressed")
		}
		spans = append(spans, qcow2.Span{Kind: qcow2.Compressed, Len: 64 << 10, Store: st, Off: off,
			InLen: int64(len(host)) - off, Cluster: 64 << 10})
	}
	st.Patch(0, host)
	return layertest.New(nil, spans...), st
}

func TestPartOfACompressedClusterIsDecompressedOnce(t *testing.T) {
	top, st := compressedLayer(t, 4)
	d := newDevice(t, top, qcow2.Options{ClusterBytes: 128 << 10})
	for i := range int64(16) {
		mustMatch(t, d, i*4096, bytes.Repeat([]byte{1}, 4096))
	}
	if got := st.Count(storetest.Read); got != 1 {
		t.Errorf("cluster was read %d times, want once", got)
	}
	for c := range int64(4) { // two fit
		mustMatch(t, d, c<<16|100, bytes.Repeat([]byte{byte(c + 1)}, 50))
	}
	if got := st.Count(storetest.Read); got < 4 || got > 5 {
		t.Errorf("four clusters were read %d times, want 4 or 5", got)
	}
}

func TestFailedReadOfACompressedClusterIsNotKept(t *testing.T) {
	top, st := compressedLayer(t, 1)
	d := newDevice(t, top, qcow2.Options{})
	bad := errors.New("bad sector")
	for _, n := range []int{64 << 10, 100} {
		st.FailOp(storetest.Read, 1, bad)
		if err := d.ReadAt(t.Context(), make([]byte, n), 0); !errors.Is(err, bad) {
			t.Errorf("read of %d: got %v, want %v", n, err, bad)
		}
		mustMatch(t, d, 0, bytes.Repeat([]byte{1}, n))
	}
}

func TestLargeReadOfManyCompressedClusters(t *testing.T) {
	const n = limits.ClusterBatch + 3
	top, _ := compressedLayer(t, n)
	d := newDevice(t, top, qcow2.Options{})
	var want []byte
	for c := range n {
		want = append(want, bytes.Repeat([]byte{byte(c + 1)}, 64<<10)...)
	}
	mustMatch(t, d, 5, want[5:])
}

// TestImagesReadAsQEMUReadsThem opens images with no more than a raw file
// below them.
func TestImagesReadAsQEMUReadsThem(t *testing.T) {
	var few []qcowtest.Options
	for _, o := range qcowtest.Pairwise(qcowtest.Seed) {
		if o.DataFile == "" && o.Backing == qcowtest.NoBacking && o.Size() > 0 && o.Size() <= 64<<20 {
			few = append(few, o)
		}
	}
	if len(few) < 3 {
		t.Fatalf("only %d images", len(few))
	}
	file := files(t)
	for _, image := range qcowtest.Make(t, qcowtest.Seed, few) {
		t.Run(image.Name, func(t *testing.T) {
			b, err := os.ReadFile(image.Path)
			if err != nil {
				t.Fatal(err)
			}
			want, err := os.ReadFile(image.Raw())
			if err != nil {
				t.Fatal(err)
			}
			o := quiet()
			o.ReadOnly = true
			d, err := qcow2.Open(t.Context(), file(b), o)
			if err != nil {
				t.Fatal(err)
			}
			mustMatch(t, d, 0, want)
			r := random(t)
			for range 50 {
				off, n := somewhere(r, int64(len(want)))
				mustMatch(t, d, off, want[off:off+n])
			}
			for off := int64(0); off < int64(len(want)); { // what is said to be zero is
				for _, e := range extents(t, d, off, int64(len(want))-off) {
					if e.Zero && len(bytes.Trim(want[off:off+e.Len], "\x00")) > 0 {
						t.Errorf("extents: %d+%d is said to be zero, is not", off, e.Len)
					}
					off += e.Len
				}
			}
		})
	}
}

func TestOpenForWritingIsNeverLenient(t *testing.T) {
	st := storetest.New(made(t, "cluster_size=64k", "1M"))
	o := quiet()
	o.Lenient = true
	if _, err := qcow2.Open(t.Context(), st, o); !errors.Is(err, backing.ErrInvalid) {
		t.Errorf("lenient open for writing: got %v, want %v", err, backing.ErrInvalid)
	}
	if got := st.Closed(); got != 1 {
		t.Errorf("file was closed %d times, want once", got)
	}
}
