#!/bin/sh
# run.sh VMDISKD [IMAGE]: serves an image on a Unix socket of the user until
# Ctrl-C. Without an image it makes a small ext4 disk with real files.
set -eu
vmdiskd=${1:?usage: run.sh VMDISKD [IMAGE]}
image=${2:-}
PATH=$PATH:/usr/sbin:/sbin

runtime=${XDG_RUNTIME_DIR:-/tmp}/vmdiskd
[ -n "${XDG_RUNTIME_DIR:-}" ] || runtime=/tmp/vmdiskd-$(id -u)
(umask 077 && mkdir -p "$runtime")
if [ ! -O "$runtime" ] || [ -L "$runtime" ]; then
	echo "$runtime belongs to somebody else" >&2
	exit 1
fi
chmod 700 "$runtime"

if [ -z "$image" ]; then
	if ! command -v mke2fs >/dev/null; then
		echo "needs mke2fs (package e2fsprogs) to make the demo disk;" >&2
		echo "or serve a disk of yours: make run IMAGE=disk.img" >&2
		exit 1
	fi
	mkdir -p .cache
	image=.cache/demo.img
	if [ ! -e "$image" ]; then
		files=$(mktemp -d)
		cp -R docs "$files/docs"
		echo "This file is on a disk that vmdiskd serves." >"$files/hello.txt"
		mke2fs -q -t ext4 -L vmdiskd-demo -d "$files" "$image.new" 64M >/dev/null
		mv "$image.new" "$image"
		rm -rf "$files"
	fi
fi

socket=$runtime/disk.sock
uri="nbd+unix:///?socket=$socket"
cat <<END
serving $image (Ctrl-C ends it)

  $uri

try in another terminal:

  $(dirname "$vmdiskd")/vmdiskctl info '$uri'
  qemu-img info '$uri'
  nbdcopy '$uri' copy.img

END
exec "$vmdiskd" -f -U "$socket" "$image"
