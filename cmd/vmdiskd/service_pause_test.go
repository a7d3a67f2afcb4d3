package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

// TestImageOfAPausedExportIsWhole: while an export is paused, a copy of its
// file is the disk, whatever the cache mode and without the daemon's help.
func TestImageOfAPausedExportIsWhole(t *testing.T) {
	t.Parallel()
	for _, cache := range []string{"writeback", "none", "writethrough", "directsync", "unsafe"} {
		t.Run(cache, func(t *testing.T) {
			s := newService(t, "")
			if out, err := tool(t, s.dir, "qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "4M"); err != nil {
				t.Fatal(err, out)
			}
			s.stop()
			s.configure("[[export]]\nname = \"a\"\nimage = \"DIR/a.qcow2\"\nformat = \"qcow2\"\ncache = \"" + cache + "\"\n")
			s.start()
			s.write("a", "0x41", "1M")
			if err := s.ctl.Pause(t.Context(), "a", 0); err != nil {
				t.Fatal(err)
			}
			p, err := os.ReadFile(filepath.Join(s.dir, "a.qcow2"))
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(s.dir, "copy"), p, 0o600); err != nil {
				t.Fatal(err)
			}
			if out, err := tool(t, s.dir, "qemu-io", "-r", "-f", "qcow2", "-c", "read -P 0x41 1M 64k", "copy"); err != nil {
				t.Errorf("the copy is another disk: %v: %s", err, out)
			}
			if err := s.ctl.Resume(t.Context(), "a"); err != nil {
				t.Error(err)
			}
			s.stop()
		})
	}
}

// TestAskingForAPausedExportFlushesNothing: who asks what there is has written
// nothing that flush-on-close would have to wait for.
func TestAskingForAPausedExportFlushesNothing(t *testing.T) {
	t.Parallel()
	addr, listener := tcpListener(t)
	s := newService(t, listener+exportA+"flush-on-close = true\n")
	if err := s.ctl.Pause(t.Context(), "a", 0); err != nil {
		t.Fatal(err)
	}
	c := greet(t, dialFrom(t, "127.0.0.2", addr))
	for range 2 {
		if rep, _ := c.option(wire.OptInfo, wire.AppendInfoRequest(nil, wire.InfoRequest{Name: "a"})); rep != wire.RepAck {
			t.Fatalf("INFO: got %v", rep)
		}
	}
	if err := s.ctl.Resume(t.Context(), "a"); err != nil {
		t.Error(err)
	}
	s.stop()
}
