package raw_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/backingtest"
	"github.com/vmdiskd/vmdiskd/internal/backing/raw"
	"github.com/vmdiskd/vmdiskd/internal/engine"
)

func TestBlockDeviceConforms(t *testing.T) {
	forKinds(t, func(t *testing.T, k kind) {
		sector := uint32(512)
		if k.direct {
			sector = 4096
		}
		backingtest.Run(t, backingtest.Maker{Granule: 4096, New: func(t testing.TB, size int64) backing.Device {
			d := openRaw(t, backingtest.Loop(t, tempImage(t, size), sector), newEngine(t, k.engine), k.direct, raw.Options{})
			closeAfter(t, d)
			return backing.NewEmulate(d)
		}})
	})
}

// allocated is how many bytes of a file are.
func allocated(t *testing.T, path string) int64 {
	t.Helper()
	var st unix.Stat_t
	f := openFile(t, path, unix.O_RDONLY)
	defer f.Close()
	if err := errors.Join(f.Sync(), unix.Fstat(int(f.Fd()), &st)); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

func TestTrimAndZeroReachTheDevice(t *testing.T) {
	const size = 4 << 20
	for _, tt := range []struct {
		name string
		do   func(*testing.T, *raw.Device) error
		left int64 // bytes that stay allocated in the image, roughly
		zero bool
	}{
		{"trim discards", func(t *testing.T, d *raw.Device) error { return d.Trim(t.Context(), 0, size, backing.FUA) }, 0, false},
		{"unaligned trim keeps its edges", func(t *testing.T, d *raw.Device) error { return d.Trim(t.Context(), 100, size-200, 0) }, 8192, false},
		{"zero deallocates", func(t *testing.T, d *raw.Device) error { return d.Zero(t.Context(), 0, size, backing.FUA) }, 0, true},
		{"fast zero deallocates", func(t *testing.T, d *raw.Device) error { return d.Zero(t.Context(), 0, size, backing.FastZero) }, 0, true},
		{"zero without hole stays allocated", func(t *testing.T, d *raw.Device) error { return d.Zero(t.Context(), 0, size, backing.NoHole) }, size, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			forKinds(t, func(t *testing.T, k kind) {
				image := tempImage(t, size)
				d := openRaw(t, backingtest.Loop(t, image, 512), newEngine(t, k.engine), k.direct, raw.Options{})
				closeAfter(t, d)
				fill(t, d, 1)
				if err := errors.Join(d.Flush(t.Context()), tt.do(t, d), d.Flush(t.Context())); err != nil {
					t.Fatal(err)
				}
				if got := allocated(t, image); got > tt.left+64<<10 || got < tt.left {
					t.Errorf("image: got %d bytes allocated, want about %d", got, tt.left)
				}
				if got := contents(t, d); tt.zero && !bytes.Equal(got, make([]byte, size)) {
					t.Error("read: not all zero")
				}
			})
		})
	}
}

func TestUnalignedZeroOfABlockDeviceKeepsItsNeighbours(t *testing.T) {
	const size = 64 << 10
	forKinds(t, func(t *testing.T, k kind) {
		for _, sector := range []uint32{512, 4096} {
			d := openRaw(t, backingtest.Loop(t, tempImage(t, size), sector), newEngine(t, k.engine), k.direct, raw.Options{})
			closeAfter(t, d)
			for _, r := range [][2]int64{{1, 1}, {511, 2}, {100, 3000}, {4095, 4098}, {1, size - 2}, {size - 1, 1}, {4096, 8192}} {
				fill(t, d, 1)
				want := bytes.Repeat([]byte{1}, size)
				clear(want[r[0] : r[0]+r[1]])
				if err := d.Zero(t.Context(), r[0], r[1], 0); err != nil {
					t.Fatalf("zero at %d+%d: %v", r[0], r[1], err)
				}
				if got := contents(t, d); !bytes.Equal(got, want) {
					t.Errorf("zero at %d+%d with sectors of %d: wrong bytes", r[0], r[1], sector)
				}
			}
		}
	})
}

func TestFastZeroOfLessThanABlockIsRefusedUntouched(t *testing.T) {
	d := openRaw(t, backingtest.Loop(t, tempImage(t, 64<<10), 4096), newEngine(t, "pool"), false, raw.Options{})
	closeAfter(t, d)
	fill(t, d, 1)
	if err := d.Zero(t.Context(), 100, 4096, backing.FastZero); !errors.Is(err, backing.ErrNotSupported) {
		t.Errorf("fast zero: got %v, want %v", err, backing.ErrNotSupported)
	}
	if err := d.Zero(t.Context(), 0, 8192, backing.FastZero|backing.NoHole); !errors.Is(err, backing.ErrNotSupported) {
		t.Errorf("fast zero without hole: got %v, want %v", err, backing.ErrNotSupported)
	}
	if got := contents(t, d); !bytes.Equal(got, bytes.Repeat([]byte{1}, 64<<10)) {
		t.Error("refused fast zero changed contents")
	}
}

// TestFastZeroOfABlockDeviceWritesItsPagesBack: if the device refuses after all, the
// kernel has dropped those of the range already, and made zeroes in parts of pages.
func TestFastZeroOfABlockDeviceWritesItsPagesBack(t *testing.T) {
	const size = 64 << 10
	page := int64(os.Getpagesize())
	for _, tt := range []struct {
		name    string
		direct  bool
		refused bool
		want    string // of two fast zeroes
	}{
		{"refused", false, true, "[sync punch]"},
		{"not refused", false, false, "[sync punch punch]"},
		{"direct", true, true, "[punch]"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := backingtest.NewFaultEngine(newEngine(t, "pool"))
			d := openRaw(t, backingtest.Loop(t, tempImage(t, size), 512), f, tt.direct, raw.Options{})
			closeAfter(t, d)
			fill(t, d, 1)
			var ops []engine.Op
			f.Inject(backingtest.Rule{Times: -1, Match: func(io *engine.IO) bool {
				if io.Op != engine.OpSync && io.Op != engine.OpPunch {
					return false
				}
				ops = append(ops, io.Op)
				if !tt.direct && (io.Off%page != 0 || io.Len%page != 0) {
					t.Errorf("%v at %d+%d: not whole pages", io.Op, io.Off, io.Len)
				}
				return io.Op == engine.OpPunch && tt.refused
			}, Fault: backingtest.Fault{Errno: unix.EOPNOTSUPP}})
			for range 2 {
				if err := d.Zero(t.Context(), 512, size-1024, backing.FastZero); errors.Is(err, backing.ErrNotSupported) != tt.refused {
					t.Errorf("fast zero: got %v, want refusal: %v", err, tt.refused)
				}
			}
			if got := fmt.Sprint(ops); got != tt.want {
				t.Errorf("operations: got %s, want %s", got, tt.want)
			}
			want := bytes.Repeat([]byte{1}, size)
			if !tt.refused {
				clear(want[512 : size-512])
			}
			if got := contents(t, d); !bytes.Equal(got, want) {
				t.Error("read: wrong bytes")
			}
		})
	}
}

// TestClaimedBlockDeviceIsZeroedAndTrimmed: while somebody else has the device with
// O_EXCL, the kernel does not drop pages of it that are not written back.
func TestClaimedBlockDeviceIsZeroedAndTrimmed(t *testing.T) {
	const size = 1 << 20
	for name, do := range map[string]func(*raw.Device) error{
		"zero":              func(d *raw.Device) error { return d.Zero(t.Context(), 0, size, 0) },
		"zero without hole": func(d *raw.Device) error { return d.Zero(t.Context(), 0, size, backing.NoHole) },
		"trim":              func(d *raw.Device) error { return d.Trim(t.Context(), 0, size, 0) },
	} {
		t.Run(name, func(t *testing.T) {
			forKinds(t, func(t *testing.T, k kind) {
				node := backingtest.Loop(t, tempImage(t, size), 512)
				d := openRaw(t, node, newEngine(t, k.engine), k.direct, raw.Options{})
				closeAfter(t, d)
				backingtest.Claim(t, node)
				fill(t, d, 1)
				if err := do(d); err != nil {
					t.Errorf("got %v, want none", err)
				}
				if got := contents(t, d); name != "trim" && !bytes.Equal(got, make([]byte, size)) {
					t.Error("read: not all zero")
				}
			})
		})
	}
}

// TestFailedSyncOfAClaimedBlockDevicePoisons: what it tells is not told again.
func TestFailedSyncOfAClaimedBlockDevicePoisons(t *testing.T) {
	const size = 1 << 20
	node := backingtest.Loop(t, tempImage(t, size), 512)
	f := backingtest.NewFaultEngine(newEngine(t, "pool"))
	d := openRaw(t, node, f, false, raw.Options{})
	closeAfter(t, d)
	backingtest.Claim(t, node)
	fill(t, d, 1)
	f.Inject(backingtest.Rule{Match: backingtest.Ops(engine.OpSync), Fault: backingtest.Fault{Errno: unix.EIO}})
	if err := d.Zero(t.Context(), 0, size, 0); !errors.Is(err, unix.EIO) {
		t.Errorf("zero: got %v, want %v", err, unix.EIO)
	}
	wantPoisoned(t, d)
}

// TestServedBlockDeviceIsNotClaimed: who is kept out by the locks of another process
// does not ask the kernel, which would disturb whoever serves it. Those of this
// process keep nobody out who opens the device again.
func TestServedBlockDeviceIsNotClaimed(t *testing.T) {
	node := backingtest.Loop(t, tempImage(t, 1<<20), 512)
	other := openFile(t, node, unix.O_RDWR)
	defer other.Close()
	l := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart, Start: 100, Len: 200} // all that QEMU has
	if err := unix.FcntlFlock(other.Fd(), unix.F_OFD_SETLK, &l); err != nil {
		t.Fatal(err)
	}
	free := backingtest.Claim(t, node)
	f := openFile(t, node, unix.O_RDWR)
	defer f.Close()
	if err := raw.Unclaimed(f, raw.Options{Path: node}); !errors.Is(err, backing.ErrLocked) || errors.Is(err, raw.ErrClaimed) {
		t.Errorf("served by another: got %v, want %v by its locks", err, backing.ErrLocked)
	}
	free()
	l.Type = unix.F_UNLCK
	if err := unix.FcntlFlock(other.Fd(), unix.F_OFD_SETLK, &l); err != nil {
		t.Fatal(err)
	}
	closeAfter(t, openRaw(t, node, newEngine(t, "pool"), false, raw.Options{}))
	backingtest.Claim(t, node)
	if err := raw.Unclaimed(f, raw.Options{Path: node}); !errors.Is(err, backing.ErrLocked) {
		t.Errorf("served by this process: got %v, want %v", err, backing.ErrLocked)
	}
}

// TestPassingLockHidesNoClaim: a lock that somebody else has for a moment, as a program
// that copies the device, is waited for, and what the kernel says counts then.
func TestPassingLockHidesNoClaim(t *testing.T) {
	for _, tt := range []struct {
		name    string
		claimed bool
		want    error
	}{{"claimed", true, raw.ErrClaimed}, {"free", false, nil}} {
		t.Run(tt.name, func(t *testing.T) {
			node := backingtest.Loop(t, tempImage(t, 1<<20), 512)
			if tt.claimed {
				backingtest.Claim(t, node)
			}
			synctest.Test(t, func(t *testing.T) {
				other, f := openFile(t, node, unix.O_RDONLY), openFile(t, node, unix.O_RDWR)
				defer f.Close()
				l := unix.Flock_t{Type: unix.F_RDLCK, Whence: io.SeekStart, Start: 201, Len: 1} // nobody else may write
				if err := unix.FcntlFlock(other.Fd(), unix.F_OFD_SETLK, &l); err != nil {
					t.Fatal(err)
				}
				time.AfterFunc(100*time.Millisecond, func() { _ = other.Close() })
				unlock, err := raw.Lock(f, raw.Options{Path: node})
				if !errors.Is(err, tt.want) {
					t.Errorf("lock: got %v, want %v", err, tt.want)
				}
				if err == nil {
					unlock()
				}
			})
		})
	}
}

func TestBlockDeviceIsAllData(t *testing.T) {
	d := openRaw(t, backingtest.Loop(t, tempImage(t, 1<<20), 512), newEngine(t, "pool"), false, raw.Options{})
	closeAfter(t, d)
	if holes(t, d, 0, 1<<20) {
		t.Error("extents: got a hole in a block device")
	}
}

func TestBlockDeviceGrowthIsAdopted(t *testing.T) {
	image := tempImage(t, 1<<20)
	node := backingtest.Loop(t, image, 512)
	d := openRaw(t, node, newEngine(t, "pool"), false, raw.Options{})
	closeAfter(t, d)
	setLoopSize(t, node, image, 2<<20)
	if got := d.Info().Size; got != 2<<20 {
		t.Errorf("size: got %d, want %d", got, 2<<20)
	}
}

// TestLoopOverTruncatedFileFails: reading what is gone is an error on a block
// device too.
// TestBlockDeviceThatIsGoneIsNotFull: what is pulled out of a machine has the
// size 0 from then on, and the kernel says of a write to it that there is no
// space. A guest would be told to wait for more of that.
func TestBlockDeviceThatIsGoneIsNotFull(t *testing.T) {
	forKinds(t, func(t *testing.T, k kind) {
		image := tempImage(t, 1<<20)
		node := backingtest.Loop(t, image, 512)
		var told []error
		d := openRaw(t, node, newEngine(t, k.engine), k.direct, raw.Options{Poisoned: func(err error) { told = append(told, err) }})
		defer d.Close()
		setLoopSize(t, node, image, 0)
		p := make([]byte, 4096)
		for _, tt := range []struct {
			name string
			err  error
			kind backing.Kind
		}{
			{"read of a container", someOf(t, d, p), backing.ErrIO},
			{"read", d.ReadAt(t.Context(), p, 0), backing.ErrIO},
			{"write after it", d.WriteAt(t.Context(), p, 0, 0), backing.ErrPoisoned},
			{"flush", d.Flush(t.Context()), backing.ErrPoisoned},
		} {
			if got := backing.KindOf(tt.err); tt.err == nil || got != tt.kind {
				t.Errorf("%s: got %v of kind %v, want %v", tt.name, tt.err, got, tt.kind)
			}
		}
		if len(told) != 1 || !errors.Is(told[0], unix.ENODEV) {
			t.Errorf("told: got %v, want one %v", told, unix.ENODEV)
		}
	})
	t.Run("write", func(t *testing.T) {
		image := tempImage(t, 1<<20)
		node := backingtest.Loop(t, image, 512)
		d := openRaw(t, node, newEngine(t, "pool"), false, raw.Options{})
		defer d.Close()
		setLoopSize(t, node, image, 0)
		err := d.WriteAt(t.Context(), make([]byte, 4096), 0, 0)
		if backing.KindOf(err) != backing.ErrIO || !errors.Is(err, unix.ENODEV) {
			t.Errorf("got %v of kind %v, want %v", err, backing.KindOf(err), backing.ErrIO)
		}
	})
}

// TestBlockDeviceThatShrankSaysSo: the kernel drops what was written beyond the new
// end and is not written back, says nothing of it when the device is synced, and of
// a write there that there is no space.
func TestBlockDeviceThatShrankSaysSo(t *testing.T) {
	forKinds(t, func(t *testing.T, k kind) {
		for name, sync := range map[string]func(*raw.Device) error{
			"flush":     func(d *raw.Device) error { return d.Flush(t.Context()) },
			"FUA write": func(d *raw.Device) error { return d.WriteAt(t.Context(), make([]byte, 4096), 0, backing.FUA) },
		} {
			image := tempImage(t, 1<<20)
			node := backingtest.Loop(t, image, 512)
			d := openRaw(t, node, newEngine(t, k.engine), k.direct, raw.Options{})
			closeAfter(t, d)
			fill(t, d, 1)
			setLoopSize(t, node, image, 512<<10)
			for _, tt := range []struct {
				name string
				err  error
			}{
				{"write", d.WriteAt(t.Context(), make([]byte, 4096), 768<<10, 0)},
				{"zero", d.Zero(t.Context(), 768<<10, 4096, 0)},
				{name, sync(d)},
			} {
				if backing.KindOf(tt.err) != backing.ErrIO || !errors.Is(tt.err, io.ErrUnexpectedEOF) {
					t.Errorf("%s: got %v, want %v: %v", tt.name, tt.err, backing.ErrIO, io.ErrUnexpectedEOF)
				}
			}
			wantPoisoned(t, d)
		}
	})
}

// someOf reads as the formats do that keep a structure in the file.
func someOf(t *testing.T, d *raw.Device, p []byte) error {
	t.Helper()
	n, err := d.ReadSome(t.Context(), p, 0)
	if err == nil && n == len(p) {
		t.Error("read of a container: got all of it")
	}
	return err
}

// setLoopSize gives a loop device and its image another size.
func setLoopSize(t *testing.T, node, image string, size int64) {
	t.Helper()
	if err := os.Truncate(image, size); err != nil {
		t.Fatal(err)
	}
	f := openFile(t, node, unix.O_RDONLY)
	defer f.Close()
	if err := unix.IoctlSetInt(int(f.Fd()), unix.LOOP_SET_CAPACITY, 0); err != nil {
		t.Fatal(err)
	}
}

func TestLoopOverTruncatedFileFails(t *testing.T) {
	image := tempImage(t, 1<<20)
	d := openRaw(t, backingtest.Loop(t, image, 512), newEngine(t, "pool"), true, raw.Options{})
	closeAfter(t, d)
	fill(t, d, 1)
	if err := os.Truncate(image, 512<<10); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 4096)
	if err := d.ReadAt(t.Context(), p, 0); err != nil {
		t.Errorf("read of what is left: %v", err)
	}
	if err := d.ReadAt(t.Context(), p, 768<<10); backing.KindOf(err) != backing.ErrIO || err == nil {
		t.Errorf("read of what is gone: got %v, want %v", err, backing.ErrIO)
	}
}

func TestSecondNodeIsTheSameDevice(t *testing.T) {
	node := backingtest.Loop(t, tempImage(t, 1<<20), 512)
	other := backingtest.SecondNode(t, node)
	e := newEngine(t, "pool")
	closeAfter(t, openRaw(t, node, e, false, raw.Options{}))
	f := openFile(t, other, unix.O_RDWR)
	if _, err := raw.Open(f, e, raw.Options{Path: other}); !errors.Is(err, backing.ErrLocked) {
		t.Errorf("open by a second node: got %v, want %v", err, backing.ErrLocked)
	}
}

func TestReadOnlyBlockDeviceIsNotOpenedForWriting(t *testing.T) {
	node := backingtest.Loop(t, tempImage(t, 1<<20), 512)
	f, admin := openFile(t, node, unix.O_RDWR), openFile(t, node, unix.O_RDONLY)
	t.Cleanup(func() {
		// The loop device would stay so for its next user.
		if err := unix.IoctlSetPointerInt(int(admin.Fd()), unix.BLKROSET, 0); err != nil {
			t.Errorf("make %s writable again: %v", node, err)
		}
		_ = admin.Close()
	})
	if err := unix.IoctlSetPointerInt(int(admin.Fd()), unix.BLKROSET, 1); err != nil {
		t.Fatal(err)
	}
	e := engine.NewPool(1)
	t.Cleanup(func() { _ = e.Close() })
	if _, err := raw.Open(f, e, raw.Options{Path: node}); !errors.Is(err, backing.ErrReadOnly) {
		t.Errorf("open for writing: got %v, want %v", err, backing.ErrReadOnly)
	}
	closeAfter(t, openRaw(t, node, e, false, raw.Options{ReadOnly: true}))
}
