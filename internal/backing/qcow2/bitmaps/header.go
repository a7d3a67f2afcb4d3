package bitmaps

import (
	"context"
	"encoding/binary"
	"fmt"

	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/store"
)

// The bitmaps extension of the header (section "Header extensions").
const (
	extension      = 0x23852875
	extensionHead  = 8 // type and length
	extensionBytes = 24

	offBacking = 8 // offset of the name, 64 bits, then its length, 32 bits
	offLength  = 100
	sector     = 512 // is never torn
)

// head is the first cluster of an image, which is patched where it lies: only
// what concerns bitmaps changes, and whatever instant the machine stops at,
// the header can be read.
type head struct {
	ctx context.Context
	st  store.Store
	b   []byte // as the file has it

	ext  int  // offset of the bitmaps extension, 0 for none
	odd  bool // that it does not have the length that it should
	next int  // offset of what follows it
	end  int  // offset of the end marker, or area
	area int  // where the area of the extensions ends
}

// readHead reads the first cluster and finds its way in it.
func readHead(ctx context.Context, st store.Store, clusterSize int64) (*head, error) {
	h := &head{ctx: ctx, st: st, b: make([]byte, clusterSize)}
	n, err := st.ReadAt(ctx, h.b, 0)
	if err != nil {
		return nil, err
	}
	if _, err := format.ParseHeader(h.b[:n]); err != nil {
		return nil, invalid("the header has changed: %v", err)
	}
	h.find()
	return h, nil
}

// find walks the extensions, whose lengths ParseHeader has checked.
func (h *head) find() {
	h.ext, h.next, h.odd, h.area = 0, 0, false, len(h.b)
	if off := binary.BigEndian.Uint64(h.b[offBacking:]); off != 0 {
		h.area = int(off)
	}
	at := int(binary.BigEndian.Uint32(h.b[offLength:]))
	for h.area-at >= extensionHead {
		kind, n := binary.BigEndian.Uint32(h.b[at:]), int(binary.BigEndian.Uint32(h.b[at+4:]))
		if kind == 0 {
			break
		}
		next := min(h.area, at+extensionHead+(n+7)&^7)
		if kind == extension {
			h.ext, h.next, h.odd = at, next, n != extensionBytes
		}
		at = next
	}
	h.end = at
}

// write puts p at off and makes it durable. p lies in one sector, or nothing
// depends on it.
func (h *head) write(off int, p []byte) error {
	if err := h.st.WriteAt(h.ctx, p, int64(off), false); err != nil {
		return err
	}
	copy(h.b[off:], p)
	return h.st.Sync(h.ctx)
}

func (h *head) autoclear() uint64 { return binary.BigEndian.Uint64(h.b[format.OffAutoclear:]) }

// setValid declares the bitmaps consistent, or absent.
func (h *head) setValid(on bool) error {
	word := h.autoclear() &^ format.AutoclearBitmaps
	if on {
		word |= format.AutoclearBitmaps
	}
	if word == h.autoclear() {
		return nil
	}
	return h.write(format.OffAutoclear, binary.BigEndian.AppendUint64(nil, word))
}

// point makes the header name the directory of x and declares the bitmaps
// consistent. At any instant it names the directory that it named before, x,
// or none.
func (h *head) point(x *format.BitmapsExtension) error {
	if h.ext == 0 {
		if err := h.insert(); err != nil {
			return err
		}
	}
	at := h.ext + extensionHead
	if at/sector != (at+extensionBytes-1)/sector {
		if err := h.setValid(false); err != nil {
			return err
		}
	}
	if err := h.write(at, payload(x)); err != nil {
		return err
	}
	return h.setValid(true)
}

func payload(x *format.BitmapsExtension) []byte {
	p := binary.BigEndian.AppendUint64(nil, uint64(x.Count)<<32)
	p = binary.BigEndian.AppendUint64(p, x.DirSize)
	return binary.BigEndian.AppendUint64(p, x.DirOffset)
}

// room says whether point has room in the header.
func (h *head) room() error {
	if h.odd {
		return fmt.Errorf("the bitmaps extension of the header does not have %d bytes", extensionBytes)
	}
	if h.ext != 0 || h.end+h.growth() <= h.area {
		return nil
	}
	name := int(binary.BigEndian.Uint32(h.b[offBacking+8:]))
	marker := h.area-h.end >= extensionHead
	if h.area == len(h.b) || !marker || h.moved(name)+name > len(h.b) {
		return fmt.Errorf("the header has no room for bitmaps")
	}
	return nil
}

// growth is what insert puts at the end marker: an extension and a marker.
func (h *head) growth() int { return 2*extensionHead + extensionBytes }

// moved is where a backing file name of n bytes makes room for insert: behind
// both what insert writes and where the name is.
func (h *head) moved(n int) int { return (max(h.end+h.growth(), h.area+n) + 7) &^ 7 }

// insert puts an extension without contents at the end of all. The bitmaps are
// not declared consistent while it is done.
func (h *head) insert() error {
	if err := h.room(); err != nil {
		return err
	}
	if err := h.setValid(false); err != nil {
		return err
	}
	if h.end+h.growth() > h.area {
		if err := h.moveName(); err != nil {
			return err
		}
	}
	// Nobody looks behind the end marker, which is replaced at last.
	at := h.end
	if err := h.write(at+extensionHead, make([]byte, extensionBytes+extensionHead)); err != nil {
		return err
	}
	begin := binary.BigEndian.AppendUint64(nil, extension<<32|extensionBytes)
	if err := h.write(at, begin); err != nil {
		return err
	}
	h.find()
	return nil
}

// moveName moves the backing file name behind what insert needs. The 8 bytes
// that say where it is decide which copy counts.
func (h *head) moveName() error {
	n := int(binary.BigEndian.Uint32(h.b[offBacking+8:]))
	to := h.moved(n)
	name := append([]byte(nil), h.b[h.area:h.area+n]...)
	if err := h.write(to, name); err != nil {
		return err
	}
	if err := h.write(offBacking, binary.BigEndian.AppendUint64(nil, uint64(to))); err != nil {
		return err
	}
	h.area = to
	return nil
}

// forget declares that there are no bitmaps, and takes the extension away
// where nothing follows it. Elsewhere it stays, without a meaning.
func (h *head) forget() error {
	if err := h.setValid(false); err != nil {
		return err
	}
	if h.ext == 0 || h.next != h.end {
		return nil
	}
	if err := h.write(h.ext, make([]byte, extensionHead)); err != nil {
		return err
	}
	h.find()
	return nil
}
