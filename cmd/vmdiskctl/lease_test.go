package main

import (
	"context"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	ctlserver "github.com/vmdiskd/vmdiskd/internal/control/server"
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
	for name, end := range map[string]func(vm *exec.Cmd, holder context.CancelFunc){
		"machine": func(vm *exec.Cmd, _ context.CancelFunc) { _ = vm.Process.Kill(); _ = vm.Wait() },
		"holder":  func(_ *exec.Cmd, holder context.CancelFunc) { holder() },
	} {
		t.Run(name, func(t *testing.T) {
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
			end(vm, cancel)
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
		})
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
