package daemon

import (
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/transport"
)

// kindOf is a listener of which only the kind matters.
type kindOf struct {
	transport.Listener
	kind transport.Kind
}

func (k kindOf) Kind() transport.Kind { return k.kind }

// TestPassedVsockSocketAloneDoesNotWrite: one disk has no leases, so that a
// socket of systemd needs what --vsock does.
func TestPassedVsockSocketAloneDoesNotWrite(t *testing.T) {
	vsock, unix := kindOf{kind: transport.VSock}, kindOf{kind: transport.Unix}
	for _, tt := range []struct {
		disk config.Export
		at   []transport.Listener
		ok   bool
	}{
		{config.Export{}, []transport.Listener{unix, vsock}, false},
		{config.Export{}, []transport.Listener{unix}, true},
		{config.Export{ReadOnly: true}, []transport.Listener{vsock}, true},
		{config.Export{TrustCID: true}, []transport.Listener{vsock}, true},
	} {
		err := checkPassed(&tt.disk, tt.at)
		if (err == nil) != tt.ok || err != nil && !strings.Contains(err.Error(), "--vsock-trust-cid") {
			t.Errorf("%+v at %v: got %v", tt.disk, tt.at, err)
		}
	}
}
