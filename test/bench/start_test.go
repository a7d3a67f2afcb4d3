package main

import (
	"bytes"
	"context"
	"net"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// TestStartIsMeasured: of one that says READY=1, and of one that does not.
func TestStartIsMeasured(t *testing.T) {
	testenv.Require(t, "cc", "taskset", "nbdkit")
	ctx := testenv.Context(t)
	b, err := newBench(ctx, testenv.TempDir(t), 1<<20, 0.01)
	if err != nil {
		t.Fatal(err)
	}
	peers, err := parsePeers("nbdkit,vmdiskd," + confined() + ",service 1")
	if err != nil {
		t.Fatal(err)
	}
	samples, err := b.round(ctx, cases[indexCase("start")], peers, 0)
	if err != nil || len(samples) != len(peers) {
		t.Fatalf("%d samples, %v; want %d", len(samples), err, len(peers))
	}
	for _, s := range samples {
		if says := s.Peer != "nbdkit"; s.Starts < leastStarts || s.P50 <= 0 || s.P99 < s.P50 || says != (s.Ready > 0) {
			t.Errorf("%+v", s)
		}
	}
	var out bytes.Buffer
	rows := summarize(samples, "")
	writeTable(&out, rows)
	if rows[0].Ratio != 1 || rows[1].Ratio <= 0 || strings.Count(out.String(), "| start ") != len(peers) {
		t.Errorf("each peer has one row in\n%s", out.String())
	}
}

// TestServerThatDoesNotStartIsNotWaitedFor: nor what it would have said.
func TestServerThatDoesNotStartIsNotWaitedFor(t *testing.T) {
	testenv.Require(t, "taskset")
	b := &bench{image: filepath.Join(testenv.TempDir(t), "missing")}
	peers, err := parsePeers("vmdiskd")
	if err != nil {
		t.Fatal(err)
	}
	_, _, err = b.start(testenv.Context(t), cases[indexCase("start")], peers[0])
	if err == nil || !strings.Contains(err.Error(), "no such file") {
		t.Errorf("start without an image: got %v, want no such file", err)
	}
}

// TestReadyIsALineOfItsOwn among what a program tells its service manager.
func TestReadyIsALineOfItsOwn(t *testing.T) {
	path := filepath.Join(testenv.TempDir(t), "notify")
	c, err := listenManager(path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	to, err := net.Dial("unixgram", path)
	if err != nil {
		t.Fatal(err)
	}
	defer to.Close()
	for _, text := range []string{"STATUS=not READY=1", "MAINPID=7\nREADY=1\nSTATUS=serving"} {
		if _, err := to.Write([]byte(text)); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(testenv.Context(t))
	if m := awaitReady(ctx, c); m.err != nil || m.at.IsZero() {
		t.Errorf("got %+v", m)
	}
	cancel()
	if m := awaitReady(ctx, c); m.err == nil {
		t.Errorf("nothing more was said: got %+v, want an error", m)
	}
}
