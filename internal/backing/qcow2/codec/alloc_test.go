// The race detector makes sync.Pool forget at random.
//go:build !race

package codec

import (
	"fmt"
	"testing"
)

func TestDecodeAllocatesNothing(t *testing.T) {
	for _, kind := range types {
		for _, n := range []int{512, cluster, 2 << 20} {
			src, ok := Encode(kind, nil, text(8, n))
			if !ok {
				t.Fatalf("type %d: %d bytes do not encode", kind, n)
			}
			dst := make([]byte, n)
			t.Run(fmt.Sprintf("%d/%d", kind, n), func(t *testing.T) {
				if a := testing.AllocsPerRun(100, func() {
					if err := Decode(kind, dst, src); err != nil {
						t.Error(err)
					}
				}); a != 0 {
					t.Errorf("%v allocations per cluster, want 0", a)
				}
			})
		}
	}
}
