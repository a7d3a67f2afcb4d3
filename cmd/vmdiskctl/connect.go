package main

import (
	"context"
	"crypto/tls"
	"strings"

	"github.com/spf13/cobra"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd/client"
	"github.com/vmdiskd/vmdiskd/internal/transport"
	"github.com/vmdiskd/vmdiskd/internal/transport/psk"
)

// server is where a URI leads and how it is secured.
type server struct {
	transport.URI
	tls *tls.Config // nil unless the URI asks for TLS
	// renew reads the files of tls again; nil without TLS.
	renew func() (*tls.Config, error)
}

// connectFlags are those of every command that talks to a server.
type connectFlags struct{ certificates string }

func (f *connectFlags) add(c *cobra.Command) {
	c.Flags().StringVar(&f.certificates, "tls-certificates", "",
		"directory with ca-cert.pem, client-cert.pem and client-key.pem")
}

// isURI tells an NBD URI from a path.
func isURI(s string) bool {
	scheme, _, ok := strings.Cut(s, "://")
	return ok && strings.HasPrefix(scheme, "nbd")
}

// server reads a URI and the certificates that it needs.
func (f *connectFlags) server(uri string) (*server, error) {
	u, err := transport.ParseURI(uri)
	switch {
	case err != nil && !isURI(uri):
		return nil, usage("%q: an NBD URI is nbd://host[:port]/export or nbd+unix:///export?socket=PATH", uri)
	case err != nil:
		return nil, usageError{err}
	}
	dir, host, keys := f.certificates, u.Address, ""
	for k, v := range u.Params {
		switch {
		case k == "tls-certificates" && dir == "":
			dir = v
		case k == "tls-certificates":
		case k == "tls-hostname":
			host = v
		case k == "tls-psk-file":
			keys = v
		default:
			return nil, usage("nbd uri %q: parameter %q is not known", uri, k)
		}
	}
	s := &server{URI: u}
	if !u.TLS {
		return s, nil
	}
	if keys != "" && u.User == "" {
		return nil, usage("nbd uri %q: tls-psk-file needs an identity, as in nbds://IDENTITY@host", uri)
	}
	s.renew = func() (*tls.Config, error) { return clientTLS(dir, host, keys, u.User) }
	s.tls, err = s.renew()
	return s, err
}

// clientTLS is with the key that keys has for an identity, if it names a file,
// and else with the certificates in dir, if it names one, for a server called host.
func clientTLS(dir, host, keys, identity string) (*tls.Config, error) {
	if keys != "" {
		return psk.ClientConfig(keys, identity)
	}
	if host == "" {
		host = "localhost"
	}
	if dir == "" {
		return &tls.Config{ServerName: host}, nil
	}
	return transport.ClientConfig(dir, host)
}

// open connects and opens the export of the URI.
func (s *server) open(ctx context.Context, contexts ...string) (*client.Client, error) {
	return s.openExport(ctx, s.Export, contexts...)
}

func (s *server) openExport(ctx context.Context, export string, contexts ...string) (*client.Client, error) {
	conn, err := s.dial(ctx)
	if err != nil {
		return nil, err
	}
	return client.New(ctx, conn, client.Options{Export: export, TLS: s.tls, Contexts: contexts})
}

// negotiate connects and leaves the choice of the export to the caller.
func (s *server) negotiate(ctx context.Context) (*client.Session, error) {
	conn, err := s.dial(ctx)
	if err != nil {
		return nil, err
	}
	return client.Negotiate(ctx, conn, client.Options{TLS: s.tls})
}

func (s *server) dial(ctx context.Context) (transport.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, limits.Handshake)
	defer cancel()
	return transport.Dial(ctx, s.Target)
}
