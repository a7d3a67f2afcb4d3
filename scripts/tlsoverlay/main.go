// Command tlsoverlay writes an overlay for `go build -overlay` in which
// crypto/tls derives the binders of pre-shared keys with the label of external
// keys. It takes the file from the installed Go and changes one constant;
// package internal/transport/psk tests at the start that this was right.
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// The file within GOROOT and the constant in it (RFC 8446, section 7.1).
const file = "src/crypto/internal/fips140/tls13/tls13.go"

var resumption, external = []byte(`"res binder"`), []byte(`"ext binder"`)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: tlsoverlay DIRECTORY")
		os.Exit(2)
	}
	if err := write(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "tlsoverlay:", err)
		os.Exit(1)
	}
}

// write makes dir/overlay.json and the file that it names. What is right
// already is not touched.
func write(dir string) error {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return err
	}
	root, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		return fmt.Errorf("go env GOROOT: %w", err)
	}
	from := filepath.Join(strings.TrimSpace(string(root)), file)
	text, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	if n := bytes.Count(text, resumption); n != 1 {
		return fmt.Errorf("%s has %s %d times, want once: this Go is not known", from, resumption, n)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	to := filepath.Join(dir, "tls13.go")
	if err := update(to, bytes.Replace(text, resumption, external, 1)); err != nil {
		return err
	}
	overlay, err := json.MarshalIndent(map[string]any{"Replace": map[string]string{from: to}}, "", "\t")
	if err != nil {
		return err
	}
	return update(filepath.Join(dir, "overlay.json"), append(overlay, '\n'))
}

// update replaces a file in one step, unless it is what it shall be: others
// may build with it at the moment.
func update(path string, data []byte) error {
	if old, err := os.ReadFile(path); err == nil && bytes.Equal(old, data) {
		return nil
	}
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(data)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
