package interop

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// hugeSize is a sparse image that 32-bit effects cannot cover at once.
const hugeSize = 8 << 40

// tree runs a program of the newer Debian and returns its standard output.
func tree(t *testing.T, d *testenv.DebianTree, program string, args ...string) string {
	t.Helper()
	return testenv.Run(t, d.Argv(program, args...)...)
}

func TestNewerLibnbdNegotiatesExtendedHeaders(t *testing.T) {
	vmdiskdOnly(t) // packaged nbdkit does not know them
	d := testenv.Trixie(t)
	s := serve(t, testenv.Options{Image: testenv.SparseImage(t, hugeSize)})
	out := tree(t, d, "nbdinfo", s.URI)
	if !strings.Contains(out, "using extended packets") && !strings.Contains(out, "extended headers") {
		t.Errorf("nbdinfo says:\n%s", out)
	}
}

func TestHolesAboveFourGiBAreOneExtent(t *testing.T) {
	vmdiskdOnly(t) // packaged nbdkit does not know extended headers
	d := testenv.Trixie(t)
	s := serve(t, testenv.Options{Image: testenv.SparseImage(t, hugeSize)})
	var got []struct{ Offset, Length, Type int64 }
	decode(t, tree(t, d, "nbdinfo", "--json", "--map", s.URI), &got)
	if len(got) != 1 || got[0].Length != hugeSize || got[0].Type != 3 {
		t.Errorf("got %+v, want one hole of 8 TiB", got)
	}
}

func TestOneRequestZeroesSixGiB(t *testing.T) {
	vmdiskdOnly(t) // packaged nbdkit does not know extended headers
	d := testenv.Trixie(t)
	s := serve(t, testenv.Options{Image: testenv.SparseImage(t, hugeSize)})
	argv, err := d.PythonArgv(filepath.Join("testdata", "libnbd_check.py"), s.URI, "extended")
	if err != nil {
		t.Fatal(err)
	}
	testenv.Run(t, argv...)
}

func TestNewerLibnbdMovesADisk(t *testing.T) {
	d := testenv.Trixie(t)
	source := testenv.PatternImage(t, diskSize)
	image := testenv.SparseImage(t, diskSize)
	s := serve(t, testenv.Options{Image: image})
	tree(t, d, "nbdcopy", "--connections=4", "--flush", source, s.URI)
	sameFiles(t, source, image, -1)
	argv, err := d.PythonArgv(filepath.Join("testdata", "libnbd_check.py"), s.URI, "structured")
	if err != nil {
		t.Fatal(err)
	}
	testenv.Run(t, argv...)
}
