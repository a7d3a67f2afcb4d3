package copier

import (
	"context"
	"encoding/binary"
	"errors"
	"net"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/nbd/client"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

var errFull = errors.New("no room for one more client")

// server has an export for several connections, of which it takes some.
type server struct {
	room  int // for so many more connections
	asked int
	ends  []net.Conn
}

// connect speaks the oldstyle handshake, which is one message of the server
// (proto.md, "Oldstyle negotiation").
func (s *server) connect(ctx context.Context) (*client.Client, error) {
	if s.asked++; s.room == 0 {
		return nil, errFull
	}
	s.room--
	ours, theirs := net.Pipe()
	s.ends = append(s.ends, theirs)
	b := binary.BigEndian.AppendUint64(nil, wire.MagicInit)
	b = binary.BigEndian.AppendUint64(b, wire.MagicOldstyle)
	b = binary.BigEndian.AppendUint64(b, 1<<20)
	b = binary.BigEndian.AppendUint32(b, uint32(wire.HasFlags|wire.CanMultiConn))
	b = append(b, make([]byte, wire.ExportNameZeroes)...)
	sent := make(chan error, 1)
	go func() {
		_, err := theirs.Write(b)
		sent <- err
	}()
	c, err := client.New(ctx, ours, client.Options{})
	return c, errors.Join(err, <-sent)
}

// left tells whether all connections have been closed.
func (s *server) left() bool {
	for _, c := range s.ends {
		if _, err := c.Read(make([]byte, 1)); err == nil {
			return false
		}
	}
	return true
}

// TestConnectionsThatAServerRefusesAreDoneWithout unless their number was asked
// for.
func TestConnectionsThatAServerRefusesAreDoneWithout(t *testing.T) {
	for _, tt := range []struct {
		room, want, got int // got 0: refused
		all             bool
	}{
		{room: 4, want: 4, got: 4},
		{room: 3, want: 4, got: 3},
		{room: 1, want: 4, got: 1},
		{room: 0, want: 4},
		{room: 4, want: 4, got: 4, all: true},
		{room: 3, want: 4, all: true},
		{room: 1, want: 2, all: true},
		{room: 1, want: 1, got: 1, all: true},
	} {
		s := &server{room: tt.room}
		d, err := OpenNBD(t.Context(), s.connect, Use{Connections: tt.want, All: tt.all, Requests: 8})
		switch {
		case tt.got == 0:
			if !errors.Is(err, errFull) {
				t.Errorf("%+v: got %v, want %v", tt, err, errFull)
			}
		case err != nil:
			t.Errorf("%+v: %v", tt, err)
		default:
			if n, r := d.Connections(), d.Shape().Requests; n != tt.got || r != 8*tt.got {
				t.Errorf("%+v: got %d connections, for %d requests", tt, n, r)
			}
			d.Close()
		}
		if most := min(tt.want, tt.room+1); s.asked != most {
			t.Errorf("%+v: %d connections were asked for, want %d", tt, s.asked, most)
		}
		if !s.left() {
			t.Errorf("%+v: a connection is open at the end", tt)
		}
	}
}

// TestContextEndsTheSearchForConnections: to be told to stop is no refusal.
func TestContextEndsTheSearchForConnections(t *testing.T) {
	s := &server{room: 2}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	connect := func(ctx context.Context) (*client.Client, error) {
		if len(s.ends) == 2 {
			cancel()
		}
		return s.connect(ctx)
	}
	if _, err := OpenNBD(ctx, connect, Use{Connections: 4, Requests: 8}); err == nil {
		t.Error("it went on")
	}
	if !s.left() {
		t.Error("a connection is open at the end")
	}
}
