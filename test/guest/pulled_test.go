package guest

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// pulledScenario: the block device below one export is pulled out of the machine
// while clients write to it through the kernel's page cache (fault BE-13). That export
// fails what it is asked and takes no more writes; the other one goes on, and
// nothing hangs, the stop of the service included.
const pulledScenario = serviceStart + `
cat >>/run/conf <<END
[[export]]
name = "pulled"
image = "/dev/vda"
format = "raw"
END
sed -i 's|^roots = .*|roots = ["/run/d", "/dev"]|' /run/conf
kill $server
wait $server
serve
pulled='nbd+unix:///pulled?socket=/run/d/nbd'
other='nbd+unix:///disk0?socket=/run/d/nbd'
vmdiskctl device attach "$pulled" /dev/nbd0
vmdiskctl device attach "$other" /dev/nbd1
write() { dd if=/dev/urandom of=$1 bs=64k count=16 oflag=direct conv=fsync,notrunc 2>/dev/null; }
write /dev/nbd0
write /dev/nbd1
(while write /dev/nbd1; do touch /run/other; done) &
writer=$!
echo 1 >"$(readlink -f /sys/block/vda/device/..)/remove"
[ ! -e /sys/block/vda ]
fails 1 write /dev/nbd0
fails 1 dd if=/dev/nbd0 of=/dev/null bs=64k count=16 iflag=direct
grep -q "Input/output error" /run/out
vmdiskctl export show pulled
vmdiskctl export show pulled | grep -x "state: poisoned"
vmdiskctl status | grep "export pulled: it takes no more writes"
rm -f /run/other
await '[ -e /run/other ]'
kill -0 $writer
vmdiskctl export show disk0 | grep -x "state: ready"
kill $writer
wait $writer || :
vmdiskctl device detach /dev/nbd1
vmdiskctl device detach --force /dev/nbd0
vmdiskctl export list
kill $server
rc=0; wait $server || rc=$?
[ $rc = 1 ] # what was lost is told
if dmesg | grep -E 'blocked for more|nbd1.*error'; then exit 9; fi
`

func TestBlockDeviceThatIsPulledOutFailsAlone(t *testing.T) {
	oneKernel(t, stableKernel, func(t *testing.T, k testenv.Kernel) {
		onlyVmdiskd(t)
		in := inGuest(t, k, pulledScenario, "", []string{"nbd", "ext4", "vsock_loopback", "virtio_pci", "virtio_blk"}, nil)
		disk := filepath.Join(testenv.TempDir(t), "disk.img")
		if err := os.WriteFile(disk, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(disk, 64<<20); err != nil {
			t.Fatal(err)
		}
		if console := mustBoot(t, in, 768, "-drive", "if=virtio,format=raw,file="+disk); testing.Verbose() {
			t.Log(console)
		}
	})
}
