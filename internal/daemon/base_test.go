package daemon

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing/layer"
	"github.com/vmdiskd/vmdiskd/internal/backing/mem"
	"github.com/vmdiskd/vmdiskd/internal/backing/open"
	"github.com/vmdiskd/vmdiskd/internal/backing/raw"
	"github.com/vmdiskd/vmdiskd/internal/config"
)

// TestOverlayIsPutAboveNoImageOfOthers: an export that has failed, and whose image could
// not be kept from another program, is refused what it holds for as long as it is there,
// and opens without it.
func TestOverlayIsPutAboveNoImageOfOthers(t *testing.T) {
	d := readyService(t)
	path := filepath.Join(t.TempDir(), "a.img")
	if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	image := func() *os.File {
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = f.Close() })
		return f
	}
	x := config.Export{Name: "a", Image: path, Format: "raw", Overlay: &config.Overlay{Quota: 1 << 20}}
	over, err := layer.NewOverlay(mem.New(1<<20, nil), layer.OverlayOptions{Quota: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer over.Close()
	failed := &disk{cfg: x, origin: fromConfig, failed: errNoAnswer}
	files := open.NewTable(map[open.Request]*os.File{{Path: path}: image()}, nil)
	failed.held = held{of: &x, files: files, delta: over.Hold(), base: newBase(failed, files.Files(), d.log)}
	if err := d.disks.claim(failed); err != nil {
		t.Fatal(err)
	}
	unlock, err := raw.Lock(image(), raw.Options{For: "another program"})
	if err != nil {
		t.Fatal(err)
	}
	d.guard("a")
	unlock()
	for range 2 {
		again := d.disks.get("a")
		k := &disk{cfg: x, origin: fromConfig, again: again, delta: over.Hold()}
		d.tryDisk(k)
		_ = k.delta.Close()
		if got := d.disks.get("a"); !errors.Is(got.failed, errBaseLost) || got.held.delta == nil {
			t.Fatalf("with the overlay: got %v, and it holds %+v, want %v, and what it held", got.failed, got.held, errBaseLost)
		}
	}
	x.Overlay = nil
	d.tryDisk(&disk{cfg: x, origin: fromConfig, again: d.disks.get("a")})
	if got := d.disks.get("a"); got.failed != nil || got.stack == nil || got.held != (held{}) {
		t.Errorf("without the overlay: got %v, and it holds %+v, want it open, and nothing held", got.failed, got.held)
	}
}
