package space

import (
	"errors"
	"fmt"
	"syscall"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/create"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/storetest"
)

// growing are images in which the next reservations need several refcount
// blocks, and a larger refcount table where that is near.
var growing = []struct {
	name                      string
	clusterSize, bits, mapped int64
	want                      int64 // clusters to reserve
	more                      int64 // clusters to reserve after a failure
	moves                     bool
}{
	{"a block", 512, 16, 150, 150, 100, false},
	{"self counted blocks", 512, 64, 10, 300, 100, false},
	{"the table", 512, 64, 3950, 100, 4500, true},
	{"the table by far", 512, 64, 3950, 4500, 100, true},
	{"the table of 32 bits", 512, 32, 7800, 600, 100, true},
	{"1 bit", 512, 1, 3900, 600, 4000, false},
}

func (r *rig) reserveAll(n int64) (runs []Run) {
	r.Helper()
	for n > 0 {
		run := r.reserve(n * r.g.ClusterSize)
		runs = append(runs, run)
		n -= run.Len >> r.g.ClusterBits
	}
	return runs
}

func TestGrowthIsSoundAtEveryInstant(t *testing.T) {
	for _, tt := range growing {
		t.Run(tt.name, func(t *testing.T) {
			r := newRig(t, tt.clusterSize, tt.bits, tt.mapped, create.Metadata)
			table := r.h.RefTableOffset
			r.watch(1)
			runs := r.reserveAll(tt.want)
			r.commit()
			if moved := r.header(r.tape.Clone()).RefTableOffset != table; moved != tt.moves {
				t.Errorf("the refcount table moved: %v, want %v", moved, tt.moves)
			}
			for _, run := range runs {
				r.s.Drop(run.Off, run.Len)
			}
			r.commit()
			r.sound()
			r.open()
			r.reserveAll(tt.want)
			r.commit()
			r.check()
		})
	}
}

// TestEveryFailureOfGrowthIsSurvived makes each call fail in turn, but for
// some of many alike, tries again, and looks at the image now and then.
func TestEveryFailureOfGrowthIsSurvived(t *testing.T) {
	for _, tt := range growing {
		for _, cause := range []error{syscall.ENOSPC, syscall.EIO} {
			t.Run(fmt.Sprint(tt.name, " ", cause), func(t *testing.T) {
				origin := newRig(t, tt.clusterSize, tt.bits, tt.mapped, create.Metadata)
				for n := 1; origin.failOnce(n, cause, tt.want, tt.more); n += 1 + n/4 {
				}
			})
		}
	}
}

// failOnce makes call n of a Write fail; false when there are fewer.
func (origin *rig) failOnce(n int, cause error, want, more int64) bool {
	origin.Helper()
	r := origin.clone()
	r.watch(40)
	runs := r.reserveAll(want)
	syncs := r.tape.Count(storetest.Sync)
	r.tape.FailCall(n, cause)
	err := r.s.Write(ctx)
	if err == nil {
		r.tape.FailCall(0, nil)
		return false
	}
	if backing.KindOf(err) != backing.KindOf(cause) || !errors.Is(err, cause) {
		r.Fatalf("call %d: got %v, want %v", n, err, cause)
	}
	if !r.s.Pending() {
		r.Fatalf("call %d: nothing is pending after %v", n, err)
	}
	for i, run := range runs {
		if i%2 == 0 {
			r.s.Drop(run.Off, r.g.ClusterSize)
		}
	}
	extra := r.reserveAll(more)
	if err := r.s.Write(ctx); errors.Is(err, backing.ErrPoisoned) || errors.Is(err, cause) && r.tape.Count(storetest.Sync) > syncs {
		r.reopen() // a failed sync is for good
		r.check()
		return true
	} else if err != nil {
		r.Fatalf("call %d: Write again: %v", n, err)
	}
	r.commit()
	for i, run := range runs {
		if i%2 == 0 {
			run = Run{Off: run.Off + r.g.ClusterSize, Len: run.Len - r.g.ClusterSize}
		}
		r.s.Drop(run.Off, run.Len)
	}
	for _, run := range extra {
		r.s.Drop(run.Off, run.Len)
	}
	r.commit()
	r.sound()
	return true
}

// reopen is a crash and what comes after.
func (r *rig) reopen() {
	r.Helper()
	r.load(r.crash())
}
