package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/open"
	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/internal/export"
)

// mute is storage that answers neither a flush nor that it is closed before answers is
// closed.
type mute struct {
	backing.Passthrough
	answers chan struct{}
}

func (m mute) Flush(ctx context.Context) error {
	<-m.answers
	return m.Next.Flush(ctx)
}

func (m mute) Close() error {
	<-m.answers
	return m.Next.Close()
}

// silence has the storage of an export fall silent until answer is called.
func silence(d *daemon, name string) (answer func()) {
	below := d.disks.find(name).stack.swap
	m := mute{backing.Passthrough{Next: below.Below()}, make(chan struct{})}
	below.To(m)
	return func() { close(m.answers) }
}

// wantByte wants what was written to an export, which is open again.
func (r *failing) wantByte(name string, want byte) {
	r.Helper()
	x, got := r.open(name), make([]byte, 512)
	defer x.Close()
	if err := x.Device.ReadAt(r.Context(), got, 0); err != nil || !bytes.Equal(got, bytes.Repeat([]byte{want}, 512)) {
		r.Errorf("export %q has bytes %x, %v, want %x", name, got[0], err, want)
	}
}

func (r *failing) write(name string, b byte) {
	r.Helper()
	x := r.open(name)
	defer x.Close()
	if err := x.Device.WriteAt(r.Context(), bytes.Repeat([]byte{b}, 512), 0, 0); err != nil {
		r.Fatal(err)
	}
}

// wantLate wants an export to be listed as one that is still being closed, which neither
// a reload changes nor a removal takes away, in bounded time, and nobody has to.
func (r *failing) wantLate(name string) {
	r.Helper()
	x, err := service{r.d}.Export(name)
	if err != nil || x.State != string(export.Draining) || x.Error != stillClosing {
		r.Errorf("export %q is %q (%s), %v, want it %s (%s)", name, x.State, x.Error, err, export.Draining, stillClosing)
	}
	if list, err := r.reload(fmt.Sprintf(failingConf, "", 4711, "")); err != nil || len(list) > 0 {
		r.Errorf("the configuration that is served: got %q, %v, want no change", list, err)
	}
	_, err = r.reload(fmt.Sprintf(failingConf, failingKey, 4711, ""))
	wantCode(r.T, "a reload that opens it anew", err, api.CodeInUse)
	r.want("after a reload that is refused", false, "a", "g", "z")
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	wantCode(r.T, "a removal", service{r.d}.Remove(ctx, name, true), api.CodeInUse)
}

// TestSilentStorageHoldsUpNoOtherThatIsTakenBack: one export of a reload that fails comes
// back when its storage answers, unless it is removed by then or the daemon stops, and
// the others do before, with all that is shared.
func TestSilentStorageHoldsUpNoOtherThatIsTakenBack(t *testing.T) {
	for _, then := range []string{"", "removal", "stop"} {
		t.Run(then, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := beginFailing(t)
				stopping, stop := context.WithCancel(t.Context())
				r.d.stopping = stopping
				r.write("s", 's')
				r.write("a", 'a')
				answer := silence(r.d, "s")
				r.fail()
				r.want("while storage is silent", false, "a", "g", "z")
				r.wantByte("a", 'a')
				r.wantLate("s")
				removed := make(chan error, 1)
				switch then {
				case "removal":
					go func() { removed <- service{r.d}.Remove(context.Background(), "s", true) }()
					synctest.Wait()
				case "stop":
					stop()
				}
				answer()
				r.d.closing.Wait()
				switch then {
				case "removal":
					if err := <-removed; err != nil || r.d.disks.get("s") != nil {
						t.Errorf("removal: got %v, and the export is %+v, want none", err, r.d.disks.get("s"))
					}
				case "stop":
					if k := r.d.disks.find("s"); k != nil {
						t.Errorf("a daemon that stops has opened %+v", k)
					}
				default:
					r.want("when storage has answered", false, "s")
					r.wantByte("s", 's')
					if _, err := r.reload(fmt.Sprintf(failingConf, failingKey, 0, "")); err != nil {
						t.Errorf("the next reload: %v", err)
					}
					r.want("after the next reload", true, "a", "g", "s")
				}
				stop()
			})
		})
	}
}

// TestSilentStorageEndsAReload that opens the export anew: none is hidden for longer, and
// all are what they were.
func TestSilentStorageEndsAReload(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := beginFailing(t)
		r.fail()
		r.write("a", 'a')
		r.write("s", 's')
		answer := silence(r.d, "s")
		_, err := r.reload(fmt.Sprintf(failingConf, failingKey+"[export.overlay]\nquota = \"1M\"\n", 0, ""))
		wantCode(t, "a reload that closes it", err, api.CodeInUse)
		r.want("after the reload", false, "a", "g", "z")
		r.wantByte("a", 'a')
		r.wantLate("s")
		answer()
		r.d.closing.Wait()
		r.want("when storage has answered", false, "s")
		r.wantByte("s", 's')
	})
}

// TestSilentExportLeavesItsAddress to others, and what had failed before it keeps what it
// holds.
func TestSilentExportLeavesItsAddress(t *testing.T) {
	t.Parallel()
	d, reload := reloaded(t)
	socket := filepath.Join(t.TempDir(), "s")
	if err := reload(inMemory("a", fmt.Sprintf("[[export.listener]]\nuri = \"nbd+unix:///?socket=%s\"\n", socket))); err != nil {
		t.Fatal(err)
	}
	k, x := d.disks.find("a"), config.Export{Name: "a"}
	failed := &disk{cfg: k.cfg, origin: fromConfig, failed: errNoAnswer}
	k.held = held{of: &x, files: open.NewTable(nil, nil)}
	want := k.held
	answer := silence(d, "a")
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := d.retire(ctx, k, failed); err != nil {
		t.Errorf("retire: %v", err)
	}
	d.disks.confirm()
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Errorf("its address: %v", err)
	} else {
		defer l.Close()
	}
	answer()
	d.closing.Wait()
	if d.disks.get("a") != failed || failed.held != want {
		t.Errorf("afterwards: got %+v, want the one that failed with what it holds", d.disks.get("a"))
	}
}

// TestExportThatFailedBeforeKeepsWhatItHolds until those have left who have opened it by
// a reload that is taken back, and which does not wait for them any more.
func TestExportThatFailedBeforeKeepsWhatItHolds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newFailing(t)
		if _, err := r.reload(inMemory("a", "")); err != nil {
			t.Fatal(err)
		}
		k, x := r.d.disks.find("a"), config.Export{Name: "a"}
		failed := &disk{cfg: k.cfg, origin: fromConfig, failed: errNoAnswer}
		k.held = held{of: &x, files: open.NewTable(nil, nil)}
		want, client := k.held, r.open("a")
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := r.d.retire(ctx, k, failed); err != nil {
			t.Errorf("retire: %v", err)
		}
		r.d.disks.confirm()
		client.Close()
		r.d.closing.Wait()
		if r.d.disks.get("a") != failed || failed.held != want {
			t.Errorf("afterwards: got %+v, want the one that failed with what it holds", r.d.disks.get("a"))
		}
	})
}

// TestStopWaitsForNoLateExportBeforeOthers are flushed.
func TestStopWaitsForNoLateExportBeforeOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := beginFailing(t)
		answer := silence(r.d, "s")
		r.fail()
		ended := make(chan error, 1)
		go func() { ended <- r.d.closeDisk() }()
		synctest.Wait()
		if n := r.d.exports.Len(); n != 1 || len(ended) > 0 {
			t.Errorf("%d exports are left, and the stop has ended: %t; want the silent one", n, len(ended) > 0)
		}
		answer()
		if err := <-ended; err != nil && !errors.Is(err, context.Canceled) {
			t.Errorf("stop: %v", err)
		}
	})
}

// TestSilentStorageMovesNoDefault: a reload that fails makes another the default, and one
// of the two falls silent. The empty name opens no disk but that which it opened before.
func TestSilentStorageMovesNoDefault(t *testing.T) {
	const chosen, other = "default = true\n", failingKey
	for _, quiet := range []string{"a", "s"} {
		t.Run(quiet, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newFailing(t)
				if _, err := r.reload(inMemory("s", "") + inMemory("a", chosen) + inMemory("z", "")); err != nil {
					t.Fatal(err)
				}
				r.write("a", 'a')
				r.write("s", 's')
				r.begin(inMemory("s", chosen+other) + inMemory("a", other) + inMemory("z", failingWindow))
				answer := silence(r.d, quiet)
				r.fail()
				if name, ok := r.d.exports.Default(); name != "a" || !ok {
					t.Errorf("while storage is silent the default is %q, want a", name)
				}
				if x, err := r.d.exports.Open(t.Context(), "", nil); err == nil {
					x.Close()
					if quiet == "a" {
						t.Errorf("the empty name opens %q although the default is away", x.Name)
					}
				} else if quiet != "a" {
					t.Errorf("the empty name opens no export: %v", err)
				}
				answer()
				r.d.closing.Wait()
				r.wantByte("", 'a')
				r.wantByte("s", 's')
			})
		})
	}
}
