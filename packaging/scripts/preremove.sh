#!/bin/sh
# Before the files go: dpkg says "remove" or "upgrade", rpm how many versions
# will be left.
set -e

case "$1" in
remove | 0) ;;
*) exit 0 ;;
esac
if [ -d /run/systemd/system ]; then
	systemctl stop vmdiskd.socket vmdiskd-vsock.socket 'vmdiskd@*.socket' vmdiskd.service 'vmdiskd@*.service' || true
fi
for link in /etc/systemd/system/*.wants/vmdiskd*; do
	unit=${link##*/}
	case "$unit" in
	vmdiskd.* | vmdiskd-vsock.* | vmdiskd@* | vmdiskd-swap@*) systemctl --no-reload disable "$unit" >/dev/null 2>&1 || true ;;
	esac
done
