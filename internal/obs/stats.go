package obs

import (
	"math/bits"
	"sync/atomic"
	"time"
)

// Op is what a request asks for.
type Op uint8

// The operations that are counted. NoOp is for requests that are none of them.
const (
	Read Op = iota
	Write
	Flush
	Trim
	Zero
	Cache
	Extents
	Ops  // how many there are
	NoOp = Ops
)

var opNames = [Ops]string{"read", "write", "flush", "trim", "zero", "cache", "block-status"}

// String is the name in metrics and events.
func (o Op) String() string {
	if o < Ops {
		return opNames[o]
	}
	return "other"
}

// Buckets of a latency histogram: bucket i counts what took less than 2^i
// microseconds and was not counted by a bucket before it. The last one takes
// what is longer, too.
const Buckets = 32

// bucketOf finds the bucket of a latency.
func bucketOf(d time.Duration) int {
	return min(bits.Len64(uint64(max(d, 0)/time.Microsecond)), Buckets-1)
}

// BucketBound is the upper bound of bucket i, exclusive.
func BucketBound(i int) time.Duration { return time.Microsecond << i }

// opStats is one operation's row. Its requests are the sum of its histogram.
type opStats struct {
	errors, bytes, nanos atomic.Uint64
	flying               atomic.Int64
	histogram            [Buckets]atomic.Uint64
}

// ExportStats counts the requests of one export, over all of its connections
// and from its beginning. All methods may be called at any time, take no lock
// and do nothing for a nil ExportStats. Its zero value is ready.
type ExportStats struct{ ops [Ops]opStats }

// Done counts n requests that ended after took each: bytes is what those that
// succeeded moved or covered, failed how many did not succeed. op is below
// Ops.
func (s *ExportStats) Done(op Op, n, failed, bytes uint64, took time.Duration) {
	if s == nil {
		return
	}
	o := &s.ops[op]
	o.histogram[bucketOf(took)].Add(n)
	o.nanos.Add(n * uint64(max(took, 0)))
	if bytes > 0 {
		o.bytes.Add(bytes)
	}
	if failed > 0 {
		o.errors.Add(failed)
	}
}

// Fly counts n requests that wait for the storage, or with a negative n those
// that do so no more. Requests that are answered at once are never counted
// here. op is below Ops.
func (s *ExportStats) Fly(op Op, n int64) {
	if s != nil {
		s.ops[op].flying.Add(n)
	}
}

// OpSnapshot is what was counted of one operation.
type OpSnapshot struct {
	Requests  uint64          // answered
	Errors    uint64          // of Requests, those answered with an error
	Bytes     uint64          // moved or covered by those that succeeded
	InFlight  int64           // waiting for the storage now
	Total     time.Duration   // sum of the latencies
	Histogram [Buckets]uint64 // of the latencies, see Buckets
}

// Quantile bounds the latency that the fraction q of the requests stayed
// below: the upper bound of the bucket where it lies. It is 0 without
// requests.
func (o *OpSnapshot) Quantile(q float64) time.Duration {
	want, sum := uint64(q*float64(o.Requests)), uint64(0)
	for i, n := range o.Histogram {
		if sum += n; n > 0 && sum >= want {
			return BucketBound(i)
		}
	}
	return 0
}

// Sub is what was counted since an earlier snapshot of the same export.
// InFlight stays that of o.
func (o OpSnapshot) Sub(earlier OpSnapshot) OpSnapshot {
	o.Requests -= earlier.Requests
	o.Errors -= earlier.Errors
	o.Bytes -= earlier.Bytes
	o.Total -= earlier.Total
	for i := range o.Histogram {
		o.Histogram[i] -= earlier.Histogram[i]
	}
	return o
}

// Snapshot is what was counted of one export, by Op.
type Snapshot [Ops]OpSnapshot

// Snapshot reads the counters one by one: requests that end meanwhile may be
// in some and not yet in others, but within a row Requests is the sum of
// Histogram. It is zero for a nil ExportStats.
func (s *ExportStats) Snapshot() (all Snapshot) {
	if s == nil {
		return all
	}
	for i := range s.ops {
		from, to := &s.ops[i], &all[i]
		for b := range from.histogram {
			to.Histogram[b] = from.histogram[b].Load()
			to.Requests += to.Histogram[b]
		}
		to.Errors = from.errors.Load()
		to.Bytes = from.bytes.Load()
		to.InFlight = from.flying.Load()
		to.Total = time.Duration(from.nanos.Load())
	}
	return all
}
