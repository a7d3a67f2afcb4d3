package obs

import (
	"log/slog"
	"os"
	"path/filepath"
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

func TestFloodOfOneMessageIsCutAndCounted(t *testing.T) {
	l, read := open(t, Options{})
	clock := time.Unix(1000, 0)
	l.cut.now = func() time.Time { return clock }
	log := l.For("nbd")
	for range 3 * limits.LogBurst {
		log.Warn("request failed")
	}
	log.Warn("another")
	clock = clock.Add(limits.LogInterval)
	log.Warn("request failed")
	got := read()
	if n := strings.Count(got, `msg="request failed"`); n != limits.LogBurst+1 {
		t.Errorf("lines written: got %d, want %d", n, limits.LogBurst+1)
	}
	if !strings.Contains(got, "suppressed=20") || !strings.Contains(got, "msg=another") {
		t.Errorf("log says %q, want suppressed=20 and the other message", got)
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
