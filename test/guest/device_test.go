package guest

import (
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// deviceStart is how scenarios of kernel devices begin: the server listens on
// a Unix socket and on vsock.
const deviceStart = startServer + `
await() { i=0; until eval "$1"; do sleep 0.1; i=$((i+1)); [ $i -lt 600 ] || { echo "in vain: $1"; return 1; }; done; }
await '[ -S /run/disk.sock ]'
unix='nbd+unix:///?socket=/run/disk.sock'
fails() { want=$1; shift; rc=0; "$@" >/run/out 2>&1 || rc=$?; cat /run/out; [ $rc = $want ]; }
`

// deviceScenario: a device with four connections holds a file system, and is
// taken away when nobody uses it, and not before.
const deviceScenario = deviceStart + `
[ "$(vmdiskctl device list --json)" = "[]" ]
[ "$(vmdiskctl device attach "$unix" /dev/nbd3 --connections 4)" = /dev/nbd3 ]
vmdiskctl device list
vmdiskctl device list | grep -q "/dev/nbd3  *256M  *512  rw .*nbd+unix:///?socket=/run/disk.sock"
fails 1 vmdiskctl device attach "$unix" nbd3
grep -q "in use" /run/out
/usr/sbin/mke2fs -q -t ext4 /dev/nbd3
mount -t ext4 /dev/nbd3 /mnt
dd if=/dev/urandom of=/mnt/file bs=1M count=40 2>/dev/null
sync
md5sum /mnt/file >/run/sum
echo 3 >/proc/sys/vm/drop_caches
md5sum -c /run/sum
before=$(stat -c %b $IMAGE)
rm /mnt/file
sync
fstrim -v /mnt
[ $((before - $(stat -c %b $IMAGE))) -gt 70000 ]
dd if=/dev/urandom of=/mnt/second bs=64k count=100 oflag=direct 2>/dev/null
fails 1 vmdiskctl device detach /dev/nbd3
grep -q "mounted" /run/out
umount /mnt
echo written late | dd of=/dev/nbd3 bs=512 seek=524287 count=1 conv=sync,notrunc 2>/dev/null
vmdiskctl device detach /dev/nbd3
[ "$(tail -c 512 $IMAGE | head -n 1)" = "written late" ]
fails 1 vmdiskctl device detach /dev/nbd3
grep -q "not attached" /run/out
[ "$(vmdiskctl device list --json)" = "[]" ]
/usr/sbin/e2fsck -fn $IMAGE
dev=$(vmdiskctl device attach "$unix" --readonly --block-size 4096)
[ "$(cat /sys/block/${dev#/dev/}/ro)" = 1 ]
[ "$(cat /sys/block/${dev#/dev/}/queue/logical_block_size)" = 4096 ]
vmdiskctl device detach $dev
if dmesg | grep -iE 'nbd.*(error|timed out|dead)'; then exit 9; fi
`

// onlyVmdiskd skips what nbdkit has no part in.
func onlyVmdiskd(t *testing.T) {
	t.Helper()
	if k := testenv.Under(t); k.Program != "" {
		t.Skipf("is about vmdiskd, not %s", k.Name)
	}
}

func bootDevice(t *testing.T, k testenv.Kernel, scenario, options string, modules ...string) {
	t.Helper()
	onlyVmdiskd(t)
	in := inGuest(t, k, scenario, options, append([]string{"nbd", "ext4"}, modules...), []string{"mke2fs", "e2fsck"})
	console := mustBoot(t, in, 768)
	if testing.Verbose() {
		_, said, _ := strings.Cut(console, "LAB-BEGIN")
		t.Log(said)
	}
}

func TestDeviceHoldsAFileSystemWithFourConnections(t *testing.T) {
	eachKernel(t, func(t *testing.T, k testenv.Kernel) {
		bootDevice(t, k, deviceScenario, "-f -U /run/disk.sock")
	})
}
