package daemon

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/internal/nbd"
)

// failing is a reload that closes a and s to change them, changes g while it is open,
// and fails at z.
type failing struct {
	*testing.T
	d     *daemon
	z     *nbd.Export // of a client, which holds up the reload
	begun chan error
}

// The configurations of the exports, with keys of a and s, the user of g, and keys of z.
const (
	failingConf = "[[export]]\nname = \"a\"\nformat = \"mem\"\nimage = \"1M\"\n%[1]s" +
		"[[export]]\nname = \"g\"\nformat = \"mem\"\nimage = \"1M\"\n[[export.grant]]\naccess = \"rw\"\nuid = [%[2]d]\n" +
		"[[export]]\nname = \"s\"\nformat = \"mem\"\nimage = \"1M\"\n%[1]s" +
		"[[export]]\nname = \"z\"\nformat = \"mem\"\nimage = \"1M\"\n%[3]s"
	failingKey    = "flush-on-close = true\n"
	failingWindow = "window = { offset = \"1G\" }\n"
)

// newFailing has no exports yet.
func newFailing(t *testing.T) *failing {
	t.Helper()
	r := &failing{T: t, d: readyService(t), begun: make(chan error, 1)}
	r.d.cfg.File = filepath.Join(t.TempDir(), "conf")
	if err := os.WriteFile(r.d.cfg.File, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	empty, err := config.Load(r.d.cfg.File)
	if err != nil {
		t.Fatal(err)
	}
	r.d.conf.Store(empty)
	return r
}

// beginFailing begins a reload that fails, and returns when it waits for the client
// of z.
func beginFailing(t *testing.T) *failing {
	t.Helper()
	r := newFailing(t)
	if _, err := r.reload(fmt.Sprintf(failingConf, "", 4711, "")); err != nil {
		t.Fatal(err)
	}
	r.begin(fmt.Sprintf(failingConf, failingKey, 0, failingWindow))
	r.want("while the reload waits", true, "a", "g", "s")
	return r
}

// begin begins a reload that waits for a client of z.
func (r *failing) begin(conf string) {
	r.Helper()
	r.z = r.open("z")
	go func() {
		_, err := r.reload(conf)
		r.begun <- err
	}()
	synctest.Wait()
}

func (r *failing) open(name string) *nbd.Export {
	r.Helper()
	x, err := r.d.exports.Open(r.Context(), name, nil)
	if err != nil {
		r.Fatal(err)
	}
	return x
}

// reload gives the service a configuration, and returns what it changes.
func (r *failing) reload(conf string) ([]string, error) {
	if err := os.WriteFile(r.d.cfg.File, []byte(conf), 0o600); err != nil {
		return nil, err
	}
	done, err := service{r.d}.Reload(context.Background(), false)
	return done.Changes, err
}

// fail has the reload go on, and fail.
func (r *failing) fail() {
	r.Helper()
	r.z.Close()
	if err := <-r.begun; err == nil {
		r.Fatal("the reload was done")
	}
}

// want says of exports whether they are as the reload changes them.
func (r *failing) want(when string, changed bool, names ...string) {
	r.Helper()
	for _, name := range names {
		k := r.d.disks.find(name)
		if k == nil {
			r.Errorf("%s: export %q is not open", when, name)
			continue
		}
		x, _, _ := r.d.disks.look(k)
		is := x.FlushOnClose || slices.ContainsFunc(x.Grants, func(g config.Grant) bool { return slices.Contains(g.UIDs, 0) })
		if is != changed {
			r.Errorf("%s: export %q is changed: %t, want %t", when, name, is, changed)
		}
	}
}

// TestSlowClientHoldsUpNoOtherUndoing of a reload that fails: where one waits for it to
// the end, grants are what they were before that, and all is when it has been cut off.
func TestSlowClientHoldsUpNoOtherUndoing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := beginFailing(t)
		slow := r.open("s")
		context.AfterFunc(slow.Cut, slow.Close)
		r.z.Close()
		synctest.Wait()
		if len(r.begun) > 0 {
			t.Error("the reload has not waited for the client")
		}
		r.want("while the client is waited for", false, "g")
		if err := <-r.begun; err == nil {
			t.Error("the reload was done")
		}
		r.want("when it was cut off", false, "a", "g", "s", "z")
		if list, err := r.reload(fmt.Sprintf(failingConf, "", 4711, "")); err != nil || len(list) > 0 {
			t.Errorf("the configuration that is served: got %q, %v, want no change", list, err)
		}
	})
}

// TestWhatStaysChangedIsAChange for the next reload: a client of s does not leave when it
// is cut off, and somebody else is changing g as long as the reload can wait.
func TestWhatStaysChangedIsAChange(t *testing.T) {
	for _, again := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			t.Logf("the configuration of the reload is tried again: %t", again)
			r := beginFailing(t)
			slow, busy := r.open("s"), r.d.disks.find("g")
			busy.busy.Lock()
			r.fail()
			r.want("after the reload", true, "g", "s")
			r.want("after the reload", false, "a", "z")
			slow.Close()
			busy.busy.Unlock()
			conf, what := fmt.Sprintf(failingConf, "", 4711, ""), `change export "s": flush-on-close,change export "g": grant`
			if again {
				conf, what = fmt.Sprintf(failingConf, failingKey, 0, ""), `change export "a": flush-on-close`
			}
			list, err := r.reload(conf)
			for _, line := range strings.Split(what, ",") {
				if !slices.ContainsFunc(list, func(s string) bool { return strings.HasPrefix(s, line) }) {
					t.Errorf("the next reload: got %q, %v, want %q", list, err, line)
				}
			}
			if err != nil || len(list) != strings.Count(what, ",")+1 {
				t.Errorf("the next reload: got %q, %v, want nothing else", list, err)
			}
			r.want("after the next reload", again, "a", "g", "s")
		})
	}
}

// TestRemovalHasItsWayOverAReload that closes the export to open it anew, or to take that
// back, whoever of the two is first when the last client leaves: what is told to be
// removed is away.
func TestRemovalHasItsWayOverAReload(t *testing.T) {
	for range 20 { // either may be the first
		synctest.Test(t, func(t *testing.T) {
			r := beginFailing(t)
			slow := r.open("s")
			ended := map[string]chan error{"s": make(chan error, 1), "z": make(chan error, 1)}
			for name, end := range ended {
				go func() { end <- service{r.d}.Remove(context.Background(), name, true) }()
			}
			synctest.Wait()
			r.z.Close()
			synctest.Wait() // the reload fails, and closes s
			slow.Close()
			if err := <-r.begun; err == nil {
				t.Error("the reload was done")
			}
			for name, end := range ended {
				if err := <-end; err != nil || r.d.disks.get(name) != nil {
					t.Errorf("removal of %q: got %v, and the export is %+v, want none", name, err, r.d.disks.get(name))
				}
			}
			r.want("after the reload", false, "a", "g")
		})
	}
}

// TestReloadLeavesWhatIsBeingRemoved as it is, and says so at once.
func TestReloadLeavesWhatIsBeingRemoved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := beginFailing(t)
		r.fail()
		slow, removed := r.open("s"), make(chan error, 1)
		go func() { removed <- service{r.d}.Remove(context.Background(), "s", true) }()
		synctest.Wait()
		begun := time.Now()
		_, err := r.reload(fmt.Sprintf(failingConf, failingKey, 4711, ""))
		wantCode(t, "a reload that opens it anew", err, api.CodeInUse)
		if d := time.Since(begun); d > 0 {
			t.Errorf("the reload has waited %v for the removal", d)
		}
		slow.Close()
		if err := <-removed; err != nil || r.d.disks.get("s") != nil {
			t.Errorf("removal: got %v, and the export is %+v, want none", err, r.d.disks.get("s"))
		}
		r.want("after the reload", false, "a", "g")
	})
}

// TestHiddenExportIsListedAsOpening until the reload that has opened it is over: its last
// event says so too.
func TestHiddenExportIsListedAsOpening(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newFailing(t)
		r.d.tellStates()
		if _, err := r.reload(fmt.Sprintf(failingConf, "", 0, "")); err != nil {
			t.Fatal(err)
		}
		r.begin(fmt.Sprintf(failingConf, "[export.overlay]\nquota = \"1M\"\n", 0, "[export.overlay]\nquota = \"1M\"\n"))
		list := []string{"a", "s"}
		r.wantStates("while the reload waits", "opening", true, list...)
		r.wantStates("while the reload waits", "ready", false, "g")
		r.z.Close()
		if err := <-r.begun; err != nil {
			t.Error(err)
		}
		r.wantStates("after the reload", "ready", false, append(list, "g", "z")...)
	})
}

// wantStates wants exports to be listed, and told of, in a state, with a reason or not.
func (r *failing) wantStates(when, state string, why bool, names ...string) {
	r.Helper()
	for _, name := range names {
		x, err := service{r.d}.Export(name)
		if last := r.d.told.last[name]; err != nil || x.State != state || (x.Error != "") != why || last != state {
			r.Errorf("%s: export %q is %q (%s), told as %q, %v; want it %s, with a reason: %t", when, name, x.State, x.Error, last, err, state, why)
		}
	}
}
