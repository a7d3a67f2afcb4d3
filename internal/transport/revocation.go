package transport

import (
	"bytes"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// verify runs after crypto/tls has verified the peer's chain, in every
// handshake. It is the VerifyConnection of both sides.
func (s *credentialSet) verify(cs tls.ConnectionState) error {
	if n := len(cs.PeerCertificates); n > limits.CertificateChain {
		return fmt.Errorf("peer sent %d certificates, which is more than %d", n, limits.CertificateChain)
	}
	for _, c := range cs.PeerCertificates {
		if key, ok := c.PublicKey.(*rsa.PublicKey); ok && key.N.BitLen() > limits.RSABits {
			return fmt.Errorf("peer has an RSA key of %d bits, which is more than %d", key.N.BitLen(), limits.RSABits)
		}
	}
	if s.crls == nil {
		return nil
	}
	err := errors.New("peer has no verified certificate")
	for _, chain := range cs.VerifiedChains {
		if err = s.crls.check(chain, time.Now()); err == nil {
			return nil
		}
	}
	return err
}

// revocations are the lists of one ca-crl.pem.
type revocations []*revocationList

type revocationList struct {
	*x509.RevocationList
	serials map[string]bool
}

// parseRevocations parses the lists, of which none is verified yet.
func parseRevocations(data []byte) (revocations, error) {
	var all revocations
	err := eachPEM(data, "X509 CRL", func(der []byte) error {
		list, err := x509.ParseRevocationList(der)
		if err != nil {
			return err
		}
		r := &revocationList{RevocationList: list, serials: map[string]bool{}}
		if err := r.accept(); err != nil {
			return fmt.Errorf("list of %q: %w", list.Issuer, err)
		}
		all = append(all, r)
		return nil
	})
	return all, err
}

// accept refuses lists that say less, or more, than which certificates of
// their issuer are revoked: a critical extension changes the meaning of a
// list (RFC 5280, section 5.2), such as delta and indirect lists.
func (r *revocationList) accept() error {
	if r.NextUpdate.IsZero() {
		return errors.New("has no time of the next update")
	}
	for _, e := range r.Extensions {
		if e.Critical {
			return fmt.Errorf("critical extension %v is not known", e.Id)
		}
	}
	for _, c := range r.RevokedCertificateEntries {
		for _, e := range c.Extensions {
			if e.Critical {
				return fmt.Errorf("critical extension %v is not known", e.Id)
			}
		}
		r.serials[c.SerialNumber.String()] = true
	}
	return nil
}

// signedBy verifies the lists whose issuer is among authorities; those of
// intermediate authorities are verified with the chain in which they appear.
func (rs revocations) signedBy(authorities []*x509.Certificate) error {
	for _, r := range rs {
		if err := r.signedByOneOf(authorities); err != nil {
			return fmt.Errorf("list of %q: %w", r.Issuer, err)
		}
	}
	return nil
}

// signedByOneOf is nil as well if none of the authorities has the issuer's
// name.
func (r *revocationList) signedByOneOf(authorities []*x509.Certificate) error {
	var err error
	for _, a := range authorities {
		if !r.from(a) {
			continue
		}
		if err = r.CheckSignatureFrom(a); err == nil {
			return nil
		}
	}
	return err
}

func (r *revocationList) from(issuer *x509.Certificate) bool {
	return bytes.Equal(r.RawIssuer, issuer.RawSubject)
}

// current says why the list cannot clear a certificate, if so.
func (r *revocationList) current(now time.Time) error {
	switch {
	case now.Before(r.ThisUpdate):
		return fmt.Errorf("revocation list of %q is valid from %s on", r.Issuer, r.ThisUpdate.Format(time.RFC3339))
	case now.After(r.NextUpdate):
		return fmt.Errorf("revocation list of %q expired at %s", r.Issuer, r.NextUpdate.Format(time.RFC3339))
	}
	return nil
}

// check fails unless each certificate of the verified chain but the root is
// cleared by a current list of its issuer.
func (rs revocations) check(chain []*x509.Certificate, now time.Time) error {
	for i := range len(chain) - 1 {
		if err := rs.checkOne(chain[i], chain[i+1], now); err != nil {
			return err
		}
	}
	return nil
}

// checkOne lets any list of the issuer revoke, even one that has expired.
func (rs revocations) checkOne(cert, issuer *x509.Certificate, now time.Time) error {
	cleared := false
	err := fmt.Errorf("there is no revocation list of %q", issuer.Subject)
	for _, r := range rs {
		if !r.from(issuer) {
			continue
		}
		if bad := r.CheckSignatureFrom(issuer); bad != nil {
			err = fmt.Errorf("revocation list of %q: %w", issuer.Subject, bad)
			continue
		}
		if r.serials[cert.SerialNumber.String()] {
			return fmt.Errorf("certificate of %q is revoked", cert.Subject)
		}
		if old := r.current(now); old != nil {
			err = old
			continue
		}
		cleared = true
	}
	if cleared {
		return nil
	}
	return err
}

// warn tells the operator of lists that make every handshake fail.
func (rs revocations) warn(log *slog.Logger, dir string) {
	now := time.Now()
	for _, r := range rs {
		if err := r.current(now); err != nil {
			log.Warn("tls peers are refused", "dir", dir, "error", err)
		}
	}
}
