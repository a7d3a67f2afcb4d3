package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/vmdiskd/vmdiskd/internal/attach"
	"github.com/vmdiskd/vmdiskd/internal/qmp/libvirtd"
)

// libvirtFlags say which libvirt; what is empty nobody has said.
type libvirtFlags struct{ socket, uri string }

func (f *libvirtFlags) add(c *cobra.Command) {
	c.Flags().StringVar(&f.socket, "libvirt-socket", "", "`SOCKET` of libvirt (default the first of those that are usual)")
	c.Flags().StringVar(&f.uri, "libvirt-uri", "", "libvirt's driver: "+libvirtd.System+" (the default) or "+libvirtd.Private)
	flagWords(c, "libvirt-uri", libvirtd.System, libvirtd.Private)
}

// dial connects to libvirt.
func (f *libvirtFlags) dial(ctx context.Context) (*libvirtd.Session, error) {
	path := f.socket
	for _, usual := range libvirtd.Sockets {
		if path != "" {
			break
		}
		if _, err := os.Stat(usual); err == nil {
			path = usual
		}
	}
	if path == "" {
		return nil, fmt.Errorf("no libvirt: there is none of %q, see --libvirt-socket; a QMP socket has a slash in its path", libvirtd.Sockets)
	}
	return libvirtd.Dial(ctx, path, cmp.Or(f.uri, libvirtd.System))
}

// overLibvirt connects to libvirt and finds the domain.
func (f *vmFlags) overLibvirt(ctx context.Context, name string) (*attach.Domain, func(), error) {
	server, err := f.ctlFlags.dial()
	if err != nil {
		return nil, nil, err
	}
	s, err := f.libvirt.dial(ctx)
	if err != nil {
		return nil, nil, err
	}
	d, err := s.Lookup(ctx, name)
	if err != nil {
		return nil, nil, errors.Join(err, s.Close())
	}
	m := &attach.Domain{Session: s, Domain: d, Server: server, Scope: f.scope(), Note: f.note}
	return m, func() { _ = s.Close() }, nil // nothing waits for a reply
}
