package client

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
	"github.com/vmdiskd/vmdiskd/internal/transport/transporttest"
)

func trust(ca *transporttest.CA, name string) *tls.Config {
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca.PEM())
	return &tls.Config{RootCAs: pool, ServerName: name}
}

// nbdkitTLS runs nbdkit with a certificate for "disks" and returns its socket
// and who to trust.
func nbdkitTLS(t *testing.T, mode string) (string, *transporttest.CA) {
	t.Helper()
	ca, dir := transporttest.NewCA(t, "ca"), t.TempDir()
	cert := ca.IssueServer("disks")
	for name, b := range map[string][]byte{"ca-cert.pem": ca.PEM(), "server-cert.pem": cert.CertPEM(), "server-key.pem": cert.KeyPEM(t)} {
		must(t, os.WriteFile(filepath.Join(dir, name), b, 0o600))
	}
	return start(t, "nbdkit", "-f", "--tls="+mode, "--tls-certificates="+dir, "memory", "1M"), ca
}

func TestTLSSessionIsEncrypted(t *testing.T) {
	sock, ca := nbdkitTLS(t, "require")
	c := open(t, sock, Options{TLS: trust(ca, "disks"), Contexts: []string{wire.ContextAllocation}})
	if !c.TLS() || c.Replies() != Structured || len(c.Export().Contexts) != 1 {
		t.Errorf("tls %v, replies %v, contexts %q", c.TLS(), c.Replies(), c.Export().Contexts)
	}
	p := make([]byte, 1<<20)
	must(t, c.WriteAt(t.Context(), p, 0, 0))
	must(t, c.ReadAt(t.Context(), p, 0))
	must(t, c.Disconnect(t.Context()))
}

func TestCertificateOfAnotherNameIsRefused(t *testing.T) {
	sock, ca := nbdkitTLS(t, "require")
	if _, err := New(t.Context(), connect(t, sock), Options{TLS: trust(ca, "other")}); !errors.As(err, new(x509.HostnameError)) {
		t.Errorf("wrong name: %v", err)
	}
	other := transporttest.NewCA(t, "other")
	if _, err := New(t.Context(), connect(t, sock), Options{TLS: trust(other, "disks")}); !errors.As(err, new(x509.UnknownAuthorityError)) {
		t.Errorf("wrong authority: %v", err)
	}
}

func TestServerThatRequiresTLSRefusesPlain(t *testing.T) {
	sock, _ := nbdkitTLS(t, "require")
	_, err := New(t.Context(), connect(t, sock), Options{})
	var e *OptionError
	if !errors.As(err, &e) || !e.Refused() {
		t.Errorf("got %v", err)
	}
}

func TestRefusedTLSNeverFallsBack(t *testing.T) {
	for _, tt := range []struct {
		name   string
		script func(*peer)
	}{
		{"unsupported", func(p *peer) { p.greet(fixed); o, _ := p.option(); p.reply(o, wire.RepErrUnsup, nil) }},
		{"policy", func(p *peer) { p.greet(fixed); o, _ := p.option(); p.reply(o, wire.RepErrPolicy, nil) }},
		{"newstyle that is not fixed", func(p *peer) { p.greet(wire.FlagNoZeroes) }},
		{"oldstyle", func(p *peer) {
			b := binary.BigEndian.AppendUint64([]byte("NBDMAGIC"), wire.MagicOldstyle)
			p.send(append(binary.BigEndian.AppendUint64(b, 512), make([]byte, 128)...))
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			more := make(chan int, 1)
			conn := serve(t, func(p *peer) {
				tt.script(p)
				n, _ := p.conn.Read(make([]byte, 1))
				more <- n
			})
			c, err := New(t.Context(), conn, Options{TLS: &tls.Config{ServerName: "x"}})
			if !errors.Is(err, ErrNoTLS) {
				t.Errorf("got %v, %v", c, err)
			}
			if n := <-more; n != 0 {
				t.Error("the client went on in plain text")
			}
		})
	}
}

func TestBytesBeforeTheTLSHandshakeEndTheSession(t *testing.T) {
	conn := serve(t, greeted(func(p *peer) {
		o, _ := p.option()
		b := wire.AppendOptReply(nil, o, wire.RepAck, nil)
		p.send(wire.AppendOptReply(b, wire.OptStructuredReply, wire.RepAck, nil))
	}))
	if _, err := New(t.Context(), conn, Options{TLS: &tls.Config{ServerName: "x"}}); !errors.Is(err, ErrProtocol) {
		t.Errorf("got %v", err)
	}
}

func TestOldTLSIsRefused(t *testing.T) {
	ca := transporttest.NewCA(t, "ca")
	is := ca.IssueServer("disks")
	cert, err := tls.X509KeyPair(is.CertPEM(), is.KeyPEM(t))
	must(t, err)
	conn := serve(t, func(p *peer) {
		p.greet(fixed)
		o, _ := p.option()
		p.reply(o, wire.RepAck, nil)
		tls.Server(p.conn.(net.Conn), &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS11}).Handshake()
	})
	config := trust(ca, "disks")
	config.MinVersion = tls.VersionTLS10
	if _, err := New(t.Context(), conn, Options{TLS: config}); err == nil {
		t.Error("TLS 1.1 was accepted")
	}
}
