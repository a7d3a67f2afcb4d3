package daemon

import (
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/confine"
	"github.com/vmdiskd/vmdiskd/internal/transport"
)

// TestPlaintextIsForTheLoopback: whatever the address was called when it was
// opened.
func TestPlaintextIsForTheLoopback(t *testing.T) {
	d := &daemon{}
	for _, tt := range []struct {
		addr                string
		encrypted, insecure bool
		mode                confine.Mode
		ok                  bool
	}{
		{"127.0.0.1", false, false, confine.Strict, true},
		{"localhost", false, false, confine.Strict, true},
		{"", false, false, confine.Auto, false},
		{"0.0.0.0", false, false, confine.None, false},
		{"0.0.0.0", false, true, confine.None, true},
		{"0.0.0.0", false, true, confine.Auto, true},
		{"0.0.0.0", false, true, confine.Strict, false},
		{"0.0.0.0", true, false, confine.Strict, true},
	} {
		ls, err := transport.Listen(t.Context(), transport.Endpoint{Kind: transport.TCP, Address: tt.addr})
		if err != nil {
			t.Fatal(err)
		}
		d.cfg.Confine = tt.mode
		if err := d.checkPlain(ls, tt.encrypted, tt.insecure); (err == nil) != tt.ok {
			t.Errorf("%+v: %v", tt, err)
		}
		for _, l := range ls {
			l.Close()
		}
	}
}
