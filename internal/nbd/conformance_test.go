package nbd

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/mem"
	"github.com/vmdiskd/vmdiskd/internal/engine/bufpool"
	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd/nbdtest"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
	"github.com/vmdiskd/vmdiskd/internal/transport"
)

// conformanceSize is the size of the disks that the suite works on.
const conformanceSize = nbdtest.MinSize + 12345

// largeSize is that of a second, sparse disk.
const largeSize = 8 << 40

// fullFlags is what every writable disk of ours offers.
const fullFlags = wire.HasFlags | wire.SendFlush | wire.SendFUA | wire.SendTrim | wire.SendZero |
	wire.SendDF | wire.CanMultiConn | wire.SendCache

// listen accepts on an endpoint until the test ends.
func (r *rig) listen(t *testing.T, e transport.Endpoint) transport.Listener {
	t.Helper()
	ls, err := transport.Listen(t.Context(), e)
	if err != nil {
		t.Fatal(err)
	}
	r.server = NewServer(r.opt)
	go func() {
		for {
			c, err := ls[0].Accept(context.Background())
			if err != nil {
				return
			}
			go r.server.Serve(context.Background(), c) // its error is the client's doing
		}
	}()
	t.Cleanup(func() { ls[0].Close() })
	return ls[0]
}

// dialer connects to a listener as a stranger would, by package net.
func dialer(l transport.Listener) func(context.Context) (net.Conn, error) {
	network := map[transport.Kind]string{transport.Unix: "unix", transport.TCP: "tcp"}[l.Kind()]
	return func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, network, l.Addr())
	}
}

// engineRig serves a disk of package mem, or a sparse raw file, by the named
// engine.
func engineRig(t *testing.T, engine, format, cache string) *rig {
	t.Helper()
	if format == "mem" {
		bufs := bufpool.New(limits.BufferBudget)
		return newRig(t, backing.NewEmulate(mem.New(conformanceSize, nil)), newEngine(t, engine, bufs), bufs)
	}
	path := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, conformanceSize); err != nil {
		t.Fatal(err)
	}
	return rawRig(t, path, engine, cache)
}

// expected is what the suite shall find.
func (r *rig) expected() nbdtest.Server {
	flags := fullFlags
	caps := r.dev.Info().Caps
	if caps.Has(backing.CanFastZero) {
		flags |= wire.SendFastZero
	}
	if caps.Has(backing.IsRotational) {
		flags |= wire.Rotational
	}
	if r.exports.deny != 0 {
		flags &^= wire.SendFUA | wire.SendTrim | wire.SendZero | wire.SendFastZero
		flags |= wire.ReadOnly
	}
	return nbdtest.Server{
		Export:   "disk",
		Size:     conformanceSize,
		ReadOnly: r.exports.deny != 0,
		Features: nbdtest.Features{Flags: flags, Structured: true, Extended: true, Contexts: true, BlockSizes: true},
	}
}

func unixEndpoint(t *testing.T) transport.Endpoint {
	t.Helper()
	dir, err := os.MkdirTemp("", "vmdiskd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return transport.Endpoint{Kind: transport.Unix, Path: filepath.Join(dir, "s")}
}

func tcpEndpoint() transport.Endpoint {
	return transport.Endpoint{Kind: transport.TCP, Address: "127.0.0.1"}
}

// kind is a way to serve a disk.
type kind struct {
	name, engine, format, cache string
	tcp, readonly               bool
}

// TestConformance is of one kind: the race detector makes the suite five times as
// slow, and TestConformanceOfEveryKind does without.
func TestConformance(t *testing.T) {
	conforms(t, kind{name: "raw uring unix", engine: "uring", format: "raw"})
}

// conforms runs the suite on a disk of that kind.
func conforms(t *testing.T, k kind) {
	t.Run(k.name, func(t *testing.T) {
		t.Parallel()
		r := engineRig(t, k.engine, k.format, k.cache)
		if k.readonly {
			r.exports.deny = backing.CanWrite
		}
		e := unixEndpoint(t)
		if k.tcp {
			e = tcpEndpoint()
		}
		r.exports.large = backing.NewEmulate(mem.New(largeSize, nil))
		s := r.expected()
		s.Other = "large"
		if !k.readonly {
			s.Large = &nbdtest.Export{Name: "large", Size: largeSize}
		}
		s.Dial = dialer(r.listen(t, e))
		nbdtest.Conformance(t, s)
	})
}

func TestConformanceOfTheTimeLimits(t *testing.T) {
	r := engineRig(t, "pool", "mem", "")
	r.opt.Handshake, r.opt.Stall = 2*time.Second, 2*time.Second
	s := r.expected()
	s.Dial = dialer(r.listen(t, unixEndpoint(t)))
	s.Handshake, s.Stall = r.opt.Handshake, r.opt.Stall
	nbdtest.TimeLimits(t, s)
}

func TestOldstyleConformance(t *testing.T) {
	r := engineRig(t, "pool", "mem", "")
	r.opt.Oldstyle = true
	s := r.expected()
	s.Dial = dialer(r.listen(t, unixEndpoint(t)))
	nbdtest.Oldstyle(t, s)
}
