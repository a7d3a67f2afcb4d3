// The race detector shadows stacks and buffers, and remembers every place in memory
// that was ever used.

//go:build !race

package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

const (
	// leakKiB is what resident memory may grow by in thousands of cycles.
	leakKiB = 4 << 10

	// idleKiB is what an idle connection may take of resident memory.
	idleKiB = 64
)

// TestIdleConnectionsCostLittle is LM-08 in short: 256 connections of 16 peers do
// nothing, for a second. The first of each peer are there before what is counted.
func TestIdleConnectionsCostLittle(t *testing.T) {
	t.Parallel()
	addr, listener := tcpListener(t)
	s := newService(t, listener+exportA)
	open := func(peers, each int) {
		t.Helper()
		for p := range peers {
			for range each {
				k, _ := mustGo(t, dialFrom(t, fmt.Sprintf("127.0.1.%d", p+1), addr), "a")
				k.reads(1)
			}
		}
	}
	open(16, 1)
	before := s.use()
	const peers, each = 16, 15
	open(peers, each)
	after := s.use()
	if grown := (after.rssKiB - before.rssKiB) / (peers * each); grown > idleKiB {
		t.Errorf("an idle connection costs %d KiB of resident memory, allowed are %d", grown, idleKiB)
	}
	ticks := s.cpuTicks()
	<-time.After(time.Second) // time in which nothing shall happen
	if used := s.cpuTicks() - ticks; used > 10 {
		t.Errorf("%d idle connections used %d ms of CPU in a second", peers*(1+each), 10*used)
	}
	s.stop()
}

// settled waits until the service holds no more than before, and returns what
// it holds.
func (s *testService) settled(before use) (u use) {
	s.Helper()
	for end := time.Now().Add(hangLimit); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if u = s.use(); u.files <= before.files && u.goroutines <= before.goroutines {
			break
		}
	}
	if u.files > before.files || u.goroutines > before.goroutines || u.threads > before.threads+8 {
		s.Errorf("left behind: %+v, before it was %+v", u, before)
	}
	return u
}

// leavesNothing makes some cycles, and then many, of which the service may keep
// nothing.
func (s *testService) leavesNothing(some, many int, cycle func(n int)) {
	s.Helper()
	cycle(some)
	before := s.settled(s.use())
	cycle(many)
	after := s.settled(before)
	if grown := after.rssKiB - before.rssKiB; grown > leakKiB {
		s.Errorf("resident memory: grown by %d KiB in %d cycles", grown, many)
	}
}

// TestSessionsLeaveNothingBehind is LM-09.
func TestSessionsLeaveNothingBehind(t *testing.T) {
	t.Parallel()
	s := newService(t, exportA+exportB)
	s.leavesNothing(1000, 10000, func(n int) {
		for i := range n {
			k := s.open([]string{"a", "b"}[i%2])
			k.reads(1)
			k.disconnect()
		}
	})
	s.stop()
}

// TestExportsLeaveNothingBehind: with all that an export can have.
func TestExportsLeaveNothingBehind(t *testing.T) {
	t.Parallel()
	s := newService(t, exportA)
	ctx := context.WithoutCancel(t.Context())
	s.leavesNothing(50, 300, func(n int) {
		for i := range n {
			x := config.Export{
				Name: fmt.Sprintf("x%d", i), Image: filepath.Join(s.dir, "b.img"),
				Rate: &config.Rate{Ops: 1000}, Overlay: &config.Overlay{Quota: 1 << 20}, LogRequests: true, FlushOnClose: true,
				Listeners: []config.Listener{{URI: "nbd+unix:///?socket=" + filepath.Join(s.dir, "own")}},
				Faults:    []config.Fault{{Ops: []string{"read"}, Error: "EIO"}},
			}
			if _, err := s.ctl.Add(ctx, api.AddExport{Export: x, Persist: i%2 == 0}); err != nil {
				t.Fatal(err)
			}
			conn, err := net.Dial("unix", filepath.Join(s.dir, "own"))
			if err != nil {
				t.Fatal(err)
			}
			k, _ := mustGo(t, conn, x.Name)
			k.request(wire.CmdWrite, 1, 0, 512, make([]byte, 512))
			if e, _ := k.reply(); e != wire.OK {
				t.Fatalf("write: got %v", e)
			}
			// Some are removed under their client.
			if i%3 != 0 {
				k.disconnect()
			}
			if err := s.ctl.Remove(ctx, x.Name, true, hangLimit); err != nil {
				t.Fatal(err)
			}
			k.Close()
		}
	})
	left, err := os.ReadDir(filepath.Join(s.dir, "state"))
	if err != nil || len(left) != 1 || left[0].Name() != ".lock" {
		t.Errorf("state folder: got %v, %v, want its lock alone", left, err)
	}
	s.stop()
}
