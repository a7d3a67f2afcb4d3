// The race detector makes sync.Pool forget at random.
//go:build !race

package nbd

import (
	"encoding/binary"
	"io"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/backing/open"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

// rawClient speaks to the server by bare system calls on a blocking socket:
// it allocates nothing, so what is counted is the server's.
type rawClient struct {
	fd  int
	req []byte
	in  []byte
}

func (r *rig) rawClient(t testing.TB) *rawClient {
	t.Helper()
	ours, theirs := socketpair(t)
	r.serve(t, theirs)
	fd, err := unix.Dup(int(ours.Fd()))
	ours.Close()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	c := &rawClient{fd: fd, in: make([]byte, 1<<21)}
	f := os.NewFile(uintptr(mustDup(t, fd)), "handshake")
	defer f.Close()
	var greeting [18]byte
	if _, err := io.ReadFull(f, greeting[:]); err != nil {
		t.Fatal(err)
	}
	b := binary.BigEndian.AppendUint32(nil, wire.FlagFixedNewstyle|wire.FlagNoZeroes)
	b = wire.AppendOption(b, wire.OptExportName, nil)
	if _, err := f.Write(b); err != nil {
		t.Fatal(err)
	}
	var export [10]byte
	if _, err := io.ReadFull(f, export[:]); err != nil {
		t.Fatal(err)
	}
	return c
}

func mustDup(t testing.TB, fd int) int {
	t.Helper()
	d, err := unix.Dup(fd)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// round sends the prepared requests in one write and reads n bytes of replies.
func (c *rawClient) round(n int) bool {
	for p := c.req; len(p) > 0; {
		k, err := unix.Write(c.fd, p)
		if err != nil {
			return false
		}
		p = p[k:]
	}
	for n > 0 {
		k, err := unix.Read(c.fd, c.in[:min(n, len(c.in))])
		if err != nil || k == 0 {
			return false
		}
		n -= k
	}
	return true
}

// batch prepares count requests of size bytes each at consecutive places.
func (c *rawClient) batch(cmd wire.Cmd, count, size int) (reply int) {
	c.req = c.req[:0]
	for i := range count {
		c.req = wire.AppendRequest(c.req, wire.Request{Cmd: cmd, Cookie: uint64(i), Off: uint64(i * size), Len: uint64(size)})
		if cmd == wire.CmdWrite {
			c.req = append(c.req, make([]byte, size)...)
		}
	}
	reply = count * wire.SimpleReplySize
	if cmd == wire.CmdRead {
		reply += count * size
	}
	return reply
}

var hotPaths = []struct {
	name   string
	cmd    wire.Cmd
	count  int
	size   int
	engine string
	cache  string
}{
	{"read 4 KiB one by one", wire.CmdRead, 1, 4096, "pool", ""},
	{"read 4 KiB 32 at a time", wire.CmdRead, 32, 4096, "pool", ""},
	{"read 1 MiB by sendfile", wire.CmdRead, 1, 1 << 20, "pool", ""},
	{"write 4 KiB one by one", wire.CmdWrite, 1, 4096, "pool", ""},
	{"write 4 KiB 32 at a time", wire.CmdWrite, 32, 4096, "pool", ""},
	{"write 1 MiB", wire.CmdWrite, 1, 1 << 20, "pool", ""},
	{"direct read by the ring", wire.CmdRead, 32, 4096, "uring", open.CacheNone},
	{"direct write by the ring", wire.CmdWrite, 32, 4096, "uring", open.CacheNone},
	{"direct read by the pool", wire.CmdRead, 32, 4096, "pool", open.CacheNone},
	{"direct write by the pool", wire.CmdWrite, 32, 4096, "pool", open.CacheNone},
}

// hotPath prepares rounds of a row: the client, and the bytes of its replies.
func hotPath(t testing.TB, i int) (*rawClient, int) {
	tt := hotPaths[i]
	c := fileRig(t, 8<<20, tt.engine, tt.cache).rawClient(t)
	n := c.batch(tt.cmd, tt.count, tt.size)
	for range 50 {
		if !c.round(n) {
			t.Fatal("connection lost")
		}
	}
	return c, n
}

func TestHotPathAllocatesNothing(t *testing.T) {
	for i, tt := range hotPaths {
		t.Run(tt.name, func(t *testing.T) {
			c, n := hotPath(t, i)
			if got := testing.AllocsPerRun(200, func() { c.round(n) }); got > 0 {
				t.Errorf("allocations per round: got %v, want 0", got)
			}
		})
	}
}

func BenchmarkHotPath(b *testing.B) {
	for i, tt := range hotPaths {
		b.Run(tt.name, func(b *testing.B) {
			c, n := hotPath(b, i)
			b.SetBytes(int64(tt.count * tt.size))
			b.ReportAllocs()
			for b.Loop() {
				if !c.round(n) {
					b.Fatal("connection lost")
				}
			}
		})
	}
}
