package guest

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/qmp"
	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// fillDisk has a guest write all of its disk and read it back past its cache.
const fillDisk = `
dd if=/dev/urandom of=/run/data bs=1M count=12 2>/dev/null
dd if=/run/data of=/dev/vda bs=256k oflag=direct conv=fsync
dd if=/dev/vda of=/run/back bs=256k iflag=direct
cmp /run/data /run/back
if dmesg | grep -i 'i/o error'; then exit 9; fi
`

// fullStorage serves a disk of 12 MiB on a file system that has room for 6, until
// somebody asks for more, to a guest that has the words of QEMU. Its last word is
// the number of blocks that the image has at the end.
const fullStorage = `
mount -t tmpfs -o size=6M tmpfs /srv
truncate -s 12M /srv/disk.img
await() { until eval "$1"; do sleep 0.1; done; }
vmdiskd -f -U DIR/disk.sock /srv/disk.img >&2 &
server=$!
await '[ -S DIR/disk.sock ]'
QEMU >DIR/console 2>&1 &
qemu=$!
await '[ -e DIR/more ]'
mount -o remount,size=32M /srv
touch DIR/grown
wait $qemu
kill $server
wait $server
stat -c %b /srv/disk.img
`

// TestGuestPausesWhileStorageIsFull: QEMU with werror=enospc stops the machine
// when a write finds no space, and when there is some and it goes on, the guest
// has seen no error and reads what it wrote.
func TestGuestPausesWhileStorageIsFull(t *testing.T) {
	t.Parallel()
	requireGuest(t)
	testenv.Require(t, "unshare")
	dir := testenv.TempDir(t)
	in, err := newInitramfs(testenv.Context(t), testenv.CloudKernel(t, stableKernel), fillDisk, "virtio_pci", "virtio_blk")
	if err != nil {
		t.Fatal(err)
	}
	monitor := filepath.Join(dir, "qmp")
	cmd, err := command(t.Context(), in, dir, 256, "-S", "-qmp", "unix:"+monitor+",server=on,wait=off",
		"-blockdev", "driver=nbd,node-name=disk,server.type=unix,server.path="+dir+"/disk.sock",
		"-device", "virtio-blk-pci,drive=disk,werror=enospc,rerror=report")
	if err != nil {
		t.Fatal(err)
	}
	ctx := testenv.Context(t)
	seen := make(chan error, 1)
	go func() { seen <- pausedAndResumed(ctx, monitor, dir) }()
	words := "'" + strings.Join(cmd.Args, "' '") + "'"
	out, err := inNamespace(t, strings.NewReplacer("DIR", dir, "QEMU", words).Replace(fullStorage))
	console, _ := os.ReadFile(filepath.Join(dir, "console"))
	if m := status.FindSubmatch(console); err != nil || m == nil || string(m[1]) != "0" || strings.TrimSpace(out) != fmt.Sprint(12<<20/512) {
		t.Errorf("%v, the image has %q blocks; console:\n%s", err, out, console)
	}
	if err := <-seen; err != nil {
		t.Error(err)
	}
}

// pausedAndResumed starts a machine, waits until it pauses for want of space, asks
// for more and has it go on.
func pausedAndResumed(ctx context.Context, monitor, dir string) error {
	// After an error, too, the script waits for this, and for the machine's end.
	defer os.WriteFile(filepath.Join(dir, "more"), nil, 0o600)
	if err := testenv.Await(ctx, func() bool { return testenv.Listens(monitor) }); err != nil {
		return err
	}
	m, err := qmp.Dial(ctx, monitor)
	if err != nil {
		return err
	}
	defer m.Close()
	events, err := m.Subscribe()
	if err != nil {
		return err
	}
	defer events.Close()
	if _, err := m.Execute(ctx, "cont", nil); err != nil {
		return err
	}
	for name := ""; name != "STOP"; {
		e, err := events.Next(ctx)
		if err != nil {
			return fmt.Errorf("the machine does not pause: %w", err)
		}
		name = e.Name
	}
	s, err := qmp.QueryStatus(ctx, m)
	if err != nil || s.State != "io-error" {
		return fmt.Errorf("the machine is %q, %v, want io-error", s.State, err)
	}
	disks, err := qmp.QueryBlock(ctx, m)
	if err != nil || len(disks) != 1 || disks[0].IOStatus != "nospace" {
		return fmt.Errorf("disks %+v, %v, want one with nospace", disks, err)
	}
	if err := os.WriteFile(filepath.Join(dir, "more"), nil, 0o600); err != nil {
		return err
	}
	grown := func() bool { _, err := os.Stat(filepath.Join(dir, "grown")); return err == nil }
	if err := testenv.Await(ctx, grown); err != nil {
		return err
	}
	_, err = m.Execute(ctx, "cont", nil)
	return err
}
