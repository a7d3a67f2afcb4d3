package qcow2_test

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"syscall"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/create"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/store"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/storetest"
)

// growing is an image of small clusters with data at both its ends, and a
// backing file that is longer than the disk.
func growing(t *testing.T) (image *storetest.Mem, want []byte) {
	t.Helper()
	image = storetest.New(nil)
	o := create.Options{Size: 40<<10 + 512, ClusterSize: 1024, Backing: "b", BackingFormat: "raw"}
	if err := create.Image(t.Context(), image, o); err != nil {
		t.Fatal(err)
	}
	d := openOver(t, image)
	for _, off := range []int64{0, o.Size - 512} {
		if err := d.WriteAt(t.Context(), bytes.Repeat([]byte{0xaa}, 512), off, 0); err != nil {
			t.Fatal(err)
		}
	}
	want = make([]byte, o.Size)
	if err := errors.Join(d.ReadAt(t.Context(), want, 0), d.Close()); err != nil {
		t.Fatal(err)
	}
	image.Reopen()
	return image, want
}

// longBase is what lies below the images of growing.
var longBase = bytes.Repeat([]byte{0xbb}, 60<<10)

func openOver(t *testing.T, st store.Store) backing.Device {
	t.Helper()
	below, err := qcow2.NewRawLayer(storetest.New(longBase))
	if err != nil {
		t.Fatal(err)
	}
	d, err := qcow2.Open(t.Context(), st, qcow2.Options{Backing: below, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// grownTo is large enough for an L1 table of many clusters, of 128 KiB each
// entry.
const grownTo = 512 << 20

// wantGrown reads a disk that must have grown, or not have.
func wantGrown(t *testing.T, d backing.Device, want []byte) error {
	t.Helper()
	size := d.Info().Size
	if size != int64(len(want)) && size != grownTo {
		return fmt.Errorf("size is %d", size)
	}
	got := make([]byte, min(size, 200<<10))
	if err := d.ReadAt(t.Context(), got, 0); err != nil {
		return err
	}
	if !bytes.Equal(got[:len(want)], want) || !bytes.Equal(got[len(want):], make([]byte, len(got)-len(want))) {
		return errors.New("contents are wrong")
	}
	return nil
}

func TestDiskGrows(t *testing.T) {
	image, want := growing(t)
	d := openOver(t, image)
	if err := d.(backing.Resizer).Resize(t.Context(), grownTo); err != nil {
		t.Fatal(err)
	}
	if got := d.Info().Size; got != grownTo {
		t.Errorf("size: got %d, want %d", got, grownTo)
	}
	if err := wantGrown(t, d, want); err != nil {
		t.Error(err)
	}
	if err := d.WriteAt(t.Context(), want[:512], grownTo-512, 0); err != nil {
		t.Errorf("write at the new end: %v", err)
	}
	if err := d.(backing.Resizer).Resize(t.Context(), 1<<20); !errors.Is(err, backing.ErrNotSupported) {
		t.Errorf("shrink: got %v, want %v", err, backing.ErrNotSupported)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	image.Reopen()
	wantSound(t, image, 0)
	d = openOver(t, image)
	defer d.Close()
	if err := wantGrown(t, d, want); err != nil {
		t.Error(err)
	}
	mustMatch(t, d, grownTo-512, want[:512])
}

// TestFailedGrowthLeavesTheDisk makes each call fail in turn.
func TestFailedGrowthLeavesTheDisk(t *testing.T) {
	for n := 1; ; n++ {
		image, want := growing(t)
		d := openOver(t, image)
		before := image.Calls()
		image.FailCall(n, syscall.ENOSPC)
		err := d.(backing.Resizer).Resize(t.Context(), grownTo)
		last := image.Calls()-before < n
		image.FailCall(0, nil)
		if err != nil && d.Info().Size != int64(len(want)) {
			t.Errorf("call %d: size after the failure is %d", n, d.Info().Size)
		}
		if err := wantGrown(t, d, want); err != nil {
			t.Errorf("call %d: %v", n, err)
		}
		_ = d.Close() // after a failed sync it fails
		image.Reopen()
		wantSound(t, image, 1<<20)
		d = openOver(t, image)
		if err := wantGrown(t, d, want); err != nil {
			t.Errorf("call %d, opened again: %v", n, err)
		}
		_ = d.Close()
		if last {
			if n < 15 || err != nil {
				t.Errorf("after %d calls that failed: %v", n-1, err)
			}
			return
		}
	}
}

// TestPowerCutDuringGrowth takes states at each change of the file.
func TestPowerCutDuringGrowth(t *testing.T) {
	image, want := growing(t)
	rnd := rand.New(rand.NewPCG(1, 2))
	c := storetest.NewCrash(image)
	d := openOver(t, c)
	states := 0
	c.SetHook(func(storetest.Call) {
		for name, st := range c.Crashes(rnd, 8) {
			states++
			wantSound(t, st, 1<<20)
			d := openOver(t, st)
			if err := wantGrown(t, d, want); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			_ = d.Close()
		}
	})
	err := d.(backing.Resizer).Resize(t.Context(), grownTo)
	c.SetHook(nil)
	if err := errors.Join(err, d.Close()); err != nil {
		t.Fatal(err)
	}
	if states < 50 {
		t.Errorf("got %d states, want 50 at least", states)
	}
}
