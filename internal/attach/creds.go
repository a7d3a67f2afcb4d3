package attach

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/qmp"
	"github.com/vmdiskd/vmdiskd/internal/transport"
)

// remote reads the URI of a server, with what it says of TLS apart: the folder
// of certificates, as QEMU sees it, and the name in the server's certificate.
func remote(text, certificates string) (uri transport.URI, dir, hostname string, err error) {
	uri, err = transport.ParseURI(text)
	if err != nil {
		return uri, "", "", fmt.Errorf("%w: %w", qmp.ErrInvalid, err)
	}
	dir = certificates
	for name, value := range uri.Params {
		switch {
		case uri.TLS && name == "tls-certificates" && dir == "":
			dir = value
		case uri.TLS && name == "tls-certificates":
		case uri.TLS && name == "tls-hostname":
			hostname = value
		default:
			return uri, "", "", fmt.Errorf("%w URI %q: parameter %q has no meaning here", qmp.ErrInvalid, text, name)
		}
	}
	uri.Params = nil
	if uri.TLS && hostname == "" && uri.Kind != transport.TCP {
		hostname = "localhost"
	}
	switch {
	case !uri.TLS && certificates != "":
		err = fmt.Errorf("%w URI %q: certificates are for TLS", qmp.ErrInvalid, text)
	case dir != "" && !filepath.IsAbs(dir):
		err = fmt.Errorf("%w folder of certificates %q: not an absolute path", qmp.ErrInvalid, dir)
	case uri.User != "":
		err = fmt.Errorf("%w URI %q: a machine is not given pre-shared keys", qmp.ErrInvalid, text)
	case len(dir) > limits.MaxString || len(hostname) > limits.QMPName:
		err = fmt.Errorf("%w URI: a folder of %d bytes, a name of %d", qmp.ErrInvalid, len(dir), len(hostname))
	}
	return uri, dir, hostname, err
}

// credsID is the object of a machine that holds the certificates of a disk.
func credsID(id string) string { return "vmt" + nodesOf(id) + "tls" }

// credsStep gives the machine certificates for its client.
func (p *plug) credsStep() Step {
	id := credsID(p.id)
	return Step{
		Name: fmt.Sprintf("give the machine the certificates in %q, as object %s", p.creds, id),
		Do: func(ctx context.Context) (bool, error) {
			ctx, cancel := steady(ctx)
			defer cancel()
			there, err := p.hasCreds(ctx, p.id)
			if err != nil || there {
				return false, err
			}
			_, err = p.Monitor.Execute(ctx, "object-add", map[string]any{
				"qom-type": "tls-creds-x509", "id": id, "endpoint": "client", "dir": p.creds, "verify-peer": true,
			})
			return maybe(err), err
		},
		Undo: func(ctx context.Context) error { return p.deleteCreds(ctx, p.id) },
	}
}

// hasCreds tells whether the machine has certificates for the disk. One that
// does not say which objects it has was given none.
func (m *Machine) hasCreds(ctx context.Context, id string) (bool, error) {
	names, err := qmp.Objects(ctx, m.Monitor)
	if errors.As(err, new(*qmp.Error)) {
		return false, nil
	}
	return slices.Contains(names, credsID(id)), err
}

// deleteCreds deletes certificates that may be gone already. An attempt to
// connect that QEMU has given up may use them for a moment more.
func (m *Machine) deleteCreds(ctx context.Context, id string) error {
	wait, cancel := context.WithTimeout(ctx, limits.AttachInUse)
	defer cancel()
	for {
		there, err := m.hasCreds(ctx, id)
		if err != nil || !there {
			return err
		}
		_, err = m.Monitor.Execute(ctx, "object-del", map[string]any{"id": credsID(id)})
		if !qmp.HasClass(err, qmp.ClassGeneric) || wait.Err() != nil {
			return err
		}
		pause(wait, limits.AttachPoll)
	}
}

// forgetStep deletes the certificates of a disk that is gone.
func (m *Machine) forgetStep(id string) Step {
	return Step{
		Name:  fmt.Sprintf("delete the certificates of %s", id),
		Final: true,
		Do: func(ctx context.Context) (bool, error) {
			ctx, cancel := steady(ctx)
			defer cancel()
			there, err := m.hasCreds(ctx, id)
			if err == nil && there {
				err = m.deleteCreds(ctx, id)
			}
			return there && err == nil, err
		},
	}
}
