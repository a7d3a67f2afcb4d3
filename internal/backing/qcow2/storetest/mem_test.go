package storetest

import (
	"bytes"
	"context"
	"errors"
	"hash/maphash"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
)

// TestMemAgreesWithBytes runs random operations on a Mem and on a slice.
func TestMemAgreesWithBytes(t *testing.T) {
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 0))
	ctx, model := context.Background(), []byte("start")
	m := New(model)
	for i := range 2000 {
		off, n := r.Int64N(5000), r.Int64N(3000)
		switch r.IntN(4) {
		case 0:
			p := bytes.Repeat([]byte{byte(i)}, int(n))
			if err := m.WriteAt(ctx, p, off, false); err != nil {
				t.Fatal(err)
			}
			if end := off + n; end > int64(len(model)) {
				model = append(model, make([]byte, end-int64(len(model)))...)
			}
			copy(model[off:], p)
		case 1:
			if err := m.Punch(ctx, off, n); err != nil {
				t.Fatal(err)
			}
			if from := min(off, int64(len(model))); true {
				clear(model[from:min(off+n, int64(len(model)))])
			}
		case 2:
			if err := m.Truncate(off); err != nil {
				t.Fatal(err)
			}
			model = append(model[:min(off, int64(len(model)))], make([]byte, max(0, off-int64(len(model))))...)
		case 3:
			p := make([]byte, n)
			got, err := m.ReadAt(ctx, p, off)
			want := model[min(off, int64(len(model))):min(off+n, int64(len(model)))]
			if err != nil || !bytes.Equal(p[:got], want) {
				t.Fatalf("seed %d: ReadAt(%d, %d) = %d, %v; want %d equal bytes", seed, off, n, got, err, len(want))
			}
		}
		if !bytes.Equal(m.Contents(), model) {
			t.Fatalf("seed %d: contents differ after step %d", seed, i)
		}
	}
}

func TestMemFailsTheCallThatWasChosen(t *testing.T) {
	ctx, m, boom := context.Background(), New(nil), errors.New("boom")
	m.FailCall(2, boom)
	m.FailOp(Read, 2, boom)
	read := func() error { _, err := m.ReadAt(ctx, make([]byte, 1), 0); return err }
	if err := read(); err != nil {
		t.Errorf("first call: %v", err)
	}
	if err := m.WriteAt(ctx, []byte("x"), 7, false); err != boom {
		t.Errorf("second call: %v, want boom", err)
	}
	if err := read(); err != boom {
		t.Errorf("second read: %v, want boom", err)
	}
	if err := read(); err != nil || m.Count(Read) != 3 || m.Calls() != 4 || len(m.Contents()) != 0 {
		t.Errorf("then: %v, %d reads, %d calls, %d bytes", err, m.Count(Read), m.Calls(), len(m.Contents()))
	}
	m.FailOp(Sync, 1, boom)
	if err := m.Sync(ctx); err != boom {
		t.Errorf("Sync: %v, want boom", err)
	}
	if err := m.WriteAt(ctx, []byte("x"), 0, false); !errors.Is(err, backing.ErrPoisoned) {
		t.Errorf("write after a failed Sync: %v", err)
	}
}

func TestMemIsSparse(t *testing.T) {
	m := New(make([]byte, 4096))
	m.Patch(1<<40, []byte{1})
	if got := m.Allocated(); got != pageSize {
		t.Errorf("%d bytes taken, want %d", got, pageSize)
	}
	var got []backing.Extent
	yield := func(e backing.Extent) bool { got = append(got, e); return true }
	if err := m.Extents(context.Background(), 1<<40-1024, 1025, yield); err != nil || len(got) != 2 ||
		got[0] != (backing.Extent{Len: 1024, Hole: true, Zero: true}) || got[1] != (backing.Extent{Len: 1}) {
		t.Errorf("extents %v, %v", got, err)
	}
	if err := m.Extents(context.Background(), 0, 1<<40+2, yield); !errors.Is(err, backing.ErrOutOfRange) {
		t.Errorf("extents beyond the end: %v", err)
	}
}

// TestUpdateLeavesTheContents has one file of the host hold states of a file in
// turn, and tells those states apart.
func TestUpdateLeavesTheContents(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "held"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	m, seed := New(bytes.Repeat([]byte("old"), 3000)), maphash.MakeSeed()
	sums := map[uint64]bool{}
	var has *Mem
	for i, change := range []func(){
		func() {},
		func() { m.Patch(700, []byte("new")) },
		func() { m.Patch(20000, []byte("behind a hole")) },
		func() { m.Cut(5000) },
		func() { m.Cut(9000) },
		func() { _ = m.Punch(t.Context(), 100, 3000) },
	} {
		change()
		if err := m.Update(f, has); err != nil {
			t.Fatal(err)
		}
		has = m.Clone()
		got, err := os.ReadFile(f.Name())
		if err != nil || !bytes.Equal(got, m.Contents()) {
			t.Errorf("change %d: %v, the file holds other bytes", i, err)
		}
		if has.Sum(seed) != m.Sum(seed) || sums[m.Sum(seed)] {
			t.Errorf("change %d: the sum is not that of a clone, or that of something else", i)
		}
		sums[m.Sum(seed)] = true
	}
}
