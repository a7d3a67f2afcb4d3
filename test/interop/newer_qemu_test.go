package interop

import (
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// QEMU's client negotiates extended headers from 8.2 on, and sends writes
// without NBD_CMD_FLAG_PAYLOAD_LEN: a server has to know their payload by the
// command.

func TestNewerQemuIOFindsItsPatterns(t *testing.T) {
	d := testenv.Trixie(t)
	source := testenv.PatternImage(t, diskSize)
	s := serve(t, testenv.Options{Image: testenv.SparseImage(t, diskSize)})
	tree(t, d, "qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", source, s.URI)
	out := tree(t, d, "qemu-img", "compare", "-f", "raw", "-F", "raw", source, s.URI)
	if !strings.Contains(out, "identical") {
		t.Errorf("qemu-img says %q", out)
	}
	out = tree(t, d, "qemu-io", "-f", "raw", "-c", "write -P 0x44 1M 1M", "-c", "write -f -P 0x55 0 512",
		"-c", "write -z 2M 1M", "-c", "flush",
		"-c", "read -P 0x44 1M 1M", "-c", "read -P 0x55 0 512", "-c", "read -P 0 2M 1M", s.URI)
	if strings.Contains(out, "failed") {
		t.Errorf("qemu-io says:\n%s", out)
	}
}

func TestNewerQemuMapsEightTiB(t *testing.T) {
	d := testenv.Trixie(t)
	s := serve(t, testenv.Options{Image: testenv.SparseImage(t, hugeSize)})
	tree(t, d, "qemu-io", "-f", "raw", "-c", "write -P 1 7T 1M", "-c", "flush", s.URI)
	var got []struct {
		Start, Length int64
		Zero          bool
	}
	decode(t, tree(t, d, "qemu-img", "map", "-f", "raw", "--output=json", s.URI), &got)
	if len(got) != 3 || got[1].Start != 7<<40 || got[1].Length != 1<<20 || got[1].Zero {
		t.Errorf("got %+v, want 1 MiB of data at 7 TiB between two holes", got)
	}
}
