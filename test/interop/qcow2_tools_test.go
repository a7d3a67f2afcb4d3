package interop

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/backing/backingtest"
	"github.com/vmdiskd/vmdiskd/internal/nbd/client"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// overlayOfPattern makes an image above a raw file of the pattern.
func overlayOfPattern(t *testing.T) (image, base string) {
	t.Helper()
	vmdiskdOnly(t)
	needQEMU(t)
	base = testenv.PatternImage(t, diskSize)
	createQcow2(t, filepath.Dir(base), "top.qcow2", "", "-b", filepath.Base(base), "-F", "raw")
	return filepath.Join(filepath.Dir(base), "top.qcow2"), base
}

// served copies what a server gives to read into a raw file.
func served(t *testing.T, s *testenv.Server) string {
	t.Helper()
	testenv.Require(t, "nbdcopy")
	out := filepath.Join(testenv.TempDir(t), "served.raw")
	testenv.Run(t, "nbdcopy", s.URI, out)
	return out
}

func TestFioVerifiesAWritableQcow2(t *testing.T) {
	testenv.Require(t, "fio")
	for _, tt := range []struct {
		name  string
		image []string
		args  []string
	}{
		{"mixed, beside trims", nil, []string{"--rw=randrw", "--bs=4k", "--iodepth=16", "--size=8m", "--fsync=64",
			"--name=trims", "--rw=randtrim", "--bs=16k", "--offset=32m", "--size=32m", "--verify=0", "--iodepth=8"}},
		{"unequal sizes", []string{"-o", "cluster_size=4k"}, []string{"--rw=randwrite", "--bsrange=512-64k",
			"--verify_interval=512", "--iodepth=8", "--size=16m", "--fsync=64"}},
		{"subclusters", []string{"-o", "extended_l2=on"}, []string{"--rw=randwrite", "--bsrange=512-200k",
			"--verify_interval=512", "--iodepth=8", "--size=32m", "--fsync=100"}},
		{"large sequential", []string{"-o", "compat=0.10"}, []string{"--rw=write", "--bs=1m", "--iodepth=8", "--size=64m"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			image := newQcow2(t, "64M", tt.image...)
			s := serveQcow2(t, image)
			// There is something to trim.
			testenv.Run(t, "qemu-io", "-f", "raw", "-c", "write -P 7 32M 32M", s.URI)
			testenv.Run(t, append([]string{"fio", "--ioengine=nbd", "--uri=" + s.URI, "--verify_fatal=1", "--verify_state_save=0",
				"--name=verify", "--verify=crc32c", "--do_verify=1"}, tt.args...)...)
			stopAndCompare(t, s, image, served(t, s))
		})
	}
}

func TestDisksAreCopiedOntoAWritableQcow2(t *testing.T) {
	for name, argv := range map[string][]string{
		"qemu-img":          {"qemu-img", "convert", "-n", "-m", "8", "-W", "-f", "raw", "-O", "raw", "SOURCE", "URI"},
		"qemu-img in order": {"qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", "SOURCE", "URI"},
		"nbdcopy":           {"nbdcopy", "--connections=4", "--requests=32", "--flush", "SOURCE", "URI"},
	} {
		for _, above := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, above=%v", name, above), func(t *testing.T) {
				testenv.Require(t, argv[0])
				source := testenv.PatternImage(t, diskSize)
				// The source has a hole, and is not what the backing file has.
				if err := unix.Fallocate(openForWriting(t, source), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 3<<20, 5<<20); err != nil {
					t.Fatal(err)
				}
				image := ""
				if above {
					image, _ = overlayOfPattern(t)
				} else {
					image = newQcow2(t, fmt.Sprint(diskSize), "-o", "preallocation=metadata")
				}
				s := serveQcow2(t, image)
				line := slices.Clone(argv)
				for i := range line {
					line[i] = strings.NewReplacer("SOURCE", source, "URI", s.URI).Replace(line[i])
				}
				testenv.Run(t, line...)
				sameFiles(t, source, served(t, s), -1)
				stopAndCompare(t, s, image, source)
			})
		}
	}
}

// openForWriting returns a descriptor that is closed after the test.
func openForWriting(t *testing.T, path string) int {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return int(f.Fd())
}

// mapped is a line of qemu-img map.
type mapped struct {
	Start, Length, Depth int64
	Zero, Data           bool
	Offset               *int64
}

// at finds the line that has an offset of the disk.
func at(t *testing.T, lines []mapped, off int64) mapped {
	t.Helper()
	for _, m := range lines {
		if m.Start <= off && off < m.Start+m.Length {
			return m
		}
	}
	t.Fatalf("nothing is at %d in %+v", off, lines)
	return mapped{}
}

func TestZeroesAndDiscardsAreMappedAsQEMUWouldMapThem(t *testing.T) {
	for _, above := range []bool{false, true} {
		t.Run(fmt.Sprintf("above=%v", above), func(t *testing.T) {
			var image string
			if above {
				image, _ = overlayOfPattern(t)
			} else {
				image = newQcow2(t, "16M")
			}
			s := serveQcow2(t, image)
			testenv.Run(t, "qemu-io", "-f", "raw", "-d", "unmap", "-c", "write -P 0x11 0 6M", "-c", "flush",
				"-c", "write -z 1M 1M", "-c", "write -z -u 2M 1M", "-c", "discard 3M 1M",
				"-c", "write -z 8M 1M", "-c", "write -z -u 9M 1M", "-c", "discard 10M 1M",
				"-c", "write -z -u 4198400 10000", "-c", "flush", s.URI)
			want := served(t, s)
			stopAndCompare(t, s, image, want)
			b, err := os.ReadFile(want)
			if err != nil {
				t.Fatal(err)
			}
			for _, zero := range [][2]int{{1 << 20, 4 << 20}, {8 << 20, 10 << 20}, {4198400, 4208400}} {
				if !bytes.Equal(b[zero[0]:zero[1]], make([]byte, zero[1]-zero[0])) {
					t.Errorf("what was zeroed at %d does not read as zeroes", zero[0])
				}
			}
			var lines []mapped
			decode(t, testenv.Run(t, "qemu-img", "map", "-f", "qcow2", "--output=json", image), &lines)
			for _, tt := range []struct {
				off        int64
				data, host bool // it has data; it keeps a place in the file
			}{
				{0, true, true}, {1 << 20, false, true}, {2 << 20, false, false}, {3 << 20, false, false},
				{5 << 20, true, true}, {8 << 20, false, true}, {9 << 20, false, false},
			} {
				m := at(t, lines, tt.off)
				if m.Data != tt.data || (m.Offset != nil) != tt.host || m.Zero == tt.data {
					t.Errorf("at %d: got %+v (offset %v), want data %v and an offset %v", tt.off, m, m.Offset, tt.data, tt.host)
				}
			}
		})
	}
}

// blocks is what a file takes on its file system, in bytes.
func blocks(t *testing.T, path string) int64 {
	t.Helper()
	st, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return st.Sys().(*syscall.Stat_t).Blocks * 512
}

func TestTrimsShrinkTheHostFile(t *testing.T) {
	const size = 64 << 20
	for _, cache := range []string{"writeback", "none"} {
		t.Run(cache, func(t *testing.T) {
			image := newQcow2(t, fmt.Sprint(size))
			s := serveQcow2(t, image, "--cache="+cache)
			ctx := testenv.Context(t)
			c := dial(t, s)
			p := make([]byte, 1<<20)
			for off := int64(0); off < size; off += int64(len(p)) {
				testenv.PatternAt(p, off)
				if err := c.WriteAt(ctx, p, off, 0); err != nil {
					t.Fatal(err)
				}
			}
			if err := c.Flush(ctx); err != nil {
				t.Fatal(err)
			}
			full := blocks(t, image)
			if full < size {
				t.Errorf("the file takes %d bytes, want at least %d", full, size)
			}
			if err := errors.Join(c.Trim(ctx, 0, size/2, 0), c.Trim(ctx, size/2, size/2-1<<20, 0), c.Flush(ctx)); err != nil {
				t.Fatal(err)
			}
			if got := blocks(t, image); got > 4<<20 {
				t.Errorf("after the trims the file takes %d bytes, want 1 MiB and some metadata", got)
			}
			if err := readPattern(ctx, c, size-1<<20); err != nil {
				t.Errorf("what was not trimmed: %v", err)
			}
			// What is free is used again: the file does not grow.
			st, err := os.Stat(image)
			if err != nil {
				t.Fatal(err)
			}
			for off := int64(0); off < size/2; off += int64(len(p)) {
				if err := c.WriteAt(ctx, p, off, 0); err != nil {
					t.Fatal(err)
				}
			}
			if err := c.Flush(ctx); err != nil {
				t.Fatal(err)
			}
			if again, err := os.Stat(image); err != nil || again.Size() > st.Size() {
				t.Errorf("the file has grown from %d bytes to %d, %v", st.Size(), again.Size(), err)
			}
		})
	}
}

// TestClientsThatVanishHoldNoClusters: a reply that is cut off gives back the
// clusters that it was read from, else nothing could be freed any more.
func TestClientsThatVanishHoldNoClusters(t *testing.T) {
	const size = 16 << 20
	image := newQcow2(t, fmt.Sprint(size))
	s := serveQcow2(t, image)
	ctx := testenv.Context(t)
	c := dial(t, s)
	if _, err := fill(ctx, c, 0, size); err != nil {
		t.Fatal(err)
	}
	var reads []byte
	for i := range 300 {
		reads = wire.AppendRequest(reads, wire.Request{Cmd: wire.CmdRead, Cookie: uint64(i), Off: uint64(i) << 14, Len: 16 << 10})
	}
	for range 200 {
		conn, err := net.Dial("unix", s.Socket)
		if err != nil {
			t.Fatal(err)
		}
		enterTransmission(t, conn)
		if _, err := conn.Write(reads); err != nil {
			t.Fatal(err)
		}
		conn.Close()
	}
	if err := errors.Join(c.Trim(ctx, 0, size, 0), c.Flush(ctx)); err != nil {
		t.Fatal(err)
	}
	// What has been read for them ends soon.
	if err := testenv.Await(ctx, func() bool { return c.Flush(ctx) != nil || blocks(t, image) < 4<<20 }); err != nil {
		t.Errorf("the file takes %d bytes of a disk that was trimmed: %v", blocks(t, image), err)
	}
}

// fill writes the pattern, 64 KiB at a time, until the disk is full or the
// server has no space. It returns where it stopped and why.
func fill(ctx context.Context, c *client.Client, from, to int64) (int64, error) {
	p := make([]byte, 64<<10)
	for ; from < to; from += int64(len(p)) {
		testenv.PatternAt(p, from)
		if err := c.WriteAt(ctx, p, from, 0); err != nil {
			return from, err
		}
	}
	return from, nil
}

// smallHost mounts a file system with so much room.
func smallHost(t *testing.T, room int64) (dir string) {
	t.Helper()
	vmdiskdOnly(t)
	needQEMU(t)
	dir = testenv.TempDir(t)
	if err := unix.Mount("none", dir, "tmpfs", 0, fmt.Sprintf("size=%d", room)); err != nil {
		t.Skipf("needs root to mount a tmpfs: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount: %v", err)
		}
	})
	return dir
}

// makeRoom leaves nothing of a smallHost's limit that a test could meet.
func makeRoom(t *testing.T, dir string) {
	t.Helper()
	if err := unix.Mount("none", dir, "", unix.MS_REMOUNT, "size=64M"); err != nil {
		t.Fatal(err)
	}
}

// fullImage serves an image on a file system that is too small for its disk.
// The test ends the server.
func fullImage(t *testing.T, room, size int64, cache string) (s *testenv.Server, dir, image string) {
	t.Helper()
	dir = smallHost(t, room)
	createQcow2(t, dir, "disk.qcow2", fmt.Sprint(size))
	image = filepath.Join(dir, "disk.qcow2")
	return testenv.StartToKill(t, writable(image, "--cache="+cache)), dir, image
}

// wantPattern holds a range of the disk against the pattern.
func wantPattern(t *testing.T, c *client.Client, from, to int64) {
	t.Helper()
	for ; from < to; from += 64 << 10 {
		if err := readPattern(testenv.Context(t), c, from); err != nil {
			t.Fatal(err)
		}
	}
}

// TestFullFileSystemIsNoSpaceAndHarmsNothing fills a file system twice: the
// guest helps the first time, the host the second.
func TestFullFileSystemIsNoSpaceAndHarmsNothing(t *testing.T) {
	const room, size, freed = 12 << 20, 32 << 20, 4 << 20
	for _, cache := range []string{"writeback", "none"} {
		t.Run(cache, func(t *testing.T) {
			s, dir, image := fullImage(t, room, size, cache)
			ctx := testenv.Context(t)
			c := dial(t, s)
			full, err := fill(ctx, c, 0, freed)
			if err := errors.Join(err, c.Flush(ctx)); err != nil {
				t.Fatal(err)
			}
			if full, err = fill(ctx, c, full, size); !errors.Is(err, wire.ENOSPC) {
				t.Fatalf("a write to a full file system is answered %v at %d, want ENOSPC", err, full)
			}
			if err := c.Flush(ctx); err != nil {
				t.Errorf("flush of what was written: %v", err)
			}
			wantPattern(t, c, 0, full)
			wantSoundOpen(t, image)

			if err := errors.Join(c.Trim(ctx, 0, freed, 0), c.Flush(ctx)); err != nil {
				t.Fatalf("trim and flush: %v", err)
			}
			more, err := fill(ctx, c, full, size)
			if !errors.Is(err, wire.ENOSPC) || more < full+freed/2 {
				t.Fatalf("after a trim of %d bytes %d could be written, %v", freed, more-full, err)
			}
			makeRoom(t, dir)
			more, err = fill(ctx, c, more, size)
			if err := errors.Join(err, c.Flush(ctx)); err != nil {
				t.Fatalf("write with more space, at %d: %v", more, err)
			}
			wantPattern(t, c, freed, size)
			stopAndCompare(t, s, image, served(t, s))
			wantSound(t, image, false)
		})
	}
}

// TestFileSystemThatIsFullAtTheFirstFlush has no room for a table that no
// write before has seen to.
func TestFileSystemThatIsFullAtTheFirstFlush(t *testing.T) {
	const room, size = 12 << 20, 32 << 20
	s, dir, image := fullImage(t, room, size, "writeback")
	ctx := testenv.Context(t)
	c := dial(t, s)
	full, err := fill(ctx, c, 0, size)
	if !errors.Is(err, wire.ENOSPC) {
		t.Fatalf("a write to a full file system is answered %v at %d, want ENOSPC", err, full)
	}
	if err := c.Flush(ctx); err != nil {
		t.Errorf("flush: %v", err)
	}
	wantPattern(t, c, 0, full)
	wantSoundOpen(t, image)
	makeRoom(t, dir)
	full, err = fill(ctx, c, full, size)
	if err := errors.Join(err, c.Flush(ctx)); err != nil {
		t.Fatalf("write with more space, at %d: %v", full, err)
	}
	wantPattern(t, c, 0, size)
	stopAndCompare(t, s, image, served(t, s))
	wantSound(t, image, false)
}

// TestServerThatCannotFlushAtItsEndSaysSo has a block device that takes writes
// which it cannot keep. What the server leaves is sound but for leaks, and
// served again once there is room.
func TestServerThatCannotFlushAtItsEndSaysSo(t *testing.T) {
	const room, size = 12 << 20, 32 << 20
	dir := smallHost(t, room)
	file := filepath.Join(dir, "device")
	if err := errors.Join(os.WriteFile(file, nil, 0o600), os.Truncate(file, 2*size+(8<<20))); err != nil {
		t.Fatal(err)
	}
	device := backingtest.Loop(t, file, 512)
	testenv.Run(t, "qemu-img", "create", "-q", "-f", "qcow2", device, fmt.Sprint(size))
	s := testenv.StartToKill(t, writable(device))
	if _, err := fill(testenv.Context(t), dial(t, s), 0, size); err != nil {
		t.Fatal(err)
	}
	if err := s.Stop(); err == nil {
		t.Error("a server that could not flush ends as if it could")
	}
	wantSoundOpen(t, file)
	makeRoom(t, dir)
	s = testenv.StartToKill(t, writable(device))
	c, ctx := dial(t, s), testenv.Context(t)
	off, err := fill(ctx, c, 0, size)
	if err := errors.Join(err, c.Flush(ctx)); err != nil {
		t.Fatalf("write with more space, at %d: %v", off, err)
	}
	wantPattern(t, c, 0, size)
	stopAndCompare(t, s, device, served(t, s))
	wantSound(t, device, true)
}

// wantSoundOpen is wantSound with leaks for an image that a server has open:
// what the file says now must hold, whatever the server still has in memory.
func wantSoundOpen(t *testing.T, image string) {
	t.Helper()
	copied := filepath.Join(testenv.TempDir(t), "copy.qcow2")
	b, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(copied, b, 0o600); err != nil {
		t.Fatal(err)
	}
	wantSound(t, copied, true)
}
