package layer_test

import (
	"context"
	"errors"
	"slices"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/layer"
	"github.com/vmdiskd/vmdiskd/internal/backing/mem"
)

// recorder notes flushes and closes, and fails them with err.
type recorder struct {
	backing.Device
	err   error
	calls []string
}

func (r *recorder) Flush(context.Context) error {
	r.calls = append(r.calls, "flush")
	return r.err
}

func (r *recorder) Close() error {
	r.calls = append(r.calls, "close")
	return nil
}

func TestFlushOnCloseConforms(t *testing.T) {
	conformOn(t, bases[:1], 0, func(_ testing.TB, d backing.Device) backing.Device { return layer.NewFlushOnClose(d) })
}

func TestCloseFlushesFirstAndReportsIt(t *testing.T) {
	lost := errors.New("lost")
	for _, err := range []error{nil, lost} {
		r := &recorder{Device: mem.New(10, nil), err: err}
		if got := layer.NewFlushOnClose(r).Close(); !errors.Is(got, err) {
			t.Errorf("close: got %v, want %v", got, err)
		}
		if !slices.Equal(r.calls, []string{"flush", "close"}) {
			t.Errorf("close with flush error %v: got calls %v", err, r.calls)
		}
	}
}

// unwritable is a disk that is read-only.
type unwritable struct{ backing.Device }

func (d unwritable) Info() backing.Info {
	i := d.Device.Info()
	i.Caps &^= backing.CanWrite
	return i
}

func TestCloseOfAReadOnlyDiskDoesNotFlush(t *testing.T) {
	r := &recorder{Device: mem.New(10, nil)}
	l := layer.NewFlushOnClose(unwritable{r})
	if err := l.Close(); err != nil || !slices.Equal(r.calls, []string{"close"}) {
		t.Errorf("close: got %v, calls %v, want only a close", err, r.calls)
	}
}
