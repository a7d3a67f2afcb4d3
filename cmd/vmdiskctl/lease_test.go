package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
	control "github.com/vmdiskd/vmdiskd/internal/control/client"
	"github.com/vmdiskd/vmdiskd/internal/control/controltest"
	ctlserver "github.com/vmdiskd/vmdiskd/internal/control/server"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// machineProcess is a process that stands for a QEMU.
func machineProcess(t *testing.T) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("sleep", "600")
	must(t, cmd.Start())
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	return cmd
}

// TestLeaseEndsWithItsMachineOrItsHolder is the holder's side of AU-03: the
// lease is there while both live, and is closed by name when one ends.
func TestLeaseEndsWithItsMachineOrItsHolder(t *testing.T) {
	for _, tt := range []struct {
		name  string
		end   func(vm *exec.Cmd, holder context.CancelFunc)
		whole bool // for other holders, too
	}{
		{"machine", func(vm *exec.Cmd, _ context.CancelFunc) { _ = vm.Process.Kill(); _ = vm.Wait() }, true},
		{"holder", func(_ *exec.Cmd, holder context.CancelFunc) { holder() }, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := controlled(t, ctlserver.Change)
			vm := machineProcess(t)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
			must(t, err)
			defer null.Close()
			done := make(chan int, 1)
			go func() {
				done <- run(ctx, []string{"vm", "lease", "vm 1", "--cid=42", "--pid=" + strconv.Itoa(vm.Process.Pid), "--ttl=1s"}, io.Discard, null)
			}()
			limit := time.After(time.Minute)
			renewals := func() int { return strings.Count(strings.Join(s.Calls(), "|"), "open lease 42") }
			for renewals() < 2 {
				select {
				case <-limit:
					t.Fatalf("the lease is not renewed: %q", s.Calls())
				case code := <-done:
					t.Fatalf("ended with %d: %q", code, s.Calls())
				case <-time.After(20 * time.Millisecond):
				}
			}
			all := s.Leases()
			if len(all) != 1 || all[0].CID != 42 || all[0].VM != "vm 1" || !strings.HasPrefix(all[0].Start, strconv.Itoa(vm.Process.Pid)+"-") {
				t.Errorf("leases: %+v", all)
			}
			tt.end(vm, cancel)
			select {
			case code := <-done:
				if code != exitDone {
					t.Errorf("exit status %d", code)
				}
			case <-limit:
				t.Fatal("it does not end")
			}
			if all := s.Leases(); len(all) != 0 {
				t.Errorf("leases at the end: %+v", all)
			}
			last := s.Calls()[len(s.Calls())-1]
			if !strings.HasPrefix(last, "close lease 42") || strings.HasSuffix(last, ` by ""`) != tt.whole {
				t.Errorf("at the end: %q; closed for all holders: want %t", last, tt.whole)
			}
			opened := map[string]bool{}
			for _, c := range s.Calls() {
				if _, by, ok := strings.Cut(c, " by "); ok && strings.HasPrefix(c, "open") {
					opened[by] = true
				}
			}
			if len(opened) != 1 || opened[`""`] {
				t.Errorf("opened by %v, want one name", opened)
			}
		})
	}
}

// fullListener is a control socket that has no room, as often as full says.
type fullListener struct {
	net.Listener
	full atomic.Int32
}

func (l *fullListener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil || l.full.Add(-1) < 0 {
			return c, err
		}
		_, _ = io.WriteString(c, "HTTP/1.1 503 No\r\nContent-Length: 31\r\n\r\n{\"code\":\"in-use\",\"text\":\"full\"}")
		_ = c.Close()
	}
}

// TestLeaseOutlivesAFullDaemon holds that a daemon without room for a connection
// has not refused the lease, neither to renew nor to close it.
func TestLeaseOutlivesAFullDaemon(t *testing.T) {
	path := filepath.Join(t.TempDir(), "control")
	raw, err := net.Listen("unix", path)
	must(t, err)
	l := &fullListener{Listener: raw}
	s := &controltest.Service{}
	stop := answerOn(l, s, ctlserver.Change)
	defer stop()
	p, err := watchProcess(machineProcess(t).Process.Pid)
	must(t, err)
	defer p.close()
	h := &leaseHolder{
		client: control.Dial(path), process: p, note: func(string) {},
		lease: api.OpenLease{CID: 42, VM: "vm1", Start: p.start, TTL: config.Duration(limits.LeaseShortest)},
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- h.hold(ctx) }()
	limit := time.After(time.Minute)
	for renewals, full := 0, 0; full < 3; {
		if n := strings.Count(strings.Join(s.Calls(), "|"), "open lease 42"); n > renewals {
			renewals, full = n, full+1
			l.full.Store(3)
		}
		select {
		case <-limit:
			t.Fatalf("the lease is not renewed: %q", s.Calls())
		case err := <-done:
			t.Fatalf("ended with %v: %q", err, s.Calls())
		case <-time.After(20 * time.Millisecond):
		}
	}
	cancel()
	select {
	case err := <-done:
		must(t, err)
	case <-limit:
		t.Fatal("it does not end")
	}
	if all := s.Leases(); len(all) != 0 {
		t.Errorf("leases at the end: %+v", all)
	}
}

// TestOnlyTheDaemonRefusesALease: what did not reach it is tried again.
func TestOnlyTheDaemonRefusesALease(t *testing.T) {
	for _, tt := range []struct {
		err  error
		want bool
	}{
		{&api.Error{Code: api.CodeInUse, Text: "leased to another"}, true},
		{fmt.Errorf("wrapped: %w", &api.Error{Code: api.CodeForbidden}), true},
		{&control.NoRoomError{Refusal: &api.Error{Code: api.CodeInUse, Text: "too many connections"}}, false},
		{&control.SocketError{Path: "/nowhere", Err: io.EOF}, false},
		{context.DeadlineExceeded, false},
		{nil, false},
	} {
		if got := control.RefusalOf(tt.err) != nil; got != tt.want {
			t.Errorf("%v: got %t, want %t", tt.err, got, tt.want)
		}
	}
}

func TestLeaseIsRefusedForWhatIsNoMachine(t *testing.T) {
	controlled(t, ctlserver.Change)
	gone := machineProcess(t)
	_ = gone.Process.Kill()
	_ = gone.Wait()
	want(t, exitUsage, "vm", "lease", "vm1")
	want(t, exitUsage, "vm", "lease", "vm1", "--cid=42")
	want(t, exitUsage, "vm", "lease", "vm1", "--cid=42", "--pid=-1")
	want(t, exitUsage, "vm", "lease", "vm1", "--cid=-1", "--pid=1")
	want(t, exitUsage, "vm", "lease", "vm1", "--cid=42", "--pid=1", "--ttl=1ms")
	want(t, exitFailed, "vm", "lease", "vm1", "--cid=42", "--pid="+strconv.Itoa(gone.Process.Pid))
	want(t, exitFailed, "vm", "lease", "/nowhere/qmp")
}

func TestReaderCannotLease(t *testing.T) {
	controlled(t, ctlserver.Read)
	want(t, exitRefused, "vm", "lease", "vm1", "--cid=42", "--pid="+strconv.Itoa(os.Getpid()))
}

func TestStartIsReadBehindAnyName(t *testing.T) {
	rest := " S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 777 19 20"
	for _, name := range []string{"qemu", "a b", ") S 1 (", "))"} {
		if got, err := startOf(5, []byte("5 ("+name+")"+rest)); err != nil || got != "5-777" {
			t.Errorf("%q: got %q, %v", name, got, err)
		}
	}
	if _, err := startOf(5, []byte("5 (x) S 1")); err == nil {
		t.Error("a short stat was taken")
	}
}
