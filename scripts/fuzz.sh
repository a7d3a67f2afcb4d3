#!/bin/sh
# fuzz.sh TIME: runs every fuzz target of the module for that long, a count like
# 2000x or a time like 60s, one after the other. A finding stays in the package's
# testdata/fuzz.
set -eu
time=${1:?usage: fuzz.sh TIME}
list=$(mktemp)
trap 'rm -f "$list"' EXIT

# go test -list prints the names of a package and then its closing line.
go test -list '^Fuzz' ./... >"$list"
failed=0
awk '/^Fuzz/ { name[n++] = $1 } /^ok/ { for (i = 0; i < n; i++) print $2, name[i]; n = 0 }' "$list" |
{
	while read -r package name; do
		echo "fuzz $package $name"
		go test -run '^$' -fuzz "^$name\$" -fuzztime "$time" "$package" </dev/null || failed=1
	done
	exit $failed
}
