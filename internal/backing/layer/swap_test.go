package layer_test

import (
	"bytes"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/backingtest"
	"github.com/vmdiskd/vmdiskd/internal/backing/layer"
	"github.com/vmdiskd/vmdiskd/internal/backing/mem"
)

func TestSwapConforms(t *testing.T) {
	backingtest.Run(t, backingtest.Maker{New: func(t testing.TB, size int64) backing.Device {
		return layer.NewSwap(backing.NewEmulate(mem.New(size, nil)))
	}})
}

func TestSwapGoesOnWithTheOtherDevice(t *testing.T) {
	a, b := mem.New(4096, nil), mem.New(8192, nil)
	s := layer.NewSwap(a)
	if err := s.WriteAt(t.Context(), []byte("a"), 0, 0); err != nil {
		t.Fatal(err)
	}
	if old := s.To(b); old != backing.Device(a) {
		t.Errorf("old device: got %v, want the first", old)
	}
	p := make([]byte, 1)
	if err := s.ReadAt(t.Context(), p, 0); err != nil || !bytes.Equal(p, []byte{0}) {
		t.Errorf("read: got %v, %v, want what the second has", p, err)
	}
	if got := s.Info().Size; got != 8192 {
		t.Errorf("size: got %d, want 8192", got)
	}
}
