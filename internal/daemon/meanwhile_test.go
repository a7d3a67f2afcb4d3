package daemon

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/nbd"
	"github.com/vmdiskd/vmdiskd/internal/transport"
)

// reloaded is a service whose configuration reload replaces.
func reloaded(t *testing.T) (d *daemon, reload func(conf ...string) error) {
	t.Helper()
	d = readyService(t)
	d.ctx = t.Context()
	t.Cleanup(func() {
		d.closeDoors(d.doors.all())
		d.accepted.Wait()
	})
	d.cfg.File = filepath.Join(t.TempDir(), "conf")
	write := func(conf ...string) error {
		return os.WriteFile(d.cfg.File, []byte(strings.Join(conf, "")), 0o600)
	}
	if err := write(); err != nil {
		t.Fatal(err)
	}
	empty, err := config.Load(d.cfg.File)
	if err != nil {
		t.Fatal(err)
	}
	d.conf.Store(empty)
	return d, func(conf ...string) error {
		if err := write(conf...); err != nil {
			return err
		}
		_, err := service{d}.Reload(t.Context(), false)
		return err
	}
}

// inMemory is an export of the configuration.
func inMemory(name, more string) string {
	return fmt.Sprintf("[[export]]\nname = %q\nformat = \"mem\"\nimage = \"1M\"\n%s\n", name, more)
}

// granted is a grant of the configuration to users.
func granted(access, uids string) string {
	return fmt.Sprintf("[[export.grant]]\naccess = %q\nuid = [%s]\n", access, uids)
}

// TestReloadAsksAgainWhoCameMeanwhile, when it is over: who has opened an export by what
// it has taken back, or what it takes away in the end, leaves. All others stay.
func TestReloadAsksAgainWhoCameMeanwhile(t *testing.T) {
	for _, fails := range []bool{true, false} {
		t.Run(fmt.Sprintf("fails=%t", fails), func(t *testing.T) {
			d, reload := reloaded(t)
			open := func(name string, uid uint32) (*nbd.Export, error) {
				return d.exports.Open(t.Context(), name, &transport.Peer{Kind: transport.Unix, UID: uid})
			}
			mustOpen := func(name string, uid uint32) *nbd.Export {
				t.Helper()
				x, err := open(name, uid)
				if err != nil {
					t.Fatalf("user %d opens %q: %v", uid, name, err)
				}
				t.Cleanup(x.Close)
				return x
			}
			listener := fmt.Sprintf("[[listener]]\nuri = \"nbd+unix:///?socket=%s\"\n", filepath.Join(t.TempDir(), "s"))
			if err := reload(listener, inMemory("given", granted("rw", "7")), inMemory("read", granted("ro", "7")), inMemory("slow", ""),
				inMemory("taken", granted("rw", "7, 8")), inMemory("unchanged", "")); err != nil {
				t.Fatal(err)
			}
			before := mustOpen("taken", 8)
			k := d.disks.find("slow")
			k.busy.Lock() // the reload waits, with what comes behind it undone
			goOn := sync.OnceFunc(k.busy.Unlock)
			defer goOn()
			if fails {
				listener += "owner = \"no-such-user\"\n" // the last step fails
			}
			done := make(chan error, 1)
			go func() {
				done <- reload(listener, inMemory("given", granted("rw", "7, 8")), inMemory("read", granted("rw", "7")), inMemory("slow", `description = "changed"`),
					inMemory("taken", granted("rw", "7")), inMemory("unchanged", ""))
			}()
			eventually(t, "user 7 may write to what it could read", func() bool {
				x, err := open("read", 7)
				if err != nil {
					return true
				}
				defer x.Close()
				return x.Device.Info().Caps.Has(backing.CanWrite) || len(done) > 0
			})
			meanwhile := []struct {
				name  string
				uid   uint32
				use   *nbd.Export
				stays bool
			}{
				{"given", 8, mustOpen("given", 8), !fails},
				{"given", 7, mustOpen("given", 7), true},
				{"read", 7, mustOpen("read", 7), !fails},
				{"taken", 8, mustOpen("taken", 8), fails},
				{"taken", 7, mustOpen("taken", 7), true},
				{"unchanged", 8, mustOpen("unchanged", 8), true},
			}
			goOn()
			if err := <-done; (err != nil) != fails {
				t.Fatalf("reload: %v", err)
			}
			for _, tt := range meanwhile {
				if got := tt.use.Gone.Err() == nil; got != tt.stays {
					t.Errorf("user %d of %q stays: got %t, want %t", tt.uid, tt.name, got, tt.stays)
				}
			}
			if before.Gone.Err() != nil {
				t.Error("who was there before is told to leave")
			}
		})
	}
}
