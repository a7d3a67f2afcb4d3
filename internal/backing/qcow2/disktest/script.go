package disktest

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/backing"
)

// Kind of an operation.
type Kind string

// The operations of a script.
const (
	Read   Kind = "read"
	Write  Kind = "write"
	Zero   Kind = "zero"
	Trim   Kind = "trim"
	Flush  Kind = "flush"
	Reopen Kind = "reopen" // close and open; alone in its batch
)

// Op is one operation. Version tells writes apart and is above 0.
type Op struct {
	Kind    Kind
	Off, N  int64
	Flags   backing.Flags
	Version uint32
}

func (o Op) String() string {
	if o.Kind == Flush || o.Kind == Reopen {
		return string(o.Kind)
	}
	s := fmt.Sprintf("%s %d+%d", o.Kind, o.Off, o.N)
	for _, f := range []struct {
		flag backing.Flags
		text string
	}{{backing.FUA, " fua"}, {backing.NoHole, " nohole"}, {backing.FastZero, " fast"}} {
		if o.Flags&f.flag != 0 {
			s += f.text
		}
	}
	if o.Kind == Write {
		s += fmt.Sprintf(" v%d", o.Version)
	}
	return s
}

// Batch is a list of operations at the same time.
type Batch []Op

// Script is a list of batches, one after the other.
type Script []Batch

func (s Script) String() string {
	var b strings.Builder
	for i, batch := range s {
		fmt.Fprintf(&b, "%3d: ", i)
		for k, op := range batch {
			if k > 0 {
				b.WriteString(" | ")
			}
			b.WriteString(op.String())
		}
		b.WriteByte('\n')
	}
	return b.String()
}

// Shape says what scripts are like. The zero value of a field is the default.
type Shape struct {
	Size    int64  // of the disk in bytes
	Cluster int64  // a size that borders are likely to be multiples of; 4096
	Largest int64  // write in bytes; 2 MiB
	Ops     int    // 40
	Serial  bool   // one operation at a time
	Reopen  bool   // now and then
	Version uint32 // of the first write; 1
}

func (s Shape) withDefaults() Shape {
	if s.Cluster == 0 {
		s.Cluster = 4096
	}
	if s.Largest == 0 {
		s.Largest = 2 << 20
	}
	if s.Ops == 0 {
		s.Ops = 40
	}
	s.Version = max(s.Version, 1)
	return s
}

// Random makes a script. Operations gather at some spots of the disk, and each
// script has its own mixture of them.
func (s Shape) Random(rnd *rand.Rand) Script {
	s = s.withDefaults()
	spots := make([]int64, 1+rnd.IntN(6))
	for i := range spots {
		spots[i] = rnd.Int64N(s.Size)
	}
	kinds := kinds(rnd)
	var script Script
	for n := 0; n < s.Ops; {
		size := 1
		if !s.Serial && rnd.IntN(3) == 0 {
			size = 2 + rnd.IntN(7)
		}
		if s.Reopen && rnd.IntN(25) == 0 {
			script = append(script, Batch{{Kind: Reopen}})
		}
		batch := make(Batch, size)
		for i := range batch {
			batch[i] = s.op(rnd, kinds, spots)
			batch[i].Version = s.Version + uint32(n)
			n++
		}
		script = append(script, batch)
	}
	return script
}

// kinds says how often a script has each kind of operation. Some do without
// one, so that what it would have set right comes to light.
func kinds(rnd *rand.Rand) (list []Kind) {
	for _, k := range []struct {
		kind   Kind
		weight int
	}{{Write, 10}, {Zero, 3}, {Trim, 2}, {Read, 2}, {Flush, 3}} {
		n := k.weight * []int{0, 1, 1, 1, 4}[rnd.IntN(5)]
		list = append(list, slices.Repeat([]Kind{k.kind}, n)...)
	}
	return append(list, Write)
}

// op picks one operation.
func (s *Shape) op(rnd *rand.Rand, kinds []Kind, spots []int64) Op {
	op := Op{Kind: kinds[rnd.IntN(len(kinds))]}
	switch op.Kind {
	case Flush:
		return op
	case Zero:
		op.Flags = []backing.Flags{0, backing.NoHole, backing.FastZero, 0}[rnd.IntN(4)]
	}
	if op.Kind != Read && rnd.IntN(6) == 0 {
		op.Flags |= backing.FUA
	}
	op.Off, op.N = s.extent(rnd, spots)
	return op
}

// extent picks a range in the disk that likes spots and borders.
func (s *Shape) extent(rnd *rand.Rand, spots []int64) (off, n int64) {
	off = rnd.Int64N(s.Size)
	if rnd.IntN(3) > 0 {
		off = spots[rnd.IntN(len(spots))] + rnd.Int64N(6)*s.Cluster
	}
	n = 1 + rnd.Int64N(min(s.Largest, []int64{16, 512, 4096, 4 * s.Cluster, 64 * s.Cluster, s.Largest}[rnd.IntN(6)]))
	for _, unit := range []int64{s.Cluster, Sector} {
		if rnd.IntN(2) == 0 {
			off, n = off/unit*unit, (n+unit-1)/unit*unit
			break
		}
	}
	off %= s.Size
	return off, min(n, s.Size-off)
}

// shrinkTime bounds how long Shrink tries.
const shrinkTime = 15 * time.Second

// Shrink looks for a shorter script for which fails is still true, by leaving
// out ever smaller parts.
func Shrink(s Script, fails func(Script) bool) Script {
	end := time.Now().Add(shrinkTime)
	for part := (len(s) + 1) / 2; part > 0 && time.Now().Before(end); {
		shorter := false
		for at := 0; at < len(s) && time.Now().Before(end); {
			try := slices.Concat(s[:at], s[min(at+part, len(s)):])
			if len(try) > 0 && fails(try) {
				s, shorter = try, true
			} else {
				at += part
			}
		}
		if !shorter || part > len(s) {
			part /= 2
		}
	}
	return s
}
