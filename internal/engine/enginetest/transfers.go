package enginetest

import (
	"bytes"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"

	"github.com/vmdiskd/vmdiskd/internal/engine"
)

// randomTransfersMatchAModel lets many submitters work on one file, each in a
// region of its own, and compares every read and the file in the end with
// what memory says.
func randomTransfersMatchAModel(e *env) {
	const submitters, region, rounds = 6, 64 * blockBytes, 40
	model := pattern(submitters*region, 1)
	f := e.create(model)
	seed := rand.Uint64()
	e.Logf("seed %d", seed)
	var wg sync.WaitGroup
	for s := range submitters {
		m := modelled{env: e, file: f, base: int64(s * region), want: model[s*region:][:region],
			rand: rand.New(rand.NewPCG(seed, uint64(s))), buf: e.buf(region)}
		wg.Go(func() {
			for range rounds {
				if !m.round() {
					return
				}
			}
		})
	}
	wg.Wait()
	if !bytes.Equal(e.contents(f), model) {
		e.Error("the file is not what was written")
	}
}

// modelled is one submitter and the bytes that it expects in its region.
type modelled struct {
	*env
	file *engine.File
	base int64
	want []byte
	rand *rand.Rand
	buf  []byte
}

// round submits one batch of transfers that do not touch each other: one for
// each of some 4-block cells.
func (m *modelled) round() bool {
	const cell = 4 * blockBytes
	var batch []*engine.IO
	for at := 0; at < len(m.want); at += cell {
		if m.rand.IntN(3) == 0 {
			continue
		}
		first := m.rand.IntN(4)
		n := 1 + m.rand.IntN(4-first)
		lo, hi := at+first*blockBytes, at+(first+n)*blockBytes
		batch = append(batch, m.transfer(lo, hi))
	}
	if err := engine.Do(m.Context(), m.eng, batch...); err != nil {
		m.Errorf("batch of %d: %v", len(batch), err)
		return false
	}
	for _, io := range batch {
		lo := int(io.Off - m.base)
		if (io.Op == engine.OpRead || io.Op == engine.OpWrite) && io.N != len(io.Buf) {
			m.Errorf("%v of %d bytes at %d moved %d", io.Op, len(io.Buf), io.Off, io.N)
			return false
		}
		if io.Op == engine.OpRead && !bytes.Equal(io.Buf, m.want[lo:lo+len(io.Buf)]) {
			m.Errorf("read of %d bytes at %d gave other bytes", len(io.Buf), io.Off)
			return false
		}
	}
	return true
}

// transfer is a random transfer on [lo, hi) of the region; the model is
// brought up to date at once.
func (m *modelled) transfer(lo, hi int) *engine.IO {
	io := &engine.IO{File: m.file, Off: m.base + int64(lo), Buf: m.buf[lo:hi]}
	switch r := m.rand.IntN(10); {
	case r < 5:
		io.Op = engine.OpRead
		clear(io.Buf)
	case r < 9:
		io.Op = engine.OpWrite
		for i := range io.Buf {
			io.Buf[i] = byte(m.rand.Uint32())
		}
		copy(m.want[lo:hi], io.Buf)
	default:
		io.Op, io.Buf, io.Len = engine.OpPunch, nil, int64(hi-lo)
		clear(m.want[lo:hi])
	}
	return io
}

func batchLargerThanAnyQueueIsServed(e *env) {
	const n = 1500
	f := e.create(make([]byte, n*blockBytes))
	buf := e.buf(n * blockBytes)
	copy(buf, pattern(len(buf), 2))
	want := bytes.Clone(buf)
	calls := make([]atomic.Int32, n)
	for _, op := range []engine.Op{engine.OpWrite, engine.OpRead} {
		var g group
		batch := make([]*engine.IO, n)
		for i := range batch {
			batch[i] = &engine.IO{Op: op, File: f, Off: int64(i * blockBytes),
				Buf: buf[i*blockBytes:][:blockBytes], Done: func(io *engine.IO) {
					calls[i].Add(1)
					g.done(io)
				}}
		}
		g.Add(n)
		e.eng.Submit(batch)
		g.Wait()
		for i, io := range batch {
			if io.Err != nil || io.N != blockBytes {
				e.Fatalf("%v %d of the batch: %d bytes, %v", op, i, io.N, io.Err)
			}
		}
		if op == engine.OpWrite {
			clear(buf)
		}
	}
	for i := range calls {
		if got := calls[i].Load(); got != 2 {
			e.Errorf("transfer %d: Done called %d times for 2 submissions", i, got)
		}
	}
	if !bytes.Equal(buf, want) {
		e.Error("what was read is not what was written")
	}
}

func readIsShortOnlyAtTheEndOfTheFile(e *env) {
	data := pattern(2*blockBytes+1808, 3)
	f := e.create(data)
	for _, tt := range []struct{ off, n, want int }{
		{0, blockBytes, blockBytes},
		{0, 2 * blockBytes, 2 * blockBytes},
		{blockBytes, 8 * blockBytes, blockBytes + 1808},
		{2 * blockBytes, blockBytes, 1808},
		{3 * blockBytes, blockBytes, 0},
		{100 * blockBytes, 4 * blockBytes, 0},
	} {
		io := &engine.IO{Op: engine.OpRead, File: f, Buf: e.buf(tt.n), Off: int64(tt.off)}
		if err := engine.Do(e.Context(), e.eng, io); err != nil || io.N != tt.want {
			e.Errorf("read of %d at %d: %d, %v, want %d", tt.n, tt.off, io.N, err, tt.want)
			continue
		}
		if tt.want > 0 && !bytes.Equal(io.Buf[:io.N], data[tt.off:][:tt.want]) {
			e.Errorf("read of %d at %d gave other bytes", tt.n, tt.off)
		}
	}
}

func writeExtendsTheFile(e *env) {
	f := e.create(nil)
	buf := e.buf(3 * blockBytes)
	copy(buf, pattern(len(buf), 4))
	io := &engine.IO{Op: engine.OpWrite, File: f, Buf: buf, Off: blockBytes}
	e.do(io)
	if io.N != len(buf) {
		e.Errorf("wrote %d of %d", io.N, len(buf))
	}
	if want := append(make([]byte, blockBytes), buf...); !bytes.Equal(e.contents(f), want) {
		e.Error("the file is not a hole and what was written")
	}
}

func largeTransferIsWhole(e *env) {
	const n = 16 << 20
	f := e.create(nil)
	buf := e.buf(n)
	want := pattern(n, 5)
	copy(buf, want)
	e.do(&engine.IO{Op: engine.OpWrite, File: f, Buf: buf})
	clear(buf)
	e.do(&engine.IO{Op: engine.OpRead, File: f, Buf: buf})
	if !bytes.Equal(buf, want) {
		e.Error("16 MiB came back otherwise")
	}
}

func emptyTransfersSucceed(e *env) {
	f := e.create(make([]byte, blockBytes))
	for _, op := range []engine.Op{engine.OpRead, engine.OpWrite} {
		io := &engine.IO{Op: op, File: f, Off: blockBytes}
		if err := engine.Do(e.Context(), e.eng, io); err != nil || io.N != 0 {
			e.Errorf("%v of nothing: %d, %v", op, io.N, err)
		}
	}
	e.eng.Submit(nil)
}

func writesAndSyncSucceed(e *env) {
	f := e.create(make([]byte, 4*blockBytes))
	buf := e.buf(4 * blockBytes)
	want := pattern(len(buf), 6)
	copy(buf, want)
	e.do(&engine.IO{Op: engine.OpWrite, File: f, Buf: buf[:blockBytes]},
		&engine.IO{Op: engine.OpWrite, File: f, Buf: buf[blockBytes:], Off: blockBytes})
	e.do(&engine.IO{Op: engine.OpSync, File: f},
		&engine.IO{Op: engine.OpSync, File: f, Off: blockBytes, Len: blockBytes},
		&engine.IO{Op: engine.OpSync, File: f, Off: -1, Len: -1}) // neither counts
	if !bytes.Equal(e.contents(f), want) {
		e.Error("the file is not what was written")
	}
}

func punchedRangeReadsAsZero(e *env) { rangeReadsAsZero(e, engine.OpPunch) }
func zeroedRangeReadsAsZero(e *env)  { rangeReadsAsZero(e, engine.OpZero) }

// rangeReadsAsZero applies op inside a file and across its end. A filesystem
// that cannot do it says so and leaves the file alone.
func rangeReadsAsZero(e *env, op engine.Op) {
	want := pattern(16*blockBytes, 7)
	f := e.create(want)
	e.do(&engine.IO{Op: engine.OpSync, File: f})
	for _, r := range []struct{ off, n int }{{4 * blockBytes, 4 * blockBytes}, {15 * blockBytes, 9 * blockBytes}} {
		io := &engine.IO{Op: op, File: f, Off: int64(r.off), Len: int64(r.n)}
		if err := engine.Do(e.Context(), e.eng, io); unsupported(err) {
			continue
		} else if err != nil {
			e.Fatalf("%v of %d at %d: %v", op, r.n, r.off, err)
		}
		clear(want[r.off:min(len(want), r.off+r.n)])
	}
	buf := e.buf(32 * blockBytes)
	io := &engine.IO{Op: engine.OpRead, File: f, Buf: buf}
	e.do(io)
	if !bytes.Equal(buf[:io.N], want) {
		e.Errorf("%d bytes after %v, want %d, zero where it succeeded", io.N, op, len(want))
	}
	if st, err := os.Stat(f.OS.Name()); err != nil || st.Size() != int64(len(want)) {
		e.Errorf("size after %v: %d, %v, want %d", op, st.Size(), err, len(want))
	}
}
