package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/internal/transport/psk"
	"github.com/vmdiskd/vmdiskd/internal/transport/transporttest"
)

// TestPSKFileThatOthersCanReadIsRefused is TL-17 for keys, and what a build
// without the overlay of crypto/tls says.
func TestPSKFileThatOthersCanReadIsRefused(t *testing.T) {
	t.Parallel()
	keys := filepath.Join(t.TempDir(), "keys.psk")
	if err := os.WriteFile(keys, []byte("vm1:"+strings.Repeat("5a", 32)+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	want := "keys.psk"
	if psk.Supported() != nil {
		want = "not supported by this build"
	}
	socket := filepath.Join(shortDir(t), "s")
	out, err := program("--tls=require", "--tls-psk", keys, "-U", socket, image(t, 1<<20)).CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 1 || !strings.Contains(string(out), want) {
		t.Errorf("got %v, %q; want status 1 and %q", err, out, want)
	}
	if exists(socket) {
		t.Error("a socket was made")
	}
}

const pskGrants = `
[tls]
psk = "DIR/keys.psk"
[[listener]]
uri = "nbds+unix:///?socket=DIR/tls"
` + exportA + `[[export.grant]]
access = "rw"
psk = ["vm1"]
` + exportB + `[[export.grant]]
access = "ro"
psk = ["vm2"]
`

// TestKeyDecidesWhatAMachineSees uses libnbd as the client: grants by
// identity, a key that is replaced while both are good, and no word of a key
// anywhere (AU-17).
func TestKeyDecidesWhatAMachineSees(t *testing.T) {
	t.Parallel()
	needKeys(t)
	if _, err := exec.LookPath("nbdinfo"); err != nil {
		t.Skip("nbdinfo is not installed")
	}
	dir := t.TempDir()
	s := &testService{T: t, dir: dir}
	for _, name := range []string{"a.img", "b.img"} {
		if err := os.WriteFile(filepath.Join(dir, name), make([]byte, 1<<20), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	keys := filepath.Join(dir, "keys.psk")
	var secrets []string
	add := func(name string, only bool) (client string) {
		t.Helper()
		if err := psk.Add(keys, name, 32, only); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(keys)
		if err != nil {
			t.Fatal(err)
		}
		_, line, _ := bytes.Cut(append([]byte("\n"), b...), []byte("\n"+name+":")) // the new key is the first
		line, _, _ = bytes.Cut(line, []byte("\n"))
		line = append([]byte(name+":"), append(line, '\n')...)
		secrets = append(secrets, strings.TrimSpace(string(line[len(name)+1:])))
		client = filepath.Join(dir, fmt.Sprintf("%s.%d", name, len(secrets)))
		if err := os.WriteFile(client, line, 0o600); err != nil {
			t.Fatal(err)
		}
		return client
	}
	vm1, vm2 := add("vm1", false), add("vm2", false)
	s.configure(pskGrants)
	s.start()
	sees := func(name, file, export, want string) {
		t.Helper()
		uri := fmt.Sprintf("nbds+unix://%s@/%s?socket=%s/tls&tls-psk-file=%s", name, export, dir, file)
		if got := s.size(uri); got != want {
			t.Errorf("%s asks for %q: got %q, want %q", name, export, got, want)
		}
	}
	const size = "1048576"
	sees("vm1", vm1, "a", size)
	sees("vm1", vm1, "b", "")
	sees("vm2", vm2, "b", size)
	sees("vm2", vm2, "a", "")
	if got := s.size(s.uri("a")); got != "" {
		t.Errorf("without a key: got %q", got)
	}
	reload := func() {
		t.Helper()
		before := strings.Count(s.log(), "pre-shared keys reloaded")
		if err := s.cmd.Process.Signal(syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
		s.await("the keys are read again", func() bool { return strings.Count(s.log(), "pre-shared keys reloaded") > before })
	}
	next := add("vm1", false)
	reload()
	sees("vm1", vm1, "a", size)
	sees("vm1", next, "a", size)
	last := add("vm1", true)
	reload()
	sees("vm1", vm1, "a", "")
	sees("vm1", last, "a", size)

	next = add("vm2", true)
	r, err := s.ctl.Reload(t.Context(), false)
	if err != nil || !slices.Equal(r.Changes, []string{"pre-shared keys"}) {
		t.Errorf("reload by the control API: got %q, %v, want that the keys are others", r.Changes, err)
	}
	sees("vm2", next, "b", size)
	sees("vm2", vm2, "b", "")
	replaced := add("vm2", true)
	if err := s.reload(pskGrants + "[[export]]\nname = \"c\"\nimage = \"DIR/missing.img\"\n"); err == nil {
		t.Error("an export without an image was added")
	}
	sees("vm2", next, "b", size) // with what else the reload was to do
	sees("vm2", replaced, "b", "")
	if err := s.reload(pskGrants + "[[export]]\nname = \"c\"\nimage = \"1M\"\nformat = \"mem\"\n"); err != nil {
		t.Error(err)
	}
	sees("vm2", next, "b", "")
	sees("vm2", replaced, "b", size)
	if err := os.Chmod(keys, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := s.ctl.Reload(t.Context(), false); err == nil {
		t.Error("keys that others can read are taken by a reload")
	}
	s.wantReloadGauge("after keys that cannot be read", 0)
	if err := os.Chmod(keys, 0o600); err != nil {
		t.Fatal(err)
	}
	if r, err := s.ctl.Reload(t.Context(), false); err != nil || len(r.Changes) > 0 {
		t.Errorf("the same keys: got %q, %v; want no change", r.Changes, err)
	}
	s.wantReloadGauge("after keys that can", 1)
	for _, name := range []string{"cmdline", "environ"} {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", s.cmd.Process.Pid, name))
		if err != nil {
			t.Fatal(err)
		}
		hasNone(t, name, string(b), secrets)
	}
	hasNone(t, "log", s.log(), secrets)
	s.stop()
}

func needKeys(t *testing.T) {
	t.Helper()
	if err := psk.Supported(); err != nil {
		t.Skipf("this build has no overlay of crypto/tls, make test has: %v", err)
	}
}

// TestReloadNeedsNoKeysThatHaveNotChanged: the file belongs to root, and the worker
// is another user. What it cannot do when the file changes, a dry run says before.
func TestReloadNeedsNoKeysThatHaveNotChanged(t *testing.T) {
	t.Parallel()
	needRoot(t)
	needKeys(t)
	const nobody = 65534
	etc := shortDir(t)
	keys := filepath.Join(etc, "keys.psk")
	s := &testService{T: t, dir: shortDir(t)}
	if err := errors.Join(os.Chmod(etc, 0o755), psk.Add(keys, "vm1", 32, false),
		os.WriteFile(filepath.Join(s.dir, "a.img"), make([]byte, 1<<20), 0o600),
		os.WriteFile(filepath.Join(s.dir, "b.img"), make([]byte, 1<<20), 0o600)); err != nil {
		t.Fatal(err)
	}
	configure := func(exports string) {
		t.Helper()
		s.configure("[tls]\npsk = \"" + keys + "\"\n[[listener]]\nuri = \"nbds+unix:///?socket=DIR/tls\"\n" + exports)
		for _, name := range []string{"", "state", "conf", "a.img", "b.img"} {
			if err := os.Chown(filepath.Join(s.dir, name), nobody, nobody); err != nil {
				t.Fatal(err)
			}
		}
	}
	configure(exportA)
	s.prepare = func(cmd *exec.Cmd) { cmd.Args = append(cmd.Args, "--user", fmt.Sprint(nobody)) }
	s.start()
	configure(exportA + exportB)
	wantBoth := func(what string, want ...string) {
		t.Helper()
		for _, dry := range []bool{true, false} {
			r, err := s.ctl.Reload(t.Context(), dry)
			if err != nil || !slices.Equal(r.Changes, want) {
				t.Errorf("%s, dry run %t: got %q, %v; want %q", what, dry, r.Changes, err, want)
			}
		}
	}
	wantBoth("another export", `add export "b"`)
	if got := s.states(); !slices.Equal(got, []string{"a ready", "b ready"}) {
		t.Errorf("exports after the reload: %q", got)
	}
	if err := psk.Add(keys, "vm2", 32, false); err != nil {
		t.Fatal(err)
	}
	for _, dry := range []bool{true, false} {
		r, err := s.ctl.Reload(t.Context(), dry)
		wantCode(t, fmt.Sprintf("keys that cannot be read, dry run %t: %q", dry, r.Changes), err, api.CodeInvalid)
	}
	if err := os.Chown(keys, nobody, nobody); err != nil {
		t.Fatal(err)
	}
	wantBoth("other keys", "pre-shared keys")
	s.stop()
}

// secretsOf are texts of [tls], each for another way to encrypt that this build has.
func secretsOf(t *testing.T) map[string]string {
	t.Helper()
	pki, keys, ca := t.TempDir(), filepath.Join(t.TempDir(), "keys.psk"), transporttest.NewCA(t, "test")
	transporttest.WriteServer(t, pki, ca, ca.IssueServer("localhost"))
	all := map[string]string{"certificates": fmt.Sprintf("[tls]\ncertificates = %q\n", pki)}
	if psk.Supported() == nil {
		if err := psk.Add(keys, "vm1", 32, false); err != nil {
			t.Fatal(err)
		}
		all["pre-shared keys"] = fmt.Sprintf("[tls]\npsk = %q\n", keys)
	}
	return all
}

// encrypted is an export of the control API with a listener of its own.
func (s *testService) encrypted(name string) api.AddExport {
	at := config.Listener{URI: "nbds+unix:///?socket=" + filepath.Join(s.dir, name+".tls")}
	return api.AddExport{Persist: true, Export: config.Export{
		Name: name, Image: filepath.Join(s.dir, name+".img"), Listeners: []config.Listener{at},
	}}
}

const sharedTLS = "[[listener]]\nuri = \"nbds+unix:///?socket=DIR/tls\"\n"

// TestWhatComesIsEncryptedToo: the configuration has no listener that is, when the
// service starts. Exports of the control API have, now and after another start, and
// so may a reload.
func TestWhatComesIsEncryptedToo(t *testing.T) {
	t.Parallel()
	for name, tls := range secretsOf(t) {
		t.Run(name, func(t *testing.T) {
			s := newService(t, tls)
			if x, err := s.ctl.Add(t.Context(), s.encrypted("a")); err != nil || x.State != "ready" {
				t.Errorf("export with a listener of its own: got %+v, %v", x, err)
			}
			s.stop()
			s.start()
			if got := s.states(); !slices.Equal(got, []string{"a ready"}) {
				t.Errorf("exports after another start: %q", got)
			}
			if err := s.reload(tls + sharedTLS); err != nil {
				t.Errorf("reload with a listener: %v", err)
			}
			s.stop()
		})
	}
}

// TestKeptListenerNeedsNoServiceWithoutIt: a start does without the certificates that
// only exports of the control API want, and without these exports. It is told how they
// come back.
func TestKeptListenerNeedsNoServiceWithoutIt(t *testing.T) {
	t.Parallel()
	none := filepath.Join(t.TempDir(), "none")
	for name, tt := range map[string]struct{ tls, want string }{
		"no folder": {fmt.Sprintf("[tls]\ncertificates = %q\n", none), none},
		"no keys":   {fmt.Sprintf("[tls]\npsk = %q\n", none), none},
	} {
		if psk.Supported() != nil && name == "no keys" {
			tt.want = psk.Supported().Error()
		}
		t.Run(name, func(t *testing.T) {
			tls := secretsOf(t)["certificates"]
			s := newService(t, tls+sharedTLS)
			if _, err := s.ctl.Add(t.Context(), s.encrypted("a")); err != nil {
				t.Fatal(err)
			}
			s.stop()
			s.configure(tt.tls + exportB)
			s.start()
			if got := s.states(); !slices.Equal(got, []string{"a failed", "b ready"}) {
				t.Errorf("exports: %q", got)
			}
			x, err := s.ctl.Export(t.Context(), "a")
			if err != nil || !strings.Contains(x.Error, tt.want) || !strings.Contains(x.Error, "restart") {
				t.Errorf("kept export: got %q, %v; want %q and a restart", x.Error, err, tt.want)
			}
			s.configure(tt.tls + sharedTLS + exportB)
			r, err := s.ctl.Reload(t.Context(), true)
			if err != nil || !r.Restart {
				t.Errorf("dry run with a listener: got %+v, %v; want that it takes a restart", r, err)
			}
			_, err = s.ctl.Reload(t.Context(), false)
			wantCode(t, "reload with a listener", err, api.CodeUnsupported)
			s.stop()
			fails(t, program("--config", filepath.Join(s.dir, "conf")), tt.want)
			s.configure(tls + exportB)
			s.start()
			if got := s.states(); !slices.Equal(got, []string{"a ready", "b ready"}) {
				t.Errorf("exports after a start with certificates: %q", got)
			}
			s.stop()
		})
	}
}

// TestFirstEncryptedListenerTakesARestart if nothing has named certificates before.
func TestFirstEncryptedListenerTakesARestart(t *testing.T) {
	t.Parallel()
	s := newService(t, "")
	if _, err := s.ctl.Add(t.Context(), s.encrypted("a")); err == nil || !strings.Contains(err.Error(), "name them in [tls] and restart") {
		t.Errorf("export with a listener of its own: got %v, want what to do", err)
	}
	for _, more := range []string{sharedTLS, exportB + "[[export.listener]]\nuri = \"nbds+unix:///?socket=DIR/b.tls\"\n"} {
		s.configure(more)
		r, err := s.ctl.Reload(t.Context(), true)
		if err != nil || !r.Restart || !slices.Contains(r.Changes, "read certificates: needs a restart") {
			t.Errorf("dry run with %q: got %+v, %v; want that it takes a restart", more, r, err)
		}
		_, err = s.ctl.Reload(t.Context(), false)
		wantCode(t, "reload", err, api.CodeUnsupported)
	}
	s.stop()
}

// hasNone fails if text holds one of the secrets, in whatever case.
func hasNone(t *testing.T, where, text string, secrets []string) {
	t.Helper()
	for _, x := range secrets {
		if strings.Contains(strings.ToLower(text), strings.ToLower(x)) {
			t.Errorf("%s holds the secret %s", where, x)
		}
	}
}
