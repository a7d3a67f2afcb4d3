package attach

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	nbdclient "github.com/vmdiskd/vmdiskd/internal/nbd/client"
	"github.com/vmdiskd/vmdiskd/internal/qmp"
	"github.com/vmdiskd/vmdiskd/internal/transport"
	"github.com/vmdiskd/vmdiskd/internal/transport/psk"
)

// keysFile is the file of pre-shared keys that QEMU reads in a folder.
const keysFile = "keys.psk"

// credentials are what a machine shows a server with TLS. The zero value is for
// none.
type credentials struct {
	dir      string // absolute, as QEMU sees it
	keys     bool   // dir has pre-shared keys, no certificates
	identity string // whose key it is
	hostname string // in the server's certificate; "": that of the URI
}

// given are what the caller has said, to be completed by a URI.
func (s *Source) given() (c credentials, err error) {
	c = credentials{dir: s.Certificates, identity: s.Identity}
	switch {
	case s.Keys == "" && s.Identity != "":
		err = fmt.Errorf("%w: identity %q without a file of pre-shared keys", qmp.ErrInvalid, s.Identity)
	case s.Keys != "" && s.Certificates != "":
		err = fmt.Errorf("%w: certificates and pre-shared keys", qmp.ErrInvalid)
	case s.Keys != "":
		err = c.setKeys(s.Keys)
	}
	return c, err
}

// setKeys takes the folder of a file of pre-shared keys.
func (c *credentials) setKeys(file string) error {
	if filepath.Base(file) != keysFile {
		return fmt.Errorf("%w file of pre-shared keys %q: QEMU takes them from a file with the name %s", qmp.ErrInvalid, file, keysFile)
	}
	c.dir, c.keys = filepath.Dir(file), true
	return nil
}

// read takes what a URI says of TLS. What the caller has said goes first.
func (c *credentials) read(uri *transport.URI) error {
	given := *c
	for name, value := range uri.Params {
		switch {
		case uri.TLS && name == "tls-hostname":
			c.hostname = value
		case uri.TLS && name == "tls-certificates" && !c.keys:
			c.dir = cmp.Or(given.dir, value)
		case uri.TLS && name == "tls-psk-file" && (c.dir == "" || given.keys):
			if err := c.setKeys(value); err != nil {
				return err
			}
			c.dir = cmp.Or(given.dir, c.dir)
		default:
			return fmt.Errorf("%w URI: parameter %q has no meaning here", qmp.ErrInvalid, name)
		}
	}
	c.identity = cmp.Or(given.identity, uri.User)
	c.setHostname(uri)
	return nil
}

// setHostname has a certificate from an address that names no host be for this
// one, unless another is known.
func (c *credentials) setHostname(uri *transport.URI) {
	if uri.TLS && c.hostname == "" && !c.keys && uri.Kind != transport.TCP {
		c.hostname = "localhost"
	}
}

// check holds what is known by now against the URI.
func (c *credentials) check(uri *transport.URI) error {
	switch {
	case !uri.TLS && *c != credentials{}:
		return fmt.Errorf("%w: certificates and keys are for TLS", qmp.ErrInvalid)
	case c.keys != (c.identity != ""):
		return fmt.Errorf("%w: pre-shared keys take an identity and their file, as nbds://IDENTITY@HOST/?tls-psk-file=FILE", qmp.ErrInvalid)
	case c.dir != "" && !filepath.IsAbs(c.dir):
		return fmt.Errorf("%w folder %q for TLS: not an absolute path", qmp.ErrInvalid, c.dir)
	case len(c.dir) > limits.MaxString || len(c.hostname) > limits.QMPName:
		return fmt.Errorf("%w for TLS: a folder of %d bytes, a name of %d", qmp.ErrInvalid, len(c.dir), len(c.hostname))
	case c.keys:
		if err := psk.CheckIdentity(c.identity); err != nil {
			return fmt.Errorf("%w: %w", qmp.ErrInvalid, err)
		}
	}
	return nil
}

// remote reads the URI of a server, with what it and the caller say of TLS
// apart. The identity stays in the URI: another one sees another disk.
func (s *Source) remote(text string) (uri transport.URI, c credentials, err error) {
	if uri, err = transport.ParseURI(text); err != nil {
		return uri, c, fmt.Errorf("%w: %w", qmp.ErrInvalid, err)
	}
	if c, err = s.given(); err != nil {
		return uri, c, err
	}
	if err = c.read(&uri); err == nil {
		err = c.check(&uri)
	}
	uri.User, uri.Params = c.identity, nil
	return uri, c, err
}

// credsID begins the name of the object of a machine that holds the credentials
// of a disk.
func credsID(id string) string { return "vmt" + nodesOf(id) + "tls" }

// objectID is that object. QEMU does not tell which host a client wants a
// certificate for: the name of the object does, unless QEMU does not take it.
func (c *credentials) objectID(id string) string {
	if c.hostname == "" || strings.ContainsFunc(c.hostname, odd) {
		return credsID(id)
	}
	return credsID(id) + "." + c.hostname
}

// Types of that object.
const (
	certificates = "tls-creds-x509"
	sharedKey    = "tls-creds-psk"
)

// object describes it for object-add.
func (c *credentials) object(id string) map[string]any {
	o := map[string]any{"qom-type": certificates, "id": c.objectID(id), "endpoint": "client", "dir": c.dir, "verify-peer": true}
	if c.keys {
		o["qom-type"], o["username"] = sharedKey, c.identity
	}
	return o
}

// String says what they are.
func (c *credentials) String() string {
	if c.keys {
		return fmt.Sprintf("the pre-shared key of %q in %q", c.identity, filepath.Join(c.dir, keysFile))
	}
	return fmt.Sprintf("the certificates in %q", c.dir)
}

// config is what a client of Go's makes of them.
func (c *credentials) config(uri *transport.URI) (*tls.Config, error) {
	if !filepath.IsAbs(c.dir) {
		return nil, fmt.Errorf("folder %q: not an absolute path", c.dir)
	}
	if c.keys {
		return psk.ClientConfig(filepath.Join(c.dir, keysFile), c.identity)
	}
	return transport.ClientConfig(c.dir, cmp.Or(c.hostname, uri.Address))
}

// try shakes hands with a server as the machine will, and fails if that does:
// QEMU 7.2 was seen to abort, with its guest, of a handshake that failed. What
// only the machine can read or reach nobody tries.
func (m *Machine) try(ctx context.Context, c *credentials, uri *transport.URI) error {
	ctx, cancel := context.WithTimeout(ctx, limits.Handshake)
	defer cancel()
	config, err := c.config(uri)
	var conn transport.Conn
	if err == nil {
		conn, err = transport.Dial(ctx, uri.Target)
	}
	if err != nil {
		m.note("nobody tried %s before the machine does: %v", c, err)
		return nil
	}
	s, err := nbdclient.Negotiate(ctx, conn, nbdclient.Options{TLS: config})
	if err == nil {
		_ = s.Abort(ctx) // what it says to that is for the machine to hear
	}
	if errors.Is(err, nbdclient.ErrTLS) {
		return err
	}
	return nil
}

// credsStep gives the machine credentials for its client. Others, which an
// attempt that was killed has left, are replaced; those of a disk that it has
// are not.
func (p *plug) credsStep() Step {
	return Step{
		Name: fmt.Sprintf("give the machine %s after a trial, as object %s", &p.creds, p.client.TLSCreds),
		Do: func(ctx context.Context) (bool, error) {
			object, held, err := p.leftCreds(ctx)
			if err != nil {
				return false, err
			}
			list, err := nodes(ctx, p.Monitor, p.id)
			same := held == p.creds && (object == p.client.TLSCreds || len(list) > 0 && object == credsID(p.id))
			switch {
			case err != nil || len(list) > 0 && same:
				return false, err
			case len(list) > 0 && object != "":
				return false, fmt.Errorf("%w: the machine has disk %s with %s as object %s: detach it first", ErrDiffers, p.id, &held, object)
			}
			if err := p.try(ctx, &p.creds, &p.uri); err != nil || same {
				return false, err
			}
			ctx, cancel := steady(ctx)
			defer cancel()
			if err := p.deleteCreds(ctx, p.id); err != nil {
				return false, err
			}
			_, err = p.Monitor.Execute(ctx, "object-add", p.creds.object(p.id))
			return object != "" || maybe(err), err
		},
		Undo: func(ctx context.Context) error { return p.deleteCreds(ctx, p.id) },
	}
}

// leftCreds are those that the machine has for the disk, for the host that is
// wanted: the name of their object tells it, if anything does.
func (p *plug) leftCreds(ctx context.Context) (object string, held credentials, err error) {
	object, kind, err := p.heldCreds(ctx, p.id)
	if err == nil {
		held, err = p.readCreds(ctx, object, kind)
	}
	held.hostname = p.creds.hostname
	return object, held, err
}

// heldCreds is the object with the credentials that the machine has for the
// disk, and its type, "" without any. One that does not say which objects it has
// was given none.
func (m *Machine) heldCreds(ctx context.Context, id string) (object, kind string, err error) {
	objects, err := qmp.Objects(ctx, m.Monitor)
	if errors.As(err, new(*qmp.Error)) {
		return "", "", nil
	}
	for name, kind := range objects {
		if name == credsID(id) || strings.HasPrefix(name, credsID(id)+".") {
			return name, kind, err
		}
	}
	return "", "", err
}

// readCreds is what the machine was given as an object, nothing without any.
func (m *Machine) readCreds(ctx context.Context, object, kind string) (c credentials, err error) {
	if object == "" {
		return c, nil
	}
	c.keys = kind == sharedKey
	_, c.hostname, _ = strings.Cut(object, ".")
	path := "/objects/" + object
	if c.dir, err = m.property(ctx, path, "dir"); err == nil && c.keys {
		c.identity, err = m.property(ctx, path, "username")
	}
	return c, err
}

// deleteCreds deletes credentials that may be gone already. An attempt to
// connect that QEMU has given up may use them for a moment more.
func (m *Machine) deleteCreds(ctx context.Context, id string) error {
	wait, cancel := context.WithTimeout(ctx, limits.AttachInUse)
	defer cancel()
	for {
		object, _, err := m.heldCreds(ctx, id)
		if err != nil || object == "" {
			return err
		}
		_, err = m.Monitor.Execute(ctx, "object-del", map[string]any{"id": object})
		if err != nil && !qmp.HasClass(err, qmp.ClassGeneric) || wait.Err() != nil {
			return err
		}
		if err != nil {
			pause(wait, limits.AttachPoll)
		}
	}
}

// forgetStep deletes the credentials of a disk that is gone.
func (m *Machine) forgetStep(id string) Step {
	return Step{
		Name:  fmt.Sprintf("delete the credentials of %s", id),
		Final: true,
		Do: func(ctx context.Context) (bool, error) {
			ctx, cancel := steady(ctx)
			defer cancel()
			object, _, err := m.heldCreds(ctx, id)
			if err != nil || object == "" {
				return false, err
			}
			err = m.deleteCreds(ctx, id)
			return err == nil, err
		},
	}
}
