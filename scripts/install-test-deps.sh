#!/bin/sh
# install-test-deps.sh [--check] [PACKAGE...]: installs the Debian packages that
# the tests use, or those that are named, if any is missing. With --check it
# only names them.
set -eu
check=
if [ "${1:-}" = --check ]; then
	check=yes
	shift
fi

packages="
apparmor
busybox-static
curl
e2fsprogs
fdisk
fio
fuse3
gcc
kmod
libc6-dev
libnbd-bin
libvirt-clients
libvirt-daemon
libvirt-daemon-driver-qemu
mmdebstrap
nbd-client
nbdkit
python3-libnbd
qemu-guest-agent
qemu-system-x86
qemu-utils
rpm
selinux-policy-dev
setools
systemd
util-linux
xz-utils
"
[ $# = 0 ] || packages=$*

missing=
for p in $packages; do
	status=$(dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null || true)
	[ "$status" = installed ] || missing="$missing $p"
done
# The guests' kernel is downloaded by name, which takes package lists.
lists=yes
apt-cache show linux-image-cloud-amd64 >/dev/null 2>&1 || lists=
if [ -z "$missing" ] && [ -n "$lists" ]; then
	exit 0
fi
if [ -n "$check" ]; then
	echo "missing packages:${missing:- none}; package lists: ${lists:-missing}" >&2
	exit 1
fi

sudo=
if [ "$(id -u)" != 0 ]; then
	if ! command -v sudo >/dev/null || ! sudo -n true 2>/dev/null; then
		echo "missing packages:$missing" >&2
		echo "as root: apt-get update; apt-get install --no-install-recommends$missing" >&2
		exit 1
	fi
	sudo=sudo
fi

apt() {
	$sudo env DEBIAN_FRONTEND=noninteractive apt-get -q -y "$@"
}

[ -n "$lists" ] || apt update
if [ -n "$missing" ]; then
	# The lists may name versions that the mirror has replaced: one update,
	# only if the packages cannot be installed as it is.
	# shellcheck disable=SC2086 # the list is split into words on purpose
	apt install --no-install-recommends $missing ||
		{ apt update && apt install --no-install-recommends $missing; }
fi
