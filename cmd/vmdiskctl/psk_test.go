package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestPSKCommandsMakeAndListKeysWithoutShowingThem(t *testing.T) {
	file := filepath.Join(t.TempDir(), "keys.psk")
	for range 2 {
		if out := want(t, exitDone, "psk", "new", "vm 1", file); out != "" {
			t.Errorf("psk new prints %q", out)
		}
	}
	want(t, exitFailed, "psk", "new", "vm 1", file)
	want(t, exitDone, "psk", "new", "vm 1", file, "--only", "--bytes=64")
	got := want(t, exitDone, "psk", "list", file)
	b, err := os.ReadFile(file)
	must(t, err)
	_, key, _ := strings.Cut(strings.TrimSpace(string(b)), ":")
	if !strings.Contains(got, "vm 1") || !strings.Contains(got, "64") || len(key) != 128 || strings.Contains(got, key) {
		t.Errorf("list prints %q of %q", got, b)
	}
	want(t, exitUsage, "psk", "new", "a:b", file)
	want(t, exitUsage, "info", "nbds://localhost:1/?tls-psk-file="+file)
	want(t, exitFailed, "info", "nbds://vm2@localhost:1/?tls-psk-file="+file)
	want(t, exitUsage, "psk", "new", "vm2", file, "--bytes=8")
	must(t, os.Chmod(file, 0o644))
	want(t, exitFailed, "psk", "list", file)
}
