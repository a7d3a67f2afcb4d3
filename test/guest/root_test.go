package guest

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/vmdiskd/vmdiskd/test/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

const (
	rootSize   = 256 << 20
	knownBytes = 8 << 20  // of /data/known, whose contents the test knows
	trimmed    = 64 << 20 // written, deleted and trimmed by the guest
)

// knownLine repeats in /data/known, as yes(1) prints it.
const knownLine = "a guest writes to its disk"

// enterRoot goes on after prelude: it hands over to the disk.
const enterRoot = `
i=0
while [ ! -b /dev/vda ] && [ $i -lt 100 ]; do sleep 0.1; i=$((i+1)); done
mount -t ext4 -o discard /dev/vda /mnt
mount --move /dev /mnt/dev
exec switch_root /mnt /sbin/init
`

// rootInit is the first process of the disk. The sizes are put in by Sprintf.
const rootInit = `#!/bin/busybox sh
export PATH=/bin
mount -t proc proc /proc
report() { printf '\nLAB-RC=%%s\n' "$1"; sync; poweroff -f; }
trap 'report 1' EXIT
set -e
yes '%s' | head -c %d >/data/known
dd if=/dev/urandom of=/data/random bs=1M count=16 2>/dev/null
sync
sha256sum /data/random >/data/sums
dd if=/dev/urandom of=/data/big bs=1M count=%d 2>/dev/null
sync
rm /data/big
sync
fstrim -v /
echo 3 >/proc/sys/vm/drop_caches
sha256sum -c /data/sums
ln -s known /data/link
mkdir /data/folder
sync
mount -o remount,ro /
trap - EXIT
report 0
`

// makeRoot builds the disk: an ext4 file system with a busybox tree and the
// script of its first process.
func makeRoot(t *testing.T, init string) (image string) {
	t.Helper()
	tree := testenv.TempDir(t)
	for _, dir := range []string{"bin", "sbin", "dev", "proc", "data"} {
		if err := os.Mkdir(filepath.Join(tree, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	busybox := testenv.Path(t, "busybox")
	data, err := os.ReadFile(busybox)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(tree, "bin/busybox"), data, 0o755); err != nil {
		t.Fatal(err)
	}
	for applet := range strings.Lines(testenv.Run(t, "busybox", "--list")) {
		name := filepath.Join(tree, "bin", strings.TrimSpace(applet))
		if err := os.Symlink("busybox", name); err != nil && !os.IsExist(err) {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(tree, "sbin/init"), []byte(init), 0o755); err != nil {
		t.Fatal(err)
	}
	image = testenv.SparseImage(t, rootSize)
	testenv.Run(t, "mke2fs", "-q", "-F", "-t", "ext4", "-E", "root_owner=0:0", "-d", tree, image)
	return image
}

// rootInitramfs hands over to the disk.
func rootInitramfs(t *testing.T, k testenv.Kernel) *initramfs {
	t.Helper()
	in, err := newInitramfs(testenv.Context(t), k, "", "virtio_pci", "virtio_blk", "ext4")
	if err != nil {
		t.Fatal(err)
	}
	in.addFile("init", 0o755, []byte(prelude+enterRoot))
	return in
}

// nbdRoot are QEMU's arguments for a virtio disk that is an NBD export.
func nbdRoot(socket string) []string {
	return []string{
		"-blockdev", "driver=nbd,node-name=net,server.type=unix,server.path=" + socket + ",discard=unmap",
		"-blockdev", "driver=raw,node-name=root,file=net,discard=unmap",
		"-device", "virtio-blk-pci,drive=root",
	}
}

func TestGuestLivesOnItsNBDRootDisk(t *testing.T) {
	oneKernel(t, stableKernel, func(t *testing.T, k testenv.Kernel) {
		image := makeRoot(t, fmt.Sprintf(rootInit, knownLine, knownBytes, trimmed>>20))
		in := rootInitramfs(t, k)
		s := testenv.Start(t, testenv.Options{Image: image})
		console := mustBoot(t, in, 256, nbdRoot(s.Socket)...)
		if err := s.Stop(); err != nil {
			t.Error(err)
		}
		checkRoot(t, image)
		if t.Failed() {
			t.Logf("console:\n%s", console)
		}
	})
}

// checkRoot looks at the disk from outside, after the guest and the server.
func checkRoot(t *testing.T, image string) {
	t.Helper()
	if out, err := testenv.Try(t, "e2fsck", "-fn", image); err != nil {
		t.Errorf("the file system is not clean: %v\n%s", err, out)
	}
	line := []byte(knownLine + "\n")
	want := bytes.Repeat(line, knownBytes/len(line)+1)[:knownBytes]
	if got := dump(t, image, "/data/known"); !bytes.Equal(got, want) {
		t.Errorf("/data/known has %d bytes, and they are not the guest's %d", len(got), len(want))
	}
	sum := sha256.Sum256(dump(t, image, "/data/random"))
	if sums := string(dump(t, image, "/data/sums")); !strings.HasPrefix(sums, fmt.Sprintf("%x ", sum)) {
		t.Errorf("/data/random has the sum %x, the guest saw %q", sum, sums)
	}
	st, err := os.Stat(image)
	if err != nil {
		t.Fatal(err)
	}
	// What stays is the tree, the two files and the journal.
	if allocated := st.Sys().(*syscall.Stat_t).Blocks * 512; allocated > trimmed {
		t.Errorf("%d MiB stay allocated after %d MiB were trimmed", allocated>>20, trimmed>>20)
	}
}

// dump reads a file out of the file system without mounting it.
func dump(t *testing.T, image, file string) []byte {
	t.Helper()
	out := filepath.Join(testenv.TempDir(t), "file")
	testenv.Run(t, "debugfs", "-R", "dump "+file+" "+out, image)
	data, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	return data
}
