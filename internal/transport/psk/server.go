package psk

import (
	"crypto/hmac"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"slices"
	"time"
)

// externalLabel is the label of external keys (RFC 8446, section 7.1).
const externalLabel = "ext binder"

// Offered tells whether a client offers a pre-shared key.
func Offered(hello *tls.ClientHelloInfo) bool {
	return slices.Contains(hello.Extensions, extensionPSK)
}

// Handshake is one handshake as the server. It is used for one connection.
type Handshake struct {
	keys *Keys
	tap  *tap
	cfg  *tls.Config
	name string // of the identity whose key was proved, or ""
	key  []byte // that was proved
	hint error  // why not, for the log
}

// Server prepares a handshake over c, which is Conn's from now on.
func (k *Keys) Server(c net.Conn) *Handshake {
	h := &Handshake{keys: k, tap: &tap{Conn: c}}
	h.cfg = &tls.Config{
		MinVersion:    tls.VersionTLS13,
		UnwrapSession: h.unwrap,
		WrapSession: func(tls.ConnectionState, *tls.SessionState) ([]byte, error) {
			return nil, errors.New("no tickets are given out")
		},
	}
	return h
}

// Config accepts a client that proves one of the keys, and nobody else.
func (h *Handshake) Config() *tls.Config { return h.cfg }

// Conn is what crypto/tls shall speak over.
func (h *Handshake) Conn() net.Conn { return h.tap }

// End is called when crypto/tls has ended its handshake over Conn, with err.
// It returns the identity whose key the client has proved, "" if the
// handshake was one without pre-shared keys. An unknown identity and a wrong
// key differ in the text of the error alone, which is for the log.
func (h *Handshake) End(t *tls.Conn, err error) (string, error) {
	h.tap.end()
	switch {
	case err != nil && h.hint != nil:
		return "", fmt.Errorf("%w: %w", err, h.hint)
	case err != nil:
		return "", err
	case t.ConnectionState().DidResume && h.name == "":
		return "", errors.New("a key was accepted that nobody has")
	case !t.ConnectionState().DidResume:
		return "", nil
	}
	return h.name, nil
}

// Stands tells whether the key that the client has proved is still one of its
// identity.
func (h *Handshake) Stands() bool {
	name, keys := h.keys.find([]byte(h.name))
	return name != "" && slices.ContainsFunc(keys[:], func(key []byte) bool { return hmac.Equal(key, h.key) })
}

// unwrap is called with the first identity that the client offers; the others
// are not looked at. crypto/tls then checks the binder for the key that unwrap
// chooses, which for an unknown identity or a wrong key is one that nobody
// has.
func (h *Handshake) unwrap(label []byte, cs tls.ConnectionState) (*tls.SessionState, error) {
	// The configuration is this connection's alone. From here on no ticket is
	// given out: a resumed session would outlive its key.
	h.cfg.SessionTicketsDisabled = true
	hash := newHash(cs.CipherSuite)
	sum, binder, err := transcript(hash, messages(h.tap.in), messages(h.tap.out))
	if err != nil {
		return nil, err
	}
	name, keys := h.keys.find(label)
	chosen := h.keys.madeUp([32]byte{}, 0)
	proved := false
	for _, key := range keys {
		want, err := binderOf(hash, key, externalLabel, sum)
		if err != nil {
			return nil, err
		}
		if hmac.Equal(want, binder) {
			chosen, proved = key, true
		}
	}
	switch {
	case proved && name != "":
		h.name, h.key = name, chosen
	case name != "":
		h.hint = fmt.Errorf("wrong key for psk identity %q", name)
	default:
		h.hint = fmt.Errorf("unknown psk identity %q", label[:min(len(label), maxLogged)])
	}
	return session(serverSide, cs.CipherSuite, chosen, nil, time.Now())
}

// maxLogged is how much of an unknown identity is for the log.
const maxLogged = 64

// The two sides of a session.
const (
	serverSide = 1
	clientSide = 2
)

// session is the session that crypto/tls "resumes" with key, in its own
// encoding. A client's has to have a certificate.
func session(side byte, suite uint16, key, cert []byte, now time.Time) (*tls.SessionState, error) {
	b := binary.BigEndian.AppendUint16(nil, tls.VersionTLS13)
	b = append(b, side)
	b = binary.BigEndian.AppendUint16(b, suite)
	b = binary.BigEndian.AppendUint64(b, uint64(now.Unix()))
	b = append(b, byte(len(key)))
	b = append(b, key...)
	b = append(b, 0, 0, 0) // nothing extra
	b = append(b, 0, 0)    // no extended master secret, no early data
	if cert == nil {
		b = append24(b, 0) // certificates
		b = append24(b, 0) // verified chains
	} else {
		b = append24(b, 3+len(cert)+2)
		b = append24(b, len(cert))
		b = append(b, cert...)
		b = append(b, 0, 0) // extensions
		b = append24(b, 3)  // one chain, without its leaf
		b = append24(b, 0)
	}
	if side == clientSide {
		b = binary.BigEndian.AppendUint64(b, uint64(now.Add(time.Hour).Unix()))
		b = binary.BigEndian.AppendUint32(b, 0) // added to the age
	}
	return tls.ParseSessionState(b)
}

func append24(b []byte, n int) []byte { return append(b, byte(n>>16), byte(n>>8), byte(n)) }
