package daemon

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/obs"
	"github.com/vmdiskd/vmdiskd/internal/transport"
)

// full is a listener of a process without descriptors, until it is closed.
type full struct {
	transport.Listener
	failures int
}

func (f *full) Addr() string { return "here" }

func (f *full) Accept(context.Context) (transport.Conn, error) {
	if f.failures--; f.failures < 0 {
		return nil, net.ErrClosed
	}
	return nil, errors.New("too many open files")
}

func TestFailuresToAcceptAreSaidOnce(t *testing.T) {
	var said bytes.Buffer
	d := &daemon{ctx: t.Context(), log: slog.New(slog.NewTextHandler(&said, nil))}
	f := &full{failures: 5}
	d.acceptLoop(&door{Listener: f})
	if n := strings.Count(said.String(), "too many open files"); n != 1 || f.failures != -1 {
		t.Errorf("said %d times, %d failures left:\n%s", n, f.failures, said.String())
	}
}

// TestPoisonedExportIsAnEvent: the image of an export says so by itself.
func TestPoisonedExportIsAnEvent(t *testing.T) {
	d := &daemon{}
	sub, err := d.bus.Subscribe()
	if err != nil {
		t.Fatal(err)
	}
	defer sub.Close()
	s, err := d.imageSpec(&config.Export{Name: "a", Image: filepath.Join(t.TempDir(), "i")}, nil)
	if err != nil {
		t.Fatal(err)
	}
	s.Poisoned(&backing.Error{Op: "flush", Off: -1, Kind: backing.ErrPoisoned, Err: errors.New("gone")})
	e, _, err := sub.Next(t.Context())
	if err != nil || len(e) != 1 || e[0].Kind != obs.ExportPoisoned || e[0].Export != "a" || !strings.Contains(e[0].Reason, "gone") {
		t.Errorf("events %+v, %v", e, err)
	}
}
