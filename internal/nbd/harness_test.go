package nbd

import (
	"context"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/mem"
	"github.com/vmdiskd/vmdiskd/internal/backing/open"
	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/engine/bufpool"
	"github.com/vmdiskd/vmdiskd/internal/engine/choose"
	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/obs"
	"github.com/vmdiskd/vmdiskd/internal/transport"
)

// rig is a server with one export, and what it stands on.
type rig struct {
	t       testing.TB
	opt     Options
	server  *Server
	dev     backing.Device
	exports *oneExport
	errs    chan error
}

// oneExport publishes a device as "" and "disk", and beside it, for whoever
// needs two, a sparse one as "large".
type oneExport struct {
	dev      backing.Device
	large    backing.Device // may be nil
	deny     backing.Caps
	needTLS  bool
	found    func()   // called at the end of Find; may be nil
	contexts []string // beyond base:allocation
	stats    *obs.ExportStats
	cutting  context.Context // Export.Cut, which cut ends; may be nil
	cut      func()
	still    func() bool // Export.Still; may be nil
	opened   atomic.Int32
	looked   atomic.Int32 // calls of Inspect
	open     atomic.Int32
}

func (x *oneExport) info(name string) ExportInfo {
	return ExportInfo{Name: name, Description: "a disk", NeedTLS: x.needTLS, Contexts: x.contexts}
}

func (x *oneExport) List(*transport.Peer) []ExportInfo {
	l := []ExportInfo{x.info("disk")}
	if x.large != nil {
		l = append(l, x.info("large"))
	}
	return l
}

func (x *oneExport) Find(name string, _ *transport.Peer) (ExportInfo, error) {
	if x.found != nil {
		defer x.found()
	}
	switch {
	case name == "" || name == "disk":
		return x.info("disk"), nil
	case name == "large" && x.large != nil:
		return x.info("large"), nil
	}
	return ExportInfo{}, ErrUnknownExport
}

func (x *oneExport) Open(_ context.Context, name string, p *transport.Peer) (*Export, error) {
	e, err := x.view(name, p)
	if err == nil {
		x.opened.Add(1)
	}
	return e, err
}

func (x *oneExport) Inspect(_ context.Context, name string, p *transport.Peer) (*Export, error) {
	x.looked.Add(1)
	return x.view(name, p)
}

func (x *oneExport) view(name string, p *transport.Peer) (*Export, error) {
	info, err := x.Find(name, p)
	if err != nil {
		return nil, err
	}
	dev := x.dev
	if info.Name == "large" {
		dev = x.large
	}
	x.open.Add(1)
	return &Export{ExportInfo: info, Device: backing.NewChecked(dev, x.deny), Stats: x.stats, Cut: x.cutting, Still: x.still, Close: func() { x.open.Add(-1) }}, nil
}

// memRig serves size bytes of memory.
func memRig(t testing.TB, size int64) *rig {
	return newRig(t, backing.NewEmulate(mem.New(size, nil)), engine.NewPool(2), bufpool.New(limits.BufferBudget))
}

// fileRig serves a file of size bytes of zeroes, written and in the page
// cache.
func fileRig(t testing.TB, size int64, engine, cache string) *rig {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(path, make([]byte, size), 0o600); err != nil {
		t.Fatal(err)
	}
	return rawRig(t, path, engine, cache)
}

// rawRig serves a raw image by the named engine. Released buffers are
// overwritten: nobody may still look at them.
func rawRig(t testing.TB, path, engine, cache string) *rig {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	bufs := bufpool.New(limits.BufferBudget)
	bufs.SetPoison(true)
	eng := newEngine(t, engine, bufs)
	dev, err := open.Open(context.Background(), open.Spec{Path: path, Format: "raw", Cache: cache, Engine: eng, Buffers: bufs, Log: log})
	if err != nil {
		t.Fatal(err)
	}
	return newRig(t, dev, eng, bufs)
}

// newEngine makes the named engine.
func newEngine(t testing.TB, name string, bufs *bufpool.Pool) engine.Engine {
	t.Helper()
	eng, err := choose.New(name, bufs, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return eng
}

func newRig(t testing.TB, dev backing.Device, eng engine.Engine, bufs *bufpool.Pool) *rig {
	r := &rig{t: t, dev: dev, exports: &oneExport{dev: dev, stats: new(obs.ExportStats)}, errs: make(chan error, 64)}
	r.opt = Options{
		Exports:       r.exports,
		Engine:        eng,
		Buffers:       bufs,
		Log:           slog.New(slog.DiscardHandler),
		MaskHandshake: 0xffff,
	}
	t.Cleanup(func() {
		if r.server != nil {
			if err := r.server.Shutdown(context.Background()); err != nil {
				t.Errorf("shutdown: %v", err)
			}
		}
		if err := dev.Close(); err != nil {
			t.Errorf("close of the device: %v", err)
		}
		if err := eng.Close(); err != nil {
			t.Errorf("close of the engine: %v", err)
		}
		if n, _ := bufs.Outstanding(); n != 0 {
			t.Errorf("%d buffers were not released", n)
		}
		if err := bufs.Close(); err != nil {
			t.Errorf("close of the buffers: %v", err)
		}
	})
	return r
}

// dial connects a client of test t to the server, which starts on the first
// call.
func (r *rig) dial(t testing.TB) net.Conn {
	t.Helper()
	ours, theirs := socketpair(t)
	r.serve(t, theirs)
	c, err := net.FileConn(ours)
	ours.Close()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func (r *rig) serve(t testing.TB, theirs *os.File) {
	t.Helper()
	if r.server == nil {
		r.server = NewServer(r.opt)
	}
	c, err := transport.FileConn(theirs)
	theirs.Close()
	if err != nil {
		t.Fatal(err)
	}
	go func() { r.errs <- r.server.Serve(context.Background(), c) }()
}

func socketpair(t testing.TB) (a, b *os.File) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return os.NewFile(uintptr(fds[0]), "client"), os.NewFile(uintptr(fds[1]), "server")
}
