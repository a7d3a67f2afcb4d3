package transport_test

import (
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/transport"
	"github.com/vmdiskd/vmdiskd/internal/transport/transporttest"
)

// handOver gives what another program would get: l is not closed, its socket
// goes on by the duplicates.
func handOver(t *testing.T, l any) transport.Handed {
	t.Helper()
	h, files, err := transport.HandOver(l)
	if err != nil {
		t.Fatal(err)
	}
	// Their numbers live on without them, as after an exec.
	numbers := map[int]int{}
	for _, f := range files {
		fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			t.Fatal(err)
		}
		numbers[int(f.Fd())] = fd
		f.Close()
	}
	h.Sock, h.Inode = numbers[h.Sock], numbers[h.Inode]
	return h
}

func TestListenersAreHandedOver(t *testing.T) {
	for _, kind := range []transport.Kind{transport.Unix, transport.TCP} {
		e := transport.Endpoint{Kind: kind, Name: "a name", Address: "127.0.0.1"}
		if kind == transport.Unix {
			e.Path = filepath.Join(t.TempDir(), "s")
		}
		before := listen(t, e)[0]
		h := handOver(t, before)
		if err := transport.Leave(before); err != nil {
			t.Fatal(err)
		}
		after, err := transport.Adopt(h)
		if err != nil {
			t.Fatal(err)
		}
		if after.Kind() != kind || after.Addr() != before.Addr() || transport.NameOf(after) != "a name" {
			t.Errorf("adopted %s %s %q", after.Kind(), after.Addr(), transport.NameOf(after))
		}
		server, client := connect(t, after)
		talk(t, server, client)
		if err := after.Close(); err != nil {
			t.Error(err)
		}
		if _, err := os.Lstat(e.Path); kind == transport.Unix && !os.IsNotExist(err) {
			t.Errorf("the socket's file is still there: %v", err)
		}
	}
}

// TestAdoptedListenerRemovesItsOwnFileOnly, not one that took its place.
func TestAdoptedListenerRemovesItsOwnFileOnly(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	before, err := transport.ListenUnix(t.Context(), transport.Endpoint{Path: path})
	if err != nil {
		t.Fatal(err)
	}
	h := handOver(t, before)
	after, err := transport.AdoptUnix(h)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := after.Close(); err != nil {
		t.Error(err)
	}
	if err := before.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("the file of another: %v", err)
	}
}

func TestAdoptRefusesWhatIsNoListener(t *testing.T) {
	file, err := os.Create(filepath.Join(t.TempDir(), "f"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	l, path := listenUnix(t)
	_ = path
	own := handOver(t, l)
	defer unix.Close(own.Sock)
	defer unix.Close(own.Inode)
	for name, tt := range map[string]struct {
		h    transport.Handed
		want string
	}{
		"a file":          {transport.Handed{Kind: transport.Unix, Sock: int(file.Fd())}, "not a socket"},
		"nothing":         {transport.Handed{Kind: transport.Unix, Sock: 1 << 20}, "bad file descriptor"},
		"another kind":    {transport.Handed{Kind: transport.TCP, Sock: own.Sock}, "is a socket of kind unix, not tcp"},
		"control of TCP":  {transport.Handed{Kind: transport.TCP, Sock: own.Sock}, "not"},
		"negative number": {transport.Handed{Kind: transport.Unix, Sock: -1}, "bad file descriptor"},
	} {
		if _, err := transport.Adopt(tt.h); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", name, err, tt.want)
		}
	}
	if _, err := transport.AdoptUnix(transport.Handed{Kind: transport.TCP, Sock: own.Sock}); err == nil {
		t.Error("a control socket on TCP")
	}
	if _, _, err := transport.HandOver(struct{ net.Listener }{}); err == nil {
		t.Error("a listener of somebody else was handed over")
	}
}

// TestCredentialsThatWereOpenedAreLoaded where the folder cannot be read.
func TestCredentialsThatWereOpenedAreLoaded(t *testing.T) {
	dir := t.TempDir()
	ca := transporttest.NewCA(t, "ca")
	transporttest.WriteServer(t, dir, ca, ca.IssueServer("localhost"))
	given, err := transport.OpenCredentials(dir, transport.TLSOptions{})
	if err != nil || len(given) != 4 { // the folder, too
		t.Fatalf("%v, %v", given, err)
	}
	if err := os.Rename(dir, dir+".gone"); err != nil {
		t.Fatal(err)
	}
	c, err := transport.LoadCredentials(dir, transport.TLSOptions{Given: given})
	if err != nil {
		t.Fatal(err)
	}
	if !c.VerifiesPeers() {
		t.Error("the authority was not loaded")
	}
	for name, f := range given {
		if _, err := f.Stat(); err != nil {
			t.Errorf("%s is open no more: %v", name, err)
		}
		defer f.Close()
	}
	if _, err := transport.LoadCredentials(dir, transport.TLSOptions{}); err == nil {
		t.Error("they are loaded by their names")
	}
	if _, err := transport.OpenCredentials(filepath.Join(dir, "x"), transport.TLSOptions{}); err != nil && !os.IsNotExist(err) && err != fs.ErrNotExist {
		t.Error(err)
	}
}
