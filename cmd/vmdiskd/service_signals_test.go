package main

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

// TestMainThreadIsKeptForSignals: nothing that may wait for storage runs on the thread of
// run, which therefore ends with the goroutine.
func TestMainThreadIsKeptForSignals(t *testing.T) {
	ran := os.Getpid()
	for ran == os.Getpid() { // that of the test, which ends with no goroutine
		thread := make(chan int)
		go func() {
			run([]string{"--version"})
			thread <- unix.Gettid()
		}()
		ran = <-thread
	}
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for late := time.After(hangLimit); exists(fmt.Sprint("/proc/self/task/", ran)); {
		select {
		case <-tick.C:
		case <-late:
			t.Fatal("the thread of run has gone on with other goroutines")
		}
	}
}

// TestServiceEndsAndLeavesNoSocket is LI-01, with clients of two exports and a
// listener of events.
func TestServiceEndsAndLeavesNoSocket(t *testing.T) {
	t.Parallel()
	s := newService(t, exportA+exportB+"[[export.listener]]\nuri = \"nbd+unix:///?socket=DIR/own\"\n")
	idle := s.open("a")
	events, err := s.ctl.Events(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	s.stop()
	for _, name := range []string{"control", "nbd", "own"} {
		if exists(filepath.Join(s.dir, name)) {
			t.Errorf("socket %s is still there", name)
		}
	}
	if _, err := idle.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("idle client: got %v, want EOF", err)
	}
	for e, err := range events {
		if err == nil && e.Kind == "lost" {
			t.Errorf("listener: got %+v", e)
		}
	}
}

// TestEndOfAServiceLosesNoAcknowledgedWrite is LI-02, with two exports at once.
func TestEndOfAServiceLosesNoAcknowledgedWrite(t *testing.T) {
	t.Parallel()
	s := newService(t, exportA+exportB)
	const size, blocks = 4096, 256
	acked := map[string]chan []int{}
	many := make(chan struct{}, 4)
	for _, name := range []string{"a", "b"} {
		k := s.open(name)
		acked[name] = make(chan []int, 1)
		go func() {
			list, err := writeUntilTheEnd(k, size, blocks, many)
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
			many <- struct{}{}
			acked[name] <- list
		}()
	}
	<-many
	<-many
	s.stop()
	for name, ch := range acked {
		wantWritten(t, filepath.Join(s.dir, name+".img"), size, blocks, <-ch)
	}
}

// wantWritten fails the test unless an image has the last of the writes that
// writeUntilTheEnd has returned.
func wantWritten(t *testing.T, path string, size, blocks int, acked []int) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range acked[max(0, len(acked)-blocks):] {
		at := i % blocks * size
		// One that was sent later may have been done without its reply.
		if got := b[at]; got != byte(i/blocks) && got != byte(i/blocks+1) || !bytes.Equal(b[at:at+size], bytes.Repeat([]byte{got}, size)) {
			t.Fatalf("%s: acknowledged write %d is not there: got %d", path, i, got)
		}
	}
}

// writeUntilTheEnd writes blocks in turn, each time with the next byte, and
// collects the acknowledged ones until the server leaves between two replies. Those
// may come in any order: a write waits until the sixteenth before it, and so the
// last to its block, is acknowledged.
func writeUntilTheEnd(k *client, size, blocks int, many chan<- struct{}) (acked []int, err error) {
	request := func(i int) []byte {
		r := wire.Request{Cmd: wire.CmdWrite, Cookie: uint64(i), Off: uint64(i % blocks * size), Len: uint64(size)}
		return append(wire.AppendRequest(nil, r), bytes.Repeat([]byte{byte(i / blocks)}, size)...)
	}
	const window = 16
	flying := map[int]bool{}
	for sent, oldest := 0, 0; ; {
		for ; sent < oldest+window; sent++ {
			_, _ = k.Write(request(sent)) // the server may have left
			flying[sent] = true
		}
		b := make([]byte, wire.SimpleReplySize)
		if _, err := io.ReadFull(k, b); err == io.EOF {
			return acked, nil
		} else if err != nil {
			return acked, err
		}
		e, cookie, err := wire.DecodeSimpleReply(b)
		i := int(cookie)
		if err != nil || e != wire.OK || !flying[i] {
			return acked, fmt.Errorf("reply: %v for %d, %v; want OK for one of %v", e, cookie, err, flying)
		}
		delete(flying, i)
		for oldest < sent && !flying[oldest] {
			oldest++
		}
		if acked = append(acked, i); len(acked) == 500 {
			many <- struct{}{}
		}
	}
}

// TestEndDuringHandshakes is LI-03 and LI-05: half-open connections do not
// hold up the end.
func TestEndDuringHandshakes(t *testing.T) {
	t.Parallel()
	addr, listener := tcpListener(t)
	s := newService(t, listener+exportA+exportB)
	var half []net.Conn
	for range 500 {
		half = append(half, dialFrom(t, "127.0.0.2", addr))
	}
	c := greet(t, dialFrom(t, "127.0.0.3", addr))
	if rep, _ := c.option(wire.OptInfo, wire.AppendInfoRequest(nil, wire.InfoRequest{Name: "a"})); rep != wire.RepAck {
		t.Errorf("INFO: got %v", rep)
	}
	s.stop()
	b := make([]byte, 4096)
	if n, err := c.Conn.Read(b); err == nil && n > 0 {
		if r, err := wire.DecodeOptReply(b[:n]); err != nil || r.Rep != wire.RepErrShutdown {
			t.Errorf("in the handshake: got %+v, %v, want the end or that it comes", r, err)
		}
	}
	for _, c := range half {
		if _, err := io.Copy(io.Discard, c); err != nil {
			if ne, ok := err.(net.Error); ok && ne.Timeout() {
				t.Fatal("a half-open connection outlives the service")
			}
		}
	}
}

// TestSignalsInAnyNumberEndNothing is LI-06: SIGHUP reloads, the others are no
// reason for anything, and the clients of all exports are served.
func TestSignalsInAnyNumberEndNothing(t *testing.T) {
	t.Parallel()
	s := newService(t, exportA+exportB)
	a, b := s.open("a"), s.open("b")
	signals := []syscall.Signal{syscall.SIGHUP, syscall.SIGUSR1, syscall.SIGCHLD, syscall.SIGPIPE, syscall.SIGXFSZ}
	for i := range 10000 {
		if err := s.cmd.Process.Signal(signals[i%len(signals)]); err != nil {
			t.Fatalf("after %d signals: %v", i, err)
		}
		if i%1000 == 0 {
			a.reads(1)
			b.works()
		}
	}
	s.await("the control socket answers", func() bool { _, err := s.ctl.Status(t.Context()); return err == nil })
	if _, err := s.ctl.Reload(t.Context(), false); err != nil {
		t.Errorf("reload: %v", err)
	}
	a.reads(2)
	b.works()
	s.stop()
}

// TestSecondSignalEndsAServiceAtOnce is LI-04: the image has what was
// acknowledged, and can be opened at once.
func TestSecondSignalEndsAServiceAtOnce(t *testing.T) {
	t.Parallel()
	s := newService(t, exportA+exportB+"[[export.fault]]\ndelay = \"10m\"\nops = [\"read\"]\n")
	a, b := s.open("a"), s.open("b")
	a.request(wire.CmdWrite, 1, 0, 512, bytes.Repeat([]byte{7}, 512))
	if e, _ := a.reply(); e != wire.OK {
		t.Fatalf("write: got %v", e)
	}
	b.request(wire.CmdRead, 1, 0, 512, nil)
	s.await("the read hangs", func() bool {
		all, err := s.ctl.Clients(t.Context(), new(string("b")))
		return err == nil && len(all) == 1 && all[0].InFlight == 1
	})
	for range 2 {
		if err := s.cmd.Process.Signal(syscall.SIGINT); err != nil {
			t.Fatal(err)
		}
		s.await("the end begins", func() bool { return !exists(filepath.Join(s.dir, "nbd")) })
	}
	select {
	case <-s.done:
		if got := s.cmd.ProcessState.ExitCode(); got != 1 {
			t.Errorf("exit status: got %d, want 1", got)
		}
	case <-time.After(hangLimit):
		t.Fatal("the service does not end")
	}
	s.start()
	a = s.open("a")
	a.request(wire.CmdRead, 1, 0, 512, nil)
	if e, _ := a.reply(); e != wire.OK || !bytes.Equal(a.read(512), bytes.Repeat([]byte{7}, 512)) {
		t.Errorf("after the restart: got %v, and not what was written", e)
	}
	s.stop()
}
