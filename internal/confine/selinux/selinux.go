// Package selinux asks and tells the kernel about SELinux labels: of sockets,
// of files, of peers. On machines without SELinux everything but reading
// contexts returns ErrDisabled; that is found out from selinuxfs and never from
// an error of the kernel, because without SELinux the kernel refuses any label
// of a socket with EINVAL, the error for a wrong one, and sets any label of a
// file.
package selinux

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"github.com/pkg/xattr"
	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

var (
	// ErrDisabled says that the machine has no SELinux, or that this process
	// cannot see it.
	ErrDisabled = errors.New("SELinux is not enabled")

	// ErrContext is for a context that the loaded policy does not know.
	ErrContext = errors.New("context is not valid in the loaded SELinux policy")
)

// attribute is the name of the extended attribute that holds a label.
const attribute = "security.selinux"

// System is where the kernel's files are. The zero value is this machine.
type System struct {
	FS   string // selinuxfs; "" is /sys/fs/selinux
	Proc string // procfs; "" is /proc
}

// Enabled reports whether this machine has SELinux.
func Enabled() bool { return System{}.Enabled() }

// Enforcing reports whether SELinux denies, instead of only telling.
func Enforcing() bool { return System{}.Enforcing() }

// CheckContext asks the loaded policy about a context. Errors are ErrDisabled,
// ErrSyntax, ErrContext, or what keeps the kernel from answering.
func CheckContext(context string) error { return System{}.CheckContext(context) }

// WithSocketLabel runs create, which makes sockets, on a thread whose sockets
// get the label. With the label "" it only runs create.
//
// create must use its own goroutine. The label is taken off the thread
// afterwards; if that fails the error says so, what create has made must be
// closed, and the goroutine stays on its thread, so that no other gets it.
func WithSocketLabel(label string, create func() error) error {
	return System{}.WithSocketLabel(label, create)
}

// WithFileLabel is as WithSocketLabel, for the files that create makes, the
// path of a Unix socket among them.
func WithFileLabel(label string, create func() error) error {
	return System{}.WithFileLabel(label, create)
}

// FileLabel reads the label of the file at path, not that of what a symbolic
// link there leads to.
func FileLabel(path string) (string, error) {
	b, err := xattr.LGet(path, attribute)
	return labelOf(b), bare("read the label", err)
}

// SocketLabel reads the label of a socket that is open in this process.
func SocketLabel(fd int) (string, error) {
	b := make([]byte, limits.SecurityLabel)
	n, err := unix.Fgetxattr(fd, attribute, b)
	if err != nil {
		return "", bare("read the label of a socket", err)
	}
	return labelOf(b[:n]), nil
}

// bare names what was done, and leaves of an error the kernel's number.
func bare(what string, err error) error {
	if err == nil {
		return nil
	}
	var no syscall.Errno
	if errors.As(err, &no) {
		err = no
	}
	return fmt.Errorf("%s: %w", what, err)
}

// labelOf cuts off the zero byte that labels end with.
func labelOf(b []byte) string { return strings.TrimRight(string(b), "\x00\n") }

func (s System) fs(name string) string {
	if s.FS == "" {
		s.FS = "/sys/fs/selinux"
	}
	return filepath.Join(s.FS, name)
}

func (s System) thread(name string) string {
	if s.Proc == "" {
		s.Proc = "/proc"
	}
	return filepath.Join(s.Proc, "thread-self/attr", name)
}

// Enabled is as the function of the package.
func (s System) Enabled() bool {
	_, ok := s.enforce()
	return ok
}

// Enforcing is as the function of the package.
func (s System) Enforcing() bool {
	enforcing, ok := s.enforce()
	return ok && enforcing
}

// enforce reads the file of that name; ok is false where there is none.
func (s System) enforce() (enforcing, ok bool) {
	text, err := read(s.fs("enforce"))
	return text == "1", err == nil && (text == "0" || text == "1")
}

// CheckContext is as the function of the package.
func (s System) CheckContext(context string) error {
	if !s.Enabled() {
		return ErrDisabled
	}
	if _, err := Parse(context); err != nil {
		return fmt.Errorf("context %q: %w", cut(context), err)
	}
	err := write(s.fs("context"), context)
	switch {
	case errors.Is(err, unix.EINVAL):
		return fmt.Errorf("%w: %q", ErrContext, context)
	case err != nil:
		return bare(fmt.Sprintf("ask the policy about context %q", context), err)
	}
	return nil
}

// WithSocketLabel is as the function of the package.
func (s System) WithSocketLabel(label string, create func() error) error {
	return s.with("sockcreate", label, create)
}

// WithFileLabel is as the function of the package.
func (s System) WithFileLabel(label string, create func() error) error {
	return s.with("fscreate", label, create)
}

// with sets an attribute of the thread while create runs.
func (s System) with(name, label string, create func() error) error {
	if label == "" {
		return create()
	}
	if err := s.CheckContext(label); err != nil {
		return err
	}
	runtime.LockOSThread()
	path := s.thread(name)
	if err := write(path, label); err != nil {
		runtime.UnlockOSThread()
		return bare(fmt.Sprintf("set %s to %q", name, label), err)
	}
	err := create()
	if resetErr := reset(path); resetErr != nil {
		return errors.Join(err, bare("take "+name+" back", resetErr))
	}
	runtime.UnlockOSThread()
	return err
}

// reset clears an attribute and looks whether it is gone.
func reset(path string) error {
	if err := write(path, ""); err != nil {
		return err
	}
	left, err := read(path)
	if err == nil && left != "" {
		err = fmt.Errorf("%q is still there", left)
	}
	return err
}

// write makes one call of write(2), for an empty text as well, which is how an
// attribute is cleared.
func write(path, text string) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_TRUNC, 0)
	if err != nil {
		return err
	}
	_, err = f.Write([]byte(text))
	return errors.Join(err, f.Close())
}

// read returns the content of a file of the kernel, up to the bound of a label.
func read(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, limits.SecurityLabel))
	return labelOf(b), err
}

// cut bounds a text that is quoted in an error.
func cut(s string) string {
	const most = 200
	if len(s) > most {
		return s[:most] + "..."
	}
	return s
}
