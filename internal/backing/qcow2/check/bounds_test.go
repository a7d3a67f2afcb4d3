package check

import (
	"context"
	"encoding/binary"
	"errors"
	"math"
	"runtime"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/storetest"
)

func TestProgressAndCancellation(t *testing.T) {
	i := create(t, "", "64M", fill)
	st, h, ctx := storetest.New(i.bytes()), i.header(), context.Background()
	var done, total int64
	if _, err := Run(ctx, st, h, Options{Progress: func(d, n int64) { done, total = d, n }}); err != nil {
		t.Fatal(err)
	}
	if want := int64(2 * 65536); done != want || total != want {
		t.Errorf("progress ends with %d of %d, want %d: an L2 table and a refcount block", done, total, want)
	}
	ctx, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := Run(ctx, st, h, Options{}); !errors.Is(err, context.Canceled) {
		t.Errorf("Run = %v, want context.Canceled", err)
	}
}

// TestHostileTablesCostLittle has an image whose L1 table names one L2 table
// everywhere, which names one cluster everywhere and others far beyond.
func TestHostileTablesCostLittle(t *testing.T) {
	i := create(t, "", "64M", fill)
	b := i.bytes()
	for k := 0; k < 8192; k++ {
		binary.BigEndian.PutUint64(b[0x30000+8*k:], 1<<63|0x40000)
		e := uint64(1<<63 | 0x50000)
		if k%2 == 1 {
			e = 1<<63 | uint64(k)<<40&math.MaxInt64
		}
		binary.BigEndian.PutUint64(b[0x40000+8*k:], e)
	}
	st, h := storetest.New(b), i.header()
	h.L1Size = 8192
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	begun := time.Now()
	r, err := Run(context.Background(), st, h, Options{})
	if err != nil {
		t.Fatal(err)
	}
	runtime.ReadMemStats(&after)
	if r.Corruptions < 8192 {
		t.Errorf("%d corruptions, want one for each L1 entry at least", r.Corruptions)
	}
	if took, grew := time.Since(begun), after.TotalAlloc-before.TotalAlloc; took > time.Second || grew > 64<<20 {
		t.Errorf("the check took %v and %d bytes", took, grew)
	}
}

// scattered is an image of small clusters whose L1 table has n entries: each
// names an L2 table of its own, and each entry there a cluster with more than a
// hundred KiB of holes around it. Nothing of that has refcounts.
func scattered(t *testing.T, n int64) (*storetest.Mem, *format.Header) {
	const size, stride = 512, 256 * 512
	i := create(t, "cluster_size=512", "64k", "write -P 1 0 512")
	st, end := storetest.New(i.bytes()), int64(len(i.bytes()))+size
	l1 := (end &^ (size - 1)) + size
	far := l1 + n*(8+size)
	far = (far/stride + 1) * stride
	for k := range n {
		table := l1 + (n*8+size-1)&^(size-1) + k*size
		st.Patch(l1+k*8, binary.BigEndian.AppendUint64(nil, uint64(table)))
		entries := make([]byte, 0, size)
		for e := range int64(size / 8) {
			entries = binary.BigEndian.AppendUint64(entries, uint64(far+(k*size/8+e)*stride))
		}
		st.Patch(table, entries)
	}
	st.Cut(far + n*size/8*stride)
	h := i.header()
	h.L1Offset, h.L1Size, h.Size = uint64(l1), uint32(n), uint64(n)*size/8*size
	return st, h
}

// TestSoundTakesNoMemoryForWhatHasNoRefcount: the tables are a few megabytes,
// and a count for each cluster that they name would be hundreds.
func TestSoundTakesNoMemoryForWhatHasNoRefcount(t *testing.T) {
	st, h := scattered(t, 8192)
	took := func(o Options) (n uint64, err error) {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, err = Run(context.Background(), st, h, o)
		runtime.ReadMemStats(&after)
		return after.TotalAlloc - before.TotalAlloc, err
	}
	wrong := format.Corrupt("")
	if n, err := took(Options{Sound: true}); n > 4<<20 || !errors.As(err, &wrong) {
		t.Errorf("%d bytes and %v, want at most %d and a corruption", n, err, 4<<20)
	}
	if n, _ := took(Options{}); n < 128<<20 {
		t.Errorf("the whole check took %d bytes: the image is none that costs much", n)
	}
}

// TestHolesAreNotRead: of L2 tables, snapshots and refcounts that no sector was
// ever written of, a file can have any number. They are sound.
func TestHolesAreNotRead(t *testing.T) {
	const n, cluster = 1 << 16, 1 << 16
	i := create(t, "refcount_bits=1", "32T", fill)
	st, h := storetest.New(i.bytes()), i.header()
	g := h.Geometry()
	first := g.Clusters(int64(len(i.bytes()))) // behind all that there is
	block := make([]byte, cluster)
	copy(block, st.Peek(i.at(int64(h.RefTableOffset)), cluster))
	for c := first; c < first+n-2; c++ {
		e := 1<<63 | uint64(c)<<g.ClusterBits
		st.Patch(int64(h.L1Offset)+(c-first+1)*8, binary.BigEndian.AppendUint64(nil, e))
		g.SetRefcount(block, c, 1)
	}
	lone := first + n // a refcount block of clusters that nobody has
	g.SetRefcount(block, lone, 1)
	st.Patch(int64(h.RefTableOffset)+8, binary.BigEndian.AppendUint64(nil, uint64(lone)<<g.ClusterBits))
	st.Patch(i.at(int64(h.RefTableOffset)), block)
	st.Cut((lone + 1) << g.ClusterBits)
	r, err := Run(context.Background(), st, h, Options{Sound: true})
	if err != nil || r.Leaks > 0 || r.Meta.Len() < n {
		t.Fatalf("Run = %+v, %v", r, err)
	}
	if got := st.Bytes(storetest.Read); got > 4<<20 {
		t.Errorf("%d bytes were read of a file with %d", got, st.Allocated())
	}
}
