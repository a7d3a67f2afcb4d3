package backing_test

import (
	"context"
	"errors"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/mem"
)

// elastic is a disk that takes any size.
type elastic struct {
	backing.Device
	size int64
}

func (e *elastic) Resize(_ context.Context, size int64) error {
	e.size = size
	return nil
}

func (e *elastic) Info() backing.Info {
	i := e.Device.Info()
	i.Size = e.size
	return i
}

func TestLayersForwardResize(t *testing.T) {
	bottom := &elastic{mem.New(512, nil), 512}
	var d backing.Device = backing.Transparent{Passthrough: backing.Passthrough{Next: backing.NewEmulate(bottom)}}
	if err := d.(backing.Resizer).Resize(t.Context(), 1024); err != nil {
		t.Fatalf("resize: %v", err)
	}
	if got := d.Info().Size; got != 1024 {
		t.Errorf("size: got %d, want 1024", got)
	}
	if err := backing.NewEmulate(mem.New(512, nil)).Resize(t.Context(), 1024); !errors.Is(err, backing.ErrNotSupported) {
		t.Errorf("resize of a disk that cannot: got %v, want %v", err, backing.ErrNotSupported)
	}
}
