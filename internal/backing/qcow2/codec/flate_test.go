//go:build !race

package codec

import (
	"bytes"
	"compress/flate"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
)

func TestStreamsOfTheStandardLibraryDecode(t *testing.T) {
	for _, n := range []int{512, 4096, cluster, 2 << 20} {
		for name, src := range map[string][]byte{
			"zeroes": make([]byte, n), "text": text(11, n), "elf": elf(t, n), "mixed": mixed(t, n), "skewed": skewed(n),
		} {
			for level := flate.HuffmanOnly; level <= flate.BestCompression; level++ {
				var b bytes.Buffer
				w, err := flate.NewWriter(&b, level)
				if err != nil {
					t.Fatal(err)
				}
				w.Write(src)
				w.Close()
				if b.Len() > 2*n {
					continue
				}
				dst, intact := guarded(n)
				if err := Decode(format.Deflate, dst, b.Bytes()); err != nil || !bytes.Equal(dst, src) || !intact() {
					t.Errorf("%d bytes of %s at level %d: error %v, intact: %t", n, name, level, err, intact())
				}
			}
		}
	}
}
