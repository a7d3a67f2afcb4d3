package guest

import (
	"context"
	"errors"
	"os"
	"path/filepath"

	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// watcher is what a guest does that waits for disks. It says on the console,
// in lines that begin with "guest: ", what a disk is when it appears and when
// its size changes, how many rounds of writes it has read back, and how it
// ends: in "gone", or in "ERROR". The first sector of a disk gets a line of
// text; the rounds are written at its end and at places that move. A round
// waits for nothing, so that there is always a request in flight.
const watcher = `
say() { printf 'guest: %s\n' "$*"; }

found() { for disk in /dev/vda /dev/sda; do [ ! -b $disk ] || return 0; done; return 1; }

# failed ends a round: a request that fails while the disk is taken out is not
# lost, its guest has let go of it.
failed() {
	sleep 2
	[ ! -e $sys ] || { say "ERROR: $1"; dmesg | tail -n 5; }
	exit 1
}

# check SEEK: a mebibyte goes to the disk and comes back, past the page cache.
check() {
	dd if=/run/data of=$disk bs=1M seek=$1 oflag=direct conv=notrunc,fsync 2>/dev/null || failed "cannot write MiB $1"
	dd if=$disk of=/run/back bs=1M skip=$1 count=1 iflag=direct 2>/dev/null || failed "cannot read MiB $1"
	cmp /run/data /run/back >/dev/null || failed "MiB $1 is not what was written"
}

rounds() {
	n=0
	size=0
	while :; do
		now=$(($(cat $sys/size 2>/dev/null || echo 0) / 2048))
		[ $now -gt 2 ] || failed "the disk has $now MiB"
		if [ $now != $size ]; then
			size=$now
			say "the disk has $size MiB"
		fi
		dd if=/dev/urandom of=/run/data bs=1M count=1 2>/dev/null
		check $((size - 1))
		check $((n % (size - 2) + 1))
		n=$((n + 1))
		say "$n rounds written and read back, the last MiB of $size too"
	done
}

say "ready"
while :; do
	until found; do sleep 0.1; done
	sys=/sys/block/${disk#/dev/}
	say "a disk appears, serial number $(cat $sys/serial 2>/dev/null)"
	echo "This line was written by the guest." | dd of=$disk bs=512 conv=sync,notrunc,fsync 2>/dev/null
	(rounds) || :
	while [ -e $sys ]; do sleep 0.1; done
	say "the disk is gone"
done
`

// WriteWatcher writes into a folder what QEMU boots a guest with that does as
// watcher says: "kernel", a link to that of Debian's cloud kernel, which is
// fetched if it is not cached, and "initrd".
func WriteWatcher(ctx context.Context, dir string) error {
	kernel, err := testenv.FetchKernel(kernels[0])
	if err != nil {
		return err
	}
	in, err := newInitramfs(ctx, kernel, watcher, "virtio_pci", "virtio_blk", "virtio_scsi", "sd_mod")
	if err != nil {
		return err
	}
	return errors.Join(os.Symlink(kernel.Image, filepath.Join(dir, "kernel")), in.writeFile(filepath.Join(dir, "initrd")))
}
