package testenv

import (
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"testing"
)

// PatternAt fills p with the bytes that Pattern puts at the offset: each
// aligned group of 8 bytes is its own offset, scrambled, in little endian.
// Data that lands elsewhere is therefore seen at once. Both off and len(p)
// must be multiples of 8.
func PatternAt(p []byte, off int64) {
	for i := 0; i < len(p); i += 8 {
		binary.LittleEndian.PutUint64(p[i:], (uint64(off)+uint64(i))*0x9e3779b97f4a7c15+1)
	}
}

// WritePattern writes size bytes of the pattern, which must be a multiple of
// 8, starting with the pattern's first byte.
func WritePattern(w io.Writer, size int64) error {
	buf := make([]byte, 1<<20)
	for off := int64(0); off < size; {
		n := min(int64(len(buf)), size-off)
		PatternAt(buf[:n], off)
		if _, err := w.Write(buf[:n]); err != nil {
			return fmt.Errorf("write pattern at %d: %w", off, err)
		}
		off += n
	}
	return nil
}

// CreatePattern makes a file of size bytes, every one written.
func CreatePattern(path string, size int64) (err error) {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() {
		if cerr := f.Close(); err == nil {
			err = cerr
		}
	}()
	if err := WritePattern(f, size); err != nil {
		return err
	}
	return f.Sync()
}

// PatternImage returns the path of a temporary image with the pattern.
func PatternImage(t testing.TB, size int64) string {
	t.Helper()
	path := TempDir(t) + "/disk.img"
	if err := CreatePattern(path, size); err != nil {
		t.Fatal(err)
	}
	return path
}

// SparseImage returns the path of a temporary image that is one hole.
func SparseImage(t testing.TB, size int64) string {
	t.Helper()
	path := TempDir(t) + "/disk.img"
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	return path
}

// SparseQcow2 makes a qcow2 image of 4 GiB of which the first 64 KiB and those at
// 2 GiB are written, with the byte 0xcd.
func SparseQcow2(t testing.TB, path string) {
	t.Helper()
	Run(t, "qemu-img", "create", "-q", "-f", "qcow2", path, "4G")
	Run(t, "qemu-io", "-f", "qcow2", "-c", "write -q 0 64k", "-c", "write -q 2G 64k", path)
}

// SpoilQcow2 damages an image of 4 GiB in clusters of 64 KiB that has data at
// 2 GiB: what maps that names no cluster any more. A write there poisons the disk,
// if it has not looked there since it was opened.
func SpoilQcow2(t testing.TB, path string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	at := func(off int64) int64 {
		var p [8]byte
		if _, err := f.ReadAt(p[:], off); err != nil {
			t.Fatal(err)
		}
		return int64(binary.BigEndian.Uint64(p[:]) & 0x00fffffffffffe00)
	}
	const (
		l1Offset = 40      // of the header, see "Header" of the format
		perEntry = 1 << 29 // bytes of the disk for each entry of the L1 table
		middle   = 2 << 30 / perEntry
	)
	entry := binary.BigEndian.AppendUint64(nil, 1<<63|0x777)
	if _, err := f.WriteAt(entry, at(at(l1Offset)+8*middle)); err != nil {
		t.Fatal(err)
	}
}
