package transport_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/transport"
	"github.com/vmdiskd/vmdiskd/internal/transport/psk"
	"github.com/vmdiskd/vmdiskd/internal/transport/stamp/stamptest"
	"github.com/vmdiskd/vmdiskd/internal/transport/transporttest"
)

// logged is a logger whose lines a test reads.
type logged struct {
	mu  sync.Mutex
	buf bytes.Buffer // guarded by mu
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

// take returns what was logged since the last call.
func (l *logged) take() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	defer l.buf.Reset()
	return l.buf.String()
}

func (l *logged) logger() *slog.Logger { return slog.New(slog.NewTextHandler(l, nil)) }

// pki is a CA with a server's directory.
type pki struct {
	ca  *transporttest.CA
	dir string
}

func newPKI(t *testing.T) *pki {
	t.Helper()
	p := &pki{ca: transporttest.NewCA(t, "test CA"), dir: t.TempDir()}
	transporttest.WriteServer(t, p.dir, p.ca, p.ca.IssueServer("server"))
	return p
}

func (p *pki) crl(t *testing.T, data ...[]byte) {
	t.Helper()
	transporttest.WriteFile(t, filepath.Join(p.dir, "ca-crl.pem"), bytes.Join(data, nil), 0o644)
}

func (p *pki) load(t *testing.T, o transport.TLSOptions) *transport.Credentials {
	t.Helper()
	c, err := transport.LoadCredentials(p.dir, o)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// clientConfig trusts the CA and shows is, which may be nil.
func (p *pki) clientConfig(is *transporttest.Issued) *tls.Config {
	roots := x509.NewCertPool()
	roots.AddCert(p.ca.Cert)
	cfg := &tls.Config{RootCAs: roots, ServerName: "server"}
	if is != nil {
		// A certificate of another CA is sent as well: the server has to
		// refuse it, not the client to hold it back.
		cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return &tls.Certificate{Certificate: is.Chain, PrivateKey: is.Key}, nil
		}
	}
	return cfg
}

// handshake runs both sides over a socket pair and reads one byte each way,
// so that the client sees what the server says after its own end. A side
// that fails hangs up.
func handshake(t *testing.T, server, client *tls.Config) (s, c transport.Conn, serverErr, clientErr error) {
	t.Helper()
	sc, cc := transporttest.Pair(t)
	end := time.Now().Add(30 * time.Second)
	put(t, errors.Join(sc.SetDeadline(end), cc.SetDeadline(end)))
	done := make(chan error, 1)
	go func() {
		var err error
		if c, err = transport.ClientTLS(cc, client); err == nil {
			// A server that has hung up left its alert to be read.
			c.Write([]byte("c"))
			_, err = io.ReadFull(c, make([]byte, 1))
		}
		if err != nil {
			cc.Close()
		}
		done <- err
	}()
	if s, serverErr = transport.ServerTLS(sc, server); serverErr == nil {
		if _, serverErr = io.ReadFull(s, make([]byte, 1)); serverErr == nil {
			_, serverErr = s.Write([]byte("s"))
		}
	}
	if serverErr != nil {
		sc.Close()
	}
	return s, c, serverErr, <-done
}

func TestTLSPeersKnowEachOther(t *testing.T) {
	p := newPKI(t)
	alice := p.ca.IssueClient("alice")
	for _, v := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		t.Run(tls.VersionName(v), func(t *testing.T) {
			clientDir := t.TempDir()
			transporttest.WriteClient(t, clientDir, p.ca, alice)
			creds, err := transport.LoadCredentials(clientDir, transport.TLSOptions{Client: true})
			put(t, err)
			cfg := creds.ClientConfig("server")
			cfg.MaxVersion = v
			s, c, serr, cerr := handshake(t, p.load(t, transport.TLSOptions{}).ServerConfig(), cfg)
			put(t, errors.Join(serr, cerr))
			if got := s.Peer(); got.Cert == nil || got.Cert.Subject.CommonName != "alice" || got.UID != uint32(os.Getuid()) {
				t.Errorf("server's peer is %+v, want alice of this user", *got)
			}
			if got := c.Peer(); got.Cert == nil || got.Cert.Subject.CommonName != "server" {
				t.Errorf("client's peer is %+v, want the server's certificate", *got)
			}
			if s.Raw() != nil || c.Raw() != nil {
				t.Error("a connection inside TLS has a raw socket")
			}
			talk(t, s, c)
			put(t, errors.Join(s.Close(), c.Close()))
		})
	}
}

// clientCase is a client certificate and what becomes of it.
type clientCase struct {
	name string
	cert *transporttest.Issued
	crl  [][]byte
	want string // part of the server's error, or "" if it gets in
}

func clientCases(t *testing.T, ca *transporttest.CA) []clientCase {
	t.Helper()
	day := time.Now().Add(24 * time.Hour)
	good, bad := ca.IssueClient("good"), ca.IssueClient("bad")
	other := transporttest.NewCA(t, "other CA")
	impostor := transporttest.NewCA(t, "test CA") // the name, not the key
	inter := ca.Intermediate("intermediate")
	leaf := inter.IssueClient("leaf")
	deep := ca
	for range limits.CertificateChain {
		deep = deep.Intermediate("deep")
	}
	big, err := rsa.GenerateKey(rand.Reader, limits.RSABits+8)
	put(t, err)
	crl := func(b ...[]byte) [][]byte { return b }
	return []clientCase{
		{"good", good, nil, ""},
		{"none", nil, nil, "certificate"},
		{"of another CA", other.IssueClient("good"), nil, "unknown authority"},
		{"of a CA with the same name", impostor.IssueClient("good"), nil, "unknown authority"},
		{"self-signed", transporttest.SelfSigned(t, "good"), nil, "unknown authority"},
		{"expired", ca.IssueClient("x", transporttest.Expired), nil, "expired"},
		{"not yet valid", ca.IssueClient("x", transporttest.NotYetValid), nil, "not yet valid"},
		{"of a server", ca.IssueServer("x"), nil, "key usage"},
		{"for any usage", ca.IssueClient("x", transporttest.Usage()), nil, ""},
		{"of an intermediate CA", leaf, nil, ""},
		{"without its intermediate", &transporttest.Issued{Cert: leaf.Cert, Key: leaf.Key, Chain: leaf.Chain[:1]}, nil, "unknown authority"},
		{"of a client that plays CA", fakeCA(t, good), nil, "unknown authority"},
		{"with too long a chain", deep.IssueClient("x"), nil, "certificates"},
		{"with too large an RSA key", ca.Issue("x", big, transporttest.Usage(x509.ExtKeyUsageClientAuth)), nil, "RSA"},
		{"not on the list", good, crl(ca.CRL(day, bad)), ""},
		{"on the list", bad, crl(ca.CRL(day, bad)), "revoked"},
		{"on a list that expired", bad, crl(ca.CRL(time.Now().Add(-time.Hour), bad)), "revoked"},
		{"list expired", good, crl(ca.CRL(time.Now().Add(-time.Hour))), "expired"},
		{"old and new list", good, crl(ca.CRL(time.Now().Add(-time.Hour)), ca.CRL(day)), ""},
		{"list of next week", good, crl(ca.CRL(day.Add(7 * 24 * time.Hour))), "valid from"},
		{"list of another CA only", good, crl(other.CRL(day)), "no revocation list"},
		{"leaf on its CA's list", leaf, crl(ca.CRL(day), inter.CRL(day, leaf)), "revoked"},
		{"leaf with both lists", leaf, crl(ca.CRL(day), inter.CRL(day)), ""},
		{"intermediate revoked", leaf, crl(ca.CRL(day, inter.Authority()), inter.CRL(day)), "revoked"},
		{"intermediate without list", leaf, crl(ca.CRL(day)), "no revocation list"},
	}
}

// fakeCA signs a client certificate with a client's key.
func fakeCA(t *testing.T, signer *transporttest.Issued) *transporttest.Issued {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	put(t, err)
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(77), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, signer.Cert, key.Public(), signer.Key)
	put(t, err)
	return &transporttest.Issued{Key: key, Chain: [][]byte{der, signer.Cert.Raw}}
}

func TestWhichClientsGetIn(t *testing.T) {
	p := newPKI(t)
	for _, tt := range clientCases(t, p.ca) {
		for _, v := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
			t.Run(tt.name+" "+tls.VersionName(v), func(t *testing.T) {
				os.Remove(filepath.Join(p.dir, "ca-crl.pem"))
				if tt.crl != nil {
					p.crl(t, tt.crl...)
				}
				creds := p.load(t, transport.TLSOptions{Log: slog.New(slog.DiscardHandler)})
				client := p.clientConfig(tt.cert)
				client.MaxVersion = v
				_, _, serr, cerr := handshake(t, creds.ServerConfig(), client)
				if tt.want == "" {
					put(t, errors.Join(serr, cerr))
					return
				}
				if serr == nil || !strings.Contains(serr.Error(), tt.want) {
					t.Errorf("server: error %v, want one that says %q", serr, tt.want)
				}
				if cerr == nil || !strings.Contains(cerr.Error(), "tls:") {
					t.Errorf("client: error %v, want an alert", cerr)
				}
			})
		}
	}
}

func TestWithoutCAOrByRequestClientsNeedNoCertificate(t *testing.T) {
	p := newPKI(t)
	for _, tt := range []struct {
		name     string
		opt      transport.TLSOptions
		noCA     bool
		verifies bool
	}{
		{"CA", transport.TLSOptions{}, false, true},
		{"CA and no verification", transport.TLSOptions{NoVerifyPeer: true}, false, false},
		{"no CA", transport.TLSOptions{}, true, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.noCA {
				put(t, os.Remove(filepath.Join(p.dir, "ca-cert.pem")))
			}
			creds := p.load(t, tt.opt)
			if creds.VerifiesPeers() != tt.verifies {
				t.Errorf("verifies peers: %v, want %v", creds.VerifiesPeers(), tt.verifies)
			}
			s, _, serr, cerr := handshake(t, creds.ServerConfig(), p.clientConfig(nil))
			if err := errors.Join(serr, cerr); (err == nil) == tt.verifies {
				t.Errorf("client without certificate: %v", err)
			}
			if serr == nil && s.Peer().Cert != nil {
				t.Error("peer has a certificate that nobody verified")
			}
		})
	}
}

func TestOldVersionsAreRefused(t *testing.T) {
	p := newPKI(t)
	cfg := p.load(t, transport.TLSOptions{}).ServerConfig()
	for _, v := range []uint16{tls.VersionTLS10, tls.VersionTLS11} {
		client := p.clientConfig(p.ca.IssueClient("c"))
		client.MinVersion, client.MaxVersion = v, v
		_, _, serr, cerr := handshake(t, cfg, client)
		if serr == nil || cerr == nil || !strings.Contains(cerr.Error(), "protocol version") {
			t.Errorf("%s: server %v, client %v; want an alert", tls.VersionName(v), serr, cerr)
		}
	}
}

func TestGarbageGetsAnAlertAndAnError(t *testing.T) {
	p := newPKI(t)
	cfg := p.load(t, transport.TLSOptions{}).ServerConfig()
	for name, hello := range map[string]string{
		"http":  "GET / HTTP/1.1\r\nHost: x\r\n\r\n",
		"nbd":   "IHAVEOPT\x00\x00\x00\x07\x00\x00\x00\x00",
		"sslv2": "\x80\x2e\x01\x00\x02\x00\x15\x00\x00\x00\x10",
		"zero":  strings.Repeat("\x00", 64),
	} {
		s, c := transporttest.Pair(t)
		io.WriteString(c, hello)
		put(t, c.CloseWrite())
		if _, err := transport.ServerTLS(s, cfg); err == nil {
			t.Errorf("%s: handshake succeeded", name)
		}
		s.Close()
		c.Close()
	}
}

func TestAStalledHandshakeEndsAtTheDeadline(t *testing.T) {
	p := newPKI(t)
	s, _ := transporttest.Pair(t)
	put(t, s.SetDeadline(time.Unix(1, 0)))
	_, err := transport.ServerTLS(s, p.load(t, transport.TLSOptions{}).ServerConfig())
	wantErr(t, "handshake", err, os.ErrDeadlineExceeded)
}

// sessions counts the tickets that a client is given.
type sessions struct {
	mu sync.Mutex
	n  int // guarded by mu
	tls.ClientSessionCache
}

func (s *sessions) Put(k string, cs *tls.ClientSessionState) {
	s.mu.Lock()
	s.n++
	s.mu.Unlock()
	s.ClientSessionCache.Put(k, cs)
}

func TestNoSessionIsEverResumed(t *testing.T) {
	p := newPKI(t)
	cfg := p.load(t, transport.TLSOptions{}).ServerConfig()
	for _, v := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		client := p.clientConfig(p.ca.IssueClient("c"))
		cache := &sessions{ClientSessionCache: tls.NewLRUClientSessionCache(4)}
		client.MaxVersion, client.ClientSessionCache = v, cache
		for range 2 {
			_, c, serr, cerr := handshake(t, cfg, client)
			put(t, errors.Join(serr, cerr))
			if st := c.(interface{ ConnectionState() tls.ConnectionState }).ConnectionState(); st.DidResume {
				t.Errorf("%s: session was resumed", tls.VersionName(v))
			}
		}
		if cache.n != 0 {
			t.Errorf("%s: server issued %d tickets", tls.VersionName(v), cache.n)
		}
	}
}

func TestClientAlwaysVerifies(t *testing.T) {
	p := newPKI(t)
	clientDir := t.TempDir()
	me := p.ca.IssueClient("me")
	transporttest.WriteClient(t, clientDir, p.ca, me)
	for _, tt := range []struct {
		name, host, want string
		server           *transporttest.Issued
	}{
		{"name", "server", "", p.ca.IssueServer("server")},
		{"address", "127.0.0.1", "", p.ca.IssueServer("server")},
		{"other name", "elsewhere", "not elsewhere", p.ca.IssueServer("server")},
		{"other CA", "server", "unknown authority", transporttest.NewCA(t, "x").IssueServer("server")},
		{"expired", "server", "expired", p.ca.IssueServer("server", transporttest.Expired)},
		{"of a client", "server", "key usage", p.ca.IssueClient("server")},
		{"no name to verify", "", "ServerName", p.ca.IssueServer("server")},
	} {
		t.Run(tt.name, func(t *testing.T) {
			transporttest.WriteServer(t, p.dir, p.ca, tt.server)
			for _, o := range []transport.TLSOptions{{Client: true}, {Client: true, NoVerifyPeer: true}} {
				creds, err := transport.LoadCredentials(clientDir, o)
				put(t, err)
				_, _, _, cerr := handshake(t, p.load(t, transport.TLSOptions{}).ServerConfig(), creds.ClientConfig(tt.host))
				if tt.want == "" {
					put(t, cerr)
				} else if cerr == nil || !strings.Contains(cerr.Error(), tt.want) {
					t.Errorf("client: error %v, want one that says %q", cerr, tt.want)
				}
			}
		})
	}
}

func TestClientHonoursTheRevocationList(t *testing.T) {
	p := newPKI(t)
	server := p.ca.IssueServer("server")
	transporttest.WriteServer(t, p.dir, nil, server)
	clientDir := t.TempDir()
	transporttest.WriteClient(t, clientDir, p.ca, p.ca.IssueClient("me"))
	transporttest.WriteFile(t, filepath.Join(clientDir, "ca-crl.pem"), p.ca.CRL(time.Now().Add(time.Hour), server), 0o644)
	creds, err := transport.LoadCredentials(clientDir, transport.TLSOptions{Client: true})
	put(t, err)
	_, _, _, cerr := handshake(t, p.load(t, transport.TLSOptions{}).ServerConfig(), creds.ClientConfig("server"))
	if cerr == nil || !strings.Contains(cerr.Error(), "revoked") {
		t.Errorf("client of a revoked server: %v", cerr)
	}
}

// TestClientNeedsAnAuthority: a folder that has none, or is none, is a mistake.
func TestClientNeedsAnAuthority(t *testing.T) {
	dir := t.TempDir()
	for _, dir := range []string{dir, filepath.Join(dir, "none")} {
		if _, err := transport.LoadCredentials(dir, transport.TLSOptions{Client: true}); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%q: %v", dir, err)
		}
	}
}

// reloadStep changes the files and says which server is met afterwards and
// what the log has.
type reloadStep struct {
	name   string
	change func()
	serial *big.Int
	log    string
}

func TestChangedFilesAreUsedWholeOrNotAtAll(t *testing.T) {
	p := newPKI(t)
	var log logged
	first, second, third := p.ca.IssueServer("server"), p.ca.IssueServer("server"), p.ca.IssueServer("server")
	transporttest.WriteServer(t, p.dir, nil, first)
	cfg := p.load(t, transport.TLSOptions{Log: log.logger()}).ServerConfig()
	file := func(name string) string { return filepath.Join(p.dir, name) }
	wr := func(name string, data []byte, perm os.FileMode) { transporttest.WriteFile(t, file(name), data, perm) }
	for _, st := range []reloadStep{
		{"nothing", func() {}, first.Cert.SerialNumber, ""},
		{"new pair", func() { transporttest.WriteServer(t, p.dir, nil, second) }, second.Cert.SerialNumber, "reloaded"},
		{"nothing more", func() {}, second.Cert.SerialNumber, ""},
		{"certificate before its key", func() { wr("server-cert.pem", third.CertPEM(), 0o644) }, second.Cert.SerialNumber, "private key does not match"},
		{"the same again", func() {}, second.Cert.SerialNumber, ""},
		{"then its key", func() { wr("server-key.pem", third.KeyPEM(t), 0o600) }, third.Cert.SerialNumber, "reloaded"},
		{"key that others may read", func() { wr("server-key.pem", first.KeyPEM(t), 0o644) }, third.Cert.SerialNumber, "server-key.pem"},
		{"garbage", func() { wr("server-key.pem", []byte("-----"), 0o600) }, third.Cert.SerialNumber, "stay as they were"},
		{"no key", func() { put(t, os.Remove(file("server-key.pem"))) }, third.Cert.SerialNumber, "server-key.pem"},
		{"no CA", func() {
			wr("server-key.pem", third.KeyPEM(t), 0o600)
			put(t, os.Remove(file("ca-cert.pem")))
		}, third.Cert.SerialNumber, "vanished"},
		{"CA again", func() { wr("ca-cert.pem", p.ca.PEM(), 0o644) }, third.Cert.SerialNumber, "reloaded"},
	} {
		t.Run(st.name, func(t *testing.T) {
			st.change()
			_, c, serr, cerr := handshake(t, cfg, p.clientConfig(p.ca.IssueClient("c")))
			put(t, errors.Join(serr, cerr))
			if got := c.Peer().Cert.SerialNumber; got.Cmp(st.serial) != 0 {
				t.Errorf("server has certificate %v, want %v", got, st.serial)
			}
			if got := log.take(); !strings.Contains(got, st.log) || (st.log == "") != (got == "") {
				t.Errorf("log is %q, want %q", got, st.log)
			}
		})
	}
}

func TestARevocationTakesEffectAtTheNextHandshake(t *testing.T) {
	p := newPKI(t)
	day := time.Now().Add(24 * time.Hour)
	p.crl(t, p.ca.CRL(day))
	cfg := p.load(t, transport.TLSOptions{Log: slog.New(slog.DiscardHandler)}).ServerConfig()
	bob := p.ca.IssueClient("bob")
	for _, st := range []struct {
		name   string
		change func()
		in     bool
	}{
		{"before", func() {}, true},
		{"revoked", func() { p.crl(t, p.ca.CRL(day, bob)) }, false},
		{"list removed", func() { put(t, os.Remove(filepath.Join(p.dir, "ca-crl.pem"))) }, false},
		{"list without him", func() { p.crl(t, p.ca.CRL(day)) }, true},
	} {
		st.change()
		_, _, serr, cerr := handshake(t, cfg, p.clientConfig(bob))
		if err := errors.Join(serr, cerr); (err == nil) != st.in {
			t.Errorf("%s: handshake %v, want success: %v", st.name, err, st.in)
		}
	}
}

// TestConnBelowTLSIsKnown, whatever the server encrypts with: it tells of a peer that
// is gone.
func TestConnBelowTLSIsKnown(t *testing.T) {
	p := newPKI(t)
	path := filepath.Join(t.TempDir(), "keys.psk")
	put(t, psk.Add(path, "guest", limits.MinPSK, false))
	keys, err := psk.Load(path)
	put(t, err)
	certs := p.load(t, transport.TLSOptions{})
	shown := p.clientConfig(p.ca.IssueClient("guest"))
	type sides struct {
		server transport.ServerSecurity
		client *tls.Config
	}
	cases := map[string]sides{
		"certificates":             {transport.ServerSecurity{Certificates: certs}, shown},
		"certificates beside keys": {transport.ServerSecurity{Certificates: certs, Keys: keys}, shown},
	}
	if psk.Supported() == nil {
		cfg, err := psk.ClientConfig(path, "guest")
		put(t, err)
		cases["keys"] = sides{transport.ServerSecurity{Keys: keys}, cfg}
	}
	for name, tt := range cases {
		sc, cc := transporttest.Pair(t)
		put(t, errors.Join(sc.SetDeadline(time.Now().Add(30*time.Second)), cc.SetDeadline(time.Now().Add(30*time.Second))))
		done := make(chan error, 1)
		go func() {
			_, err := transport.ClientTLS(cc, tt.client)
			done <- err
		}()
		c, err := tt.server.Encrypt(sc)
		put(t, errors.Join(err, <-done))
		under, ok := c.(interface{ NetConn() net.Conn }).NetConn().(transport.Conn)
		if !ok || under.Raw() != sc.Raw() {
			t.Errorf("%s: below TLS is %v, want the socket", name, under)
		}
	}
}

// TestShownCertificateStandsUntilItWouldBeRefused at another handshake, also where none
// was to be shown; what has changed is looked at each time.
func TestShownCertificateStandsUntilItWouldBeRefused(t *testing.T) {
	p, other := newPKI(t), transporttest.NewCA(t, "other CA")
	day := time.Now().Add(24 * time.Hour)
	authority := filepath.Join(p.dir, "ca-cert.pem")
	put(t, os.Remove(authority))
	bob := p.ca.Intermediate("intermediate CA").IssueClient("bob")
	admit := func() *transport.Peer {
		t.Helper()
		s := &transport.ServerSecurity{Certificates: p.load(t, transport.TLSOptions{Log: slog.New(slog.DiscardHandler)})}
		sc, cc := transporttest.Pair(t)
		put(t, errors.Join(sc.SetDeadline(time.Now().Add(30*time.Second)), cc.SetDeadline(time.Now().Add(30*time.Second))))
		done := make(chan error, 1)
		go func() {
			_, err := transport.ClientTLS(cc, p.clientConfig(bob))
			done <- err
		}()
		c, err := s.Encrypt(sc)
		if err := errors.Join(err, <-done); err != nil {
			t.Fatal(err)
		}
		return c.Peer()
	}
	anybody := admit()
	if !anybody.Stands() {
		t.Error("who has to show nothing is refused")
	}
	transporttest.WriteFile(t, authority, p.ca.PEM(), 0o644)
	if anybody.Stands() {
		t.Error("who has shown nothing stands where a certificate is needed")
	}
	peer := admit()
	for _, st := range []struct {
		name   string
		change func()
		want   bool
	}{
		{"nothing", func() {}, true},
		{"another authority", func() { transporttest.WriteFile(t, authority, other.PEM(), 0o644) }, false},
		{"both authorities", func() { transporttest.WriteFile(t, authority, append(other.PEM(), p.ca.PEM()...), 0o644) }, true},
		{"no list of the intermediate authority", func() { p.crl(t, p.ca.CRL(day)) }, false},
	} {
		st.change()
		for range 2 {
			if got := peer.Stands(); got != st.want {
				t.Errorf("%s: got %t, want %t", st.name, got, st.want)
			}
		}
	}
}

// TestAFaultOfOneFileHoldsUpNoRevocation: what is wrong with the others is told,
// and they stay as they were.
func TestAFaultOfOneFileHoldsUpNoRevocation(t *testing.T) {
	day := time.Now().Add(24 * time.Hour)
	for _, tt := range []struct {
		name, file string
		data       []byte // nil removes the file
		perm       os.FileMode
	}{
		{"key that others may read", "server-key.pem", []byte("-----"), 0o644},
		{"key that is none", "server-key.pem", []byte("-----"), 0o600},
		{"no key", "server-key.pem", nil, 0},
		{"certificate that is none", "server-cert.pem", []byte("-----"), 0o644},
		{"authority that is none", "ca-cert.pem", []byte("-----"), 0o644},
		{"no authority", "ca-cert.pem", nil, 0},
		{"another authority of the name", "ca-cert.pem", transporttest.NewCA(t, "test CA").PEM(), 0o644},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := newPKI(t)
			p.crl(t, p.ca.CRL(day))
			var log logged
			creds := p.load(t, transport.TLSOptions{Log: log.logger()})
			alice, bob := p.ca.IssueClient("alice"), p.ca.IssueClient("bob")
			path := filepath.Join(p.dir, tt.file)
			if tt.data == nil {
				put(t, os.Remove(path))
			} else {
				transporttest.WriteFile(t, path, tt.data, tt.perm)
			}
			p.crl(t, p.ca.CRL(day, bob))
			changed, err := creds.Look()
			if !changed || err == nil || !strings.Contains(err.Error(), tt.file) {
				t.Errorf("look: changed %v, %v; want a change and an error of %s", changed, err, tt.file)
			}
			if got := log.take(); !strings.Contains(got, "reloaded") || !strings.Contains(got, tt.file) {
				t.Errorf("log is %q, want the list and the fault of %s", got, tt.file)
			}
			_, _, serr, cerr := handshake(t, creds.ServerConfig(), p.clientConfig(bob))
			if serr == nil || !strings.Contains(serr.Error(), "revoked") || cerr == nil {
				t.Errorf("revoked client: %v, %v; want that it is refused", serr, cerr)
			}
			_, _, serr, cerr = handshake(t, creds.ServerConfig(), p.clientConfig(alice))
			put(t, errors.Join(serr, cerr))
			_ = log.take()
			p.crl(t, p.ca.CRL(day, alice, bob))
			_, err = creds.Look()
			if got := log.take(); err == nil || !strings.Contains(got, "reloaded") || strings.Contains(got, "stay as they were") {
				t.Errorf("second list: %v, log %q; want the list, and nothing of the fault that was told", err, got)
			}
		})
	}
}

// TestAnAuthorityGoesWhileTheListIsWrong: it stands for no client any more.
func TestAnAuthorityGoesWhileTheListIsWrong(t *testing.T) {
	p, left := newPKI(t), transporttest.NewCA(t, "left")
	day := time.Now().Add(24 * time.Hour)
	file := filepath.Join(p.dir, "ca-cert.pem")
	transporttest.WriteFile(t, file, append(p.ca.PEM(), left.PEM()...), 0o644)
	p.crl(t, p.ca.CRL(day), left.CRL(day))
	cfg := p.load(t, transport.TLSOptions{Log: slog.New(slog.DiscardHandler)}).ServerConfig()
	alice, bob := p.clientConfig(p.ca.IssueClient("alice")), p.clientConfig(left.IssueClient("bob"))
	for _, client := range []*tls.Config{alice, bob} {
		_, _, serr, cerr := handshake(t, cfg, client)
		put(t, errors.Join(serr, cerr))
	}
	transporttest.WriteFile(t, file, p.ca.PEM(), 0o644)
	p.crl(t, []byte("-----"))
	if _, _, serr, _ := handshake(t, cfg, bob); serr == nil || !strings.Contains(serr.Error(), "unknown authority") {
		t.Errorf("client of an authority that has gone: %v, want that it is refused", serr)
	}
	_, _, serr, cerr := handshake(t, cfg, alice)
	put(t, errors.Join(serr, cerr))
}

// TestAuthorityAndItsListChangeTogether: neither is in order with what the other
// was before, and none is used before both are there.
func TestAuthorityAndItsListChangeTogether(t *testing.T) {
	p, next := newPKI(t), transporttest.NewCA(t, "test CA")
	day := time.Now().Add(24 * time.Hour)
	p.crl(t, p.ca.CRL(day))
	cfg := p.load(t, transport.TLSOptions{Log: slog.New(slog.DiscardHandler)}).ServerConfig()
	alice, bob := p.clientConfig(p.ca.IssueClient("alice")), p.clientConfig(next.IssueClient("bob"))
	for _, st := range []struct {
		name       string
		change     func()
		alice, bob bool
	}{
		{"before", func() {}, true, false},
		{"authority", func() { transporttest.WriteFile(t, filepath.Join(p.dir, "ca-cert.pem"), next.PEM(), 0o644) }, true, false},
		{"its list", func() { p.crl(t, next.CRL(day)) }, false, true},
	} {
		st.change()
		for client, want := range map[*tls.Config]bool{alice: st.alice, bob: st.bob} {
			_, _, serr, cerr := handshake(t, cfg, client)
			if err := errors.Join(serr, cerr); (err == nil) != want {
				t.Errorf("%s: handshake %v, want success: %v", st.name, err, want)
			}
		}
	}
}

// TestAKeyThatCannotBeReadAgain is what a server has that was started by root and
// has changed its user: the key counts until it changes, the rest does not need it.
func TestAKeyThatCannotBeReadAgain(t *testing.T) {
	p := &pki{ca: transporttest.NewCA(t, "test CA"), dir: publicDir(t)}
	put(t, os.Chmod(p.dir, 0o755))
	first, bob, day := p.ca.IssueServer("server"), p.ca.IssueClient("bob"), time.Now().Add(24*time.Hour)
	transporttest.WriteServer(t, p.dir, p.ca, first)
	p.crl(t, p.ca.CRL(day))
	hidden := func() error { return os.Chmod(filepath.Join(p.dir, "server-key.pem"), 0) }
	given := openCredentials(t, p.dir)
	put(t, hidden())
	var log logged
	creds := p.load(t, transport.TLSOptions{Given: given, Log: log.logger()})

	p.crl(t, p.ca.CRL(day, bob))
	if changed, err := lookAsNobody(t, creds); !changed || err != nil {
		t.Errorf("another list: changed %v, %v; want a change alone", changed, err)
	}
	if got := log.take(); !strings.Contains(got, "reloaded") || strings.Contains(got, "server-key.pem") {
		t.Errorf("log is %q, want the list alone", got)
	}
	transporttest.WriteServer(t, p.dir, nil, p.ca.IssueServer("server"))
	put(t, hidden())
	p.crl(t, p.ca.CRL(day))
	if changed, err := lookAsNobody(t, creds); !changed || err == nil || !strings.Contains(err.Error(), "server-key.pem: permission denied") {
		t.Errorf("another key and list: changed %v, %v; want a change, and what is wrong with the key", changed, err)
	}
	_, c, serr, cerr := handshake(t, creds.ServerConfig(), p.clientConfig(bob))
	put(t, errors.Join(serr, cerr))
	if got, want := c.Peer().Cert.SerialNumber, first.Cert.SerialNumber; got.Cmp(want) != 0 {
		t.Errorf("server has certificate %v, want %v", got, want)
	}
}

// TestWhatWasGivenIsLookedAtInAClosedFolder: nothing there can be read again. What has
// not changed is no error, and a change of any kind is one.
func TestWhatWasGivenIsLookedAtInAClosedFolder(t *testing.T) {
	day, ca := time.Now().Add(24*time.Hour), transporttest.NewCA(t, "test CA")
	for _, tt := range []struct {
		name   string
		change func(p *pki) error // nil: nothing
	}{
		{"nothing", nil},
		{"list that comes", func(p *pki) error { p.crl(t, ca.CRL(day)); return nil }},
		{"authority that goes", func(p *pki) error { return os.Remove(filepath.Join(p.dir, "ca-cert.pem")) }},
		{"key that is written", func(p *pki) error {
			return os.WriteFile(filepath.Join(p.dir, "server-key.pem"), ca.IssueServer("server").KeyPEM(t), 0o600)
		}},
		{"certificate with another link", func(p *pki) error {
			return os.Link(filepath.Join(p.dir, "server-cert.pem"), filepath.Join(publicDir(t), "other"))
		}},
		{"another folder", func(p *pki) error {
			old := filepath.Join(publicDir(t), "old")
			return errors.Join(os.Rename(p.dir, old), os.Mkdir(p.dir, 0o700))
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := &pki{ca: ca, dir: publicDir(t)}
			transporttest.WriteServer(t, p.dir, p.ca, p.ca.IssueServer("server"))
			given := openCredentials(t, p.dir)
			within := stamptest.CloseFolder(t, p.dir)
			var log logged
			creds := p.load(t, transport.TLSOptions{Given: given, Log: log.logger()})
			if tt.change != nil {
				within(func() error { return tt.change(p) })
			}
			changed, err := lookAsNobody(t, creds)
			if changed || (tt.change == nil) != (err == nil) || err != nil && !strings.Contains(err.Error(), "permission denied") {
				t.Errorf("look: changed %v, %v; want a fault: %v", changed, err, tt.change != nil)
			}
			if _, err := stamptest.AsNobody(t, func() (bool, error) { return false, creds.Unseen() }); !errors.Is(err, fs.ErrPermission) {
				t.Errorf("unseen: got %v, want that the folder is closed", err)
			}
		})
	}
}

// openCredentials opens those of a server, until the test ends.
func openCredentials(t *testing.T, dir string) map[string]*os.File {
	t.Helper()
	given, err := transport.OpenCredentials(dir, transport.TLSOptions{})
	put(t, err)
	t.Cleanup(func() {
		for _, f := range given {
			_ = f.Close()
		}
	})
	return given
}

// lookAsNobody is c.Look by a user to whom no file belongs.
func lookAsNobody(t *testing.T, c *transport.Credentials) (changed bool, err error) {
	t.Helper()
	return stamptest.AsNobody(t, c.Look)
}

func TestDirectoriesThatAreNotLoaded(t *testing.T) {
	for _, tt := range []struct {
		name, file string
		data       func(p *pki) []byte // nil removes the file
		perm       os.FileMode
		want       string
	}{
		{"no certificate", "server-cert.pem", nil, 0, "server-cert.pem"},
		{"no key", "server-key.pem", nil, 0, "server-key.pem"},
		{"key of group", "server-key.pem", readKey, 0o640, "server-key.pem"},
		{"key of all", "server-key.pem", readKey, 0o604, "server-key.pem"},
		{"key that others write", "server-key.pem", readKey, 0o620, "server-key.pem"},
		{"empty CA", "ca-cert.pem", text(""), 0o644, "ca-cert.pem"},
		{"text as CA", "ca-cert.pem", text("hello"), 0o644, "ca-cert.pem"},
		{"key as CA", "ca-cert.pem", readKey, 0o644, "PRIVATE KEY"},
		{"broken CA", "ca-cert.pem", text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"), 0o644, "ca-cert.pem"},
		{"large CA", "ca-cert.pem", text(strings.Repeat("x", limits.CertificateFile+1)), 0o644, "more than"},
		{"CA as CRL", "ca-crl.pem", func(p *pki) []byte { return p.ca.PEM() }, 0o644, "X509 CRL"},
		{"broken CRL", "ca-crl.pem", text("-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n"), 0o644, "ca-crl.pem"},
		{"CRL cut off behind another", "ca-crl.pem", func(p *pki) []byte {
			list := p.ca.CRL(time.Now().Add(time.Hour))
			return append(list, list[:len(list)-40]...)
		}, 0o644, "begins 2 blocks"},
		{"damaged CA behind another", "ca-cert.pem", func(p *pki) []byte {
			cert := p.ca.PEM()
			return append(cert, bytes.Replace(cert, []byte("MI"), []byte("M!"), 1)...)
		}, 0o644, "begins 2 blocks"},
		{"forged CRL", "ca-crl.pem", forgedCRL(t), 0o644, "verification"},
		{"delta CRL", "ca-crl.pem", deltaCRL(t), 0o644, "critical"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := newPKI(t)
			path := filepath.Join(p.dir, tt.file)
			if tt.data == nil {
				put(t, os.Remove(path))
			} else {
				transporttest.WriteFile(t, path, tt.data(p), tt.perm)
			}
			_, err := transport.LoadCredentials(p.dir, transport.TLSOptions{})
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("load: error %v, want one that says %q", err, tt.want)
			}
		})
	}
}

func text(s string) func(*pki) []byte { return func(*pki) []byte { return []byte(s) } }

func readKey(p *pki) []byte {
	data, _ := os.ReadFile(filepath.Join(p.dir, "server-key.pem"))
	return data
}

// forgedCRL has the CA's name and another's signature.
func forgedCRL(t *testing.T) func(*pki) []byte {
	return func(*pki) []byte {
		return transporttest.NewCA(t, "test CA").CRL(time.Now().Add(time.Hour))
	}
}

// deltaCRL has the critical extension of a list that holds changes only.
func deltaCRL(t *testing.T) func(*pki) []byte {
	return func(*pki) []byte {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		put(t, err)
		ca := &x509.Certificate{
			SerialNumber: big.NewInt(1), KeyUsage: x509.KeyUsageCRLSign,
			SubjectKeyId: []byte{1}, Subject: pkix.Name{CommonName: "delta"},
		}
		der, err := x509.CreateRevocationList(rand.Reader, &x509.RevocationList{
			Number: big.NewInt(2), ThisUpdate: time.Now(), NextUpdate: time.Now().Add(time.Hour),
			ExtraExtensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 27}, Critical: true, Value: []byte{2, 1, 1}}},
		}, ca, key)
		put(t, err)
		return pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: der})
	}
}

func TestARevocationListNeedsACA(t *testing.T) {
	p := newPKI(t)
	p.crl(t, p.ca.CRL(time.Now().Add(time.Hour)))
	put(t, os.Remove(filepath.Join(p.dir, "ca-cert.pem")))
	if _, err := transport.LoadCredentials(p.dir, transport.TLSOptions{}); err == nil {
		t.Error("a revocation list without CA is loaded")
	}
}

func TestAnExpiredListIsAnnounced(t *testing.T) {
	p := newPKI(t)
	p.crl(t, p.ca.CRL(time.Now().Add(-time.Hour)))
	var log logged
	p.load(t, transport.TLSOptions{Log: log.logger()})
	if got := log.take(); !strings.Contains(got, "expired") {
		t.Errorf("log is %q, want the expired list", got)
	}
}

func TestClientNeedsNoCertificateOfItsOwn(t *testing.T) {
	p := newPKI(t)
	server := p.load(t, transport.TLSOptions{NoVerifyPeer: true}).ServerConfig()
	dir := t.TempDir()
	transporttest.WriteClient(t, dir, p.ca, nil)
	creds, err := transport.LoadCredentials(dir, transport.TLSOptions{Client: true})
	put(t, err)
	_, _, serr, cerr := handshake(t, server, creds.ClientConfig("localhost"))
	put(t, errors.Join(serr, cerr))
	if _, _, serr, _ := handshake(t, creds.ServerConfig(), p.clientConfig(nil)); serr == nil {
		t.Error("a client's credentials make a server")
	}
}

func TestHalfClosedTLSStillReceives(t *testing.T) {
	p := newPKI(t)
	s, c, serr, cerr := handshake(t, p.load(t, transport.TLSOptions{}).ServerConfig(), p.clientConfig(p.ca.IssueClient("c")))
	put(t, errors.Join(serr, cerr))
	put(t, s.CloseWrite())
	if n, err := c.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Errorf("read after close_notify: %d, %v; want the end", n, err)
	}
	if _, err := c.Write([]byte("late")); err != nil {
		t.Errorf("write to a half-closed peer: %v", err)
	}
	put(t, c.CloseWrite())
	if got, err := io.ReadAll(s); string(got) != "late" || err != nil {
		t.Errorf("half-closed side read %q, %v", got, err)
	}
}

// TestClosingIsBoundedWhenThePeerReadsNothing fills the socket: close_notify
// cannot leave, and Close still ends.
func TestClosingIsBoundedWhenThePeerReadsNothing(t *testing.T) {
	p := newPKI(t)
	s, _, serr, cerr := handshake(t, p.load(t, transport.TLSOptions{}).ServerConfig(), p.clientConfig(p.ca.IssueClient("c")))
	put(t, errors.Join(serr, cerr))
	put(t, s.SetWriteDeadline(time.Now().Add(50*time.Millisecond)))
	_, err := s.Write(make([]byte, 16<<20))
	wantErr(t, "write to a peer that reads nothing", err, os.ErrDeadlineExceeded)
	s.Close()
	_, err = s.Write([]byte("x"))
	wantErr(t, "write after close", err, net.ErrClosed)
}

func TestConcurrentHandshakesSurviveReloads(t *testing.T) {
	p := newPKI(t)
	creds := p.load(t, transport.TLSOptions{Log: slog.New(slog.DiscardHandler)})
	cfg, client := creds.ServerConfig(), p.clientConfig(p.ca.IssueClient("c"))
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 5 {
				_, _, serr, cerr := handshake(t, cfg, client)
				if err := errors.Join(serr, cerr); err != nil {
					t.Errorf("handshake during reloads: %v", err)
				}
			}
		})
	}
	for range 10 {
		transporttest.WriteServer(t, p.dir, p.ca, p.ca.IssueServer("server"))
	}
	wg.Wait()
}
