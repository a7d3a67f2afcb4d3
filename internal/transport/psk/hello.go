package psk

import (
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"hash"
	"net"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// tap remembers what goes over a connection until it is done.
type tap struct {
	net.Conn
	in, out []byte
	done    bool // set once, between the handshake and everything else
}

func (t *tap) Read(p []byte) (int, error) {
	n, err := t.Conn.Read(p)
	if !t.done && n > 0 && len(t.in)+n <= limits.PSKHello {
		t.in = append(t.in, p[:n]...)
	}
	return n, err
}

func (t *tap) Write(p []byte) (int, error) {
	n, err := t.Conn.Write(p)
	if !t.done && n > 0 && len(t.out)+n <= limits.PSKHello {
		t.out = append(t.out, p[:n]...)
	}
	return n, err
}

// end forgets everything.
func (t *tap) end() { t.done, t.in, t.out = true, nil, nil }

// Constants of RFC 8446, sections 4, 4.2 and 5.1.
const (
	recordHandshake  = 22
	recordHeader     = 5
	messageHeader    = 4
	clientHello      = 1
	serverHello      = 2
	messageHash      = 254
	extensionPSK     = 41
	helloRandomBytes = 32
)

var errHello = errors.New("malformed client hello")

// messages are the handshake messages of records in plaintext, each with its
// header. An incomplete end is left out.
func messages(records []byte) (list [][]byte) {
	var stream []byte
	for len(records) >= recordHeader {
		n := recordHeader + int(binary.BigEndian.Uint16(records[3:]))
		if n > len(records) {
			break
		}
		if records[0] == recordHandshake {
			stream = append(stream, records[recordHeader:n]...)
		}
		records = records[n:]
	}
	for len(stream) >= messageHeader {
		n := messageHeader + int(binary.BigEndian.Uint32(stream)&0xffffff)
		if n > len(stream) {
			break
		}
		list = append(list, stream[:n])
		stream = stream[n:]
	}
	return list
}

// cursor reads fields; ok turns false for good at the first one that is not
// whole.
type cursor struct {
	rest []byte
	ok   bool
}

func (c *cursor) take(n int) []byte {
	if !c.ok || n > len(c.rest) {
		c.ok = false
		return nil
	}
	p := c.rest[:n]
	c.rest = c.rest[n:]
	return p
}

// vector is a field with its length in front, of width bytes.
func (c *cursor) vector(width int) []byte {
	n := 0
	for _, b := range c.take(width) {
		n = n<<8 | int(b)
	}
	return c.take(n)
}

// offered splits a ClientHello where its list of binders begins, and returns
// the first binder (RFC 8446, section 4.2.11): the list is the last thing in
// it.
func offered(hello []byte) (truncated, binder []byte, err error) {
	c := cursor{rest: hello, ok: true}
	head := c.take(messageHeader)
	if !c.ok || head[0] != clientHello {
		return nil, nil, errHello
	}
	c.take(2 + helloRandomBytes)
	c.vector(1) // session ID
	c.vector(2) // cipher suites
	c.vector(1) // compression methods
	x := cursor{rest: c.vector(2), ok: c.ok}
	var body []byte
	kind := 0
	for x.ok && len(x.rest) > 0 {
		if t := x.take(2); x.ok {
			kind = int(binary.BigEndian.Uint16(t))
		}
		body = x.vector(2)
	}
	if !x.ok || kind != extensionPSK || len(c.rest) > 0 {
		return nil, nil, errHello
	}
	b := cursor{rest: body, ok: true}
	b.vector(2) // identities
	truncated = hello[:len(hello)-len(b.rest)]
	list := cursor{rest: b.vector(2), ok: b.ok}
	binder = list.vector(1)
	if !list.ok {
		return nil, nil, errHello
	}
	return truncated, binder, nil
}

// newHash is the hash of a cipher suite of TLS 1.3.
func newHash(suite uint16) func() hash.Hash {
	if suite == tls.TLS_AES_256_GCM_SHA384 {
		return sha512.New384
	}
	return sha256.New
}

// transcript hashes the handshake up to the binders of the newest ClientHello.
// in and out are the messages of the client and of the server: in a handshake
// that was begun anew the first ClientHello stands there as its hash (RFC
// 8446, section 4.4.1).
func transcript(h func() hash.Hash, in, out [][]byte) (sum, binder []byte, err error) {
	if len(in) == 0 {
		return nil, nil, errHello
	}
	truncated, binder, err := offered(in[len(in)-1])
	if err != nil {
		return nil, nil, err
	}
	all := h()
	if len(in) > 1 {
		if len(in) != 2 || len(out) == 0 || out[0][0] != serverHello {
			return nil, nil, errHello
		}
		first := h()
		first.Write(in[0])
		all.Write([]byte{messageHash, 0, 0, byte(first.Size())})
		all.Write(first.Sum(nil))
		all.Write(out[0])
	}
	all.Write(truncated)
	return all.Sum(nil), binder, nil
}

// binderOf proves the knowledge of key (RFC 8446, sections 4.2.11.2 and 7.1).
func binderOf(h func() hash.Hash, key []byte, label string, sum []byte) ([]byte, error) {
	early, err := hkdf.Extract(h, key, nil)
	if err != nil {
		return nil, err
	}
	secret, err := expand(h, early, label, h().Sum(nil))
	if err != nil {
		return nil, err
	}
	finished, err := expand(h, secret, "finished", nil)
	if err != nil {
		return nil, err
	}
	mac := hmac.New(h, finished)
	mac.Write(sum)
	return mac.Sum(nil), nil
}

// expand is HKDF-Expand-Label to the length of the hash.
func expand(h func() hash.Hash, secret []byte, label string, context []byte) ([]byte, error) {
	size := h().Size()
	info := binary.BigEndian.AppendUint16(nil, uint16(size))
	info = append(info, byte(len("tls13 ")+len(label)))
	info = append(info, "tls13 "+label...)
	info = append(info, byte(len(context)))
	info = append(info, context...)
	return hkdf.Expand(h, secret, string(info), size)
}
