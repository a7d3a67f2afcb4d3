package main

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing/backingtest"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
)

// logicalDisk is an image with an MBR for a disk of large sectors. Its partition 5 is
// the 64 sectors from number 160 on.
func logicalDisk(sector int) []byte {
	disk := make([]byte, 256*sector)
	entry := func(at, i int, kind byte, first, count uint32) {
		e := disk[at*sector+446+16*i:][:16]
		e[4] = kind
		binary.LittleEndian.PutUint32(e[8:], first)
		binary.LittleEndian.PutUint32(e[12:], count)
		disk[at*sector+510], disk[at*sector+511] = 0x55, 0xaa
	}
	entry(0, 0, 0x83, 8, 56)
	entry(0, 1, 0x05, 128, 128)
	entry(128, 0, 0x83, 32, 64)
	return disk
}

// TestPartitionOfADiskOfLargeSectors: its guest has the partition that the kernel of
// the host has, also in a copy of the disk, and from an overlay after a restart.
func TestPartitionOfADiskOfLargeSectors(t *testing.T) {
	t.Parallel()
	const sector, begin, size = 4096, 160 * 4096, 64 * 4096
	s := newService(t, "")
	s.stop()
	image := filepath.Join(s.dir, "disk.img")
	if err := os.WriteFile(image, logicalDisk(sector), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(backingtest.Loop(t, image, sector), filepath.Join(s.dir, "disk")); err != nil {
		t.Fatal(err)
	}
	s.configure(`
[[export]]
name = "a"
image = "DIR/disk"
format = "raw"
window = { partition = 5 }
[[export]]
name = "copy"
image = "DIR/copy.img"
format = "raw"
window = { partition = 5, sector-size = 4096 }
`)
	if err := os.WriteFile(filepath.Join(s.dir, "copy.img"), logicalDisk(sector), 0o600); err != nil {
		t.Fatal(err)
	}
	s.start()
	for name, image := range map[string]string{"a": image, "copy": filepath.Join(s.dir, "copy.img")} {
		s.wantPartition(name, size)
		s.write(name, "0x31", "0")
		b, err := os.ReadFile(image)
		if err != nil {
			t.Fatal(err)
		}
		if b[begin-1] != 0 || b[begin] != 0x31 || b[begin+64<<10-1] != 0x31 || b[begin+64<<10] != 0 {
			t.Errorf("%s: the write is not where the partition begins", name)
		}
	}
	if _, err := s.ctl.Snapshot(t.Context(), "a", api.Snapshot{Overlay: filepath.Join(s.dir, "over.qcow2")}); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		s.wantPartition("a", size)
		s.wantBytes("a", "0x31", "0")
		s.stop()
		s.start()
	}
	s.stop() // before the device is gone
}

// wantPartition fails the test unless an export has so many bytes.
func (s *testService) wantPartition(name string, size int64) {
	s.Helper()
	if got := s.size(s.uri(name)); got != fmt.Sprint(size) {
		x, err := s.ctl.Export(s.Context(), name)
		s.Fatalf("export %s has %q bytes, want %d: %+v, %v", name, got, size, x, err)
	}
}
