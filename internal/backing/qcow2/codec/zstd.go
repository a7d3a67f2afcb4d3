package codec

import (
	"encoding/binary"
	"fmt"
	"io"
	"sync"

	"github.com/klauspost/compress/zstd"

	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// Parts of a frame (RFC 8878, sections 3.1.1 and 3.1.2).
const (
	frameMagic     = 0xfd2fb528
	skippableMagic = 0x184d2a50
	skippableMask  = 0xfffffff0

	singleSegment = 1 << 5
	reservedBit   = 1 << 3
	checksumBit   = 1 << 2

	minWindowLog  = 10
	blockHeader   = 3
	maxBlock      = 128 << 10
	blockRLE      = 1
	blockReserved = 3
)

const (
	errZstdEnd    = format.Corrupt("zstd: data end within a frame")
	errFrames     = format.Corrupt("zstd: too many frames")
	errMagic      = format.Corrupt("zstd: no frame where one must begin")
	errReserved   = format.Corrupt("zstd: reserved bits are set")
	errWindow     = format.Corrupt("zstd: window is too large")
	errDictionary = format.Corrupt("zstd: frame needs a dictionary")
	errBlock      = format.Corrupt("zstd: block is not valid")
)

// zstdReader is shared: DecodeAll keeps as many decoders as there are CPUs.
var zstdReader = sync.OnceValue(func() *zstd.Decoder {
	d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(0), zstd.WithDecodeAllCapLimit(true),
		zstd.WithDecoderMaxWindow(limits.ZstdWindow))
	if err != nil {
		panic(err) // the options are constants that the library allows
	}
	return d
})

// zstdSlack is room behind the output that makes the decoder copy in whole
// words: a block, of a frame that does not tell its size, and one copy.
const zstdSlack = maxBlock + 16

// stage is memory of the cluster size with zstdSlack behind it.
type stage struct{ b []byte }

var stages = sync.Pool{New: func() any { return new(stage) }}

// decodeZstd decodes src into dst by way of a stage: to copy a cluster costs
// much less than a decoder that watches where dst ends.
func decodeZstd(dst, src []byte) error {
	s := stages.Get().(*stage)
	defer stages.Put(s)
	if len(s.b) < len(dst)+zstdSlack {
		s.b = make([]byte, len(dst)+zstdSlack)
	}
	if err := decodeFrames(s.b[:len(dst)], src); err != nil {
		return err
	}
	copy(dst, s.b)
	return nil
}

// decodeFrames decodes frames until dst is full, which must be where a frame
// ends; dst has zstdSlack of capacity behind it, for any use. The decoder is
// shown whole frames only: it would take what lies behind the last one for
// another.
func decodeFrames(dst, src []byte) error {
	have := 0
	for range limits.ZstdFrames {
		room := len(dst) - have
		n, skip, err := frameLen(src, room)
		if err != nil {
			return err
		}
		if !skip {
			out, err := zstdReader().DecodeAll(src[:n], dst[have:have:len(dst)+zstdSlack])
			if err != nil {
				return fmt.Errorf("zstd: %w", err)
			}
			if len(out) > room {
				return errLong
			}
			have += len(out)
		}
		if have == len(dst) {
			return nil
		}
		src = src[n:]
	}
	return errFrames
}

// frameLen is the length of the frame that src begins with, and whether it is
// one to be skipped. It fails if the frame is not whole or would need more than
// room bytes of output or a larger window than allowed.
func frameLen(src []byte, room int) (n int, skip bool, err error) {
	if len(src) < 5 {
		return 0, false, noFrame(src)
	}
	switch magic := binary.LittleEndian.Uint32(src); {
	case magic&skippableMask == skippableMagic:
		if len(src) < 8 || uint64(binary.LittleEndian.Uint32(src[4:])) > uint64(len(src)-8) {
			return 0, false, errZstdEnd
		}
		return 8 + int(binary.LittleEndian.Uint32(src[4:])), true, nil
	case magic != frameMagic:
		return 0, false, errMagic
	}
	n, err = frameHeader(src, room)
	if err != nil {
		return 0, false, err
	}
	n, err = blocks(src, n)
	if err == nil && src[4]&checksumBit != 0 {
		n += 4
	}
	if err == nil && n > len(src) {
		err = errZstdEnd
	}
	return n, false, err
}

// noFrame tells data that are used up from data that are cut off.
func noFrame(src []byte) error {
	if len(src) == 0 {
		return fmt.Errorf("zstd: %w", io.ErrUnexpectedEOF)
	}
	return errZstdEnd
}

// frameHeader checks the header of a frame and returns its length.
func frameHeader(src []byte, room int) (int, error) {
	d := src[4]
	if d&reservedBit != 0 {
		return 0, errReserved
	}
	single := d&singleSegment != 0
	at, dict, size := 5, [4]int{0, 1, 2, 4}[d&3], [4]int{0, 2, 4, 8}[d>>6]
	if single {
		size = max(size, 1)
	} else {
		at++
	}
	if len(src) < at+dict+size {
		return 0, errZstdEnd
	}
	if !single {
		if w := src[5]; uint64(8+w&7)<<(minWindowLog-3+w>>3) > limits.ZstdWindow {
			return 0, errWindow
		}
	}
	if little(src[at:at+dict]) != 0 {
		return 0, errDictionary
	}
	at += dict
	content := little(src[at : at+size])
	if size == 2 {
		content += 256
	}
	if content > uint64(room) {
		return 0, errLong
	}
	return at + size, nil
}

// little reads a number of 0 to 8 bytes.
func little(b []byte) (x uint64) {
	for i, c := range b {
		x |= uint64(c) << (8 * i)
	}
	return x
}

// blocks returns where the blocks end that begin at src[n].
func blocks(src []byte, n int) (int, error) {
	for last := false; !last; {
		if len(src)-n < blockHeader {
			return 0, errZstdEnd
		}
		h := int(little(src[n : n+blockHeader]))
		kind, size := h>>1&3, h>>3
		if kind == blockReserved || size > maxBlock {
			return 0, errBlock
		}
		if kind == blockRLE {
			size = 1
		}
		n += blockHeader
		if size > len(src)-n {
			return 0, errZstdEnd
		}
		n, last = n+size, h&1 != 0
	}
	return n, nil
}

// zstdWriter is shared, like zstdReader.
var zstdWriter = sync.OnceValue(func() *zstd.Encoder {
	e, err := zstd.NewWriter(nil, zstd.WithEncoderCRC(false), zstd.WithLowerEncoderMem(true))
	if err != nil {
		panic(err) // the options are constants that the library allows
	}
	return e
})

func encodeZstd(dst, src []byte) ([]byte, bool) {
	out := zstdWriter().EncodeAll(src, dst)
	if len(out)-len(dst) >= len(src) {
		return dst, false
	}
	return out, true
}
