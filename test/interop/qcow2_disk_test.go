package interop

import (
	"errors"
	"fmt"
	"path/filepath"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing/backingtest"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
	"github.com/vmdiskd/vmdiskd/test/testenv"
)

func TestLibnbdAgreesWithAModelOfAWritableQcow2(t *testing.T) {
	for name, args := range map[string][]string{
		"subclusters": {"-o", "extended_l2=on,cluster_size=16k"},
		"overlay":     {"-b", "base.raw", "-F", "raw", "-o", "cluster_size=2M"},
	} {
		t.Run(name, func(t *testing.T) {
			vmdiskdOnly(t)
			needQEMU(t)
			dir := testenv.TempDir(t)
			if err := testenv.CreatePattern(filepath.Join(dir, "base.raw"), diskSize); err != nil {
				t.Fatal(err)
			}
			createQcow2(t, dir, "disk.qcow2", fmt.Sprint(diskSize), args...)
			image := filepath.Join(dir, "disk.qcow2")
			s := serveQcow2(t, image)
			for _, check := range []string{"structured", "simple", "chunks", "errors", "multi_conn", "in_flight"} {
				t.Run(check, func(t *testing.T) { python(t, s.URI, check) })
			}
			stopAndCompare(t, s, image, served(t, s))
		})
	}
}

func TestKernelFileOperationsOnAWritableQcow2AgreeWithAModel(t *testing.T) {
	image, _ := overlayOfPattern(t)
	checkFileOperations(t, serveQcow2(t, image), 3000)
}

// TestFullBlockDeviceIsNoSpace: an image on a device that is too small for its
// disk. There is nothing to grow, so what is answered can be flushed.
func TestFullBlockDeviceIsNoSpace(t *testing.T) {
	vmdiskdOnly(t)
	needQEMU(t)
	const size = 32 << 20
	device := backingtest.Loop(t, testenv.SparseImage(t, 8<<20), 512)
	testenv.Run(t, "qemu-img", "create", "-q", "-f", "qcow2", device, fmt.Sprint(size))
	s := testenv.StartToKill(t, writable(device))
	ctx := testenv.Context(t)
	c := dial(t, s)
	full, err := fill(ctx, c, 0, size)
	if !errors.Is(err, wire.ENOSPC) || full < 6<<20 {
		t.Fatalf("a write to a full device is answered %v at %d, want ENOSPC", err, full)
	}
	if err := c.Flush(ctx); err != nil {
		t.Errorf("flush of what was written: %v", err)
	}
	wantPattern(t, c, 0, full)
	const freed = 2 << 20
	if err := errors.Join(c.Trim(ctx, 0, freed, 0), c.Flush(ctx)); err != nil {
		t.Fatalf("trim and flush: %v", err)
	}
	more, err := fill(ctx, c, full, size)
	if !errors.Is(err, wire.ENOSPC) || more != full+freed {
		t.Errorf("after a trim of %d bytes %d could be written, %v", freed, more-full, err)
	}
	if err := c.Flush(ctx); err != nil {
		t.Errorf("flush: %v", err)
	}
	wantPattern(t, c, freed, more)
	stopAndCompare(t, s, device, served(t, s))
	wantSound(t, device, false)
}
