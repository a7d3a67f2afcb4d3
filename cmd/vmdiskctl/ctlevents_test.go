package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/internal/control/controltest"
	ctlserver "github.com/vmdiskd/vmdiskd/internal/control/server"
)

// eventful has events for whoever listens, and then runs then, with their
// channel.
type eventful struct {
	controltest.Service
	events []api.Event
	then   func(chan api.Event)
}

func (e *eventful) Subscribe(int) (<-chan api.Event, func(), error) {
	ch := make(chan api.Event, len(e.events))
	for _, x := range e.events {
		ch <- x
	}
	e.then(ch)
	return ch, func() {}, nil
}

// stay leaves a stream as it is.
func stay(chan api.Event) {}

// follow runs the command events with a service where events happen.
func follow(t *testing.T, ctx context.Context, events []api.Event, then func(chan api.Event), args ...string) (int, string) {
	t.Helper()
	answer(t, &eventful{events: events, then: then}, ctlserver.Read)
	var out bytes.Buffer
	code := run(ctx, append([]string{"events"}, args...), &out, os.Stderr)
	return code, out.String()
}

var noon = time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)

var happened = []api.Event{
	{Time: noon, Kind: "client-connected", Export: "web", Client: 7},
	{Time: noon, Kind: "export-state", Export: "a b", State: "paused"},
	{Time: noon, Kind: "io-error", Export: "web", Text: "two\nlines \x1b[31m"},
	{Time: noon, Kind: "threshold", Export: "web", Text: "a write went 512 bytes beyond its threshold of 4096", Threshold: 4096, Exceeded: 512},
}

var printed = []string{
	"2026-11-21T12:00:00Z client-connected export=web client=7\n",
	"2026-11-21T12:00:00Z export-state export=\"a b\" state=paused\n",
	"2026-11-21T12:00:00Z io-error export=web: two\\nlines \\x1b[31m\n",
	"2026-11-21T12:00:00Z threshold export=web: a write went 512 bytes beyond its threshold of 4096\n",
}

func TestEventsArePrintedAndChosen(t *testing.T) {
	for _, tt := range []struct {
		args []string
		want string
	}{
		{[]string{"--count=4"}, printed[0] + printed[1] + printed[2] + printed[3]},
		{[]string{"--count=1"}, printed[0]},
		{[]string{"--count=2", "--export=web"}, printed[0] + printed[2]},
		{[]string{"--count=1", "--export=a b"}, printed[1]},
		{[]string{"--count=2", "--kind=io-error,export-state"}, printed[1] + printed[2]},
		{[]string{"--count=1", "--kind=threshold"}, printed[3]},
	} {
		code, got := follow(t, t.Context(), happened, stay, tt.args...)
		if code != exitDone || got != tt.want {
			t.Errorf("%q: exit code %d, got\n%s\nwant\n%s", tt.args, code, got, tt.want)
		}
	}
	_, out := follow(t, t.Context(), happened, stay, "--count=4", "--json")
	lines := strings.Split(strings.TrimSuffix(out, "\n"), "\n")
	if len(lines) != len(happened) {
		t.Fatalf("got %q", out)
	}
	for i, line := range lines {
		sameJSON(t, line, happened[i])
	}
}

func TestLostEventsAreShownWhateverWasAskedFor(t *testing.T) {
	var b bytes.Buffer
	f := &eventFlags{}
	must(t, f.printEvent(&b, api.Event{Time: noon, Kind: "lost", Lost: 5}))
	if b.String() != "2026-11-21T12:00:00Z lost lost=5\n" {
		t.Errorf("got %q", b.String())
	}
	code, got := follow(t, t.Context(), []api.Event{{Time: noon, Kind: "lost", Lost: 5}}, stay, "--count=1", "--export=web", "--kind=io-error")
	if code != exitDone || got != b.String() {
		t.Errorf("exit code %d, got %q", code, got)
	}
}

func TestEndOfEventsIsAFailureUnlessItIsWanted(t *testing.T) {
	if code, _ := follow(t, t.Context(), happened, func(ch chan api.Event) { close(ch) }); code != exitFailed {
		t.Errorf("the daemon ends: exit code %d", code)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	if code, _ := follow(t, ctx, happened, func(chan api.Event) { cancel() }); code != exitDone {
		t.Errorf("interrupted: exit code %d", code)
	}
	want(t, exitFailed, "events", "--socket=/none")
}

// TestKindsOfEventsAreThoseOfTheDaemon: another is a mistake, and not awaited for
// ever.
func TestKindsOfEventsAreThoseOfTheDaemon(t *testing.T) {
	text, err := os.ReadFile(filepath.Join("..", "..", "internal", "control", "openapi.yaml"))
	must(t, err)
	said := strings.Join(eventKinds, ", ")
	if !strings.Contains(string(text), `"`+said+`, and others to come"`) {
		t.Errorf("the API describes other kinds than %s", said)
	}
	code, _, stderr := ctl(t, "events", "--kind=io-error,nonsense", "--socket=/none")
	if code != exitUsage || !strings.Contains(stderr, said) {
		t.Errorf("exit code %d, %s", code, stderr)
	}
	if help := want(t, exitDone, "events", "--help"); !strings.Contains(strings.Join(strings.Fields(help), " "), said) {
		t.Errorf("help: %s", help)
	}
}
