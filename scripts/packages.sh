#!/bin/sh
# packages.sh [FOLDER]: builds the Debian and the RPM package into FOLDER (dist
# if there is none). VERSION and GOARCH can be set; SOURCE_DATE_EPOCH makes the
# times in them those of the last commit unless it is set.
set -eu
cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:-dist}" && cd "${1:-dist}" && pwd)
GO=${GO:-go}
VERSION=${VERSION:-0.1.0}
GOARCH=${GOARCH:-$($GO env GOARCH)}
: "${SOURCE_DATE_EPOCH:=$(git log -1 --format=%ct 2>/dev/null || echo 0)}"
export VERSION GOARCH SOURCE_DATE_EPOCH CGO_ENABLED=0

# The overlay is what TLS with pre-shared keys needs; make sets it too.
case " ${GOFLAGS:-}" in
*-overlay=*) ;;
*)
	GOARCH= $GO run ./scripts/tlsoverlay "$PWD/.cache/tls"
	export GOFLAGS="${GOFLAGS:-} -overlay=$PWD/.cache/tls/overlay.json"
	;;
esac

# What the packages take lies beneath STAGE.
STAGE=$(mktemp -d)
trap 'rm -rf "$STAGE"' EXIT
export STAGE
umask 022

module=github.com/vmdiskd/vmdiskd
$GO build -trimpath -o "$STAGE/" \
	-ldflags "-s -w -X $module/internal/version.Version=$VERSION" ./cmd/...

mkdir "$STAGE/man" "$STAGE/completions"
for page in docs/man/*.[1-9]; do
	gzip -9n <"$page" >"$STAGE/man/$(basename "$page").gz"
done

# Completions are what the program says of itself, so it has to run here.
ctl=$STAGE/vmdiskctl
if [ "$GOARCH" != "$($GO env GOHOSTARCH)" ]; then
	ctl=$STAGE/host-vmdiskctl
	GOARCH=$($GO env GOHOSTARCH) $GO build -o "$ctl" ./cmd/vmdiskctl
fi
for shell in bash zsh fish; do
	"$ctl" completion $shell >"$STAGE/completions/$shell"
done

for kind in deb rpm; do
	$GO tool -modfile=tools/go.mod nfpm package --config packaging/nfpm.yaml --packager $kind --target "$out"
done
