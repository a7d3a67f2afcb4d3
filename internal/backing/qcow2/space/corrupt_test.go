package space

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/check"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/create"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/storetest"
)

// TestCorruptionStopsEverything changes the image behind the back of Space, or
// breaks the contract.
func TestCorruptionStopsEverything(t *testing.T) {
	for _, tt := range []struct {
		name string
		do   func(r *rig) error
	}{
		{"a free cluster with a refcount", func(r *rig) error {
			run := r.reserve(512)
			r.setRefcount(run.Off, 1)
			return r.s.Write(ctx)
		}},
		{"a reserved cluster with two references", func(r *rig) error {
			run := r.reserve(512)
			r.commit()
			r.setRefcount(run.Off, 2)
			r.open2()
			r.s.Drop(run.Off, run.Len)
			return r.s.Write(ctx)
		}},
		{"released twice", func(r *rig) error {
			run := r.reserve(512)
			r.commit()
			return r.s.Release(ctx, []Ref{run.ref(), run.ref()})
		}},
		{"released after Drop", func(r *rig) error {
			run := r.reserve(512)
			r.commit()
			r.s.Drop(run.Off, run.Len)
			return r.s.Release(ctx, []Ref{run.ref()})
		}},
		{"dropped twice", func(r *rig) error {
			run := r.reserve(512)
			r.s.Drop(run.Off, run.Len)
			r.s.Drop(run.Off, run.Len)
			return r.s.Write(ctx)
		}},
		{"dropped beyond the image", func(r *rig) error {
			r.s.Drop(1<<56, 512)
			return r.s.Write(ctx)
		}},
		{"released beyond the image", func(r *rig) error { return r.s.Release(ctx, []Ref{{1<<63 - 512, 1 << 40}}) }},
		{"released below the image", func(r *rig) error { return r.s.Release(ctx, []Ref{{-512, 512}}) }},
		{"released without a refcount block", func(r *rig) error { return r.s.Release(ctx, []Ref{{1 << 40, 512}}) }},
		{"reserved bits in the refcount table", func(r *rig) error {
			r.reserve(512)
			r.patch(int64(r.h.RefTableOffset), r.word(int64(r.h.RefTableOffset))|1)
			return r.s.Write(ctx)
		}},
		{"a refcount block beyond the image", func(r *rig) error {
			r.reserve(512)
			r.patch(int64(r.h.RefTableOffset), 1<<62)
			return r.s.Write(ctx)
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := newRig(t, 512, 16, 64, create.Off)
			err := tt.do(r)
			var e *backing.Error
			if !errors.As(err, &e) || e.Kind != backing.ErrIO || !errors.As(err, new(format.Corrupt)) {
				t.Fatalf("got %v, want an I/O error about a corrupt image", err)
			}
			writes := r.tape.Count(storetest.Write)
			_, err1 := r.s.Reserve(512)
			_, err2 := r.s.ReserveMeta(512)
			for i, again := range []error{err1, err2, r.s.Write(ctx), r.s.Release(ctx, nil)} {
				if !errors.Is(again, err) {
					t.Errorf("call %d after it: got %v, want %v", i, again, err)
				}
			}
			if n := r.tape.Count(storetest.Write); n != writes {
				t.Errorf("%d writes after it", n-writes)
			}
		})
	}
}

// setRefcount changes the refcount of the cluster at off in the file; it has 16
// bits, in the first block.
func (r *rig) setRefcount(off int64, n uint64) {
	c := off >> r.g.ClusterBits
	at := int64(r.word(int64(r.h.RefTableOffset))) + c*2
	shift := uint(48 - at%8*8)
	r.patch(at&^7, r.word(at&^7)&^(0xffff<<shift)|n<<shift)
}

// open2 makes a new Space, with a cold cache, whatever is in the image.
func (r *rig) open2() {
	r.Helper()
	report, err := check.Run(ctx, r.tape.Clone(), r.h, check.Options{})
	if err != nil {
		r.Fatal(err)
	}
	if r.s, err = New(r.tape, r.h, report, slog.New(slog.DiscardHandler)); err != nil {
		r.Fatal(err)
	}
}

func TestUnsoundImageIsRefused(t *testing.T) {
	r := newRig(t, 512, 16, 64, create.Metadata)
	r.setRefcount(int64(r.h.L1Offset), 0)
	report, err := check.Run(ctx, r.tape.Clone(), r.h, check.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := New(r.tape, r.h, report, slog.New(slog.DiscardHandler)); !errors.Is(err, backing.ErrInvalid) {
		t.Errorf("got %v, want ErrInvalid", err)
	}
}

func TestInvalidLengthsAreRefused(t *testing.T) {
	r := newRig(t, 512, 16, 64, create.Off)
	for _, tt := range []struct {
		n    int64
		want error
	}{{0, backing.ErrInvalid}, {-1, backing.ErrInvalid}, {-1 << 63, backing.ErrInvalid}, {1<<63 - 1, backing.ErrNoSpace}} {
		if _, err := r.s.ReserveMeta(tt.n); !errors.Is(err, tt.want) {
			t.Errorf("ReserveMeta(%d): got %v, want %v", tt.n, err, tt.want)
		}
		if run, err := r.s.Reserve(tt.n); tt.n <= 0 && !errors.Is(err, tt.want) || tt.n > 0 && (err != nil || run.Len <= 0) {
			t.Errorf("Reserve(%d) = %+v, %v", tt.n, run, err)
		}
	}
	for _, tt := range []struct {
		off, n int64
		want   bool
	}{
		{0, 1, true}, {511, 1, true}, {0, 0, false}, {0, -1, false}, {-1, 1, true}, {1 << 62, 1, true},
		{0, 1<<63 - 1, true}, {1<<63 - 1, 1<<63 - 1, true}, {1 << 30, 512, false}, {1 << 30, 1 << 33, false}, {1 << 30, 1 << 40, true},
	} {
		if got := r.s.IsMeta(tt.off, tt.n); got != tt.want {
			t.Errorf("IsMeta(%d, %d) = %v, want %v", tt.off, tt.n, got, tt.want)
		}
	}
	if err := r.s.Extend(ctx, 1<<57); !errors.Is(err, backing.ErrOutOfRange) {
		t.Errorf("Extend beyond all images: got %v", err)
	}
}

// TestReleaseGoesOnWhereItFailed has a reference that two blocks count.
func TestReleaseGoesOnWhereItFailed(t *testing.T) {
	r := newRig(t, 512, 64, 300, create.Metadata)
	run := r.reserve(100 * 512)
	r.commit()
	r.open2()
	r.tape.FailOp(storetest.Read, 3, syscall.EIO) // the table, a block, another
	if err := r.s.Release(ctx, []Ref{run.ref()}); !errors.Is(err, syscall.EIO) {
		t.Fatalf("got %v, want EIO", err)
	}
	if leaks := r.check().Leaks; leaks != 100 {
		t.Errorf("%d leaks, want all 100: nothing was written", leaks)
	}
	r.commit()
	r.sound()
}

// TestBlockInUsedClusterIsWiped puts new blocks where data was.
func TestBlockInUsedClusterIsWiped(t *testing.T) {
	r := newRig(t, 512, 64, 100, create.Off)
	runs := r.reserveAll(300)
	for _, run := range runs {
		r.s.Drop(run.Off, run.Len)
	}
	r.watch(1)
	r.reserveAll(200)
	r.commit()
	if n := r.check().Leaks; n != 200 {
		t.Errorf("%d leaks, want the 200 that are reserved", n)
	}
}

func TestFileGrowsInStepsAndIsTrimmed(t *testing.T) {
	r := newRig(t, 65536, 16, 4096, create.Off)
	open, _ := r.tape.Size()
	run := r.reserve(65536)
	size, _ := r.tape.Size()
	if size < run.Off+run.Len+8<<20 || size > run.Off+run.Len+9<<20 {
		t.Errorf("the file has %d bytes for %+v, want 8 MiB more", size, run)
	}
	n := r.tape.Count(storetest.Truncate)
	for range 100 {
		r.reserve(65536)
	}
	if n := r.tape.Count(storetest.Truncate) - n; n != 0 {
		t.Errorf("the file grew %d times for 6.25 MiB", n)
	}
	r.tape.FailCall(2, syscall.EFBIG) // after the size
	if err := r.s.Extend(ctx, 32<<20); err != nil {
		t.Fatal(err)
	}
	if size, _ = r.tape.Size(); size != 32<<20 {
		t.Errorf("the file has %d bytes, want what was asked for where the step failed", size)
	}
	for range 100 {
		r.s.Drop(run.Off+65536, 65536)
		run.Off += 65536
	}
	r.commit()
	if err := r.s.Trim(ctx); err != nil {
		t.Fatal(err)
	}
	if size, _ = r.tape.Size(); size != open+65536 {
		t.Errorf("the file has %d bytes, want %d and one cluster", size, open)
	}
	if r.check().Leaks != 1 {
		t.Error("the last cluster in use was cut off")
	}
}

func TestFileThatDidNotGrowIsNotTrimmed(t *testing.T) {
	r := newRig(t, 65536, 16, 4096, create.Off)
	size, _ := r.tape.Size()
	if err := r.tape.Truncate(size + 1<<20); err != nil {
		t.Fatal(err)
	}
	r.open()
	r.reserve(65536)
	if err := r.s.Trim(ctx); err != nil {
		t.Fatal(err)
	}
	if n, _ := r.tape.Size(); n != size+1<<20 {
		t.Errorf("the file has %d bytes, want %d as before", n, size+1<<20)
	}
}

func TestDeviceIsNeitherGrownNorTrimmed(t *testing.T) {
	r := newRig(t, 65536, 16, 64, create.Off)
	size, _ := r.tape.Size()
	r.device(size + 1<<20)
	r.reserve(65536)
	r.commit()
	if err := r.s.Trim(ctx); err != nil {
		t.Fatal(err)
	}
	if n := r.tape.Count(storetest.Truncate); n != 0 {
		t.Errorf("the device was truncated %d times", n)
	}
}

// TestCanceledCallsGoOnLater gives up waiting, and asks again with patience.
func TestCanceledCallsGoOnLater(t *testing.T) {
	r := newRig(t, 512, 16, 64, create.Off)
	gone, cancel := context.WithCancel(ctx)
	cancel()
	run := r.reserve(5 * 512)
	if err := r.s.Write(gone); !errors.Is(err, context.Canceled) {
		t.Errorf("Write: got %v, want Canceled", err)
	}
	if err := r.s.Extend(gone, 1<<30); !errors.Is(err, context.Canceled) {
		t.Errorf("Extend: got %v, want Canceled", err)
	}
	r.commit()
	if err := r.s.Release(gone, []Ref{run.ref()}); !errors.Is(err, context.Canceled) {
		t.Errorf("Release: got %v, want Canceled", err)
	}
	if !r.s.Pending() {
		t.Error("nothing is pending after a release that was given up")
	}
	if again := r.reserve(512); again.Off == run.Off {
		t.Errorf("%+v is free although its release was given up", again)
	} else {
		r.s.Drop(again.Off, again.Len)
	}
	r.commit()
	r.sound()
}

// TestSharedClustersAreReleasedOnce takes the active mapping of an image away
// that a snapshot shares, then looks whether the snapshot is whole.
func TestSharedClustersAreReleasedOnce(t *testing.T) {
	for _, options := range []string{"cluster_size=4k", "cluster_size=4k,refcount_bits=2", "cluster_size=512,refcount_bits=64"} {
		t.Run(options, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "image")
			run := func(args ...string) []byte {
				out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
				if err != nil {
					t.Fatalf("%q: %v: %s", args, err, out)
				}
				return out
			}
			run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, "32k")
			run("qemu-io", "-f", "qcow2", "-c", "write -P 7 0 32k", path)
			run("qemu-img", "snapshot", "-c", "one", path)
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			r := rigOf(t, storetest.New(b), 1)
			r.watch(1)
			var refs []Ref
			for _, off := range r.hosts {
				refs = append(refs, Ref{off + 1, 1})
			}
			at, _ := r.entry(0)
			refs = append(refs, Ref{at, r.g.ClusterSize})
			r.patch(int64(r.h.L1Offset), 0)
			if err := r.tape.Sync(ctx); err != nil {
				t.Fatal(err)
			}
			if err := r.s.Release(ctx, refs); err != nil {
				t.Fatal(err)
			}
			r.commit()
			r.sound()
			if n := r.tape.Count(storetest.Punch); n != 0 || !r.s.IsMeta(at, 1) {
				t.Errorf("%d punches, IsMeta %v: the snapshot has them all", n, r.s.IsMeta(at, 1))
			}
			r.qemu()
			if err := os.WriteFile(path, r.tape.Contents(), 0o600); err != nil {
				t.Fatal(err)
			}
			run("qemu-img", "snapshot", "-a", "one", path)
			out := run("qemu-io", "-f", "qcow2", "-c", "read -P 7 0 32k", path)
			if bytes.Contains(out, []byte("failed")) {
				t.Errorf("%s", out)
			}
		})
	}
}

// TestManyGoroutines reserves and drops while the commit writes; it is for the
// race detector, and for the account in the end.
func TestManyGoroutines(t *testing.T) {
	r := newRig(t, 512, 64, 1000, create.Off)
	s := r.s
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			var runs []Run
			for k := range 200 {
				run, err := s.Reserve(int64(512 * (1 + (i*7+k)%30)))
				if err != nil {
					t.Error(err)
					return
				}
				if err := s.Extend(ctx, run.Off+run.Len); err != nil {
					t.Error(err)
				}
				if s.IsMeta(run.Off, run.Len) {
					t.Errorf("%+v is metadata", run)
				}
				if runs = append(runs, run); k%3 > 0 {
					s.Drop(runs[0].Off, runs[0].Len)
					runs = runs[1:]
				}
				s.Pending()
			}
			for _, run := range runs {
				s.Drop(run.Off, run.Len)
			}
		})
	}
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	for running := true; running; {
		select {
		case <-done:
			running = false
		default:
		}
		if err := s.Write(ctx); err != nil {
			t.Error(err)
			<-done
			return
		}
	}
	r.commit()
	r.sound()
}
