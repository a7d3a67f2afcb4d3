package daemon

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/server"
	"github.com/vmdiskd/vmdiskd/internal/export"
	"github.com/vmdiskd/vmdiskd/internal/nbd"
	"github.com/vmdiskd/vmdiskd/internal/transport"
	"github.com/vmdiskd/vmdiskd/internal/transport/psk"
	"github.com/vmdiskd/vmdiskd/internal/transport/transporttest"
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

// secrets are what the clients of a service prove: one kind is old, and then revoked or
// replaced by one that is new.
type secrets struct {
	grant    string // the key of a grant
	old, new *tls.Config
	replace  func() // in the files
}

// certified gives d certificates in a folder.
func certified(t *testing.T, d *daemon) secrets {
	t.Helper()
	dir, ca := t.TempDir(), transporttest.NewCA(t, "authority")
	transporttest.WriteServer(t, dir, ca, ca.IssueServer("server"))
	list := func(revoked ...*transporttest.Issued) {
		transporttest.WriteFile(t, filepath.Join(dir, "ca-crl.pem"), ca.CRL(time.Now().Add(24*time.Hour), revoked...), 0o644)
	}
	list()
	var err error
	if d.creds, err = transport.LoadCredentials(dir, transport.TLSOptions{Log: d.log}); err != nil {
		t.Fatal(err)
	}
	shows := func(is *transporttest.Issued) *tls.Config {
		roots := x509.NewCertPool()
		roots.AddCert(ca.Cert)
		return &tls.Config{RootCAs: roots, ServerName: "server", Certificates: []tls.Certificate{{Certificate: is.Chain, PrivateKey: is.Key}}}
	}
	old := ca.IssueClient("guest")
	return secrets{"cert-name", shows(old), shows(ca.IssueClient("guest")), func() { list(old) }}
}

// keyed gives d pre-shared keys in a file.
func keyed(t *testing.T, d *daemon) secrets {
	t.Helper()
	path := filepath.Join(t.TempDir(), "keys.psk")
	add := func() *tls.Config {
		t.Helper()
		if err := psk.Add(path, "guest", 32, true); err != nil {
			t.Fatal(err)
		}
		c, err := psk.ClientConfig(path, "guest")
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	last := add()
	next, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	old := add()
	if d.keys, err = psk.Load(path); err != nil {
		t.Fatal(err)
	}
	return secrets{"psk", old, last, func() { transporttest.WriteFile(t, path, next, 0o600) }}
}

// TestReloadOpensNothingToWhatItReplaces: a key that a reload replaces and a certificate
// that is revoked with it open what it brings, if at all, until it is over, whenever they
// were proved. Who had opened an export before stays.
func TestReloadOpensNothingToWhatItReplaces(t *testing.T) {
	kinds := map[string]func(*testing.T, *daemon) secrets{"certificate": certified}
	if psk.Supported() == nil {
		kinds["key"] = keyed
	}
	for name, kind := range kinds {
		t.Run(name, func(t *testing.T) {
			d, reload := reloaded(t)
			its := kind(t, d)
			met := func(c *tls.Config) *transport.Peer {
				t.Helper()
				server, client := transporttest.Pair(t)
				met := make(chan error, 1)
				go func() {
					_, err := transport.ClientTLS(client, c)
					met <- err
				}()
				in, err := (&transport.ServerSecurity{Certificates: d.creds, Keys: d.keys}).Encrypt(server)
				if err := errors.Join(err, <-met); err != nil {
					t.Fatal(err)
				}
				return in.Peer()
			}
			granted := fmt.Sprintf("[[export.grant]]\naccess = \"rw\"\n%s = [\"guest\"]\n", its.grant)
			if err := reload(inMemory("there", granted), inMemory("slow", "")); err != nil {
				t.Fatal(err)
			}
			old := met(its.old)
			before, err := d.exports.Open(t.Context(), "there", old)
			if err != nil {
				t.Fatal(err)
			}
			defer before.Close()
			k := d.disks.find("slow")
			k.busy.Lock() // the reload waits when it has opened what it brings
			goOn := sync.OnceFunc(k.busy.Unlock)
			defer goOn()
			its.replace()
			done := make(chan error, 1)
			go func() {
				done <- reload(inMemory("there", granted), inMemory("slow", `description = "changed"`), inMemory("new", granted))
			}()
			eventually(t, "the new export is open", func() bool {
				state, _ := d.exports.StateOf("new")
				return state == export.Ready || len(done) > 0
			})
			var meanwhile []*nbd.Export
			for _, name := range []string{"there", "new"} {
				if x, err := d.exports.Open(t.Context(), name, old); err == nil {
					defer x.Close()
					meanwhile = append(meanwhile, x)
				}
			}
			goOn()
			if err := <-done; err != nil {
				t.Fatal(err)
			}
			for _, x := range meanwhile {
				if x.Gone.Err() == nil {
					t.Errorf("who has opened %q with the old one while the reload was under way stays", x.Name)
				}
			}
			if before.Gone.Err() != nil {
				t.Error("who was there before is told to leave")
			}
			for _, tt := range []struct {
				name string
				peer *transport.Peer
				want bool
			}{{"old", old, false}, {"new", met(its.new), true}} {
				x, err := d.exports.Open(t.Context(), "new", tt.peer)
				if err == nil {
					x.Close()
				}
				if (err == nil) != tt.want {
					t.Errorf("the %s one opens what the reload has brought: got %v, want it: %t", tt.name, err, tt.want)
				}
			}
		})
	}
}

// TestReloadChangesWhoMayChangeThingsWhenItIsDone: what somebody does by the control API
// before a reload fails would not be taken back.
func TestReloadChangesWhoMayChangeThingsWhenItIsDone(t *testing.T) {
	for _, fails := range []bool{true, false} {
		d, reload := reloaded(t)
		dir := t.TempDir()
		control := func(users string) string {
			return fmt.Sprintf("[control]\nsocket = %q\nchange-users = [%s]\n", filepath.Join(dir, "control"), users)
		}
		listener := fmt.Sprintf("[[listener]]\nuri = \"nbd+unix:///?socket=%s\"\n", filepath.Join(dir, "s"))
		first, err := config.LoadText(d.cfg.File, []byte(control(`"7"`)))
		if err != nil {
			t.Fatal(err)
		}
		d.conf.Store(first)
		if err := reload(control(`"7"`), listener, inMemory("slow", "")); err != nil {
			t.Fatal(err)
		}
		want := func(when string, first, second server.Access) {
			t.Helper()
			rules := d.rules.Load()
			if a, b := rules.Access(server.Peer{UID: 7}), rules.Access(server.Peer{UID: 8}); a != first || b != second {
				t.Errorf("%s, with a reload that fails: %t: users 7 and 8 may do %d and %d, want %d and %d", when, fails, a, b, first, second)
			}
		}
		want("before", server.Change, server.NoAccess)
		k := d.disks.find("slow")
		k.busy.Lock() // the reload waits when it has opened what it brings
		goOn := sync.OnceFunc(k.busy.Unlock)
		defer goOn()
		if fails {
			listener += "owner = \"no-such-user\"\n" // the last step fails
		}
		done := make(chan error, 1)
		go func() {
			done <- reload(control(`"8"`), listener, inMemory("slow", `description = "changed"`), inMemory("new", ""))
		}()
		eventually(t, "the new export is open", func() bool {
			state, _ := d.exports.StateOf("new")
			return state == export.Ready || len(done) > 0
		})
		want("meanwhile", server.Change, server.NoAccess)
		goOn()
		if err := <-done; (err != nil) != fails {
			t.Fatalf("reload: %v", err)
		}
		if fails {
			want("after it", server.Change, server.NoAccess)
		} else {
			want("after it", server.NoAccess, server.Change)
		}
	}
}

// TestReloadEndsWhatWasOpenedByAListenerThatItCloses while it was under way, unless it
// fails. Who has come in by one that was closed and has opened nothing finds nothing.
func TestReloadEndsWhatWasOpenedByAListenerThatItCloses(t *testing.T) {
	for _, tt := range []struct {
		altered string
		fails   bool
		shows   map[string]bool // in the end
	}{
		{`owner = "no-such-user"`, true, map[string]bool{"kept": true, "removed": true}},
		{`mode = "0660"`, false, map[string]bool{"kept": true}},
	} {
		d, reload := reloaded(t)
		dir := t.TempDir()
		listener := func(name, more string) string {
			return fmt.Sprintf("[[listener]]\nuri = \"nbd+unix:///?socket=%s\"\n%s\n", filepath.Join(dir, name), more)
		}
		if err := reload(listener("kept", ""), listener("removed", ""), listener("altered", ""), inMemory("a", ""), inMemory("slow", "")); err != nil {
			t.Fatal(err)
		}
		peers, before, meanwhile := map[string]*transport.Peer{}, map[string]*nbd.Export{}, map[string]*nbd.Export{}
		for _, o := range d.doors.all() {
			peers[filepath.Base(o.Addr())] = &transport.Peer{Kind: transport.Unix, Scope: &o.scope}
		}
		open := func(to map[string]*nbd.Export) {
			t.Helper()
			for name, p := range peers {
				x, err := d.exports.Open(t.Context(), "a", p)
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(x.Close)
				to[name] = x
			}
		}
		open(before)
		k := d.disks.find("slow")
		k.busy.Lock() // the reload waits when it has opened what it brings
		goOn := sync.OnceFunc(k.busy.Unlock)
		defer goOn()
		done := make(chan error, 1)
		go func() {
			done <- reload(listener("kept", ""), listener("altered", tt.altered), inMemory("a", ""), inMemory("slow", `description = "changed"`), inMemory("new", ""))
		}()
		eventually(t, "the new export is open", func() bool {
			state, _ := d.exports.StateOf("new")
			return state == export.Ready || len(done) > 0
		})
		open(meanwhile)
		goOn()
		if err := <-done; (err != nil) != tt.fails {
			t.Fatalf("%s: %v", tt.altered, err)
		}
		for name, p := range peers {
			_, err := d.exports.Find("a", p)
			if found := err == nil; found != tt.shows[name] {
				t.Errorf("%s: by listener %q a is found: got %t, want %t", tt.altered, name, found, !found)
			}
			if stays, want := meanwhile[name].Gone.Err() == nil, tt.fails || name == "kept"; stays != want {
				t.Errorf("%s: who has opened a by listener %q meanwhile stays: got %t, want %t", tt.altered, name, stays, want)
			}
			if before[name].Gone.Err() != nil {
				t.Errorf("%s: who has opened a by listener %q before is told to leave", tt.altered, name)
			}
		}
	}
}
