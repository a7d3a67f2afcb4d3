package qcow2_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/create"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/store"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/storetest"
)

// growing is an image of small clusters with data at both its ends, and a
// backing file that is longer than the disk.
func growing(t *testing.T, version int) (image *storetest.Mem, want []byte) {
	t.Helper()
	image = storetest.New(nil)
	o := create.Options{Size: 40<<10 + 512, ClusterSize: 1024, Version: version, Backing: "b", BackingFormat: "raw"}
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

// longBase is what lies below the images of growing, as far as several L2 tables go.
var longBase = bytes.Repeat([]byte{0xbb}, 300<<10)

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
	got := make([]byte, min(size, 500<<10))
	if err := d.ReadAt(t.Context(), got, 0); err != nil {
		return err
	}
	if !bytes.Equal(got[:len(want)], want) || !bytes.Equal(got[len(want):], make([]byte, len(got)-len(want))) {
		return errors.New("contents are wrong")
	}
	return nil
}

func TestDiskGrows(t *testing.T) {
	image, want := growing(t, 3)
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

// TestFailedGrowthLeavesTheDisk makes each call fail in turn. What the growth left
// behind the disk does not keep another one from it.
func TestFailedGrowthLeavesTheDisk(t *testing.T) {
	for _, version := range []int{2, 3} {
		t.Run(fmt.Sprint("version ", version), func(t *testing.T) { failGrowths(t, version) })
	}
}

func failGrowths(t *testing.T, version int) {
	for n := 1; ; n++ {
		image, want := growing(t, version)
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
		if err := d.(backing.Resizer).Resize(t.Context(), grownTo); err != nil {
			t.Errorf("call %d, opened again: resize: %v", n, err)
		}
		if err := wantGrown(t, d, want); err != nil || d.Info().Size != grownTo {
			t.Errorf("call %d, grown to %d after it: %v", n, d.Info().Size, err)
		}
		if err := d.Close(); err != nil {
			t.Errorf("call %d, grown after it: %v", n, err)
		}
		image.Reopen()
		wantSound(t, image, 1<<20)
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
	image, want := growing(t, 3)
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
			if err := errors.Join(d.(backing.Resizer).Resize(t.Context(), grownTo), wantGrown(t, d, want), d.Close()); err != nil {
				t.Errorf("%s, grown after it: %v", name, err)
			}
			st.Reopen()
			wantSound(t, st, 1<<20)
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

// interrupted is a file of which a write to one place is carried out and then
// answers what then says.
type interrupted struct {
	store.Store
	at   int64
	then func() error
}

func (s *interrupted) WriteAt(ctx context.Context, p []byte, off int64, durable bool) error {
	err := s.Store.WriteAt(ctx, p, off, durable)
	if err == nil && off == s.at {
		err = s.then()
	}
	return err
}

// TestGrowthCutOffAtTheHeader: what is flushed afterwards is in the image,
// whatever its header says; where nobody knows that, nothing is acknowledged.
func TestGrowthCutOffAtTheHeader(t *testing.T) {
	for name, at := range map[string]int64{"L1 table": format.OffL1, "size": format.OffSize} {
		for _, fails := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, write fails %v", name, fails), func(t *testing.T) {
				st := storetest.New(emptyMarked(t))
				ctx, leave := context.WithCancel(t.Context())
				x := &interrupted{Store: st, at: at, then: func() error { leave(); return nil }}
				if fails {
					x.then = func() error { return syscall.EIO }
				}
				d, err := qcow2.Open(t.Context(), x, quiet())
				if err != nil {
					t.Fatal(err)
				}
				err = d.(backing.Resizer).Resize(ctx, 64<<20)
				if leave(); fails && !errors.Is(err, syscall.EIO) {
					t.Errorf("resize: got %v, want %v", err, syscall.EIO)
				}
				want := bytes.Repeat([]byte{0xab}, 256<<10)
				if err := d.WriteAt(t.Context(), want, 512<<10, 0); errors.Is(err, backing.ErrPoisoned) != fails || !fails && err != nil {
					t.Errorf("write: got %v, want it to fail: %v", err, fails)
				}
				err = d.Flush(t.Context())
				closed := d.Close()
				if lost := errors.Is(err, backing.ErrPoisoned) && closed != nil; lost != fails || !fails && err != nil {
					t.Errorf("flush: got %v, close: got %v, want them to fail: %v", err, closed, fails)
				}
				st.Reopen()
				wantSound(t, st, 1<<20)
				d = openQuiet(t, st, false)
				defer d.Close()
				if err == nil {
					mustMatch(t, d, 512<<10, want)
				}
			})
		}
	}
}

// emptyMarked is an image of 1 MiB without data, with a bitmap.
func emptyMarked(t *testing.T) []byte {
	t.Helper()
	path := filepath.Join(t.TempDir(), "t")
	if err := os.WriteFile(path, made(t, "cluster_size=512", "1M"), 0o600); err != nil {
		t.Fatal(err)
	}
	qemu(t, "", "qemu-img", "bitmap", "--add", "-g", "512", path, "on")
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// patient is a context of which asked learns that somebody may wait for its end.
type patient struct {
	context.Context
	asked func()
}

func (p patient) Done() <-chan struct{} {
	p.asked()
	return p.Context.Done()
}

// TestZeroInFlightDoesNotReachIntoWhatIsNew: the last cluster is whole only as
// long as the disk ends there.
func TestZeroInFlightDoesNotReachIntoWhatIsNew(t *testing.T) {
	const old = 256<<10 + 512
	ops := map[string]func(ctx context.Context, d backing.Device) error{
		"zero": func(ctx context.Context, d backing.Device) error { return d.Zero(ctx, 0, old, 0) },
		"trim": func(ctx context.Context, d backing.Device) error { return d.Trim(ctx, 0, old, 0) },
	}
	for name, op := range ops {
		for _, data := range []bool{false, true} {
			if data && name == "trim" {
				continue // it waits for nobody
			}
			t.Run(fmt.Sprintf("%s, data file %v", name, data), func(t *testing.T) {
				image, file := storetest.NewCrash(storetest.New(nil)), storetest.NewCrash(storetest.New(nil))
				o, opt, guest := create.Options{Size: old, ClusterSize: 64 << 10}, quiet(), image
				if data {
					o.DataFile, o.Data, opt.DataFile, guest = "data", file, file, file
				}
				if err := create.Image(t.Context(), image, o); err != nil {
					t.Fatal(err)
				}
				image.Reopen()
				d, err := qcow2.Open(t.Context(), image, opt)
				if err != nil {
					t.Fatal(err)
				}
				defer d.Close()
				want := bytes.Repeat([]byte{0xee}, 512)
				if err := d.WriteAt(t.Context(), want, old-512, backing.FUA); err != nil {
					t.Fatal(err)
				}
				gate, zeroes := held(t, d, guest, op)

				// The growth waits, before it makes a new L1 table, or a write to
				// what is new comes before the rest.
				calls := image.Calls()
				waits, grown := make(chan struct{}, 1), make(chan error, 1)
				ctx := patient{t.Context(), func() {
					if image.Calls() == calls {
						select {
						case waits <- struct{}{}:
						default:
						}
					}
				}}
				grow := func() error {
					err := d.(backing.Resizer).Resize(ctx, 1<<30)
					if err == nil {
						err = d.WriteAt(t.Context(), want, old, backing.FUA)
					}
					return err
				}
				go func() { grown <- grow() }()
				select {
				case <-waits:
					close(gate)
					err = <-grown
				case err = <-grown:
					close(gate)
				}
				if err := errors.Join(err, <-zeroes, <-zeroes); err != nil {
					t.Fatal(err)
				}
				mustMatch(t, d, old-512, append(make([]byte, 512), want...))
			})
		}
	}
}

// held has a write to the first cluster of a disk, whose data are in file, wait
// until gate is closed, and op wait for that. Both tell when they are done.
func held(t *testing.T, d backing.Device, file *storetest.Crash, op func(context.Context, backing.Device) error) (gate chan struct{}, done chan error) {
	t.Helper()
	gate, done = make(chan struct{}), make(chan error, 2)
	hit := make(chan struct{})
	p := bytes.Repeat([]byte{0x77}, 64<<10)
	file.SetHook(func(c storetest.Call) {
		if c.Op == storetest.Write && c.Len == int64(len(p)) && !c.Done {
			hit <- struct{}{}
			<-gate
		}
	})
	go func() { done <- d.WriteAt(t.Context(), p, 0, 0) }()
	<-hit
	file.SetHook(nil)
	ctx := &waiting{Context: t.Context(), asked: make(chan struct{})}
	go func() { done <- op(ctx, d) }()
	<-ctx.asked
	return gate, done
}

// TestSnapshotKeepsTheSizeItDoesNotSay: one without a size is as large as the
// disk, which therefore does not grow. It is written to all the same.
func TestSnapshotKeepsTheSizeItDoesNotSay(t *testing.T) {
	b := made(t, "cluster_size=64k", "4M", written, "snapshot s1")
	off := u64(b, format.OffSnapshots+4)
	entry := append(bytes.Clone(b[off:off+36]), "\x00\x00\x00\x001s1"...)
	copy(b[off:], append(entry, make([]byte, 32)...))
	st := storetest.New(b)
	d := openQuiet(t, st, false)
	if err := d.(backing.Resizer).Resize(t.Context(), 8<<20); !errors.Is(err, backing.ErrNotSupported) {
		t.Errorf("resize: got %v, want %v", err, backing.ErrNotSupported)
	}
	if err := errors.Join(d.WriteAt(t.Context(), make([]byte, 512), 0, 0), d.Close()); err != nil {
		t.Error(err)
	}
	st.Reopen()
	o := quiet()
	o.ReadOnly, o.Snapshot = true, "s1"
	s, err := qcow2.Open(t.Context(), st, o)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if got := s.Info().Size; got != 4<<20 {
		t.Errorf("the snapshot has %d bytes, want %d", got, 4<<20)
	}
}

// TestGrowthOverTablesBehindTheDisk: they hold a VM state, while it is being saved;
// without a snapshot there is none, and what is left of one is no part of the disk.
func TestGrowthOverTablesBehindTheDisk(t *testing.T) {
	const data, snapshot, old = "write -q -P 1 AT 64k", "snapshot s1", 1 << 20
	simple, extended := "cluster_size=4k", "cluster_size=16k,extended_l2=on"
	for _, tt := range []struct {
		name, options string
		table         int64 // guest bytes of an L2 table
		commands      []string
		want          error
	}{
		{"data, a snapshot", simple, 2 << 20, []string{data, snapshot}, backing.ErrNotSupported},
		{"compressed, a snapshot", simple, 2 << 20, []string{"write -q -c -P 1 AT 64k", snapshot}, backing.ErrNotSupported},
		{"extended entries, a snapshot", extended, 16 << 20, []string{data, snapshot}, backing.ErrNotSupported},
		{"discarded, a snapshot", simple, 2 << 20, []string{data, snapshot, "discard -q AT 64k"}, nil},
		{"extended entries, discarded, a snapshot", extended, 16 << 20, []string{data, snapshot, "discard -q AT 64k"}, nil},
		{"data", simple, 2 << 20, []string{data}, nil},
		{"compressed", simple, 2 << 20, []string{"write -q -c -P 1 AT 64k"}, nil},
		{"extended entries, data", extended, 16 << 20, []string{data}, nil},
		{"zeroes", simple, 2 << 20, []string{"write -q -z AT 64k"}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			commands := []string{"write -q -P 2 0 1M"}
			for _, c := range tt.commands {
				commands = append(commands, strings.ReplaceAll(c, "AT", fmt.Sprint(tt.table*3/2)))
			}
			b := made(t, tt.options, fmt.Sprint(2*tt.table), commands...)
			st := storetest.New(patch(t, b, format.OffSize, fmt.Sprintf("%016x", old)))
			d := openQuiet(t, st, false)
			err := d.(backing.Resizer).Resize(t.Context(), 2*tt.table)
			if !errors.Is(err, tt.want) {
				t.Fatalf("resize: got %v, want %v", err, tt.want)
			}
			want := append(bytes.Repeat([]byte{2}, old), make([]byte, 2*tt.table-old)...)
			mustMatch(t, d, 0, want[:d.Info().Size])
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
			st.Reopen()
			wantSound(t, st, 0)
			if leaks, err := judged(t.TempDir(), st.Contents()); err != nil || leaks {
				t.Errorf("qemu-img check: leaks %v, %v", leaks, err)
			}
			d = openQuiet(t, st, true)
			defer d.Close()
			mustMatch(t, d, 0, want[:d.Info().Size])
		})
	}
}
