package main

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// TestAttachWithAnImageForTheMachineSaysSo: nobody listens at what is no socket.
func TestAttachWithAnImageForTheMachineSaysSo(t *testing.T) {
	d := startDaemon(t)
	image := d.image(t, "a")
	if code, _, stderr := ctl(t, "attach", image, "/run/vm1.qmp"); code == exitDone || !strings.Contains(stderr, "it is no socket") {
		t.Errorf("exit code %d, %q, want it to be no socket", code, stderr)
	}
}

// silentMachine is the socket of a machine that says nothing. asked is called when
// somebody has connected.
func silentMachine(t *testing.T, asked func()) (path string) {
	t.Helper()
	path = filepath.Join(testenv.TempDir(t), "qmp")
	l, err := net.Listen("unix", path)
	must(t, err)
	t.Cleanup(func() { l.Close() })
	go func() {
		if c, err := l.Accept(); err == nil {
			defer c.Close()
			asked()
			<-t.Context().Done()
		}
	}()
	return path
}

// TestSignalIsAnInterruption, and no text about contexts alone, whatever the command
// has asked the machine for.
func TestSignalIsAnInterruption(t *testing.T) {
	startDaemon(t)
	for _, args := range [][]string{
		{"detach", "VM", "disk"},
		{"vm", "list", "VM"},
		{"vm", "show", "VM"},
		{"vm", "lease", "VM", "--pid=1"},
	} {
		t.Run(strings.Join(args, " "), func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			args := slices.Clone(args)
			args[slices.Index(args, "VM")] = silentMachine(t, cancel)
			stderr, err := os.CreateTemp(t.TempDir(), "")
			must(t, err)
			defer stderr.Close()
			code := run(ctx, args, os.Stdout, stderr)
			said, err := os.ReadFile(stderr.Name())
			must(t, err)
			if text := string(said); code != exitFailed || !strings.HasPrefix(text, "vmdiskctl: interrupted: ") || strings.Count(text, "interrupted") != 1 {
				t.Errorf("exit code %d, %q, want interrupted", code, said)
			}
		})
	}
}
