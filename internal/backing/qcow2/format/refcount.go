package format

import "encoding/binary"

// MaxRefcount is the largest refcount that fits.
func (g *Geometry) MaxRefcount() uint64 {
	if g.RefcountOrder == 6 {
		return 1<<64 - 1
	}
	return 1<<(1<<g.RefcountOrder) - 1
}

// Refcount reads entry i of a refcount block. Entries of less than a byte
// begin with the lowest bits (section "Refcount table and refcount blocks").
func (g *Geometry) Refcount(block []byte, i int64) uint64 {
	switch g.RefcountOrder {
	case 3:
		return uint64(block[i])
	case 4:
		return uint64(binary.BigEndian.Uint16(block[i*2:]))
	case 5:
		return uint64(binary.BigEndian.Uint32(block[i*4:]))
	case 6:
		return binary.BigEndian.Uint64(block[i*8:])
	}
	at, shift, mask := g.subByte(i)
	return uint64(block[at]>>shift) & mask
}

// SetRefcount writes entry i; n must be at most MaxRefcount.
func (g *Geometry) SetRefcount(block []byte, i int64, n uint64) {
	switch g.RefcountOrder {
	case 3:
		block[i] = byte(n)
	case 4:
		binary.BigEndian.PutUint16(block[i*2:], uint16(n))
	case 5:
		binary.BigEndian.PutUint32(block[i*4:], uint32(n))
	case 6:
		binary.BigEndian.PutUint64(block[i*8:], n)
	default:
		at, shift, mask := g.subByte(i)
		block[at] = block[at]&^byte(mask<<shift) | byte(n&mask)<<shift
	}
}

// subByte finds an entry of 1, 2 or 4 bits.
func (g *Geometry) subByte(i int64) (at int64, shift uint, mask uint64) {
	perByteBits := 3 - g.RefcountOrder
	return i >> perByteBits, uint(i&(1<<perByteBits-1)) << g.RefcountOrder, 1<<(1<<g.RefcountOrder) - 1
}
