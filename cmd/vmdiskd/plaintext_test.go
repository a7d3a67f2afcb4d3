package main

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
)

// tcpSocket is a listening socket, as systemd passes it.
func tcpSocket(t *testing.T, addr string) *os.File {
	t.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	f, err := l.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// output runs a command that ends by itself, unless it serves what it should
// refuse.
func output(t *testing.T, cmd *exec.Cmd) (string, error) {
	t.Helper()
	kill := time.AfterFunc(hangLimit, func() { _ = cmd.Process.Kill() })
	defer kill.Stop()
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// TestNetworksAreNotServedInPlaintextUnasked: the address decides, whoever
// opened it.
func TestNetworksAreNotServedInPlaintextUnasked(t *testing.T) {
	const refused = "is open to networks in plaintext: say -i with a loopback address, or --tls=require, or --insecure-plaintext"
	disk := image(t, 1<<20)
	for _, tt := range []struct {
		name, want string
		args       []string
		passed     string
	}{
		{"everywhere", refused, []string{"-p0"}, ""},
		{"IPv4", refused, []string{"-p0", "-4", "--tls=off"}, ""},
		{"an address", "", []string{"-p0", "-i", "127.0.0.2"}, ""},
		{"a name", "", []string{"-p0", "-i", "localhost"}, ""},
		{"asked for", "", []string{"-p0", "--insecure-plaintext"}, ""},
		{"without confinement", refused, []string{"-p0", "--confine=off"}, ""},
		{"passed", refused, nil, "0.0.0.0:0"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			args := append(tt.args, disk)
			if tt.passed == "" {
				args = append(args, "--run", "true")
			}
			cmd := program(args...)
			if tt.passed != "" {
				cmd.ExtraFiles, cmd.Env = []*os.File{tcpSocket(t, tt.passed)}, append(cmd.Environ(), "LISTEN_FDS=1")
				forItself(cmd)
			}
			out, err := output(t, cmd)
			if (err == nil) != (tt.want == "") || err != nil && (cmd.ProcessState.ExitCode() != 1 || !strings.Contains(out, tt.want)) {
				t.Errorf("%v, want %q: %s", err, tt.want, out)
			}
		})
	}
}

// TestServiceOpensNoPlaintextToNetworksUnasked: neither at the start, nor by a
// reload, nor through the control API.
func TestServiceOpensNoPlaintextToNetworksUnasked(t *testing.T) {
	const refused = `is open to networks in plaintext: say tls = "require", or insecure-plaintext = true`
	const open = "[[listener]]\nuri = \"nbd://0.0.0.0:0\"\n"
	passed := map[string]*os.File{"tcp": tcpSocket(t, "0.0.0.0:0")}
	s, _ := newManaged(t, "[[listener]]\nuri = \"systemd:tcp\"\n", passed)
	cmd := program("--config", filepath.Join(s.dir, "conf"))
	s.prepare(cmd)
	if out, err := output(t, cmd); err == nil || !strings.Contains(out, refused) {
		t.Errorf("start: %v, want %q: %s", err, refused, out)
	}
	s.configure("[[listener]]\nuri = \"systemd:tcp\"\ninsecure-plaintext = true\n" + exportA)
	s.start()
	if err := s.reload(open + exportA); err == nil || !strings.Contains(err.Error(), refused) {
		t.Errorf("reload: %v, want %q", err, refused)
	}
	x := config.Export{Name: "x", Image: "1M", Format: "mem", Listeners: []config.Listener{{URI: "nbd://0.0.0.0:0"}}}
	if _, err := s.ctl.Add(t.Context(), api.AddExport{Export: x}); err == nil || !strings.Contains(err.Error(), refused) {
		t.Errorf("export: %v, want %q", err, refused)
	}
	x.Listeners[0].InsecurePlaintext = true
	if _, err := s.ctl.Add(t.Context(), api.AddExport{Export: x}); err != nil {
		t.Errorf("export that says so: %v", err)
	}
	s.stop()
	s.configure(open + exportA)
	out, err := output(t, program("--config", filepath.Join(s.dir, "conf"), "--check"))
	if err == nil || !strings.Contains(out, refused) {
		t.Errorf("--check: %v, want %q: %s", err, refused, out)
	}
}
