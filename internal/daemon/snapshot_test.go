package daemon

import (
	"errors"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/layer"
	"github.com/vmdiskd/vmdiskd/internal/backing/mem"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// closing is a disk that takes long to close.
type closing struct {
	backing.Device
	end chan struct{}
}

func (c closing) Close() error {
	<-c.end
	return c.Device.Close()
}

// pausable is a stack upon dev, paused.
func pausable(t *testing.T, dev backing.Device) (*stack, *layer.Hold) {
	t.Helper()
	s := &stack{swap: layer.NewSwap(dev)}
	s.pause = layer.NewPause(s.swap)
	hold, err := s.pause.Pause(t.Context(), limits.PauseLongest)
	if err != nil {
		t.Fatal(err)
	}
	return s, hold
}

// TestNoRequestComesToAnImageThatIsClosed, also if the pause ends by itself while
// that lasts.
func TestNoRequestComesToAnImageThatIsClosed(t *testing.T) {
	dev := closing{backing.NewEmulate(mem.New(4096, nil)), make(chan struct{})}
	s, hold := pausable(t, dev)
	old, err := s.takeOut(hold)
	if err != nil || old != backing.Device(dev) {
		t.Fatalf("taken out: %v, %v", old, err)
	}
	closed := make(chan error)
	go func() { closed <- old.Close() }()
	if err := hold.Resume(); err != nil { // as its timer does
		t.Fatal(err)
	}
	p := make([]byte, 512)
	if err := s.pause.ReadAt(t.Context(), p, 0); !errors.Is(err, errExchanged) || backing.KindOf(err) != backing.ErrIO {
		t.Errorf("read without an image: got %v, want %v", err, errExchanged)
	}
	close(dev.end)
	if err := <-closed; err != nil {
		t.Error(err)
	}
	s.put(image{dev: mem.New(4096, nil)}, s.x)
	if err := s.pause.ReadAt(t.Context(), p, 0); err != nil {
		t.Errorf("read with another image: %v", err)
	}
}

// TestImageIsNotTakenFromRequests: of a pause that has ended some may be in it.
func TestImageIsNotTakenFromRequests(t *testing.T) {
	dev := mem.New(4096, nil)
	s, hold := pausable(t, dev)
	if err := hold.Resume(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.takeOut(hold); !errors.Is(err, layer.ErrResumed) {
		t.Errorf("taken out after the pause: got %v, want %v", err, layer.ErrResumed)
	}
	if err := s.pause.ReadAt(t.Context(), make([]byte, 512), 0); err != nil {
		t.Errorf("read: %v", err)
	}
}
