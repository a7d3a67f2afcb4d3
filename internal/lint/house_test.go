package lint

import (
	"bytes"
	"encoding/json"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

const module = "github.com/vmdiskd/vmdiskd/"

// mayImport is the table of docs/architecture.md: for each room, the rooms of
// this module that its code may import. A room may import the rooms inside it
// only where they are named. Tests may import more.
var mayImport = map[string][]string{
	"internal/limits":  {},
	"internal/sysio":   {},
	"internal/obs":     {"internal/limits"},
	"internal/confine": {"internal/limits"},
	"internal/lint":    {},

	"internal/confine/selinux": {"internal/limits"},

	"internal/qmp":          {"internal/limits"},
	"internal/qmp/libvirtd": {"internal/limits", "internal/qmp"},
	"internal/qmp/qmptest":  {},

	"internal/transport":                 {"internal/confine/selinux", "internal/limits", "internal/transport/psk", "internal/transport/stamp"},
	"internal/transport/psk":             {"internal/limits", "internal/transport/stamp"},
	"internal/transport/stamp":           {},
	"internal/transport/stamp/stamptest": {},
	"internal/transport/transporttest":   {"internal/transport"},
	"internal/engine":                    {"internal/limits", "internal/sysio"},
	"internal/engine/bufpool":            {"internal/limits", "internal/sysio"},
	"internal/engine/uring":              {"internal/engine", "internal/engine/bufpool", "internal/limits", "internal/sysio"},
	"internal/engine/choose":             {"internal/engine", "internal/engine/bufpool", "internal/engine/uring", "internal/limits"},
	"internal/engine/enginetest":         {"internal/engine", "internal/engine/bufpool", "internal/limits", "internal/sysio"},
	"internal/backing":                   {"internal/engine", "internal/engine/bufpool", "internal/limits", "internal/sysio"},
	"internal/backing/raw":               {"internal/backing", "internal/engine", "internal/engine/bufpool", "internal/limits", "internal/sysio"},
	"internal/backing/qcow2/store":       {"internal/backing", "internal/backing/raw", "internal/engine"},
	"internal/backing/mem":               {"internal/backing", "internal/engine", "internal/limits"},
	"internal/backing/layer":             {"internal/backing", "internal/engine", "internal/limits"},
	"internal/backing/qcow2/codec":       {"internal/backing/qcow2/format", "internal/limits"},
	"internal/backing/qcow2/qcowtest":    {},
	"internal/backing/qcow2/create":      {"internal/backing", "internal/backing/qcow2/format", "internal/backing/qcow2/store", "internal/limits"},
	"internal/backing/open":              {"internal/backing", "internal/backing/raw", "internal/backing/mem", "internal/backing/qcow2", "internal/backing/qcow2/create", "internal/backing/qcow2/format", "internal/backing/qcow2/store", "internal/engine", "internal/engine/bufpool", "internal/limits", "internal/sysio", "internal/units"},
	"internal/backing/backingtest":       {"internal/backing", "internal/engine", "internal/engine/bufpool", "internal/limits"},
	"internal/backing/qcow2":             {"internal/backing", "internal/backing/qcow2/bitmaps", "internal/backing/qcow2/check", "internal/backing/qcow2/codec", "internal/backing/qcow2/format", "internal/backing/qcow2/space", "internal/backing/qcow2/store", "internal/engine", "internal/limits"},
	"internal/backing/qcow2/clusters":    {},
	"internal/backing/qcow2/bitmaps":     {"internal/backing", "internal/backing/qcow2/format", "internal/backing/qcow2/space", "internal/backing/qcow2/store", "internal/limits"},
	"internal/backing/qcow2/check":       {"internal/backing/qcow2/clusters", "internal/backing/qcow2/format", "internal/backing/qcow2/store", "internal/limits"},
	"internal/backing/qcow2/format":      {"internal/limits"},
	"internal/backing/qcow2/space":       {"internal/backing", "internal/backing/qcow2/check", "internal/backing/qcow2/clusters", "internal/backing/qcow2/format", "internal/backing/qcow2/store", "internal/limits"},
	"internal/backing/qcow2/layertest":   {"internal/backing/qcow2", "internal/backing/qcow2/codec", "internal/backing/qcow2/format", "internal/backing/qcow2/store"},
	"internal/backing/qcow2/disktest":    {"internal/backing", "internal/backing/qcow2/store", "internal/backing/qcow2/storetest"},
	"internal/backing/qcow2/storetest":   {"internal/backing", "internal/backing/qcow2/store", "internal/engine"},
	"internal/nbd/wire":                  {},
	"internal/nbd":                       {"internal/backing", "internal/engine", "internal/engine/bufpool", "internal/limits", "internal/nbd/wire", "internal/obs", "internal/sysio", "internal/transport"},
	"internal/nbd/client":                {"internal/limits", "internal/nbd/wire", "internal/transport"},
	"internal/nbd/kernel":                {"internal/limits", "internal/nbd/client", "internal/nbd/wire", "internal/transport"},
	"internal/nbd/nbdtest":               {"internal/limits", "internal/nbd/wire"},
	"internal/export":                    {"internal/backing", "internal/confine/selinux", "internal/limits", "internal/nbd", "internal/obs", "internal/transport"},
	"internal/progress":                  {},
	"internal/config":                    {"internal/cmdline", "internal/confine/selinux", "internal/limits", "internal/units"},
	"internal/units":                     {},
	"internal/cmdline":                   {},
	"internal/version":                   {},
	"internal/control/api":               {"internal/config"},
	"internal/control/server":            {"internal/config", "internal/control/api", "internal/limits", "internal/transport"},
	"internal/control/client":            {"internal/config", "internal/control/api", "internal/limits"},
	"internal/control/controltest":       {"internal/control/api", "internal/control/server"},
	"internal/attach":                    {"internal/confine/selinux", "internal/config", "internal/control/api", "internal/control/client", "internal/limits", "internal/nbd/client", "internal/qmp", "internal/qmp/libvirtd", "internal/transport", "internal/transport/psk"},
	"internal/daemon": {"internal/backing", "internal/backing/layer", "internal/backing/open", "internal/backing/raw", "internal/confine", "internal/confine/selinux", "internal/engine",
		"internal/config", "internal/control/api", "internal/control/server", "internal/engine/bufpool", "internal/engine/choose", "internal/engine/uring", "internal/export",
		"internal/limits", "internal/nbd", "internal/obs", "internal/transport", "internal/transport/psk", "internal/version"},
	"cmd/vmdiskd":                   {"internal/cmdline", "internal/config", "internal/confine", "internal/control/api", "internal/control/client", "internal/daemon", "internal/limits", "internal/nbd", "internal/obs", "internal/transport", "internal/version"},
	"cmd/vmdiskctl":                 {"cmd/vmdiskctl/internal/copier", "internal/attach", "internal/backing", "internal/backing/open", "internal/backing/qcow2", "internal/backing/qcow2/check", "internal/backing/qcow2/create", "internal/backing/qcow2/format", "internal/backing/qcow2/store", "internal/backing/raw", "internal/cmdline", "internal/config", "internal/control/api", "internal/control/client", "internal/engine", "internal/limits", "internal/nbd/client", "internal/nbd/kernel", "internal/nbd/wire", "internal/progress", "internal/qmp", "internal/qmp/libvirtd", "internal/transport", "internal/transport/psk", "internal/version"},
	"cmd/vmdiskctl/internal/copier": {"internal/backing", "internal/backing/raw", "internal/limits", "internal/nbd/client", "internal/nbd/wire", "internal/progress", "internal/transport"},
}

// mayBeUnsafe are the rooms whose code may use package unsafe.
var mayBeUnsafe = []string{"internal/engine/uring", "internal/engine/bufpool", "internal/sysio", "internal/confine"}

// pkg is what `go list -json` says of a package.
type pkg struct {
	ImportPath string
	Dir        string
	GoFiles    []string
	Imports    []string
	Deps       []string
}

// room is the package's path inside the module.
func (p pkg) room() string { return strings.TrimPrefix(p.ImportPath, module) }

func house(t *testing.T) []pkg {
	t.Helper()
	cmd := exec.Command("go", "list", "-json=ImportPath,Dir,GoFiles,Imports,Deps", "./internal/...", "./cmd/...")
	cmd.Dir = filepath.Join("..", "..")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, stderr.String())
	}
	var ps []pkg
	for d := json.NewDecoder(bytes.NewReader(out)); d.More(); {
		var p pkg
		if err := d.Decode(&p); err != nil {
			t.Fatal(err)
		}
		ps = append(ps, p)
	}
	return ps
}

func TestImportsPointDownAsTheTableSays(t *testing.T) {
	for _, p := range house(t) {
		allowed, known := mayImport[p.room()]
		if !known {
			t.Errorf("%s is not in the table of rooms", p.room())
			continue
		}
		for _, i := range p.Imports {
			if r, ok := strings.CutPrefix(i, module); ok && !has(allowed, r) {
				t.Errorf("%s imports %s, which the table does not allow", p.room(), r)
			}
		}
	}
}

func has(list []string, s string) bool {
	for _, x := range list {
		if x == s {
			return true
		}
	}
	return false
}

func TestNoTestDoubleReachesAProgram(t *testing.T) {
	for _, p := range house(t) {
		for _, d := range p.Deps {
			if strings.HasPrefix(p.room(), "cmd/") && strings.HasPrefix(d, module) && strings.HasSuffix(d, "test") {
				t.Errorf("%s depends on %s", p.room(), d)
			}
		}
	}
}

// TestDaemonSpeaksToNoHypervisorAndCtlServesNothing also keeps io_uring and its
// unsafe code out of vmdiskctl. The operator's own commands may open images,
// but only where the daemon does, in backing/open: so a name within an image
// passes the same gate, which is shut by default.
func TestDaemonSpeaksToNoHypervisorAndCtlServesNothing(t *testing.T) {
	forbidden := map[string][]string{
		"cmd/vmdiskd":   {"github.com/digitalocean/", "libvirt.org/", module + "internal/qmp", module + "internal/attach", "net/http/pprof"},
		"cmd/vmdiskctl": {module + "internal/daemon", module + "internal/export", module + "internal/engine/uring", module + "internal/engine/choose"},
	}
	for _, p := range house(t) {
		for _, prefix := range forbidden[p.room()] {
			for _, d := range p.Deps {
				if strings.HasPrefix(d, prefix) {
					t.Errorf("%s depends on %s", p.room(), d)
				}
			}
		}
	}
}

// eachFile parses the files of every package that are no tests.
func eachFile(t *testing.T, f func(p pkg, name string, file *ast.File, set *token.FileSet)) {
	t.Helper()
	for _, p := range house(t) {
		for _, name := range p.GoFiles {
			set := token.NewFileSet()
			file, err := parser.ParseFile(set, filepath.Join(p.Dir, name), nil, parser.ParseComments)
			if err != nil {
				t.Fatal(err)
			}
			f(p, name, file, set)
		}
	}
}

func TestUnsafeStandsInItsRoomsOnly(t *testing.T) {
	eachFile(t, func(p pkg, name string, file *ast.File, _ *token.FileSet) {
		for _, i := range file.Imports {
			if i.Path.Value == `"unsafe"` && !has(mayBeUnsafe, p.room()) {
				t.Errorf("%s/%s imports unsafe", p.room(), name)
			}
		}
	})
}

func TestNoPackageHasAnInit(t *testing.T) {
	eachFile(t, func(p pkg, name string, file *ast.File, _ *token.FileSet) {
		for _, d := range file.Decls {
			if fn, ok := d.(*ast.FuncDecl); ok && fn.Recv == nil && fn.Name.Name == "init" {
				t.Errorf("%s/%s has an init function", p.room(), name)
			}
		}
	})
}

func TestEveryPackageAndExportedNameIsDocumented(t *testing.T) {
	documented := map[string]bool{}
	eachFile(t, func(p pkg, name string, file *ast.File, set *token.FileSet) {
		documented[p.room()] = documented[p.room()] || file.Doc != nil
		for _, d := range file.Decls {
			for _, missing := range undocumented(d) {
				t.Errorf("%s: %s has no comment", set.Position(missing.Pos()), missing.Name)
			}
		}
	})
	for room, ok := range documented {
		if !ok {
			t.Errorf("%s has no package comment", room)
		}
	}
}

// undocumented are the exported names that a declaration leaves without a
// comment. A group of constants or variables may share one, and a method
// that implements an interface of the room may rely on the interface's.
func undocumented(d ast.Decl) []*ast.Ident {
	switch d := d.(type) {
	case *ast.FuncDecl:
		if d.Recv == nil && d.Name.IsExported() && d.Doc == nil {
			return []*ast.Ident{d.Name}
		}
	case *ast.GenDecl:
		if d.Doc != nil {
			return nil
		}
		var out []*ast.Ident
		for _, s := range d.Specs {
			switch s := s.(type) {
			case *ast.TypeSpec:
				if s.Name.IsExported() && s.Doc == nil {
					out = append(out, s.Name)
				}
			case *ast.ValueSpec:
				if s.Names[0].IsExported() && s.Doc == nil && s.Comment == nil && !d.Lparen.IsValid() {
					out = append(out, s.Names[0])
				}
			}
		}
		return out
	}
	return nil
}

func TestFilesAreFormatted(t *testing.T) {
	out, err := exec.Command("gofmt", "-l", filepath.Join("..", "..", "internal"), filepath.Join("..", "..", "cmd"), filepath.Join("..", "..", "test")).CombinedOutput()
	if err != nil || len(out) != 0 {
		t.Errorf("gofmt: %v\n%s", err, out)
	}
}

// promises are words that put work off.
var promises = []string{"TO" + "DO", "FIX" + "ME", "X" + "XX", "HA" + "CK"}

func TestNoFilePromisesLaterWork(t *testing.T) {
	root := filepath.Join("..", "..")
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() && strings.HasPrefix(d.Name(), ".") && path != root {
			return fs.SkipDir
		}
		if d.IsDir() || filepath.Ext(path) != ".go" {
			return nil
		}
		set := token.NewFileSet()
		file, err := parser.ParseFile(set, path, nil, parser.ParseComments)
		if err != nil {
			return err
		}
		for _, g := range file.Comments {
			for _, word := range promises {
				if strings.Contains(g.Text(), word) {
					t.Errorf("%s: comment says %s", set.Position(g.Pos()), word)
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
