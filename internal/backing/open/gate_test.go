package open

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/backing"
)

// hostTree makes a directory with images and with things beside it that no
// image may reach, and returns the path of the directory of images:
//
//	secret
//	images/top, base, fifo, link -> base, out -> ../secret, linked -> sub,
//	images/sub/base
func hostTree(t *testing.T) string {
	t.Helper()
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	images := filepath.Join(dir, "images")
	for _, err := range []error{
		os.MkdirAll(filepath.Join(images, "sub"), 0o700),
		os.WriteFile(filepath.Join(dir, "secret"), []byte("secret"), 0o600),
		os.WriteFile(filepath.Join(images, "top"), []byte("top"), 0o600),
		os.WriteFile(filepath.Join(images, "base"), []byte("base"), 0o600),
		os.WriteFile(filepath.Join(images, "nbd:x"), []byte("odd"), 0o600),
		os.WriteFile(filepath.Join(images, "sub", "base"), []byte("sub/base"), 0o600),
		unix.Mkfifo(filepath.Join(images, "fifo"), 0o600),
		os.Symlink("base", filepath.Join(images, "link")),
		os.Symlink("../secret", filepath.Join(images, "out")),
		os.Symlink("sub", filepath.Join(images, "linked")),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	return images
}

// promptly runs what a FIFO could hold up for ever.
func promptly(t *testing.T, do func()) {
	t.Helper()
	done := make(chan struct{})
	go func() { defer close(done); do() }()
	select {
	case <-done:
	case <-time.After(20 * time.Second):
		t.Fatal("the open hangs")
	}
}

// ask lets an image ask a new gate for its backing file, and returns what the
// file holds.
func ask(t *testing.T, p Policy, by, name, said string) (contents, format string, err error) {
	t.Helper()
	promptly(t, func() {
		var g *gate
		if g, err = newGate(p, Spec{Path: by}, false); err != nil {
			return
		}
		defer g.close()
		var f *os.File
		if f, _, format, err = g.backing(wish{by: by, what: "backing file", name: name, readOnly: true}, said); err != nil {
			return
		}
		defer f.Close()
		var b []byte
		b, err = io.ReadAll(f)
		contents = string(b)
	})
	return contents, format, err
}

func TestPolicyDecidesWhatAnImageMayName(t *testing.T) {
	images := hostTree(t)
	abs := func(name string) string { return filepath.Join(images, name) }
	json := func(name string) string {
		return `json:{"driver":"raw","file":{"driver":"file","filename":"` + name + `"}}`
	}
	deny, sameDir := Policy{}, Policy{Mode: SameDir}
	beneath, sub := Policy{Mode: Beneath, Root: images}, Policy{Mode: Beneath, Root: abs("sub")}
	for _, tt := range []struct {
		name   string
		policy Policy
		names  string
		want   string // contents, or "" for a refusal
		text   string // in the refusal
	}{
		{"default", deny, "base", "", "--backing=deny"},
		{"deny", Policy{Mode: Deny}, "base", "", "--backing=same-dir"},
		{"E1 absolute, denied", deny, abs("../secret"), "", "--backing=deny"},
		{"explicit without a file", Policy{Mode: Explicit}, "base", "", "--backing-file"},

		{"plain", sameDir, "base", "base", ""},
		{"plain with a dot", sameDir, ".//./base", "base", ""},
		{"detour", sameDir, "./sub/../base", "", "symbolic link"},
		{"file:", sameDir, "file:" + abs("base"), "base", ""},
		{"file: in the directory of the server", sameDir, "file:base", "", "of whoever opens it"},
		{"JSON in the directory of the server", sameDir, json("base"), "", "of whoever opens it"},
		{"absolute in the directory", sameDir, abs("base"), "base", ""},
		{"JSON in the directory", sameDir, json(abs("base")), "base", ""},
		{"colon behind a slash", sameDir, "./nbd:x", "odd", ""},
		{"E1 absolute", sameDir, abs("../secret"), "", "--backing=beneath=DIR"},
		{"E2 above", sameDir, "../secret", "", "--backing=same-dir opens files in"},
		{"below", sameDir, "sub/base", "", "--backing=beneath=DIR"},
		{"E2 link in the directory", sameDir, "link", "", "symbolic link"},
		{"E2 link to the outside", sameDir, "out", "", "symbolic link"},
		{"E2 FIFO", sameDir, "fifo", "", "FIFO"},
		{"directory", sameDir, "sub", "", "directory"},
		{"the directory itself", sameDir, ".", "", "directory"},
		{"E2 proc", sameDir, "/proc/self/environ", "", "--backing=same-dir"},
		{"E2 device", sameDir, "/dev/zero", "", "--backing=same-dir"},
		{"E3 JSON", sameDir, json(abs("../secret")), "", "--backing=same-dir"},
		{"JSON with a protocol", sameDir, `json:{"driver":"raw","file":{"driver":"nbd","host":"x"}}`, "", "json"},
		{"broken JSON", sameDir, `json:{`, "", "json"},
		{"E4 NBD", sameDir, "nbd://127.0.0.1:1/x", "", `"nbd"`},
		{"E4 HTTP", sameDir, "http://127.0.0.1:1/x", "", `"http"`},
		{"E4 in a colon", sameDir, "nbd:x", "", `"nbd"`},
		{"E6 NUL", sameDir, "base\x00evil", "", "control"},
		{"line feed", sameDir, "base\n", "", "control"},
		{"nothing", sameDir, "file:", "", "empty"},

		{"beneath: plain", beneath, "base", "base", ""},
		{"beneath: below", beneath, "sub/base", "sub/base", ""},
		{"beneath: absolute", beneath, abs("sub/base"), "sub/base", ""},
		{"beneath: another directory than the image's", sub, "sub/base", "sub/base", ""},
		{"beneath: above", beneath, "../secret", "", "--backing=beneath=" + images},
		{"beneath: down and up", beneath, images + "/sub/../base", "", "symbolic link"},
		{"beneath: up and down", beneath, "../images/base", "base", ""},
		{"beneath: link as directory", beneath, "linked/base", "", "symbolic link"},
		{"beneath: link", beneath, "out", "", "symbolic link"},
		{"beneath: FIFO", beneath, abs("fifo"), "", "FIFO"},
		{"beneath: other with the same beginning", sub, abs("sub/../subway"), "", "--backing=beneath="},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, _, err := ask(t, tt.policy, abs("top"), tt.names, "raw")
			if got != tt.want || (err == nil) != (tt.want != "") {
				t.Fatalf("backing file %q: got %q, %v, want %q", tt.names, got, err, tt.want)
			}
			if err != nil && (!errors.Is(err, ErrDenied) || !errors.Is(err, backing.ErrInvalid) || !strings.Contains(err.Error(), tt.text)) {
				t.Errorf("backing file %q: got %v, want %v with %q in it", tt.names, err, ErrDenied, tt.text)
			}
		})
	}
}

// TestNamedFileMustBeNamed by the image above it, in whatever way.
func TestNamedFileMustBeNamed(t *testing.T) {
	images := hostTree(t)
	abs := func(name string) string { return filepath.Join(images, name) }
	for _, tt := range []struct {
		by, file, name, want string
	}{
		{"top", "base", "base", "base"},
		{"top", "base", ".//base", "base"},
		{"top", "base", "file:" + abs("base"), "base"},
		{"top", "base", abs("base"), "base"},
		{"top", "base", `json:{"driver":"raw","file":{"driver":"file","filename":"` + abs("base") + `"}}`, "base"},
		{"top", "nbd:x", "./nbd:x", "odd"},
		{"top", "sub/base", "sub/base", "sub/base"},
		{"top", "linked/base", abs("linked/base"), "sub/base"},
		{"top", "linked/base", abs("sub/base"), "sub/base"},
		{"linked/top", "linked/base", "base", "sub/base"},
		{"linked/top", "sub/base", "base", "sub/base"},

		{"top", "base", "sub/base", ""},
		{"top", "base", abs("sub/base"), ""},
		{"top", "base", "top", ""},
		{"top", "nbd:x", "nbd:x", ""},
		{"top", "base", "./sub/../base", ""},
		{"top", "base", "file:base", ""},
		{"linked/top", "sub/base", abs("base"), ""},
	} {
		p := Policy{Mode: Explicit, Files: []File{{Path: abs(tt.file), Format: "raw", Named: true}}}
		got, _, err := ask(t, p, abs(tt.by), tt.name, "raw")
		if got != tt.want || (tt.want == "") != errors.Is(err, ErrDenied) {
			t.Errorf("%q names %q above %q: got %q, %v, want %q", tt.by, tt.name, tt.file, got, err, tt.want)
		}
		p.Files[0].Named = false
		if _, _, err := ask(t, p, abs(tt.by), tt.name, "raw"); err != nil {
			t.Errorf("%q names %q above %q, which the operator names: %v", tt.by, tt.name, tt.file, err)
		}
	}
}

func TestFormatOfABackingFileIsSaid(t *testing.T) {
	images := hostTree(t)
	top := filepath.Join(images, "top")
	json := `json:{"driver":"qcow2","file":{"driver":"file","filename":"` + filepath.Join(images, "base") + `"}}`
	named := func(format string) Policy {
		return Policy{Mode: Explicit, Files: []File{{Path: filepath.Join(images, "base"), Format: format}}}
	}
	for _, tt := range []struct {
		name, names, said string
		policy            Policy
		want, text        string
	}{
		{"raw", "base", "raw", Policy{Mode: SameDir}, "raw", ""},
		{"qcow2", "base", "qcow2", Policy{Mode: SameDir}, "qcow2", ""},
		{"E5 not said", "base", "", Policy{Mode: SameDir}, "", "never guessed"},
		{"unknown", "base", "vmdk", Policy{Mode: SameDir}, "", `"vmdk"`},
		{"JSON says it", json, "", Policy{Mode: SameDir}, "qcow2", ""},
		{"JSON contradicts", json, "raw", Policy{Mode: SameDir}, "", `"raw" and "qcow2"`},
		{"operator says it", "x", "", named("raw"), "raw", ""},
		{"operator contradicts", "x", "qcow2", named("raw"), "raw", ""},
		{"operator leaves it to the image", "x", "qcow2", named(""), "qcow2", ""},
		{"E5 nobody says it", "x", "", named(""), "", "never guessed"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, got, err := ask(t, tt.policy, top, tt.names, tt.said)
			if got != tt.want && err == nil || (err == nil) != (tt.want != "") {
				t.Fatalf("format: got %q, %v, want %q", got, err, tt.want)
			}
			if err != nil && (!errors.Is(err, ErrDenied) || !strings.Contains(err.Error(), tt.text)) {
				t.Errorf("format: got %v, want %v with %q in it", err, ErrDenied, tt.text)
			}
		})
	}
}

// TestDirectoryOfTheOperatorMayBeALink: only what images say is followed
// strictly.
func TestDirectoryOfTheOperatorMayBeALink(t *testing.T) {
	images := hostTree(t)
	link := filepath.Join(filepath.Dir(images), "current")
	if err := os.Symlink(images, link); err != nil {
		t.Fatal(err)
	}
	for _, p := range []Policy{{Mode: SameDir}, {Mode: Beneath, Root: link}} {
		for _, name := range []string{"base", filepath.Join(images, "base"), filepath.Join(link, "base")} {
			g, err := newGate(p, Spec{Path: filepath.Join(link, "top")}, false)
			if err != nil {
				t.Fatal(err)
			}
			f, path, _, err := g.backing(wish{by: filepath.Join(images, "top"), what: "backing file", name: name, readOnly: true}, "raw")
			if err != nil {
				t.Fatalf("policy %v: backing file %q: %v", p, name, err)
			}
			if path != filepath.Join(images, "base") {
				t.Errorf("path: got %q, want that without links", path)
			}
			_ = f.Close()
			g.close()
		}
	}
}

func TestNamesAreRelativeToTheImageThatHasThem(t *testing.T) {
	images := hostTree(t)
	for by, want := range map[string]string{"top": "base", "sub/top": "sub/base"} {
		got, _, err := ask(t, Policy{Mode: Beneath, Root: images}, filepath.Join(images, by), "base", "raw")
		if err != nil || got != want {
			t.Errorf("base of %s: got %q, %v, want %q", by, got, err, want)
		}
	}
}

// TestDataFileIsJudgedAsBackingFilesAre has the names of CVE-2024-4467 and
// CVE-2024-32498.
func TestDataFileIsJudgedAsBackingFilesAre(t *testing.T) {
	images := hostTree(t)
	abs := func(name string) string { return filepath.Join(images, name) }
	for _, tt := range []struct {
		name   string
		policy Policy
		names  string
		want   string
		text   string
	}{
		{"default", Policy{}, "base", "", "--backing=deny"},
		{"beside the image", Policy{Mode: SameDir}, "base", "base", ""},
		{"E9 absolute", Policy{Mode: SameDir}, abs("../secret"), "", "--backing=same-dir"},
		{"E9 JSON", Policy{Mode: SameDir}, `json:{"driver":"raw","file":{"driver":"file","filename":"` + abs("base") + `"}}`, "", `"json"`},
		{"E9 NBD", Policy{Mode: SameDir}, "nbd://127.0.0.1:1/x", "", `"nbd"`},
		{"E9 FIFO", Policy{Mode: SameDir}, "fifo", "", "FIFO"},
		{"not named", Policy{Mode: SameDir}, "", "", "--data-file"},
		{"control bytes", Policy{Mode: SameDir}, "base\x1b", "", "control"},
		{"by the operator", Policy{Mode: Explicit, DataFiles: []string{abs("base")}}, abs("../secret"), "base", ""},
		{"not by the operator", Policy{Mode: Explicit, Files: []File{{Path: abs("base")}}}, "base", "", "--data-file"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var got []byte
			var err error
			promptly(t, func() {
				var g *gate
				if g, err = newGate(tt.policy, Spec{Path: abs("top")}, false); err != nil {
					return
				}
				defer g.close()
				var f *os.File
				if f, _, err = g.data(wish{by: abs("top"), what: "data file", name: tt.names}); err == nil {
					got, err = io.ReadAll(f)
					_ = f.Close()
				}
			})
			if string(got) != tt.want || (err == nil) != (tt.want != "") {
				t.Fatalf("data file %q: got %q, %v, want %q", tt.names, got, err, tt.want)
			}
			if err != nil && (!errors.Is(err, ErrDenied) || !strings.Contains(err.Error(), tt.text)) {
				t.Errorf("data file %q: got %v, want %v with %q in it", tt.names, err, ErrDenied, tt.text)
			}
		})
	}
}

func TestOperatorsFilesAreTakenInOrderAndAllOfThem(t *testing.T) {
	images := hostTree(t)
	p, err := ParsePolicy("", []string{filepath.Join(images, "link") + ":raw", filepath.Join(images, "sub/base")}, nil)
	if err != nil {
		t.Fatal(err)
	}
	g, err := newGate(p, Spec{Path: filepath.Join(images, "top")}, false)
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []string{"base", "sub/base"} {
		f, _, _, err := g.backing(wish{by: "top", what: "backing file", name: "/never/looked/at", readOnly: true}, "raw")
		if err != nil {
			t.Fatalf("file %d: %v", i, err)
		}
		if got, err := io.ReadAll(f); err != nil || string(got) != want {
			t.Errorf("file %d: got %q, %v, want %q", i, got, err, want)
		}
		_ = f.Close()
		if err := g.unused(); (err == nil) != (i == 1) {
			t.Errorf("after file %d: unused says %v", i, err)
		}
	}
}

func TestParsePolicy(t *testing.T) {
	for _, tt := range []struct {
		word        string
		files, data []string
		want        Policy
	}{
		{"", nil, nil, Policy{Mode: Deny}},
		{"deny", nil, nil, Policy{Mode: Deny}},
		{"same-dir", nil, nil, Policy{Mode: SameDir}},
		{"beneath=/a=b", nil, nil, Policy{Mode: Beneath, Root: "/a=b"}},
		{"", []string{"a:raw", "b:c", "d:x:qcow2"}, nil, Policy{Mode: Explicit, Files: []File{{Path: "a", Format: "raw"}, {Path: "b:c"}, {Path: "d:x", Format: "qcow2"}}}},
		{"explicit", nil, []string{"d:raw"}, Policy{Mode: Explicit, DataFiles: []string{"d:raw"}}},
	} {
		got, err := ParsePolicy(tt.word, tt.files, tt.data)
		if err != nil || got.Mode != tt.want.Mode || got.Root != tt.want.Root ||
			!slices.Equal(got.Files, tt.want.Files) || !slices.Equal(got.DataFiles, tt.want.DataFiles) {
			t.Errorf("policy %q %q %q: got %+v, %v, want %+v", tt.word, tt.files, tt.data, got, err, tt.want)
		}
	}
	for _, tt := range []struct {
		word        string
		files, data []string
	}{
		{"allow", nil, nil}, {"beneath", nil, nil}, {"beneath=", nil, nil}, {"explicit", nil, nil}, {"explicit=x", nil, nil},
		{"deny", []string{"a"}, nil}, {"same-dir", nil, []string{"a"}}, {"beneath=/a", []string{"a"}, nil},
		{"", []string{""}, nil}, {"", []string{":raw"}, nil}, {"", nil, []string{""}},
	} {
		if got, err := ParsePolicy(tt.word, tt.files, tt.data); err == nil {
			t.Errorf("policy %q %q %q: got %+v, want an error", tt.word, tt.files, tt.data, got)
		}
	}
}

func TestBlockDeviceIsOpenedForTheOperatorOnly(t *testing.T) {
	images := hostTree(t)
	node := filepath.Join(images, "node")
	// A number that no driver has: the refusal comes before any open.
	if err := unix.Mknod(node, unix.S_IFBLK|0o600, int(unix.Mkdev(240, 77))); err != nil {
		t.Skipf("needs CAP_MKNOD: %v", err)
	}
	_, _, err := ask(t, Policy{Mode: SameDir}, filepath.Join(images, "top"), "node", "raw")
	if !errors.Is(err, ErrDenied) || !strings.Contains(err.Error(), "block device") {
		t.Errorf("block device in the directory: got %v, want %v", err, ErrDenied)
	}
	_, _, err = ask(t, Policy{Mode: Explicit, Files: []File{{Path: node}}}, filepath.Join(images, "top"), "x", "raw")
	if !errors.Is(err, unix.ENXIO) {
		t.Errorf("block device of the operator: got %v, want the open to be tried", err)
	}
}
