package main

import (
	"bytes"
	"encoding/binary"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

// opened is a connection that has opened an export.
func opened(t *testing.T, path, name string) net.Conn {
	t.Helper()
	c := greeted(t, path)
	data := append(wire.AppendString(nil, name), 0, 0) // no information is asked for
	if _, err := c.Write(wire.AppendOption(nil, wire.OptGo, data)); err != nil {
		t.Fatal(err)
	}
	for {
		rep, _ := option(t, c)
		if rep == wire.RepAck {
			return c
		}
		if rep != wire.RepInfo {
			t.Fatalf("open of %q: %v", name, rep)
		}
	}
}

// stuck is a connection with requests that wait for the rate of its export, for
// minutes.
func stuck(t *testing.T, path, name string) net.Conn {
	t.Helper()
	c := opened(t, path, name)
	for i := range uint64(40) {
		ask(t, c, wire.Request{Cmd: wire.CmdRead, Cookie: i, Len: 1 << 20}, nil)
	}
	return c
}

func ask(t *testing.T, c net.Conn, req wire.Request, payload []byte) {
	t.Helper()
	if _, err := c.Write(append(wire.AppendRequest(nil, req), payload...)); err != nil {
		t.Fatal(err)
	}
}

// answered reads a simple reply without payload.
func answered(t *testing.T, c net.Conn) wire.Errno {
	t.Helper()
	b := make([]byte, wire.SimpleReplySize)
	if _, err := io.ReadFull(c, b); err != nil {
		t.Fatal(err)
	}
	return wire.Errno(binary.BigEndian.Uint32(b[4:]))
}

// slow is an export whose requests wait long.
const slow = "[[export]]\nname = \"slow\"\nimage = \"64M\"\nformat = \"mem\"\n[export.rate]\nbytes = \"64K\"\n"

// TestForceCutsOffWhoWaits: requests that wait for their turn do not keep an
// export from being removed, nor a client from being disconnected.
func TestForceCutsOffWhoWaits(t *testing.T) {
	s := newService(t, slow)
	busy := func(n int) {
		t.Helper()
		s.await("requests wait", func() bool {
			list, err := s.ctl.Clients(t.Context(), nil)
			return err == nil && len(list) == 1 && list[0].InFlight >= n
		})
	}
	path := filepath.Join(s.dir, "nbd")
	c := stuck(t, path, "slow")
	busy(10)
	list, err := s.ctl.Clients(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := s.ctl.Disconnect(t.Context(), list[0].ID); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := io.Copy(io.Discard, c); err != nil {
		t.Errorf("who was disconnected twice: %v, want the end", err)
	}
	stuck(t, path, "slow")
	busy(10)
	if err := s.ctl.Remove(t.Context(), "slow", true, time.Millisecond); err != nil {
		t.Errorf("remove by force: %v", err)
	}
	s.stop()
}

// TestForceRemovesWhatHangs, and says that it could not flush.
func TestForceRemovesWhatHangs(t *testing.T) {
	s := newService(t, exportA+"[[export.fault]]\ndelay = \"10m\"\n")
	c := opened(t, filepath.Join(s.dir, "nbd"), "a")
	ask(t, c, wire.Request{Cmd: wire.CmdWrite, Len: 512}, make([]byte, 512))
	s.await("it hangs", func() bool {
		list, err := s.ctl.Clients(t.Context(), nil)
		return err == nil && len(list) == 1 && list[0].InFlight == 1
	})
	if err := s.ctl.Remove(t.Context(), "a", true, time.Millisecond); err == nil {
		t.Error("an export that cannot be flushed was removed in good order")
	}
	if got := s.states(); len(got) != 0 {
		t.Errorf("left are %q", got)
	}
	s.stop()
}

// TestStuckGuestLosesNobodysData: a guest that does not let the service end in
// good order is no reason not to flush the disks of others.
func TestStuckGuestLosesNobodysData(t *testing.T) {
	s := newService(t, "")
	if out, err := exec.Command("qemu-img", "create", "-q", "-f", "qcow2", filepath.Join(s.dir, "q"), "1M").CombinedOutput(); err != nil {
		t.Fatalf("qemu-img: %v\n%s", err, out)
	}
	s.stop()
	s.configure("[[export]]\nname = \"q\"\nimage = \"DIR/q\"\nformat = \"qcow2\"\n" + slow)
	conf := filepath.Join(s.dir, "conf")
	text, err := os.ReadFile(conf)
	if err == nil {
		err = os.WriteFile(conf, append([]byte("drain-timeout = \"100ms\"\n"), text...), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	s.start()
	path := filepath.Join(s.dir, "nbd")
	stuck(t, path, "slow")
	c := opened(t, path, "q")
	ask(t, c, wire.Request{Cmd: wire.CmdWrite, Len: 65536}, bytes.Repeat([]byte{'z'}, 65536))
	if e := answered(t, c); e != wire.OK {
		t.Fatalf("write: %v", e)
	}
	ask(t, c, wire.Request{Cmd: wire.CmdDisc}, nil)
	if err := s.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := <-s.done; err == nil {
		t.Error("a service that gave up requests ends as if it had not")
	}
	out, err := exec.Command("qemu-io", "-r", "-c", "read -P 0x7a 0 64k", filepath.Join(s.dir, "q")).CombinedOutput()
	if err != nil || strings.Contains(string(out), "failed") {
		t.Errorf("what the other guest wrote: %v\n%s", err, out)
	}
}

// TestPauseHoldsUpNoEnd: neither that of an export nor that of the service.
func TestPauseHoldsUpNoEnd(t *testing.T) {
	s := newService(t, exportA+"[[export]]\nname = \"b\"\nimage = \"DIR/b.img\"\n")
	for _, name := range []string{"a", "b"} {
		if err := s.ctl.Pause(t.Context(), name, 5*time.Minute); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.ctl.Remove(t.Context(), "a", true, time.Second); err != nil {
		t.Errorf("remove of a paused export: %v", err)
	}
	s.stop()
}
