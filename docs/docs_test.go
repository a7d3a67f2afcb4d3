// Package docs_test holds the documents to the code.
package docs_test

import (
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const root = ".."

// testFiles calls f with the text of every file of tests, and of those of the
// conformance suite, whose checks have names too.
func testFiles(t *testing.T, f func(path string, text []byte)) {
	t.Helper()
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && strings.HasPrefix(d.Name(), ".") && path != root {
			return fs.SkipDir
		}
		if !strings.HasSuffix(path, "_test.go") && !strings.Contains(path, "nbdtest/") || filepath.Ext(path) != ".go" {
			return nil
		}
		text, err := os.ReadFile(path)
		if err == nil {
			f(path, text)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

var (
	testFunc  = regexp.MustCompile(`(?m)^func (Test[A-Z]\w*)\(`)
	testName  = regexp.MustCompile(`\bTest[A-Z]\w+\b`)
	checkName = regexp.MustCompile(`\b(?:HS|WR|TX|TL)-\d\d\b`)
	// checkID is the name of a check in the suite, which may be made of parts.
	checkID = regexp.MustCompile(`"((?:HS|WR|TX|TL)-\d\d)[^"]*"`)
)

// known are the tests and checks that there are.
func known(t *testing.T) (tests, checks map[string]bool) {
	t.Helper()
	tests, checks = map[string]bool{}, map[string]bool{}
	testFiles(t, func(path string, text []byte) {
		for _, m := range testFunc.FindAllSubmatch(text, -1) {
			tests[string(m[1])] = true
		}
		if strings.Contains(path, "nbdtest/check_") {
			for _, m := range checkID.FindAllSubmatch(text, -1) {
				checks[string(m[1])] = true
			}
		}
	})
	if len(tests) < 500 || len(checks) < 80 {
		t.Fatalf("found only %d tests and %d checks", len(tests), len(checks))
	}
	return tests, checks
}

func TestNamedTestsExist(t *testing.T) {
	tests, checks := known(t)
	pages := []string{filepath.Join(root, "README.md"), filepath.Join(root, "SECURITY.md")}
	for _, pattern := range []string{"*.md", "man/*.[1-9]"} {
		more, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		pages = append(pages, more...)
	}
	named := 0
	for _, page := range pages {
		text, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		text = bytes.ReplaceAll(text, []byte(`\-`), []byte("-"))
		for _, name := range testName.FindAllString(string(text), -1) {
			if named++; !tests[name] {
				t.Errorf("%s names %s, which does not exist", page, name)
			}
		}
		for _, name := range checkName.FindAllString(string(text), -1) {
			if named++; !checks[name] {
				t.Errorf("%s names the check %s, which does not exist", page, name)
			}
		}
	}
	if named < 100 {
		t.Errorf("only %d names found", named)
	}
}

// TestProtocolPageProvesWhatItSays: every part of the protocol has its version
// and what shows it.
func TestProtocolPageProvesWhatItSays(t *testing.T) {
	b, err := os.ReadFile("man/vmdiskd-protocol.7")
	if err != nil {
		t.Fatal(err)
	}
	_, parts, ok := strings.Cut(string(b), ".SH WHAT IS SPOKEN\n")
	if !ok {
		t.Fatal("there is no section of parts")
	}
	parts, _, _ = strings.Cut(parts, "\n.SH ")
	items := strings.Split(parts, "\n.TP\n")[1:]
	if len(items) < 20 {
		t.Fatalf("only %d parts", len(items))
	}
	since := regexp.MustCompile(`(?m)^Since \d+\.\d+\.\d+: `)
	for _, item := range items {
		text := strings.ReplaceAll(item, `\-`, "-")
		name, _, _ := strings.Cut(text, "\n")
		if !since.MatchString(text) {
			t.Errorf("%s: no version since when", name)
		}
		if !checkName.MatchString(text) && !testName.MatchString(text) {
			t.Errorf("%s: no check and no test that shows it", name)
		}
	}
}

// TestManualsAreInThePackages: every page of the manual has a section that the
// packages install, and its own name in it.
func TestManualsAreInThePackages(t *testing.T) {
	pages, err := filepath.Glob("man/*")
	if err != nil {
		t.Fatal(err)
	}
	recipe, err := os.ReadFile(filepath.Join(root, "packaging", "nfpm.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, page := range pages {
		names = append(names, filepath.Base(page))
		section := filepath.Ext(page)
		if !bytes.Contains(recipe, []byte("/man/*"+section+".gz")) {
			t.Errorf("%s: section %s is not in packaging/nfpm.yaml", page, section)
		}
		text, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		title := strings.ToUpper(strings.TrimSuffix(filepath.Base(page), section))
		if !strings.HasPrefix(string(text), ".TH "+strings.ReplaceAll(title, "-", `\-`)+" "+section[1:]) {
			t.Errorf("%s begins with %.40q", page, text)
		}
	}
	for _, want := range []string{"vmdiskd.8", "vmdiskctl.1", "vmdiskd.toml.5", "vmdiskd-security.7", "vmdiskd-protocol.7"} {
		if !slices.Contains(names, want) {
			t.Errorf("there is no page %s", want)
		}
	}
}
