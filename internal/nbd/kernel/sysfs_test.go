package kernel

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

func TestDeviceNamesAreStrict(t *testing.T) {
	for name, want := range map[string]int{"/dev/nbd0": 0, "nbd15": 15, "/dev/nbd1048575": limits.DeviceIndex} {
		if got, err := ParseDevice(name); err != nil || got != want {
			t.Errorf("%s: %d, %v", name, got, err)
		}
	}
	for _, name := range []string{"", "nbd", "/dev/", "/dev/nbd", "nbd-1", "nbd01", "nbd+1", "nbd1p1", "nbd 1", "nbd1\n", "sda",
		"/dev/../nbd1", "/dev//nbd1", "//dev/nbd1", "/tmp/nbd1", "./nbd1", "nbd1048576", "nbd99999999999999999999", "nbd١"} {
		if got, err := ParseDevice(name); err == nil {
			t.Errorf("%q is taken for device %d", name, got)
		}
	}
}

func TestAttachedDevicesAreDescribed(t *testing.T) {
	k := newFakeKernel(t)
	k.show(12, call{backend: "somebody, <\"x\">", numbers: map[uint16]uint64{attrSizeBytes: 1 << 30, attrBlockSize: 4096}})
	k.show(3, call{backend: remembered(t, "nbd://host/disk", ""), numbers: map[uint16]uint64{attrSizeBytes: 512, attrBlockSize: 512}})
	k.write(3, "ro", "1\n")
	must(t, os.Remove(k.sysfs.path(12, "backend")))
	for _, other := range []string{"nbd4", "sda", "nbd3p1", "nbd007"} {
		must(t, os.Mkdir(filepath.Join(string(k.sysfs), other), 0o700))
	}
	got, err := k.sysfs.List()
	must(t, err)
	for i := range got {
		got[i].Backend = BackendURI(got[i].Backend)
	}
	want := []Info{{Index: 3, Size: 512, Block: 512, ReadOnly: true, PID: 1, Backend: "nbd://host/disk"}, {Index: 12, Size: 1 << 30, Block: 4096, PID: 1}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v\nwant %+v", got, want)
	}
	if _, err := k.sysfs.Info(4); !errors.Is(err, ErrNoDevice) {
		t.Errorf("a device that is not attached: %v", err)
	}
}

func TestSenselessFilesAreErrors(t *testing.T) {
	for _, tt := range []struct{ file, text string }{
		{"pid", ""}, {"pid", "x"}, {"pid", "-1"}, {"pid", "99999999999"}, {"size", "18014398509481984"}, {"size", "-8"}, {"size", "1 2"},
		{"size", strings.Repeat("1", 5000)}, {"ro", "2"}, {"queue/logical_block_size", "0x200"}, {"queue/logical_block_size", "9999999999"},
		{"backend", strings.Repeat("b", limits.SysfsFile+1)},
	} {
		k := newFakeKernel(t)
		k.show(1, call{numbers: map[uint16]uint64{}})
		k.write(1, tt.file, tt.text)
		if got, err := k.sysfs.Info(1); !errors.Is(err, ErrReply) {
			t.Errorf("%s with %.20q: %+v, %v", tt.file, tt.text, got, err)
		}
		if _, err := k.sysfs.List(); !errors.Is(err, ErrReply) {
			t.Errorf("list: %s with %.20q: %v", tt.file, tt.text, err)
		}
	}
}

func TestNumbersAreOnlyLowered(t *testing.T) {
	k := newFakeKernel(t)
	for _, tt := range []struct {
		now  string
		to   int64
		want string
	}{{"128\n", 4, "4"}, {"4\n", 4, "4\n"}, {"2\n", 4, "2\n"}} {
		k.write(0, "queue/nr_requests", tt.now)
		must(t, k.sysfs.lower(0, "queue/nr_requests", tt.to))
		got, err := os.ReadFile(k.sysfs.path(0, "queue/nr_requests"))
		if err != nil || string(got) != tt.want {
			t.Errorf("%q lowered to %d is %q, %v", tt.now, tt.to, got, err)
		}
	}
	if err := k.sysfs.lower(9, "queue/nr_requests", 1); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a device without a queue: %v", err)
	}
}

func TestBlockSizesOfTheKernel(t *testing.T) {
	for _, tt := range []struct{ wanted, least, want uint32 }{{0, 0, 512}, {0, 1, 512}, {0, 4096, 4096}, {1024, 512, 1024}, {4096, 1, 4096}} {
		if got, err := blockSize(tt.wanted, tt.least); err != nil || got != tt.want {
			t.Errorf("wanted %d, at least %d: %d, %v", tt.wanted, tt.least, got, err)
		}
	}
	for _, tt := range []struct{ wanted, least uint32 }{{256, 1}, {513, 1}, {8192, 1}, {0, 8192}, {512, 4096}, {1 << 31, 1}} {
		if got, err := blockSize(tt.wanted, tt.least); !errors.Is(err, ErrRefused) {
			t.Errorf("wanted %d, at least %d: %d, %v", tt.wanted, tt.least, got, err)
		}
	}
}

func TestOddEndOfAnExportIsLeftOut(t *testing.T) {
	if got, err := usable(1<<20+700, 512); err != nil || got != 1<<20+512 {
		t.Errorf("got %d, %v", got, err)
	}
	for _, size := range []int64{0, 511, -1} {
		if got, err := usable(size, 512); !errors.Is(err, ErrRefused) {
			t.Errorf("size %d: %d, %v", size, got, err)
		}
	}
}

func TestBackendKeepsItsURIAndItsBound(t *testing.T) {
	one, two := remembered(t, "nbd://a b", ""), remembered(t, "nbd://a b", "")
	if one == two || BackendURI(one) != "nbd://a b" {
		t.Errorf("%q and %q", one, two)
	}
	if n := len(remembered(t, strings.Repeat("u", 1<<16), "")); n > limits.Backend {
		t.Errorf("%d bytes", n)
	}
	for _, others := range []string{"", "vmdiskctl-", "vmdiskctl-abc", "ceph <x>"} {
		if got := BackendURI(others); got != others {
			t.Errorf("%q becomes %q", others, got)
		}
	}
}
