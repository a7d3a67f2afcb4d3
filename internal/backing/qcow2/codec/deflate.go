package codec

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/klauspost/compress/flate"

	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// errLong: a stream says more than the cluster holds.
const errLong = format.Corrupt("compressed data exceed the cluster")

// inflater is a reader of deflate streams with the source it reads.
type inflater struct {
	src  bytes.Reader
	flat io.ReadCloser
	more [1]byte
}

var inflaters = sync.Pool{New: func() any {
	f := new(inflater)
	f.flat = flate.NewReader(&f.src)
	return f
}}

// inflate decodes a raw deflate stream, which must end with dst.
func inflate(dst, src []byte) error {
	f := inflaters.Get().(*inflater)
	defer inflaters.Put(f)
	defer f.src.Reset(nil)
	f.src.Reset(src)
	if err := f.flat.(flate.Resetter).Reset(&f.src, nil); err != nil {
		return fmt.Errorf("deflate: %w", err)
	}
	if _, err := io.ReadFull(f.flat, dst); err != nil {
		return fmt.Errorf("deflate: %w", noEOF(err))
	}
	switch n, err := io.ReadFull(f.flat, f.more[:]); {
	case n != 0:
		return errLong
	case err != io.EOF:
		return fmt.Errorf("deflate: %w", err)
	}
	return nil
}

// noEOF makes an end of data that came too early an error like any other.
func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

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
