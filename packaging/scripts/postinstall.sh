#!/bin/sh
# After the files are there. dpkg calls it with "configure" and the version
# before, rpm with the number of versions installed.
set -e

systemd-sysusers vmdiskd.conf
systemd-tmpfiles --create vmdiskd.conf

# The units enter the profile if it is loaded.
if [ -e /etc/apparmor.d/vmdiskd ] && [ -d /sys/kernel/security/apparmor ] && command -v apparmor_parser >/dev/null; then
	apparmor_parser --replace --write-cache /etc/apparmor.d/vmdiskd || true
fi

if [ -d /run/systemd/system ]; then
	systemctl daemon-reload
	# Listeners wait in systemd meanwhile: no client is refused.
	systemctl try-restart vmdiskd.service 'vmdiskd@*.service' || true
fi
