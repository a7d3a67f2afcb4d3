package lint

import (
	"go/ast"
	"go/parser"
	"go/token"
	"path"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// brokenUpstream are names of packages that hang, lose replies or end the
// process: internal/qmp is in their place. "*" stands for every name.
var brokenUpstream = map[string][]string{
	// One reply over 64 KiB ends it; replies alias a buffer that the next
	// event overwrites; no deadlines; an unread event blocks every command.
	"github.com/digitalocean/go-qemu/qmp": {"SocketMonitor", "NewSocketMonitor", "NewLibvirtRPCMonitor", "LibvirtRPCMonitor"},
	// Its drivers make those monitors.
	"github.com/digitalocean/go-qemu/hypervisor": {"NewSocketDriver", "NewRPCDriver", "SocketDriver", "RPCDriver"},
	// Generated from QEMU 2.11: device_add without a bus, NBD without
	// reconnect-delay; commands with a union recurse until the stack is full.
	"github.com/digitalocean/go-qemu/qmp/raw": {"*"},
}

// brokenUses are the uses of those names in a file.
func brokenUses(file *ast.File) (uses []string) {
	names := map[string][]string{} // by the name that the file gives the package
	for _, i := range file.Imports {
		from, err := strconv.Unquote(i.Path.Value)
		if err != nil || brokenUpstream[from] == nil {
			continue
		}
		as := path.Base(from)
		if i.Name != nil {
			as = i.Name.Name
		}
		if as == "." || slices.Contains(brokenUpstream[from], "*") {
			uses = append(uses, "import of "+from)
			continue
		}
		names[as] = brokenUpstream[from]
	}
	ast.Inspect(file, func(n ast.Node) bool {
		if s, ok := n.(*ast.SelectorExpr); ok {
			if x, ok := s.X.(*ast.Ident); ok && slices.Contains(names[x.Name], s.Sel.Name) {
				uses = append(uses, x.Name+"."+s.Sel.Name)
			}
		}
		return true
	})
	return uses
}

func TestBrokenPartsOfGoQEMUAreNotUsed(t *testing.T) {
	eachFile(t, func(p pkg, name string, file *ast.File, _ *token.FileSet) {
		for _, use := range brokenUses(file) {
			t.Errorf("%s/%s: %s; internal/qmp has what works", p.room(), name, use)
		}
	})
}

func TestBrokenPartsOfGoQEMUAreFound(t *testing.T) {
	const q = "github.com/digitalocean/go-qemu/"
	for _, tt := range []struct{ imports, code, want string }{
		{`"` + q + `qmp"`, "var _ qmp.Monitor", ""},
		{`"` + q + `qmp"`, "var _ = qmp.NewSocketMonitor", "qmp.NewSocketMonitor"},
		{`other "` + q + `qmp"`, "var _ *other.SocketMonitor", "other.SocketMonitor"},
		{`. "` + q + `qmp"`, "var _ Monitor", "import of " + q + "qmp"},
		{`"` + q + `qmp/raw"`, "var _ raw.BlockdevOptionsNBD", "import of " + q + "qmp/raw"},
		{`_ "` + q + `qmp/raw"`, "", "import of " + q + "qmp/raw"},
		{`"` + q + `hypervisor"`, "func f() { hypervisor.New(hypervisor.NewSocketDriver()) }", "hypervisor.NewSocketDriver"},
		{`"example.com/qmp"`, "var _ = qmp.NewSocketMonitor", ""},
	} {
		file, err := parser.ParseFile(token.NewFileSet(), "x.go", "package x\nimport "+tt.imports+"\n"+tt.code, 0)
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.Join(brokenUses(file), ","); got != tt.want {
			t.Errorf("import %s; %s: got %q, want %q", tt.imports, tt.code, got, tt.want)
		}
	}
}
