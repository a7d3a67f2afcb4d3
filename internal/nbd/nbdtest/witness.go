package nbdtest

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

// witnessArea is the tail of the export that belongs to the witness, in bytes.
const witnessArea = 1 << 20

// witness is a well-behaved client that stays connected during the whole
// suite.
type witness struct {
	mu sync.Mutex
	c  *script
	p  *peer
	n  int // beats
	// err is the first failure; nothing works after it.
	err error
}

// broken reports whether a beat has failed.
func (w *witness) broken() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.err != nil
}

func startWitness(ctx context.Context, t *testing.T, s *Server) *witness {
	t.Helper()
	w := &witness{c: &script{s: s, ctx: ctx, patience: patience}}
	t.Cleanup(func() { _ = w.c.attempt(func(*script) {}) })
	if err := w.try(func() { w.p = w.c.open(simple) }); err != nil {
		t.Fatalf("a plain client: %v", err)
	}
	return w
}

// try is attempt that keeps the connection.
func (w *witness) try(f func()) (err error) {
	defer func() {
		if r := recover(); r != nil {
			fail, ok := r.(failure)
			if !ok {
				panic(r)
			}
			err = errors.New(fail.text)
			w.err = err
		}
	}()
	f()
	return nil
}

// beat writes a block, reads it back and compares.
func (w *witness) beat() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.try(func() {
		w.n++
		off := uint64(w.c.s.Size - witnessArea)
		r := wire.Request{Cmd: wire.CmdRead, Off: off, Len: 64 << 10}
		if w.c.s.ReadOnly {
			w.p.wantErrno(r, nil, wire.OK)
			return
		}
		want := pattern(uint64(w.n), 64<<10)
		w.p.wantErrno(wire.Request{Cmd: wire.CmdWrite, Off: off, Len: r.Len}, want, wire.OK)
		if got := w.p.wantErrno(r, nil, wire.OK); !bytes.Equal(got.data, want) {
			w.c.failf("block reads back different from what was written")
		}
	})
}

// stop disconnects.
func (w *witness) stop() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.try(func() { w.p.disconnect(); w.p.wantEOF("DISC") })
}

// pattern returns n bytes that differ between seeds and between positions.
func pattern(seed uint64, n int) []byte {
	b := make([]byte, n)
	x := seed*0x9e3779b97f4a7c15 + 1
	for i := 0; i+8 <= n; i += 8 {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		be.PutUint64(b[i:], x)
	}
	for i := n &^ 7; i < n; i++ {
		b[i] = byte(x >> (8 * (i & 7)))
	}
	return b
}
