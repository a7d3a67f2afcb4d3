package codec

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
)

var types = []format.Compression{format.Deflate, format.Zstd}

const cluster = 64 << 10

func TestEncodedClustersDecode(t *testing.T) {
	for _, kind := range types {
		for _, n := range []int{512, 4096, cluster, 2 << 20} {
			for _, src := range [][]byte{make([]byte, n), text(4, n)} {
				out, ok := Encode(kind, []byte("before"), src)
				if !ok || len(out) >= len(src)+6 || string(out[:6]) != "before" {
					t.Fatalf("type %d: encode %d bytes: %t, %d bytes", kind, n, ok, len(out))
				}
				dst := make([]byte, n)
				if err := Decode(kind, dst, out[6:]); err != nil || !bytes.Equal(dst, src) {
					t.Errorf("type %d: decode %d bytes: %v", kind, n, err)
				}
			}
		}
	}
}

func TestNoiseIsNotEncoded(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 1))
	noise := make([]byte, cluster)
	for i := 0; i < len(noise); i += 8 {
		binary.LittleEndian.PutUint64(noise[i:], r.Uint64())
	}
	for _, kind := range append(types, 2) {
		if out, ok := Encode(kind, []byte("before"), noise); ok || string(out) != "before" {
			t.Errorf("type %d: noise encodes to %d bytes, %t", kind, len(out), ok)
		}
	}
}

// TestDeflateLooksBackNoFurtherThanItsWindow has a repetition at a distance
// of 8000 bytes only, which a writer that looks back 4096 cannot see.
func TestDeflateLooksBackNoFurtherThanItsWindow(t *testing.T) {
	r := rand.New(rand.NewPCG(6, 1))
	src := make([]byte, cluster)
	for i := range src {
		if src[i] = byte(r.Uint32()); i >= 8000 {
			src[i] = src[i-8000]
		}
	}
	if out, ok := Encode(format.Deflate, nil, src); ok {
		t.Errorf("8000-periodic noise encodes to %d bytes", len(out))
	}
}

// skewed is noise in which every byte is about twice as frequent as the next,
// so that the longest codes occur; short repetitions lead back by all powers
// of two.
func skewed(n int) []byte {
	r := rand.New(rand.NewPCG(10, 1))
	b := make([]byte, 0, n+8)
	for len(b) < n {
		back := 1 << r.IntN(16)
		if back += r.IntN(back); r.IntN(4) == 0 && back <= len(b) {
			from := len(b) - back
			b = append(b, b[from:min(from+3+r.IntN(5), len(b))]...)
			continue
		}
		b = append(b, byte(bits.LeadingZeros32(r.Uint32()|1<<8))<<3|byte(r.IntN(8)&r.IntN(8)))
	}
	return b[:n]
}

func TestConcurrentDecodesDoNotMix(t *testing.T) {
	var wg sync.WaitGroup
	for i := range 8 {
		kind, src := types[i%2], text(uint64(i), cluster)
		wg.Go(func() {
			for range 20 {
				out, _ := Encode(kind, nil, src)
				dst := make([]byte, len(src))
				if err := Decode(kind, dst, out); err != nil || !bytes.Equal(dst, src) {
					t.Errorf("type %d: %v", kind, err)
				}
			}
		})
	}
	wg.Wait()
}

// stored is a stored deflate block.
func stored(last bool, p []byte) []byte {
	b := []byte{0}
	if last {
		b[0] = 1
	}
	b = binary.LittleEndian.AppendUint16(b, uint16(len(p)))
	b = binary.LittleEndian.AppendUint16(b, ^uint16(len(p)))
	return append(b, p...)
}

// skippable is a skippable zstd frame.
func skippable(p string) []byte {
	b := binary.LittleEndian.AppendUint32(nil, skippableMagic+7)
	return append(binary.LittleEndian.AppendUint32(b, uint32(len(p))), p...)
}

// frame is a zstd frame: descriptor, the rest of its header, blocks.
func frame(descriptor byte, header []byte, blocks ...[]byte) []byte {
	b := append(binary.LittleEndian.AppendUint32(nil, frameMagic), descriptor)
	return append(append(b, header...), bytes.Join(blocks, nil)...)
}

// block is a zstd block, for RLE with one byte of p and a size of n.
func block(last bool, kind, n int, p []byte) []byte {
	h := n<<3 | kind<<1
	if last {
		h |= 1
	}
	return append([]byte{byte(h), byte(h >> 8), byte(h >> 16)}, p...)
}

// rle yields n zeroes in a frame with a window of 1 MiB.
func rle(n int) []byte {
	return frame(0, []byte{10 << 3}, block(true, blockRLE, n, []byte{0}))
}

func encoded(t *testing.T, kind format.Compression, src []byte) []byte {
	t.Helper()
	out, ok := Encode(kind, nil, src)
	if !ok {
		t.Fatalf("type %d does not encode", kind)
	}
	return out
}

// TestHostileData is the catalogue of bad compressed data, among valid ones
// that are next to them. The cluster has 4096 bytes.
func TestHostileData(t *testing.T) {
	const n = 4096
	zeroes := func(n int) []byte { return make([]byte, n) }
	plain := text(7, n)
	type test struct {
		name string
		kind format.Compression
		src  []byte
		ok   bool
	}
	tests := []test{
		{"no such type", 2, encoded(t, format.Deflate, plain), false},
		{"empty stored blocks and data", format.Deflate, append(bytes.Repeat(stored(false, nil), 100), stored(true, plain)...), true},
		{"empty stored blocks only", format.Deflate, bytes.Repeat(stored(false, nil), n), false},
		{"empty stored blocks behind the data", format.Deflate, append(stored(false, plain), bytes.Repeat(stored(false, nil), n)...), false},
		{"reserved deflate block", format.Deflate, []byte{7, 0, 0, 0}, false},
		{"distance before the beginning", format.Deflate, []byte{0x4b, 0x84, 0x01, 0x00}, false},

		{"frames in a row", format.Zstd, append(rle(n/2), rle(n/2)...), true},
		{"16 frames", format.Zstd, bytes.Repeat(rle(n/16), 16), true},
		{"17 frames", format.Zstd, append(bytes.Repeat(rle(n/32), 16), rle(n/2)...), false},
		{"skippable frame", format.Zstd, append(skippable("abc"), rle(n)...), true},
		{"15 skippable frames", format.Zstd, append(bytes.Repeat(skippable(""), 15), rle(n)...), true},
		{"skippable frame chain", format.Zstd, append(bytes.Repeat(skippable(""), 16), rle(n)...), false},
		{"skippable frame beyond the data", format.Zstd, append(skippable("abc")[:8], 0xff), false},
		{"skippable frame of 4 GiB", format.Zstd, append([]byte{0x50, 0x2a, 0x4d, 0x18}, 0xff, 0xff, 0xff, 0xff, 0), false},
		{"half a magic number", format.Zstd, rle(n)[:3], false},
		{"window of 8 MiB", format.Zstd, frame(0, []byte{13 << 3}, block(true, blockRLE, n, []byte{0})), true},
		{"window of 9 MiB", format.Zstd, frame(0, []byte{13<<3 | 1}, block(true, blockRLE, n, []byte{0})), false},
		{"window of 2^40", format.Zstd, frame(0, []byte{30 << 3}, block(true, blockRLE, n, []byte{0})), false},
		{"largest window", format.Zstd, frame(0, []byte{0xff}, block(true, blockRLE, n, []byte{0})), false},
		{"content size", format.Zstd, frame(1<<5|1<<6, []byte{0, 15}, block(true, blockRLE, n, []byte{0})), true},
		{"content size above the cluster", format.Zstd, frame(1<<5|1<<6, []byte{1, 15}, block(true, blockRLE, n+1, []byte{0})), false},
		{"content size of 2^64-1", format.Zstd, frame(1<<5|3<<6, bytes.Repeat([]byte{0xff}, 8), block(true, blockRLE, n, []byte{0})), false},
		{"content size below the content", format.Zstd, frame(1<<5|1<<6, []byte{0, 14}, block(true, blockRLE, n, []byte{0})), false},
		{"two frames with content sizes above the cluster", format.Zstd, bytes.Repeat(frame(1<<5|1<<6, []byte{0, 14}, block(true, blockRLE, n-256, []byte{0})), 2), false},
		{"dictionary", format.Zstd, frame(1, []byte{10 << 3, 9}, block(true, blockRLE, n, []byte{0})), false},
		{"reserved bit", format.Zstd, frame(reservedBit, []byte{10 << 3}, block(true, blockRLE, n, []byte{0})), false},
		{"reserved zstd block", format.Zstd, frame(0, []byte{10 << 3}, block(true, blockReserved, 0, zeroes(9))), false},
		{"block above 128 KiB", format.Zstd, frame(0, []byte{10 << 3}, block(true, blockRLE, maxBlock+1, []byte{0})), false},
		{"raw block beyond the data", format.Zstd, frame(0, []byte{10 << 3}, block(true, 0, n, zeroes(n-1))), false},
		{"no last block", format.Zstd, frame(0, []byte{10 << 3}, block(false, blockRLE, n, []byte{0})), false},
		{"empty raw blocks and data", format.Zstd, frame(0, []byte{10 << 3}, bytes.Repeat(block(false, 0, 0, nil), 99), block(true, blockRLE, n, []byte{0})), true},
		{"bomb of many blocks", format.Zstd, frame(0, []byte{13 << 3}, bytes.Repeat(block(false, blockRLE, maxBlock, []byte{0}), 2000), block(true, 0, 0, nil)), false},
		{"checksum that is wrong", format.Zstd, frame(checksumBit, []byte{10 << 3}, block(true, blockRLE, n, []byte{0}), zeroes(4)), false},
		{"checksum cut off", format.Zstd, frame(checksumBit, []byte{10 << 3}, block(true, blockRLE, n, []byte{0}), zeroes(3)), false},
		{"input above two clusters", format.Zstd, append(skippable(string(zeroes(2*n))), rle(n)...), false},
	}
	for _, kind := range types {
		data := encoded(t, kind, plain)
		add := func(name string, src []byte, ok bool) {
			tests = append(tests, test{fmt.Sprintf("type %d: %s", kind, name), kind, src, ok})
		}
		add("garbage stream", bytes.Repeat([]byte{0xff}, 12), false)
		add("nothing", nil, false)
		add("cluster", data, true)
		add("cluster and more", append(bytes.Clone(data), bytes.Repeat([]byte{0xff}, 600)...), true)
		add("short stream", data[:len(data)-1], false)
		add("one byte less than the cluster", encoded(t, kind, plain[:n-1]), false)
		add("bomb of one byte more", encoded(t, kind, text(7, n+1)), false)
		add("bomb of 16 MiB", encoded(t, kind, zeroes(16<<20)), false)
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			checkDecode(t, tt.kind, n, tt.src, tt.ok)
		})
	}
}

// guarded is a slice of n bytes with others behind it in its capacity, and a
// function that tells whether those are untouched.
func guarded(n int) (dst []byte, intact func() bool) {
	const guard = 256 << 10
	b := bytes.Repeat([]byte{0xa5}, n+guard)
	return b[:n], func() bool { return bytes.Count(b[n:], []byte{0xa5}) == guard }
}

func checkDecode(t *testing.T, kind format.Compression, n int, src []byte, ok bool) {
	t.Helper()
	dst, intact := guarded(n)
	before := bytes.Clone(src)
	if err := Decode(kind, dst, src); (err == nil) != ok {
		t.Errorf("decode %d bytes: %v, want success: %t", len(src), err, ok)
	}
	if !intact() {
		t.Error("decode wrote beyond the cluster")
	}
	if !bytes.Equal(src, before) {
		t.Error("decode wrote to its input")
	}
}

// bitString packs groups of bits as deflate does; a group is written with its
// first bit first, spaces do not count.
func bitString(s string) []byte {
	s = strings.ReplaceAll(s, " ", "")
	b := make([]byte, (len(s)+7)/8)
	for i, c := range s {
		b[i/8] |= byte(c-'0') << (i % 8)
	}
	return b
}

// TestDeflateErrorsAreTold has streams that break one rule of RFC 1951 each.
// Numbers have their lowest bit first, codes their highest.
func TestDeflateErrorsAreTold(t *testing.T) {
	const (
		dynamic = "1 01 "
		fixed   = "1 10 "
		zeroLit = "00110000 "
	)
	// dyn is a dynamic block of 257+lits and 1+dists symbols with code lengths
	// for 16, 17, 18, 0 (and so on in that order), then rest.
	dyn := func(lits, dists, count string, rest string) []byte {
		return bitString(dynamic + lits + dists + count + rest + strings.Repeat("0", 64))
	}
	for _, tt := range []struct {
		name string
		src  []byte
		want error
	}{
		{"no bits", nil, errDeflateEnd},
		{"block type 3", bitString("1 11"), errDeflateBlock},
		{"stored without length", []byte{1, 0, 0}, errDeflateEnd},
		{"stored with false complement", []byte{1, 0, 0, 0xff, 0xfe}, errDeflateBlock},
		{"stored beyond the data", []byte{1, 9, 0, 0xf6, 0xff, 1}, errDeflateEnd},
		{"stored beyond the cluster", stored(true, make([]byte, 513)), errLong},
		{"fixed end at once", bitString(fixed + "0000000"), errDeflateShort},
		{"fixed literal and no more", bitString(fixed + zeroLit), errDeflateEnd},
		{"fixed length symbol 286", bitString(fixed + "11000110 00000000"), errDeflateCode},
		{"fixed distance symbol 30", bitString(fixed + zeroLit + "0000001 11110 00000000"), errDeflateCode},
		{"distance before the cluster", bitString(fixed + zeroLit + "0000001 00001 00000000"), errDistance},
		{"dynamic cut in its header", bitString(dynamic + "00000"), errDeflateEnd},
		{"dynamic cut in the first code", bitString(dynamic + "00000 00000 0000"), errDeflateEnd},
		{"287 literals", dyn("01111", "00000", "0000", ""), errDeflateBlock},
		{"31 distances", dyn("00000", "01111", "0000", ""), errDeflateBlock},
		{"first code too full", dyn("00000", "00000", "0000", "100 100 100 000"), errDeflateBlock},
		{"first code not full", dyn("00000", "00000", "0000", "010 000 000 000"), errDeflateBlock},
		{"first code empty", dyn("00000", "00000", "0000", "000 000 000 000"), errDeflateCode},
		{"repeat of nothing", dyn("00000", "00000", "0000", "100 000 000 100 1"), errDeflateBlock},
		// 18 is the code 0 and 0 the code 1: 138 + 138 zeroes are too many.
		{"run beyond the symbols", dyn("00000", "00000", "0000", "000 000 100 100 1 1111111 1 1111111"), errDeflateBlock},
		{"codes all empty", dyn("00000", "00000", "0000", "000 000 100 100 1 1111111 1 1011011"), errDeflateCode},
		// 8 is the code 0 and 18 the code 1: 257 zeroes, then one distance.
		{"distance code not full", dyn("00000", "00000", "1000", "000 000 100 000 100 1 1111111 1 0011011 0"), errDeflateBlock},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dst, intact := guarded(512)
			if err := Decode(format.Deflate, dst, tt.src); !errors.Is(err, tt.want) || !intact() {
				t.Errorf("decode: %v, want %v", err, tt.want)
			}
			if tt.want == errDeflateEnd {
				return
			}
			// The same where the end of the data is far.
			long := append(bytes.Clone(tt.src), make([]byte, 2*fastIn)...)
			if err := Decode(format.Deflate, dst, long); !errors.Is(err, tt.want) || !intact() {
				t.Errorf("decode with more behind: %v, want %v", err, tt.want)
			}
		})
	}
}
