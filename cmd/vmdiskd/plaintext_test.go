package main

import (
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/internal/transport/transporttest"
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

// foreignAddress is one of this machine that is not of the loopback.
func foreignAddress(t *testing.T) string {
	t.Helper()
	list, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range list {
		if n, ok := a.(*net.IPNet); ok && n.IP.IsGlobalUnicast() {
			return n.IP.String()
		}
	}
	t.Skip("needs an address that is not of the loopback")
	return ""
}

// acceptedTCP is a connection to addr, as inetd passes it, and its other end.
func acceptedTCP(t *testing.T, addr string) (*os.File, net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", net.JoinHostPort(addr, "0"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	client, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	f, err := c.(*net.TCPConn).File()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f, client
}

// TestStandardInputIsNoWayAroundTLS: a connection that inetd has accepted is held
// to what a listener at its address is.
func TestStandardInputIsNoWayAroundTLS(t *testing.T) {
	const refused = "is open to networks in plaintext: say --tls=require, or --insecure-plaintext"
	disk, foreign := image(t, 1<<20), foreignAddress(t)
	pki, ca := t.TempDir(), transporttest.NewCA(t, "test")
	transporttest.WriteServer(t, pki, ca, ca.IssueServer("localhost"))
	for _, tt := range []struct {
		name, addr string
		args       []string
		want       string
	}{
		{"a network's", foreign, nil, refused},
		{"one that may encrypt", foreign, []string{"--tls=on", "--tls-certificates=" + pki}, refused},
		{"one that must encrypt", foreign, []string{"--tls=require", "--tls-certificates=" + pki}, ""},
		{"without confinement", foreign, []string{"--confine=off"}, refused},
		{"asked for", foreign, []string{"--insecure-plaintext"}, ""},
		{"the loopback's", "127.0.0.2", nil, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			socket, client := acceptedTCP(t, tt.addr)
			var log strings.Builder
			cmd := program(append(tt.args, "-s", disk)...)
			cmd.Stdin, cmd.Stdout, cmd.Stderr = socket, socket, &log
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			socket.Close()
			greeting := make([]byte, len("NBDMAGIC"))
			_ = client.SetDeadline(time.Now().Add(hangLimit))
			_, err := io.ReadFull(client, greeting)
			client.Close()
			_ = cmd.Wait()
			if (err == nil) != (tt.want == "") || !strings.Contains(log.String(), tt.want) {
				t.Errorf("client reads %q, %v; want %q:\n%s", greeting, err, tt.want, log.String())
			}
		})
	}
}

// TestServiceOpensNoPlaintextToNetworksUnasked: neither at the start, nor by a
// reload, nor through the control API.
func TestServiceOpensNoPlaintextToNetworksUnasked(t *testing.T) {
	const refused = `is open to networks in plaintext: say tls = "require", as nbds:// does, or insecure-plaintext = true`
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
