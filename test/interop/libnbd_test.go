package interop

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// info is the part of nbdinfo --json that is looked at.
type info struct {
	Protocol   string `json:"protocol"`
	Structured bool   `json:"structured"`
	TLS        bool   `json:"TLS"`
	Exports    []struct {
		Name      string   `json:"export-name"`
		Size      int64    `json:"export-size"`
		Contexts  []string `json:"contexts"`
		ReadOnly  bool     `json:"is_read_only"`
		MultiConn bool     `json:"can_multi_conn"`
		Flush     bool     `json:"can_flush"`
		FUA       bool     `json:"can_fua"`
		Trim      bool     `json:"can_trim"`
		Zero      bool     `json:"can_zero"`
		Cache     bool     `json:"can_cache"`
		DF        bool     `json:"can_df"`
	} `json:"exports"`
}

func TestNbdinfoSeesEveryCapability(t *testing.T) {
	testenv.Require(t, "nbdinfo")
	s := serve(t, testenv.Options{})
	var got info
	decode(t, testenv.Run(t, "nbdinfo", "--json", s.URI), &got)
	if got.Protocol != "newstyle-fixed" || !got.Structured || len(got.Exports) != 1 {
		t.Fatalf("got %+v", got)
	}
	e := got.Exports[0]
	if e.Size != diskSize || e.ReadOnly {
		t.Errorf("size %d, read-only %v; want %d and writable", e.Size, e.ReadOnly, diskSize)
	}
	for name, has := range map[string]bool{
		"multi-conn": e.MultiConn, "flush": e.Flush, "fua": e.FUA, "trim": e.Trim,
		"zero": e.Zero, "cache": e.Cache, "df": e.DF,
		"base:allocation": strings.Contains(strings.Join(e.Contexts, " "), "base:allocation"),
	} {
		if !has {
			t.Errorf("%s is missing", name)
		}
	}
}

func TestNbdinfoSeesReadOnly(t *testing.T) {
	testenv.Require(t, "nbdinfo")
	s := serve(t, testenv.Options{ReadOnly: true})
	var got info
	decode(t, testenv.Run(t, "nbdinfo", "--json", s.URI), &got)
	if len(got.Exports) != 1 || !got.Exports[0].ReadOnly || got.Exports[0].Trim {
		t.Errorf("got %+v, want one read-only export without trim", got.Exports)
	}
}

func TestNbdinfoSizeIsTheFiles(t *testing.T) {
	testenv.Require(t, "nbdinfo")
	for _, size := range []int64{512, 1 << 20, 1<<20 + 512, 8 << 40} {
		s := serve(t, testenv.Options{Image: testenv.SparseImage(t, size)})
		if got := strings.TrimSpace(testenv.Run(t, "nbdinfo", "--size", s.URI)); got != fmt.Sprint(size) {
			t.Errorf("size %s, want %d", got, size)
		}
	}
}

func TestNbdinfoListsTheExportByItsName(t *testing.T) {
	vmdiskdOnly(t) // nbdkit's -e is not a name that it lists
	testenv.Require(t, "nbdinfo")
	for _, name := range []string{"", "disk", "a b/ü"} {
		s := serve(t, testenv.Options{Export: name})
		var got info
		decode(t, testenv.Run(t, "nbdinfo", "--json", "--list", s.URI), &got)
		if len(got.Exports) != 1 || got.Exports[0].Name != name || got.Exports[0].Size != diskSize {
			t.Errorf("export %q is listed as %+v", name, got.Exports)
		}
	}
}

func TestNbdinfoMapTellsDataFromHoles(t *testing.T) {
	testenv.Require(t, "nbdinfo")
	image := testenv.SparseImage(t, 8<<20)
	f, err := os.OpenFile(image, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(make([]byte, 1<<20), 2<<20); err != nil {
		t.Fatal(err)
	}
	// Without the sync the file system may not have allocated the range yet.
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	s := serve(t, testenv.Options{Image: image})
	type extent struct{ Offset, Length, Type int64 }
	var got []extent
	decode(t, testenv.Run(t, "nbdinfo", "--json", "--map", s.URI), &got)
	want := []extent{{0, 2 << 20, 3}, {2 << 20, 1 << 20, 0}, {3 << 20, 5 << 20, 3}}
	if len(got) != len(want) {
		t.Fatalf("got %+v, want %+v", got, want)
	}
	for i := range want {
		if got[i] != want[i] {
			t.Errorf("extent %d is %+v, want %+v", i, got[i], want[i])
		}
	}
}

func TestNbdcopyMovesADiskBothWays(t *testing.T) {
	testenv.Require(t, "nbdcopy")
	source := testenv.PatternImage(t, diskSize)
	image := testenv.SparseImage(t, diskSize)
	s := serve(t, testenv.Options{Image: image})
	testenv.Run(t, "nbdcopy", "--connections=4", "--requests=32", "--flush", source, s.URI)
	sameFiles(t, source, image, -1)
	back := filepath.Join(testenv.TempDir(t), "back.img")
	testenv.Run(t, "nbdcopy", "--connections=4", "--requests=32", s.URI, back)
	sameFiles(t, source, back, -1)
}

func TestNbdcopyKeepsHolesAndZeroesOldData(t *testing.T) {
	testenv.Require(t, "nbdcopy")
	source := testenv.SparseImage(t, diskSize)
	image := testenv.PatternImage(t, diskSize)
	s := serve(t, testenv.Options{Image: image})
	testenv.Run(t, "nbdcopy", "--connections=4", "--flush", source, s.URI)
	sameFiles(t, source, image, -1)
}

func TestNbdcopyBetweenTwoServers(t *testing.T) {
	testenv.Require(t, "nbdcopy")
	from := serve(t, testenv.Options{ReadOnly: true})
	image := testenv.SparseImage(t, diskSize)
	to := serve(t, testenv.Options{Image: image})
	testenv.Run(t, "nbdcopy", "--connections=4", from.URI, to.URI)
	testenv.Run(t, "nbdcopy", to.URI, filepath.Join(testenv.TempDir(t), "out.img"))
	want := testenv.PatternImage(t, diskSize)
	sameFiles(t, want, image, -1)
}

// python runs one check of testdata/libnbd_check.py.
func python(t *testing.T, args ...string) {
	t.Helper()
	testenv.Require(t, "/usr/bin/python3")
	ctx := testenv.Context(t)
	if out, err := run(ctx, []string{"/usr/bin/python3", "-c", "import nbd"}); err != nil {
		t.Skipf("needs python3-libnbd: %s", out)
	}
	script := filepath.Join("testdata", "libnbd_check.py")
	if out, err := run(ctx, append([]string{"/usr/bin/python3", script}, args...)); err != nil {
		t.Errorf("%q: %v\n%s", args, err, out)
	}
}

func TestLibnbdAgreesWithAModelOfTheDisk(t *testing.T) {
	s := serve(t, testenv.Options{})
	for _, check := range []string{"structured", "simple", "chunks", "errors", "status", "multi_conn", "in_flight"} {
		t.Run(check, func(t *testing.T) { python(t, s.URI, check) })
	}
}

func TestLibnbdAgreesOverTCP(t *testing.T) {
	s := serve(t, testenv.Options{Port: testenv.FreePort(t)})
	for _, check := range []string{"structured", "simple", "in_flight"} {
		t.Run(check, func(t *testing.T) { python(t, s.URI, check) })
	}
}

func TestLibnbdNegotiatesOptionByOption(t *testing.T) {
	vmdiskdOnly(t) // nbdkit's -e is not a name that it lists
	for _, name := range []string{"", "disk"} {
		s := serve(t, testenv.Options{Export: name})
		python(t, s.URI, "options", name)
	}
}

func TestLibnbdFindsAReadOnlyExportReadOnly(t *testing.T) {
	s := serve(t, testenv.Options{ReadOnly: true, Export: "disk"})
	python(t, s.URI, "readonly")
}
