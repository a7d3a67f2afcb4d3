package kernel

import (
	"errors"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

// orphan attaches a device whose keeper ends without a word: its claim is gone,
// the driver has its connections.
func orphan(t *testing.T, k *fakeKernel, c Config) {
	t.Helper()
	v, err := Attach(t.Context(), k.d, c)
	must(t, err)
	v.Close()
}

// TestDeviceOfADeadKeeperIsTakenOver: new connections are offered at once, and
// again for each that only the driver had.
func TestDeviceOfADeadKeeperIsTakenOver(t *testing.T) {
	k, s := newFakeKernel(t), newFakeServer(t)
	c := k.config(s)
	c.Connections, c.Holds = 2, t.TempDir()
	orphan(t, k, c)
	backend := k.file(t, "backend")
	s.size.Store(2 << 20) // it has grown meanwhile

	v, err := Attach(t.Context(), k.d, c)
	must(t, err)
	defer v.Close()
	if _, got := k.last(); !v.TakenOver || v.Index() != 2 || got.cmd != cmdReconfigure || got.sockets != 2 || got.backend != backend {
		t.Errorf("taken over: %v; the driver is told %+v", v.TakenOver, got)
	}
	dead := make(chan int, 2)
	said, end := keep(t, &Keeper{Device: v, Dead: dead})
	for i, says := range []string{"connection 1 of /dev/nbd2 is new", "connection 2 of /dev/nbd2 is new"} {
		dead <- 3 // another device
		dead <- 2
		hear(t, said, says)
		if i == 0 {
			hear(t, said, "has 2097152 bytes")
		}
		reads(t, k.socket(4+i))
	}
	if err := end(); err == nil {
		t.Error("the keeper ends by itself")
	}
}

// TestDeviceOfATokenIsTakenOver: by who has the same one, also a device whose token
// the driver was told.
func TestDeviceOfATokenIsTakenOver(t *testing.T) {
	uri := func(digit string) string { return "nbd://host/disk%3F" + strings.Repeat(digit, limits.TokenDigits) }
	k, s := newFakeKernel(t), newFakeServer(t)
	c := k.config(s)
	c.Holds, c.URI = t.TempDir(), uri("a")
	orphan(t, k, c)
	for _, told := range []string{k.file(t, "backend"), backendPrefix + "0123456789abcdef " + c.URI} {
		k.write(2, "backend", told+"\n")
		c.URI = uri("b")
		if _, err := Attach(t.Context(), k.d, c); !errors.Is(err, ErrBusy) || strings.Contains(err.Error(), "bbbb") {
			t.Errorf("by another token: %v", err)
		}
		c.URI = uri("a")
		v, err := Attach(t.Context(), k.d, c)
		if err != nil || !v.TakenOver {
			t.Fatalf("by the same token: %v", err)
		}
		v.Close()
	}
}

// TestDeviceIsTakenOverWithItsExport: it is the one that was the server's default
// when the device was attached, as far as the driver was told that.
func TestDeviceIsTakenOverWithItsExport(t *testing.T) {
	for _, tt := range []struct {
		name, asked, then string
		change            func(*fakeKernel, *fakeServer)
		want              error
	}{
		{"the same default", "", "a", func(_ *fakeKernel, s *fakeServer) { s.defaultIs("a", 1<<20) }, nil},
		{"another default", "", "a", func(_ *fakeKernel, s *fakeServer) { s.defaultIs("b", 1<<20) }, nil},
		{"a token", "?" + aToken, "a?" + aToken, func(_ *fakeKernel, s *fakeServer) { s.defaultIs("b", 1<<20) }, nil},
		{"attached when names were not kept", "", "", func(k *fakeKernel, _ *fakeServer) {
			k.write(2, "backend", backendPrefix+"0123456789abcdef nbd+unix:///\n")
		}, nil},
		{"the name of another", "", "a", func(_ *fakeKernel, s *fakeServer) { s.names.Store(&names{"a": {"b", 2 << 20}}) }, ErrRefused},
	} {
		t.Run(tt.name, func(t *testing.T) {
			k, s := newFakeKernel(t), newFakeServer(t)
			s.defaultIs("a", 1<<20)
			c := k.config(s)
			c.Holds, c.Server.Export = t.TempDir(), tt.asked
			c.URI = "nbd+unix:///" + url.PathEscape(tt.asked)
			orphan(t, k, c)
			if got := k.file(t, "backend"); strings.Contains(got, aToken) || BackendURI(got) != ShownURI(c.URI) {
				t.Errorf("the driver remembers %q", got)
			}
			tt.change(k, s)
			v, err := Attach(t.Context(), k.d, c)
			if !errors.Is(err, tt.want) || err == nil && !v.TakenOver {
				t.Errorf("got %v", err)
			}
			if got := s.lastAsked(); got != tt.then {
				t.Errorf("the server is asked for %q, want %q", got, tt.then)
			}
			if err == nil {
				v.Close()
			}
		})
	}
}

// TestNameOfTheExportIsRemembered, or the device is refused: without its name it
// would go on with whatever export is the default then.
func TestNameOfTheExportIsRemembered(t *testing.T) {
	for name, want := range map[string]string{
		"a": "a", "a b/c%20d?e": "a b/c%20d?e", "\xff\n\x00ä": "\xff\n\x00ä", "export=": "export=", "": "",
	} {
		text := remembered(t, "nbd+unix:///?socket=/a b", name)
		if uri, got, ours := parseBackend(text); !ours || got != want || uri != "nbd+unix:///?socket=/a b" || len(text) > limits.Backend || strings.ContainsAny(text, "\n\x00") {
			t.Errorf("%q is remembered in %q as %q", name, text, got)
		}
	}
	if text, err := backend("nbd:///", strings.Repeat("n", limits.Backend)); !errors.Is(err, ErrRefused) {
		t.Errorf("a name that does not fit: %q, %v", text, err)
	}
	for _, text := range []string{"", "export=a nbd:///", backendPrefix, backendPrefix + "00", backendPrefix + "00 export=%zz nbd:///", backendPrefix + "00 export=a"} {
		if _, name, _ := parseBackend(text); name != "" {
			t.Errorf("%q has the name %q", text, name)
		}
	}
}

// TestTokenIsNotRememberedWithAName: whatever name a server gives to its export.
func TestTokenIsNotRememberedWithAName(t *testing.T) {
	for _, name := range []string{"?" + aToken, "a?" + aToken, "x" + strings.ToLower(aToken) + "y"} {
		k, s := newFakeKernel(t), newFakeServer(t)
		s.names.Store(&names{"?" + aToken: {name, 1 << 20}})
		c := k.config(s)
		c.Server.Export, c.URI = "?"+aToken, "nbd+unix:///%3F"+aToken
		v, err := Attach(t.Context(), k.d, c)
		must(t, err)
		if got := k.file(t, "backend"); strings.Contains(strings.ToLower(got), strings.ToLower(aToken)) {
			t.Errorf("%q: the driver remembers %q", name, got)
		}
		v.Close()
	}
}

func TestOnlyOneKeeperAtATime(t *testing.T) {
	k, s := newFakeKernel(t), newFakeServer(t)
	c := k.config(s)
	c.Holds = t.TempDir()
	v, err := Attach(t.Context(), k.d, c)
	must(t, err)
	if _, err := Attach(t.Context(), k.d, c); !errors.Is(err, ErrBusy) {
		t.Errorf("while it is kept: %v", err)
	}
	v.Close()
	if v, err = Attach(t.Context(), k.d, c); err != nil || !v.TakenOver {
		t.Fatalf("when it is not kept any more: %v", err)
	}
	if _, err := Attach(t.Context(), k.d, c); !errors.Is(err, ErrBusy) {
		t.Errorf("while it is kept by another: %v", err)
	}
	v.Close()
	if left, err := os.ReadDir(c.Holds); err != nil || len(left) != 0 {
		t.Errorf("claims are left behind: %v, %v", left, err)
	}
}

// TestOneHoldsAClaim, however many take it and give it up at one time.
func TestOneHoldsAClaim(t *testing.T) {
	dir, text := t.TempDir(), remembered(t, "nbd:///", "")
	var held atomic.Int32
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			for range 20000 {
				h, err := claimHold(dir, text)
				if errors.Is(err, ErrBusy) {
					continue
				}
				if err != nil || held.Add(1) != 1 {
					t.Errorf("two hold it, or nobody can: %v", err)
					return
				}
				runtime.Gosched()
				held.Add(-1)
				h.release()
			}
		})
	}
	wg.Wait()
}

// TestOtherDevicesAreNotTakenOver: the driver is told nothing.
func TestOtherDevicesAreNotTakenOver(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(*fakeKernel, *fakeServer, *Config)
		want   error
	}{
		{"another server", func(_ *fakeKernel, _ *fakeServer, c *Config) { c.URI += "2" }, ErrBusy},
		{"another server at the end of a long URI", func(k *fakeKernel, _ *fakeServer, c *Config) {
			long := c.URI + strings.Repeat("x", limits.Backend)
			k.write(2, "backend", remembered(t, long, "")+"\n")
			c.URI = long + "2"
		}, ErrBusy},
		{"another program", func(k *fakeKernel, _ *fakeServer, c *Config) { k.write(2, "backend", c.URI+"\n") }, ErrBusy},
		{"an old kernel", func(k *fakeKernel, _ *fakeServer, _ *Config) { must(t, os.Remove(k.sysfs.path(2, "backend"))) }, ErrBusy},
		{"a smaller export", func(_ *fakeKernel, s *fakeServer, _ *Config) { s.size.Store(1<<20 - 4096) }, ErrRefused},
		{"an export of nothing", func(_ *fakeKernel, s *fakeServer, _ *Config) { s.size.Store(0) }, ErrRefused},
		{"larger blocks", func(_ *fakeKernel, s *fakeServer, _ *Config) { s.block.Store(4096) }, ErrRefused},
		{"other blocks", func(_ *fakeKernel, _ *fakeServer, c *Config) { c.Block = 1024 }, ErrRefused},
		{"now read-only", func(_ *fakeKernel, s *fakeServer, _ *Config) { s.flags.Store(s.flags.Load() | uint32(wire.ReadOnly)) }, ErrRefused},
		{"asked for read-only", func(_ *fakeKernel, _ *fakeServer, c *Config) { c.ReadOnly = true }, ErrRefused},
		{"no folder for claims", func(_ *fakeKernel, _ *fakeServer, c *Config) { c.Holds = filepath.Join(c.Holds, "none") }, unix.ENOENT},
	} {
		t.Run(tt.name, func(t *testing.T) {
			k, s := newFakeKernel(t), newFakeServer(t)
			c := k.config(s)
			c.Holds = t.TempDir()
			orphan(t, k, c)
			tt.change(k, s, &c)
			v, err := Attach(t.Context(), k.d, c)
			if !errors.Is(err, tt.want) {
				t.Errorf("got %v, %v, want %v", v, err, tt.want)
			}
			if n, got := k.last(); n != 1 {
				t.Errorf("the driver is told %+v", got)
			}
		})
	}
}
