// Package guest boots Debian's kernel under QEMU's own emulation, so that a
// real guest kernel uses the server: as its root disk, through its nbd driver,
// over vsock. It needs neither root nor KVM. VMDISKD_TEST_SERVER=nbdkit runs
// the same scenarios with nbdkit.
package guest

import (
	"fmt"
	"io"
	"io/fs"
)

// Kinds of files, as stat(2) has them in st_mode.
const (
	modeDir     = 0o040000
	modeFile    = 0o100000
	modeSymlink = 0o120000
	modeChar    = 0o020000
)

// cpioWriter writes the "newc" archive that the kernel unpacks as initramfs.
// Everything in it belongs to root. The first error sticks and is returned by
// Close.
type cpioWriter struct {
	w   io.Writer
	ino int
	err error
}

// dir adds a folder; its parents must have been added before.
func (c *cpioWriter) dir(name string) { c.entry(name, modeDir|0o755, 0, nil) }

// file adds a file with the permission bits of perm.
func (c *cpioWriter) file(name string, perm fs.FileMode, data []byte) {
	c.entry(name, modeFile|int(perm.Perm()), 0, data)
}

// symlink adds a symbolic link to target.
func (c *cpioWriter) symlink(name, target string) {
	c.entry(name, modeSymlink|0o777, 0, []byte(target))
}

// char adds a character device of major 0 to 255 with minor 0 to 255.
func (c *cpioWriter) char(name string, major, minor int) {
	c.entry(name, modeChar|0o600, major<<8|minor, nil)
}

// Close ends the archive and returns the first error.
func (c *cpioWriter) Close() error {
	c.entry("TRAILER!!!", 0, 0, nil)
	return c.err
}

// entry writes the header of 13 hexadecimal fields, the name and the data,
// the latter two padded to multiples of 4 bytes
// (Documentation/driver-api/early-userspace/buffer-format.rst).
func (c *cpioWriter) entry(name string, mode, rdev int, data []byte) {
	c.ino++
	links := 1
	if mode&modeDir != 0 && mode&modeFile != modeFile {
		links = 2
	}
	head := fmt.Sprintf("070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%s\x00",
		c.ino, mode, 0, 0, links, 0, len(data), 0, 0, rdev>>8, rdev&0xff, len(name)+1, 0, name)
	c.write([]byte(head))
	c.pad(len(head))
	c.write(data)
	c.pad(len(data))
}

func (c *cpioWriter) pad(n int) { c.write(make([]byte, -n&3)) }

func (c *cpioWriter) write(p []byte) {
	if c.err == nil {
		_, c.err = c.w.Write(p)
	}
}
