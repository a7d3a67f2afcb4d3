package server

import (
	"bufio"
	"encoding/json"
	"net"
	"net/http"
	"path/filepath"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/control/api"
)

// lateConn is a connection of a server that is not run for so long that each of its
// deadlines has passed when it goes on.
type lateConn struct{ *net.UnixConn }

func (c lateConn) SetDeadline(time.Time) error { return c.UnixConn.SetDeadline(time.Unix(1, 0)) }
func (c lateConn) SetWriteDeadline(time.Time) error {
	return c.UnixConn.SetWriteDeadline(time.Unix(1, 0))
}

// TestBusyServerCutsNoRefusal: who is told that there is no room comes again, and who
// gets a part of that fails.
func TestBusyServerCutsNoRefusal(t *testing.T) {
	t.Parallel()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(t.TempDir(), "s"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	client, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	c, err := l.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	(&fullError{"full"}).reply(lateConn{c})
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	r, err := http.ReadResponse(bufio.NewReader(client), nil)
	if err != nil {
		t.Fatalf("the reply is cut: %v", err)
	}
	defer r.Body.Close()
	var e api.Error
	if err := json.NewDecoder(r.Body).Decode(&e); err != nil || r.StatusCode != http.StatusServiceUnavailable || e.Code != api.CodeInUse || e.Text != "full" {
		t.Errorf("got status %d with %+v, %v; want 503 with what is full", r.StatusCode, e, err)
	}
}
