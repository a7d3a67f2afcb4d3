package transport

import (
	"crypto/tls"
	"errors"

	"github.com/vmdiskd/vmdiskd/internal/transport/psk"
)

// ServerSecurity is what a server encrypts with: certificates, pre-shared
// keys, or both. Which of them is used is the client's choice: one that
// offers a key has to prove it, and needs no certificate.
type ServerSecurity struct {
	Certificates *Credentials // nil for none
	Keys         *psk.Keys    // nil for none
}

// Encrypt shakes hands as ServerTLS does. The Peer of the Conn has the
// identity of the key that the client has proved, and the Proof of what it has.
func (s *ServerSecurity) Encrypt(c Conn) (Conn, error) {
	switch {
	case s.Keys != nil:
		return s.withKeys(c)
	case s.Certificates == nil:
		return nil, errors.New("there is nothing to encrypt with")
	}
	in, err := ServerTLS(c, s.Certificates.ServerConfig())
	if t, ok := in.(*tlsConn); ok {
		t.peer.Proof = s.Certificates.proofOf(t.ConnectionState())
	}
	return in, err
}

func (s *ServerSecurity) withKeys(c Conn) (Conn, error) {
	under := &bounded{Conn: c}
	h := s.Keys.Server(under)
	cfg := h.Config()
	if s.Certificates != nil {
		cfg = s.Certificates.ServerConfig()
		certified := cfg.GetConfigForClient
		cfg.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
			if psk.Offered(hello) {
				return h.Config(), nil
			}
			return certified(hello)
		}
	}
	t := &tlsConn{Conn: tls.Server(h.Conn(), cfg), under: under, peer: *c.Peer()}
	name, err := h.End(t.Conn, t.Handshake())
	if err != nil {
		return nil, handshakeError(c, err)
	}
	if name != "" {
		t.peer.PSK, t.peer.Proof = name, h.Stands
	} else {
		t.peer.Proof = s.Certificates.proofOf(t.ConnectionState())
	}
	t.learn()
	return t, nil
}
