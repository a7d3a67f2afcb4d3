package guest

import (
	"testing"

	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// remountScenario: a kernel is asked for an emergency remount, which makes all file
// systems read-only, while a guest writes to an image on one that then drops what is
// written to open files, and has every sync of them succeed. The flush fails.
const remountScenario = `
truncate -s 64M /run/fs
/usr/sbin/mke2fs -q -F -t ext4 /run/fs
mount -o loop /run/fs /mnt
ln -s /mnt/disk.img /run/disk.img
` + deviceStart + `
vmdiskctl device attach "$unix" /dev/nbd0
write() { dd if=/dev/urandom of=/dev/nbd0 bs=64k count=16 conv=fsync,notrunc; }
write
echo u >/proc/sysrq-trigger
await 'grep -q " /mnt ext4 ro" /proc/mounts'
fails 1 write
grep "may be lost.*drops what was written" /run/server.log
dmesg | grep "returned error (5)"
vmdiskctl device detach --force /dev/nbd0
kill $server
rc=0; wait $server || rc=$?
[ $rc = 1 ] # what was lost is told
`

func TestFlushFailsOnceTheFileSystemIsReadOnly(t *testing.T) {
	oneKernel(t, stableKernel, func(t *testing.T, k testenv.Kernel) {
		bootDevice(t, k, remountScenario, "-U /run/disk.sock", "loop")
	})
}
