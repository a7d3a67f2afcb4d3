package codec

import (
	"io"
	"sync"

	"github.com/klauspost/compress/flate"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// bounded appends to b what is written to it, and fails at more than room.
type bounded struct {
	b    []byte
	room int
}

func (w *bounded) Write(p []byte) (int, error) {
	if len(p) > w.room {
		return 0, io.ErrShortWrite
	}
	w.b, w.room = append(w.b, p...), w.room-len(p)
	return len(p), nil
}

// deflater is a writer of deflate streams with the sink it writes to.
type deflater struct {
	out  bounded
	flat *flate.Writer
}

var deflaters = sync.Pool{New: func() any {
	f := new(deflater)
	w, err := flate.NewWriterWindow(&f.out, limits.DeflateWindow)
	if err != nil {
		panic(err) // the window is a constant that the library allows
	}
	f.flat = w
	return f
}}

func deflate(dst, src []byte) ([]byte, bool) {
	f := deflaters.Get().(*deflater)
	defer deflaters.Put(f)
	f.out = bounded{dst, len(src) - 1}
	defer func() { f.out = bounded{} }()
	f.flat.Reset(&f.out)
	if _, err := f.flat.Write(src); err != nil {
		return dst, false
	}
	if err := f.flat.Close(); err != nil {
		return dst, false
	}
	return f.out.b, true
}
