package check

import (
	"encoding/binary"

	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// bitmaps counts the directory of bitmaps, their tables and their bits. Where
// the autoclear bit is not set there are none: what they had leaks.
func (w *walker) bitmaps() error {
	x := w.h.Bitmaps
	if w.h.Autoclear&format.AutoclearBitmaps == 0 {
		return nil
	}
	if w.h.BitmapsErr != nil {
		w.corrupt(1, "%v", w.h.BitmapsErr)
	}
	if x == nil {
		return nil
	}
	off, size := int64(x.DirOffset), int64(min(x.DirSize, format.MaxBitmapDir))
	if !w.ref(off, size, 1, "the bitmap directory") {
		return nil
	}
	w.claim(off, size, "the bitmap directory")
	if size > limits.CheckTable || size > w.size-off {
		w.corrupt(1, "the bitmap directory of %d bytes is too large", size)
		return nil
	}
	dir := make([]byte, size)
	if !w.read(dir, off) {
		return nil
	}
	list, err := format.ParseBitmaps(dir, int(x.Count))
	if err != nil {
		w.corrupt(1, "%v", err)
		return nil
	}
	for i := range list {
		if err := w.bitmap(&list[i]); err != nil {
			return err
		}
	}
	return nil
}

func (w *walker) bitmap(m *format.Bitmap) error {
	if err := m.Check(&w.g, int64(w.h.Size)); err != nil {
		w.corrupt(1, "%v", err)
		return nil
	}
	off, n := m.TableOffset, int64(m.TableEntries)*8
	if !w.ref(off, n, 1, "bitmap table") {
		return nil
	}
	w.claim(off, n, "bitmap table")
	// As with L1 tables: those of a sound image all fit.
	if w.bmRead += n; w.bmRead > w.size+w.g.ClusterSize {
		w.corrupt(1, "bitmap %q: the bitmap tables are larger than the file", m.Name)
		return nil
	}
	return w.eachPiece(off, n, func(_ int64, p []byte) {
		for ; len(p) >= 8; p = p[8:] {
			e := binary.BigEndian.Uint64(p)
			bits, _, err := w.g.DecodeBitmapTable(e)
			switch {
			case err != nil:
				w.corrupt(1, "bitmap %q: %v", m.Name, err)
			case bits != 0:
				if w.ref(bits, w.g.ClusterSize, 1, "bitmap data") {
					w.claim(bits, w.g.ClusterSize, "bitmap data")
				}
			}
		}
	})
}
