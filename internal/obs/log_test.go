package obs

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

func open(t *testing.T, o Options) (*Log, func() string) {
	t.Helper()
	o.Sink = filepath.Join(t.TempDir(), "log")
	l, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	return l, func() string {
		l.Close()
		b, err := os.ReadFile(o.Sink)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
}

// stopClock has the log's limiter run by a clock that stands.
func stopClock(l *Log) *time.Time {
	clock := time.Unix(1000, 0)
	l.cut.now = func() time.Time { return clock }
	return &clock
}

func TestFloodOfOneMessageIsCutAndCounted(t *testing.T) {
	l, read := open(t, Options{})
	clock := stopClock(l)
	log := l.For("nbd")
	for range 3 * limits.EventBurst {
		log.Warn("request failed")
	}
	log.Warn("another")
	*clock = clock.Add(limits.EventInterval)
	log.Warn("request failed")
	got := read()
	if n := strings.Count(got, `msg="request failed"`); n != limits.EventBurst+1 {
		t.Errorf("lines written: got %d, want %d", n, limits.EventBurst+1)
	}
	if !strings.Contains(got, leftOut("nbd", "request failed", "", 2*limits.EventBurst)) || !strings.Contains(got, "msg=another") {
		t.Errorf("log says %q, want how many were left out and the other message", got)
	}
}

// leftOut is the line about n that were left out, from its message on.
func leftOut(in, text, about string, n int) string {
	return fmt.Sprintf("level=WARN msg=\"log lines were left out\" in=%s text=%q%s count=%d\n", in, text, about, n)
}

// TestFloodAboutOneDiskHidesNoOther: each export has its own count, and what was
// left out of one is told of that one.
func TestFloodAboutOneDiskHidesNoOther(t *testing.T) {
	l, read := open(t, Options{})
	stopClock(l)
	log := l.For("nbd")
	loud := log.With("export", "loud")
	for i := range 3 * limits.EventBurst {
		loud.Warn("request failed", "peer", i)
	}
	for i := range limits.EventBurst + 5 {
		log.Warn("request failed", "peer", i, "export", "quiet")
	}
	got := read()
	for name, left := range map[string]int{"loud": 2 * limits.EventBurst, "quiet": 5} {
		if n := strings.Count(got, "export="+name); n != limits.EventBurst+1 {
			t.Errorf("lines about %s: got %d, want %d and one about the rest", name, n, limits.EventBurst)
		}
		if want := leftOut("nbd", "request failed", " export="+name, left); !strings.Contains(got, want) {
			t.Errorf("log says %q, want %q", got, want)
		}
	}
}

// TestLineAfterTheFloodTellsOfIt: any line does, also one that is never left out.
func TestLineAfterTheFloodTellsOfIt(t *testing.T) {
	for _, after := range []string{"nbd", "daemon"} {
		l, read := open(t, Options{})
		clock := stopClock(l)
		for range limits.EventBurst + 3 {
			l.For("nbd").Warn("request failed", "export", "a")
		}
		l.For(after).Info("too early")
		*clock = clock.Add(limits.EventInterval)
		l.For(after).Info("in time")
		l.For(after).Info("again")
		_, got, _ := strings.Cut(read(), "msg=\"too early\"")
		_, got, _ = strings.Cut(got, "\n")
		told, rest, _ := strings.Cut(got, "msg=\"in time\"")
		if !strings.HasSuffix(told[:strings.Index(told, "\n")+1], leftOut("nbd", "request failed", " export=a", 3)) {
			t.Errorf("before the line of %s: got %q, want that 3 were left out", after, told)
		}
		if strings.Contains(rest, "left out") {
			t.Errorf("after it: got %q, want nothing more about that", rest)
		}
	}
}

// TestKindsOfLinesAreBounded: those above the bound share what one may have.
func TestKindsOfLinesAreBounded(t *testing.T) {
	l, read := open(t, Options{})
	clock := stopClock(l)
	log := l.For("nbd")
	pass := func(n int) (passed int) {
		for i := range n {
			if l.cut.allow(lineKind{in: "nbd", text: "request failed", key: "export", name: strconv.Itoa(i)}) {
				passed++
			}
		}
		return passed
	}
	if n := pass(limits.LogKinds + 3*limits.EventBurst); n != limits.LogKinds+limits.EventBurst {
		t.Errorf("lines passed: got %d, want one of each of %d and %d of all others", n, limits.LogKinds, limits.EventBurst)
	}
	if n := len(l.cut.seen); n > limits.LogKinds+1 {
		t.Errorf("kinds remembered: got %d, want at most %d and the others", n, limits.LogKinds)
	}
	*clock = clock.Add(limits.EventInterval)
	log.Info("later")
	if n := len(l.cut.seen); n != 1 {
		t.Errorf("kinds remembered afterwards: got %d, want the last", n)
	}
	if got := read(); !strings.Contains(got, fmt.Sprintf("msg=\"log lines were left out\" count=%d\n", 2*limits.EventBurst)) {
		t.Errorf("log says %q, want how many of the others were left out", got)
	}
}

// TestNothingOfTheOperatorIsLeftOut: the lines of start, the audit trail, and the
// request log, which has a bound of its own.
func TestNothingOfTheOperatorIsLeftOut(t *testing.T) {
	l, read := open(t, Options{})
	stopClock(l)
	const lines = 4 * limits.EventBurst
	for _, c := range []string{"daemon", "control", "requests"} {
		for range lines {
			l.For(c).With("export", "a").Info("line")
		}
	}
	if n := strings.Count(read(), "\n"); n != 3*lines {
		t.Errorf("lines written: got %d, want %d", n, 3*lines)
	}
}

func TestComponentHasItsOwnLevel(t *testing.T) {
	l, read := open(t, Options{Components: map[string]slog.Level{"nbd": slog.LevelDebug}})
	l.For("nbd").Debug("seen")
	l.For("raw").Debug("unseen")
	got := read()
	if !strings.Contains(got, "msg=seen in=nbd") || strings.Contains(got, "unseen") {
		t.Errorf("log says %q, want the debug line of nbd alone", got)
	}
}

func TestPeerCannotForgeLines(t *testing.T) {
	l, read := open(t, Options{})
	l.For("nbd").Warn("export", "name", "a\nlevel=ERROR msg=forged\x1b[31m")
	if got := read(); strings.Count(got, "\n") != 1 || strings.Contains(got, "\x1b") {
		t.Errorf("log says %q, want one escaped line", got)
	}
}

// blocked is a sink that takes nothing until it is released.
type blocked chan struct{}

func (b blocked) Write(p []byte) (int, error) { <-b; return len(p), nil }

func TestFullSinkLosesLinesInsteadOfWaiting(t *testing.T) {
	b := make(blocked)
	q := newQueue(b, lostIn[""])
	for range queueLines + 10 {
		if _, err := q.Write([]byte("x\n")); err != nil {
			t.Fatal(err)
		}
	}
	q.mu.Lock()
	lost := q.lost
	q.mu.Unlock()
	if lost == 0 {
		t.Error("no line was lost although the sink takes none")
	}
	close(b)
	q.close()
}

func TestUnknownSinkIsRefused(t *testing.T) {
	if _, err := Open(Options{Sink: "nowhere"}); err == nil {
		t.Error("sink \"nowhere\" was accepted")
	}
}

// TestLogToAFIFO: one that nobody reads is an error and no wait; one that is read
// gets the lines.
func TestLogToAFIFO(t *testing.T) {
	path := filepath.Join(t.TempDir(), "fifo")
	if err := unix.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	if l, err := Open(Options{Sink: path}); err == nil || !strings.Contains(err.Error(), "nobody reads") {
		t.Fatalf("open a FIFO that nobody reads: got %v, %v", l, err)
	}
	r, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	l, err := Open(Options{Sink: path})
	if err != nil {
		t.Fatal(err)
	}
	l.For("nbd").Info("seen")
	l.Close()
	got := make([]byte, 4096)
	n, err := r.Read(got)
	if err != nil || !strings.Contains(string(got[:n]), "msg=seen") {
		t.Errorf("the reader got %q, %v", got[:n], err)
	}
}
