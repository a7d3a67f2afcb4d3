package interop

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/test/testenv"
)

func TestQemuImgInfoSeesTheSize(t *testing.T) {
	testenv.Require(t, "qemu-img")
	s := serve(t, testenv.Options{Export: "disk"})
	var got struct {
		Size   int64  `json:"virtual-size"`
		Format string `json:"format"`
	}
	decode(t, testenv.Run(t, "qemu-img", "info", "-f", "raw", "--output=json", s.URI), &got)
	if got.Size != diskSize || got.Format != "raw" {
		t.Errorf("got %+v, want %d bytes of raw", got, diskSize)
	}
}

func TestQemuImgConvertMovesADiskBothWays(t *testing.T) {
	testenv.Require(t, "qemu-img")
	source := testenv.PatternImage(t, diskSize)
	image := testenv.SparseImage(t, diskSize)
	s := serve(t, testenv.Options{Image: image})
	testenv.Run(t, "qemu-img", "convert", "-n", "-m", "8", "-W", "-f", "raw", "-O", "raw", source, s.URI)
	sameFiles(t, source, image, -1)
	testenv.Run(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", source, s.URI)
	back := filepath.Join(testenv.TempDir(t), "back.qcow2")
	testenv.Run(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", s.URI, back)
	testenv.Run(t, "qemu-img", "compare", "-f", "raw", "-F", "qcow2", source, back)
}

func TestQemuImgCompareSeesADifference(t *testing.T) {
	testenv.Require(t, "qemu-img")
	s := serve(t, testenv.Options{})
	other := testenv.SparseImage(t, diskSize)
	if out, err := testenv.Try(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", other, s.URI); err == nil || !strings.Contains(out, "mismatch") {
		t.Errorf("got %q, %v; want a mismatch", out, err)
	}
}

func TestQemuImgMapTellsDataFromHoles(t *testing.T) {
	testenv.Require(t, "qemu-img", "qemu-io")
	s := serve(t, testenv.Options{Image: testenv.SparseImage(t, 8<<20)})
	testenv.Run(t, "qemu-io", "-f", "raw", "-c", "write -P 7 2M 1M", "-c", "flush", s.URI)
	var got []struct {
		Start, Length int64
		Zero, Data    bool
	}
	decode(t, testenv.Run(t, "qemu-img", "map", "-f", "raw", "--output=json", s.URI), &got)
	data := int64(0)
	for _, e := range got {
		if e.Data && !e.Zero {
			data += e.Length
			if e.Start < 2<<20 || e.Start+e.Length > 3<<20 {
				t.Errorf("data at %d for %d bytes", e.Start, e.Length)
			}
		}
	}
	if data != 1<<20 {
		t.Errorf("%d bytes of data, want 1 MiB: %+v", data, got)
	}
}

func TestQemuIOFindsItsPatterns(t *testing.T) {
	testenv.Require(t, "qemu-io")
	s := serve(t, testenv.Options{})
	testenv.Run(t, "qemu-io", "-f", "raw",
		"-c", "write -P 0x11 0 64k", "-c", "write -f -P 0x22 65536 512",
		"-c", "aio_write -P 0x33 1M 1M", "-c", "aio_flush",
		"-c", "write -z 1M 512k", "-c", "write -z -u 3M 1M", "-c", "discard 4M 1M", "-c", "flush", s.URI)
	out := testenv.Run(t, "qemu-io", "-f", "raw",
		"-c", "read -P 0x11 0 64k", "-c", "read -P 0x22 65536 512",
		"-c", "read -P 0 1M 512k", "-c", "read -P 0x33 1536k 512k", "-c", "read -P 0 3M 1M", s.URI)
	if strings.Contains(out, "failed") || strings.Count(out, "bytes at offset") != 5 {
		t.Errorf("qemu-io says:\n%s", out)
	}
}
