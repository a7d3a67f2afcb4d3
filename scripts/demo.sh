#!/bin/bash
# demo.sh BINDIR: shows what the service does to a running guest. Boots a small
# one under QEMU's emulation, starts vmdiskd, attaches a disk, has the guest
# write to it and read back all the while, grows the disk, stops and starts the
# service, detaches the disk. Ends with an error if anything is not as told.
set -euo pipefail
PATH=$(cd "${1:?usage: demo.sh BINDIR}" && pwd):$PATH:/usr/sbin:/sbin
export PATH
cd "$(dirname "$0")/.."

scripts/install-test-deps.sh busybox-static kmod qemu-system-x86 xz-utils

# Sockets have short names.
work=$(umask 077 && mktemp -d /tmp/vmdiskd-demo.XXXXXX)
console=$work/console
daemon=
qemu=

finish() {
	code=$?
	trap - EXIT
	# QEMU first: it flushes its disks, and would wait for a server that is gone.
	for p in $qemu $daemon; do
		kill "$p" 2>/dev/null || true
		wait "$p" || true
	done
	if [ $code != 0 ]; then
		for f in console qemu.log vmdiskd.log; do
			[ ! -e "$work/$f" ] || { echo "--- the end of $f:"; tail -n 15 "$work/$f"; } >&2
		done
	fi
	rm -rf "$work"
	exit $code
}
trap finish EXIT
trap 'exit 130' INT TERM

step() { printf '\n=== %s\n' "$*"; }

# told COMMAND...: prints a command.
told() {
	printf '$'
	printf ' %q' "$@"
	printf '\n'
}

# show COMMAND...: prints a command and runs it.
show() {
	told "$@"
	"$@"
}

# lines: what the guest has said, less the carriage returns of its console.
lines() { tr -d '\r' <"$console" | grep '^guest: ' || true; }

# rounds: how many rounds of writes the guest has read back.
rounds() { lines | grep -c 'read back' || true; }

# await SECONDS WHAT COMMAND...: until the command succeeds.
await() {
	local end=$((SECONDS + $1)) what=$2
	shift 2
	until "$@"; do
		if lines | grep 'ERROR'; then
			return 1
		fi
		if [ $SECONDS -ge $end ]; then
			echo "never: $what" >&2
			return 1
		fi
		sleep 0.1
	done
}

# says TEXT: the guest has said a line that has the text in it.
says() { lines | grep -q -F -e "$1"; }

# expect SECONDS TEXT: waits until the guest says the text, and shows it.
expect() {
	await "$1" "the guest says \"$2\"" says "$2"
	lines | grep -F -m 1 -e "$2"
}

more() { [ "$(rounds)" -ge "$1" ]; }

# load N: waits until the guest has done N more rounds.
load() {
	local before
	before=$(rounds)
	await 60 "$1 more rounds of writes" more $((before + $1))
	lines | tail -n 1
}

answers() { vmdiskctl status >/dev/null 2>&1; }

start_service() {
	told vmdiskd --config "$work/vmdiskd.toml"
	vmdiskd --config "$work/vmdiskd.toml" 2>>"$work/vmdiskd.log" &
	daemon=$!
	await 20 "the service answers" answers || { vmdiskctl status || exit 1; }
}

stop_service() {
	kill -TERM "$daemon"
	wait "$daemon"
	daemon=
}

boot() {
	local ports=() i
	for i in 1 2 3 4; do
		ports+=(-device "pcie-root-port,id=port$i,chassis=$i")
	done
	qemu-system-x86_64 -name demo -machine q35 -accel tcg -cpu max -smp 1 -m 256 \
		-nodefaults -display none -no-reboot -serial "file:$console" \
		-kernel "$work/kernel" -initrd "$work/initrd" -append "console=ttyS0 quiet panic=-1" \
		"${ports[@]}" -qmp "unix:$work/qmp,server=on,wait=off" 2>>"$work/qemu.log" &
	qemu=$!
	await 60 "the guest has booted" says ready
}

step "A guest boots: Debian's kernel in QEMU without KVM, four free PCIe ports, no disk"
: >"$console"
${GO:-go} run ./test/guest/mkguest "$work"
boot
lines | tail -n 1

step "The service starts, with a control socket and no export"
mkdir -m 700 "$work/state"
cat >"$work/vmdiskd.toml" <<END
[control]
socket = "$work/control"
state = "$work/state"

[images]
roots = ["$work"]
END
cat "$work/vmdiskd.toml"
export VMDISKD_SOCKET=$work/control
start_service
show truncate -s 64M "$work/disk.img"

step "The disk is attached to the running guest"
show vmdiskctl attach "$work/qmp" "$work/disk.img" --persist
expect 30 "a disk appears"
expect 30 "the disk has 64 MiB"
load 5
show vmdiskctl export list

step "The disk grows while the guest writes to it"
show vmdiskctl resize "$work/qmp" "$work/disk.img" +32M
expect 30 "the disk has 96 MiB"
load 5

step "The service stops and starts while the guest writes to the disk"
stop_service
echo "vmdiskd has ended; the guest waits"
start_service
load 5

step "The disk is detached"
show vmdiskctl detach "$work/qmp" "$work/disk.img"
expect 30 "the disk is gone"
show vmdiskctl export list
stop_service

step "What is in the image"
show head -n 1 "$work/disk.img" | tr -d '\0'
if lines | grep ERROR; then
	exit 1
fi
echo
echo "The guest has written and read back $(rounds) rounds without an error, in ${SECONDS} seconds."
