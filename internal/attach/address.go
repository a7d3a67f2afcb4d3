package attach

import (
	"context"
	"net"
	"net/netip"
	"slices"

	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/internal/transport"
)

// isAt tells whether a disk from u is the export, under its name or, while it is
// the default export, under none, with a token or without.
func isAt(ctx context.Context, u transport.URI, x api.Export) bool {
	if name, _ := transport.CutToken(u.Export); name != x.Name && (name != "" || !x.Default) {
		return false
	}
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
