package docs_test

import (
	"bytes"
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/printer"
	"go/token"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write docs/limits.md anew")

// limit is one row: constants with one reason.
type limit struct{ names, values, reason string }

func TestLimitsAreThoseOfTheCode(t *testing.T) {
	files, err := filepath.Glob(filepath.Join(root, "internal", "limits", "*.go"))
	if err != nil || len(files) < 5 {
		t.Fatalf("files %q, %v", files, err)
	}
	var out strings.Builder
	out.WriteString("# Limits\n\nEvery bound of the program, with its reason. This page is made from\n" +
		"`internal/limits` by `go test ./docs -run Limits -update`; a test keeps the two equal.\n")
	for _, file := range files {
		if !strings.HasSuffix(file, "_test.go") {
			writeLimits(t, &out, file)
		}
	}
	want := out.String()
	if *update {
		if err := os.WriteFile("limits.md", []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile("limits.md")
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != want {
		t.Errorf("docs/limits.md is not what internal/limits says: go test ./docs -run Limits -update\nfirst difference: %s", difference(string(got), want))
	}
}

// difference is the first line that differs.
func difference(got, want string) string {
	a, b := strings.Split(got, "\n"), strings.Split(want, "\n")
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return fmt.Sprintf("line %d is %q, want %q", i+1, a[i], b[i])
		}
	}
	return fmt.Sprintf("%d lines, want %d", len(a), len(b))
}

func writeLimits(t *testing.T, out *strings.Builder, file string) {
	t.Helper()
	set := token.NewFileSet()
	parsed, err := parser.ParseFile(set, file, nil, parser.ParseComments)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range parsed.Decls {
		g, ok := d.(*ast.GenDecl)
		if !ok || g.Tok != token.CONST && g.Tok != token.VAR {
			continue
		}
		list := rows(t, set, g)
		if len(list) == 0 { // relations between others
			continue
		}
		title, more, _ := strings.Cut(oneLine(g.Doc.Text()), ". ")
		switch {
		case !g.Lparen.IsValid():
			title, more = strings.Trim(list[0].names, "`"), ""
		case title == "":
			title = strings.TrimSuffix(filepath.Base(file), ".go")
		}
		fmt.Fprintf(out, "\n## %s\n\n", strings.TrimSuffix(title, "."))
		if more != "" {
			fmt.Fprintf(out, "%s\n\n", more)
		}
		out.WriteString("| name | value | reason |\n|---|---|---|\n")
		for _, l := range list {
			fmt.Fprintf(out, "| %s | %s | %s |\n", l.names, l.values, l.reason)
		}
	}
}

// rows are the constants of a group; those without a comment of their own share
// the one before.
func rows(t *testing.T, set *token.FileSet, g *ast.GenDecl) (list []limit) {
	t.Helper()
	for _, s := range g.Specs {
		v, ok := s.(*ast.ValueSpec)
		if !ok {
			continue
		}
		doc := v.Doc
		if doc == nil {
			doc = v.Comment
		}
		if doc == nil && !g.Lparen.IsValid() {
			doc = g.Doc
		}
		for i, name := range v.Names {
			if !name.IsExported() {
				continue
			}
			value := "as the one before"
			if i < len(v.Values) {
				var b bytes.Buffer
				if err := printer.Fprint(&b, set, v.Values[i]); err != nil {
					t.Fatal(err)
				}
				value = "`" + oneLine(b.String()) + "`"
			}
			if doc == nil && len(list) > 0 {
				last := &list[len(list)-1]
				last.names, last.values = last.names+", `"+name.Name+"`", last.values+", "+value
				continue
			}
			list = append(list, limit{"`" + name.Name + "`", value, oneLine(doc.Text())})
		}
	}
	return list
}

// oneLine makes a text fit for a cell of a table.
func oneLine(s string) string {
	return strings.ReplaceAll(strings.Join(strings.Fields(s), " "), "|", `\|`)
}
