package server_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/internal/control/controltest"
	"github.com/vmdiskd/vmdiskd/internal/control/server"
	"github.com/vmdiskd/vmdiskd/internal/limits"
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

// TestStreamEndsWithTheRightToRead, before the next event.
func TestStreamEndsWithTheRightToRead(t *testing.T) {
	for _, tt := range []struct {
		name        string
		before, now server.Access
		want        []string
	}{
		{"a reader stays", server.Read, server.Read, []string{"first", "second"}},
		{"a reader may change things", server.Read, server.Change, []string{"first", "second"}},
		{"a reader may do nothing", server.Read, server.NoAccess, []string{"first"}},
		{"who could change things may read", server.Change, server.Read, []string{"first", "second"}},
		{"who could change things may do nothing", server.Change, server.NoAccess, []string{"first"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var access atomic.Uint32
			access.Store(uint32(tt.before))
			s := &controltest.Service{}
			w := startWith(t, s, func(server.Peer) server.Access { return server.Access(access.Load()) })
			seq, err := w.client.Events(testContext(t))
			if err != nil {
				t.Fatal(err)
			}
			s.Publish(api.Event{Kind: "first"})
			var got []string
			for e, err := range seq {
				if err != nil {
					t.Fatal(err)
				}
				if got = append(got, e.Kind); e.Kind == "second" {
					break
				}
				access.Store(uint32(tt.now))
				s.Publish(api.Event{Kind: "second"})
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("got the events %q, want %q", got, tt.want)
			}
		})
	}
}

// TestReadersLeaveRoomForOthers: one user who may only look does not take all
// streams, and is told why there is none for it.
func TestReadersLeaveRoomForOthers(t *testing.T) {
	var changes atomic.Bool
	w := startWith(t, &controltest.Service{}, func(server.Peer) server.Access {
		if changes.Load() {
			return server.Change
		}
		return server.Read
	})
	leaving, leave := context.WithCancel(testContext(t))
	for i := range limits.EventsPerReader {
		ctx := testContext(t)
		if i == 0 {
			ctx = leaving
		}
		if _, err := w.client.Events(ctx); err != nil {
			t.Fatalf("stream %d: %v", i+1, err)
		}
	}
	_, err := w.client.Events(testContext(t))
	var e *api.Error
	if !errors.As(err, &e) || e.Code != api.CodeInUse {
		t.Errorf("one more: got %v, want an error with code %s", err, api.CodeInUse)
	}
	changes.Store(true)
	for i := range limits.EventsPerReader {
		if _, err := w.client.Events(testContext(t)); err != nil {
			t.Errorf("stream %d of who may change things: %v", i+1, err)
		}
	}
	changes.Store(false)
	leave()
	for ctx := testContext(t); ; {
		_, err := w.client.Events(ctx)
		if err == nil {
			break
		}
		if !errors.As(err, &e) || e.Code != api.CodeInUse {
			t.Fatalf("after one has left: %v", err)
		}
	}
}

// TestListenersLeaveTheirUserConnections: streams of events of who may change
// things do not keep the same user from doing so.
func TestListenersLeaveTheirUserConnections(t *testing.T) {
	w := start(t, &controltest.Service{}, server.Change)
	for range limits.EventsPerUser {
		if _, err := w.client.Events(testContext(t)); err != nil {
			t.Fatal(err)
		}
	}
	for range limits.ControlConnsPerUID {
		_, err := w.client.Events(testContext(t))
		var e *api.Error
		if !errors.As(err, &e) || e.Code != api.CodeInUse {
			t.Fatalf("one more: got %v, want an error with code %s", err, api.CodeInUse)
		}
	}
	if _, err := w.client.Status(testContext(t)); err != nil {
		t.Errorf("another request of the user: %v", err)
	}
}

func TestServiceWithoutRoomSaysSo(t *testing.T) {
	s := &controltest.Service{Fail: &api.Error{Code: api.CodeInUse, Text: "no room"}}
	w := start(t, s, server.Change)
	var e *api.Error
	if _, err := w.client.Events(testContext(t)); !errors.As(err, &e) || e.Code != api.CodeInUse {
		t.Errorf("got %v, want an error with code %s", err, api.CodeInUse)
	}
}
