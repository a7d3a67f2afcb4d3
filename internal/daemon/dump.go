package daemon

import (
	"fmt"
	"os"
	"runtime"
	"strings"

	"github.com/vmdiskd/vmdiskd/internal/engine/bufpool"
	"github.com/vmdiskd/vmdiskd/internal/engine/uring"
	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/transport/psk"
	"github.com/vmdiskd/vmdiskd/internal/version"
)

// DumpConfig says what this build and this machine can do, one key=value a
// line.
func DumpConfig() string {
	ring := "yes"
	if err := probeRing(); err != nil {
		ring = "no: " + err.Error()
	}
	_, err := os.Stat("/dev/vsock")
	_, serr := os.Stat("/sys/fs/selinux/enforce")
	var b strings.Builder
	for _, kv := range [...]struct {
		key   string
		value any
	}{
		{"name", "vmdiskd"},
		{"version", version.Version},
		{"go", runtime.Version()},
		{"host_os", runtime.GOOS},
		{"host_cpu", runtime.GOARCH},
		{"formats", "raw qcow2 mem null"},
		{"engines", "uring pool"},
		{"io_uring", ring},
		{"vsock", yes(err == nil)},
		{"selinux", yes(serr == nil)},
		{"tls", "yes"},
		{"tls_psk", yes(psk.Supported() == nil)},
		{"max_request", limits.MaxIO},
		{"requests_per_connection", limits.RequestsPerConn},
		{"connections", limits.Connections},
	} {
		fmt.Fprintf(&b, "%s=%v\n", kv.key, kv.value)
	}
	return b.String()
}

func yes(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

func probeRing() error {
	p := bufpool.New(limits.TurnBuffer)
	e, err := uring.New(uring.Options{Buffers: p})
	if err == nil {
		err = e.Close()
	}
	_ = p.Close() // nothing was lent
	return err
}
