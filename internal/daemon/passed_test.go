package daemon

import (
	"log/slog"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/obs"
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

// TestListenerIsKeptWholeOrNotAtAll: the service manager drops without a word what
// it has no room for.
func TestListenerIsKeptWholeOrNotAtAll(t *testing.T) {
	for _, tt := range []struct {
		kept int64 // before
		want bool
	}{{1, false}, {0, true}} {
		told := watched(t)
		t.Setenv("FDSTORE", "2")
		boss, err := obs.NewSupervisor()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { boss.Close() })
		l := config.Listener{URI: "nbd://localhost:10809"}
		d := &daemon{boss: boss, log: slog.New(slog.DiscardHandler), cfg: Config{Handed: &Handed{
			in: handover{Listeners: map[string][]transport.Handed{listenerKey(l): {handed(t), handed(t)}}},
		}}}
		d.kept.Store(tt.kept)
		ls, kept, err := d.bind(t.Context(), l)
		if err != nil || len(ls) != 2 {
			t.Fatalf("got %d sockets, %v, want 2", len(ls), err)
		}
		for _, l := range ls {
			defer l.Close()
		}
		if err := boss.Ready("here"); err != nil {
			t.Fatal(err)
		}
		given, want := 0, tt.kept
		for m := <-told; !strings.HasPrefix(m, "READY=1"); m = <-told {
			given++
		}
		if tt.want {
			want += 2
		}
		if (kept != "") != tt.want || int64(given) != want-tt.kept || d.kept.Load() != want {
			t.Errorf("with %d kept before: kept as %q, %d sockets given, %d counted, want %d counted", tt.kept, kept, given, d.kept.Load(), want)
		}
	}
}

// handed is a listener of stage 0.
func handed(t *testing.T) transport.Handed {
	t.Helper()
	ls, err := transport.Listen(t.Context(), transport.Endpoint{Kind: transport.TCP, Address: "127.0.0.1"})
	if err != nil {
		t.Fatal(err)
	}
	defer ls[0].Close()
	h, files, err := transport.HandOver(ls[0])
	if err != nil {
		t.Fatal(err)
	}
	defer closeFiles(files)
	if h.Sock, err = unix.Dup(h.Sock); err != nil {
		t.Fatal(err)
	}
	return h
}
