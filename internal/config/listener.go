package config

import (
	"errors"
	"fmt"
	"math"
	"net/netip"
	"net/url"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// defaultPort is the port that IANA gave to NBD.
const defaultPort = "10809"

// hostCID is the vsock address of the host, which an URI without one means.
const hostCID = "2"

// address is where a listener listens, in the one form that can be compared:
// "tcp HOST PORT", "vsock CID PORT", "unix PATH" or "systemd NAME".
type address struct{ kind, host, port string }

func (a address) String() string { return strings.TrimSpace(a.kind + " " + a.host + " " + a.port) }

// parseAddress reads the URI of a listener. It knows the syntax only: whether
// a host name can be resolved, say, is not its matter.
func parseAddress(s string) (a address, err error) {
	if len(s) > 2*limits.MaxString {
		return a, errors.New("it is too long")
	}
	if name, ok := strings.CutPrefix(s, SystemdScheme); ok {
		return address{kind: "systemd", host: name}, checkPassedName(name)
	}
	u, err := url.Parse(s)
	if err != nil {
		return a, errors.New("it is not a URI")
	}
	a.kind = map[string]string{
		"nbd": "tcp", "nbds": "tcp", "nbd+unix": "unix", "nbds+unix": "unix", "nbd+vsock": "vsock", "nbds+vsock": "vsock",
	}[u.Scheme]
	switch {
	case a.kind == "":
		return a, fmt.Errorf("scheme %q is none of nbd, nbds, nbd+unix, nbds+unix, nbd+vsock, nbds+vsock, systemd", u.Scheme)
	case u.Opaque != "" || !strings.Contains(s, "://"):
		return a, errors.New("the scheme is not followed by //")
	case u.User != nil:
		return a, errors.New("a user has no meaning here")
	case strings.Contains(s, "#"):
		return a, errors.New("a fragment has no meaning: write # as %23")
	case u.Path != "" && u.Path != "/":
		return a, errors.New("it names an export: the key exports does that")
	}
	if a.kind == "unix" {
		a.host, err = socketPath(u)
		return a, err
	}
	if u.RawQuery != "" || u.ForceQuery {
		return a, errors.New("parameters have no meaning here")
	}
	return a, a.parseHost(u)
}

// SystemdScheme begins the URI of a listener that systemd opens; what follows
// is its name, FileDescriptorName= of systemd.socket(5).
const SystemdScheme = "systemd:"

// KeptPrefix begins the names under which listeners of the daemon's own wait in
// the service manager while the daemon starts again.
const KeptPrefix = "listener-"

// checkPassedName demands what may be the name of a passed socket
// (sd_listen_fds_with_names(3)) that is none of the daemon's own.
func checkPassedName(s string) error {
	odd := func(r rune) bool { return r <= ' ' || r > '~' || r == ':' }
	switch {
	case s == "":
		return errors.New("it needs the name of a socket of systemd")
	case len(s) > limits.PassedName:
		return fmt.Errorf("the name of the socket has %d bytes, which is more than %d", len(s), limits.PassedName)
	case strings.ContainsFunc(s, odd):
		return fmt.Errorf("%q is no name of a socket of systemd", cut(s))
	case strings.HasPrefix(s, KeptPrefix):
		return fmt.Errorf("names that begin with %s are the daemon's own", KeptPrefix)
	}
	return nil
}

// parseHost reads HOST:PORT or CID:PORT.
func (a *address) parseHost(u *url.URL) error {
	largest := uint64(math.MaxUint16)
	if a.kind == "vsock" {
		largest = math.MaxUint32 - 1
	}
	a.host, a.port = u.Hostname(), u.Port()
	or(&a.port, defaultPort)
	port, err := strconv.ParseUint(a.port, 10, 64)
	if err != nil || port > largest {
		return fmt.Errorf("port %q is larger than %d", cut(a.port), largest)
	}
	a.port = strconv.FormatUint(port, 10)
	if a.kind == "vsock" {
		or(&a.host, hostCID)
		cid, err := strconv.ParseUint(a.host, 10, 32)
		if err != nil {
			return fmt.Errorf("vsock context id %q is no number", cut(a.host))
		}
		if cid == 0 {
			cid = math.MaxUint32 // both are every address of the machine
		}
		a.host = strconv.FormatUint(cid, 10)
		return nil
	}
	a.host = strings.ToLower(a.host)
	if ip, err := netip.ParseAddr(a.host); err == nil {
		a.host = ip.Unmap().String()
		return nil
	}
	if a.host == "" {
		return errors.New("it needs a host: [::] is every address of the machine")
	}
	return checkHost(a.host)
}

// checkHost demands what may be the name of a host. The characters are those
// of RFC 3986, section 2.3.
func checkHost(s string) error {
	for _, c := range []byte(s) {
		ok := 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || strings.IndexByte("-._~", c) >= 0
		if !ok {
			return fmt.Errorf("host %q is neither an address nor a name", cut(s))
		}
	}
	return nil
}

// socketPath reads the parameter socket of a URI. A "+" in it is a plus sign,
// as NBD's URIs have it.
func socketPath(u *url.URL) (string, error) {
	if u.Host != "" {
		return "", fmt.Errorf("host %q where a Unix socket has none", cut(u.Host))
	}
	value, ok := strings.CutPrefix(u.RawQuery, "socket=")
	if !ok || strings.Contains(value, "&") {
		return "", errors.New("it needs the parameter socket, and no other")
	}
	path, err := url.PathUnescape(value)
	switch {
	case err != nil:
		return "", errors.New("the path of the socket is badly encoded")
	case !filepath.IsAbs(path):
		return "", fmt.Errorf("the path of the socket, %q, is not absolute", cut(path))
	case filepath.Clean(path) != path:
		return "", fmt.Errorf("write the path of the socket as %q", cut(filepath.Clean(path)))
	case len(path) > limits.SocketPath:
		return "", fmt.Errorf("the path of the socket has %d bytes, which is more than %d", len(path), limits.SocketPath)
	case strings.ContainsRune(path, 0):
		return "", errors.New("the path of the socket has a zero byte")
	}
	return path, nil
}

// exposed tells whether a is a TCP address that networks reach. What a name
// stands for is known when the listener is opened.
func (a address) exposed() bool {
	ip, err := netip.ParseAddr(a.host)
	return a.kind == "tcp" && err == nil && !ip.IsLoopback()
}

// check looks at one listener that has its defaults. encrypted tells that what
// is found there demands TLS.
func (l *Listener) check(k checker, encrypted bool) {
	k.word("tls", l.TLS, "off", "on", "require")
	a, err := parseAddress(l.URI)
	if err != nil {
		k.fail("uri: %q: %v", cut(l.URI), err)
		return
	}
	if strings.HasPrefix(l.scheme(), "nbds") && l.TLS != "require" {
		k.fail("tls: the scheme of the uri demands require")
	}
	if a.exposed() && l.TLS != "require" && !encrypted && !l.InsecurePlaintext {
		k.fail("uri: %q is open to networks in plaintext: %s", cut(l.URI), NeedTLS)
	}
	if l.InsecurePlaintext && a.kind != "tcp" && a.kind != "systemd" {
		k.fail("insecure-plaintext is for TCP")
	}
	if a.kind == "unix" {
		k.mode(l.Mode)
		k.owner(l.Owner)
		k.context("selinux-label", l.SELinuxLabel)
		k.context("selinux-path-label", l.SELinuxPathLabel)
	} else if l.Mode != "" || l.Owner != "" || l.SELinuxLabel != "" || l.SELinuxPathLabel != "" {
		k.fail("mode, owner and labels are for Unix sockets")
	}
}

// NeedTLS is what can be done about a listener that networks reach in plaintext.
const NeedTLS = `say tls = "require", as nbds:// does, or insecure-plaintext = true`

// countListeners counts those of exports too.
func (c *Config) countListeners() int {
	n := len(c.Listeners)
	for i := range c.Exports {
		n += len(c.Exports[i].Listeners)
	}
	return n
}

// checkListeners looks at all listeners, and whether two want one address.
func (c *Config) checkListeners(k checker) {
	taken := map[address]string{}
	check := func(l *Listener, in checker, encrypted bool) {
		l.check(in, encrypted)
		a, err := parseAddress(l.URI)
		if err != nil || a.port == "0" { // the kernel chooses another port for each
			return
		}
		if other, ok := taken[a]; ok {
			in.fail("uri: %q is the address of %s too", cut(l.URI), other)
			return
		}
		taken[a] = in.place
	}
	names := map[string]bool{}
	for i := range c.Exports {
		names[c.Exports[i].Name] = true
	}
	for i := range c.Listeners {
		in := k.in("listener %d", i+1)
		check(&c.Listeners[i], in, false)
		c.checkNamed(&c.Listeners[i], in, names)
	}
	for i := range c.Exports {
		e := &c.Exports[i]
		for j := range e.Listeners {
			in := k.export(e, i).in("listener %d", j+1)
			check(&e.Listeners[j], in, e.RequireTLS)
			if len(e.Listeners[j].Exports) > 0 {
				in.fail("exports: here is only the one")
			}
		}
		e.checkRequireTLS(k.export(e, i))
	}
}

// checkRequireTLS demands that somebody can open an export with listeners of its own.
func (e *Export) checkRequireTLS(k checker) {
	encrypts := func(l Listener) bool { return l.TLS != "off" }
	if e.RequireTLS && len(e.Listeners) > 0 && !slices.ContainsFunc(e.Listeners, encrypts) {
		k.fail("require-tls: none of its listeners speaks TLS, as one with nbds:// does")
	}
}

// checkNamed demands that the exports of a listener exist, unless they may
// still be made through the control API.
func (c *Config) checkNamed(l *Listener, k checker, names map[string]bool) {
	if !k.most("exports", len(l.Exports), limits.ConfigExports) {
		return
	}
	for _, name := range l.Exports {
		if !names[name] && c.Control.Socket == "" {
			k.fail("exports: there is none that is called %q", cut(name))
		}
	}
}
