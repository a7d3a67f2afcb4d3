//go:build !race

package nbd

import (
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing/open"
	"github.com/vmdiskd/vmdiskd/internal/nbd/nbdtest"
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
	conformsInsideTLS(t, "uring", TLSOn, nbdtest.TLSOn)
	conformsInsideTLS(t, "uring", TLSRequire, nbdtest.TLSRequire)
}
