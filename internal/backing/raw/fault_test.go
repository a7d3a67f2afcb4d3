package raw_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/backingtest"
	"github.com/vmdiskd/vmdiskd/internal/backing/raw"
	"github.com/vmdiskd/vmdiskd/internal/engine"
)

// newFaulty serves a file of size bytes through a FaultEngine.
func newFaulty(t *testing.T, k kind, size int64, o raw.Options) (*raw.Device, *backingtest.FaultEngine) {
	t.Helper()
	f := backingtest.NewFaultEngine(newEngine(t, k.engine))
	d := newRaw(t, size, f, k.direct, o)
	f.Clear()
	return d, f
}

func fill(t *testing.T, d backing.Device, c byte) {
	t.Helper()
	if err := d.WriteAt(t.Context(), bytes.Repeat([]byte{c}, int(d.Info().Size)), 0, 0); err != nil {
		t.Fatalf("write all: %v", err)
	}
}

func contents(t *testing.T, d backing.Device) []byte {
	t.Helper()
	p := make([]byte, d.Info().Size)
	if err := d.ReadAt(t.Context(), p, 0); err != nil {
		t.Fatalf("read all: %v", err)
	}
	return p
}

// TestNthTransferFails runs each operation with its first, second, … transfer
// failing until it needs no more: it reports the error of the transfer, and
// changes nothing outside its range.
func TestNthTransferFails(t *testing.T) {
	const size, off, n = 64<<10 + 100, 5000, 30000
	for _, tt := range []struct {
		name string
		do   func(context.Context, backing.Device) error
	}{
		{"read", func(ctx context.Context, d backing.Device) error { return d.ReadAt(ctx, make([]byte, n), off) }},
		{"write", func(ctx context.Context, d backing.Device) error {
			return d.WriteAt(ctx, bytes.Repeat([]byte{2}, n), off, 0)
		}},
		{"write to the end", func(ctx context.Context, d backing.Device) error {
			return d.WriteAt(ctx, bytes.Repeat([]byte{2}, size-off), off, 0)
		}},
		{"zero", func(ctx context.Context, d backing.Device) error { return d.Zero(ctx, off, n, 0) }},
		{"zero without hole", func(ctx context.Context, d backing.Device) error { return d.Zero(ctx, off, n, backing.NoHole) }},
		{"trim", func(ctx context.Context, d backing.Device) error { return d.Trim(ctx, off, n, 0) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			forKinds(t, func(t *testing.T, k kind) {
				d, f := newFaulty(t, k, size, raw.Options{})
				for nth := 1; ; nth++ {
					fill(t, d, 1)
					f.Clear()
					f.FailNth(nth, syscall.EIO)
					err := tt.do(t.Context(), d)
					needed := f.Clear()
					got := contents(t, d)
					if i := bytes.IndexFunc(got[:off], func(r rune) bool { return r != 1 }); i >= 0 {
						t.Errorf("transfer %d failed: byte %d before the range changed", nth, i)
					}
					if err == nil {
						if needed >= nth {
							t.Errorf("transfer %d of %d failed: got no error", nth, needed)
						}
						break
					}
					if !errors.Is(err, syscall.EIO) || backing.KindOf(err) != backing.ErrIO {
						t.Fatalf("transfer %d failed: got %v, want %v", nth, err, syscall.EIO)
					}
				}
				if err := d.Flush(t.Context()); err != nil {
					t.Errorf("flush after failures without FUA: got %v, want none", err)
				}
			})
		})
	}
}

func TestErrorsHaveTheirKind(t *testing.T) {
	for _, tt := range []struct {
		errno syscall.Errno
		want  backing.Kind
	}{
		{syscall.EIO, backing.ErrIO}, {syscall.ENOSPC, backing.ErrNoSpace}, {syscall.EDQUOT, backing.ErrNoSpace},
		{syscall.EFBIG, backing.ErrNoSpace}, {syscall.EROFS, backing.ErrReadOnly}, {syscall.EPERM, backing.ErrReadOnly},
		{syscall.EINVAL, backing.ErrIO}, {syscall.ENXIO, backing.ErrIO},
	} {
		t.Run(tt.errno.Error(), func(t *testing.T) {
			d, f := newFaulty(t, kind{"pool", false}, 8192, raw.Options{})
			f.FailNth(1, tt.errno)
			err := d.WriteAt(t.Context(), make([]byte, 512), 0, 0)
			if backing.KindOf(err) != tt.want || !errors.Is(err, tt.errno) {
				t.Errorf("write: got %v, want kind %q", err, tt.want)
			}
			gone := tt.errno == syscall.ENXIO
			if err := d.WriteAt(t.Context(), make([]byte, 512), 0, 0); errors.Is(err, backing.ErrPoisoned) != gone {
				t.Errorf("next write: got %v, want poisoned %v", err, gone)
			}
		})
	}
}

// TestFlushOfAReadOnlyFileSystemIsAnInputOutputError: that the guest may not write is
// not what it has to know.
func TestFlushOfAReadOnlyFileSystemIsAnInputOutputError(t *testing.T) {
	forKinds(t, func(t *testing.T, k kind) {
		d, f := newFaulty(t, k, 1<<20, raw.Options{})
		fill(t, d, 1)
		f.Inject(backingtest.Rule{Match: backingtest.Ops(engine.OpSync), Fault: backingtest.Fault{Errno: syscall.EROFS}})
		if err := d.Flush(t.Context()); backing.KindOf(err) != backing.ErrIO {
			t.Errorf("flush: got %v, want %v", err, backing.ErrIO)
		}
		wantPoisoned(t, d)
	})
}

func TestFailedFlushIsForEver(t *testing.T) {
	forKinds(t, func(t *testing.T, k kind) {
		var told []error
		d, f := newFaulty(t, k, 1<<20, raw.Options{Poisoned: func(err error) { told = append(told, err) }})
		fill(t, d, 1)
		f.Inject(backingtest.Rule{Match: backingtest.Ops(engine.OpSync), Fault: backingtest.Fault{Errno: syscall.EIO}})
		if err := d.Flush(t.Context()); !errors.Is(err, backing.ErrIO) {
			t.Fatalf("flush: got %v, want %v", err, backing.ErrIO)
		}
		wantPoisoned(t, d)
		if len(told) != 1 || !errors.Is(told[0], backing.ErrPoisoned) {
			t.Errorf("told of %v, want one error", told)
		}
		if got := contents(t, d); got[0] != 1 {
			t.Errorf("read: got %d, want 1", got[0])
		}
		if n := f.Clear(); n > 4 {
			t.Errorf("transfers: got %d; the poisoned device still works on the file", n)
		}
	})
}

// TestWriteLostBeforeIsForEver: a file that is opened again after a lost write can be
// read, and opened read-only it is as any other.
func TestWriteLostBeforeIsForEver(t *testing.T) {
	forKinds(t, func(t *testing.T, k kind) {
		why := errors.New("a write was lost")
		path := tempImage(t, 1<<20)
		d := openRaw(t, path, newEngine(t, k.engine), k.direct, raw.Options{Lost: why})
		wantPoisoned(t, d)
		if err := d.Flush(t.Context()); !errors.Is(err, why) {
			t.Errorf("flush: got %v, want %v", err, why)
		}
		if got := contents(t, d); len(got) != 1<<20 {
			t.Errorf("read: got %d bytes, want 1 MiB", len(got))
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		d = openRaw(t, path, newEngine(t, k.engine), k.direct, raw.Options{Lost: why, ReadOnly: true})
		closeAfter(t, d)
		if err := d.Flush(t.Context()); err != nil {
			t.Errorf("flush of what is read-only: %v", err)
		}
	})
}

// wantPoisoned checks that d does nothing but read.
func wantPoisoned(t *testing.T, d backing.Device) {
	t.Helper()
	p := make([]byte, 4096)
	for name, do := range map[string]func(context.Context) error{
		"flush":     d.Flush,
		"write":     func(ctx context.Context) error { return d.WriteAt(ctx, p, 0, 0) },
		"FUA write": func(ctx context.Context) error { return d.WriteAt(ctx, p, 0, backing.FUA) },
		"zero":      func(ctx context.Context) error { return d.Zero(ctx, 0, 4096, 0) },
		"trim":      func(ctx context.Context) error { return d.Trim(ctx, 0, 4096, backing.FUA) },
		"map":       func(context.Context) error { return d.Map(engine.OpWrite, 0, 4096, new(backing.Mapping)) },
	} {
		for range 2 {
			if err := do(t.Context()); !errors.Is(err, backing.ErrPoisoned) {
				t.Errorf("%s of a poisoned device: got %v, want %v", name, err, backing.ErrPoisoned)
			}
		}
	}
	if err := d.Map(engine.OpRead, 0, 4096, new(backing.Mapping)); err != nil {
		t.Errorf("map for reading of a poisoned device: %v", err)
	}
	if err := d.ReadAt(t.Context(), p, 0); err != nil {
		t.Errorf("read of a poisoned device: %v", err)
	}
}

// TestFailedFUAPoisons: it tells of what others left in the page cache. On a direct
// file that are the parts of blocks at the ends of a range that was made zero.
func TestFailedFUAPoisons(t *testing.T) {
	for _, size := range []int64{1 << 20, 1<<20 + 1} {
		t.Run(fmt.Sprintf("of %d bytes", size), func(t *testing.T) {
			forKinds(t, func(t *testing.T, k kind) {
				d, f := newFaulty(t, k, size, raw.Options{})
				fill(t, d, 1)
				if err := d.Zero(t.Context(), 512, 8192, 0); err != nil {
					t.Fatalf("zero: %v", err)
				}
				durable := func(x *engine.IO) bool { return x.Op == engine.OpSync }
				f.Inject(backingtest.Rule{Match: durable, Fault: backingtest.Fault{Errno: syscall.EIO}})
				if err := d.WriteAt(t.Context(), make([]byte, 4096), 64<<10, backing.FUA); !errors.Is(err, backing.ErrIO) {
					t.Fatalf("FUA write: got %v, want %v", err, backing.ErrIO)
				}
				wantPoisoned(t, d)
			})
		})
	}
}

// TestFUAWithoutSpacePoisonsOnlyIfPagesWereLost: that there is room again a
// moment later says nothing.
func TestFUAWithoutSpacePoisonsOnlyIfPagesWereLost(t *testing.T) {
	for _, tt := range []struct {
		name string
		op   engine.Op
		lost bool
	}{
		{"no room for the write", engine.OpWrite, false},
		{"no room when it was written back", engine.OpSync, true},
	} {
		for _, size := range []int64{1 << 20, 1<<20 + 1} {
			for _, k := range kinds() {
				t.Run(fmt.Sprintf("%s of %d bytes by %s", tt.name, size, k), func(t *testing.T) {
					d, f := newFaulty(t, k, size, raw.Options{})
					f.Inject(backingtest.Rule{Match: backingtest.Ops(tt.op), Fault: backingtest.Fault{Errno: syscall.ENOSPC}})
					if err := d.WriteAt(t.Context(), make([]byte, 4096), 0, backing.FUA); !errors.Is(err, backing.ErrNoSpace) {
						t.Fatalf("FUA write: got %v, want %v", err, backing.ErrNoSpace)
					}
					if err := d.WriteAt(t.Context(), make([]byte, 4096), 0, 0); errors.Is(err, backing.ErrPoisoned) != tt.lost {
						t.Errorf("next write: got %v, want poisoned %v", err, tt.lost)
					}
				})
			}
		}
	}
}

// TestWriteThatMayTellOfOthersPoisons: on NFS the error of a write may be that of
// pages which were written before, and the sync afterwards succeeds.
func TestWriteThatMayTellOfOthersPoisons(t *testing.T) {
	const size = 1 << 20
	writes := map[string]func(*raw.Device) error{
		"write":     func(d *raw.Device) error { return d.WriteAt(t.Context(), make([]byte, 4096), 0, 0) },
		"FUA write": func(d *raw.Device) error { return d.WriteAt(t.Context(), make([]byte, 4096), 0, backing.FUA) },
		"mapped write": func(d *raw.Device) error {
			var m backing.Mapping
			if err := d.Map(engine.OpWrite, 0, 4096, &m); err != nil {
				return err
			}
			defer m.Release()
			return m.Runs[0].File.Failed(engine.OpWrite, syscall.ENOSPC)
		},
	}
	for name, write := range writes {
		for _, tt := range []struct {
			k    kind
			late bool
			want bool // poisoned
		}{
			{kind{"pool", false}, true, true}, {kind{"pool", true}, true, false}, {kind{"pool", false}, false, false},
		} {
			t.Run(fmt.Sprintf("%s by %s late %v", name, tt.k, tt.late), func(t *testing.T) {
				if tt.late {
					raw.TellLate(t, t.TempDir())
				}
				d, f := newFaulty(t, tt.k, size, raw.Options{})
				fill(t, d, 1)
				f.Inject(backingtest.Rule{Match: backingtest.Ops(engine.OpWrite), Fault: backingtest.Fault{Errno: syscall.ENOSPC}})
				err := write(d)
				if !errors.Is(err, syscall.ENOSPC) || errors.Is(err, backing.ErrPoisoned) != tt.want {
					t.Errorf("got %v, want %v, poisoned %v", err, syscall.ENOSPC, tt.want)
				}
				if tt.want {
					wantPoisoned(t, d)
				} else if err := d.Flush(t.Context()); err != nil {
					t.Errorf("flush: %v", err)
				}
			})
		}
	}
}

// TestReadThatFailsLosesNothing: not even where a write may tell of others.
func TestReadThatFailsLosesNothing(t *testing.T) {
	raw.TellLate(t, t.TempDir())
	d, f := newFaulty(t, kind{"pool", false}, 1<<20, raw.Options{})
	f.Inject(backingtest.Rule{Match: backingtest.Ops(engine.OpRead), Fault: backingtest.Fault{Errno: syscall.EIO}})
	if err := d.ReadAt(t.Context(), make([]byte, 4096), 0); !errors.Is(err, syscall.EIO) {
		t.Errorf("read: got %v, want %v", err, syscall.EIO)
	}
	if err := d.WriteAt(t.Context(), make([]byte, 4096), 0, 0); err != nil {
		t.Errorf("write: %v", err)
	}
}

func TestWritethroughMakesEveryWriteDurable(t *testing.T) {
	d, f := newFaulty(t, kind{"pool", false}, 1<<20, raw.Options{Writethrough: true})
	var ranged, syncs int
	f.Inject(backingtest.Rule{Times: -1, Match: func(x *engine.IO) bool {
		if x.Op == engine.OpSync && x.Off == 8192 && x.Len == 4096 {
			ranged++
		} else if x.Op == engine.OpSync {
			syncs++
		}
		return false
	}})
	for _, err := range []error{
		d.WriteAt(t.Context(), make([]byte, 4096), 8192, 0),
		d.Zero(t.Context(), 0, 4096, 0),
		d.Trim(t.Context(), 0, 4096, 0),
	} {
		if err != nil {
			t.Errorf("got %v, want none", err)
		}
	}
	if ranged != 1 || syncs != 2 {
		t.Errorf("got %d syncs of what was written and %d others, want 1 and 2", ranged, syncs)
	}
	if err := d.Map(engine.OpWrite, 0, 4096, new(backing.Mapping)); !errors.Is(err, backing.ErrNotMappable) {
		t.Errorf("map for writing: got %v, want %v", err, backing.ErrNotMappable)
	}
}

// flushDuring begins a flush that gate holds, and n more while it is held. What
// the flushes end with comes from the channels.
func flushDuring(t *testing.T, d *raw.Device, gate *backingtest.Gate, n int) (first, rest <-chan error) {
	t.Helper()
	flush := func(n int) <-chan error {
		ends := make(chan error, n)
		for range n {
			go func() { ends <- d.Flush(t.Context()) }()
		}
		return ends
	}
	first = flush(1)
	<-gate.Arrived
	rest = flush(n)
	waitBlocked(t, n, "select", "raw.(*Device).Flush(")
	return first, rest
}

// TestFlushJoinsOnlyALaterSync holds an fdatasync, lets flushes arrive
// meanwhile, and counts: they share one fdatasync, and it is not that one.
func TestFlushJoinsOnlyALaterSync(t *testing.T) {
	const flushes = 8
	d, f := newFaulty(t, kind{"pool", false}, 1<<20, raw.Options{})
	gate := backingtest.NewGate()
	f.Inject(backingtest.Rule{Match: backingtest.Ops(engine.OpSync), Gate: gate})
	second := backingtest.NewGate()
	f.Inject(backingtest.Rule{Match: backingtest.Ops(engine.OpSync), Gate: second, Times: -1})
	first, rest := flushDuring(t, d, gate, flushes)
	gate.Open()
	if err := <-first; err != nil {
		t.Errorf("flush: %v", err)
	}
	<-second.Arrived
	select {
	case err := <-rest:
		t.Fatalf("flush that arrived during an fdatasync ended with it: %v", err)
	default:
	}
	second.Open()
	for range flushes {
		if err := <-rest; err != nil {
			t.Errorf("flush: %v", err)
		}
	}
	if n := f.Clear(); n != 2 {
		t.Errorf("got %d fdatasyncs for 1 + %d flushes, want 2", n, flushes)
	}
}

// TestFailedSyncFailsEveryFlushThatWaits: the kernel tells of the loss once.
func TestFailedSyncFailsEveryFlushThatWaits(t *testing.T) {
	const flushes = 8
	d, f := newFaulty(t, kind{"pool", false}, 1<<20, raw.Options{})
	gate := backingtest.NewGate()
	f.Inject(backingtest.Rule{Match: backingtest.Ops(engine.OpSync), Gate: gate, Fault: backingtest.Fault{Errno: syscall.EIO}})
	first, rest := flushDuring(t, d, gate, flushes)
	gate.Open()
	if err := <-first; !errors.Is(err, backing.ErrIO) {
		t.Errorf("flush: got %v, want %v", err, backing.ErrIO)
	}
	for range flushes {
		if err := <-rest; !errors.Is(err, backing.ErrPoisoned) {
			t.Errorf("flush that waited: got %v, want %v", err, backing.ErrPoisoned)
		}
	}
	if n := f.Clear(); n != 1 {
		t.Errorf("got %d fdatasyncs, want no other after the one that failed", n)
	}
}

func TestFlushGivesUpWaitingForItsTurn(t *testing.T) {
	d, f := newFaulty(t, kind{"pool", false}, 1<<20, raw.Options{})
	gate := backingtest.NewGate()
	f.Inject(backingtest.Rule{Match: backingtest.Ops(engine.OpSync), Gate: gate})
	first := make(chan error, 1)
	go func() { first <- d.Flush(t.Context()) }()
	<-gate.Arrived
	ctx, cancel := context.WithCancel(t.Context())
	second := make(chan error, 1)
	go func() { second <- d.Flush(ctx) }()
	waitBlocked(t, 1, "select", "raw.(*Device).Flush(")
	cancel()
	if err := <-second; !errors.Is(err, context.Canceled) {
		t.Errorf("flush: got %v, want %v", err, context.Canceled)
	}
	gate.Open()
	if err := <-first; err != nil {
		t.Errorf("flush: %v", err)
	}
	if err := d.Flush(t.Context()); err != nil {
		t.Errorf("flush: %v", err)
	}
}

// TestDurableWriteWaitsForTheVerdictOfOthers: the kernel tells one of several
// callers of the lost pages. The one that hears nothing must not say that all
// is well.
func TestDurableWriteWaitsForTheVerdictOfOthers(t *testing.T) {
	for name, do := range map[string]func(*raw.Device) error{
		"FUA write": func(d *raw.Device) error { return d.WriteAt(t.Context(), make([]byte, 512), 4096, backing.FUA) },
		"flush":     func(d *raw.Device) error { return d.Flush(t.Context()) },
	} {
		t.Run(name, func(t *testing.T) {
			d, f := newFaulty(t, kind{"pool", false}, 1<<20, raw.Options{})
			gate := backingtest.NewGate()
			f.Inject(backingtest.Rule{Gate: gate, Fault: backingtest.Fault{Errno: syscall.EIO},
				Match: func(x *engine.IO) bool { return x.Op == engine.OpSync && x.Off == 0 && x.Len == 512 }})
			failing := make(chan error, 1)
			go func() { failing <- d.WriteAt(t.Context(), make([]byte, 512), 0, backing.FUA) }()
			<-gate.Arrived
			hears := make(chan error, 1)
			go func() { hears <- do(d) }()
			waitBlocked(t, 1, "sync.Cond.Wait", "raw.(*durables).settle(")
			gate.Open()
			if err := <-failing; !errors.Is(err, syscall.EIO) {
				t.Errorf("FUA write that failed: got %v, want %v", err, syscall.EIO)
			}
			if err := <-hears; !errors.Is(err, backing.ErrPoisoned) {
				t.Errorf("%s beside it: got %v, want %v", name, err, backing.ErrPoisoned)
			}
		})
	}
}

// waitBlocked returns when n goroutines wait in function, in the state that
// the runtime calls by that name; the test's own deadline bounds it.
func waitBlocked(t *testing.T, n int, state, function string) {
	t.Helper()
	stacks := make([]byte, 1<<20)
	for t.Context().Err() == nil {
		blocked := 0
		for g := range strings.SplitSeq(string(stacks[:runtime.Stack(stacks, true)]), "\n\n") {
			head, frames, _ := strings.Cut(g, "\n")
			if strings.Contains(head, "["+state) && strings.Contains(frames, function) {
				blocked++
			}
		}
		if blocked == n {
			return
		}
		runtime.Gosched()
	}
	t.Fatal("test ended while waiting")
}

func TestShortReadInsideTheDiskIsAnError(t *testing.T) {
	forKinds(t, func(t *testing.T, k kind) {
		d, f := newFaulty(t, k, 1<<20, raw.Options{})
		fill(t, d, 1)
		f.Inject(backingtest.Rule{Match: backingtest.Ops(engine.OpRead), Fault: backingtest.Fault{Moved: 4096}})
		err := d.ReadAt(t.Context(), make([]byte, 16384), 0)
		if backing.KindOf(err) != backing.ErrIO || !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("read: got %v, want %v", err, io.ErrUnexpectedEOF)
		}
	})
}

func TestWhatIsNotSupportedIsAskedOnce(t *testing.T) {
	d, f := newFaulty(t, kind{"pool", false}, 1<<20, raw.Options{})
	fill(t, d, 1)
	f.Inject(backingtest.Rule{Times: -1, Match: backingtest.Ops(engine.OpPunch, engine.OpZero),
		Fault: backingtest.Fault{Errno: syscall.EOPNOTSUPP}})
	for _, fl := range []backing.Flags{backing.FastZero, 0, backing.NoHole, backing.FUA} {
		if err := d.Zero(t.Context(), 0, 4096, fl); !errors.Is(err, backing.ErrNotSupported) {
			t.Errorf("zero with flags %d: got %v, want %v", fl, err, backing.ErrNotSupported)
		}
	}
	if err := d.Trim(t.Context(), 0, 8192, 0); !errors.Is(err, backing.ErrNotSupported) {
		t.Errorf("trim: got %v, want %v", err, backing.ErrNotSupported)
	}
	if got := contents(t, d); got[0] != 1 || got[4095] != 1 {
		t.Error("refused zero changed contents")
	}
	if n := f.Clear(); n > 5 {
		t.Errorf("transfers: got %d, want one punch, one zero and those of reading all", n)
	}
	e := backing.NewEmulate(d)
	if err := e.Zero(t.Context(), 100, 4096, 0); err != nil {
		t.Fatalf("emulated zero: %v", err)
	}
	if got := contents(t, d); got[99] != 1 || got[100] != 0 || got[4195] != 0 || got[4196] != 1 {
		t.Errorf("emulated zero: got %d %d … %d %d, want 1 0 … 0 1", got[99], got[100], got[4195], got[4196])
	}
}

// TestPartialWriteDoesNotBringBackWhatIsZeroed stops a partial write of a
// direct file after it read its block, and zeroes the block meanwhile.
func TestPartialWriteDoesNotBringBackWhatIsZeroed(t *testing.T) {
	for _, fl := range []backing.Flags{0, backing.NoHole} {
		d, f := newFaulty(t, kind{"pool", true}, 64<<10, raw.Options{})
		fill(t, d, 1)
		gate := backingtest.NewGate()
		f.Inject(backingtest.Rule{Match: backingtest.Ops(engine.OpWrite), Gate: gate})
		wrote, zeroed := make(chan error, 1), make(chan error, 1)
		go func() { wrote <- d.WriteAt(t.Context(), []byte{2}, 4096, 0) }()
		<-gate.Arrived
		go func() { zeroed <- d.Zero(t.Context(), 0, 64<<10, fl) }()
		waitBlocked(t, 1, "select", "(*rangeLocks).lock(")
		gate.Open()
		if err := errors.Join(<-wrote, <-zeroed); err != nil {
			t.Fatalf("write and zero: %v", err)
		}
		if got := contents(t, d); !bytes.Equal(got, make([]byte, 64<<10)) {
			t.Errorf("read after zero with flags %d: not all zero", fl)
		}
	}
}

func TestDurableZeroAndTrimSyncAfterwards(t *testing.T) {
	for name, do := range map[string]func(context.Context, backing.Device, backing.Flags) error{
		"zero": func(ctx context.Context, d backing.Device, f backing.Flags) error { return d.Zero(ctx, 0, 8192, f) },
		"zero without hole": func(ctx context.Context, d backing.Device, f backing.Flags) error {
			return d.Zero(ctx, 0, 8192, f|backing.NoHole)
		},
		"trim": func(ctx context.Context, d backing.Device, f backing.Flags) error { return d.Trim(ctx, 0, 8192, f) },
	} {
		for _, fua := range []bool{false, true} {
			d, f := newFaulty(t, kind{"pool", false}, 1<<20, raw.Options{})
			var ops []engine.Op
			f.Inject(backingtest.Rule{Times: -1, Match: func(io *engine.IO) bool { ops = append(ops, io.Op); return false }})
			var fl backing.Flags
			if fua {
				fl = backing.FUA
			}
			if err := do(t.Context(), d, fl); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			if synced := len(ops) == 2 && ops[1] == engine.OpSync; synced != fua || !fua && len(ops) != 1 {
				t.Errorf("%s with FUA %v: got %v", name, fua, ops)
			}
		}
	}
}
