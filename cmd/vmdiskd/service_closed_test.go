package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/internal/transport/psk"
	"github.com/vmdiskd/vmdiskd/internal/transport/transporttest"
)

// TestReloadNeedsNoFolderOfSecrets: only root may enter it, and the worker is another
// user. What has not changed there holds up no reload, which warns all the same; what
// has cannot be read, and is refused.
func TestReloadNeedsNoFolderOfSecrets(t *testing.T) {
	t.Parallel()
	needRoot(t)
	const nobody = 65534
	ca, day := transporttest.NewCA(t, "test"), time.Now().Add(24*time.Hour)
	list := func(t *testing.T, pki string) {
		transporttest.WriteFile(t, filepath.Join(pki, "ca-crl.pem"), ca.CRL(day, ca.IssueClient("bob")), 0o644)
	}
	replace := func(t *testing.T, pki string, with func(t *testing.T, path string) error) {
		next, cert := filepath.Join(pki, "next"), filepath.Join(pki, "server-cert.pem")
		if err := errors.Join(with(t, next), os.Rename(next, cert)); err != nil {
			t.Fatal(err)
		}
	}
	for _, tt := range []struct {
		name     string
		begin    func(t *testing.T, pki string) // nil: nothing
		change   func(t *testing.T, pki string)
		needKeys bool
	}{
		{"keys that are written", nil, func(t *testing.T, pki string) {
			if err := psk.Add(filepath.Join(pki, "keys.psk"), "vm2", 32, false); err != nil {
				t.Fatal(err)
			}
		}, true},
		{"keys that are removed", nil, func(t *testing.T, pki string) {
			if err := os.Remove(filepath.Join(pki, "keys.psk")); err != nil {
				t.Fatal(err)
			}
		}, true},
		{"list that comes", nil, list, false},
		{"list that is replaced", list, list, false},
		{"list that is written", list, func(t *testing.T, pki string) {
			if err := os.WriteFile(filepath.Join(pki, "ca-crl.pem"), ca.CRL(day), 0o644); err != nil {
				t.Fatal(err)
			}
		}, false},
		{"another certificate", nil, func(t *testing.T, pki string) {
			replace(t, pki, func(t *testing.T, path string) error {
				return os.WriteFile(path, ca.IssueServer("localhost").CertPEM(), 0o644)
			})
		}, false},
		{"link to another certificate", nil, func(t *testing.T, pki string) {
			replace(t, pki, func(t *testing.T, path string) error {
				return os.Symlink(filepath.Join(pki, "elsewhere"), path)
			})
		}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.needKeys {
				needKeys(t)
			}
			etc := shortDir(t)
			pki := filepath.Join(etc, "pki")
			if err := os.Mkdir(pki, 0o755); err != nil {
				t.Fatal(err)
			}
			transporttest.WriteServer(t, pki, ca, ca.IssueServer("localhost"))
			tls := fmt.Sprintf("[tls]\ncertificates = %q\n", pki)
			if tt.needKeys {
				keys := filepath.Join(pki, "keys.psk")
				if err := psk.Add(keys, "vm1", 32, false); err != nil {
					t.Fatal(err)
				}
				tls = fmt.Sprintf("[tls]\npsk = %q\n", keys)
			}
			if tt.begin != nil {
				tt.begin(t, pki)
			}
			s := &testService{T: t, dir: shortDir(t)}
			configure := func(exports string) {
				t.Helper()
				s.configure(tls + "[[listener]]\nuri = \"nbds+unix:///?socket=DIR/tls\"\n" + exports)
				for _, name := range []string{"", "state", "conf"} {
					if err := os.Chown(filepath.Join(s.dir, name), nobody, nobody); err != nil {
						t.Fatal(err)
					}
				}
			}
			configure(exportZ)
			if err := os.Chmod(etc, 0o700); err != nil {
				t.Fatal(err)
			}
			s.prepare = func(cmd *exec.Cmd) { cmd.Args = append(cmd.Args, "--user", fmt.Sprint(nobody)) }
			s.start()
			configure(exportZ + "description = \"new\"\n")
			warnings := func() int { return strings.Count(s.log(), "cannot be looked at") }
			s.await("the log warns at the start", func() bool { return warnings() == 1 })
			for i, dry := range []bool{true, false} {
				r, err := s.ctl.Reload(t.Context(), dry)
				if want := []string{`change export "z": description`}; err != nil || !slices.Equal(r.Changes, want) {
					t.Errorf("secrets that stay, dry run %t: got %q, %v; want %q", dry, r.Changes, err, want)
				}
				s.await("the log warns at each reload", func() bool { return warnings() == i+2 })
			}
			tt.change(t, pki)
			for _, dry := range []bool{true, false} {
				_, err := s.ctl.Reload(t.Context(), dry)
				wantCode(t, fmt.Sprintf("secrets that change, dry run %t", dry), err, api.CodeInvalid)
				if err == nil || !strings.Contains(err.Error(), "permission denied") {
					t.Errorf("secrets that change, dry run %t: got %v, want that they cannot be read", dry, err)
				}
			}
			s.stop()
		})
	}
}
