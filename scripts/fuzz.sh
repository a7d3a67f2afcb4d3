#!/bin/sh
# fuzz.sh TIME: runs every fuzz target of the module for that long, a count like
# 2000x or a time like 60s, one after the other. A finding stays in the package's
# testdata/fuzz.
set -eu
time=${1:?usage: fuzz.sh TIME}
cd "$(dirname "$0")/.."

# Asking `go test -list` for the names would build the tests of all packages.
grep -r '^func Fuzz' --include='*_test.go' . | sort |
	sed 's|^\(.*\)/[^/]*:func \(Fuzz[^(]*\)(.*|\1 \2|' |
{
	failed=0
	while read -r package name; do
		echo "fuzz $package $name"
		go test -run '^$' -fuzz "^$name\$" -fuzztime "$time" "$package" </dev/null || failed=1
	done
	exit $failed
}
