package codec

import (
	"math/bits"
	"sync"
)

// Alphabets and tables of deflate (RFC 1951, section 3.2).
const (
	maxLit   = 286 // literals, end of block, lengths
	maxDist  = 30
	maxPre   = 19 // of the code that code lengths are written in
	endBlock = 256

	// fixedLit and fixedDist are the alphabets of the fixed codes, with two
	// symbols each that must not occur.
	fixedLit  = 288
	fixedDist = 32

	maxCode = 15 // bits

	// Index bits of the first tables. Codes that are longer go on in a
	// subtable.
	litBits  = 11
	distBits = 8
	preBits  = 7

	distMost = maxCode + 13 // bits of a distance, extra bits included

	// With subtables, 288 symbols need at most 2342 entries and 32 symbols at
	// most 402; build does not rely on it.
	litSize  = 2400
	distSize = 512
)

type (
	litTable  [litSize]entry
	distTable [distSize]entry
)

// entry says what the next bits of a stream mean.
//
//	bits 0-5    length of the code with its extra bits
//	bits 8-11   length of the code alone; of a subtable, its index bits
//	bits 13-15  isEnd, isTable, isLiteral
//	bits 16-31  value: a literal, the base of a length or distance, where a
//	            subtable begins
type entry uint32

const (
	entryBits  = 0x3f
	codeShift  = 8
	isEnd      = 1 << 13
	isTable    = 1 << 14
	isLiteral  = 1 << 15
	valueShift = 16

	// noCode: no code begins like that.
	noCode = isEnd
)

func (e entry) bits() uint   { return uint(e & entryBits) }
func (e entry) value() int   { return int(e >> valueShift) }
func (e entry) mask() uint64 { return 1<<(e>>codeShift&15) - 1 }

// extra is the value of the extra bits, of a code that word begins with.
func (e entry) extra(word uint64) int {
	return int(word & (1<<(e&entryBits) - 1) >> (e >> codeShift & 15))
}

// Entries of all symbols, without the lengths of their codes.
var (
	litEntries  = makeLitEntries()
	distEntries = makeDistEntries()
	preEntries  = makePreEntries()
)

func makeLitEntries() (t [fixedLit]entry) {
	for i := range endBlock {
		t[i] = isLiteral | entry(i)<<valueShift
	}
	t[endBlock] = isEnd | 1<<valueShift // unlike noCode
	base := 3
	for i := endBlock + 1; i < maxLit; i++ {
		extra := max(0, i-261) / 4
		t[i] = entry(base)<<valueShift | entry(extra)
		base += 1 << extra
	}
	t[maxLit-1] = maxMatch << valueShift
	for i := maxLit; i < fixedLit; i++ {
		t[i] = noCode
	}
	return t
}

func makeDistEntries() (t [fixedDist]entry) {
	base := 1
	for i := range maxDist {
		extra := max(0, i-2) / 2
		t[i] = entry(base)<<valueShift | entry(extra)
		base += 1 << extra
	}
	for i := maxDist; i < fixedDist; i++ {
		t[i] = noCode
	}
	return t
}

func makePreEntries() (t [maxPre]entry) {
	for i := range t {
		t[i] = isLiteral | entry(i)<<valueShift
	}
	return t
}

// build fills the table of a canonical code with the given index bits. lens
// are the lengths of the codes of the symbols, 0 for none; symbols gives their
// entries, noCode for those that must not occur. It reports whether lens make
// sense: a code is complete, or it is one single code of one bit, or empty.
func build(t []entry, index uint, lens []uint8, symbols []entry) bool {
	var count [maxCode + 1]int
	for _, n := range lens {
		count[n]++
	}
	left, longest := 1, 0
	for n := 1; n <= maxCode; n++ {
		if left = left<<1 - count[n]; left < 0 {
			return false
		}
		if count[n] != 0 {
			longest = n
		}
	}
	if left > 0 {
		if longest > 1 {
			return false
		}
		for i := range t[:1<<index] {
			t[i] = noCode
		}
	}
	// Sort the symbols by length and number, which is the order of their codes.
	var at [maxCode + 2]int
	for n := 1; n <= maxCode; n++ {
		at[n+1] = at[n] + count[n]
	}
	var order [fixedLit]uint16
	for s, n := range lens {
		if n != 0 {
			order[at[n]] = uint16(s)
			at[n]++
		}
	}
	b := builder{t: t, index: index, end: 1 << index, count: count, longest: uint(longest)}
	for _, s := range order[:at[maxCode+1]] {
		if !b.add(uint(lens[s]), symbols[s]) {
			return false
		}
	}
	return true
}

// builder is what build keeps between the symbols of a table.
type builder struct {
	t       []entry
	index   uint
	end     int              // of the entries in use
	count   [maxCode + 1]int // codes of each length that are still to come
	longest uint

	code     uint // the next, of length bits
	length   uint
	prefix   uint // reversed first index bits of the code of the last subtable
	subStart int
	subBits  uint
}

// add enters the next symbol, whose code has n bits.
func (b *builder) add(n uint, e entry) bool {
	b.code <<= n - b.length
	b.length = n
	reversed := uint(bits.Reverse16(uint16(b.code))) >> (16 - n)
	b.code++
	if e != noCode {
		e += entry(n)<<codeShift | entry(n)
	}
	if n <= b.index {
		for i := reversed; i < 1<<b.index; i += 1 << n {
			b.t[i] = e
		}
	} else {
		if prefix := reversed & (1<<b.index - 1); b.subBits == 0 || prefix != b.prefix {
			if !b.subtable(prefix, n) {
				return false
			}
		}
		for i := reversed >> b.index; i < 1<<b.subBits; i += 1 << (n - b.index) {
			b.t[b.subStart+int(i)] = e
		}
	}
	b.count[n]--
	return true
}

// subtable begins one for the codes of a prefix, the shortest of n bits. It
// grows until the codes that are to come fill it.
func (b *builder) subtable(prefix, n uint) bool {
	width := n - b.index
	for left := 1 << width; b.index+width < b.longest; width++ {
		if left -= b.count[b.index+width]; left <= 0 {
			break
		}
		left <<= 1
	}
	b.prefix, b.subStart, b.subBits = prefix, b.end, width
	if b.end += 1 << width; b.end > len(b.t) {
		return false
	}
	b.t[prefix] = isTable | entry(b.subStart)<<valueShift | entry(width)<<codeShift
	return true
}

// fixed are the tables of the fixed codes (RFC 1951, section 3.2.6).
type fixed struct {
	lit  litTable
	dist distTable
}

var fixedTables = sync.OnceValue(func() *fixed {
	var lens [fixedLit]uint8
	for i := range lens {
		switch {
		case i < 144, i >= 280:
			lens[i] = 8
		case i < 256:
			lens[i] = 9
		default:
			lens[i] = 7
		}
	}
	t := new(fixed)
	build(t.lit[:], litBits, lens[:], litEntries[:])
	for i := range fixedDist {
		lens[i] = 5
	}
	build(t.dist[:], distBits, lens[:fixedDist], distEntries[:])
	return t
})

// preOrder is how the lengths of the first code are sent.
var preOrder = [maxPre]uint8{16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15}

// readTables reads the codes of a block (RFC 1951, section 3.2.7).
func (f *inflater) readTables() error {
	h, err := f.bits(14)
	if err != nil {
		return err
	}
	lits, dists, pres := int(h&31)+257, int(h>>5&31)+1, int(h>>10)+4
	if lits > maxLit || dists > maxDist {
		return errDeflateBlock
	}
	var lens [maxPre]uint8
	for _, s := range preOrder[:pres] {
		n, err := f.bits(3)
		if err != nil {
			return err
		}
		lens[s] = uint8(n)
	}
	if !build(f.pre[:], preBits, lens[:], preEntries[:]) {
		return errDeflateBlock
	}
	if err := f.readLens(f.lens[:lits+dists]); err != nil {
		return err
	}
	if !build(f.lit[:], litBits, f.lens[:lits], litEntries[:]) ||
		!build(f.dist[:], distBits, f.lens[lits:lits+dists], distEntries[:]) {
		return errDeflateBlock
	}
	return nil
}

// readLens reads the lengths of codes, which are written in runs.
func (f *inflater) readLens(lens []uint8) error {
	for i := 0; i < len(lens); {
		e, _, err := f.symbol(f.pre[:], preBits)
		if err != nil {
			return err
		}
		s := e.value()
		if s < 16 {
			lens[i] = uint8(s)
			i++
			continue
		}
		run, err := f.run(s)
		if err != nil {
			return err
		}
		if run > len(lens)-i || s == 16 && i == 0 {
			return errDeflateBlock
		}
		n := uint8(0)
		if s == 16 {
			n = lens[i-1]
		}
		for range run {
			lens[i] = n
			i++
		}
	}
	return nil
}

// run reads how often a length is repeated.
func (f *inflater) run(symbol int) (int, error) {
	base, extra := 3, uint(2)
	switch symbol {
	case 17:
		extra = 3
	case 18:
		base, extra = 11, 7
	}
	n, err := f.bits(extra)
	return base + int(n), err
}
