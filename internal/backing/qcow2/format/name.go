package format

import "strings"

// Protocol is what name begins with, if QEMU takes that for a protocol and not for
// a part of a file's name: what stands before a colon that is before any slash
// (path_has_protocol).
func Protocol(name string) (protocol string, ok bool) {
	head, _, _ := strings.Cut(name, "/")
	protocol, _, ok = strings.Cut(head, ":")
	return protocol, ok
}

// FileName is path as an image names it as its backing file or data file: never a
// protocol.
func FileName(path string) string {
	if _, ok := Protocol(path); ok {
		return "./" + path
	}
	return path
}
