package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// leastStarts is how often a peer is started for one sample at least.
const leastStarts = 10

// dialEvery is the pause between tries to connect to a server that starts.
const dialEvery = 200 * time.Microsecond

// starts starts and stops a server for as long as a case lasts. The programs
// that set its processor and its surroundings are part of each time.
func (b *bench) starts(ctx context.Context, c testCase, p peer) (s sample, err error) {
	// What is not timed: the program is built once.
	if _, err := testenv.Build(ctx, "vmdiskd"); err != nil {
		return s, err
	}
	var greeted, ready []float64
	end := time.Now().Add(time.Duration(b.secs * float64(time.Second)))
	for len(greeted) < leastStarts || time.Now().Before(end) {
		g, r, err := b.start(ctx, c, p)
		if err != nil {
			return s, fmt.Errorf("%s, %s: %w", c.name, p.name, err)
		}
		if greeted = append(greeted, micros(g)); r > 0 {
			ready = append(ready, micros(r))
		}
	}
	slices.Sort(greeted)
	n := len(greeted)
	s.Starts, s.Ready = n, median(ready)
	s.P50, s.P99 = median(greeted), greeted[min(n-1, n*99/100)]
	return s, nil
}

// start starts a server once. ready is 0 for a program that does not say it.
func (b *bench) start(ctx context.Context, c testCase, p peer) (greeted, ready time.Duration, err error) {
	dir, err := os.MkdirTemp("", "vmdb")
	if err != nil {
		return 0, 0, err
	}
	defer os.RemoveAll(dir)
	ctx, cancel := context.WithTimeout(ctx, testenv.Patience)
	defer cancel()
	manager, err := listenManager(filepath.Join(dir, "notify"))
	if err != nil {
		return 0, 0, err
	}
	defer manager.Close()
	begun := time.Now()
	told, answered := make(chan moment, 1), make(chan moment, 1)
	if p.kind.Program == "" { // vmdiskd
		go func() { told <- awaitReady(ctx, manager) }()
	} else {
		told <- moment{at: begun}
	}
	go func() { answered <- awaitGreeting(ctx, filepath.Join(dir, p.kind.Name+".sock")) }()
	server, err := b.launch(ctx, c, p, dir, "env", "NOTIFY_SOCKET="+filepath.Join(dir, "notify"))
	if err != nil {
		cancel()
	} else {
		defer server.Stop()
	}
	a, r := <-answered, <-told
	return a.at.Sub(begun), r.at.Sub(begun), errors.Join(err, a.err, r.err)
}

// moment is when something came, or why it did not.
type moment struct {
	at  time.Time
	err error
}

// listenManager is the socket of a service manager, which every user can send
// to, as systemd's.
func listenManager(path string) (*net.UnixConn, error) {
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return nil, err
	}
	if err := errors.Join(os.Chmod(filepath.Dir(path), 0o711), os.Chmod(path, 0o666)); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

// awaitReady waits for READY=1, as sd_notify(3) has it.
func awaitReady(ctx context.Context, c *net.UnixConn) moment {
	defer context.AfterFunc(ctx, func() { c.SetReadDeadline(time.Now()) })()
	for b := make([]byte, 4096); ; {
		n, err := c.Read(b)
		if err != nil {
			return moment{err: fmt.Errorf("wait for READY=1: %w", err)}
		}
		if slices.Contains(strings.Split(string(b[:n]), "\n"), "READY=1") {
			return moment{at: time.Now()}
		}
	}
}

// awaitGreeting connects as soon as there is somebody to connect to.
func awaitGreeting(ctx context.Context, socket string) moment {
	pause := time.NewTicker(dialEvery)
	defer pause.Stop()
	for {
		if conn, err := net.Dial("unix", socket); err == nil {
			defer conn.Close()
			defer context.AfterFunc(ctx, func() { conn.SetReadDeadline(time.Now()) })()
			_, err = io.ReadFull(conn, make([]byte, greetingBytes))
			return moment{time.Now(), err}
		}
		select {
		case <-pause.C:
		case <-ctx.Done():
			return moment{err: fmt.Errorf("wait for %q: %w", socket, ctx.Err())}
		}
	}
}

// greetingBytes is what a newstyle server says first: two magic numbers and its
// handshake flags.
const greetingBytes = 8 + 8 + 2

// writeStarts lists the times of starts, in milliseconds.
func writeStarts(w io.Writer, rows []row, width int) {
	t := sheet{w: w, peer: width, columns: []column{{"starts", 6}, {"ms to READY", 11}, {"ms to greeting", 14}, {"99 % of them", 12}, {"ratio", 6}}}
	millis := func(us float64) string { return fixed(us/1000, 1) }
	for _, r := range rows {
		if r.Starts == 0 {
			continue
		}
		ready := "-"
		if r.Ready > 0 {
			ready = millis(r.Ready)
		}
		t.add(r, fixed(r.Starts, 0), ready, millis(r.P50), millis(r.P99), ratioText(r.Ratio))
	}
}
