package main

import (
	"context"
	"net"
	"os"
	"path/filepath"
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

// TestSignalIsAnInterruption, and no text about contexts alone.
func TestSignalIsAnInterruption(t *testing.T) {
	startDaemon(t)
	path := filepath.Join(testenv.TempDir(t), "qmp")
	l, err := net.Listen("unix", path)
	must(t, err)
	defer l.Close()
	ctx, cancel := context.WithCancel(t.Context())
	go func() { // a machine that says nothing
		if c, err := l.Accept(); err == nil {
			defer c.Close()
			cancel()
			<-t.Context().Done()
		}
	}()
	stderr, err := os.CreateTemp(t.TempDir(), "")
	must(t, err)
	defer stderr.Close()
	code := run(ctx, []string{"detach", path, "disk"}, os.Stdout, stderr)
	said, err := os.ReadFile(stderr.Name())
	must(t, err)
	if code != exitFailed || !strings.Contains(string(said), "interrupted: ") {
		t.Errorf("exit code %d, %q, want interrupted", code, said)
	}
}
