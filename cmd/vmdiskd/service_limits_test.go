package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

// TestHalfOpenConnectionsKeepNobodyOut is LM-01: few of a thousand connections
// that never negotiate are even greeted, and another peer is served meanwhile.
func TestHalfOpenConnectionsKeepNobodyOut(t *testing.T) {
	t.Parallel()
	addr, listener := tcpListener(t)
	s := newService(t, listener+exportA)
	begin := time.Now()
	var flood []net.Conn
	for range 1000 {
		flood = append(flood, dialFrom(t, "127.0.0.2", addr))
	}
	k, _ := mustGo(t, dialFrom(t, "127.0.0.3", addr), "a")
	k.reads(10)
	greeted := 0
	for _, c := range flood {
		// A greeting that comes has come before that of the other peer.
		c.SetReadDeadline(time.Now().Add(time.Millisecond))
		if n, _ := c.Read(make([]byte, 18)); n > 0 {
			greeted++
		}
	}
	rounds := int(time.Since(begin)/limits.Handshake) + 1
	if most := rounds * limits.HandshakingPerPeer; greeted > most || greeted == 0 {
		t.Errorf("greeted: got %d of 1000, want at most %d, and some", greeted, most)
	}
	if n := s.use().files; n > limits.ConnectionsPerPeer+100 {
		t.Errorf("descriptors: got %d, want no more than %d of the flood", n, limits.ConnectionsPerPeer)
	}
	k.reads(10)
	s.stop()
}

// TestHalfOpenConnectionsOfManyMakeRoom is LM-01 for a flood from several
// addresses: it holds every place, and another peer is given one.
func TestHalfOpenConnectionsOfManyMakeRoom(t *testing.T) {
	t.Parallel()
	for _, addrs := range []int{2, 40, 250} {
		t.Run(strconv.Itoa(addrs), func(t *testing.T) {
			addr, listener := tcpListener(t)
			s := newService(t, listener+exportA+"[log]\nlevel = \"debug\"\n")
			for i := range min(addrs*limits.ConnectionsPerPeer, limits.Connections+100) {
				dialFrom(t, fmt.Sprint("127.0.1.", 1+i%addrs), addr)
			}
			for range 3 {
				k, _ := mustGo(t, dialFrom(t, "127.0.0.3", addr), "a")
				k.reads(10)
			}
			s.wantLogged("half open when another peer needed the place")
			s.stop()
		})
	}
}

// cpuTicks is what the service has used, in ticks of 10 ms (proc(5)).
func (s *testService) cpuTicks() (ticks int) {
	s.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", s.cmd.Process.Pid))
	if err != nil {
		s.Fatal(err)
	}
	f := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:])
	for _, i := range []int{11, 12} { // utime and stime, behind the name
		n, err := strconv.Atoi(string(f[i]))
		if err != nil {
			s.Fatal(err)
		}
		ticks += n
	}
	return ticks
}

// TestConnectionsOfAPeerAreBounded is LM-02, and the bound of an export.
func TestConnectionsOfAPeerAreBounded(t *testing.T) {
	t.Parallel()
	addr, listener := tcpListener(t)
	s := newService(t, listener+exportA+exportB+"max-connections = 2\n")
	var all []*client
	for range limits.ConnectionsPerPeer {
		k, _ := mustGo(t, dialFrom(t, "127.0.0.2", addr), "a")
		all = append(all, k)
	}
	if n, err := dialFrom(t, "127.0.0.2", addr).Read(make([]byte, 18)); n != 0 {
		t.Errorf("one connection too many: got %d bytes, %v", n, err)
	}
	for _, from := range []string{"127.0.0.3", "127.0.0.4"} {
		k, _ := mustGo(t, dialFrom(t, from, addr), "b")
		k.reads(2)
	}
	c := greet(t, dialFrom(t, "127.0.0.5", addr))
	rep, raw := c.option(wire.OptGo, wire.AppendInfoRequest(nil, wire.InfoRequest{Name: "b"}))
	if rep>>31 == 0 {
		t.Errorf("third client of b: got %v %q, want an error", rep, raw)
	}
	all[0].disconnect()
	s.await("the place is free again", func() bool {
		n, _ := dialFrom(t, "127.0.0.2", addr).Read(make([]byte, 18))
		return n == 18
	})
	all[1].reads(2)
	s.stop()
}

// TestAcceptPausesWithoutDescriptors is LM-03: what it cannot accept takes no
// processor, and no place of those who are there.
func TestAcceptPausesWithoutDescriptors(t *testing.T) {
	t.Parallel()
	s := newService(t, exportA)
	k := s.open("a")
	var was unix.Rlimit
	pid := s.cmd.Process.Pid
	few := unix.Rlimit{Cur: uint64(s.use().files) + 4}
	if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, nil, &was); err != nil {
		t.Fatal(err)
	}
	few.Max = was.Max
	if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, &few, nil); err != nil {
		t.Fatal(err)
	}
	var waiting []net.Conn
	for range 50 {
		waiting = append(waiting, s.dialNBD())
	}
	s.wantLogged("accept failed")
	ticks := s.cpuTicks()
	<-time.After(time.Second) // time in which it shall rest
	if used := s.cpuTicks() - ticks; used > 10 {
		t.Errorf("accepting that fails used %d ms of CPU in a second: it does not rest", 10*used)
	}
	for range 100 {
		k.reads(10)
	}
	for _, c := range waiting {
		c.Close()
	}
	if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, &was, nil); err != nil {
		t.Fatal(err)
	}
	s.open("a").reads(2)
	s.stop()
}

// flood sends what make returns until the connection fails, and takes all
// replies.
func flood(k *client, next func(i uint64) []byte) {
	go func() { _, _ = io.Copy(io.Discard, k) }()
	go func() {
		for i := uint64(0); ; i++ {
			if _, err := k.Write(next(i)); err != nil {
				return
			}
		}
	}()
}

// TestNobodyIsStarved is LM-04 and LM-05 without their clocks: whatever eight
// connections of one peer ask for, another peer's requests are answered.
func TestNobodyIsStarved(t *testing.T) {
	t.Parallel()
	write := wire.AppendRequest(nil, wire.Request{Cmd: wire.CmdWrite, Off: 8192, Len: 4096})
	write = append(write, make([]byte, 4096)...)
	for name, next := range map[string]func(i uint64) []byte{
		"writes and flushes": func(i uint64) []byte {
			return wire.AppendRequest(write[:len(write):len(write)], wire.Request{Cmd: wire.CmdFlush, Cookie: i})
		},
		"invalid requests": func(i uint64) []byte {
			return wire.AppendRequest(nil, wire.Request{Cmd: wire.CmdRead, Cookie: i, Off: 1 << 60, Len: 1 << 30})
		},
		"commands that are none": func(i uint64) []byte {
			return wire.AppendRequest(nil, wire.Request{Cmd: 77, Cookie: i})
		},
	} {
		t.Run(name, func(t *testing.T) {
			addr, listener := tcpListener(t)
			s := newService(t, listener+exportA+exportB)
			for range 8 {
				k, _ := mustGo(t, dialFrom(t, "127.0.0.2", addr), "a")
				flood(k, next)
			}
			k, _ := mustGo(t, dialFrom(t, "127.0.0.3", addr), "b")
			k.reads(10)
			k.works()
			if n := len(s.log()); n > 1<<20 {
				t.Errorf("the flood has written %d bytes of log", n)
			}
			s.stop()
		})
	}
}

// TestHangingImageHangsNobodyElse is LM-06, with requests of one export that
// take for ever: another's are answered, and the service ends in its time.
func TestHangingImageHangsNobodyElse(t *testing.T) {
	t.Parallel()
	s := newService(t, exportA+"[[export.fault]]\ndelay = \"10m\"\n"+exportB)
	a := s.open("a")
	a.request(wire.CmdRead, 1, 0, 4096, nil)
	a.request(wire.CmdWrite, 2, 0, 512, make([]byte, 512))
	a.request(wire.CmdFlush, 3, 0, 0, nil)
	s.await("all hang", func() bool {
		all, err := s.ctl.Clients(t.Context(), nil)
		return err == nil && len(all) == 1 && all[0].InFlight == 3
	})
	b := s.open("b")
	b.reads(100)
	b.works()
	s.open("a") // the handshake is no request
	if _, err := s.ctl.Add(t.Context(), api.AddExport{Export: config.Export{Name: "c", Image: "1M", Format: "mem"}}); err != nil {
		t.Errorf("add an export: %v", err)
	}
	b.works()
	for range 2 {
		if err := s.cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		s.await("the end begins", func() bool { return !exists(filepath.Join(s.dir, "nbd")) })
	}
	select {
	case err := <-s.done:
		if s.cmd.ProcessState.ExitCode() != 1 {
			t.Errorf("service: %v, want exit status 1", err)
		}
	case <-time.After(hangLimit):
		t.Error("the service does not end")
	}
}

// TestReadOnlyIsSetWhileServed: nobody writes to a disk that is made read-only,
// those neither who could before; and they can again.
func TestReadOnlyIsSetWhileServed(t *testing.T) {
	t.Parallel()
	s := newService(t, exportA)
	k := s.open("a")
	k.reads(1) // it is in transmission: who only negotiates is cut off when rights go
	for _, tt := range []struct {
		readonly bool
		want     wire.Errno
	}{{true, wire.EPERM}, {false, wire.OK}} {
		if _, err := s.ctl.Patch(t.Context(), "a", api.Patch{ReadOnly: &tt.readonly}); err != nil {
			t.Fatal(err)
		}
		k.reads(1)
		k.request(wire.CmdWrite, 7, 0, 4096, make([]byte, 4096))
		if e, _ := k.reply(); e != tt.want {
			t.Errorf("write with readonly=%v: got %v, want %v", tt.readonly, e, tt.want)
		}
		k.request(wire.CmdTrim, 8, 0, 4096, nil)
		if e, _ := k.reply(); e != tt.want {
			t.Errorf("trim with readonly=%v: got %v, want %v", tt.readonly, e, tt.want)
		}
	}
	k.disconnect()
}

func TestImageOpenReadOnlyCannotBeMadeWritable(t *testing.T) {
	t.Parallel()
	s := newService(t, exportA+"readonly = true\n")
	yes, no := true, false
	_, err := s.ctl.Patch(t.Context(), "a", api.Patch{ReadOnly: &no})
	if e, ok := errors.AsType[*api.Error](err); !ok || e.Code != api.CodeUnsupported {
		t.Errorf("readonly=false: got %v, want %s", err, api.CodeUnsupported)
	}
	if _, err := s.ctl.Patch(t.Context(), "a", api.Patch{ReadOnly: &yes}); err != nil {
		t.Errorf("readonly=true: %v", err)
	}
}

// TestRateChangesWhileServed is LM-07: a limit is never exceeded by more than
// its burst, and one that is taken away is gone for those who wait, too.
func TestRateChangesWhileServed(t *testing.T) {
	t.Parallel()
	s := newService(t, exportA)
	k := s.open("a")
	set := func(r config.Rate) {
		t.Helper()
		if _, err := s.ctl.Patch(t.Context(), "a", api.Patch{Rate: &r}); err != nil {
			t.Fatal(err)
		}
	}
	const n = 256 // 1 MiB
	for _, rate := range []int64{4 << 20, 10 << 20} {
		set(config.Rate{Bytes: config.Size(rate)})
		k.reads(64) // what a burst allows is gone
		begin := time.Now()
		k.reads(n)
		// Two bursts of 10 ms, and nothing else.
		got := time.Since(begin)
		if least := time.Duration(float64(n*4096)/float64(rate)*float64(time.Second)) - 3*limits.RateSlack; got < least {
			t.Errorf("1 MiB at %d MiB/s: got %v, want at least %v", rate>>20, got, least)
		}
	}
	set(config.Rate{Ops: 1})
	k.reads(1)
	for i := range uint64(10) {
		k.request(wire.CmdFlush, i, 0, 0, nil)
	}
	set(config.Rate{})
	for range 10 {
		if e, _ := k.reply(); e != wire.OK {
			t.Errorf("flush: got %v", e)
		}
	}
	k.reads(n)
	s.stop()
}

// TestSlowListenerIsToldOfLostEvents: and nobody waits for it.
func TestSlowListenerIsToldOfLostEvents(t *testing.T) {
	t.Parallel()
	s := newService(t, exportA)
	c, err := net.Dial("unix", filepath.Join(s.dir, "control"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(hangLimit))
	if _, err := fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: x\r\n\r\n", api.PathEvents); err != nil {
		t.Fatal(err)
	}
	in := bufio.NewReader(c)
	if line, err := in.ReadString('\n'); err != nil || !strings.Contains(line, "200") {
		t.Fatalf("events: got %q, %v", line, err)
	}
	heard, lost := 0, uint64(0)
	hear := func() {
		t.Helper()
		c.SetDeadline(time.Now().Add(hangLimit))
		line, err := in.ReadString('\n')
		if err != nil {
			t.Fatalf("after %d events, and %d that were lost: %v", heard, lost, err)
		}
		var e api.Event
		if !strings.HasPrefix(line, "{") {
			return // of HTTP
		}
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		if e.Kind == "lost" {
			lost += e.Lost
		} else {
			heard++
		}
	}
	const clients = 5000
	for i := range clients {
		s.open("a").disconnect()
		if i%250 == 249 { // who makes no room for limits.ControlReplyTime is cut off
			for range 250 {
				hear()
			}
		}
	}
	s.await("all have left", func() bool {
		all, err := s.ctl.Clients(t.Context(), nil)
		return err == nil && len(all) == 0
	})
	for heard+int(lost) < 2*clients {
		hear()
	}
	if lost == 0 || heard+int(lost) != 2*clients {
		t.Errorf("heard %d, lost %d; want %d in all, and some lost", heard, lost, 2*clients)
	}
	s.stop()
}

// TestExportsWithoutDescriptorsFailSingly: the service starts with those that
// there are enough for, and leaves no file of the others. A listener that is
// handed over takes five descriptors: any of them may be the one that there is not.
func TestExportsWithoutDescriptorsFailSingly(t *testing.T) {
	t.Parallel()
	const exports = 32
	for limit := 118; limit < 123; limit++ {
		t.Run(strconv.Itoa(limit), func(t *testing.T) {
			t.Parallel()
			s := &testService{T: t, dir: t.TempDir()}
			s.configure(s.exportsWithSockets(exports))
			s.prepare = func(cmd *exec.Cmd) {
				cmd.Args = append([]string{"sh", "-c", fmt.Sprintf(`ulimit -n %d; exec "$0" "$@"`, limit), cmd.Path}, cmd.Args[1:]...)
				cmd.Path = "/bin/sh"
			}
			s.start()
			if ready := s.checkSockets(); ready == 0 || ready == exports {
				t.Errorf("%d of %d exports are ready, want some", ready, exports)
			}
			s.stop()
		})
	}
}

// exportsWithSockets makes images, and returns the configuration of exports of
// them, each of which has a socket of its name.
func (s *testService) exportsWithSockets(n int) string {
	var exports strings.Builder
	for i := range n {
		fmt.Fprintf(&exports, "[[export]]\nname = \"e%d\"\nimage = \"DIR/e%d.img\"\n[[export.listener]]\nuri = \"nbd+unix:///?socket=DIR/e%d\"\n", i, i, i)
		if err := os.WriteFile(filepath.Join(s.dir, fmt.Sprintf("e%d.img", i)), make([]byte, 1<<20), 0o600); err != nil {
			s.Fatal(err)
		}
	}
	return exports.String()
}

// checkSockets connects to those exports that are ready, which alone have their
// sockets.
func (s *testService) checkSockets() (ready int) {
	for _, is := range s.states() {
		name, state, _ := strings.Cut(is, " ")
		socket := filepath.Join(s.dir, name)
		if has := exists(socket); has != (state == "ready") {
			s.Errorf("export %s is %s, and that its socket is there is %v", name, state, has)
		}
		if state == "ready" {
			ready++
			if got := s.size("nbd+unix:///" + name + "?socket=" + socket); got != "1048576" {
				s.Errorf("size of %s is %q", name, got)
			}
		}
	}
	return ready
}
