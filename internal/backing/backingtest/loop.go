package backingtest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// Loop makes a block device out of a file, with logical blocks of sector
// bytes, until the test ends.
func Loop(t testing.TB, image string, sector uint32) string {
	t.Helper()
	ctl, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		t.Skipf("needs root and loop devices: %v", err)
	}
	defer ctl.Close()
	f, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for range 20 {
		n, err := unix.IoctlRetInt(int(ctl.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			t.Skipf("needs a free loop device: %v", err)
		}
		node := fmt.Sprintf("/dev/loop%d", n)
		dev, err := os.OpenFile(node, os.O_RDWR, 0)
		if err != nil {
			t.Skipf("needs %s: %v", node, err)
		}
		err = unix.IoctlLoopConfigure(int(dev.Fd()), &unix.LoopConfig{Fd: uint32(f.Fd()), Size: sector})
		if errors.Is(err, unix.EBUSY) { // somebody else was faster
			_ = dev.Close()
			continue
		}
		if err != nil {
			t.Fatalf("configure %s: %v", node, err)
		}
		t.Cleanup(func() {
			if _, err := unix.IoctlRetInt(int(dev.Fd()), unix.LOOP_CLR_FD); err != nil {
				t.Errorf("detach %s: %v", node, err)
			}
			_ = dev.Close()
		})
		return node
	}
	t.Skip("needs a free loop device: all are taken at once")
	return ""
}

// Tmpfs mounts a file system of size bytes until the test ends.
func Tmpfs(t testing.TB, size int64) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("none", dir, "tmpfs", 0, fmt.Sprintf("size=%d", size)); err != nil {
		t.Skipf("needs root to mount a tmpfs: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil { // a loop device on it may take a moment to end
			t.Errorf("unmount: %v", err)
		}
	})
	return dir
}

// Claim keeps a block device for the test alone, as the kernel keeps what it mounts,
// until free is called or the test ends.
func Claim(t testing.TB, node string) (free func()) {
	t.Helper()
	f, err := os.OpenFile(node, os.O_RDONLY|unix.O_EXCL, 0)
	if err != nil {
		t.Fatal(err)
	}
	free = sync.OnceFunc(func() { _ = f.Close() })
	t.Cleanup(free)
	return free
}

// SecondNode makes another node of a block device, which can be opened.
func SecondNode(t testing.TB, node string) string {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(node, &st); err != nil {
		t.Fatal(err)
	}
	other := filepath.Join(t.TempDir(), "node")
	if err := unix.Mknod(other, unix.S_IFBLK|0o600, int(st.Rdev)); err != nil {
		t.Skipf("needs CAP_MKNOD: %v", err)
	}
	f, err := os.Open(other)
	if err != nil {
		t.Skipf("needs a file system without nodev for temporary files: %v", err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	return other
}
