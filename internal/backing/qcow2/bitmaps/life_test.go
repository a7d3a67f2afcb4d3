package bitmaps_test

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/bitmaps"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/space"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/storetest"
)

const lifeSize = 3<<20 + 5*512 // bytes of the disk

// known is what a bitmap should be: its bits one by one.
type known struct {
	shift uint8
	auto  bool
	bits  []bool
}

func (k *known) mark(off, n int64) {
	for i := off >> k.shift; i <= (off+n-1)>>k.shift; i++ {
		k.bits[i] = true
	}
}

// extents are what Describe should yield.
func (k *known) extents() (list []extent) {
	for i, set := range k.bits {
		off, value := int64(i)<<k.shift, uint32(0)
		if set {
			value = 1
		}
		n := min(1<<k.shift, lifeSize-off)
		if last := len(list) - 1; last >= 0 && list[last].Value == value {
			list[last].Len += n
			continue
		}
		list = append(list, extent{off, n, value})
	}
	return list
}

// life is an image whose bitmaps are used at random.
type life struct {
	judge
	r     *rand.Rand
	st    *storetest.Crash
	s     *bitmaps.Set
	h     *format.Header
	sp    *space.Space
	all   map[string]*known
	file  map[string]bool // bitmaps that the file has as those that writes change
	added int
}

// TestRandomLifeOfBitmaps does anything in any order, cuts the power before
// each sync, and opens the image anew now and then.
func TestRandomLifeOfBitmaps(t *testing.T) {
	seed := rand.Uint64()
	for i, clusterSize := range []string{"512", "4k", "64k"} {
		t.Run(clusterSize, func(t *testing.T) {
			b := create(t, "cluster_size="+clusterSize, fmt.Sprint(lifeSize))
			l := &life{judge: judge{T: t, right: map[string][]string{}}, r: rand.New(rand.NewPCG(seed, uint64(i))),
				st: storetest.NewCrash(storetest.New(b)), all: map[string]*known{}}
			l.open()
			for step := range 150 {
				what := fmt.Sprintf("seed %d, step %d", seed, step)
				l.st.SetHook(func(c storetest.Call) {
					if c.Op == storetest.Sync && !c.Done {
						for name, m := range l.st.Crashes(l.r, 4) {
							l.judge.judge(what+", "+name, m)
						}
					}
				})
				if l.step(what); step%20 == 19 {
					l.save(what)
				}
			}
			if l.added < 2 {
				t.Errorf("seed %d: %d bitmaps", seed, l.added)
			}
		})
	}
}

// open opens the image anew.
func (l *life) open() {
	l.s, l.h = load(l, l.st)
	first := *l.h
	l.header = &first
	l.sp = allocator(l, l.st, l.h)
}

// any picks a bitmap.
func (l *life) any() string {
	names := slices.Sorted(maps.Keys(l.all))
	return names[l.r.IntN(len(names))]
}

func (l *life) step(what string) {
	n := l.r.IntN(12)
	if len(l.all) == 0 && n > 1 {
		n = 0
	}
	switch n {
	case 0:
		l.add()
	case 1:
		l.save(what)
	case 2:
		name := l.any()
		must(l, l.s.Clear(name))
		clear(l.all[name].bits)
	case 3:
		l.merge(l.any(), l.any())
	case 4:
		name := l.any()
		must(l, l.s.Enable(name))
		l.all[name].auto = true
	case 5:
		name := l.any()
		must(l, l.s.Disable(name))
		l.all[name].auto = false
	case 6:
		name := l.any()
		must(l, l.s.Remove(name))
		delete(l.all, name)
	default:
		l.write()
	}
	for name, k := range l.all {
		if got, want := described(l, l.s, l.h, name), k.extents(); !slices.Equal(got, want) {
			l.Fatalf("%s: bitmap %q: got %v, want %v", what, name, got, want)
		}
	}
}

func (l *life) add() {
	shift := uint8(9 + l.r.IntN(12))
	k := &known{shift: shift, auto: l.r.IntN(3) > 0, bits: make([]bool, (lifeSize-1)>>shift+1)}
	name := fmt.Sprintf("bitmap %d", l.added)
	l.added++
	must(l, l.s.Add(name, shift, k.auto))
	l.all[name] = k
}

func (l *life) merge(dst, src string) {
	must(l, l.s.Merge(dst, src))
	to, from := l.all[dst], l.all[src]
	for i, set := range slices.Clone(from.bits) {
		if off := int64(i) << from.shift; set {
			to.mark(off, min(1<<from.shift, lifeSize-off))
		}
	}
}

// write is what a writer of the disk does.
func (l *life) write() {
	must(l, l.s.Begin(ctx))
	off := l.r.Int64N(lifeSize)
	n := 1 + l.r.Int64N(min(lifeSize-off, 1<<l.r.IntN(22)))
	l.s.Mark(off, n)
	for name, k := range l.all {
		if k.auto {
			k.mark(off, n)
		}
		if k.auto {
			delete(l.right, name)
		}
	}
	for name := range l.file {
		delete(l.right, name)
	}
}

// save saves, and judges what the file has then.
func (l *life) save(what string) {
	for name, k := range l.all {
		l.right[name] = append(l.right[name], fmt.Sprint(k.extents()))
	}
	must(l, l.s.Save(ctx, l.sp))
	must(l, l.sp.Trim(ctx))
	must(l, l.st.Sync(ctx))
	if r := audit(l, l.st); r.Corruptions+r.Leaks != 0 {
		l.Fatalf("%s: %v", what, r.Problems)
	}
	l.right, l.file = map[string][]string{}, map[string]bool{}
	for name, k := range l.all {
		l.right[name] = []string{fmt.Sprint(k.extents())}
		if k.auto {
			l.file[name] = true
		}
	}
	if got := l.judge.judge(what, storetest.New(l.st.Contents())); got != len(l.all) {
		l.Fatalf("%s: %d bitmaps in the file, want %d", what, got, len(l.all))
	}
	if l.r.IntN(2) == 0 {
		l.open()
	}
}
