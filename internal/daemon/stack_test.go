package daemon

import (
	"bytes"
	"errors"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/config"
)

// TestWhatIsDoneInPiecesIsProtectedWhole: a request that touches a protected range
// changes nothing, also where the layers below it make several of it.
func TestWhatIsDoneInPiecesIsProtectedWhole(t *testing.T) {
	x := config.Export{
		Name: "a", Format: "mem", Image: "4M",
		BlockSize: &config.BlockSize{Maximum: 64 << 10},
		Rate:      &config.Rate{Bytes: 1 << 30},
		Protect:   []config.Range{{Offset: 2<<20 + 512, Length: 512}},
	}
	x.SetDefaults()
	s, err := readyService(t).build(t.Context(), &disk{cfg: x}, &x, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer s.top.Close()
	want := bytes.Repeat([]byte{1}, 4<<20)
	if err := s.dev.WriteAt(t.Context(), want, 0, 0); err != nil {
		t.Fatal(err)
	}
	for what, err := range map[string]error{
		"write": s.top.WriteAt(t.Context(), make([]byte, 4<<20), 0, 0),
		"zero":  s.top.Zero(t.Context(), 0, 4<<20, 0),
		"trim":  s.top.Trim(t.Context(), 0, 4<<20, 0),
	} {
		if !errors.Is(err, backing.ErrReadOnly) {
			t.Errorf("%s: got %v, want %v", what, err, backing.ErrReadOnly)
		}
	}
	got := make([]byte, len(want))
	if err := s.dev.ReadAt(t.Context(), got, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("what was refused changed the disk (%v)", err)
	}
}
