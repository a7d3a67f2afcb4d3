package space

import (
	"errors"
	"fmt"
	"log/slog"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/create"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/storetest"
	"github.com/vmdiskd/vmdiskd/internal/limits"
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

// TestRunsAreZeroedOrNot frees neighbours of which some could be punched.
func TestRunsAreZeroedOrNot(t *testing.T) {
	r := newRig(t, 4096, 16, 64, create.Off)
	run := r.reserve(6 * 4096)
	r.commit()
	r.s.Drop(run.Off, 2*4096)
	if err := r.s.Release(ctx, []Ref{{run.Off + 2*4096, 4 * 4096}}); err != nil {
		t.Fatal(err)
	}
	r.s.hint = 0
	for _, want := range []Run{{run.Off, 2 * 4096, false}, {run.Off + 2*4096, 5 * 4096, true}} {
		if got := r.reserve(5 * 4096); got != want {
			t.Errorf("Reserve = %+v, want %+v", got, want)
		}
	}
}

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

// TestFullDeviceCanBeCounted fills devices to the last cluster: what could be
// reserved can be written.
func TestFullDeviceCanBeCounted(t *testing.T) {
	for _, tt := range []struct{ clusterSize, bits, more int64 }{
		{512, 64, 0}, {512, 64, 1}, {512, 64, 20}, {512, 64, 63}, {512, 64, 64}, {512, 64, 65}, {512, 64, 500},
		{512, 64, 5000}, {512, 16, 300}, {4096, 64, 700}, {512, 1, 4200},
	} {
		t.Run(fmt.Sprint(tt), func(t *testing.T) {
			r := newRig(t, tt.clusterSize, tt.bits, 200, create.Off)
			size, _ := r.tape.Size()
			size += tt.more*tt.clusterSize + 100
			r.device(size)
			free := size/tt.clusterSize - r.s.used.Len()
			taken := int64(0)
			for again := true; again; {
				n := r.fill(size)
				taken, again = taken+n, n > 0
				r.commit()
			}
			used := r.s.used.Len() - (size/tt.clusterSize - free)
			if used != free && r.s.spare > 0 {
				t.Errorf("%d of %d free clusters are used, and %d kept", used, free, r.s.spare)
			}
			if n := r.check().Leaks; n != taken {
				t.Errorf("%d leaks, want the %d that are reserved", n, taken)
			}
		})
	}
}

// fill reserves until there is no room on a device of size bytes, and returns
// how many clusters it got.
func (r *rig) fill(size int64) (n int64) {
	r.Helper()
	for {
		run, err := r.s.Reserve(r.g.ClusterSize * (1 + r.rnd.Int64N(9)))
		if errors.Is(err, backing.ErrNoSpace) {
			return n
		}
		if err != nil || run.Zeroed || run.Off+run.Len > size {
			r.Fatalf("Reserve = %+v, %v", run, err)
		}
		n += run.Len >> r.g.ClusterBits
	}
}

// onHost is a Space of an empty image on a host that is full.
func onHost(t *testing.T, cluster int64) (*Space, *storetest.Full) {
	t.Helper()
	r := newRig(t, cluster, 16, 16, create.Off)
	host, err := storetest.NewFull(ctx, r.tape)
	if err != nil {
		t.Fatal(err)
	}
	s, err := New(host, r.h, r.check(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	s.Demand()
	return s, host
}

// TestSettingAsideTakesWhatItKeeps: a host without room for all that is set aside
// at a time has room for what is needed, and loses nothing to an attempt that fails.
func TestSettingAsideTakesWhatItKeeps(t *testing.T) {
	const cluster = 64 << 10
	for _, cannotZero := range []bool{false, true} {
		s, host := onHost(t, cluster)
		host.CannotZero = cannotZero
		for _, tt := range []struct {
			room, left int64
			want       error
		}{
			{slack*cluster - hostBlock, slack*cluster - hostBlock, backing.ErrNoSpace},
			// One more is for the refcount block of those.
			{limits.FundClusters*cluster - hostBlock, (limits.FundClusters-slack-1)*cluster - hostBlock, nil},
		} {
			host.SetRoom(tt.room)
			if err := s.fill(ctx, slack); !errors.Is(err, tt.want) || host.Room() != tt.left {
				t.Errorf("cannot zero: %t, room for %d bytes: got %v with %d left, want %v with %d",
					cannotZero, tt.room, err, host.Room(), tt.want, tt.left)
			}
		}
	}
}

// TestTableWithoutStorageTakesNone: a refcount table that a full host has no
// storage for leaves it what there was.
func TestTableWithoutStorageTakesNone(t *testing.T) {
	const cluster, room = 64 << 10, 60 << 10
	s, host := onHost(t, cluster)
	if err := s.loadTable(ctx); err != nil {
		t.Fatal(err)
	}
	host.SetRoom(room)
	if _, err := s.grow(ctx, 0); !errors.Is(err, backing.ErrNoSpace) || host.Room() != room {
		t.Errorf("grow: got %v with %d left, want %v with %d", err, host.Room(), backing.ErrNoSpace, room)
	}
}

// hostBlock is the unit in which the host gives storage.
const hostBlock = 4096
