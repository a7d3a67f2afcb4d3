package open_test

import (
	"os"
	"os/signal"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/backing/open"
)

// lease takes a lease on a file, as an NFS server does for its clients, and gives it
// back when somebody opens the file. broken has one token then.
func lease(t *testing.T, path string) (broken <-chan bool) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	asked, gone, done := make(chan os.Signal, 1), make(chan bool), make(chan bool, 1)
	signal.Notify(asked, unix.SIGIO)
	fd := f.Fd()
	if _, err := unix.FcntlInt(fd, unix.F_SETLEASE, unix.F_RDLCK); err != nil {
		t.Fatalf("lease on %s: %v", path, err)
	}
	ended := make(chan bool)
	go func() {
		defer close(ended)
		select {
		case <-asked:
			_, err := unix.FcntlInt(fd, unix.F_SETLEASE, unix.F_UNLCK)
			done <- err == nil
		case <-gone:
		}
	}()
	t.Cleanup(func() {
		close(gone)
		<-ended
		signal.Stop(asked)
		_ = f.Close()
	})
	return done
}

// TestLeaseIsWaitedFor: the open that asks for it does not wait.
func TestLeaseIsWaitedFor(t *testing.T) {
	for _, tt := range []struct {
		name string
		set  func(s *open.Spec)
	}{
		{"anywhere", func(*open.Spec) {}},
		{"in a folder of images", func(s *open.Spec) { s.Roots = []string{filepath.Dir(s.Path)} }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, _ := newSpec(t)
			s.Format, s.Path = "raw", image(t, 1<<20)
			tt.set(&s)
			broken := lease(t, s.Path)
			mustOpen(t, s)
			if !<-broken {
				t.Error("the lease was not given back")
			}
		})
	}
}
