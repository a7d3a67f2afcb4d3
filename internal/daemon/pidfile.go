package daemon

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// pidFile is that of --pidfile. It is opened while there are the rights to do so,
// and gets the number of the process when the server is ready: until then it is
// empty, or has what was in it, which may be the number of another server. One
// that is locked is another vmdiskd's, and one that has anything else is no PID file.
type pidFile struct {
	path   string
	file   *os.File
	filled bool
}

// openPIDFile opens the file, or takes it over from stage 0.
func (d *daemon) openPIDFile() error {
	path := d.cfg.PIDFile
	if path == "" {
		return nil
	}
	f, err := d.cfg.Handed.pidFile()
	for f == nil && err == nil {
		f, err = lockPIDFile(path)
	}
	if err != nil {
		return fmt.Errorf("PID file %q: %w", path, err)
	}
	d.pid = &pidFile{path: path, file: f}
	return nil
}

// lockPIDFile opens and locks the file. It is nil if another server has removed
// it meanwhile.
func lockPIDFile(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NONBLOCK, 0o644)
	if err != nil {
		return nil, err
	}
	ours, err := f.Stat()
	switch {
	case err != nil:
	case !ours.Mode().IsRegular():
		err = errors.New("it is no regular file")
	default:
		if err = onlyPID(f); err == nil {
			err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		}
	}
	if errors.Is(err, unix.EWOULDBLOCK) {
		err = errors.New("it is that of another vmdiskd, which runs")
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	if there, err := os.Stat(path); err != nil || !os.SameFile(there, ours) {
		return nil, f.Close()
	}
	return f, nil
}

// onlyPID refuses a file that has more than a number: it is overwritten, and removed
// at the end. A crash may have left zeroes.
func onlyPID(f *os.File) error {
	p := make([]byte, limits.PIDFile+1)
	n, err := f.ReadAt(p, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if n > limits.PIDFile || len(bytes.Trim(p[:n], "0123456789 \n\x00")) > 0 {
		return errors.New("it has something else than a process ID, and would be lost")
	}
	return nil
}

// fillPIDFile writes the number of the process.
func (d *daemon) fillPIDFile() error {
	if d.pid == nil {
		return nil
	}
	d.pid.filled = true
	err := d.pid.file.Truncate(0)
	if err == nil {
		_, err = fmt.Fprintln(d.pid.file, os.Getpid())
	}
	if err != nil {
		return fmt.Errorf("PID file: %w", err)
	}
	return nil
}

// removePIDFile removes the file, if it is this server's. Where that is forbidden to
// this user it is left empty.
func (d *daemon) removePIDFile() {
	p := d.pid
	if p == nil {
		return
	}
	ours, err := p.file.Stat()
	if !p.filled && (err != nil || ours.Size() > 0) {
		return // another server's
	}
	if there, lost := os.Stat(p.path); err == nil && lost == nil && !os.SameFile(there, ours) {
		return // that of another server, after somebody has removed ours
	}
	err = os.Remove(p.path)
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		return
	}
	d.warn("the PID file cannot be removed and is left empty", "error", errors.Join(err, p.file.Truncate(0)))
}

// warn is for what goes wrong at the end, which may come before there is a log.
func (d *daemon) warn(msg string, args ...any) {
	if d.log != nil {
		d.log.Warn(msg, args...)
	}
}
