package guest

import (
	"flag"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// startServer is how scenarios begin: START, the options in its place, and
// IMAGE are replaced by what runs in the guest.
const startServer = `
IMAGE=/run/disk.img
truncate -s 256M $IMAGE
START $IMAGE >/run/server.log 2>&1 &
server=$!
trap 'rc=$?; [ $rc = 0 ] || { cat /run/server.log; dmesg | tail -n 20; }' EXIT
`

// kernelScenario uses the server through the kernel's own client. Host tools
// are called by their paths, because busybox prefers its own.
const kernelScenario = startServer + `
i=0
while [ ! -S /run/disk.sock ] && [ $i -lt 300 ]; do sleep 0.1; i=$((i+1)); done
/usr/sbin/nbd-client -unix /run/disk.sock /dev/nbd0 -C 4 -b 512
[ "$(cat /sys/block/nbd0/size)" = 524288 ]
[ "$(cat /sys/block/nbd0/queue/write_cache)" = "write back" ]
[ "$(cat /sys/block/nbd0/queue/fua)" = 1 ]
[ "$(cat /sys/block/nbd0/queue/discard_max_bytes)" != 0 ]
/usr/sbin/mke2fs -q -t ext4 /dev/nbd0
mount -t ext4 /dev/nbd0 /mnt
dd if=/dev/urandom of=/mnt/file bs=1M count=40 2>/dev/null
sync
md5sum /mnt/file >/run/sum
echo 3 >/proc/sys/vm/drop_caches
md5sum -c /run/sum
before=$(stat -c %b $IMAGE)
rm /mnt/file
sync
fstrim -v /mnt
after=$(stat -c %b $IMAGE)
echo "512-byte blocks of the image: $before, after the trim $after"
[ $((before - after)) -gt 70000 ]
dd if=/dev/urandom of=/mnt/second bs=64k count=200 oflag=direct 2>/dev/null
md5sum /mnt/second >/run/sum
umount /mnt
mount -t ext4 /dev/nbd0 /mnt
md5sum -c /run/sum
umount /mnt
/usr/sbin/e2fsck -fn /dev/nbd0
/usr/sbin/nbd-client -d /dev/nbd0
if dmesg | grep -iE 'nbd0.*(error|timed out|dead)'; then exit 9; fi
kill $server
wait $server || [ $? = 143 ]
`

// vsockScenario connects to the server through the loopback transport, often
// enough to meet what the two ends of a vsock make of each other's leaving.
const vsockScenario = startServer + `
uri=nbd+vsock://1:10809/
i=0
until nbdinfo --size $uri 2>/dev/null; do
	sleep 0.1
	i=$((i+1))
	[ $i -lt 300 ]
done
[ "$(nbdinfo --size $uri)" = 268435456 ]
nbdinfo $uri | cat
[ ! -e /usr/bin/vmdiskctl ] || vmdiskctl info $uri
dd if=/dev/urandom of=/run/a bs=1M count=8 2>/dev/null
nbdcopy --connections=4 --flush /run/a $uri
nbdcopy --connections=4 $uri /run/b
cmp -n 8388608 /run/a /run/b
for i in $(seq 30); do nbdinfo --size $uri >/dev/null; done
[ ! -e /conform ] || /conform -test.run 'CHECKS' -test.v 1 10809 268435456 >/run/conform || { cat /run/conform; exit 1; }
[ ! -e /conform ] || [ $(grep -c '^ *--- PASS: Conformance/' /run/conform) -ge 20 ]
kill $server
wait $server || [ $? = 143 ]
`

// inGuest builds the guest of a scenario whose server runs inside.
func inGuest(t *testing.T, k testenv.Kernel, scenario, options string, modules, programs []string) *initramfs {
	t.Helper()
	testenv.Require(t, programs...)
	ctx := testenv.Context(t)
	in, err := newInitramfs(ctx, k, "", modules...)
	if err != nil {
		t.Fatal(err)
	}
	program, rest, _ := strings.Cut(guestServer(t, in), " ")
	if program == "vmdiskd" {
		options = strings.Replace(options, "--vsock ", "--vsock --vsock-local --vsock-trust-cid ", 1)
	}
	start := strings.Join([]string{program, options, rest}, " ")
	in.addFile("scenario.sh", 0o644, []byte(strings.ReplaceAll(scenario, "START", start)))
	if err := in.addPrograms(ctx, programs...); err != nil {
		t.Fatal(err)
	}
	return in
}

func TestKernelClientUsesTheDiskWithFourConnections(t *testing.T) {
	eachKernel(t, func(t *testing.T, k testenv.Kernel) {
		in := inGuest(t, k, kernelScenario, "-f -U /run/disk.sock",
			[]string{"nbd", "ext4"}, []string{"nbd-client", "mke2fs", "e2fsck"})
		mustBoot(t, in, 768)
	})
}

// conformChecks are the checks of the protocol that are made over vsock. All of
// them, "Conformance", take an emulated guest some minutes.
var conformChecks = flag.String("conform.checks", "Conformance/(HS|TX-0[1-7])", "pattern of `-test.run` for the checks that are made over vsock")

func TestToolsReachTheServerOverVsock(t *testing.T) {
	oneKernel(t, stableKernel, func(t *testing.T, k testenv.Kernel) {
		in := inGuest(t, k, strings.ReplaceAll(vsockScenario, "CHECKS", *conformChecks), "-f --vsock -p 10809",
			[]string{"vsock_loopback"}, []string{"nbdinfo", "nbdcopy"})
		addConform(t, in)
		mustBoot(t, in, 768)
	})
}

// addConform puts the conformance suite into a guest with vmdiskd.
func addConform(t *testing.T, in *initramfs) {
	t.Helper()
	if testenv.Under(t).Program != "" {
		return
	}
	path, err := testenv.BuildAs(testenv.Context(t), "conform", "./test/guest/conform")
	if err == nil {
		err = in.copyFile(path, "conform")
	}
	if err != nil {
		t.Fatal(err)
	}
}
