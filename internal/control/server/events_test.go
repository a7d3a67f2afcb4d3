package server_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/internal/control/controltest"
	"github.com/vmdiskd/vmdiskd/internal/control/server"
)

func TestEventsArriveInOrderUntilTheServerEnds(t *testing.T) {
	s := &controltest.Service{}
	w := start(t, s, server.Read)
	seq, err := w.client.Events(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	const n = 100
	for i := range n {
		s.Publish(api.Event{Kind: "client-connected", Client: uint64(i), Export: "a\nb"})
	}
	got := uint64(0)
	for e, err := range seq {
		if err != nil {
			t.Fatal(err)
		}
		if e.Client != got || e.Export != "a\nb" || e.Time.IsZero() {
			t.Fatalf("event %d: got %+v", got, e)
		}
		if got++; got == n {
			go s.Close()
		}
	}
	if got != n {
		t.Errorf("got %d events, want %d", got, n)
	}
}

func TestEventsAreLinesThatLeaveAtOnce(t *testing.T) {
	s := &controltest.Service{}
	w := start(t, s, server.Read)
	c := w.dial(t)
	if _, err := io.WriteString(c, request("GET", "/v1/events", "")); err != nil {
		t.Fatal(err)
	}
	r := bufio.NewReader(c)
	for line := ""; line != "\r\n"; {
		var err error
		if line, err = r.ReadString('\n'); err != nil {
			t.Fatal(err)
		}
	}
	for _, kind := range []string{"io-error", "poisoned"} {
		s.Publish(api.Event{Kind: kind})
		size, err := r.ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		line, err := r.ReadString('\n')
		if err != nil || !strings.HasPrefix(line, "{") || !strings.Contains(line, `"kind":"`+kind+`"`) || size != fmt.Sprintf("%x\r\n", len(line)) {
			t.Fatalf("got %q in %q, %v", line, size, err)
		}
		if _, err := r.Discard(2); err != nil {
			t.Fatal(err)
		}
	}
}

func TestCloseEndsStreamsAndListenersLeave(t *testing.T) {
	s := &controltest.Service{}
	w := start(t, s, server.Read)
	ctx, cancel := context.WithCancel(testContext(t))
	first, err := w.client.Events(ctx)
	if err != nil {
		t.Fatal(err)
	}
	second, err := w.client.Events(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	for _, err := range first {
		if !errors.Is(err, context.Canceled) {
			t.Errorf("a listener that left: got %v", err)
		}
	}
	if err := w.server.Close(testContext(t)); err != nil {
		t.Error(err)
	}
	for e, err := range second {
		t.Errorf("after the end: got %+v, %v", e, err)
	}
}
