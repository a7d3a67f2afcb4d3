package codec

import (
	"bytes"
	"compress/flate"
	"errors"
	"io"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// fuzzCluster is the cluster of the fuzz tests.
const fuzzCluster = 4096

// FuzzInflate holds Decode against the standard library: both take the same
// streams and get the same bytes from them.
func FuzzInflate(f *testing.F) {
	for _, n := range []int{fuzzCluster - 1, fuzzCluster, fuzzCluster + 1} {
		out, _ := Encode(format.Deflate, nil, text(9, n))
		f.Add(out)
		f.Add(stored(true, text(9, n)))
		var b bytes.Buffer
		w, err := flate.NewWriter(&b, flate.HuffmanOnly)
		if err != nil {
			f.Fatal(err)
		}
		w.Write(text(9, n))
		w.Close()
		f.Add(b.Bytes())
	}
	f.Add(bytes.Repeat(stored(false, nil), 10))
	f.Add([]byte{0x63, 0x60, 0x18, 0x05, 0xa3, 0x60, 0x14, 0x0c, 0x77, 0x00, 0x00})
	f.Add(bytes.Repeat([]byte{0xff}, 12))
	f.Fuzz(func(t *testing.T, src []byte) {
		src = src[:min(len(src), 2*fuzzCluster)]
		want, err := io.ReadAll(io.LimitReader(flate.NewReader(bytes.NewReader(src)), fuzzCluster+1))
		wanted := err == nil && len(want) == fuzzCluster
		dst, intact := guarded(fuzzCluster)
		switch err := Decode(format.Deflate, dst, src); {
		case (err == nil) != wanted:
			t.Errorf("decode: %v, want success: %t", err, wanted)
		case wanted && !bytes.Equal(dst, want):
			t.Error("decode differs from the standard library")
		}
		if !intact() {
			t.Error("decode wrote beyond the cluster")
		}
	})
}

// FuzzDecodeZstd holds Decode against the streaming reader, which needs no
// walk through the frames: what Decode takes, the reader gives, and whatever
// the reader finds whole with the cluster, Decode takes as well.
func FuzzDecodeZstd(f *testing.F) {
	for _, n := range []int{fuzzCluster - 1, fuzzCluster, fuzzCluster + 1} {
		out, _ := Encode(format.Zstd, nil, text(9, n))
		f.Add(out)
		f.Add(rle(n))
		f.Add(append(skippable("abc"), out...))
	}
	f.Add(append(rle(fuzzCluster/2), rle(fuzzCluster/2)...))
	f.Add(frame(checksumBit, []byte{10 << 3}, block(true, 0, 3, []byte("abc")), make([]byte, 4)))
	f.Add(bytes.Repeat([]byte{0xff}, 12))
	stream, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(limits.ZstdWindow))
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, src []byte) {
		src = src[:min(len(src), 2*fuzzCluster)]
		dst, intact := guarded(fuzzCluster)
		err := Decode(format.Zstd, dst, src)
		if !intact() {
			t.Error("decode wrote beyond the cluster")
		}
		if err := stream.Reset(bytes.NewReader(src)); err != nil {
			t.Fatal(err)
		}
		all, streamErr := io.ReadAll(io.LimitReader(stream, fuzzCluster+1))
		switch {
		case err == nil && !bytes.HasPrefix(all, dst):
			t.Errorf("decode gives what the reader does not: it has %d bytes, %v", len(all), streamErr)
		case err != nil && !errors.Is(err, errFrames) && streamErr == nil && len(all) == fuzzCluster:
			t.Errorf("decode: %v, and the reader takes it", err)
		}
	})
}
