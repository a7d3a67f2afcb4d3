package main

import (
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/internal/control/controltest"
	"github.com/vmdiskd/vmdiskd/internal/control/server"
	"github.com/vmdiskd/vmdiskd/internal/transport/transporttest"
)

// wantChecked is that --check says want, with status 0.
func wantChecked(t *testing.T, what, file, want string) {
	t.Helper()
	out, err := program("--config", file, "--check").Output()
	if err != nil || string(out) != want {
		t.Errorf("%s: got %q, %v; want %q", what, out, err, want)
	}
}

// TestCheckSaysWhatAReloadChanges: of the service that has the file, which the
// check leaves as it is.
func TestCheckSaysWhatAReloadChanges(t *testing.T) {
	s := newService(t, exportA)
	file, at := filepath.Join(s.dir, "conf"), fmt.Sprintf("%q", filepath.Join(s.dir, "control"))
	wantChecked(t, "no change", file, "a reload of the service at "+at+" changes nothing\n")
	s.configure(exportA + "[[export]]\nname = \"b\"\nimage = \"DIR/b.img\"\n")
	wantChecked(t, "another export", file, "a reload of the service at "+at+" does\nadd export \"b\"\n")
	if got := s.states(); len(got) != 1 {
		t.Errorf("exports after the check: %q", got)
	}

	s.configure(exportA + "[metrics]\nlisten = \"127.0.0.1:0\"\n")
	wantChecked(t, "metrics", file, "the service at "+at+" refuses a reload and needs a restart, which does\nchange metrics.listen from \"\" to \"127.0.0.1:0\": needs a restart\n")
	s.configure(exportA + "[[export]]\nname = \"b\"\nimage = \"DIR/b.img\"\n")

	link, other := filepath.Join(s.dir, "link"), filepath.Join(s.dir, "other")
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(other, text, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(file, link); err != nil {
		t.Fatal(err)
	}
	wantChecked(t, "the file by another name", link, "a reload of the service at "+at+" does\nadd export \"b\"\n")
	opens := fmt.Sprintf(": a start opens\nadd listener \"nbd+unix:///?socket=%s/nbd\"\nadd export \"a\"\nadd export \"b\"\n", s.dir)
	wantChecked(t, "another file", other, fmt.Sprintf("the service at %s cannot say what a reload changes (its file is %q)", at, file)+opens)
	s.stop()
	wantChecked(t, "no service", file, "no service answers at "+at+opens)
	t.Setenv(forbid, "connect")
	wantChecked(t, "no right", file, fmt.Sprintf("the service at %s cannot say what a reload changes (control socket %s: connect: operation not permitted)", at, at)+opens)
}

// TestCheckLooksAtCertificates, which a reload reads again, and leaves them as they
// are for it.
func TestCheckLooksAtCertificates(t *testing.T) {
	pki, ca := t.TempDir(), transporttest.NewCA(t, "test")
	transporttest.WriteServer(t, pki, ca, ca.IssueServer("localhost"))
	s := newService(t, "[[listener]]\nuri = \"nbds+unix:///?socket=DIR/tls\"\n[tls]\ncertificates = \""+pki+"\"\n")
	file, at := filepath.Join(s.dir, "conf"), fmt.Sprintf("%q", filepath.Join(s.dir, "control"))
	key := filepath.Join(pki, "server-key.pem")
	transporttest.WriteFile(t, key, []byte("-----"), 0o600)
	out, err := program("--config", file, "--check").CombinedOutput()
	if want := "the service at " + at + " refuses the file: certificates in "; err == nil || !strings.Contains(string(out), want) {
		t.Errorf("a key that is none: got %q, %v; want %q and an error", out, err, want)
	}
	transporttest.WriteServer(t, pki, ca, ca.IssueServer("localhost"))
	wantChecked(t, "other certificates", file, "a reload of the service at "+at+" does\ncertificates\n")
	r, err := s.ctl.Reload(t.Context(), false)
	if err != nil || !slices.Equal(r.Changes, []string{"certificates"}) {
		t.Errorf("reload: got %q, %v; want that the certificates are others", r.Changes, err)
	}
	s.stop()
}

// refusing is a service with a file, whose reload fails.
type refusing struct {
	controltest.Service
	file string
}

func (s *refusing) Status() api.Status { return api.Status{Config: s.file} }

// TestCheckSaysWhyItCannotAsk: who may only look, or not even that, is told what
// a start opens; that the service refuses the file is an error.
func TestCheckSaysWhyItCannotAsk(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name   string
		access server.Access
		fail   *api.Error
		want   string // in what is said
		err    string // in the error
	}{
		{"no right to look", server.NoAccess, nil, "cannot say what a reload changes (", ""},
		{"no right to reload", server.Read, nil, "cannot say what a reload changes (", ""},
		{"taken", server.Change, &api.Error{Code: api.CodeExists, Text: "export \x1b[31m is another's"}, "", `refuses the file: "export \x1b[31m is another's"`},
		{"restart", server.Change, &api.Error{Code: api.CodeUnsupported, Text: "a restart is needed"}, "refuses a reload (a restart is needed)", ""},
		{"not now", server.Change, &api.Error{Code: api.CodeInUse, Text: "it is paused"}, "refuses a reload (it is paused)", ""},
		{"failed", server.Change, &api.Error{Code: api.CodeFailed, Text: "disk full"}, "cannot say what a reload changes (disk full)", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := shortDir(t)
			socket, file := filepath.Join(dir, "s"), filepath.Join(dir, "conf")
			if err := os.WriteFile(file, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			l, err := net.Listen("unix", socket)
			if err != nil {
				t.Fatal(err)
			}
			svc := &refusing{file: file}
			if tt.fail != nil {
				svc.Fail = tt.fail
			}
			s := server.New(server.Config{Service: svc, Authorize: func(server.Peer) server.Access { return tt.access },
				Log: slog.New(slog.DiscardHandler)})
			done := make(chan error, 1)
			go func() { done <- s.Serve(l) }()
			defer func() {
				if err := s.Close(t.Context()); err != nil {
					t.Error(err)
				}
				<-done
			}()
			said, err := check(file, &config.Config{Control: config.Control{Socket: socket}})
			switch {
			case tt.err != "":
				if err == nil || !strings.Contains(err.Error(), tt.err) {
					t.Errorf("got %q, %v; want the error %q", said, err, tt.err)
				}
			case err != nil || !strings.Contains(said, tt.want) || !strings.HasSuffix(said, fmt.Sprintf(": a start opens\ncontrol socket %q\n", socket)):
				t.Errorf("got %q, %v; want %q and what a start opens", said, err, tt.want)
			}
		})
	}
}

// TestCheckMissesWhatAStartNeeds on this machine: it is an error, whether a service
// answers or not.
func TestCheckMissesWhatAStartNeeds(t *testing.T) {
	t.Parallel()
	none := filepath.Join(t.TempDir(), "none")
	for _, tt := range []struct{ text, want string }{
		{"[control]\nsocket = \"/s\"\nread-groups = [\"no-such-group\"]\n", `[control]: no group "no-such-group"`},
		{"[control]\nsocket = \"/s\"\nchange-users = [\"no-such-user\"]\n", `[control]: no user "no-such-user"`},
		{"[control]\nsocket = \"/s\"\nowner = \"no-such-user\"\n", `control.owner: no user "no-such-user"`},
		{"[[listener]]\nuri = \"nbd+unix:///?socket=/s\"\nowner = \":no-such-group\"\n", `no group "no-such-group"`},
		{fmt.Sprintf("[tls]\ncertificates = %q\n[[listener]]\nuri = \"nbds://127.0.0.1:1\"\n", none), "tls.certificates: stat " + none},
	} {
		file := filepath.Join(t.TempDir(), "conf")
		if err := os.WriteFile(file, []byte(tt.text), 0o600); err != nil {
			t.Fatal(err)
		}
		if out, err := program("--config", file, "--check").CombinedOutput(); err == nil || !strings.Contains(string(out), tt.want) {
			t.Errorf("%s: got %q, %v; want %q and an error", tt.text, out, err, tt.want)
		}
	}
}
