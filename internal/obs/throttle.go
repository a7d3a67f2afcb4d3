package obs

import (
	"context"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// Throttle cuts a flood of events or lines of one kind: limits.EventBurst pass in
// limits.EventInterval. It is for one user at a time.
type Throttle struct {
	began  time.Time
	passed int
	cut    int
}

// Allow tells whether one at the time now passes, and how many before it did not
// since the last that passed.
func (t *Throttle) Allow(now time.Time) (ok bool, cut int) {
	if t.began.IsZero() || !now.Before(t.ends()) {
		t.began, t.passed = now, 0
	}
	if t.passed >= limits.EventBurst {
		t.cut++
		return false, 0
	}
	t.passed++
	cut, t.cut = t.cut, 0
	return true, cut
}

// ends is when as many pass again as in the beginning.
func (t *Throttle) ends() time.Time { return t.began.Add(limits.EventInterval) }

// lineKind is what the lines have in common that are counted together: their
// component and text, and what they are about. The zero value stands for all
// those that found no place.
type lineKind struct {
	in, text  string
	key, name string // the attribute among subjects, if there is one
}

// subjects are the keys of attributes that say what a line is about. The first
// that a line has decides: a client may have many names.
var subjects = []string{"export", "path", "peer"}

// see takes note of an attribute of the line.
func (k *lineKind) see(a slog.Attr) {
	i := slices.Index(subjects, a.Key)
	if i >= 0 && (k.key == "" || i < slices.Index(subjects, k.key)) {
		name := a.Value.Resolve().String()
		k.key, k.name = a.Key, name[:min(len(name), limits.LogSubject)]
	}
}

// limiter has a Throttle for each kind of line. How many were left out of a kind
// is told before the first line that comes when its interval is over, of whatever
// kind, or when the log is closed.
type limiter struct {
	now func() time.Time
	out slog.Handler // takes the lines about what was left out

	mu   sync.Mutex
	seen map[lineKind]*Throttle // guarded by mu; at most limits.LogKinds, and one for the others
	next time.Time              // guarded by mu; when the first of them ends
}

// allow tells whether a line passes.
func (l *limiter) allow(k lineKind) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.now()
	l.tellLocked(now)
	t := l.seen[k]
	if t == nil && len(l.seen) >= limits.LogKinds {
		k = lineKind{}
		t = l.seen[k]
	}
	if t == nil {
		t = new(Throttle)
		l.seen[k] = t
	}
	ok, _ := t.Allow(now)
	return ok
}

// tell tells what was left out of the kinds whose interval is over.
func (l *limiter) tell() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.tellLocked(l.now())
}

// close tells what was left out of all of them.
func (l *limiter) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.tellLocked(l.now().Add(limits.EventInterval))
}

func (l *limiter) tellLocked(now time.Time) {
	if now.Before(l.next) {
		return
	}
	l.next = now.Add(limits.EventInterval)
	for k, t := range l.seen {
		switch end := t.ends(); {
		case !now.Before(end):
			delete(l.seen, k)
			l.leftOut(k, t.cut)
		case end.Before(l.next):
			l.next = end
		}
	}
}

// leftOut writes that n lines of a kind were left out, if any were. The queue
// behind it never waits.
func (l *limiter) leftOut(k lineKind, n int) {
	if n == 0 {
		return
	}
	r := slog.NewRecord(l.now(), slog.LevelWarn, "log lines were left out", 0)
	if k != (lineKind{}) {
		r.AddAttrs(slog.String("in", k.in), slog.String("text", k.text))
	}
	if k.key != "" {
		r.AddAttrs(slog.String(k.key, k.name))
	}
	r.AddAttrs(slog.Int("count", n))
	// A log that cannot be written cannot be complained about either.
	_ = l.out.Handle(context.Background(), r)
}

// cutHandler puts the limiter before a handler. Debug lines are asked for and
// pass.
type cutHandler struct {
	slog.Handler
	cut   *limiter
	whole bool     // all lines pass
	kind  lineKind // of all lines, but for their text and what only they are about
}

func (h *cutHandler) Handle(ctx context.Context, r slog.Record) error {
	if h.whole || r.Level <= slog.LevelDebug {
		h.cut.tell()
		return h.Handler.Handle(ctx, r)
	}
	k := h.kind
	k.text = r.Message
	r.Attrs(func(a slog.Attr) bool {
		k.see(a)
		return true
	})
	if !h.cut.allow(k) {
		return nil
	}
	return h.Handler.Handle(ctx, r)
}

func (h *cutHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	n := *h
	n.Handler = h.Handler.WithAttrs(attrs)
	for _, a := range attrs {
		n.kind.see(a)
	}
	return &n
}

func (h *cutHandler) WithGroup(name string) slog.Handler {
	n := *h
	n.Handler = h.Handler.WithGroup(name)
	return &n
}
