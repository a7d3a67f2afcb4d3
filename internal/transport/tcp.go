package transport

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"net/netip"
	"strconv"
	"strings"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"golang.org/x/sys/unix"
)

// BeyondLoopback tells whether networks reach l: a TCP socket with another
// address than the loopback's.
func BeyondLoopback(l Listener) bool { return l.Kind() == TCP && beyondLoopback(l.Addr()) }

// FromNetwork tells whether networks reach the address at which c was accepted.
func FromNetwork(c Conn) bool {
	return c.Peer().Kind == TCP && beyondLoopback(c.LocalAddr().String())
}

func beyondLoopback(addr string) bool {
	at, err := netip.ParseAddrPort(addr)
	return err != nil || !at.Addr().Unmap().IsLoopback()
}

// listenTCP binds every address of the endpoint with one port. If the kernel
// picks the port, it may be taken in the other family: then all begins anew.
func listenTCP(ctx context.Context, e Endpoint) ([]Listener, error) {
	what := net.JoinHostPort(e.Address, strconv.FormatUint(uint64(e.Port), 10))
	if e.Port > math.MaxUint16 {
		return nil, fmt.Errorf("listen on %s: port is larger than %d", what, math.MaxUint16)
	}
	addrs, optional, err := listenAddrs(ctx, e)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", what, err)
	}
	for try := 1; ; try++ {
		ls, err := bindAll(addrs, uint16(e.Port), optionsOf(e), optional)
		if err == nil {
			return ls, nil
		}
		again := e.Port == 0 && errors.Is(err, unix.EADDRINUSE) && try < limits.PortRetries
		if !again {
			return nil, fmt.Errorf("listen on %s: %w", what, err)
		}
	}
}

// bindAll binds addrs in order, with the port that the first got. With
// optional set, a family that the kernel does not have is left out.
func bindAll(addrs []netip.Addr, port uint16, opt options, optional bool) (ls []Listener, err error) {
	defer func() {
		if err != nil {
			for _, l := range ls {
				l.Close()
			}
			ls = nil
		}
	}()
	var missing error
	for _, a := range addrs {
		l, err := listenIP(netip.AddrPortFrom(a, port), opt)
		if optional && noFamily(err) {
			missing = err
			continue
		}
		if err != nil {
			return ls, err
		}
		port = addrPort(l.at).Port()
		ls = append(ls, l)
	}
	if len(ls) == 0 {
		return ls, missing
	}
	return ls, nil
}

// noFamily says that the machine lacks the IP family: not compiled in, or
// switched off (net.ipv6.conf.all.disable_ipv6).
func noFamily(err error) bool {
	return errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EADDRNOTAVAIL)
}

func listenIP(ap netip.AddrPort, opt options) (*listener, error) {
	domain, sa, err := sockaddr(ap)
	if err != nil {
		return nil, err
	}
	l, err := bindAndListen(TCP, domain, sa, opt)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", ap, err)
	}
	return l, nil
}

// listenAddrs returns the addresses to bind. optional says that one of them
// may be missing on this machine, because nobody asked for it.
func listenAddrs(ctx context.Context, e Endpoint) (addrs []netip.Addr, optional bool, err error) {
	if e.Address != "" {
		addrs, err = resolve(ctx, e.Address, e.Family)
		return addrs, false, err
	}
	switch e.Family {
	case "":
		return []netip.Addr{netip.IPv6Unspecified(), netip.IPv4Unspecified()}, true, nil
	case "4":
		return []netip.Addr{netip.IPv4Unspecified()}, false, nil
	case "6":
		return []netip.Addr{netip.IPv6Unspecified()}, false, nil
	}
	return nil, false, fmt.Errorf("ip family %q is neither 4 nor 6", e.Family)
}

// resolve returns the addresses of host, an IP address with or without
// brackets or a name, in one family or both.
func resolve(ctx context.Context, host, family string) ([]netip.Addr, error) {
	network, ok := map[string]string{"": "ip", "4": "ip4", "6": "ip6"}[family]
	if !ok {
		return nil, fmt.Errorf("ip family %q is neither 4 nor 6", family)
	}
	lit := strings.TrimSuffix(strings.TrimPrefix(host, "["), "]")
	addrs := []netip.Addr{}
	if a, err := netip.ParseAddr(lit); err == nil {
		addrs = append(addrs, a)
	} else if addrs, err = net.DefaultResolver.LookupNetIP(ctx, network, host); err != nil {
		return nil, err
	}
	out := addrs[:0]
	seen := map[netip.Addr]bool{}
	for _, a := range addrs {
		a = a.Unmap()
		fits := family == "" || (family == "4") == a.Is4()
		if fits && !seen[a] {
			out = append(out, a)
			seen[a] = true
		}
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("%q has no IPv%s address", host, family)
	}
	return out, nil
}

// zoneID is the interface number of an IPv6 zone, which may be its name.
func zoneID(zone string) (uint32, error) {
	if zone == "" {
		return 0, nil
	}
	if n, err := strconv.ParseUint(zone, 10, 32); err == nil {
		return uint32(n), nil
	}
	ifi, err := net.InterfaceByName(zone)
	if err != nil {
		return 0, fmt.Errorf("ip zone %q: %w", zone, err)
	}
	return uint32(ifi.Index), nil
}
