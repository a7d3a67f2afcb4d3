// Package progress draws the progress of long work as one line on a terminal.
package progress

import (
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/term"
)

const (
	// interval is the time between two drawings.
	interval = 100 * time.Millisecond

	// defaultWidth is that of a line where nobody knows better, maxBar the
	// widest bar in columns.
	defaultWidth = 80
	maxBar       = 50
)

// Bar is a progress bar. It is safe for concurrent use; it draws in Add and
// has no goroutine. A nil Bar is silent.
type Bar struct {
	w     io.Writer
	width func() int // columns of the terminal
	now   func() time.Time
	total int64
	begun time.Time

	// mu guards what follows, and the order of the writes to w.
	mu    sync.Mutex
	done  int64
	drawn time.Time
	last  int // columns of the last drawing
}

// IsTerminal reports whether a bar on f would be seen by somebody.
func IsTerminal(f *os.File) bool { return term.IsTerminal(int(f.Fd())) }

// New starts a bar on f for total bytes of work.
func New(f *os.File, total int64) *Bar {
	width := func() int {
		if w, _, err := term.GetSize(int(f.Fd())); err == nil && w > 0 {
			return w
		}
		return defaultWidth
	}
	return newBar(f, width, time.Now, total)
}

func newBar(w io.Writer, width func() int, now func() time.Time, total int64) *Bar {
	return &Bar{w: w, width: width, now: now, total: total, begun: now()}
}

// Add notes n more bytes of work done.
func (b *Bar) Add(n int64) {
	if b == nil {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.done += n
	if now := b.now(); now.Sub(b.drawn) >= interval {
		b.drawn = now
		b.drawLocked(now)
	}
}

// Close draws the last state and ends the line.
func (b *Bar) Close() {
	if b == nil {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.drawLocked(b.now())
	io.WriteString(b.w, "\n")
}

// drawLocked writes the line over the one before. A terminal that cannot be
// written to is no reason to stop the work.
func (b *Bar) drawLocked(now time.Time) {
	line := b.line(now)
	pad := max(b.last-len(line), 0)
	b.last = len(line)
	fmt.Fprintf(b.w, "\r%s%s", line, strings.Repeat(" ", pad))
}

// line is the state in at most one column less than the terminal has: the
// last column makes some of them wrap.
func (b *Bar) line(now time.Time) string {
	percent := int64(100)
	if b.total > 0 {
		percent = int64(float64(min(b.done, b.total)) / float64(b.total) * 100)
	}
	tail := fmt.Sprintf("%3d%% %s of %s", percent, Bytes(b.done), Bytes(b.total))
	if spent := now.Sub(b.begun); spent > 0 && b.done > 0 {
		tail += fmt.Sprintf(", %s/s", Bytes(int64(float64(b.done)/spent.Seconds())))
		if rest := b.total - b.done; rest > 0 {
			left := time.Duration(float64(spent) * float64(rest) / float64(b.done))
			tail += fmt.Sprintf(", %v left", left.Round(time.Second))
		}
	}
	width := b.width() - 1
	if bar := min(width-len(tail)-3, maxBar); bar >= 10 {
		full := int(percent) * bar / 100
		tail = "[" + strings.Repeat("#", full) + strings.Repeat("-", bar-full) + "] " + tail
	}
	return tail[:max(0, min(len(tail), width))]
}

// Bytes is n for people: three significant digits and a binary unit.
func Bytes(n int64) string {
	const units = "KMGTPE"
	if n > -1024 && n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	v, unit := float64(n)/1024, 0
	for (v >= 999.5 || v <= -999.5) && unit < len(units)-1 {
		v, unit = v/1024, unit+1
	}
	digits := 2
	for limit := v; digits > 0 && (limit >= 9.995 || limit <= -9.995); limit /= 10 {
		digits--
	}
	return fmt.Sprintf("%.*f %ciB", digits, v, units[unit])
}
