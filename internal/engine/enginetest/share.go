package enginetest

import (
	"bytes"
	"context"
	"slices"
	"sync/atomic"

	"github.com/vmdiskd/vmdiskd/internal/engine"
)

// neighboursRead has one owner keep hundreds of writes, and some syncs, at the
// engine while another has one read at a time. It looks at no clock but counts
// how many of the writes are over between the begin and the end of a read. A
// machine that is busy makes some of the reads late, not most.
func neighboursRead(e *env) {
	const deep, reads, most = 512, 64, 128
	data := make([]byte, deep*blockBytes)
	busy, calm := e.create(data), e.create(data)
	var written atomic.Int64
	over := make(chan *engine.IO, deep)
	batch := make([]*engine.IO, deep)
	out := e.buf(blockBytes)
	for i := range batch {
		batch[i] = &engine.IO{Op: engine.OpWrite, Owner: engine.OwnerOf("busy"), File: busy, Buf: out, Off: int64(i * blockBytes),
			Done: func(io *engine.IO) { written.Add(1); over <- io }}
		if i%64 == 0 {
			batch[i].Op, batch[i].Buf = engine.OpSync, nil
		}
	}
	var between [reads]int64 // each owned by whoever has the read
	i := 0
	answered := make(chan struct{}, 1)
	read := []*engine.IO{{Op: engine.OpRead, Owner: engine.OwnerOf("calm"), File: calm, Buf: e.buf(blockBytes),
		Done: func(*engine.IO) { between[i] += written.Load(); answered <- struct{}{} }}}
	stop := make(chan struct{})
	var loop group
	loop.Go(func() {
		e.eng.Submit(batch)
		for flying, again := deep, stop; flying > 0; {
			select {
			case <-again:
				again = nil
			case io := <-over:
				if io.Err != nil {
					e.Errorf("%v: %v", io.Op, io.Err)
				}
				if flying--; again != nil {
					flying++
					e.eng.Submit([]*engine.IO{io})
				}
			}
		}
	})
	for ; i < reads; i++ {
		between[i] -= written.Load()
		e.eng.Submit(read)
		<-answered
		if io := read[0]; io.Err != nil || io.N != blockBytes {
			e.Errorf("read: %d bytes, %v", io.N, io.Err)
		}
	}
	close(stop)
	loop.Wait()
	slices.Sort(between[:])
	if n := between[reads/4]; n > most {
		e.Errorf("%d writes and syncs while a read of the neighbour was answered, want at most %d in a quarter of the cases; all: %v", n, most, between)
	}
}

// calledOffIsNotMade calls off more writes than any engine makes at a time, when the
// first of them is over. Those that have begun are not over before that.
func calledOffIsNotMade(e *env) {
	const deep = 512
	f := e.create(make([]byte, deep*blockBytes))
	out := e.buf(blockBytes)
	copy(out, pattern(blockBytes, 3))
	first, gone := make(chan struct{}, deep), make(chan struct{})
	var over group
	over.Add(deep)
	batch := make([]*engine.IO, deep)
	for i := range batch {
		batch[i] = &engine.IO{Op: engine.OpWrite, Owner: engine.OwnerOf("gone"), File: f, Buf: out, Off: int64(i * blockBytes), Cancel: gone,
			Done: func(io *engine.IO) {
				first <- struct{}{}
				<-gone
				over.done(io)
			}}
	}
	over.Go(func() { e.eng.Submit(batch) }) // an inline pool makes the last one within
	<-first
	close(gone)
	over.Wait()
	made, got := 0, e.contents(f)
	for i, io := range batch {
		want := make([]byte, blockBytes)
		if io.Err == nil {
			made++
			want = out
		} else if io.Err != context.Canceled || io.N != 0 {
			e.Errorf("write %d: %d bytes, %v, want none and %v", i, io.N, io.Err, context.Canceled)
		}
		if !bytes.Equal(got[i*blockBytes:][:blockBytes], want) {
			e.Errorf("write %d: %v, which the file does not tell", i, io.Err)
		}
	}
	if made == 0 || made > deep/2 {
		e.Errorf("%d writes of %d were made, want the first ones", made, deep)
	}
	e.do(&engine.IO{Op: engine.OpWrite, File: f, Buf: out, Off: (deep - 1) * blockBytes})
}
