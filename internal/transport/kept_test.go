package transport_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/transport"
	"golang.org/x/sys/unix"
)

// TestClientsOfALeftListenerWaitForTheNext is a restart of the server: a client
// that comes in between is served by the one that comes after.
func TestClientsOfALeftListenerWaitForTheNext(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	for _, e := range []transport.Endpoint{
		{Kind: transport.Unix, Path: path, Mode: 0o640, Name: "again"},
		{Kind: transport.TCP, Address: "127.0.0.1", Name: "again"},
	} {
		t.Run(string(e.Kind), func(t *testing.T) {
			l := listen(t, e)[0]
			kept, to := inherit(t, l), targetOf(t, l)
			id, err := transport.FileID(l)
			put(t, err)
			put(t, transport.Leave(l))
			c, err := transport.Dial(t.Context(), to)
			put(t, err)
			defer c.Close()
			e.Port = to.Port
			next, err := transport.Resume(e, kept, id)
			put(t, err)
			defer next.Close()
			s := accept(t, next)
			talk(t, s, c)
			if transport.NameOf(next) != "again" || next.Addr() != l.Addr() {
				t.Errorf("resumed %q at %q, want %q", transport.NameOf(next), next.Addr(), l.Addr())
			}
			put(t, next.Close())
			if _, err := os.Lstat(path); err == nil {
				t.Error("the file of the socket is still there when its listener is closed")
			}
		})
	}
}

// TestEndedAddressIsFreeWhileThereAreDuplicates: another server takes it.
func TestEndedAddressIsFreeWhileThereAreDuplicates(t *testing.T) {
	for _, e := range []transport.Endpoint{
		{Kind: transport.Unix, Path: filepath.Join(t.TempDir(), "s")},
		{Kind: transport.TCP, Address: "127.0.0.1"},
	} {
		t.Run(string(e.Kind), func(t *testing.T) {
			l := listen(t, e)[0]
			inherit(t, l)
			e.Port = targetOf(t, l).Port
			put(t, transport.End(l))
			next := listen(t, e)[0]
			s, c := connect(t, next)
			talk(t, s, c)
		})
	}
}

func TestResumeRefusesAnotherSocket(t *testing.T) {
	u, path := listenUnix(t)
	gone, gonePath := listenUnix(t)
	odd, oddPath := listenUnix(t)
	tcp := listen(t, transport.Endpoint{Kind: transport.TCP, Address: "127.0.0.1"})[0]
	port := targetOf(t, tcp).Port
	put(t, os.Remove(gonePath))
	put(t, os.Remove(oddPath))
	put(t, os.WriteFile(oddPath, nil, 0o600))
	lost, lostPath := listenUnix(t)
	put(t, os.Remove(lostPath))
	other := listen(t, transport.Endpoint{Kind: transport.Unix, Path: lostPath})[0]
	null, err := os.Open(os.DevNull)
	put(t, err)
	defer null.Close()
	for _, tt := range []struct {
		name string
		e    transport.Endpoint
		l    transport.Listener
		want string
	}{
		{"kind", transport.Endpoint{Kind: transport.TCP, Port: port}, u, "kind unix"},
		{"path", transport.Endpoint{Kind: transport.Unix, Path: path + "2"}, u, "not \"" + path + "2\""},
		{"port", transport.Endpoint{Kind: transport.TCP, Port: port + 1}, tcp, "it listens at port"},
		{"no path", transport.Endpoint{Kind: transport.Unix, Path: gonePath}, gone, "no such file"},
		{"a file there", transport.Endpoint{Kind: transport.Unix, Path: oddPath}, odd, "another file's"},
		{"another server there", transport.Endpoint{Kind: transport.Unix, Path: lostPath}, lost, "another file's"},
	} {
		f := inherit(t, tt.l)
		id, err := transport.FileID(tt.l)
		put(t, err)
		l, err := transport.Resume(tt.e, f, id)
		if err == nil {
			l.Close()
		}
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: got error %v, want one that says %q", tt.name, err, tt.want)
		}
		if _, err := unix.FcntlInt(f.Fd(), unix.F_GETFD, 0); err != nil {
			t.Errorf("%s: the descriptor is closed", tt.name)
		}
	}
	if _, err := transport.Resume(transport.Endpoint{Kind: transport.Unix, Path: path}, null, ""); err == nil || !strings.Contains(err.Error(), "not a socket") {
		t.Errorf("no socket: got error %v", err)
	}
	id, err := transport.FileID(lost)
	put(t, err)
	_, err = transport.Abolish(inherit(t, lost), id)
	put(t, err)
	connect(t, other)
	for _, p := range []string{path, oddPath} {
		if _, err := os.Lstat(p); err != nil {
			t.Errorf("what was not taken up is removed: %v", err)
		}
	}
}

// childPassed takes sockets by name, closes and opens them again.
func childPassed() error {
	if os.Getenv("LISTEN_PID") == "self" {
		os.Setenv("LISTEN_PID", fmt.Sprint(os.Getpid()))
	}
	p, err := transport.TakePassed()
	if err != nil {
		return err
	}
	defer p.Close()
	if got := p.Names(); !slices.Equal(got, []string{"local", "net"}) {
		return fmt.Errorf("names %q", got)
	}
	if _, err := p.Listen("else", transport.Endpoint{}); err == nil || !strings.Contains(err.Error(), `"else", but ["local" "net"]`) {
		return fmt.Errorf("a name that is not there: %v", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	for range 2 {
		ls, err := p.Listen("net", transport.Endpoint{Name: "systemd:net"})
		if err != nil {
			return err
		}
		if len(ls) != 2 || transport.NameOf(ls[0]) != "systemd:net" {
			return fmt.Errorf("%d listeners, the first is %q", len(ls), transport.NameOf(ls[0]))
		}
		for _, l := range ls {
			c, err := l.Accept(ctx)
			if err != nil {
				return err
			}
			if err := errors.Join(c.Close(), l.Close()); err != nil {
				return err
			}
		}
	}
	p.Drop("net")
	_, err = p.Listen("net", transport.Endpoint{})
	if err == nil {
		return errors.New("dropped sockets are still there")
	}
	return nil
}

func TestPassedSocketsAreTakenByName(t *testing.T) {
	u, _ := listenUnix(t)
	one := listen(t, transport.Endpoint{Kind: transport.TCP, Address: "127.0.0.1"})[0]
	two, _ := listenUnix(t)
	cmd := child(t, "passed")
	cmd.Env = append(cmd.Env, "LISTEN_PID=self", "LISTEN_FDS=3", "LISTEN_FDNAMES=net:local:net")
	cmd.ExtraFiles = []*os.File{inherit(t, one), inherit(t, u), inherit(t, two)}
	for range 2 { // they wait in the queue
		for _, l := range []transport.Listener{one, two} {
			c, err := transport.Dial(t.Context(), targetOf(t, l))
			put(t, err)
			defer c.Close()
		}
	}
	if out, err := cmd.Output(); err != nil {
		t.Errorf("child: %v\n%s", err, out)
	}
}
