package transport

import (
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"testing"
)

func TestPlainListenerHasTheSamePath(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := ListenUnix(t.Context(), Endpoint{Path: path, Mode: 0o660})
	if err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(path)
	if err != nil || st.Mode().Perm() != 0o660 {
		t.Errorf("socket: got %v, %v, want mode 660", st, err)
	}
	dialled := make(chan error, 1)
	go func() {
		c, err := net.Dial("unix", path)
		if err == nil {
			err = c.Close()
		}
		dialled <- err
	}()
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := c.(*net.UnixConn); !ok {
		t.Errorf("got a %T, want a *net.UnixConn", c)
	}
	_ = c.Close()
	if err := <-dialled; err != nil {
		t.Error(err)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(path); !os.IsNotExist(err) {
		t.Errorf("after close: got %v, want %v", err, fs.ErrNotExist)
	}
}
