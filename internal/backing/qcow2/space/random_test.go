package space

import (
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/create"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/storetest"
)

// walk is a random use of a Space.
type walk struct {
	*rig
	reserved []Run // not linked
	counted  bool  // all of reserved is counted, durably
}

func (w *walk) step() {
	w.Helper()
	switch w.rnd.IntN(12) {
	case 0, 1, 2, 3:
		w.reserved = append(w.reserved, w.reserve(1+w.rnd.Int64N(40*w.g.ClusterSize)))
		w.counted = false
	case 4:
		w.reserved = append(w.reserved, w.reserveMeta(1+w.rnd.Int64N(5*w.g.ClusterSize)))
		w.counted = false
	case 5, 6:
		w.drop()
	case 7:
		w.release()
	case 8, 9:
		w.linkSome()
	case 10:
		w.fail()
	case 11:
		w.write()
	}
}

// drop drops the end of a run.
func (w *walk) drop() {
	if len(w.reserved) == 0 {
		return
	}
	run := &w.reserved[w.rnd.IntN(len(w.reserved))]
	n := (1 + w.rnd.Int64N(run.Len>>w.g.ClusterBits)) << w.g.ClusterBits
	w.s.Drop(run.Off+run.Len-n, n)
	run.Len -= n
	w.reserved = slices.DeleteFunc(w.reserved, func(r Run) bool { return r.Len == 0 })
}

// release takes mappings away; at times the call fails half way.
func (w *walk) release() {
	w.Helper()
	var refs []Ref
	guest := slices.Sorted(maps.Keys(w.hosts))
	w.rnd.Shuffle(len(guest), func(i, j int) { guest[i], guest[j] = guest[j], guest[i] })
	for _, i := range guest[:min(30, len(guest))] {
		refs = append(refs, w.unlink(i))
	}
	if w.rnd.IntN(2) == 0 {
		w.tape.FailCall(1+w.rnd.IntN(4), syscall.EIO)
	}
	syncs := w.tape.Count(storetest.Sync)
	err := w.s.Release(ctx, refs)
	w.failed(err, syncs)
}

// failed looks at what a call left that had syncs before it. One with a sync
// that failed is a crash.
func (w *walk) failed(err error, syncs int) {
	w.Helper()
	w.tape.FailCall(0, nil)
	switch {
	case err == nil:
	case !w.s.Pending():
		w.Fatalf("nothing is pending after %v", err)
	case w.tape.Count(storetest.Sync) > syncs:
		w.reopen()
		w.reserved, w.counted = nil, false
	}
}

func (w *walk) write() {
	w.Helper()
	w.commit()
	w.counted = true
}

// linkSome links what is data and counted.
func (w *walk) linkSome() {
	w.Helper()
	if !w.counted {
		w.write()
	}
	w.reserved = slices.DeleteFunc(w.reserved, func(r Run) bool {
		if int64(len(w.free)) < r.Len>>w.g.ClusterBits || w.s.IsMeta(r.Off, r.Len) || w.rnd.IntN(2) == 0 {
			return false
		}
		w.link(r)
		return true
	})
}

// fail is a Write with a failure.
func (w *walk) fail() {
	w.Helper()
	syncs := w.tape.Count(storetest.Sync)
	w.tape.FailCall(1+w.rnd.IntN(8), syscall.EIO)
	err := w.s.Write(ctx)
	w.failed(err, syncs)
}

func TestRandomUseIsSoundAtEveryInstant(t *testing.T) {
	for _, tt := range []struct{ clusterSize, bits, guest int64 }{
		{512, 1, 6000}, {512, 2, 3000}, {512, 4, 3000}, {512, 8, 2000}, {512, 16, 2000}, {512, 32, 2000},
		{512, 64, 3600}, {1024, 64, 800}, {4096, 16, 600}, {65536, 64, 60},
	} {
		mode := create.Off
		if tt.bits >= 8 {
			mode = create.Metadata
		}
		t.Run(fmt.Sprintf("%d/%d", tt.clusterSize, tt.bits), func(t *testing.T) {
			w := walk{rig: newRig(t, tt.clusterSize, tt.bits, tt.guest, mode)}
			w.watch(4)
			for range 120 {
				w.step()
			}
			w.write()
			for _, run := range w.reserved {
				w.s.Drop(run.Off, run.Len)
			}
			w.write()
			w.check()
			if err := w.s.Trim(ctx); err != nil {
				t.Fatal(err)
			}
			w.qemu()
		})
	}
}

// qemu lets qemu-img judge the image: leaks there may be, of crashes.
func (r *rig) qemu() {
	r.Helper()
	path := filepath.Join(r.TempDir(), "image")
	if err := os.WriteFile(path, r.tape.Contents(), 0o600); err != nil {
		r.Fatal(err)
	}
	const leaks = 3
	c := exec.Command("qemu-img", "check", "-q", "-f", "qcow2", path)
	if out, err := c.CombinedOutput(); err != nil && c.ProcessState.ExitCode() != leaks {
		r.Fatalf("qemu-img check: %v: %s", err, out)
	}
	if n := r.check().Leaks; (n > 0) != (c.ProcessState.ExitCode() == leaks) {
		r.Fatalf("%d leaks, and qemu-img answers %d", n, c.ProcessState.ExitCode())
	}
}
