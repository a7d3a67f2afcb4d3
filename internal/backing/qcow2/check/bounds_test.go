package check

import (
	"context"
	"encoding/binary"
	"errors"
	"math"
	"runtime"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/storetest"
)

func TestMetadataLimitStopsTheCheck(t *testing.T) {
	i := create(t, "", "64M", fill)
	st, h, ctx := storetest.New(i.bytes()), i.header(), context.Background()
	if _, err := Run(ctx, st, h, Options{MetadataLimit: 4096}); !errors.Is(err, ErrTooLarge) {
		t.Errorf("Run = %v, want ErrTooLarge", err)
	}
	var done, total int64
	if _, err := Run(ctx, st, h, Options{MetadataLimit: 1 << 20, Progress: func(d, n int64) { done, total = d, n }}); err != nil {
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
