// Package version is which vmdiskd and vmdiskctl this is.
package version

// Version is that of both programs; the linker sets that of a package.
var Version = "0.1.0"
