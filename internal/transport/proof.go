package transport

import (
	"crypto/tls"
	"crypto/x509"
	"sync/atomic"
)

// proofOf is the Proof of a client whose handshake with c has ended as cs says.
func (c *Credentials) proofOf(cs tls.ConnectionState) func() bool {
	var last atomic.Pointer[credentialSet] // that admits it
	return func() bool {
		s := c.current()
		if last.Load() == s {
			return true
		}
		if !s.admits(cs) {
			return false
		}
		last.Store(s)
		return true
	}
}

// admits tells whether s lets in a client that shows what it has shown before.
func (s *credentialSet) admits(cs tls.ConnectionState) bool {
	switch {
	case s.server.ClientAuth == tls.NoClientCert:
		return true
	case len(cs.PeerCertificates) == 0:
		return false
	}
	o := x509.VerifyOptions{Roots: s.roots, Intermediates: x509.NewCertPool(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	for _, c := range cs.PeerCertificates[1:] {
		o.Intermediates.AddCert(c)
	}
	var err error
	cs.VerifiedChains, err = cs.PeerCertificates[0].Verify(o)
	return err == nil && s.verify(cs) == nil
}
