#!/bin/sh
# After the files are gone: dpkg says "remove", "purge" or "upgrade", rpm how
# many versions are left. All paths begin with DPKG_ROOT, which may be empty.
set -e

# forget removes what daemons have kept beneath the current folder, by the names
# that internal/config gives it, and then the folders of instances that are empty.
# It goes through no link and into nothing that is mounted, and leaves all else: an
# instance may have its images there.
forget() {
	find . -mindepth 1 -maxdepth 3 -xdev -type d -execdir mountpoint -q {} \; -prune -o \
		-type f -regextype posix-extended \
		-regex '\./(exports|vm/[^/]+)/([^/]+\.json|\.[^/]+\.json\.(new|try)|\.lock)' -execdir rm -f {} +
	find . -mindepth 2 -maxdepth 2 -xdev -type d -path './vm/*' -execdir rmdir {} + 2>/dev/null || true
}

if [ -d "$DPKG_ROOT/run/systemd/system" ]; then
	systemctl daemon-reload || true
fi
case "$1" in
purge | 0) ;;
*) exit 0 ;;
esac
cd "$DPKG_ROOT/"
rm -rf run/vmdiskd
if [ "$1" = purge ]; then
	if [ -d var/lib/vmdiskd ]; then
		(cd var/lib/vmdiskd && forget)
	fi
	rmdir --ignore-fail-on-non-empty etc/vmdiskd/vm etc/vmdiskd/swap etc/vmdiskd 2>/dev/null || true
fi
# Images of guests are never removed. The user stays, and its group: another
# account with the same numbers would own them.
rmdir var/lib/vmdiskd/images var/lib/vmdiskd/exports var/lib/vmdiskd/vm var/lib/vmdiskd 2>/dev/null || true
