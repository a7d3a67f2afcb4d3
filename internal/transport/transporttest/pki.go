// Package transporttest has certificates and connections for tests.
package transporttest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// CA is a certificate authority of one test. Its methods may be called from
// the test's goroutine only; they end the test on failure.
type CA struct {
	// Cert is the authority's own certificate.
	Cert *x509.Certificate

	t      testing.TB
	key    crypto.Signer
	parent *CA
	serial int64
}

// Issued is a certificate with its private key.
type Issued struct {
	Cert *x509.Certificate
	Key  crypto.Signer

	// Chain holds the DER certificates to be sent: the leaf, then the
	// intermediate authorities, without the root.
	Chain [][]byte
}

// An Option changes the template of a certificate before it is signed.
type Option func(*x509.Certificate)

// Expired makes a certificate that ended an hour ago.
func Expired(c *x509.Certificate) {
	c.NotBefore, c.NotAfter = time.Now().Add(-48*time.Hour), time.Now().Add(-time.Hour)
}

// NotYetValid makes a certificate that begins tomorrow.
func NotYetValid(c *x509.Certificate) {
	c.NotBefore, c.NotAfter = time.Now().Add(24*time.Hour), time.Now().Add(48*time.Hour)
}

// Usage replaces the extended key usages; none means that any is allowed.
func Usage(u ...x509.ExtKeyUsage) Option {
	return func(c *x509.Certificate) { c.ExtKeyUsage = u }
}

// Names replaces the DNS names and IP addresses of the certificate.
func Names(names ...string) Option {
	return func(c *x509.Certificate) {
		c.DNSNames, c.IPAddresses = nil, nil
		for _, n := range names {
			if ip := net.ParseIP(n); ip != nil {
				c.IPAddresses = append(c.IPAddresses, ip)
			} else {
				c.DNSNames = append(c.DNSNames, n)
			}
		}
	}
}

// NewCA makes a self-signed authority with a P-256 key.
func NewCA(t testing.TB, name string) *CA {
	t.Helper()
	return newCA(t, name, nil)
}

// Intermediate makes an authority that ca has signed.
func (ca *CA) Intermediate(name string) *CA {
	ca.t.Helper()
	return newCA(ca.t, name, ca)
}

func newCA(t testing.TB, name string, parent *CA) *CA {
	t.Helper()
	tmpl := template(name, 1)
	tmpl.IsCA, tmpl.BasicConstraintsValid = true, true
	tmpl.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageCRLSign
	ca := &CA{t: t, key: newKey(t), parent: parent, serial: 1}
	signer, signerCert := ca.key, tmpl
	if parent != nil {
		parent.serial++
		tmpl.SerialNumber = big.NewInt(parent.serial)
		signer, signerCert = parent.key, parent.Cert
	}
	ca.Cert = sign(t, tmpl, signerCert, ca.key.Public(), signer)
	return ca
}

// IssueServer signs a server certificate for name, "localhost", 127.0.0.1
// and ::1.
func (ca *CA) IssueServer(name string, opts ...Option) *Issued {
	ca.t.Helper()
	all := append([]Option{
		Names(name, "localhost", "127.0.0.1", "::1"),
		Usage(x509.ExtKeyUsageServerAuth),
	}, opts...)
	return ca.Issue(name, newKey(ca.t), all...)
}

// IssueClient signs a client certificate whose common name and DNS name are
// name.
func (ca *CA) IssueClient(name string, opts ...Option) *Issued {
	ca.t.Helper()
	all := append([]Option{Names(name), Usage(x509.ExtKeyUsageClientAuth)}, opts...)
	return ca.Issue(name, newKey(ca.t), all...)
}

// Issue signs a certificate for key without names or extended key usage.
func (ca *CA) Issue(name string, key crypto.Signer, opts ...Option) *Issued {
	ca.t.Helper()
	ca.serial++
	tmpl := template(name, ca.serial)
	for _, o := range opts {
		o(tmpl)
	}
	leaf := sign(ca.t, tmpl, ca.Cert, key.Public(), ca.key)
	is := &Issued{Cert: leaf, Key: key, Chain: [][]byte{leaf.Raw}}
	for a := ca; a.parent != nil; a = a.parent {
		is.Chain = append(is.Chain, a.Cert.Raw)
	}
	return is
}

// SelfSigned makes a client certificate that nobody but itself has signed.
func SelfSigned(t testing.TB, name string) *Issued {
	t.Helper()
	key := newKey(t)
	tmpl := template(name, 1)
	Names(name)(tmpl)
	Usage(x509.ExtKeyUsageClientAuth)(tmpl)
	leaf := sign(t, tmpl, tmpl, key.Public(), key)
	return &Issued{Cert: leaf, Key: key, Chain: [][]byte{leaf.Raw}}
}

// CRL signs a revocation list, valid until next, that names the certificates
// in revoked. The result is PEM.
func (ca *CA) CRL(next time.Time, revoked ...*Issued) []byte {
	ca.t.Helper()
	tmpl := &x509.RevocationList{
		Number:     big.NewInt(1),
		ThisUpdate: next.Add(-24 * time.Hour),
		NextUpdate: next,
	}
	for _, r := range revoked {
		tmpl.RevokedCertificateEntries = append(tmpl.RevokedCertificateEntries,
			x509.RevocationListEntry{SerialNumber: r.Cert.SerialNumber, RevocationTime: time.Now()})
	}
	der, err := x509.CreateRevocationList(rand.Reader, tmpl, ca.Cert, ca.key)
	if err != nil {
		ca.t.Fatalf("sign revocation list: %v", err)
	}
	return encode("X509 CRL", der)
}

// Authority gives the certificate of an intermediate authority the shape of
// an issued one, so that it can be revoked.
func (ca *CA) Authority() *Issued { return &Issued{Cert: ca.Cert, Key: ca.key} }

// PEM is the authority's certificate.
func (ca *CA) PEM() []byte { return encode("CERTIFICATE", ca.Cert.Raw) }

// CertPEM is the chain, leaf first.
func (is *Issued) CertPEM() []byte {
	var out []byte
	for _, der := range is.Chain {
		out = append(out, encode("CERTIFICATE", der)...)
	}
	return out
}

// KeyPEM is the private key in PKCS#8.
func (is *Issued) KeyPEM(t testing.TB) []byte {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(is.Key)
	if err != nil {
		t.Fatalf("encode private key: %v", err)
	}
	return encode("PRIVATE KEY", der)
}

// WriteServer puts ca-cert.pem, server-cert.pem and server-key.pem into dir,
// each replaced by rename. A nil ca writes no ca-cert.pem.
func WriteServer(t testing.TB, dir string, ca *CA, is *Issued) {
	t.Helper()
	write(t, dir, "server", ca, is)
}

// WriteClient puts ca-cert.pem, client-cert.pem and client-key.pem into dir,
// each replaced by rename. A nil ca or is writes no files for it.
func WriteClient(t testing.TB, dir string, ca *CA, is *Issued) {
	t.Helper()
	write(t, dir, "client", ca, is)
}

func write(t testing.TB, dir, role string, ca *CA, is *Issued) {
	t.Helper()
	if ca != nil {
		WriteFile(t, filepath.Join(dir, "ca-cert.pem"), ca.PEM(), 0o644)
	}
	if is != nil {
		WriteFile(t, filepath.Join(dir, role+"-key.pem"), is.KeyPEM(t), 0o600)
		WriteFile(t, filepath.Join(dir, role+"-cert.pem"), is.CertPEM(), 0o644)
	}
}

// WriteFile puts data under path by rename, so that a reader sees the old
// file or the new one.
func WriteFile(t testing.TB, path string, data []byte, perm os.FileMode) {
	t.Helper()
	tmp := path + ".tmp"
	if err := os.WriteFile(tmp, data, perm); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(tmp, perm); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(tmp, path); err != nil {
		t.Fatal(err)
	}
}

func template(name string, serial int64) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber: big.NewInt(serial),
		Subject:      pkix.Name{CommonName: name},
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(24 * time.Hour),
		KeyUsage:     x509.KeyUsageDigitalSignature,
	}
}

func sign(t testing.TB, tmpl, parent *x509.Certificate, pub any, key crypto.Signer) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, pub, key)
	if err != nil {
		t.Fatalf("sign certificate %q: %v", tmpl.Subject.CommonName, err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatalf("parse certificate %q: %v", tmpl.Subject.CommonName, err)
	}
	return c
}

func newKey(t testing.TB) crypto.Signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatalf("make key: %v", err)
	}
	return key
}

func encode(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}
