package codec

import (
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
)

// BenchmarkDecode decodes clusters of 64 KiB that qemu-img compressed.
func BenchmarkDecode(b *testing.B) {
	const n = 4 << 20
	for _, data := range []struct {
		name  string
		plain []byte
	}{{"text", text(1, n)}, {"elf", elf(b, n)}, {"mixed", mixed(b, n)}} {
		for kind, name := range map[format.Compression]string{format.Deflate: "zlib", format.Zstd: "zstd"} {
			b.Run(name+"/"+data.name, func(b *testing.B) {
				all := qemuSamples(b, data.plain, name, 16)
				dst := make([]byte, cluster)
				b.SetBytes(cluster)
				i := 0
				for b.Loop() {
					if err := Decode(kind, dst, all[i%len(all)].data); err != nil {
						b.Fatal(err)
					}
					i++
				}
			})
		}
	}
}
