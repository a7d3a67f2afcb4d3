package qcow2_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/create"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/disktest"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/storetest"
)

// dataSize of the disks of this file, which ends in the middle of a cluster.
const dataSize = 3<<20 + 5*512

// withData is an image with a data file, both empty.
func withData(t *testing.T, o create.Options) *specimen {
	t.Helper()
	s := &specimen{name: "data", dir: t.TempDir(), cluster: 4096, image: storetest.New(nil), data: storetest.New(nil),
		first: make([]byte, dataSize)}
	o.Size, o.ClusterSize, o.DataFile, o.Data = dataSize, s.cluster, "data", s.data
	if err := create.Image(t.Context(), s.image, o); err != nil {
		t.Fatal(err)
	}
	s.put(t, "data", nil)
	return s
}

// TestPowerCutLeavesTheRawFileTheDisk: a raw data file that is read without its
// image has what was flushed too, zeroes not the least.
func TestPowerCutLeavesTheRawFileTheDisk(t *testing.T) {
	raw := disktest.Format{Open: func(ctx context.Context, f disktest.Files, readOnly bool) (backing.Device, error) {
		below, err := qcow2.NewRawLayer(f.Data)
		if err != nil {
			return nil, err
		}
		image := storetest.New(nil)
		o := create.Options{Size: dataSize, Backing: "data", BackingFormat: "raw"}
		if err := create.Image(ctx, image, o); err != nil {
			return nil, err
		}
		opt := quiet()
		opt.ReadOnly, opt.Backing = readOnly, below
		return qcow2.Open(ctx, image, opt)
	}}
	s := withData(t, create.Options{DataFileRaw: true})
	share, seed, states := max(1, *crashStates/8), seedOf(t), 0
	for ; states < share; seed++ {
		ctx, h, rnd := t.Context(), s.host(), rand.New(rand.NewPCG(seed, 0))
		dev, err := s.open(ctx, h.again(), false)
		if err != nil {
			t.Fatal(err)
		}
		r := disktest.Run{Dev: dev, Oracle: disktest.NewOracle(bytes.Clone(s.first))}
		cuts := disktest.PowerCuts{Format: raw, Oracle: r.Oracle, Files: h.files, PerSync: 5, Check: s.judged}
		cuts.Start(rnd, share-states)
		shape := disktest.Shape{Size: dataSize, Cluster: s.cluster, Ops: 40, Largest: 40 * s.cluster}
		script := shape.Random(rnd)
		err = r.Do(ctx, script)
		n, broken := cuts.Stop()
		if err := errors.Join(err, broken, dev.Close()); err != nil {
			t.Fatalf("-disk.seed %d: %v\n%s", seed, err, script)
		}
		if err := r.Oracle.Resolve(h.files[1].Contents(), 0); err != nil {
			t.Fatalf("-disk.seed %d: the raw file at the end: %v\n%s", seed, err, script)
		}
		states += n + 1
	}
}

// halfWritten is the disk of an image with a data file whose first half was
// written, and that file.
func halfWritten(t *testing.T, o create.Options) (d backing.Device, image, data *storetest.Mem) {
	t.Helper()
	s := withData(t, o)
	h := s.host()
	opt := quiet()
	opt.DataFile = h.files[1]
	d, err := qcow2.Open(t.Context(), h.files[0], opt)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.WriteAt(t.Context(), bytes.Repeat([]byte{7}, dataSize/2), 0, backing.FUA); err != nil {
		t.Fatal(err)
	}
	return d, h.files[0].Mem, h.files[1].Mem
}

// TestZeroOfADataFileIsDoneInTheFile: by its punch, or with NoHole by its zero,
// and by no write; and where the file can do neither only the mapping may say
// so, if that is enough.
func TestZeroOfADataFileIsDoneInTheFile(t *testing.T) {
	for _, tt := range []struct {
		name   string
		raw    bool
		unable bool
		flags  backing.Flags
		want   backing.Kind
		op     storetest.Op
	}{
		{"raw", true, false, backing.FastZero, "", storetest.Punch},
		{"raw, no hole", true, false, backing.FastZero | backing.NoHole, "", storetest.Zero},
		{"raw, unable", true, true, 0, backing.ErrNotSupported, storetest.Punch},
		{"raw, no hole, unable", true, true, backing.NoHole, backing.ErrNotSupported, storetest.Zero},
		{"plain", false, false, backing.FastZero, "", storetest.Punch},
		{"plain, no hole", false, false, backing.FastZero | backing.NoHole, "", storetest.Zero},
		{"plain, unable", false, true, backing.FastZero, "", storetest.Punch},
		{"plain, no hole, unable", false, true, backing.NoHole, backing.ErrNotSupported, storetest.Zero},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ctx := t.Context()
			d, _, data := halfWritten(t, create.Options{DataFileRaw: tt.raw})
			defer d.Close()
			want := make([]byte, dataSize)
			if err := d.ReadAt(ctx, want, 0); err != nil {
				t.Fatal(err)
			}
			const off, n = 64 << 10, 1 << 20
			if tt.unable {
				for i := range 8 {
					data.FailOp(tt.op, i+1, backing.ErrNotSupported)
				}
			}
			writes, calls := data.Count(storetest.Write), data.Count(tt.op)
			err := d.Zero(ctx, off, n, tt.flags)
			if tt.want == "" && err != nil || tt.want != "" && !errors.Is(err, tt.want) {
				t.Fatalf("zero: got %v, want %q", err, tt.want)
			}
			if data.Count(storetest.Write) != writes || data.Count(tt.op) == calls {
				t.Errorf("data file: %d writes and %d of %q, want none and some", data.Count(storetest.Write)-writes,
					data.Count(tt.op)-calls, tt.op)
			}
			if err == nil {
				clear(want[off : off+n])
			}
			mustMatch(t, d, 0, want)
			if got := data.Contents(); tt.raw && !bytes.Equal(got, want) {
				t.Error("the raw file has other contents")
			}
			// What is around survives a write to a part of what is zero.
			if err := d.WriteAt(ctx, []byte{9}, off+5000, 0); err != nil {
				t.Fatal(err)
			}
			want[off+5000] = 9
			mustMatch(t, d, 0, want)
		})
	}
}

// TestFastZeroOfADataDeviceDoesNotWrite: a device may have to write zeroes where
// it shall not unmap.
func TestFastZeroOfADataDeviceDoesNotWrite(t *testing.T) {
	d, _, data := halfWritten(t, create.Options{})
	defer d.Close()
	data.SetFixed(true)
	before := data.Calls()
	if err := d.Zero(t.Context(), 0, 1<<20, backing.FastZero|backing.NoHole); !errors.Is(err, backing.ErrNotSupported) {
		t.Errorf("got %v, want %v", err, backing.ErrNotSupported)
	}
	if got := data.Calls(); got != before {
		t.Errorf("%d calls to the device, want none", got-before)
	}
}

// TestQEMUReadsTheZeroesOfADataFile: the mapping that a zero leaves is one that
// QEMU knows, with what is written on top of it.
func TestQEMUReadsTheZeroesOfADataFile(t *testing.T) {
	for _, raw := range []bool{false, true} {
		d, image, data := halfWritten(t, create.Options{DataFileRaw: raw})
		for i, f := range []backing.Flags{0, backing.NoHole, backing.FastZero} {
			for _, at := range []int64{100 << 10, 2 << 20} { // what is written and what is not
				at += int64(i) * 128 << 10
				err := d.Zero(t.Context(), at, 100<<10, f)
				if err == nil {
					err = d.WriteAt(t.Context(), []byte{1, 2, 3}, at+50<<10, 0)
				}
				if err != nil {
					t.Fatal(err)
				}
			}
		}
		want := make([]byte, dataSize)
		if err := errors.Join(d.ReadAt(t.Context(), want, 0), d.Close()); err != nil {
			t.Fatal(err)
		}
		dir := t.TempDir()
		for name, b := range map[string][]byte{"t": image.Contents(), "data": data.Contents(), "want": want} {
			if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		qemu(t, dir, "qemu-img", "check", "-q", "-f", "qcow2", "t")
		qemu(t, dir, "qemu-img", "compare", "-q", "-f", "qcow2", "-F", "raw", "t", "want")
		if raw {
			qemu(t, dir, "qemu-img", "compare", "-q", "-f", "raw", "-F", "raw", "data", "want")
		}
	}
}

// TestRawDataFileIsTheDiskThatGrew: whatever the file had behind the disk, and
// before any image has the new size.
func TestRawDataFileIsTheDiskThatGrew(t *testing.T) {
	const behind, end = 4 << 20, 5 << 20
	for _, tt := range []struct {
		name   string
		via    int64 // a size in between, 0 for none
		size   int64
		fixed  bool
		unable []storetest.Op
	}{
		{"within the file", 0, behind, false, nil},
		{"beyond the file", 0, end + 512, false, nil},
		{"on a device", 0, behind, true, nil},
		{"whole clusters of a device", behind - 1<<20 + 4096, behind, true, nil},
		{"without holes", 0, behind, true, []storetest.Op{storetest.Punch}},
		{"without zeroes", 0, behind, false, []storetest.Op{storetest.Punch, storetest.Zero}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := withData(t, create.Options{DataFileRaw: true})
			s.data.Patch(dataSize, bytes.Repeat([]byte{0xbb}, end-dataSize))
			s.data.SetFixed(tt.fixed)
			h, opt := s.host(), quiet()
			image, data := h.files[0], h.files[1]
			opt.DataFile = data
			d, err := qcow2.Open(t.Context(), image, opt)
			if err != nil {
				t.Fatal(err)
			}
			defer d.Close()
			want := make([]byte, tt.size)
			copy(want[dataSize-512:], bytes.Repeat([]byte{7}, 512))
			if err := d.WriteAt(t.Context(), want[dataSize-512:dataSize], dataSize-512, backing.FUA); err != nil {
				t.Fatal(err)
			}
			if tt.via > 0 {
				resize(t, d, tt.via)
			}
			for _, op := range tt.unable {
				data.FailOp(op, 1, backing.ErrNotSupported)
			}
			rnd, grown := rand.New(rand.NewPCG(1, 2)), 0
			image.SetHook(func(storetest.Call) {
				cuts := storetest.CutPower(image, data)
				for name, m := range cuts[0].Crashes(rnd, 8) {
					h, err := qcow2.ReadHeader(t.Context(), m)
					if err == nil && int64(h.Size) != tt.size {
						continue
					}
					grown++
					if got := cuts[1].State(nil).Contents(); err != nil || !bytes.HasPrefix(got, want) {
						t.Errorf("%s: header: %v, and the raw file is not the disk", name, err)
					}
				}
			})
			resize(t, d, tt.size)
			image.SetHook(nil)
			if grown == 0 {
				t.Error("no state has the new size")
			}
			mustMatch(t, d, 0, want)
			if got := data.Contents(); !bytes.HasPrefix(got, want) || len(got) != len(want) && !tt.fixed {
				t.Errorf("the raw file has %d bytes and not those of the disk", len(got))
			}
		})
	}
}

// TestFailedGrowthLeavesTheDataFileTheDisk makes each call to the files fail in turn:
// the data file ends where the disk does, unless nobody knows where that is.
func TestFailedGrowthLeavesTheDataFileTheDisk(t *testing.T) {
	for _, raw := range []bool{false, true} {
		for i, name := range []string{"image", "data file"} {
			t.Run(fmt.Sprintf("raw %v, %s", raw, name), func(t *testing.T) {
				n := 1
				for failGrowth(t, create.Options{DataFileRaw: raw}, i, n) {
					n++
				}
				if n < 3 {
					t.Errorf("only %d calls were made to fail", n-1)
				}
			})
		}
	}
}

// failGrowth grows a disk while call n to its image, or to its data file, fails, and
// reports whether there was such a call.
func failGrowth(t *testing.T, o create.Options, file, n int) bool {
	t.Helper()
	const size = 1 << 30 // the L1 table moves
	d, image, data := halfWritten(t, o)
	want := make([]byte, dataSize)
	if err := d.ReadAt(t.Context(), want, 0); err != nil {
		t.Fatal(err)
	}
	failing := []*storetest.Mem{image, data}[file]
	before := failing.Calls()
	failing.FailCall(n, syscall.ENOSPC)
	err := d.(backing.Resizer).Resize(t.Context(), size)
	called := failing.Calls()-before >= n
	failing.FailCall(0, nil)
	end, broken := data.Size()
	if broken != nil {
		t.Fatal(broken)
	}
	lost := errors.Is(d.WriteAt(t.Context(), want[:512], 0, 0), backing.ErrPoisoned)
	h, broken := qcow2.ReadHeader(t.Context(), image)
	switch {
	case broken != nil:
		t.Fatal(broken)
	case end < int64(h.Size):
		t.Errorf("call %d: got %v, and the data file has %d bytes of a disk of %d", n, err, end, h.Size)
	case !lost && end != d.Info().Size:
		t.Errorf("call %d: got %v, and the data file has %d bytes, want %d", n, err, end, d.Info().Size)
	}
	mustMatch(t, d, 0, want)
	_ = d.Close() // after a failed sync it fails
	return called
}

// TestFailedGrowthWaitsForTheLastCluster: a write that fills it up to where the disk
// would have ended is over before the data file gets its end back.
func TestFailedGrowthWaitsForTheLastCluster(t *testing.T) {
	s := withData(t, create.Options{Backing: "below", BackingFormat: "raw"})
	below, err := qcow2.NewRawLayer(storetest.New(bytes.Repeat([]byte{5}, dataSize+1<<20)))
	if err != nil {
		t.Fatal(err)
	}
	h := s.host()
	synctest.Test(t, func(t *testing.T) {
		data, opt := h.files[1], quiet()
		opt.DataFile, opt.Backing = data, below
		d, err := qcow2.Open(t.Context(), h.files[0], opt)
		if err != nil {
			t.Fatal(err)
		}
		begun, gate, written := make(chan struct{}), make(chan struct{}), make(chan error, 1)
		data.SetHook(func(c storetest.Call) {
			switch {
			case c.Done:
			case c.Op == storetest.Punch: // of what is below and becomes the disk's
				data.FailOp(storetest.Punch, 1, syscall.ENOSPC)
				go func() { written <- d.WriteAt(t.Context(), []byte{9}, dataSize-1, 0) }()
				<-begun
			case c.Op == storetest.Write:
				close(begun)
				<-gate
			}
		})
		grown := make(chan error, 1)
		go func() { grown <- d.(backing.Resizer).Resize(t.Context(), dataSize+1<<20) }()
		synctest.Wait()
		close(gate)
		if err := <-grown; !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("resize: got %v, want %v", err, syscall.ENOSPC)
		}
		if err := <-written; err != nil {
			t.Errorf("write: %v", err)
		}
		if end, err := data.Size(); err != nil || end != dataSize {
			t.Errorf("the data file has %d bytes, want %d: %v", end, dataSize, err)
		}
		mustMatch(t, d, dataSize-2, []byte{5, 9})
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
}

// TestDataFileThatShrankIsAnError: the end of the image has no say in it.
func TestDataFileThatShrankIsAnError(t *testing.T) {
	d, _, data := halfWritten(t, create.Options{})
	defer d.Close()
	data.Cut(4096)
	mustMatch(t, d, 0, bytes.Repeat([]byte{7}, 4096))
	for _, off := range []int64{4096, dataSize/2 - 512} {
		if err := d.ReadAt(t.Context(), make([]byte, 512), off); err == nil || backing.KindOf(err) != backing.ErrIO {
			t.Errorf("read at %d of what is gone: got %v, want %v", off, err, backing.ErrIO)
		}
	}
}

// TestZeroOfADataFileFindsRoom: on a device that has become larger since there was
// none for a table.
func TestZeroOfADataFileFindsRoom(t *testing.T) {
	const size, cluster, table = 1 << 30, 4096, 2 << 20
	image, data := storetest.New(nil), storetest.New(nil)
	o := create.Options{Size: size, ClusterSize: cluster, DataFile: "data", Data: data}
	if err := create.Image(t.Context(), image, o); err != nil {
		t.Fatal(err)
	}
	end, err := image.Size()
	if err != nil {
		t.Fatal(err)
	}
	image.Cut(end + 20*cluster)
	image.SetFixed(true)
	opt := quiet()
	opt.DataFile = data
	d, err := qcow2.Open(t.Context(), image, opt)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	off := int64(-table)
	for off < size && err == nil {
		off += table
		err = d.Zero(t.Context(), off, cluster, backing.NoHole)
	}
	if !errors.Is(err, backing.ErrNoSpace) || off == 0 {
		t.Fatalf("zero at %d of a full device: got %v, want %v", off, err, backing.ErrNoSpace)
	}
	image.Cut(size)
	if err := d.Zero(t.Context(), off, cluster, backing.NoHole); err != nil {
		t.Errorf("zero with room: %v", err)
	}
}

// onDataDevice is a disk that ends within a cluster, as does the block device that
// has its data, and that device.
func onDataDevice(t *testing.T) (backing.Device, *storetest.Crash) {
	t.Helper()
	s := withData(t, create.Options{})
	h, opt := s.host(), quiet()
	if end, err := h.files[1].Size(); err != nil || end != dataSize {
		t.Fatalf("the data file has %d bytes, %v", end, err)
	}
	h.files[1].SetFixed(true)
	opt.DataFile = h.files[1]
	d, err := qcow2.Open(t.Context(), h.files[0], opt)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return d, h.files[1]
}

// TestLastClusterOfADataDevice: what is written around the guest's bytes ends with
// the disk, as a device does.
func TestLastClusterOfADataDevice(t *testing.T) {
	d, _ := onDataDevice(t)
	want := make([]byte, 5*512)
	for i, part := range [][2]int64{{512, 512}, {4 * 512, 512}, {0, 5 * 512}, {700, 100}} {
		p := bytes.Repeat([]byte{byte(i + 1)}, int(part[1]))
		copy(want[part[0]:], p)
		if err := d.WriteAt(t.Context(), p, dataSize-int64(len(want))+part[0], 0); err != nil {
			t.Fatalf("write of %d bytes at %d of the last cluster: %v", part[1], part[0], err)
		}
		mustMatch(t, d, dataSize-int64(len(want)), want)
	}
}

// TestGrowthDuringAWriteToTheLastCluster: where the write did not fill it, for the
// disk ended there, the larger disk does not show what the data file has.
func TestGrowthDuringAWriteToTheLastCluster(t *testing.T) {
	const size, tail = dataSize + 1<<20, 5 * 512
	d, data := onDataDevice(t)
	data.Patch(dataSize, bytes.Repeat([]byte{0xbb}, size-dataSize))
	data.SetHook(func(c storetest.Call) {
		if c.Op != storetest.Write || c.Done {
			return
		}
		data.SetHook(nil)
		if err := d.(backing.Resizer).Resize(t.Context(), size); err != nil {
			t.Errorf("resize: %v", err)
		}
	})
	if err := d.WriteAt(t.Context(), bytes.Repeat([]byte{7}, tail), dataSize-tail, 0); err != nil {
		t.Fatal(err)
	}
	want := make([]byte, size-dataSize+tail)
	copy(want, bytes.Repeat([]byte{7}, tail))
	mustMatch(t, d, dataSize-tail, want)
}

// TestDiskDoesNotOutgrowItsDataDevice: it has to be made larger first.
func TestDiskDoesNotOutgrowItsDataDevice(t *testing.T) {
	const size = dataSize + 1<<20
	d, data := onDataDevice(t)
	err := d.(backing.Resizer).Resize(t.Context(), size)
	if !errors.Is(err, backing.ErrNotSupported) || d.Info().Size != dataSize {
		t.Fatalf("resize: got %v and a disk of %d bytes, want %v", err, d.Info().Size, backing.ErrNotSupported)
	}
	data.Cut(size)
	if err := d.(backing.Resizer).Resize(t.Context(), size); err != nil || d.Info().Size != size {
		t.Fatalf("resize with room: got %v and a disk of %d bytes", err, d.Info().Size)
	}
	p := bytes.Repeat([]byte{7}, 512)
	if err := d.WriteAt(t.Context(), p, size-512, 0); err != nil {
		t.Fatal(err)
	}
	mustMatch(t, d, size-512, p)
}

// waiting tells when somebody waits for its end.
type waiting struct {
	context.Context
	asked chan struct{}
	once  sync.Once
}

func (w *waiting) Done() <-chan struct{} {
	w.once.Do(func() { close(w.asked) })
	return w.Context.Done()
}

// TestNoFillComesBetweenTheZeroesAndTheMapping: a write that fills its cluster
// with what is below, while a zero has cleared the data file and has not yet
// changed the mapping, waits.
func TestNoFillComesBetweenTheZeroesAndTheMapping(t *testing.T) {
	s := withData(t, create.Options{Backing: "below", BackingFormat: "raw"})
	below, err := qcow2.NewRawLayer(storetest.New(bytes.Repeat([]byte{5}, dataSize)))
	if err != nil {
		t.Fatal(err)
	}
	h, opt := s.host(), quiet()
	opt.DataFile, opt.Backing = h.files[1], below
	d, err := qcow2.Open(t.Context(), h.files[0], opt)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if err := d.WriteAt(t.Context(), []byte{1}, 1<<20, 0); err != nil { // there is a table
		t.Fatal(err)
	}
	ctx := &waiting{Context: t.Context(), asked: make(chan struct{})}
	written := make(chan error, 1)
	h.files[1].SetHook(func(c storetest.Call) {
		if c.Op != storetest.Punch || !c.Done {
			return
		}
		done := make(chan struct{})
		go func() {
			written <- d.WriteAt(ctx, []byte{9}, 0, 0)
			close(done)
		}()
		select {
		case <-ctx.asked:
		case <-done:
		}
	})
	err = d.Zero(t.Context(), 0, s.cluster, 0)
	h.files[1].SetHook(nil)
	if err := errors.Join(err, <-written); err != nil {
		t.Fatal(err)
	}
	want := make([]byte, s.cluster)
	got := mustRead(t, d, 1, s.cluster-1)
	if !bytes.Equal(got, want[1:]) {
		t.Error("what is below has come back")
	}
}
