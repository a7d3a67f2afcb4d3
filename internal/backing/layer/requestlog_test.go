package layer_test

import (
	"bytes"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/layer"
	"github.com/vmdiskd/vmdiskd/internal/backing/mem"
	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

func TestRequestLogConforms(t *testing.T) {
	for i, on := range []bool{false, true} {
		conformOn(t, bases[i:2], 0, func(_ testing.TB, d backing.Device) backing.Device {
			return layer.NewRequestLog(d, layer.RequestLogOptions{Log: quiet, On: on})
		})
	}
}

// logOf makes a log of lines without their time.
func logOf(d backing.Device) (*layer.RequestLog, *bytes.Buffer) {
	var b bytes.Buffer
	h := slog.NewTextHandler(&b, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey || a.Key == slog.LevelKey || a.Key == slog.MessageKey {
			return slog.Attr{}
		}
		return a
	}})
	return layer.NewRequestLog(d, layer.RequestLogOptions{Log: slog.New(h)}), &b
}

func TestRequestsAreWrittenDownWhileTheLogIsOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lost := errors.New("a \"bad\"\nday")
		l, b := logOf(&recorder{Device: newTrace(time.Millisecond), err: lost})
		fill(t, l, 0, 10, 0x53)
		if b.Len() != 0 || l.On() {
			t.Errorf("while off: got %q", b)
		}
		l.Set(true)
		fill(t, l, 4096, 10, 0x53)
		ctx := t.Context()
		_ = l.WriteAt(ctx, make([]byte, 3), 7, backing.FUA)
		_ = l.ReadAt(ctx, make([]byte, 5), 1)
		_ = l.Zero(ctx, 1, 2, backing.FUA|backing.NoHole|backing.FastZero)
		_ = l.Trim(ctx, 3, 4, 0)
		_ = l.Cache(ctx, 5, 6)
		_ = l.Extents(ctx, 7, 8, backing.ReqOne, func(backing.Extent) bool { return true })
		_ = l.Resize(ctx, 99)
		if err := l.Flush(ctx); !errors.Is(err, lost) {
			t.Errorf("flush: got %v, want %v", err, lost)
		}
		want := `op=write off=4096 len=10 took=1ms
op=write off=7 len=3 flags=fua took=1ms
op=read off=1 len=5 took=1ms
op=zero off=1 len=2 flags=fua,no-hole,fast-zero took=0s
op=trim off=3 len=4 took=0s
op=cache off=5 len=6 took=0s
op=extents off=7 len=8 flags=req-one took=0s
op=resize off=0 len=99 took=0s error="resize: not supported: a disk of this format has a fixed size"
op=flush off=0 len=0 took=0s error="a \"bad\"\nday"
`
		if b.String() != want {
			t.Errorf("log: got\n%s\nwant\n%s", b, want)
		}
		var m backing.Mapping
		isKind(t, "map while on", l.Map(engine.OpRead, 0, 10, &m), backing.ErrNotMappable)
		l.Set(false)
		if err := l.Map(engine.OpRead, 0, 10, &m); err != nil {
			t.Errorf("map while off: %v", err)
		}
	})
}

func TestGuestCannotFillTheLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, b := logOf(mem.Null(1 << 20))
		l.Set(true)
		for range 3 * limits.RequestLogLines {
			fill(t, l, 0, 1, 0)
		}
		if n := strings.Count(b.String(), "\n"); n > limits.RequestLogLines*11/10 {
			t.Errorf("lines at once: got %d, want about %d", n, limits.RequestLogLines)
		}
		b.Reset()
		time.Sleep(time.Second)
		fill(t, l, 0, 1, 0)
		if !strings.Contains(b.String(), " skipped=") {
			t.Errorf("the line after: got %q, want the number of those left out", b)
		}
	})
}

func TestRequestLogMapsWithoutAllocating(t *testing.T) {
	l := layer.NewRequestLog(newRaw(t, "pool", 1<<20, 0), layer.RequestLogOptions{Log: quiet})
	if n := mapAllocates(t, closing(t, l)); n != 0 {
		t.Errorf("map: got %v allocations, want none", n)
	}
}
