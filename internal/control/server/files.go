package server

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"golang.org/x/sys/unix"
)

// fdUse is one place of a request that stands for a descriptor.
type fdUse struct {
	ref   string // "fd:N", or a path
	where string // for the error
	write bool   // it must be open for writing
}

// addUses are the places of a. Nothing is written to the image itself below a
// temporary overlay.
func addUses(a *api.AddExport) []fdUse {
	write := !a.ReadOnly && a.Overlay == nil
	uses := []fdUse{{a.Image, "image", write}}
	for _, f := range a.BackingFiles {
		uses = append(uses, fdUse{withoutFormat(f), "backing-files", false})
	}
	for _, f := range a.DataFiles {
		uses = append(uses, fdUse{f, "data-files", write})
	}
	return uses
}

// withoutFormat takes a format off the end of a file's name.
func withoutFormat(s string) string {
	for _, format := range [...]string{":raw", ":qcow2"} {
		if file, ok := strings.CutSuffix(s, format); ok {
			return file
		}
	}
	return s
}

// checkFiles refuses descriptors that are not what uses say: each is named
// once and no other is, it is a regular file or a block device, and open for
// what is to be done with it.
func checkFiles(files []*os.File, uses []fdUse) error {
	used := make([]bool, len(files))
	for _, u := range uses {
		digits, ok := strings.CutPrefix(u.ref, api.FilePrefix)
		if !ok {
			continue
		}
		n, err := strconv.ParseUint(digits, 10, 16)
		switch {
		case err != nil || strconv.FormatUint(n, 10) != digits:
			return invalid("%s: %q is not the number of a descriptor", u.where, u.ref)
		case n >= uint64(len(files)):
			return invalid("%s: %q did not come with the request", u.where, u.ref)
		case used[n]:
			return invalid("%s: %q is in use already", u.where, u.ref)
		}
		used[n] = true
		if err := checkFile(files[n], u.write); err != nil {
			return invalid("%s: %q %s", u.where, u.ref, err)
		}
	}
	for n, ok := range used {
		if !ok {
			return invalid("descriptor %d is not named in the request", n)
		}
	}
	return nil
}

func checkFile(f *os.File, write bool) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	inner := err
	if err := raw.Control(func(fd uintptr) { inner = checkFD(int(fd), write) }); err != nil {
		return err
	}
	return inner
}

func checkFD(fd int, write bool) error {
	flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
	if err != nil {
		return err
	}
	if flags&unix.O_PATH != 0 {
		return fmt.Errorf("is not open (O_PATH)")
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if t := st.Mode & unix.S_IFMT; t != unix.S_IFREG && t != unix.S_IFBLK {
		return fmt.Errorf("is no regular file and no block device")
	}
	switch mode := flags & unix.O_ACCMODE; {
	case mode == unix.O_WRONLY:
		return fmt.Errorf("is not open for reading")
	case write && mode != unix.O_RDWR:
		return fmt.Errorf("is not open for writing")
	}
	return nil
}
