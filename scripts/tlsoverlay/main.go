// Command tlsoverlay writes an overlay for `go build -overlay` in which
// crypto/tls derives the binders of pre-shared keys with the label of external
// keys, and asks clients for certificates with RSA keys in the way that GnuTLS
// understands. It takes the files from the installed Go and changes one word in
// each; package internal/transport/psk tests at the start that the first was
// right.
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

// edits are the files within GOROOT and the one place in each.
var edits = []struct{ file, old, new string }{
	// RFC 8446, section 7.1.
	{"src/crypto/internal/fips140/tls13/tls13.go", `"res binder"`, `"ext binder"`},
	// Go lists no PKCS #1 signature in a CertificateRequest of TLS 1.3. GnuTLS
	// 3.7, below libnbd and QEMU, then takes no RSA key for fit and sends no
	// certificate. What the client signs with is held to TLS 1.3 all the same.
	{
		"src/crypto/tls/handshake_server_tls13.go",
		"certReq.supportedSignatureAlgorithms = supportedSignatureAlgorithms(c.vers)",
		"certReq.supportedSignatureAlgorithms = supportedSignatureAlgorithms(VersionTLS12)",
	},
}

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

// write makes dir/overlay.json and the files that it names. What is right
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
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	replace := map[string]string{}
	for _, e := range edits {
		from := filepath.Join(strings.TrimSpace(string(root)), e.file)
		to := filepath.Join(dir, filepath.Base(e.file))
		if err := change(from, to, e.old, e.new); err != nil {
			return err
		}
		replace[from] = to
	}
	overlay, err := json.MarshalIndent(map[string]any{"Replace": replace}, "", "\t")
	if err != nil {
		return err
	}
	return update(filepath.Join(dir, "overlay.json"), append(overlay, '\n'))
}

// change writes the file from to the file to with the one old in it new.
func change(from, to, old, new string) error {
	text, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	if n := bytes.Count(text, []byte(old)); n != 1 {
		return fmt.Errorf("%s has %q %d times, want once: this Go is not known", from, old, n)
	}
	return update(to, bytes.Replace(text, []byte(old), []byte(new), 1))
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
