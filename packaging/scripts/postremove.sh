#!/bin/sh
# After the files are gone: dpkg says "remove", "purge" or "upgrade", rpm how
# many versions are left.
set -e

if [ -d /run/systemd/system ]; then
	systemctl daemon-reload || true
fi
case "$1" in
purge | 0) ;;
*) exit 0 ;;
esac
rm -rf /run/vmdiskd
if [ "$1" = purge ]; then
	rm -rf /var/lib/vmdiskd/exports /var/lib/vmdiskd/vm
	rmdir --ignore-fail-on-non-empty /etc/vmdiskd/vm /etc/vmdiskd/swap /etc/vmdiskd 2>/dev/null || true
fi
# Images of guests are never removed. The user stays, and its group: another
# account with the same numbers would own them.
rmdir /var/lib/vmdiskd/images /var/lib/vmdiskd/exports /var/lib/vmdiskd/vm /var/lib/vmdiskd 2>/dev/null || true
