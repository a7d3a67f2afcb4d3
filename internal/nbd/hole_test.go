package nbd

import (
	"encoding/binary"
	"os"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

// structured opens a session with structured replies and base:allocation.
func (r *rig) structured() *chunkReader {
	r.t.Helper()
	c := r.dial(r.t)
	c.SetDeadline(time.Now().Add(hangLimit))
	r.expect(c, 18)
	r.send(c, sessionPrefixes[1])
	for acks := 0; acks < 3; {
		h, err := wire.DecodeOptReply(r.expect(c, wire.OptReplyHeaderSize))
		if err != nil {
			r.t.Fatal(err)
		}
		r.expect(c, int(h.Len))
		if h.Rep == wire.RepAck {
			acks++
		}
	}
	return &chunkReader{rig: r, send: func(b []byte) { r.send(c, b) }, expect: func(n int) []byte { return r.expect(c, n) }}
}

// chunkReader sends requests one by one and reads the chunks of their replies.
type chunkReader struct {
	*rig
	send   func([]byte)
	expect func(int) []byte
}

// do returns the type of the first chunk and the payload of all.
func (k *chunkReader) do(req wire.Request) (first wire.ChunkType, payload []byte) {
	k.t.Helper()
	k.send(wire.AppendRequest(nil, req))
	for n := 0; ; n++ {
		c, err := wire.DecodeChunk(k.expect(wire.ChunkSize))
		if err != nil {
			k.t.Fatal(err)
		}
		if n == 0 {
			first = c.Type
		}
		payload = append(payload, k.expect(int(c.Len))...)
		if c.Flags&wire.ChunkDone != 0 {
			return first, payload
		}
	}
}

func TestReadOfAKnownHoleIsAHoleChunk(t *testing.T) {
	const n = limits.HoleRead
	for _, tt := range []struct {
		name string
		rig  func(*testing.T) *rig
	}{
		{"mem", func(t *testing.T) *rig { return memRig(t, 8<<20) }},
		{"raw", func(t *testing.T) *rig {
			path := t.TempDir() + "/disk.img"
			if err := os.WriteFile(path, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Truncate(path, 8<<20); err != nil {
				t.Fatal(err)
			}
			return rawRig(t, path, "pool", "")
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			k := tt.rig(t).structured()
			k.do(wire.Request{Cmd: wire.CmdExtents, Len: 8 << 20})
			read := wire.Request{Cmd: wire.CmdRead, Off: 1 << 20, Len: n}
			typ, p := k.do(read)
			if typ != wire.ChunkHole || binary.BigEndian.Uint64(p) != 1<<20 || binary.BigEndian.Uint32(p[8:]) != n {
				t.Errorf("read of a hole: got %v %x, want a hole of %d", typ, p, n)
			}
			df := read
			df.Flags = wire.FlagDF
			if typ, p := k.do(df); typ != wire.ChunkData || len(p) != 8+n {
				t.Errorf("with DF: got %v of %d bytes, want %d bytes of data", typ, len(p), 8+n)
			}
			k.send(append(wire.AppendRequest(nil, wire.Request{Cmd: wire.CmdWrite, Off: 1<<20 + n - 1, Len: 1}), 'x'))
			k.expect(wire.SimpleReplySize)
			if typ, p = k.do(read); typ != wire.ChunkData || p[len(p)-1] != 'x' {
				t.Errorf("after a write into it: got %v, want data that ends in x", typ)
			}
		})
	}
}
