// The race detector makes sync.Pool forget at random.
//go:build !race

package main

import (
	"bufio"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

var swapRequests = flag.Int("swap-requests", 10_000, "requests of TestSwapNeedsNothing")

// swapped is a server of swap that tells how often it has allocated.
type swapped struct {
	*daemonProcess
	said *bufio.Reader
}

func serveSwap(t *testing.T) *swapped {
	t.Helper()
	disk := image(t, 0)
	if err := os.WriteFile(disk, make([]byte, 8<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	s := &swapped{daemonProcess: &daemonProcess{t: t, socket: filepath.Join(shortDir(t), "s"), ended: make(chan error, 1)}}
	s.cmd = program("--swap=best-effort", "--swap-headroom=skip", "--print-uri", "-U", s.socket, disk)
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	said, err := s.cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	s.said = bufio.NewReader(said)
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.cmd.Process.Kill()
		s.cmd.Wait()
	})
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		text, _ := io.ReadAll(s.said)
		t.Fatalf("server did not start: %s", text)
	}
	return s
}

// counts are what serving must leave as it is.
type counts struct {
	mallocs, majflt uint64
	threads         int
}

func (s *swapped) counts() (c counts) {
	s.t.Helper()
	s.signal(unix.SIGWINCH)
	for {
		line, err := s.said.ReadString('\n')
		if err != nil {
			s.t.Fatal(err)
		}
		if n, ok := strings.CutPrefix(line, mallocsPrefix); ok {
			if c.mallocs, err = strconv.ParseUint(strings.TrimSpace(n), 10, 64); err != nil {
				s.t.Fatal(err)
			}
			break
		}
	}
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", s.cmd.Process.Pid))
	if err != nil {
		s.t.Fatal(err)
	}
	// proc_pid_stat(5): the name is in parentheses, and may hold some; what
	// follows it starts with the third field, majflt is the twelfth.
	_, fields, _ := strings.Cut(string(stat[slices.Index(stat, '('):]), ") ")
	if c.majflt, err = strconv.ParseUint(strings.Fields(fields)[12-3], 10, 64); err != nil {
		s.t.Fatal(err)
	}
	c.threads = s.threads()
	return c
}

// batch sends count requests in one write, each of size bytes, and checks the
// replies.
func (c *client) batch(cmd wire.Cmd, count, size int) {
	c.t.Helper()
	if err := c.SetDeadline(time.Now().Add(hangLimit)); err != nil {
		c.t.Fatal(err)
	}
	var b []byte
	for i := range count {
		b = wire.AppendRequest(b, wire.Request{Cmd: cmd, Cookie: uint64(i), Off: uint64(i * size), Len: uint64(size)})
		if cmd == wire.CmdWrite {
			b = append(b, make([]byte, size)...)
		}
	}
	c.send(b)
	for range count {
		if e, _ := c.reply(); e != wire.OK {
			c.t.Fatalf("%v of %d bytes: got %v, want OK", cmd, size, e)
		}
		if cmd == wire.CmdRead {
			c.read(size)
		}
	}
}

// TestSwapNeedsNothing: the whole program, confined as it comes, makes no
// allocation, no major fault and no thread for the requests of a client, however
// many there are: -swap-requests=1000000 shows it.
func TestSwapNeedsNothing(t *testing.T) {
	s := serveSwap(t)
	c := s.dial()
	// As the kernel swaps: out by 128 KiB and by single pages, in by 32 KiB.
	round := func() int {
		c.batch(wire.CmdWrite, 8, 128<<10)
		c.batch(wire.CmdWrite, 16, 4096)
		c.batch(wire.CmdRead, 16, 32<<10)
		c.batch(wire.CmdRead, 1, 4096)
		return 8 + 16 + 16 + 1
	}
	s.counts() // what asking takes the first time
	before := s.counts()
	done := 0
	for done < *swapRequests {
		done += round()
	}
	after := s.counts()
	locked := s.statusOf()[0]["VmLck"] != "0 kB"
	t.Logf("%d requests: from %+v to %+v, memory locked: %v", done, before, after, locked)
	if !locked {
		// The host may drop pages of the program then.
		before.majflt = after.majflt
	}
	if after != before {
		t.Error("want no change")
	}
}
