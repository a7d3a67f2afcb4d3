package guest

// fleet is what a guest does that uses every disk it sees. For each it says on
// the console, in lines that begin with "guest: " and the disk's serial number,
// when the disk appears, which size it has, how many rounds of writes it has
// read back, and how it ends: in "gone", or in "ERROR". A disk whose
// serial number begins with "IDLE" is left alone, and one with "FIO" is written
// as a whole by fio, which the guest must have then. An agent answers at the
// first port of a virtio console, if there is one.
const fleet = `
say() { printf 'guest: %s\n' "$*"; }

serial() {
	cat /sys/block/$1/serial 2>/dev/null && return
	cat /sys/block/$1/device/serial 2>/dev/null && return
	tail -c +5 /sys/block/$1/device/vpd_pg80
}

# lost ends a disk: a request that fails while it is taken out is not lost, its
# guest has let go of it.
lost() {
	sleep 2
	[ ! -e $sys ] || { say "$name ERROR: $1"; dmesg | tail -n 5; }
	exit 1
}

# check SEEK: 64 KiB go to the disk and come back, past the page cache.
check() {
	dd if=$own/data of=$disk bs=64k seek=$1 oflag=direct conv=notrunc,fsync 2>/dev/null || lost "cannot write at $1"
	dd if=$disk of=$own/back bs=64k skip=$1 count=1 iflag=direct 2>/dev/null || lost "cannot read at $1"
	cmp $own/data $own/back >/dev/null || lost "what is at $1 is not what was written"
}

# by_dd writes 64 KiB at the end of the disk, and at a place that moves.
by_dd() {
	dd if=/dev/urandom of=$own/data bs=64k count=1 2>/dev/null
	check $((size * 16 - 1))
	check $((n % (size * 16 - 1)))
}

# verified OPTION...: fio with the checksums of this round's writes.
verified() {
	fio --name=disk --filename=$disk --size=${size}M --randseed=$n --direct=1 --ioengine=libaio --iodepth=16 --rw=randwrite \
		--bs=32k --verify=crc32c --verify_fatal=1 --verify_state_save=0 "$@" >$own/fio 2>&1
}

# by_fio writes the whole disk in another order each time, and reads it back. A
# request that the kernel has sent again counts as lost. A block that fio has not
# written has to be noticed, once.
by_fio() {
	say "$name round $((n + 1)) begins"
	verified || lost "fio: $(tail -n 5 $own/fio)"
	! dmesg | grep 'I/O error' || lost "a request has failed"
	[ $n = 0 ] || return 0
	dd if=/dev/urandom of=$disk bs=32k seek=7 count=1 oflag=direct conv=notrunc,fsync 2>/dev/null || lost "cannot write"
	! verified --verify_only || lost "fio has not noticed a block of other data"
	say "$name another block is noticed"
}

rounds() {
	n=0
	size=0
	how=by_dd
	case $name in FIO*) how=by_fio ;; esac
	while :; do
		now=$(($(cat $sys/size 2>/dev/null || echo 0) / 2048))
		[ $now -gt 1 ] || lost "it has $now MiB"
		if [ $now != $size ]; then
			size=$now
			say "$name has $size MiB"
		fi
		$how
		n=$((n + 1))
		say "$name round $n"
	done
}

use() {
	sys=/sys/block/$1
	disk=/dev/$1
	own=/run/disk-$1
	while [ ! -b $disk ]; do sleep 0.1; done
	name=$(serial $1 | tr -d ' \n')
	say "$name appears"
	case $name in IDLE*) ;; *) (rounds) || : ;; esac
	while [ -e $sys ]; do sleep 0.1; done
	say "$name gone"
	rmdir $own || rm -r $own
}

for port in /dev/vport*; do
	[ -c $port ] || continue
	mkdir -p /run/qga
	qemu-ga -p $port -t /run/qga >/run/qga/log 2>&1 &
done
# The driver of nvme gives a request up after 30 s, whatever its disk says.
limit=/sys/module/nvme_core/parameters/io_timeout
[ ! -e $limit ] || echo 600 >$limit
say "ready"
while :; do
	set -- /sys/block/vd[a-z] /sys/block/sd[a-z] /sys/block/nvme[0-9]n1
	for sys in "$@"; do
		[ -e "$sys" ] || continue
		mkdir "/run/disk-${sys##*/}" 2>/dev/null || continue
		(use "${sys##*/}") &
	done
	sleep 0.2
done
`
