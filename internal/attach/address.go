package attach

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/internal/transport"
)

// isAt tells whether a disk from u is the export, with a token or without.
func isAt(ctx context.Context, u transport.URI, x api.Export) bool {
	name, _ := transport.CutToken(u.Export)
	return name == x.Name && sharesAddress(ctx, u, x)
}

// mayBe tells whether a disk from u is the default export of an address of x: that
// is the one which was the default when the machine connected.
func mayBe(ctx context.Context, u transport.URI, x api.Export) bool {
	name, _ := transport.CutToken(u.Export)
	return name == "" && sharesAddress(ctx, u, x)
}

// errMayBe is what errUnnamed has beside ErrDiffers, which is for other disks too.
var errMayBe = errors.New("detach it, and attach it under its name")

// errUnnamed is for a disk that may be an export.
func errUnnamed(disk string, x api.Export) error {
	return fmt.Errorf("%w: disk %s was attached under no name, as the default export of an address of %q, which may have been another: %w", ErrDiffers, disk, x.Name, errMayBe)
}

func sharesAddress(ctx context.Context, u transport.URI, x api.Export) bool {
	return slices.ContainsFunc(x.URIs, func(text string) bool {
		at, err := transport.ParseURI(text)
		if err != nil || at.TLS != u.TLS {
			return false
		}
		if at.Kind == transport.TCP && u.Kind == transport.TCP && at.Port == u.Port {
			return isHost(ctx, u.Address, at.Address)
		}
		return at.Target == u.Target
	})
}

// allAddresses is where an export says that it is at all addresses of this host.
const allAddresses = "localhost"

// isHost tells whether a host, an address or the name that its certificate is
// for, is where an export says that it is.
func isHost(ctx context.Context, host, at string) bool {
	if host == at {
		return true
	}
	there := addresses(ctx, at)
	if at == allAddresses {
		there = append(there, ownAddresses()...)
	}
	return slices.ContainsFunc(addresses(ctx, host), func(a netip.Addr) bool { return slices.Contains(there, a) })
}

// addresses are those of a host; none of one that nobody knows.
func addresses(ctx context.Context, host string) []netip.Addr {
	all, _ := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	for i := range all {
		all[i] = all[i].Unmap()
	}
	return all
}

// ownAddresses are those of this host, as far as it says.
func ownAddresses() (all []netip.Addr) {
	list, _ := net.InterfaceAddrs()
	for _, a := range list {
		if prefix, err := netip.ParsePrefix(a.String()); err == nil {
			all = append(all, prefix.Addr().Unmap())
		}
	}
	return all
}
