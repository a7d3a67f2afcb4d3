package kernel

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
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

// TestOtherDevicesAreNotTakenOver: the driver is told nothing.
func TestOtherDevicesAreNotTakenOver(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(*fakeKernel, *fakeServer, *Config)
		want   error
	}{
		{"another server", func(_ *fakeKernel, _ *fakeServer, c *Config) { c.URI += "2" }, ErrBusy},
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
