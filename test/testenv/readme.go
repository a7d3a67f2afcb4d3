package testenv

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Printed is the code that README.md prints below the marker by a name: a
// comment of that name, and the code between two lines of ``` right after it.
func Printed(t testing.TB, name string) string {
	t.Helper()
	readme, err := os.ReadFile(filepath.Join(Root(), "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, ok := strings.Cut(string(readme), "<!-- "+name+" -->\n```\n")
	code, _, closed := strings.Cut(rest, "\n```\n")
	if !ok || !closed || strings.TrimSpace(code) == "" {
		t.Fatalf("README.md has no code below the marker %q", name)
	}
	return code
}
