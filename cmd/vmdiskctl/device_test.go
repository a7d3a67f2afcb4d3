package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd/kernel"
	"github.com/vmdiskd/vmdiskd/internal/transport/transporttest"
)

func TestDeviceAttachRefusesBeforeItAsksAnybody(t *testing.T) {
	const unix = "nbd+unix:///disk?socket=/nowhere"
	for _, tt := range []struct {
		code int
		args string
		says string
	}{
		{exitUsage, "", "want URI [/dev/nbdN], got 0 arguments"},
		{exitUsage, unix + " /dev/nbd0 more", "got 3 arguments"},
		{exitUsage, "/dev/nbd0", "an NBD URI is nbd://"},
		{exitUsage, unix + " /dev/sda", "/dev/nbdN"},
		{exitUsage, unix + " nbd9999999", "highest"},
		{exitUsage, unix + " --swapon", "--swap"},
		{exitUsage, unix + " --syslog", "--foreground"},
		{exitUsage, unix + " --foreground --ready-fd=1", "--ready-fd"},
		{exitUsage, unix + " --ready-fd=-2", "--ready-fd"},
		{exitUsage, unix + " --uri-fd=3", "--foreground"},
		{exitUsage, unix + " --foreground --uri-fd=0", "--uri-fd"},
		{exitUsage, unix + " --foreground --uri-fd=3 --ready-fd=3", "--uri-fd"},
		{exitUsage, unix + " --poll 1ms", "--poll"},
		{exitUsage, unix + " --timeout=soon", "soon"},
		{exitUsage, unix + " --swap --timeout 5s", "--swap"},
		{exitUsage, unix + " --swap --connections 2", "--swap"},
		{exitUsage, unix + " --connections 17", "want 1 to 16"},
		{exitUsage, unix + " --connections 0", "want 1 to 16"},
		{exitRefused, unix + " --timeout=-1s", "timeout"},
		{exitRefused, "nbd://localhost/disk --swap", "Unix socket"},
		{exitRefused, "nbd+vsock://2/disk --swap", "Unix socket"},
		{exitRefused, "nbds://localhost/disk --swap", "Unix socket"},
		{exitRefused, unix + " --swap --readonly", "read-only"},
	} {
		code, stdout, stderr := ctl(t, append([]string{"device", "attach"}, strings.Fields(tt.args)...)...)
		if code != tt.code || stdout != "" || !strings.Contains(stderr, tt.says) {
			t.Errorf("attach %s: exit code %d, want %d; %q %q", tt.args, code, tt.code, stdout, stderr)
		}
	}
	for _, name := range []string{"", "nbd", "sda", "/dev/nbd0/", "-1"} {
		want(t, exitUsage, "device", "detach", "--", name)
	}
}

// TestSizeOfASwapDeviceIsAskedForOnDemandOnly: the area on it cannot grow, and
// each question takes a connection to a server that has memory for few.
func TestSizeOfASwapDeviceIsAskedForOnDemandOnly(t *testing.T) {
	for _, tt := range []struct {
		args string
		want time.Duration
	}{
		{"--persist", limits.DevicePoll},
		{"--persist --poll=1s", time.Second},
		{"--persist --swap", 0},
		{"--persist --swap --poll=1s", time.Second},
	} {
		f := &deviceFlags{}
		c := f.command()
		if err := c.ParseFlags(strings.Fields(tt.args)); err != nil {
			t.Fatal(err)
		}
		if err := f.check(c, true); err != nil || f.poll != tt.want {
			t.Errorf("%s: asked for each %v, want %v; %v", tt.args, f.poll, tt.want, err)
		}
	}
}

// TestHolderThatCannotAttachIsHeard: the machine has no driver, or its user no
// right to it, or there is no server.
func TestHolderThatCannotAttachIsHeard(t *testing.T) {
	t.Setenv(asMain, "1")
	for _, uri := range []string{"nbd+unix:///disk?socket=/nowhere", "nbd+vsock://1:1/disk"} {
		code, stdout, stderr := ctl(t, "device", "attach", uri, "--persist")
		if code != exitFailed && code != exitRefused || stdout != "" {
			t.Errorf("exit code %d, %q", code, stdout)
		}
		if strings.Count(stderr, "vmdiskctl: ") != 1 || len(strings.TrimSpace(stderr)) < 20 {
			t.Errorf("standard error is %q", stderr)
		}
	}
}

// TestHolderIsToldTheURIInPrivate: everybody may read the arguments of a process
// for as long as it lives.
func TestHolderIsToldTheURIInPrivate(t *testing.T) {
	token := strings.Repeat("A5", limits.TokenDigits/2)
	uri := "nbd+unix:///disk%3F" + token + "?socket=/" + strings.Repeat("n", 1<<16) // more than a pipe takes at once
	self := filepath.Join(t.TempDir(), "self")
	must(t, os.WriteFile(self, []byte("#!/bin/sh\n{ echo \"$*\"; cat <&4; } >&3\n"), 0o700))
	f := &deviceFlags{}
	c := f.command()
	must(t, c.ParseFlags([]string{uri, "/dev/nbd7", "--persist", "--timeout=5s"}))
	h, w, err := f.startHolder(c, self)
	must(t, err)
	defer closePipes(h.ready, h.said)
	var told sync.WaitGroup
	told.Go(func() { tell(w, uri) })
	b, err := io.ReadAll(h.ready)
	must(t, err)
	told.Wait()
	must(t, h.Wait())
	args, read, _ := strings.Cut(string(b), "\n")
	if strings.Contains(args, token) || !strings.Contains(args, "--uri-fd=4 --persist=true --timeout=5s -- nbd+unix:///disk%3F") || !strings.HasSuffix(args, " /dev/nbd7") {
		t.Errorf("its arguments are %q", args)
	}
	if read != uri {
		t.Errorf("it reads %d bytes, want %d", len(read), len(uri))
	}
}

// TestURIIsReadFromItsDescriptor and not from the argument.
func TestURIIsReadFromItsDescriptor(t *testing.T) {
	for name, tt := range map[string]struct {
		text, says string
		code       int
	}{
		"another server": {"nbd+vsock://2/disk\n", "swap needs a Unix socket", exitRefused},
		"no URI":         {"", "an NBD URI is", exitUsage},
		"too long":       {"nbd+unix:///disk?socket=/" + strings.Repeat("n", limits.DeviceURI), "--uri-fd", exitUsage},
	} {
		path := filepath.Join(t.TempDir(), "uri")
		must(t, os.WriteFile(path, []byte(tt.text), 0o600))
		// A descriptor that nothing else owns: the command closes it.
		fd, err := syscall.Open(path, syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
		must(t, err)
		code, _, stderr := ctl(t, "device", "attach", "--foreground", "--swap", fmt.Sprintf("--uri-fd=%d", fd), "nbd+unix:///disk?socket=/nowhere")
		if code != tt.code || !strings.Contains(stderr, tt.says) {
			t.Errorf("%s: exit code %d, want %d; %q", name, code, tt.code, stderr)
		}
	}
}

func TestSwapDevicesAreFoundInTheTable(t *testing.T) {
	const table = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n" +
		"/dev/nbd10                              partition\t65532\t\t0\t\t-2\n/swap\\040file\tfile\t1\t0\t-3\n/dev/nbd3\tpartition\t1\t0\t-4\n"
	for device, want := range map[string]bool{"/dev/nbd10": true, "/dev/nbd3": true, "/dev/nbd1": false, "/dev/nbd": false} {
		if got := swapsOn(table, device); got != want {
			t.Errorf("%s: %v", device, got)
		}
	}
}

// TestSwapOnIsSeenToItsEnd: what is interrupted knows whether the machine swaps
// to the device, which is not to be taken away then.
func TestSwapOnIsSeenToItsEnd(t *testing.T) {
	dir := t.TempDir()
	must(t, syscall.Mkfifo(filepath.Join(dir, "begun"), 0o600))
	must(t, syscall.Mkfifo(filepath.Join(dir, "go"), 0o600))
	for name, text := range map[string]string{
		"mkswap": "#!/bin/sh\n",
		"swapon": "#!/bin/sh\ncd " + dir + "\necho >begun\nread -r _ <go\n: >done\n",
	} {
		must(t, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o700))
	}
	t.Setenv("PATH", dir)
	ctx, interrupt := context.WithCancel(t.Context())
	var ended error
	var swapping sync.WaitGroup
	swapping.Go(func() { ended = swapOn(ctx, "/dev/nbd65535") })
	_, err := os.ReadFile(filepath.Join(dir, "begun"))
	must(t, err)
	interrupt()
	// Nobody reads this when swapon was killed.
	fifo, err := os.OpenFile(filepath.Join(dir, "go"), os.O_RDWR, 0)
	must(t, err)
	defer fifo.Close()
	_, err = fifo.WriteString("\n")
	must(t, err)
	swapping.Wait()
	if !errors.Is(ended, context.Canceled) {
		t.Errorf("an interrupted swapOn: %v, want %v", ended, context.Canceled)
	}
	if _, err := os.Stat(filepath.Join(dir, "done")); err != nil {
		t.Errorf("swapon has not come to its end: %v", err)
	}
}

func TestReportedDeviceIsRead(t *testing.T) {
	for _, f := range []deviceFlags{{}, {json: true}} {
		var b bytes.Buffer
		must(t, f.report(&b, &kernel.Device{}, "nbd://host/"))
		if index, err := f.heldDevice(b.Bytes()); err != nil || index != 0 {
			t.Errorf("%q: device %d, %v", b.String(), index, err)
		}
	}
}

// TestDeviceHasTheCertificatesOfTheDay: each connection of a device reads them.
func TestDeviceHasTheCertificatesOfTheDay(t *testing.T) {
	file := filepath.Join(t.TempDir(), "ca-cert.pem")
	must(t, os.WriteFile(file, transporttest.NewCA(t, "old").PEM(), 0o600))
	s, err := (&connectFlags{}).server("nbds://host/disk?tls-certificates=" + filepath.Dir(file))
	must(t, err)
	must(t, os.WriteFile(file, transporttest.NewCA(t, "new").PEM(), 0o600))
	now, err := s.renew()
	must(t, err)
	if now.ServerName != "host" || now.RootCAs.Equal(s.tls.RootCAs) {
		t.Errorf("the authority of %s is not the new one", now.ServerName)
	}
	must(t, os.Remove(file))
	if _, err := s.renew(); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("without its file: %v", err)
	}
	if s, err := (&connectFlags{}).server("nbd://host/disk"); err != nil || s.renew != nil {
		t.Errorf("without TLS: %v", err)
	}
}
