//go:build !race

package nbd

import (
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing/open"
	"github.com/vmdiskd/vmdiskd/internal/nbd/nbdtest"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

// TestConformanceOfEveryKind: all but those that run under the race detector too.
func TestConformanceOfEveryKind(t *testing.T) {
	for _, k := range []kind{
		{name: "raw pool tcp", engine: "pool", format: "raw", tcp: true},
		{name: "raw direct uring tcp", engine: "uring", format: "raw", cache: open.CacheNone, tcp: true},
		{name: "raw direct pool unix", engine: "pool", format: "raw", cache: open.CacheNone},
		{name: "mem pool unix", engine: "pool", format: "mem"},
		{name: "mem uring tcp", engine: "uring", format: "mem", tcp: true},
		{name: "raw readonly", engine: "pool", format: "raw", readonly: true},
	} {
		conforms(t, k)
	}
	conformsInsideTLS(t, "pool", TLSRequire, nbdtest.TLSRequire)
	conformsInsideTLS(t, "uring", TLSOn, nbdtest.TLSOn)
	conformsInsideTLS(t, "uring", TLSRequire, nbdtest.TLSRequire)
}

// conformsInsideTLS runs it in that mode, which the suite knows by name.
func conformsInsideTLS(t *testing.T, engine string, mode TLSMode, name nbdtest.TLSMode) {
	t.Run(engine+" "+string(name), func(t *testing.T) {
		t.Parallel()
		r := engineRig(t, engine, "raw", "")
		s := r.expected()
		s.TLS = nbdtest.TLS{Mode: name, Config: r.secure(t, mode)}
		s.Dial = dialer(r.listen(t, tcpEndpoint()))
		nbdtest.Conformance(t, s)
	})
}

func TestConformanceDegraded(t *testing.T) {
	r := engineRig(t, "pool", "mem", "")
	r.opt.NoStructured = true
	s := r.expected()
	s.Features.Structured, s.Features.Extended, s.Features.Contexts = false, false, false
	s.Features.Flags &^= wire.SendDF
	s.Dial = dialer(r.listen(t, unixEndpoint(t)))
	nbdtest.Conformance(t, s)
}
