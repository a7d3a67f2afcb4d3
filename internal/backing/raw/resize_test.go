package raw_test

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/raw"
	"github.com/vmdiskd/vmdiskd/internal/engine"
)

func TestFileGrowsWithTheDisk(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, []byte("abc"), 0o600); err != nil {
		t.Fatal(err)
	}
	e := engine.NewPool(1)
	defer e.Close()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	d, err := raw.Open(f, e, raw.Options{Path: path, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	for _, tt := range []struct {
		before, to, want int64 // size of the file before, if not 0
		ok               bool
	}{
		{0, 1 << 20, 1 << 20, true},
		{0, 1 << 20, 1 << 20, true},
		{0, 3, 1 << 20, false},
		{4 << 20, 2 << 20, 4 << 20, false}, // extended by another
	} {
		if tt.before > 0 {
			if err := os.Truncate(path, tt.before); err != nil {
				t.Fatal(err)
			}
		}
		err := d.Resize(t.Context(), tt.to)
		if (err == nil) != tt.ok || !tt.ok && !errors.Is(err, backing.ErrNotSupported) {
			t.Errorf("resize to %d: got %v, want success: %v", tt.to, err, tt.ok)
		}
		if got := d.Info().Size; got != tt.want {
			t.Errorf("size after resize to %d: got %d, want %d", tt.to, got, tt.want)
		}
	}
	if err := d.WriteAt(t.Context(), []byte("x"), 2<<20-1, 0); err != nil {
		t.Errorf("write at the new end: %v", err)
	}
	st, err := os.Stat(path)
	if err != nil || st.Size() != 4<<20 {
		t.Errorf("file: got %v, %v, want what the other made of it", st.Size(), err)
	}
}
