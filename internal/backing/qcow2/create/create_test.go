package create

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/store"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/storetest"
	"github.com/vmdiskd/vmdiskd/internal/backing/raw"
	"github.com/vmdiskd/vmdiskd/internal/engine"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// fileStore makes an empty file.
func fileStore(t testing.TB, path string) store.Store {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	must(t, err)
	e := engine.NewPool(1)
	d, err := raw.Open(f, e, raw.Options{Path: path, Container: true})
	must(t, err)
	t.Cleanup(func() { e.Close() })
	return store.NewFile(d)
}

func TestBadOptionsAreRefusedByName(t *testing.T) {
	ext := Options{ExtendedL2: true}
	for _, tt := range []struct {
		option string
		o      Options
	}{
		{"size", Options{Size: -512}},
		{"size", Options{Size: 513}},
		{"size", Options{Size: 129 << 30, ClusterSize: 512}},
		{"size", Options{Size: 1<<63 - 512, ClusterSize: 2 << 20}},
		{"version", Options{Version: 1}},
		{"version", Options{Version: 4}},
		{"cluster size", Options{ClusterSize: 256}},
		{"cluster size", Options{ClusterSize: 4 << 20}},
		{"cluster size", Options{ClusterSize: 3 << 10}},
		{"cluster size", Options{ClusterSize: -65536}},
		{"cluster size", Options{ClusterSize: 512, Backing: strings.Repeat("a", 500), BackingFormat: "raw"}},
		{"refcount bits", Options{RefcountBits: 3}},
		{"refcount bits", Options{RefcountBits: 128}},
		{"refcount bits", Options{RefcountBits: -8}},
		{"refcount bits", Options{RefcountBits: 8, Version: 2}},
		{"compression type", Options{Compression: 2}},
		{"compression type", Options{Compression: format.Zstd, Version: 2}},
		{"extended L2", Options{ExtendedL2: true, ClusterSize: 8 << 10}},
		{"extended L2", Options{ExtendedL2: true, Version: 2}},
		{"backing format", Options{Backing: "b"}},
		{"backing format", Options{BackingFormat: "raw"}},
		{"backing format", Options{Backing: "b", BackingFormat: "vmdk"}},
		{"backing file", Options{Backing: strings.Repeat("a", 1024), BackingFormat: "raw"}},
		{"backing file", Options{Backing: "a\x00b", BackingFormat: "raw"}},
		{"backing file", Options{Backing: "a\nb", BackingFormat: "raw"}},
		{"backing file", Options{Backing: "a\u0085b", BackingFormat: "raw"}},
		{"backing file", Options{Backing: "vm:1.raw", BackingFormat: "raw"}},
		{"backing file", Options{Backing: "file:1.raw", BackingFormat: "raw"}},
		{"data file", Options{DataFile: "vm:1.raw", Data: storetest.New(nil)}},
		{"data file", Options{DataFile: "a\x7f"}},
		{"data file", Options{DataFile: "named and not there"}},
		{"data file", Options{Data: storetest.New(nil)}},
		{"data file", Options{DataFile: "d", Version: 2}},
		{"data file", Options{DataFile: strings.Repeat("a", 70000)}},
		{"raw data file", Options{DataFileRaw: true}},
		{"raw data file", Options{DataFileRaw: true, DataFile: "d", Backing: "b", BackingFormat: "raw"}},
		{"preallocation", Options{Preallocation: "some"}},
		{"preallocation", Options{Preallocation: Full, Backing: "b", BackingFormat: "raw"}},
		{"preallocation", Options{Preallocation: Full, Size: 1 << 56, ClusterSize: 2 << 20}},
		{"preallocation", Options{Preallocation: Full, Size: 64 << 30, ClusterSize: 512, RefcountBits: 64}},
	} {
		m := storetest.New(nil)
		err := Image(context.Background(), m, tt.o)
		var oe *OptionError
		if !errors.As(err, &oe) || oe.Option != tt.option {
			t.Errorf("%+v: error %v, want one about the %s", tt.o, err, tt.option)
		}
		if n := m.Count(storetest.Write); n != 0 {
			t.Errorf("%+v: %d writes before the refusal", tt.o, n)
		}
	}
	if _, err := Measure(ext); err != nil {
		t.Errorf("extended L2 with default clusters: %v", err)
	}
}

func TestFileThatIsNotEmptyIsRefused(t *testing.T) {
	m := storetest.New([]byte("precious"))
	if err := Image(context.Background(), m, Options{}); !errors.Is(err, backing.ErrInvalid) {
		t.Errorf("error %v, want %v", err, backing.ErrInvalid)
	}
	if got := string(m.Contents()); got != "precious" {
		t.Errorf("the file has %q", got)
	}
}

// oldDevice is a block device full of rubbish, which begins like an image.
func oldDevice(t testing.TB, n int) *storetest.Mem {
	t.Helper()
	p := make([]byte, n)
	for i := range p {
		p[i] = 0xa5
	}
	copy(p, "QFI\xfb")
	m := storetest.New(p)
	m.SetFixed(true)
	return m
}

func TestBlockDeviceMustBeLargeEnough(t *testing.T) {
	o := Options{Size: 1 << 20, ClusterSize: 4 << 10}
	n, err := Measure(o)
	must(t, err)
	m := oldDevice(t, int(n-512))
	if err := Image(context.Background(), m, o); !errors.Is(err, backing.ErrNoSpace) {
		t.Errorf("error %v, want %v", err, backing.ErrNoSpace)
	}
	must(t, Image(context.Background(), oldDevice(t, int(n)), o))
	file := storetest.New(nil)
	o.DataFile, o.Data = "data", oldDevice(t, int(o.Size-512))
	err = Image(context.Background(), file, o)
	if size, _ := file.Size(); !errors.Is(err, backing.ErrNoSpace) || size != 0 {
		t.Errorf("data on a small device: error %v and an image of %d bytes, want %v and none", err, size, backing.ErrNoSpace)
	}
}

// TestRubbishOnBlockDeviceIsOverwritten judges every byte: an image on a block
// device is, as far as it reaches, that in a file.
func TestRubbishOnBlockDeviceIsOverwritten(t *testing.T) {
	for _, mode := range []Preallocation{Off, Metadata, Falloc, Full} {
		o := Options{Size: 1<<20 + 512, ClusterSize: 4 << 10, Preallocation: mode}
		file := storetest.New(nil)
		must(t, Image(context.Background(), file, o))
		dev := oldDevice(t, 4<<20)
		must(t, Image(context.Background(), dev, o))
		want, got := file.Contents(), dev.Contents()
		if string(got[:len(want)]) != string(want) {
			t.Errorf("preallocation %s: block device and file differ", mode)
		}
	}
}

// TestFailureLeavesNoImage fails every call in turn: unless Image reports
// success, no reader takes what is there for an image.
func TestFailureLeavesNoImage(t *testing.T) {
	o := Options{Size: 256 << 10, ClusterSize: 512, Preallocation: Metadata, DataFile: "d"}
	boom := errors.New("boom")
	for n := 1; ; n++ {
		m := oldDevice(t, 1<<20)
		o.Data = storetest.New(nil)
		m.FailCall(n, boom)
		err := Image(context.Background(), m, o)
		if err == nil {
			if n < 10 {
				t.Fatalf("success after %d calls", n)
			}
			return
		}
		if !errors.Is(err, boom) {
			t.Fatalf("call %d failed: error %v, want %v", n, err, boom)
		}
		// The first calls do not change anything; the last sync comes when
		// all is written.
		if h := string(m.Contents()[:4]); h == "QFI\xfb" && m.Count(storetest.Write) > 1 && m.Count(storetest.Sync) < 2 {
			t.Errorf("call %d failed: the header is there", n)
		}
	}
}

func TestHeaderComesLast(t *testing.T) {
	m := storetest.New(nil)
	boom := errors.New("boom")
	m.FailOp(storetest.Sync, 1, boom)
	if err := Image(context.Background(), m, Options{Size: 1 << 20}); !errors.Is(err, boom) {
		t.Fatalf("error %v, want %v", err, boom)
	}
	if h := m.Contents()[:512]; strings.Trim(string(h), "\x00") != "" {
		t.Error("the header is written though the rest is not stable")
	}
}

func TestDataFileIsStableBeforeTheHeader(t *testing.T) {
	m, data := storetest.New(nil), storetest.New(nil)
	boom := errors.New("boom")
	data.FailOp(storetest.Sync, 1, boom)
	err := Image(context.Background(), m, Options{Size: 1 << 20, DataFile: "d", Data: data, DataFileRaw: true})
	if !errors.Is(err, boom) {
		t.Fatalf("error %v, want %v", err, boom)
	}
	if h := m.Contents()[:512]; strings.Trim(string(h), "\x00") != "" {
		t.Error("the header is written though the data file is not stable")
	}
}

func TestInterruptionEndsTheWork(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	err := Image(ctx, storetest.New(nil), Options{Size: 1 << 20, Preallocation: Full})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("error %v, want %v", err, context.Canceled)
	}
}

// TestMeasureIsTheLengthOfTheFile also reads the header back.
func TestMeasureIsTheLengthOfTheFile(t *testing.T) {
	for _, o := range []Options{
		{}, {Size: 512}, {Size: 5 << 40}, {Size: 5 << 20, ClusterSize: 512, Preallocation: Full, RefcountBits: 64},
		{Size: 3 << 20, ClusterSize: 2 << 20, Preallocation: Metadata, RefcountBits: 1},
		{Size: 1 << 60, ClusterSize: 2 << 20},
	} {
		m := storetest.New(nil)
		must(t, Image(context.Background(), m, o))
		want, err := Measure(o)
		must(t, err)
		if got, _ := m.Size(); got != want {
			t.Errorf("%+v: file of %d bytes, measured %d", o, got, want)
		}
		p := make([]byte, o.withDefaults().ClusterSize)
		_, err = m.ReadAt(context.Background(), p, 0)
		must(t, err)
		h, err := format.ParseHeader(p)
		if err != nil || h.Size != uint64(o.Size) {
			t.Errorf("%+v: header %+v, error %v", o, h, err)
		}
	}
}

func ExampleMeasure() {
	n, err := Measure(Options{Size: 1 << 30})
	fmt.Println(n, err)
	// Output: 262144 <nil>
}

func TestOpenFileIsUsedAsItIs(t *testing.T) {
	path := filepath.Join(t.TempDir(), "img")
	st := fileStore(t, path)
	must(t, Image(context.Background(), st, Options{Size: 1 << 30}))
	must(t, st.Close())
	fi, err := os.Stat(path)
	must(t, err)
	if fi.Size() != 4*DefaultClusterSize {
		t.Errorf("file has %d bytes, want %d", fi.Size(), 4*DefaultClusterSize)
	}
}
