package layer

import (
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// clusterStore keeps the contents of clusters by their number. Calls for one
// cluster do not overlap, unless they all read.
type clusterStore interface {
	read(c cluster, p []byte, off int64) error
	write(c cluster, p []byte, off int64) error
	forget(c cluster)
	close() error
}

// memoryStore keeps clusters in memory.
type memoryStore struct {
	mu       sync.RWMutex
	clusters map[cluster]*[clusterSize]byte // guarded by mu, not what it points to
}

func (s *memoryStore) get(c cluster) *[clusterSize]byte {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.clusters[c]
}

func (s *memoryStore) read(c cluster, p []byte, off int64) error {
	copy(p, s.get(c)[off:])
	return nil
}

func (s *memoryStore) write(c cluster, p []byte, off int64) error {
	b := s.get(c)
	if b == nil {
		b = new([clusterSize]byte)
		s.mu.Lock()
		s.clusters[c] = b
		s.mu.Unlock()
	}
	copy(b[off:], p)
	return nil
}

func (s *memoryStore) forget(c cluster) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.clusters, c)
}

func (s *memoryStore) close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.clusters = nil
	return nil
}

// fileStore keeps clusters in a file, each at its number.
type fileStore struct{ f *os.File }

func (s fileStore) read(c cluster, p []byte, off int64) error {
	_, err := s.f.ReadAt(p, int64(c)*clusterSize+off)
	return err
}

func (s fileStore) write(c cluster, p []byte, off int64) error {
	_, err := s.f.WriteAt(p, int64(c)*clusterSize+off)
	return err
}

// forget gives the space back where the file system can.
func (s fileStore) forget(c cluster) {
	_ = unix.Fallocate(int(s.f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, int64(c)*clusterSize, clusterSize)
}

func (s fileStore) close() error { return s.f.Close() }
