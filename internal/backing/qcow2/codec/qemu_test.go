package codec

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
)

// sample is a cluster that qemu-img compressed.
type sample struct {
	plain []byte
	data  []byte // from the descriptor's offset to its bound, cut at the file's end
}

// qemuSamples has qemu-img compress plain and finds the compressed clusters in
// the image by its tables.
func qemuSamples(t testing.TB, plain []byte, kind string, clusterBits uint) []sample {
	t.Helper()
	dir := t.TempDir()
	raw, image := filepath.Join(dir, "raw"), filepath.Join(dir, "qcow2")
	if err := os.WriteFile(raw, plain, 0o600); err != nil {
		t.Fatal(err)
	}
	options := fmt.Sprintf("cluster_size=%d,compression_type=%s", 1<<clusterBits, kind)
	cmd := exec.Command("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, raw, image)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", cmd.Args, err, out)
	}
	file, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	be := binary.BigEndian
	g := format.NewGeometry(3, clusterBits, 4, false, false)
	l1 := be.Uint64(file[format.OffL1+4:])
	var all []sample
	for at := int64(0); at+g.ClusterSize <= int64(len(plain)); at += g.ClusterSize {
		l2, _, err := g.DecodeL1(be.Uint64(file[l1+uint64(at/g.L2Coverage)*8:]))
		if err != nil || l2 == 0 {
			t.Fatalf("L1 entry of %d: offset %d, %v", at, l2, err)
		}
		c, err := g.DecodeL2(be.Uint64(file[l2+at%g.L2Coverage/g.ClusterSize*8:]), 0)
		if err != nil {
			t.Fatal(err)
		}
		if c.Compressed {
			end := min(c.Host+c.Length, int64(len(file)))
			all = append(all, sample{plain[at : at+g.ClusterSize], file[c.Host:end]})
		}
	}
	return all
}

// text is n bytes that look like a log.
func text(seed uint64, n int) []byte {
	r := rand.New(rand.NewPCG(seed, 1))
	words := []string{"the", "kernel", "said", "device", "error", "ready", "eth0", "disk", "of", "started", "unit", "session"}
	var b bytes.Buffer
	for b.Len() < n {
		fmt.Fprintf(&b, "%d.%06d ", b.Len()/100, r.IntN(1000000))
		for range 4 + r.IntN(9) {
			b.WriteString(words[r.IntN(len(words))])
			b.WriteByte(' ')
		}
		b.WriteByte('\n')
	}
	return b.Bytes()[:n]
}

// elf is n bytes of a program, repeated if need be.
func elf(t testing.TB, n int) []byte {
	t.Helper()
	path, err := exec.LookPath("qemu-img")
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return bytes.Repeat(b, n/len(b)+1)[:n]
}

// mixed alternates, every 8 KiB, between text, noise, zeroes and a program.
func mixed(t testing.TB, n int) []byte {
	t.Helper()
	const piece = 8 << 10
	program := elf(t, n)
	b := text(2, n)
	r := rand.New(rand.NewPCG(3, 1))
	for at := 0; at+piece <= n; at += piece {
		p := b[at : at+piece]
		switch at / piece % 4 {
		case 1:
			for i := 0; i < len(p); i += 8 {
				binary.LittleEndian.PutUint64(p[i:], r.Uint64())
			}
		case 2:
			clear(p)
		case 3:
			copy(p, program[at:])
		}
	}
	return b
}

func TestQemuClustersDecode(t *testing.T) {
	for _, kind := range []struct {
		name string
		t    format.Compression
	}{{"zlib", format.Deflate}, {"zstd", format.Zstd}} {
		for _, bits := range []uint{9, 12, 16, 21} {
			t.Run(fmt.Sprintf("%s/%d", kind.name, bits), func(t *testing.T) {
				t.Parallel()
				// 4 MiB, so that even the largest clusters come in twos; the
				// small ones make do with less.
				n := min(4<<20, 256<<bits)
				decodeAll(t, kind.t, qemuSamples(t, mixed(t, n), kind.name, bits))
				decodeAll(t, kind.t, qemuSamples(t, elf(t, n), kind.name, bits))
				decodeAll(t, kind.t, qemuSamples(t, text(1, n), kind.name, bits))
			})
		}
	}
}

// decodeAll also shows that data in one sector less than they take fail
// (iotest 214), and that whatever follows them does no harm.
func decodeAll(t *testing.T, kind format.Compression, all []sample) {
	t.Helper()
	if len(all) == 0 {
		t.Fatal("qemu-img compressed no cluster")
	}
	for i, s := range all {
		dst := make([]byte, len(s.plain))
		if err := Decode(kind, dst, s.data); err != nil || !bytes.Equal(dst, s.plain) {
			t.Fatalf("cluster %d: error %v, bytes equal: %t", i, err, bytes.Equal(dst, s.plain))
		}
		long := append(bytes.Clone(s.data), bytes.Repeat([]byte{0x28, 0xb5, 0x2f, 0xfd}, 200)...)
		if err := Decode(kind, dst, long); err != nil || !bytes.Equal(dst, s.plain) {
			t.Fatalf("cluster %d with data behind it: error %v", i, err)
		}
		// The bound is within 511 bytes of the end of the data.
		if short := s.data[:max(0, len(s.data)-512)]; Decode(kind, dst, short) == nil {
			t.Fatalf("cluster %d of %d bytes decodes from %d", i, len(s.data), len(short))
		}
	}
}
