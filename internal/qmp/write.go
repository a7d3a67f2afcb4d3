package qmp

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// DialSocket connects to the Unix socket at path, which is a path whatever it
// begins with: no abstract name. One that no socket can have is ErrInvalid.
func DialSocket(ctx context.Context, path string) (*net.UnixConn, error) {
	if strings.HasPrefix(path, "@") {
		path = "./" + path
	}
	if path == "" || len(path) > limits.QEMUSocketPath || strings.ContainsRune(path, 0) {
		return nil, fmt.Errorf("%w socket path %.200q: 1 to %d bytes, none of them zero", ErrInvalid, path, limits.QEMUSocketPath)
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	if i, bad := os.Stat(path); err != nil && bad == nil && i.Mode()&fs.ModeSocket == 0 {
		return nil, errors.New("it is no socket") // a kernel says that nobody listens
	}
	if err != nil {
		return nil, err
	}
	return conn.(*net.UnixConn), nil
}

// write sends b, with files along its first byte, before ctx's deadline. sent
// is true once the peer may have got a part of b.
func write(ctx context.Context, conn *net.UnixConn, b []byte, files []*os.File) (sent bool, err error) {
	rights, release, err := descriptors(files)
	if err != nil {
		return false, err
	}
	defer release()
	defer until(ctx, conn.SetWriteDeadline)()
	n := 0
	if rights != nil {
		if n, _, err = conn.WriteMsgUnix(b, rights, nil); err != nil {
			return n > 0, because(ctx, err)
		}
	}
	rest, err := conn.Write(b[n:])
	return n+rest > 0, because(ctx, err)
}

// until has the deadline that set sets pass as soon as ctx is done, until
// release is called.
func until(ctx context.Context, set func(time.Time) error) (release func()) {
	deadline, _ := ctx.Deadline()
	set(deadline) // an error means a closed connection, which the caller will see
	fired := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		set(time.Unix(1, 0))
		close(fired)
	})
	return func() {
		if !stop() {
			<-fired // not later, over the next caller's deadline
		}
	}
}

// because says what an error of a connection with the deadline of ctx means. An
// error of ctx is not told before ctx is done: the caller will look at ctx.
func because(ctx context.Context, err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		<-ctx.Done() // whose timer is a moment late
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return lost(err)
}

// descriptors is the control message that passes files. release is called
// after it was sent.
func descriptors(files []*os.File) (rights []byte, release func(), err error) {
	var fds []int
	release = func() {
		for _, fd := range fds {
			unix.Close(fd)
		}
	}
	if len(files) == 0 {
		return nil, release, nil
	}
	if len(files) > limits.QMPFiles {
		return nil, release, fmt.Errorf("%w: %d descriptors, at most %d", ErrInvalid, len(files), limits.QMPFiles)
	}
	for _, f := range files {
		fd, err := duplicate(f)
		if err != nil {
			release()
			return nil, func() {}, err
		}
		fds = append(fds, fd)
	}
	return unix.UnixRights(fds...), release, nil
}

// duplicate keeps the descriptor alive whatever its owner does.
func duplicate(f *os.File) (int, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return -1, err
	}
	fd, dupErr := -1, error(nil)
	err = raw.Control(func(p uintptr) {
		fd, dupErr = unix.FcntlInt(p, unix.F_DUPFD_CLOEXEC, 0)
	})
	if err == nil {
		err = dupErr
	}
	return fd, err
}

// strictly decodes one JSON value without unknown members.
func strictly(b []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("something after the value")
	}
	return nil
}
