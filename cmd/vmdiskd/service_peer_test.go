package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

// tcpListener is a listener of a configuration at a port of 127.0.0.1, where
// peers of different addresses can come from.
func tcpListener(t *testing.T) (addr, toml string) {
	t.Helper()
	addr = net.JoinHostPort("127.0.0.1", freePort(t))
	return addr, fmt.Sprintf("[[listener]]\nuri = \"nbd://%s\"\n", addr)
}

// freePort is a TCP port of 127.0.0.1 that the kernel gives to nobody else until the
// end of the test: a socket has it that does not listen, beside which the service,
// which reuses addresses, may.
func freePort(t *testing.T) string {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	err = errors.Join(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1),
		unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}))
	if err != nil {
		t.Fatal(err)
	}
	at, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	return strconv.Itoa(at.(*unix.SockaddrInet4).Port)
}

// dialFrom connects from one of the addresses that are this machine's own.
func dialFrom(t *testing.T, from, to string) net.Conn {
	t.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}, Timeout: hangLimit}
	c, err := d.Dial("tcp", to)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(hangLimit))
	return c
}

// dialNBD connects to the shared socket of a service.
func (s *testService) dialNBD() net.Conn {
	s.Helper()
	return s.dialAt("nbd")
}

// dialAt connects to a socket in the folder of a service.
func (s *testService) dialAt(name string) net.Conn {
	s.Helper()
	c, err := net.Dial("unix", filepath.Join(s.dir, name))
	if err != nil {
		s.Fatal(err)
	}
	s.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(hangLimit))
	return c
}

// open enters transmission at the shared socket.
func (s *testService) open(name string) *client {
	s.Helper()
	k, _ := mustGo(s.T, s.dialNBD(), name)
	return k
}

// option sends an option and returns its replies up to the last one, all bytes
// of them in raw.
func (c *client) option(o wire.Opt, payload []byte) (last wire.Rep, raw []byte) {
	c.t.Helper()
	c.send(wire.AppendOption(nil, o, payload))
	for {
		head := c.read(wire.OptReplyHeaderSize)
		r, err := wire.DecodeOptReply(head)
		if err != nil || r.Len > 64<<10 {
			c.t.Fatalf("reply to option %v: %+v, %v", o, r, err)
		}
		body := c.read(int(r.Len))
		raw = append(append(raw, head...), body...)
		if r.Rep == wire.RepInfo && len(body) >= 12 && binary.BigEndian.Uint16(body) == 0 {
			c.size = binary.BigEndian.Uint64(body[2:])
		}
		if r.Rep == wire.RepAck || r.Rep>>31 != 0 {
			return r.Rep, raw
		}
	}
}

// greet takes the greeting and answers it.
func greet(t *testing.T, conn net.Conn) *client {
	t.Helper()
	c := &client{Conn: conn, t: t}
	c.read(18)
	c.send(binary.BigEndian.AppendUint32(nil, wire.FlagFixedNewstyle|wire.FlagNoZeroes))
	return c
}

// mustGo enters transmission.
func mustGo(t *testing.T, conn net.Conn, name string) (*client, wire.ExportFlags) {
	t.Helper()
	c := greet(t, conn)
	rep, raw := c.option(wire.OptGo, wire.AppendInfoRequest(nil, wire.InfoRequest{Name: name}))
	if rep != wire.RepAck {
		t.Fatalf("GO %q: got %v, want an acknowledgement", name, rep)
	}
	for len(raw) > 0 {
		n := wire.OptReplyHeaderSize + int(binary.BigEndian.Uint32(raw[16:]))
		if body := raw[wire.OptReplyHeaderSize:n]; len(body) == 12 {
			return c, wire.ExportFlags(binary.BigEndian.Uint16(body[10:]))
		}
		raw = raw[n:]
	}
	t.Fatalf("GO %q: no flags", name)
	return nil, 0
}

// list is what the server tells the client of.
func (c *client) list() (names []string) {
	c.t.Helper()
	_, raw := c.option(wire.OptList, nil)
	for len(raw) > 0 {
		n := wire.OptReplyHeaderSize + int(binary.BigEndian.Uint32(raw[16:]))
		if body := raw[wire.OptReplyHeaderSize:n]; len(body) >= 4 {
			names = append(names, string(body[4:4+binary.BigEndian.Uint32(body)]))
		}
		raw = raw[n:]
	}
	return names
}

// reads shows that the session reads n blocks.
func (c *client) reads(n int) {
	c.t.Helper()
	for i := range n {
		c.request(wire.CmdRead, uint64(i), uint64(i%16)*4096, 4096, nil)
		if e, cookie := c.reply(); e != wire.OK || cookie != uint64(i) {
			c.t.Fatalf("read %d: got %v for %d", i, e, cookie)
		}
		c.read(4096)
	}
}

// disconnect ends the session in good order, and waits for its end.
func (c *client) disconnect() {
	c.t.Helper()
	c.request(wire.CmdDisc, 0, 0, 0, nil)
	if _, err := c.Read(make([]byte, 1)); err != io.EOF {
		c.t.Fatalf("after a disconnect: got %v, want EOF", err)
	}
	c.Close()
}

// metric is the value of a line of the metrics without labels.
func (s *testService) metric(name string) (v float64) {
	s.Helper()
	var text strings.Builder
	if err := s.ctl.Metrics(s.Context(), &text); err != nil {
		s.Fatal(err)
	}
	for line := range strings.Lines(text.String()) {
		if rest, ok := strings.CutPrefix(line, "vmdiskd_"+name+" "); ok {
			if _, err := fmt.Sscan(rest, &v); err != nil {
				s.Fatalf("%q: %v", line, err)
			}
			return v
		}
	}
	s.Fatalf("there is no vmdiskd_%s", name)
	return 0
}

// use is what a process holds.
type use struct{ files, threads, goroutines, rssKiB int }

func (s *testService) use() use {
	s.Helper()
	proc := fmt.Sprintf("/proc/%d/", s.cmd.Process.Pid)
	fds, err := os.ReadDir(proc + "fd")
	if err != nil {
		s.Fatal(err)
	}
	status, err := os.ReadFile(proc + "status")
	if err != nil {
		s.Fatal(err)
	}
	u := use{files: len(fds), goroutines: int(s.metric("goroutines"))}
	for line := range strings.Lines(string(status)) {
		for key, to := range map[string]*int{"Threads:": &u.threads, "VmRSS:": &u.rssKiB} {
			if rest, ok := strings.CutPrefix(line, key); ok {
				if _, err := fmt.Sscan(rest, to); err != nil {
					s.Fatalf("%q: %v", line, err)
				}
			}
		}
	}
	return u
}

// log is what the service has written.
func (s *testService) log() string {
	s.Helper()
	b, err := os.ReadFile(filepath.Join(s.dir, "log"))
	if err != nil {
		s.Fatal(err)
	}
	return string(b)
}
