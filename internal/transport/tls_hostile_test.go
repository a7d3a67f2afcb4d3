package transport_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"math/big"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/transport"
	"github.com/vmdiskd/vmdiskd/internal/transport/transporttest"
)

// What a server spends on a client that it refuses: a multiple of what is
// needed, and far from what these clients would like it to be.
const (
	wasteRead = 320 << 10 // bytes: crypto/tls takes certificates of 256 KiB
	wasteCPU  = 2 * time.Second

	// wasteSignatures is how many signatures a server verifies in that time where
	// it takes longer for them, as with the race detector. crypto/x509 verifies 100
	// for a chain, and a processor that is shared is not always as fast.
	wasteSignatures = 150
)

// counted counts what is read.
type counted struct {
	transport.Conn
	n int64
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.n += int64(n)
	return n, err
}

// spent is what a handshake took of the server.
type spent struct {
	read int64
	cpu  time.Duration
	err  error
}

// threadCPU is the time that the calling thread has run.
func threadCPU() time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_THREAD, &u); err != nil {
		panic(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// patience is wasteCPU on this machine.
var patience = sync.OnceValue(func() time.Duration {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	key, err := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	if err != nil {
		panic(err)
	}
	hash := make([]byte, 64)
	sig, err := ecdsa.SignASN1(rand.Reader, key, hash)
	if err != nil {
		panic(err)
	}
	before := threadCPU()
	for range wasteSignatures {
		if !ecdsa.VerifyASN1(&key.PublicKey, hash, sig) {
			panic("a good signature is refused")
		}
	}
	return max(wasteCPU, threadCPU()-before)
})

// refuse lets attack, which returns what it was told in the end, talk to a
// server on a listener.
func refuse(t *testing.T, l transport.Listener, server *tls.Config, attack func(transport.Conn) error) (s spent, told error) {
	t.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	sc, cc := connect(t, l)
	end := time.Now().Add(10 * time.Minute) // what is spent is measured in time of the processor
	put(t, errors.Join(sc.SetDeadline(end), cc.SetDeadline(end)))
	done := make(chan error, 1)
	go func() {
		done <- attack(cc)
		cc.Close()
	}()
	under := &counted{Conn: sc}
	before := threadCPU()
	_, s.err = transport.ServerTLS(under, server)
	s.cpu, s.read = threadCPU()-before, under.n
	// With the rest unread the alert would be lost.
	sc.CloseWrite()
	io.Copy(io.Discard, sc)
	return s, <-done
}

// shows is a client with cfg's certificate, which waits for an answer to it.
func shows(cfg *tls.Config) func(transport.Conn) error {
	return func(c transport.Conn) error {
		t := tls.Client(c, cfg)
		if err := t.Handshake(); err != nil {
			return err
		}
		_, err := t.Read(make([]byte, 1))
		return err
	}
}

// wantRefused fails unless the server refused a client for the reason want,
// told it alert, and spent little.
func wantRefused(t *testing.T, s spent, told error, want, alert string) {
	t.Helper()
	if s.err == nil || !strings.Contains(s.err.Error(), want) {
		t.Errorf("server: error %v, want one that says %q", s.err, want)
	}
	if told == nil || !strings.Contains(told.Error(), alert) {
		t.Errorf("client: error %v, want an alert with %q", told, alert)
	}
	if s.read > wasteRead {
		t.Errorf("server read %d bytes of a refused client, want at most %d", s.read, wasteRead)
	}
	if s.cpu > patience() {
		t.Errorf("server computed for %v for a refused client, want at most %v", s.cpu, patience())
	}
}

// madeUp is a key that nobody has.
type madeUp struct{ pub *rsa.PublicKey }

func newMadeUp(t *testing.T, bits uint) madeUp {
	t.Helper()
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), bits-1))
	put(t, err)
	n.SetBit(n.SetBit(n, int(bits-1), 1), 0, 1)
	return madeUp{&rsa.PublicKey{N: n, E: 1<<31 - 1}}
}

func (k madeUp) Public() crypto.PublicKey { return k.pub }

func (k madeUp) Sign(io.Reader, []byte, crypto.SignerOpts) ([]byte, error) {
	return make([]byte, k.pub.Size()), nil
}

// slowKey is of the kind whose signatures take longest to verify.
func slowKey(t *testing.T) crypto.Signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	put(t, err)
	return key
}

// authority is a certificate of the authority called name, with issuer's name
// and signer's signature.
func authority(t *testing.T, name, issuer string, pub crypto.PublicKey, signer crypto.Signer, opts ...transporttest.Option) []byte {
	t.Helper()
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(7), Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	for _, o := range opts {
		o(tmpl)
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, &x509.Certificate{Subject: pkix.Name{CommonName: issuer}}, pub, signer)
	put(t, err)
	return der
}

// ladder is a client with n certificates, each signed with the key of the next.
func ladder(t *testing.T, n int) *transporttest.Issued {
	key := slowKey(t)
	is := &transporttest.Issued{Key: key}
	for i := range n {
		next := slowKey(t)
		is.Chain = append(is.Chain, authority(t, fmt.Sprint(i), fmt.Sprint(i+1), key.Public(), next))
		key = next
	}
	return is
}

// crowd is a client with n authorities that may have signed its certificate,
// and did not.
func crowd(t *testing.T, n int) *transporttest.Issued {
	is := &transporttest.Issued{Key: slowKey(t)}
	signer := slowKey(t)
	is.Chain = append(is.Chain, authority(t, "leaf", "crowd", is.Key.Public(), signer))
	for range n {
		is.Chain = append(is.Chain, authority(t, "crowd", "nobody", slowKey(t).Public(), signer))
	}
	return is
}

// constrained is a client with n names whose authority allows or denies as
// many others.
func constrained(t *testing.T, n int) *transporttest.Issued {
	is := &transporttest.Issued{Key: slowKey(t)}
	key := slowKey(t)
	is.Chain = [][]byte{
		authority(t, "leaf", "constrained", is.Key.Public(), key, func(c *x509.Certificate) {
			for i := range n {
				c.DNSNames = append(c.DNSNames, fmt.Sprintf("host%d.example.com", i))
			}
		}),
		authority(t, "constrained", "nobody", key.Public(), key, func(c *x509.Certificate) {
			for i := range n {
				c.PermittedDNSDomains = append(c.PermittedDNSDomains, fmt.Sprintf("p%d.example.com", i))
				c.ExcludedDNSDomains = append(c.ExcludedDNSDomains, fmt.Sprintf("x%d.example.com", i))
			}
		}),
	}
	return is
}

// junk is a client with a certificate of n bytes that is none.
func junk(t *testing.T, n int) *transporttest.Issued {
	return &transporttest.Issued{Key: slowKey(t), Chain: [][]byte{make([]byte, n)}}
}

// TestHostileCertificatesCostLittle: whoever may connect may send certificates,
// and has the server look at them before anything is proved.
func TestHostileCertificatesCostLittle(t *testing.T) {
	p := newPKI(t)
	server := p.load(t, transport.TLSOptions{}).ServerConfig()
	l, _ := listenUnix(t)
	huge := newMadeUp(t, 16384)
	for _, tt := range []struct {
		name        string
		is          *transporttest.Issued
		want, alert string
	}{
		{"RSA key of 16384 bits", p.ca.Issue("x", huge, transporttest.Usage(x509.ExtKeyUsageClientAuth)), "RSA key larger", "bad certificate"},
		{"authority with such a key", &transporttest.Issued{Key: huge, Chain: [][]byte{
			p.ca.IssueClient("x").Chain[0], authority(t, "test CA", "test CA", huge.Public(), slowKey(t)),
		}}, "RSA key larger", "bad certificate"},
		{"1000 name constraints", constrained(t, 1000), "unknown authority", "unknown certificate authority"},
		{"chain of 200", ladder(t, 200), "signature check", "bad certificate"},
		{"120 authorities of one name", crowd(t, 120), "signature check", "bad certificate"},
		{"message of 200 KiB", junk(t, 200<<10), "parse", "decod"},
		{"message of 1 MiB", junk(t, 1<<20), "exceeds maximum", "internal error"},
	} {
		for _, v := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
			t.Run(tt.name+" "+tls.VersionName(v), func(t *testing.T) {
				client := p.clientConfig(tt.is)
				client.MaxVersion = v
				s, told := refuse(t, l, server, shows(client))
				wantRefused(t, s, told, tt.want, tt.alert)
			})
		}
	}
	honest(t, p, server)
}

// honest fails unless a client of the CA gets in, with as long a chain as there
// may be, of authorities that all have one name: that takes the most signatures.
func honest(t *testing.T, p *pki, server *tls.Config) {
	t.Helper()
	ca := p.ca
	for range limits.CertificateChain - 1 {
		ca = ca.Intermediate("deep")
	}
	_, _, serr, cerr := handshake(t, server, p.clientConfig(ca.IssueClient("honest")))
	put(t, errors.Join(serr, cerr))
}

// TestALongHelloIsRefusedUnread: of a message of 1 MiB no more is read than
// the record in which it begins.
func TestALongHelloIsRefusedUnread(t *testing.T) {
	p := newPKI(t)
	server := p.load(t, transport.TLSOptions{}).ServerConfig()
	l, _ := listenUnix(t)
	s, told := refuse(t, l, server, func(c transport.Conn) error {
		record := make([]byte, 5+16<<10)
		copy(record, []byte{22, 3, 1, 16 << 10 >> 8, 0, 1, 1 << 20 >> 16, 0, 0}) // a ClientHello
		for range 1 << 20 / (16 << 10) {
			if _, err := c.Write(record); err != nil {
				return err
			}
			copy(record[5:], make([]byte, 4))
		}
		alert, err := io.ReadAll(c)
		return errors.Join(fmt.Errorf("% x", alert), err)
	})
	wantRefused(t, s, told, "exceeds maximum", "15 03 01 00 02 02 50") // internal_error
	if most := int64(32 << 10); s.read > most {
		t.Errorf("server read %d bytes, want at most %d", s.read, most)
	}
}
