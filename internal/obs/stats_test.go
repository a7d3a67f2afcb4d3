package obs

import (
	"math"
	"sync"
	"testing"
	"time"
)

func TestBucketHoldsWhatIsBelowItsBound(t *testing.T) {
	for _, tt := range []struct {
		took time.Duration
		want int
	}{
		{-time.Second, 0},
		{0, 0},
		{999 * time.Nanosecond, 0},
		{time.Microsecond, 1},
		{1999 * time.Nanosecond, 1},
		{2 * time.Microsecond, 2},
		{4 * time.Microsecond, 3},
		{time.Millisecond, 10},
		{time.Second, 20},
		{time.Hour, Buckets - 1},
		{math.MaxInt64, Buckets - 1},
	} {
		got := bucketOf(tt.took)
		if got != tt.want {
			t.Errorf("%v: bucket %d, want %d", tt.took, got, tt.want)
		}
		if got < Buckets-1 && tt.took >= BucketBound(got) {
			t.Errorf("%v is in bucket %d, which ends at %v", tt.took, got, BucketBound(got))
		}
	}
}

func TestCountsAreKeptByOperation(t *testing.T) {
	var s ExportStats
	s.Done(Read, 32, 2, 30*4096, 3*time.Microsecond)
	s.Done(Read, 1, 0, 512, time.Millisecond)
	s.Fly(Flush, 3)
	s.Fly(Flush, -1)
	all := s.Snapshot()
	r := all[Read]
	if r.Requests != 33 || r.Errors != 2 || r.Bytes != 30*4096+512 || r.Total != 96*time.Microsecond+time.Millisecond {
		t.Errorf("read: got %+v", r)
	}
	if r.Histogram[2] != 32 || r.Histogram[10] != 1 {
		t.Errorf("histogram: got %v, want 32 in bucket 2 and 1 in bucket 10", r.Histogram)
	}
	if all[Flush].InFlight != 2 || all[Flush].Requests != 0 || all[Write] != (OpSnapshot{}) {
		t.Errorf("others: got %+v", all)
	}
	if got := r.Quantile(0.5); got != 4*time.Microsecond {
		t.Errorf("median: got %v, want 4µs", got)
	}
	if got := r.Quantile(1); got != 1024*time.Microsecond {
		t.Errorf("longest: got %v, want 1.024ms", got)
	}
	s.Done(Read, 1, 1, 0, time.Second)
	if d := s.Snapshot()[Read].Sub(r); d.Requests != 1 || d.Errors != 1 || d.Bytes != 0 || d.Total != time.Second || d.Histogram[20] != 1 {
		t.Errorf("difference: got %+v, want one failed read of a second", d)
	}
}

func TestNoStatsCountNothing(t *testing.T) {
	var s *ExportStats
	s.Done(Read, 1, 0, 1, 1)
	s.Fly(Read, 1)
	if s.Snapshot() != (Snapshot{}) {
		t.Error("a nil ExportStats has counted something")
	}
	if all := s.Snapshot(); all[Read].Quantile(0.5) != 0 {
		t.Error("the median of nothing is not 0")
	}
}

func TestCountingLosesNothingAndAllocatesNothing(t *testing.T) {
	var s ExportStats
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			for i := range 1000 {
				s.Done(Write, 2, 1, 10, time.Duration(i))
			}
		})
	}
	all.Wait()
	if w := s.Snapshot()[Write]; w.Requests != 8000 || w.Errors != 4000 || w.Bytes != 40000 {
		t.Errorf("got %+v, want 8000 requests, 4000 errors, 40000 bytes", w)
	}
	if n := testing.AllocsPerRun(100, func() { s.Done(Read, 1, 1, 1, 1); s.Fly(Read, 1) }); n != 0 {
		t.Errorf("allocations: got %v, want 0", n)
	}
}

func TestOperationsHaveNames(t *testing.T) {
	seen := map[string]bool{}
	for op := range Ops + 2 {
		if op.String() == "" {
			t.Errorf("operation %d has no name", op)
		}
		seen[op.String()] = true
	}
	if len(seen) != int(Ops)+1 {
		t.Errorf("names: got %v, want one for each operation and one for all others", seen)
	}
}
