package psk

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"math/big"
	"net"
	"sync"
	"time"
)

// ErrUnsupported is what Supported answers in a build that cannot do it.
var ErrUnsupported = errors.New("TLS with pre-shared keys is not supported by this build: `make build` makes one that does")

// Supported tests once whether crypto/tls does with external keys what this
// package needs of it: it derives binders with their label, takes sessions in
// the encoding that is known here, refuses a wrong key, and gives out no
// tickets.
func Supported() error { return supported() }

var supported = sync.OnceValue(func() error {
	if err := selfTest(externalLabel); err != nil {
		return fmt.Errorf("%w (%w)", ErrUnsupported, err)
	}
	return nil
})

// selfTest shakes hands with itself, with the right and with a wrong key.
func selfTest(label string) error {
	cert, err := decoyCertificate()
	if err != nil {
		return err
	}
	key := bytes.Repeat([]byte{0x5a}, 32)
	id, err := parse(fmt.Appendf(nil, "self:%x\n", key))
	if err != nil {
		return err
	}
	k := &Keys{decoy: []byte("self-test"), list: id}
	hello, name, err := k.rehearse(key, cert)
	if err := checkLabel(hello, key, label); err != nil {
		return err
	}
	if err != nil || name != "self" {
		return fmt.Errorf("the right key is refused: %w", err)
	}
	key[0]++
	if _, name, err := k.rehearse(key, cert); err == nil || name != "" {
		return errors.New("a wrong key is accepted")
	}
	return nil
}

// checkLabel looks whether the binder of the first message of a client was
// made with label.
func checkLabel(hello, key []byte, label string) error {
	hash := newHash(tls.TLS_AES_128_GCM_SHA256)
	sum, binder, err := transcript(hash, messages(hello), nil)
	if err != nil {
		return fmt.Errorf("no key is offered: %w", err)
	}
	want, err := binderOf(hash, key, label, sum)
	if err != nil {
		return err
	}
	if !bytes.Equal(want, binder) {
		return fmt.Errorf("crypto/tls does not use the label %q", label)
	}
	return nil
}

// rehearse is a handshake within the process. hello is what the client sent,
// name whom the server saw.
func (k *Keys) rehearse(key, cert []byte) (hello []byte, name string, err error) {
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	deadline := time.Now().Add(rehearsal)
	_ = a.SetDeadline(deadline)
	_ = b.SetDeadline(deadline)
	record := &tap{Conn: b}
	cfg, err := clientConfig("self", key, cert)
	if err != nil {
		return nil, "", err
	}
	client := tls.Client(record, cfg)
	ended := make(chan error, 1)
	go func() {
		err := client.Handshake()
		if err == nil {
			// A ticket would come before the end of the stream.
			_, err = client.Read(make([]byte, 1))
		}
		ended <- err
	}()
	h := k.Server(a)
	s := tls.Server(h.Conn(), h.Config())
	name, err = h.End(s, s.Handshake())
	a.Close()
	<-ended
	return record.out, name, err
}

// rehearsal bounds a handshake of the self-test, which takes a millisecond.
const rehearsal = 5 * time.Second

// clientConfig offers one key under an identity.
func clientConfig(identity string, key, cert []byte) (*tls.Config, error) {
	now := time.Now().Truncate(time.Second)
	state, err := session(clientSide, tls.TLS_AES_128_GCM_SHA256, key, cert, now)
	if err != nil {
		return nil, err
	}
	offer, err := tls.NewResumptionState([]byte(identity), state)
	if err != nil {
		return nil, err
	}
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		ServerName: "psk",
		// The age of an external key is 0 (RFC 8446, section 4.2.11): GnuTLS
		// takes others for those of sessions.
		Time:               func() time.Time { return now },
		InsecureSkipVerify: true, // the key is what the server proves, see VerifyConnection
		ClientSessionCache: cache{offer},
		VerifyConnection: func(cs tls.ConnectionState) error {
			if !cs.DidResume {
				return errors.New("the server does not know the key")
			}
			return nil
		},
	}, nil
}

// cache has one session and takes no other.
type cache struct{ offer *tls.ClientSessionState }

func (c cache) Get(string) (*tls.ClientSessionState, bool) { return c.offer, true }
func (c cache) Put(string, *tls.ClientSessionState)        {}

// decoyCertificate is one that crypto/tls wants to see in the session of a
// client; nobody looks at it.
func decoyCertificate() ([]byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		NotAfter:     time.Now().Add(24 * time.Hour),
		DNSNames:     []string{"psk"},
	}
	return x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
}
