package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/backingtest"
	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// leasedImage is an image with a lease that is not given back.
func leasedImage(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	if _, err := unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_RDLCK); err != nil {
		t.Fatalf("lease on %s: %v", path, err)
	}
	return path
}

// TestKeptLeaseIsWaitedForOnce: who has found that an image is in use is believed.
func TestKeptLeaseIsWaitedForOnce(t *testing.T) {
	for _, tt := range []struct {
		name string
		open func(ctx context.Context, d *daemon, k *disk) error
	}{
		{"at the start", func(ctx context.Context, d *daemon, k *disk) error {
			d.tryAll(ctx, []*disk{k})
			_, _, failed := d.disks.look(d.disks.get(k.cfg.Name))
			return failed
		}},
		{"by a reload", func(ctx context.Context, d *daemon, k *disk) error {
			_, err := d.addAll(ctx, []*disk{k})
			return err
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d, x := readyService(t), config.Export{Name: "x", Format: "raw", Image: leasedImage(t)}
				x.SetDefaults()
				began := time.Now()
				if err := tt.open(t.Context(), d, &disk{cfg: x, origin: fromConfig}); !errors.Is(err, backing.ErrLocked) {
					t.Errorf("got %v, want %v", err, backing.ErrLocked)
				}
				if took := time.Since(began); took < limits.LeaseAnswers || took > limits.LeaseAnswers+time.Second {
					t.Errorf("it took %v, want %v", took, limits.LeaseAnswers)
				}
			})
		})
	}
}

// TestWorkerIsToldOfAnImageInUse: it does not ask again, but for an overlay above
// the image.
func TestWorkerIsToldOfAnImageInUse(t *testing.T) {
	s := &stage0{daemon: emptyService(t), out: handover{Images: map[string]handedImage{}}}
	locked := &backing.Error{Op: "lock", Path: "/i", Off: -1, Kind: backing.ErrLocked, Err: errors.New("a guest has it")}
	if err := s.handImage(&config.Export{Name: "x", Image: "/i"}, gathered{err: locked}); !errors.Is(err, backing.ErrLocked) {
		t.Errorf("stage 0: got %v, want %v", err, backing.ErrLocked)
	}
	text, err := json.Marshal(s.out)
	if err != nil {
		t.Fatal(err)
	}
	h := &Handed{}
	if err := json.Unmarshal(text, &h.in); err != nil {
		t.Fatal(err)
	}
	x, err := h.lacks(config.Export{Name: "x", Image: "/i"})
	if !errors.Is(err, backing.ErrLocked) || err.Error() != locked.Error() || x.Image != "" {
		t.Errorf("the image: got %q, %v, want none and %q", x.Image, err, locked)
	}
	if x, err := h.lacks(config.Export{Name: "x", Image: "/overlay"}); err != nil || x.Image != "/overlay" {
		t.Errorf("an overlay: got %q, %v, want it to be opened", x.Image, err)
	}
}

// TestDeviceInUseIsHandedOverToBeRead: an overlay that the worker remembers may stand
// on it, and the worker may have no right to open it. What it serves later it may open.
func TestDeviceInUseIsHandedOverToBeRead(t *testing.T) {
	image := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(image, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	x := config.Export{Name: "x", Format: "raw", Image: backingtest.Loop(t, image, 512)}
	x.SetDefaults()
	backingtest.Claim(t, x.Image)
	s := &stage0{daemon: emptyService(t), out: handover{Images: map[string]handedImage{}}}
	g := s.gatherFirst([]sought{{Export: x}})[0]
	defer g.close()
	if err := s.handImage(&x, g); !errors.Is(err, backing.ErrLocked) {
		t.Errorf("stage 0: got %v, want %v", err, backing.ErrLocked)
	}
	if len(s.paths) != 1 || s.paths[0].Path != x.Image {
		t.Errorf("the worker may open %v, want %s", s.paths, x.Image)
	}
	h := s.out.Images["x"]
	if len(s.files) != 1 || h.InUse == "" || len(h.Files) != 1 || !h.Files[0].ReadOnly {
		t.Fatalf("got %d files and %+v, want one to be read of an image in use", len(s.files), h)
	}
	flags, err := unix.FcntlInt(s.files[0].Fd(), unix.F_GETFL, 0)
	if err != nil || flags&unix.O_ACCMODE != unix.O_RDONLY {
		t.Errorf("the file has flags %#x, %v, want one to be read", flags, err)
	}
}
