package kernel

import (
	"io"
	"net"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/transport"
)

// Relay copies the bytes of one connection between the driver, which takes Unix
// sockets, and a server that is reached over vsock or with TLS. It looks at
// none of them. When either side ends, both do.
type Relay struct {
	server net.Conn
	driver transport.Conn
	once   sync.Once
	done   sync.WaitGroup
}

// NewRelay begins to copy. The file is the driver's end, and the caller's. The
// relay owns server, also when it fails.
func NewRelay(server net.Conn) (*Relay, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		server.Close()
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	file, ours := os.NewFile(uintptr(fds[0]), "nbd relay"), os.NewFile(uintptr(fds[1]), "nbd relay")
	driver, err := transport.FileConn(ours)
	ours.Close()
	if err != nil {
		file.Close()
		server.Close()
		return nil, nil, err
	}
	r := &Relay{server: server, driver: driver}
	r.done.Add(2)
	go r.copyLoop(server, driver)
	go r.copyLoop(driver, server)
	return r, file, nil
}

func (r *Relay) copyLoop(to, from net.Conn) {
	defer r.done.Done()
	defer r.end()
	// The error says that one of them ended, which is all there is to know.
	_, _ = io.CopyBuffer(plainWriter{to}, plainReader{from}, make([]byte, limits.RelayBuffer))
}

// plainReader and plainWriter hide shortcuts that would not use the buffer.
type (
	plainReader struct{ io.Reader }
	plainWriter struct{ io.Writer }
)

func (r *Relay) end() {
	r.once.Do(func() {
		r.driver.Close()
		r.server.Close()
	})
}

// Close ends both sides and waits for the copying to end.
func (r *Relay) Close() {
	r.end()
	r.done.Wait()
}
