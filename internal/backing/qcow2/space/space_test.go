package space

import (
	"errors"
	"fmt"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/create"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/storetest"
)

func TestReservedIsCountedOnceWritten(t *testing.T) {
	for _, clusterSize := range []int64{512, 4 << 10, 64 << 10, 2 << 20} {
		for _, bits := range []int64{1, 2, 4, 8, 16, 32, 64} {
			t.Run(fmt.Sprintf("%d/%d", clusterSize, bits), func(t *testing.T) {
				r := newRig(t, clusterSize, bits, 64, create.Off)
				run := r.reserve(3 * clusterSize)
				if run.Len != 3*clusterSize || !run.Zeroed {
					t.Errorf("got %+v at the end of the file, want 3 zeroed clusters", run)
				}
				if !r.s.Pending() {
					t.Error("nothing is pending after Reserve")
				}
				r.commit()
				if n := r.check().Leaks; n != 0 && n != 3 {
					t.Errorf("%d leaks before the link, want 3 or, behind the end of the file, none", n)
				}
				r.link(run)
				r.commit()
				r.sound()
			})
		}
	}
}

func TestDroppedIsFreeAndNotZeroed(t *testing.T) {
	r := newRig(t, 512, 16, 64, create.Off)
	for _, write := range []bool{false, true} {
		run := r.reserve(1024)
		if write {
			r.extend(run)
			r.commit()
			if n := r.check().Leaks; n != 2 {
				t.Errorf("%d leaks, want 2", n)
			}
		}
		r.s.Drop(run.Off, run.Len)
		again := r.reserve(1024)
		if again.Off != run.Off || again.Zeroed {
			t.Errorf("after Drop of %+v: Reserve = %+v, want the same, not zeroed", run, again)
		}
		r.s.Drop(again.Off, again.Len)
		r.commit()
		r.sound()
	}
}

func TestReleasedIsPunchedAndZeroed(t *testing.T) {
	r := newRig(t, 4096, 16, 64, create.Off)
	run := r.reserve(2 * 4096)
	r.commit()
	r.link(run)
	var refs []Ref
	for i := range r.hosts {
		refs = append(refs, r.unlink(i))
	}
	if len(refs) != 2 {
		t.Fatalf("%d clusters are mapped, want 2", len(refs))
	}
	if err := r.s.Release(ctx, []Ref{run.ref()}); err != nil {
		t.Fatal(err)
	}
	if n := r.tape.Count(storetest.Punch); n != 1 {
		t.Errorf("%d punches of one run, want 1", n)
	}
	r.commit()
	r.sound()
	r.s.hint = 0
	if again := r.reserve(2 * 4096); again.Off != run.Off || again.Len != run.Len || !again.Zeroed {
		t.Errorf("Reserve = %+v, want the released %+v, zeroed", again, run)
	}
}

func (r Run) ref() Ref { return Ref{r.Off, r.Len} }

func TestUnpunchedIsNotZeroed(t *testing.T) {
	r := newRig(t, 4096, 16, 64, create.Off)
	run := r.reserve(4096)
	r.commit()
	r.link(run)
	ref := r.unlink(63 - int64(len(r.free)))
	r.tape.FailOp(storetest.Punch, 1, backing.ErrNotSupported)
	if err := r.s.Release(ctx, []Ref{ref}); err != nil {
		t.Fatal(err)
	}
	r.s.hint = 0
	if again := r.reserve(4096); again.Off != run.Off || again.Zeroed {
		t.Errorf("Reserve = %+v, want %+v, not zeroed", again, run)
	}
}

func TestFullDeviceHasNoSpace(t *testing.T) {
	r := newRig(t, 512, 64, 200, create.Off)
	size, _ := r.tape.Size()
	r.tape.Mem.SetFixed(true)
	r.tape.Mem.Cut(size + 20*512 + 100)
	r.tape.size = size + 20*512 + 100
	r.open()
	n := 0
	for {
		run, err := r.s.Reserve(512)
		if errors.Is(err, backing.ErrNoSpace) {
			break
		}
		if err != nil || run.Zeroed || run.Off+run.Len > size+20*512 {
			t.Fatalf("Reserve = %+v, %v", run, err)
		}
		n++
	}
	if n != 20 {
		t.Errorf("%d clusters of 20 could be reserved", n)
	}
	r.commit()
	r.check()
}
