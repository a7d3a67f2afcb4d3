// Package obs is what an operator sees of the program: its log. Writing it
// never holds up the data path: lines go through a bounded queue, a flood of
// the same message is cut and counted.
package obs

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"log/syslog"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Components are those that a log has loggers for.
var Components = []string{"daemon", "nbd", "backing", "engine", "tls", "control", "requests"}

// whole are the components of which no line is left out: no client causes them, or
// they have a bound of their own. They are what the daemon says of its start and
// its work, the audit trail of the control socket, and the requests that somebody
// wants to see.
var whole = []string{"daemon", "control", "requests"}

// Options of a log.
type Options struct {
	// Sink is "stderr", "syslog", "null" or a path that starts with "/".
	Sink string
	// File, if not nil, is that path, opened already for appending.
	File *os.File
	// Format is "text", which "" stands for, "json", or "journal": then the
	// lines go to systemd's journal as fields, and Sink must be "" or "stderr".
	Format string
	// Level is the least severe level that is written.
	Level slog.Level
	// Components gives single components a level of their own.
	Components map[string]slog.Level
}

// Log makes the loggers of the components.
type Log struct {
	opt   Options
	level slog.LevelVar
	out   *queue
	cut   *limiter
}

// Open opens the sink.
func Open(o Options) (*Log, error) {
	w, err := writer(&o)
	if err != nil {
		return nil, err
	}
	return newLog(o, w), nil
}

func newLog(o Options, w io.Writer) *Log {
	l := &Log{opt: o, out: newQueue(w, lostIn[o.Format])}
	l.level.Set(o.Level)
	l.cut = &limiter{now: time.Now, seen: make(map[lineKind]*Throttle), out: l.handler(&slog.HandlerOptions{ReplaceAttr: l.dropTime})}
	return l
}

// lostIn has, by format, what tells that lines were lost before one: a line of
// its own, or a field.
var lostIn = map[string]string{
	"":        "level=WARN msg=\"log lines were lost\" count=%d\n",
	"text":    "level=WARN msg=\"log lines were lost\" count=%d\n",
	"json":    "{\"level\":\"WARN\",\"msg\":\"log lines were lost\",\"count\":%d}\n",
	"journal": "VMDISKD_LINES_LOST=%d\n",
}

// writer opens where the lines go.
func writer(o *Options) (io.Writer, error) {
	if _, ok := lostIn[o.Format]; !ok {
		return nil, fmt.Errorf("log format %q: want text, json or journal", o.Format)
	}
	if o.File != nil {
		return o.File, nil
	}
	if o.Format != "journal" {
		return sink(o.Sink)
	}
	if o.Sink != "" && o.Sink != "stderr" {
		return nil, fmt.Errorf("log %q: the journal format has no other sink", o.Sink)
	}
	return dialJournal(journalSocket)
}

// sink opens what Options.Sink names.
func sink(name string) (io.Writer, error) {
	switch {
	case name == "" || name == "stderr":
		return os.Stderr, nil
	case name == "null":
		return io.Discard, nil
	case name == "syslog":
		return syslog.New(syslog.LOG_DAEMON|syslog.LOG_INFO, "vmdiskd")
	case strings.HasPrefix(name, "/"):
		return OpenFile(name)
	}
	return nil, fmt.Errorf("log %q: want stderr, syslog, null or an absolute path", name)
}

// OpenFile opens a file for a log. It does not wait: a FIFO that nobody reads is
// an error.
func OpenFile(name string) (*os.File, error) {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_APPEND|unix.O_NONBLOCK, 0o640)
	if fi, bad := os.Stat(name); errors.Is(err, unix.ENXIO) && bad == nil && fi.Mode()&os.ModeNamedPipe != 0 {
		return nil, fmt.Errorf("log %q is a FIFO that nobody reads", name)
	}
	return f, err
}

// For returns the logger of a component.
func (l *Log) For(component string) *slog.Logger {
	var level slog.Leveler = &l.level
	if own, ok := l.opt.Components[component]; ok {
		level = own
	}
	h := l.handler(&slog.HandlerOptions{Level: level, ReplaceAttr: l.dropTime})
	return slog.New(&cutHandler{
		Handler: h.WithAttrs([]slog.Attr{slog.String("in", component)}),
		cut:     l.cut,
		whole:   slices.Contains(whole, component),
		kind:    lineKind{in: component},
	})
}

// SetLevel changes the least severe level that is written, but of components
// that have their own.
func (l *Log) SetLevel(to slog.Level) { l.level.Set(to) }

// handler writes lines in the format of the log.
func (l *Log) handler(o *slog.HandlerOptions) slog.Handler {
	switch l.opt.Format {
	case "json":
		return slog.NewJSONHandler(l.out, o)
	case "journal":
		return &journalHandler{out: l.out, level: o.Level}
	}
	return slog.NewTextHandler(l.out, o)
}

// dropTime leaves the time to syslog, which adds its own.
func (l *Log) dropTime(groups []string, a slog.Attr) slog.Attr {
	if l.opt.Sink == "syslog" && len(groups) == 0 && a.Key == slog.TimeKey {
		return slog.Attr{}
	}
	return a
}

// Close writes what is queued, for at most a second, and stops.
func (l *Log) Close() {
	l.cut.close()
	l.out.close()
}

// queue decouples the log from its sink: a full pipe or a stopped journal
// loses lines, and says how many, instead of stopping a guest.
type queue struct {
	lines chan []byte
	done  chan struct{}
	loss  string // format that tells how many were lost

	mu     sync.Mutex
	lost   int  // guarded by mu
	closed bool // guarded by mu
}

// queueLines bounds what waits for a slow sink.
const queueLines = 1024

func newQueue(w io.Writer, loss string) *queue {
	q := &queue{lines: make(chan []byte, queueLines), done: make(chan struct{}), loss: loss}
	go q.writeLoop(w)
	return q
}

func (q *queue) Write(p []byte) (int, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return len(p), nil
	}
	line := append([]byte(nil), p...)
	if q.lost > 0 {
		line = fmt.Appendf(line, q.loss, q.lost)
	}
	select {
	case q.lines <- line:
		q.lost = 0
	default:
		q.lost++
	}
	return len(p), nil
}

func (q *queue) writeLoop(w io.Writer) {
	defer close(q.done)
	for line := range q.lines {
		// A log that cannot be written cannot be complained about either.
		_, _ = w.Write(line)
	}
}

func (q *queue) close() {
	q.mu.Lock()
	if q.closed {
		q.mu.Unlock()
		return
	}
	q.closed = true
	close(q.lines)
	q.mu.Unlock()
	select {
	case <-q.done:
	case <-time.After(time.Second):
	}
}
