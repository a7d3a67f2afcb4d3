package guest

import (
	"testing"

	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// refusedScenario: a disk that says that it knows WRITE SAME refuses the first one,
// as old controllers and USB disks do. The kernel has dropped the pages by then.
const refusedScenario = `
i=0
until disk=$(ls /sys/bus/pseudo/drivers/scsi_debug/adapter*/host*/target*/*:*/block); do sleep 0.1; i=$((i+1)); [ $i -lt 200 ]; done
[ "$(cat /sys/block/$disk/queue/write_zeroes_max_bytes)" -gt 1048576 ]
echo 1 >/sys/module/scsi_debug/parameters/write_same_length
vmdiskd -f -U /run/disk.sock /dev/$disk >/run/server.log 2>&1 &
server=$!
while [ ! -S /run/disk.sock ]; do kill -0 $server; sleep 0.1; done
io() { qemu-io -f raw "$@" 'nbd+unix:///?socket=/run/disk.sock' 2>&1; }
io -c "write -P 7 0 1M" -c flush -c "write -P 9 0 1M" -c "write -zun 512 1047552" -c "read -P 9 0 1M" >/run/out || : # of the refusal
cat /run/out
grep -q "Operation not supported" /run/out
if grep -q "verification failed" /run/out; then exit 9; fi
[ "$(cat /sys/block/$disk/queue/write_zeroes_max_bytes)" = 0 ]
kill $server
wait $server
`

func TestRefusedFastZeroKeepsWhatWasWritten(t *testing.T) {
	oneKernel(t, stableKernel, func(t *testing.T, k testenv.Kernel) {
		onlyVmdiskd(t)
		in := inGuest(t, k, refusedScenario, "", []string{"scsi_debug", "sd_mod"}, []string{"qemu-io"})
		mustBoot(t, in, 512)
	})
}
