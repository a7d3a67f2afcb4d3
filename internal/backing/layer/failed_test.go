package layer_test

import (
	"errors"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/layer"
	"github.com/vmdiskd/vmdiskd/internal/backing/mem"
	"github.com/vmdiskd/vmdiskd/internal/engine"
)

// TestFailedDiskLooksTheSameAndFails: in the place of another, for a client
// that has been told what that could do.
func TestFailedDiskLooksTheSameAndFails(t *testing.T) {
	was := backing.NewEmulate(mem.New(8192, nil))
	s := layer.NewSwap(was)
	c := backing.NewChecked(s, 0)
	why := errors.New("its image has gone")
	s.To(layer.NewFailed(was, why))
	if got := s.Info(); got != was.Info() {
		t.Errorf("info: got %+v, want %+v", got, was.Info())
	}
	ctx, p := t.Context(), make([]byte, 4096)
	var m backing.Mapping
	for name, err := range map[string]error{
		"read":      c.ReadAt(ctx, p, 0),
		"write":     c.WriteAt(ctx, p, 0, 0),
		"zero":      c.Zero(ctx, 0, 4096, 0),
		"trim":      c.Trim(ctx, 0, 4096, 0),
		"flush":     c.Flush(ctx),
		"cache":     c.Cache(ctx, 0, 4096),
		"extents":   c.Extents(ctx, 0, 4096, 0, func(backing.Extent) bool { return true }),
		"describe":  c.Describe(ctx, "x", 0, 4096, 0, func(backing.Status) bool { return true }),
		"read map":  c.Map(engine.OpRead, 0, 4096, &m),
		"write map": c.Map(engine.OpWrite, 0, 4096, &m),
		"resize":    s.Resize(ctx, 16384),
	} {
		if backing.KindOf(err) != backing.ErrIO || !errors.Is(err, why) {
			t.Errorf("%s: got error %v, want %v because %v", name, err, backing.ErrIO, why)
		}
	}
	if err := s.Close(); err != nil {
		t.Errorf("close: got error %v, want none", err)
	}
}
