package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/mem"
	"github.com/vmdiskd/vmdiskd/internal/backing/open"
	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/engine/bufpool"
	"github.com/vmdiskd/vmdiskd/internal/export"
	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd"
)

// TestLateRemovalForgetsNoOther: the name of what it removed may be another
// export's by then.
func TestLateRemovalForgetsNoOther(t *testing.T) {
	var s disks
	first, second := &disk{cfg: config.Export{Name: "a"}}, &disk{cfg: config.Export{Name: "a"}}
	if err := s.claim(first); err != nil {
		t.Fatal(err)
	}
	s.forget(first, nil)
	if err := s.claim(second); err != nil {
		t.Fatal(err)
	}
	s.forget(first, nil)
	if s.get("a") != second {
		t.Error("the second export of the name is forgotten with the first")
	}
}

// TestExportBeingPublishedIsNotForgotten: a removal that comes when the image is
// open and the export not ready yet is refused, and leaves it as it is.
func TestExportBeingPublishedIsNotForgotten(t *testing.T) {
	d := &daemon{exports: export.NewRegistry()}
	k := &disk{cfg: config.Export{Name: "a"}}
	if err := d.disks.claim(k); err != nil {
		t.Fatal(err)
	}
	err := d.exports.AddOpening(export.Spec{Name: "a", Owner: k}, func() (backing.Device, error) {
		k.stack = &stack{}
		if err := d.removeExport(t.Context(), k, nil); !errors.Is(err, nbd.ErrUnknownExport) {
			t.Errorf("removal before it is ready: got %v, want %v", err, nbd.ErrUnknownExport)
		}
		return mem.New(4096, nil), nil
	})
	if err != nil || d.disks.get("a") != k {
		t.Fatalf("afterwards: got %p, %v, want the export", d.disks.get("a"), err)
	}
	if err := d.removeExport(t.Context(), k, nil); err != nil || d.disks.get("a") != nil {
		t.Errorf("removal of what is ready: got %v", err)
	}
}

// TestRemovalOutOfTimeCutsNobodyOff: an export whose turn in a reload comes when its
// time is over keeps its clients, who are waited for in the background.
func TestRemovalOutOfTimeCutsNobodyOff(t *testing.T) {
	d := &daemon{exports: export.NewRegistry()}
	k := &disk{cfg: config.Export{Name: "a"}}
	err := d.disks.claim(k)
	if err == nil {
		err = d.exports.AddOpening(export.Spec{Name: "a", Owner: k}, func() (backing.Device, error) {
			k.stack = &stack{}
			return mem.New(4096, nil), nil
		})
	}
	if err != nil {
		t.Fatal(err)
	}
	over, cancel := context.WithDeadline(t.Context(), time.Now())
	defer cancel()
	if err := d.removeExport(over, k, nil); !errors.Is(err, export.ErrInUse) || d.disks.get("a") != k {
		t.Errorf("removal out of time: got %v, want %v", err, export.ErrInUse)
	}
	if x, ok := d.exports.StatusOf("a"); !ok || x.State != export.Ready {
		t.Errorf("the export is %v, want it ready", x.State)
	}
}

// TestRemovalThatHasWaitedTakesNoOtherAway: another removal has come before it, and
// the name is another export's.
func TestRemovalThatHasWaitedTakesNoOtherAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &daemon{exports: export.NewRegistry()}
		add := func() *disk {
			k := &disk{cfg: config.Export{Name: "a"}, stack: &stack{}}
			if err := errors.Join(d.disks.claim(k), d.exports.Add(export.Spec{Name: "a", Owner: k, Device: mem.New(4096, nil)})); err != nil {
				t.Fatal(err)
			}
			return k
		}
		first := add()
		first.busy.Lock()
		removed := make(chan error, 1)
		go func() { removed <- d.removeExport(context.Background(), first, nil) }()
		synctest.Wait()
		if err := d.exports.Remove(t.Context(), "a", first, false); err != nil {
			t.Fatal(err)
		}
		d.disks.forget(first, nil)
		second := add()
		first.busy.Unlock()
		if err := <-removed; !errors.Is(err, errAway) {
			t.Errorf("removal of the first: got %v, want %v", err, errAway)
		}
		if x, ok := d.exports.StatusOf("a"); !ok || x.State != export.Ready || d.disks.get("a") != second || first.leaving != 0 {
			t.Errorf("the second export of the name: got %+v, %t, %d removals of the first, want it ready and none", x, ok, first.leaving)
		}
	})
}

// TestRemovalOfWhatHasGoneTakesNoOtherAway: the name is another export's although
// it was that of the first a moment ago.
func TestRemovalOfWhatHasGoneTakesNoOtherAway(t *testing.T) {
	d := &daemon{exports: export.NewRegistry()}
	first, second := &disk{cfg: config.Export{Name: "a"}, stack: &stack{}}, &disk{}
	if err := errors.Join(d.disks.claim(first), d.exports.Add(export.Spec{Name: "a", Owner: second, Device: mem.New(4096, nil)})); err != nil {
		t.Fatal(err)
	}
	if err := d.removeExport(t.Context(), first, nil); !errors.Is(err, nbd.ErrUnknownExport) {
		t.Errorf("removal of the first: got %v, want %v", err, nbd.ErrUnknownExport)
	}
	if x, ok := d.exports.StatusOf("a"); !ok || x.State != export.Ready {
		t.Errorf("the second export of the name: got %+v, %t, want it ready", x, ok)
	}
}

// TestClaimedNameIsNoneOfAReload: an export that was allowed before a reload began
// is looked at again when it has its name, which the reload looks for.
func TestClaimedNameIsNoneOfAReload(t *testing.T) {
	d := emptyService(t)
	d.conf.Store(&config.Config{Groups: map[string]config.Rate{"g": {Ops: 1}}})
	d.coming.Store(&config.Config{Exports: []config.Export{{Name: "a"}}})
	x := config.Export{Name: "a", Format: "mem", Image: "1M"}
	x.SetDefaults()
	wantCode(t, "one that is kept by a name that comes", d.addExport(t.Context(), x, fromState, nil), api.CodeExists)
	x.RateGroup = "g"
	err := d.addExport(t.Context(), x, fromAPI, nil)
	wantCode(t, "one in a group that goes", err, api.CodeInvalid)
	if want := `a reload that is under way removes the rate group "g"`; err != nil && err.Error() != want {
		t.Errorf("one in a group that goes: got %q, want %q", err, want)
	}
	if k := d.disks.get("a"); k != nil || d.exports.Len() != 0 {
		t.Errorf("left is %+v, and %d exports", k, d.exports.Len())
	}
	x.RateGroup = ""
	if err := d.addExport(t.Context(), x, fromAPI, nil); err != nil {
		t.Errorf("one that goes with the daemon: %v", err)
	}
}

// TestFailedExportShowsItsOverlay, which is what could not be opened, and not the image
// below that, whether it was tried or its storage does not answer.
func TestFailedExportShowsItsOverlay(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	x := config.Export{Name: "a", Image: filepath.Join(dir, "a.img")}
	x.SetDefaults()
	over := config.ImageOf(x)
	over.Image, over.Format = filepath.Join(dir, "top.qcow2"), "qcow2"
	if err := config.WriteInstead(dir, config.Instead{Of: config.ImageOf(x), Serve: over}); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name string
		fail func(d *daemon)
	}{
		{"it was tried", func(d *daemon) { d.tryDisk(&disk{cfg: x, origin: fromConfig}) }},
		{"no answer", func(d *daemon) { d.giveUp(&disk{cfg: x, origin: fromConfig, failed: errNoAnswer}) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := emptyService(t)
			d.conf.Store(&config.Config{Control: config.Control{State: dir}})
			tt.fail(d)
			got, err := service{d}.Export("a")
			if err != nil || got.State != "failed" || got.Image != over.Image || got.Format != "qcow2" {
				t.Errorf("got %+v, %v, want it failed with image %q of format qcow2", got, err, over.Image)
			}
		})
	}
}

// TestAdditionIsKeptAsAWholeOrNotAtAll: whatever others do while it is made, an export
// that is there has its file, and one that is not leaves its name and its file to what
// had them before.
func TestAdditionIsKeptAsAWholeOrNotAtAll(t *testing.T) {
	text := "changed"
	for _, tt := range []struct {
		name  string
		at    export.State // of the addition when something is done
		do    func(d *daemon, state string, leave func()) error
		added bool
	}{
		{"nothing else", export.Ready, func(*daemon, string, func()) error { return nil }, true},
		{"another changes it, and who adds it leaves", export.Ready, func(d *daemon, _ string, leave func()) error {
			defer leave()
			_, err := service{d}.Patch(t.Context(), "a", api.Patch{Description: &text})
			return err
		}, true},
		{"who adds it leaves before it is there", export.Opening, func(_ *daemon, _ string, leave func()) error { leave(); return nil }, false},
		{"the folder is not trusted", export.Opening, func(_ *daemon, state string, _ func()) error { return os.Chmod(state, 0o777) }, false},
		{"the daemon stops", export.Opening, func(d *daemon, _ string, _ func()) error {
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			_ = d.exports.Close(ctx) // without a wait for what is being opened
			return nil
		}, false},
	} {
		for _, before := range []string{"", "/before"} {
			t.Run(tt.name+", in place of "+before, func(t *testing.T) {
				d, state := keepingService(t, before)
				ctx, leave := context.WithCancel(t.Context())
				d.exports.Changed = func(_ string, s export.State) {
					if s == tt.at {
						if err := tt.do(d, state, leave); err != nil {
							t.Error(err)
						}
					}
				}
				_, err := service{d}.Add(ctx, api.AddExport{Export: config.Export{Name: "a", Format: "mem", Image: "1M"}, Persist: true}, nil)
				if (err == nil) != tt.added {
					t.Errorf("addition: got %v, want success %t", err, tt.added)
				}
				if err := os.Chmod(state, 0o700); err != nil {
					t.Fatal(err)
				}
				if tt.added {
					wantKept(t, d, state, "1M")
				} else {
					wantKept(t, d, state, before)
				}
			})
		}
	}
}

// keepingService has a folder for what is kept, in which there is, unless image is
// empty, an export called "a", which has failed and whose image stands on a file.
func keepingService(t *testing.T, image string) (d *daemon, state string) {
	d, state = emptyService(t), t.TempDir()
	d.conf.Store(&config.Config{Control: config.Control{State: state}})
	err := os.Chmod(state, 0o700)
	if err == nil && image != "" {
		x := config.Export{Name: "a", Image: image}
		x.SetDefaults()
		err = errors.Join(config.WriteExport(state, x, []config.File{{Path: image + ".below"}}, 0),
			d.disks.claim(&disk{cfg: x, origin: fromState, failed: os.ErrNotExist}))
	}
	if err != nil {
		t.Fatal(err)
	}
	return d, state
}

// wantKept wants an export of an image called "a", with its file and, if it has the
// image of a keepingService, what that stands on; or none, if image is empty.
func wantKept(t *testing.T, d *daemon, state, image string) {
	t.Helper()
	var there, kept config.Export
	if k := d.disks.get("a"); k != nil {
		there = k.cfg
	}
	list, _, err := config.ReadExports(state)
	if len(list) > 0 {
		kept = list[0]
	}
	if err != nil || there.Image != image || !reflect.DeepEqual(kept, there) {
		t.Errorf("got export %+v, kept is %+v, %v, want both with image %q", there, kept, err, image)
	}
	var want []config.File
	if filepath.IsAbs(image) {
		want = []config.File{{Path: image + ".below"}}
	}
	if below, _ := config.ReadBelow(state, "a"); !slices.Equal(below, want) {
		t.Errorf("the files below it are %v, want %v", below, want)
	}
}

// TestExportIsListedWhileItIsTriedAgain: its listeners are opened and closed beside
// that, which the race detector has to see.
func TestExportIsListedWhileItIsTriedAgain(t *testing.T) {
	d, dir := emptyService(t), t.TempDir()
	own := "nbd+unix:///?socket=" + filepath.Join(dir, "s")
	x := config.Export{Name: "a", Image: filepath.Join(dir, "none"), Listeners: []config.Listener{{URI: own}}}
	x.SetDefaults()
	if err := d.disks.claim(&disk{cfg: x, origin: fromAPI, failed: backing.ErrLocked}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var listing sync.WaitGroup
	listing.Go(func() {
		for ctx.Err() == nil {
			if got := d.describe(unopened("a")); got.Name != "a" { // as a list that found it failed
				t.Errorf("got %+v, want the export", got)
			}
		}
	})
	for range 100 {
		d.retry(t.Context(), func(error) bool { return true })
	}
	cancel()
	listing.Wait()
}

// TestExportsAreBounded: what is added in excess would not come back.
func TestExportsAreBounded(t *testing.T) {
	d := &daemon{}
	d.conf.Store(&config.Config{})
	x := config.Export{Name: "x", Format: "mem", Image: "1M"}
	x.SetDefaults()
	for i := range limits.ConfigExports {
		if err := d.mayAdd(&x, false, 0); err != nil {
			t.Fatalf("with %d exports: %v", i, err)
		}
		if err := d.disks.claim(&disk{cfg: config.Export{Name: strconv.Itoa(i)}}); err != nil {
			t.Fatal(err)
		}
	}
	var e *api.Error
	if err := d.mayAdd(&x, false, 0); !errors.As(err, &e) || e.Code != api.CodeInUse {
		t.Errorf("with %d exports: got %v, want an error with code %s", limits.ConfigExports, err, api.CodeInUse)
	}
}

// TestListenersAreBounded: who is one too many is told so, and does not get a
// stream that ends.
func TestListenersAreBounded(t *testing.T) {
	s := service{&daemon{ctx: t.Context()}}
	for range limits.EventSubscribers {
		_, cancel, err := s.Subscribe(limits.EventQueue)
		if err != nil {
			t.Fatal(err)
		}
		defer cancel()
	}
	var e *api.Error
	if _, _, err := s.Subscribe(limits.EventQueue); !errors.As(err, &e) || e.Code != api.CodeInUse {
		t.Errorf("one more: got %v, want an error with code %s", err, api.CodeInUse)
	}
}

// TestStatusIsAnObjectThatClientsTake, however many exports have failed.
func TestStatusIsAnObjectThatClientsTake(t *testing.T) {
	d := emptyService(t)
	d.buffers, d.engine = bufpool.New(1<<20), engine.NewPool(1)
	d.server = nbd.NewServer(nbd.Options{Exports: d.exports, Buffers: d.buffers})
	defer d.engine.Close()
	why := errors.New(strings.Repeat("x", 300))
	for i := range limits.ConfigExports {
		if err := d.disks.claim(&disk{cfg: config.Export{Name: strconv.Itoa(i)}, failed: why}); err != nil {
			t.Fatal(err)
		}
	}
	got := service{d}.Status()
	b, err := json.Marshal(got)
	if err != nil || len(b) > limits.ControlObject {
		t.Errorf("the status has %d bytes, %v, want %d at most", len(b), err, limits.ControlObject)
	}
	if n := limits.StatusNotes; len(got.Notes) != n+1 || got.Notes["export 0"] == "" || !strings.Contains(got.Notes["exports"], fmt.Sprint(limits.ConfigExports-n)) {
		t.Errorf("%d notes, of more it says %q, want %d and the number of the others", len(got.Notes), got.Notes["exports"], n)
	}
}

// TestAttemptWithoutAnAnswerKeepsWhatIsHeld: what was written outlasts an attempt that
// had nothing of it, and one that had it leaves no other hold.
func TestAttemptWithoutAnAnswerKeepsWhatIsHeld(t *testing.T) {
	d := emptyService(t)
	x := config.Export{Name: "a", Image: "1M", Format: "mem"}
	failed := &disk{cfg: x, origin: fromConfig, failed: errNoAnswer, held: held{of: &x, files: open.NewTable(nil, nil)}}
	if err := d.disks.claim(failed); err != nil {
		t.Fatal(err)
	}
	want := failed.held
	d.giveUp(&disk{cfg: x, origin: fromConfig, failed: errNoAnswer, again: failed})
	if got := d.disks.get("a"); got == failed || got.held != want || failed.held != (held{}) {
		t.Errorf("after an attempt without an answer: got %+v, and the one before %+v, want that it has %+v", got.held, failed.held, want)
	}
}

// TestExportThatIsNotOpenIsToldAsWhatItIs to who would change or remove it, and not as one
// that is not there: who removes it would take that for done.
func TestExportThatIsNotOpenIsToldAsWhatItIs(t *testing.T) {
	for _, tt := range []struct {
		what string
		k    *disk
		code string
	}{
		{"failed", &disk{failed: backing.ErrLocked}, api.CodeFailed},
		{"closed to be opened again", &disk{failed: errReopening}, api.CodeInUse},
		{"being opened", &disk{}, api.CodeInUse},
		{"absent", nil, api.CodeNotFound},
	} {
		t.Run(tt.what, func(t *testing.T) {
			d := emptyService(t)
			if tt.k != nil {
				tt.k.cfg = config.Export{Name: "a"}
				if err := d.disks.claim(tt.k); err != nil {
					t.Fatal(err)
				}
			}
			s := service{d}
			_, err := s.Patch(t.Context(), "a", api.Patch{})
			wantCode(t, "set", err, tt.code)
			wantCode(t, "pause", s.Pause(t.Context(), "a", 0), tt.code)
			wantCode(t, "resume", s.Resume("a"), tt.code)
		})
	}
}

// TestRemovalThatAnotherAttemptOvertakes has removed nothing, and says so.
func TestRemovalThatAnotherAttemptOvertakes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := emptyService(t)
		k := &disk{cfg: config.Export{Name: "a"}, origin: fromConfig, failed: backing.ErrLocked}
		again := &disk{cfg: k.cfg, origin: fromConfig, again: k}
		if err := d.disks.claim(k); err != nil {
			t.Fatal(err)
		}
		k.busy.Lock()
		claimed, removed := make(chan error, 1), make(chan error, 1)
		go func() { claimed <- d.disks.claim(again) }()
		synctest.Wait()
		go func() { removed <- service{d}.Remove(t.Context(), "a", true) }()
		synctest.Wait()
		k.busy.Unlock()
		if err := <-claimed; err != nil {
			t.Fatal(err)
		}
		wantCode(t, "removal", <-removed, api.CodeInUse)
	})
}
