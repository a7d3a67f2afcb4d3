package daemon

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/internal/export"
)

// TestDefaultMovesWithoutAThird: while a reload makes another export the default, or
// has failed to and is taken back, the empty name opens one of the two, or nothing.
func TestDefaultMovesWithoutAThird(t *testing.T) {
	const (
		first  = "[[export]]\nname = \"c\"\nimage = \"1M\"\nformat = \"mem\"\n"
		old    = "[[export]]\nname = \"a\"\nimage = \"1M\"\nformat = \"mem\"\n"
		lost   = "[[export]]\nname = \"a\"\nimage = \"DIR/lost\"\n"
		next   = "[[export]]\nname = \"z\"\nimage = \"1M\"\nformat = \"mem\"\n"
		absent = "[[export]]\nname = \"z\"\nimage = \"DIR/absent\"\n"
		chosen = "default = true\n"
		again  = "flush-on-close = true\n" // it is closed for that, and opened again

		// A step that fails: exports that are open are closed and opened again by
		// name, and a listener is tried again when all is done but that one goes.
		goes    = "[[listener]]\nuri = \"nbd+unix:///?socket=DIR/goes\"\n"
		refused = "[[listener]]\nuri = \"nbd+unix:///?socket=DIR/busy\"\n"
		other   = "[[export]]\nname = \"zz\"\nimage = \"1M\"\nformat = \"mem\"\n"
		beyond  = "window = { offset = \"1G\" }\n"
	)
	for _, tt := range []struct{ name, before, after, opens, then string }{
		{"while both are open", old + chosen + next, old + next + chosen, "a", "z"},
		{"which is opened again", old + chosen + next, old + next + chosen + again, "a", "z"},
		{"both are opened again", old + chosen + next, old + again + next + chosen + again, "a", "z"},
		{"the old one is opened again", old + chosen + next, old + again + next + chosen, "a", "z"},
		{"the old one has failed", lost + chosen + next, old + again + next + chosen + again, "", "z"},
		{"the new one has failed", old + chosen + absent, old + absent + chosen, "a", ""},
		{"the new one has failed, the old one is opened again", old + chosen + absent, old + again + absent + chosen, "a", ""},
		{"the new one had failed", old + chosen + absent, old + next + chosen, "a", "z"},
		{"the new one is added", old + chosen, old + next + chosen, "a", "z"},
		{"the old one goes", old + chosen + next, next + chosen + again, "a", "z"},
		{"to none", old + chosen + next, old + next + again, "a", "c"},
	} {
		for fails, step := range map[string]string{"": other, "at an export": other + beyond, "at a listener": other + refused} {
			t.Run(tt.name+", fails "+fails, func(t *testing.T) {
				t.Parallel()
				d, then := reloadable(t), tt.then
				if fails != "" {
					then = tt.opens
				}
				d.load(first + tt.before + other + goes)
				d.opens("at first", tt.opens)
				d.mayOpen = []string{"a", "z", tt.then, ""}
				d.write(first + tt.after + step)
				if _, err := (service{d.daemon}).Reload(t.Context(), false); (err != nil) != (fails != "") {
					t.Errorf("the reload: %v", err)
				}
				d.opens("at last", then)
			})
		}
	}
}

// TestReloadThatIsTakenBackLeavesTheDefaultOfTheAPI, which was made it after the one
// of the file that the reload has changed.
func TestReloadThatIsTakenBackLeavesTheDefaultOfTheAPI(t *testing.T) {
	const (
		a      = "[[export]]\nname = \"a\"\nimage = \"1M\"\nformat = \"mem\"\n"
		z      = "[[export]]\nname = \"z\"\nimage = \"1M\"\nformat = \"mem\"\n"
		chosen = "default = true\n"
	)
	d := reloadable(t)
	d.load(a + chosen + z + "[[listener]]\nuri = \"nbd+unix:///?socket=DIR/goes\"\n")
	d.opens("at first", "a")
	b := config.Export{Name: "b", Image: "1M", Format: "mem", Default: true}
	b.SetDefaults()
	if err := d.addExport(t.Context(), b, fromAPI, nil); err != nil {
		t.Fatal(err)
	}
	d.opens("made by the API", "b")
	d.write(a + z + chosen + "[[listener]]\nuri = \"nbd+unix:///?socket=DIR/busy\"\n")
	if _, err := (service{d.daemon}).Reload(t.Context(), false); err == nil {
		t.Error("the reload opened a listener where another server listens")
	}
	d.opens("taken back", "b")
	if k := d.disks.get("b"); !k.cfg.Default {
		t.Error("b is no default any more")
	}
	d.write(a + z + chosen)
	if _, err := (service{d.daemon}).Reload(t.Context(), false); err != nil {
		t.Error(err)
	}
	d.opens("done", "z")
	if k := d.disks.get("b"); k.cfg.Default {
		t.Error("b still says that it is the default")
	}
}

// TestReloadThatIsTakenBackLeavesTheDefaultThatWasChosenMeanwhile by the control API:
// the empty name opens what it was told to, also if the reload has changed that.
func TestReloadThatIsTakenBackLeavesTheDefaultThatWasChosenMeanwhile(t *testing.T) {
	const chosen = "default = true\n"
	choose := func(s service) error {
		_, err := s.Patch(context.Background(), "s", api.Patch{Default: new(true)})
		return err
	}
	for _, tt := range []struct {
		name, a, s string // as the reload has a and s
		do         func(service) error
		opens      string
	}{
		{"nothing", chosen, "", func(service) error { return nil }, "a"},
		{"set", chosen, "", choose, "s"},
		{"set, of one that is changed", chosen, "max-connections = 7\n", choose, "s"},
		{"set, of one that is opened again", chosen, failingKey, choose, "s"},
		{"set, where the default moves", "", "", choose, "s"},
		{"set, and one that is none", chosen, "", func(s service) error {
			_, err := s.Patch(context.Background(), "z0", api.Patch{Default: new(false)})
			return errors.Join(choose(s), err)
		}, "s"},
		{"set, and removed", chosen, "", func(s service) error {
			return errors.Join(choose(s), s.Remove(context.Background(), "s", true))
		}, "a"},
		{"added", chosen, "", func(s service) error {
			x := config.Export{Name: "b", Format: "mem", Image: "1M", Default: true}
			_, err := s.Add(context.Background(), api.AddExport{Export: x}, nil)
			return err
		}, "b"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newFailing(t)
				if _, err := r.reload(inMemory("s", "") + inMemory("a", chosen) + inMemory("z", "") + inMemory("z0", "")); err != nil {
					t.Fatal(err)
				}
				r.begin(inMemory("s", tt.s) + inMemory("a", tt.a) + inMemory("z", failingWindow) + inMemory("z0", ""))
				if err := tt.do(service{r.d}); err != nil {
					t.Fatal(err)
				}
				r.fail()
				if x, err := r.d.exports.Find("", nil); err != nil || x.Name != tt.opens {
					t.Errorf("the empty name opens %q, %v, want %q", x.Name, err, tt.opens)
				}
			})
		})
	}
}

// reloading is a service that is made and reloaded without a process, and looks at
// what the empty name opens whenever a state changes.
type reloading struct {
	*daemon
	t       *testing.T
	dir     string
	mayOpen []string // nil: anything
}

// reloadable is a service without exports. DIR in its configuration is a folder,
// where another server listens at busy.
func reloadable(t *testing.T) *reloading {
	d := &reloading{daemon: readyService(t), t: t, dir: t.TempDir()}
	d.cfg.File = filepath.Join(d.dir, "conf")
	busy, err := net.Listen("unix", filepath.Join(d.dir, "busy"))
	if err != nil {
		t.Fatal(err)
	}
	d.ctx, d.cancel = context.WithCancel(context.Background())
	t.Cleanup(func() {
		d.mayOpen = nil
		_ = busy.Close()
		d.cancel()
		d.accepted.Wait()
	})
	d.exports.Changed = func(name string, s export.State) {
		if got := d.empty(); d.mayOpen != nil && !slices.Contains(d.mayOpen, got) {
			t.Errorf("export %q is %s: the empty name opens %q, want one of %q", name, s, got, d.mayOpen)
		}
	}
	return d
}

func (d *reloading) write(conf string) {
	if err := os.WriteFile(d.cfg.File, []byte(strings.ReplaceAll(conf, "DIR", d.dir)), 0o600); err != nil {
		d.t.Fatal(err)
	}
}

// load opens the exports of a configuration, as the start does.
func (d *reloading) load(conf string) {
	d.write(conf)
	c, err := config.Load(d.cfg.File)
	if err != nil {
		d.t.Fatal(err)
	}
	d.conf.Store(c)
	if err := d.addConfigured(); err != nil {
		d.t.Fatal(err)
	}
}

// empty is what the empty name opens, or "".
func (d *reloading) empty() string {
	x, _ := d.exports.Find("", nil)
	return x.Name
}

func (d *reloading) opens(when, want string) {
	d.t.Helper()
	if got := d.empty(); got != want {
		d.t.Errorf("%s: the empty name opens %q, want %q", when, got, want)
	}
}
