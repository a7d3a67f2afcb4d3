package codec

import (
	"encoding/binary"
	"sync"

	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
)

// The decoder of deflate streams (RFC 1951) goes from slice to slice: the
// output is its own window, and what lies in neither slice is an error. Huffman
// codes are looked up in tables by the next bits of the stream, which wait in a
// 64-bit word. Far from both ends of the slices, fast decodes with few checks;
// near them, block decodes symbol by symbol.

// errLong: a stream says more than the cluster holds.
const errLong = format.Corrupt("compressed data exceed the cluster")

const (
	errDeflateEnd   = format.Corrupt("deflate: data end within the stream")
	errDeflateShort = format.Corrupt("deflate: stream yields less than the cluster")
	errDeflateBlock = format.Corrupt("deflate: block is not valid")
	errDeflateCode  = format.Corrupt("deflate: code is not valid")
	errDistance     = format.Corrupt("deflate: distance leads before the cluster")
)

const (
	// fastIn and fastOut are what an iteration of fast may read and write: two
	// words whose first moves on by at most 7 bytes; three literals and a match.
	fastIn  = 16
	fastOut = 3 + maxMatch + repeatOver

	// repeatOver is how far repeat and move may write behind a match.
	repeatOver = 32

	maxMatch = 258
)

// inflater is the state of one decoding.
type inflater struct {
	src []byte
	pos int // of the next byte of src that is not in word

	// The low bits of word, have of them, are the next of the stream. Those
	// above are zero, or what the byte at pos has there.
	word uint64
	have uint

	dst []byte
	out int // bytes of dst that are done

	lit  litTable
	dist distTable
	pre  [1 << preBits]entry
	lens [maxLit + maxDist]uint8
}

var inflaters = sync.Pool{New: func() any { return new(inflater) }}

// inflate decodes a raw deflate stream, which must end with dst.
func inflate(dst, src []byte) error {
	f := inflaters.Get().(*inflater)
	f.src, f.pos, f.word, f.have, f.dst, f.out = src, 0, 0, 0, dst, 0
	err := f.stream()
	f.src, f.dst = nil, nil
	inflaters.Put(f)
	return err
}

func (f *inflater) stream() error {
	for last := uint64(0); last == 0; {
		h, err := f.bits(3)
		if err != nil {
			return err
		}
		last = h & 1
		switch h >> 1 {
		case 0:
			err = f.stored()
		case 1:
			fixed := fixedTables()
			err = f.block(&fixed.lit, &fixed.dist)
		case 2:
			if err = f.readTables(); err == nil {
				err = f.block(&f.lit, &f.dist)
			}
		default:
			err = errDeflateBlock
		}
		if err != nil {
			return err
		}
	}
	if f.out != len(f.dst) {
		return errDeflateShort
	}
	return nil
}

// refill brings have to 56 or more, or to all that the stream has.
func (f *inflater) refill() {
	if len(f.src)-f.pos >= 8 {
		f.word |= binary.LittleEndian.Uint64(f.src[f.pos:]) << f.have
		f.pos += int((63 - f.have) >> 3)
		f.have |= 56
		return
	}
	for f.have < 56 && f.pos < len(f.src) {
		f.word |= uint64(f.src[f.pos]) << f.have
		f.pos++
		f.have += 8
	}
}

// bits takes the next n bits, at most 56.
func (f *inflater) bits(n uint) (uint64, error) {
	if f.have < n {
		f.refill()
		if f.have < n {
			return 0, errDeflateEnd
		}
	}
	x := f.word & (1<<n - 1)
	f.word >>= n
	f.have -= n
	return x, nil
}

// stored copies a block that is not compressed.
func (f *inflater) stored() error {
	// Whole bytes that wait in word are given back.
	f.pos -= int(f.have >> 3)
	f.word, f.have = 0, 0
	if len(f.src)-f.pos < 4 {
		return errDeflateEnd
	}
	n := binary.LittleEndian.Uint16(f.src[f.pos:])
	if n != ^binary.LittleEndian.Uint16(f.src[f.pos+2:]) {
		return errDeflateBlock
	}
	f.pos += 4
	switch p := f.src[f.pos:]; {
	case int(n) > len(p):
		return errDeflateEnd
	case int(n) > len(f.dst)-f.out:
		return errLong
	default:
		f.out += copy(f.dst[f.out:], p[:n])
		f.pos += int(n)
	}
	return nil
}

// symbol takes the next symbol by a table of the given index bits, and the
// value of its extra bits.
func (f *inflater) symbol(t []entry, index uint) (e entry, extra int, err error) {
	f.refill()
	e = t[f.word&(1<<index-1)]
	if e&isTable != 0 {
		e = t[e.value()+int(f.word>>index&e.mask())]
	}
	switch n := e.bits(); {
	case n == 0:
		return 0, 0, errDeflateCode
	case n > f.have:
		return 0, 0, errDeflateEnd
	default:
		extra = e.extra(f.word)
		f.word >>= n
		f.have -= n
		return e, extra, nil
	}
}

// block decodes a block by its tables, to its end.
func (f *inflater) block(lit *litTable, dist *distTable) error {
	for {
		if err := f.fast(lit, dist); err != nil {
			return err
		}
		e, extra, err := f.symbol(lit[:], litBits)
		switch {
		case err != nil:
			return err
		case e&isEnd != 0:
			return nil
		case e&isLiteral != 0:
			if f.out == len(f.dst) {
				return errLong
			}
			f.dst[f.out] = byte(e.value())
			f.out++
			continue
		}
		length := e.value() + extra
		if e, extra, err = f.symbol(dist[:], distBits); err != nil {
			return err
		}
		if err := f.match(length, e.value()+extra); err != nil {
			return err
		}
	}
}

// match repeats what lies distance bytes back.
func (f *inflater) match(length, distance int) error {
	switch {
	case distance > f.out:
		return errDistance
	case length > len(f.dst)-f.out:
		return errLong
	}
	// The two may overlap: bytes just written are read again.
	for range length {
		f.dst[f.out] = f.dst[f.out-distance]
		f.out++
	}
	return nil
}

// fast decodes as long as neither slice can end within an iteration and no
// symbol comes but literals and matches. Only the low six bits of have count
// here, so that whole entries can be taken from it.
func (f *inflater) fast(lit *litTable, dist *distTable) error {
	src, dst, word, have, pos, out := f.src, f.dst[:len(f.dst):len(f.dst)], f.word, f.have, f.pos, f.out
	for pos <= len(src)-fastIn && out <= len(dst)-fastOut {
		word, pos, have = more(src, pos, word, have)
		// Literals of the first table have at most litBits bits: after three of
		// them a length with its extra bits is still there.
		e := lit[word&(1<<litBits-1)]
		if e&isLiteral != 0 {
			p := (*[3]byte)(dst[out:])
			p[0] = byte(e >> valueShift)
			out, word, have = out+1, word>>(e&entryBits), have-uint(e)
			if e = lit[word&(1<<litBits-1)]; e&isLiteral != 0 {
				p[1] = byte(e >> valueShift)
				out, word, have = out+1, word>>(e&entryBits), have-uint(e)
				if e = lit[word&(1<<litBits-1)]; e&isLiteral != 0 {
					p[2] = byte(e >> valueShift)
					out, word, have = out+1, word>>(e&entryBits), have-uint(e)
					e = lit[word&(1<<litBits-1)]
				}
			}
		}
		if e&(isTable|isLiteral|isEnd) != 0 {
			if e&isTable != 0 {
				e = lit[e.value()+int(word>>litBits&e.mask())]
			}
			if e&isEnd != 0 {
				break // block tells what it is
			}
			if e&isLiteral != 0 {
				dst[out] = byte(e >> valueShift)
				out, word, have = out+1, word>>(e&entryBits), have-uint(e)
				continue
			}
		}
		length := e.value() + e.extra(word)
		word, have = word>>(e&entryBits), have-uint(e)

		if have&63 < distMost {
			word, pos, have = more(src, pos, word, have)
		}
		e = dist[word&(1<<distBits-1)]
		if e&isTable != 0 {
			e = dist[e.value()+int(word>>distBits&e.mask())]
		}
		if e&isEnd != 0 {
			return errDeflateCode
		}
		distance := e.value() + e.extra(word)
		word, have = word>>(e&entryBits), have-uint(e)
		switch {
		case distance > out:
			return errDistance
		case distance < chunk:
			repeat(dst[out-distance:out+length+repeatOver], distance, length)
			out += length
			continue
		}
		// Most matches fit two chunks, and to copy both costs less than to ask.
		move(dst, out, distance)
		move(dst, out+chunk, distance)
		at := out + 2*chunk
		for out += length; at < out; at += chunk {
			move(dst, at, distance)
		}
	}
	f.word, f.have, f.pos, f.out = word, have&63, pos, out
	return nil
}

// more brings the low six bits of have to 56 or more; src has 8 bytes at pos.
func more(src []byte, pos int, word uint64, have uint) (uint64, int, uint) {
	word |= binary.LittleEndian.Uint64(src[pos:]) << (have & 63)
	return word, pos + int((63-have)>>3&7), have | 56
}

// chunk is what move copies at a time.
const chunk = 16

// move copies a chunk to p[at:] from what lies distance bytes back, chunk or
// more.
func move(p []byte, at, distance int) {
	from := at - distance
	*(*[chunk]byte)(p[at : at+chunk : at+chunk]) = *(*[chunk]byte)(p[from : from+chunk : from+chunk])
}

// repeat continues p, of which the first distance bytes are there, by length
// bytes that repeat them, and may write up to repeatOver bytes behind those.
func repeat(p []byte, distance, length int) {
	from, to := p, p[distance:]
	switch {
	case distance >= 8:
		// Most matches are short; a word may repeat the one before it.
		_, _ = from[23], to[23]
		le := binary.LittleEndian
		le.PutUint64(to, le.Uint64(from))
		le.PutUint64(to[8:], le.Uint64(from[8:]))
		le.PutUint64(to[16:], le.Uint64(from[16:]))
		for i := 24; i < length; i += 8 {
			le.PutUint64(to[i:], le.Uint64(from[i:]))
		}
	case distance == 1:
		x := uint64(from[0]) * 0x0101010101010101
		for i := 0; i < length; i += 8 {
			binary.LittleEndian.PutUint64(to[i:], x)
		}
	default:
		for i := range length {
			to[i] = from[i]
		}
	}
}
