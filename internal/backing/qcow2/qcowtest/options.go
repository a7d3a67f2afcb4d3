package qcowtest

import (
	"fmt"
	"math/rand/v2"
	"strings"
)

// Options of one image, as qemu-img names them.
type Options struct {
	Compat        string // "0.10" or "1.1"
	ClusterSize   int64
	RefcountBits  int
	ExtendedL2    bool
	LazyRefcounts bool
	Compression   string // "" for no compressed clusters, "zlib" or "zstd"
	Backing       Backing
	DataFile      string // "", "plain" or "raw"
	Preallocation string // "off", "metadata", "falloc" or "full"
	Snapshots     int
	Bitmaps       int
	Shape         Shape
}

// Backing says what lies below the top image.
type Backing string

// What may lie below. Smaller and larger compare the size with that of the
// top image.
const (
	NoBacking   Backing = "none"
	RawEqual    Backing = "raw"
	RawSmaller  Backing = "raw-smaller"
	RawLarger   Backing = "raw-larger"
	Qcow2       Backing = "qcow2"
	Qcow2Small  Backing = "qcow2-smaller"
	Qcow2Depth2 Backing = "qcow2-2"
	Qcow2Depth5 Backing = "qcow2-5"
)

// Shape says how large the disk is.
type Shape string

// Sizes of a disk; cs is the size of a cluster.
const (
	Empty     Shape = "0"
	Sector    Shape = "512"
	BelowOne  Shape = "cs-512"
	AboveOne  Shape = "cs+512"
	AboveL2   Shape = "l2+cs"
	OddMiddle Shape = "odd"
)

const middle = 3<<20 + 7*512

// Size of the disk in bytes.
func (o Options) Size() int64 {
	switch o.Shape {
	case Empty:
		return 0
	case Sector:
		return 512
	case BelowOne:
		return max(512, o.ClusterSize-512)
	case AboveOne:
		return o.ClusterSize + 512
	case AboveL2:
		return o.ClusterSize/o.entry()*o.ClusterSize + o.ClusterSize
	}
	return middle
}

func (o Options) entry() int64 {
	if o.ExtendedL2 {
		return 16
	}
	return 8
}

// String is fit for the name of a test.
func (o Options) String() string {
	s := []string{o.Compat, fmt.Sprint(o.ClusterSize), fmt.Sprintf("rc%d", o.RefcountBits)}
	for _, f := range []struct {
		on   bool
		text string
	}{
		{o.ExtendedL2, "ext"}, {o.LazyRefcounts, "lazy"}, {o.Compression != "", o.Compression},
		{o.Backing != NoBacking, string(o.Backing)}, {o.DataFile != "", "data-" + o.DataFile},
		{o.Preallocation != "off", o.Preallocation}, {o.Snapshots > 0, fmt.Sprintf("snap%d", o.Snapshots)},
		{o.Bitmaps > 0, fmt.Sprintf("bitmap%d", o.Bitmaps)}, {true, "size-" + string(o.Shape)},
	} {
		if f.on {
			s = append(s, f.text)
		}
	}
	return strings.Join(s, ",")
}

// maxPreallocated bounds the disks that are allocated in full.
const maxPreallocated = 8 << 20

// valid reports whether QEMU can make the image, and at moderate cost.
func (o Options) valid() bool {
	v3, size := o.Compat == "1.1", o.Size()
	switch {
	case !v3 && (o.RefcountBits != 16 || o.ExtendedL2 || o.LazyRefcounts || o.Compression == "zstd" ||
		o.DataFile != "" || o.Bitmaps > 0):
		return false
	case o.ExtendedL2 && o.ClusterSize < 16<<10:
		return false
	case o.DataFile != "" && (o.Compression != "" || o.Snapshots > 0 || o.Bitmaps > 0):
		return false
	case o.DataFile == "raw" && o.Backing != NoBacking:
		return false
	case o.Preallocation != "off" && o.Backing != NoBacking && !o.ExtendedL2:
		return false
	case o.Preallocation != "off" && o.Compression != "": // compression overwrites nothing
		return false
	case o.Preallocation != "off" && o.Preallocation != "metadata" && size > maxPreallocated:
		return false
	case o.Shape == AboveL2 && o.ClusterSize > 64<<10:
		return false
	case o.Shape == BelowOne && o.ClusterSize == 512: // the same as Sector
		return false
	}
	return o.countable()
}

// countable reports whether the refcounts suffice.
func (o Options) countable() bool {
	switch {
	case o.Snapshots > 0 && o.Compression != "":
		return o.RefcountBits >= 16
	case o.Snapshots > 0:
		return o.Snapshots < 1<<min(o.RefcountBits, 16)-1
	}
	return true
}

// axes are the values of each field, by axis.
var axes = [][]func(*Options){
	axis(func(o *Options, v string) { o.Compat = v }, "0.10", "1.1"),
	axis(func(o *Options, v int64) { o.ClusterSize = v }, 512, 1<<10, 4<<10, 64<<10, 256<<10, 2<<20),
	axis(func(o *Options, v int) { o.RefcountBits = v }, 1, 2, 4, 8, 16, 32, 64),
	axis(func(o *Options, v bool) { o.ExtendedL2 = v }, false, true),
	axis(func(o *Options, v bool) { o.LazyRefcounts = v }, false, true),
	axis(func(o *Options, v string) { o.Compression = v }, "", "zlib", "zstd"),
	axis(func(o *Options, v Backing) { o.Backing = v }, NoBacking, RawEqual, RawSmaller, RawLarger, Qcow2,
		Qcow2Small, Qcow2Depth2, Qcow2Depth5),
	axis(func(o *Options, v string) { o.DataFile = v }, "", "plain", "raw"),
	axis(func(o *Options, v string) { o.Preallocation = v }, "off", "metadata", "falloc", "full"),
	axis(func(o *Options, v int) { o.Snapshots = v }, 0, 1, 3),
	axis(func(o *Options, v int) { o.Bitmaps = v }, 0, 2),
	axis(func(o *Options, v Shape) { o.Shape = v }, Empty, Sector, BelowOne, AboveOne, AboveL2, OddMiddle),
}

func axis[T any](set func(*Options, T), values ...T) []func(*Options) {
	fs := make([]func(*Options), len(values))
	for i, v := range values {
		fs[i] = func(o *Options) { set(o, v) }
	}
	return fs
}

// row is one choice: the number of the value on each axis.
type row []int

func (r row) options() Options {
	var o Options
	for a, v := range r {
		axes[a][v](&o)
	}
	return o
}

// pair is two values on two axes, the lower axis first.
type pair struct{ a, av, b, bv int }

// pairs calls f for each pair of r.
func (r row) pairs(f func(pair)) {
	for a := range r {
		for b := a + 1; b < len(r); b++ {
			f(pair{a, r[a], b, r[b]})
		}
	}
}

const (
	guesses    = 5000 // rows tried before a pair counts as impossible
	candidates = 40   // valid rows of which the best is taken
)

// Pairwise is a set of options in which every possible pair of values occurs.
// A valid image is found by guessing, so that a rare pair may be missing; the
// same seed gives the same set.
func Pairwise(seed uint64) []Options {
	rnd := rand.New(rand.NewPCG(seed, 0))
	open := allPairs()
	missing := make(map[pair]bool, len(open))
	for _, p := range open {
		missing[p] = true
	}
	var all []Options
	for _, p := range open {
		if !missing[p] {
			continue
		}
		delete(missing, p)
		if best := bestRow(rnd, p, missing); best != nil {
			best.pairs(func(p pair) { delete(missing, p) })
			all = append(all, best.options())
		}
	}
	return all
}

// allPairs are the pairs of all axes, in order.
func allPairs() []pair {
	var all []pair
	for a := range axes {
		for b := a + 1; b < len(axes); b++ {
			for av := range axes[a] {
				for bv := range axes[b] {
					all = append(all, pair{a, av, b, bv})
				}
			}
		}
	}
	return all
}

// bestRow is the valid row with p, of some, that has most of missing; nil when
// none was found.
func bestRow(rnd *rand.Rand, p pair, missing map[pair]bool) row {
	var best row
	most, found := -1, 0
	for range guesses {
		r := make(row, len(axes))
		for a := range r {
			r[a] = rnd.IntN(len(axes[a]))
		}
		r[p.a], r[p.b] = p.av, p.bv
		if !r.options().valid() {
			continue
		}
		n := 0
		r.pairs(func(p pair) {
			if missing[p] {
				n++
			}
		})
		if n > most {
			best, most = r, n
		}
		if found++; found == candidates {
			break
		}
	}
	return best
}
