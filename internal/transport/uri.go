package transport

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/mdlayher/vsock"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// DefaultPort is the port that IANA gave to NBD; an URI without one means it.
const DefaultPort = 10809

// Target is where a server listens. Only the fields of its Kind are used.
type Target struct {
	// Kind is Unix, TCP or VSock.
	Kind Kind
	// Path is that of a Unix socket.
	Path string
	// Address is an IP address, without brackets, or a host name.
	Address string
	// CID is the context ID of a vsock server.
	CID uint32
	// Port is that of a TCP or vsock server.
	Port uint32
}

// String is for messages.
func (t Target) String() string {
	switch t.Kind {
	case Unix:
		return t.Path
	case VSock:
		return "vsock:" + vsockAddr(t.CID, t.Port)
	}
	return net.JoinHostPort(t.Address, strconv.FormatUint(uint64(t.Port), 10))
}

// URI is an NBD URI (NBD doc/uri.md); the vsock schemes are those of libnbd.
type URI struct {
	Target
	// Export is the name of the export, which may be empty.
	Export string
	TLS    bool
	// User is the part before "@", a TLS identity, or "".
	User string
	// Params are the query parameters but socket, which is Path: such as
	// tls-certificates or tls-verify-peer. Each may be given once.
	Params map[string]string
}

// schemes is the table of URI schemes.
var schemes = map[string]struct {
	kind Kind
	tls  bool
}{
	"nbd":        {TCP, false},
	"nbds":       {TCP, true},
	"nbd+unix":   {Unix, false},
	"nbds+unix":  {Unix, true},
	"nbd+vsock":  {VSock, false},
	"nbds+vsock": {VSock, true},
}

// ParseURI parses an NBD URI. The export name is the path without its first
// slash, so that "//disk" means "/disk".
func ParseURI(s string) (URI, error) {
	u, err := parseURI(s)
	if err != nil {
		return URI{}, fmt.Errorf("nbd uri %q: %w", s, err)
	}
	return u, nil
}

func parseURI(s string) (u URI, err error) {
	p, err := url.Parse(s)
	if err != nil {
		if ue, ok := errors.AsType[*url.Error](err); ok {
			err = ue.Err
		}
		return u, err
	}
	scheme, ok := schemes[p.Scheme]
	switch {
	case !ok:
		return u, fmt.Errorf("scheme %q is none of NBD's", p.Scheme)
	case p.Opaque != "":
		return u, errors.New("the scheme is not followed by //")
	case strings.Contains(s, "#"):
		return u, errors.New("a fragment has no meaning: write # as %23")
	}
	u.Kind, u.TLS, u.User = scheme.kind, scheme.tls, p.User.Username()
	u.Export = strings.TrimPrefix(p.Path, "/")
	if err := checkExport(u.Export); err != nil {
		return u, err
	}
	if u.Params, err = parseQuery(p.RawQuery); err != nil {
		return u, err
	}
	if _, secret := p.User.Password(); secret {
		return u, errors.New("a password has no meaning")
	}
	return u, u.parseAuthority(p)
}

// parseAuthority reads what stands between // and the path, or for a Unix
// socket the parameter that stands in for it.
func (u *URI) parseAuthority(p *url.URL) error {
	path, hasPath := u.Params["socket"]
	if u.Kind == Unix {
		delete(u.Params, "socket")
		switch {
		case p.Host != "":
			return fmt.Errorf("host %q where a Unix socket has none", p.Host)
		case path == "":
			return errors.New("parameter socket is missing")
		}
		u.Path = path
		return nil
	}
	if hasPath {
		return errors.New("parameter socket is for Unix sockets only")
	}
	if err := u.parsePort(p.Port()); err != nil {
		return err
	}
	host := p.Hostname()
	if u.Kind == TCP {
		if u.Address = host; host == "" {
			u.Address = "localhost"
		}
		return checkHost(u.Address)
	}
	if u.CID = vsock.Host; host != "" {
		cid, err := strconv.ParseUint(host, 10, 32)
		if err != nil {
			return fmt.Errorf("vsock context id %q is no number", host)
		}
		u.CID = uint32(cid)
	}
	return nil
}

func (u *URI) parsePort(s string) error {
	if u.Port = DefaultPort; s == "" {
		return nil
	}
	largest := uint64(math.MaxUint16)
	if u.Kind == VSock {
		largest = math.MaxUint32 - 1
	}
	port, err := strconv.ParseUint(s, 10, 64)
	if err != nil || port > largest {
		return fmt.Errorf("port %q is larger than %d", s, largest)
	}
	u.Port = uint32(port)
	return nil
}

// checkHost allows IP addresses with or without a zone and host names, which
// have ASCII letters only once they are encoded for the DNS.
func checkHost(host string) error {
	name := host
	if a, err := netip.ParseAddr(host); err == nil {
		name = a.Zone()
	}
	for i := range len(name) {
		if !unreserved(name[i]) {
			return fmt.Errorf("host %q is neither an address nor a name", host)
		}
	}
	return nil
}

// unreserved are the characters that need no encoding (RFC 3986, section 2.3).
func unreserved(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' ||
		strings.IndexByte("-._~", c) >= 0
}

func checkExport(name string) error {
	switch {
	case len(name) > limits.MaxString:
		return fmt.Errorf("export name has %d bytes, which is more than %d", len(name), limits.MaxString)
	case !utf8.ValidString(name):
		return errors.New("export name is not UTF-8")
	case strings.ContainsRune(name, 0):
		return errors.New("export name has a zero byte")
	}
	return nil
}

// parseQuery differs from url.ParseQuery in that "+" is a plus sign: paths
// have it, and no NBD client takes it for a space.
func parseQuery(raw string) (map[string]string, error) {
	var params map[string]string
	for pair := range strings.SplitSeq(raw, "&") {
		if pair == "" {
			continue
		}
		k, v, _ := strings.Cut(pair, "=")
		key, err := url.PathUnescape(k)
		if err != nil {
			return nil, err
		}
		value, err := url.PathUnescape(v)
		if err != nil {
			return nil, err
		}
		if _, twice := params[key]; twice {
			return nil, fmt.Errorf("parameter %q is given twice", key)
		}
		if params == nil {
			params = map[string]string{}
		}
		params[key] = value
	}
	return params, nil
}

// String writes the URI so that ParseURI reads the same again. The default
// port and an empty export leave no trace.
func (u URI) String() string {
	var b strings.Builder
	b.WriteString("nbd")
	if u.TLS {
		b.WriteByte('s')
	}
	if u.Kind != TCP {
		b.WriteString("+" + string(u.Kind))
	}
	b.WriteString("://")
	if u.User != "" {
		b.WriteString(escape(u.User, "") + "@")
	}
	b.WriteString(u.authority())
	if u.Export != "" || u.Kind == Unix {
		b.WriteString("/" + escape(u.Export, "/"))
	}
	sep := "?"
	if u.Kind == Unix {
		b.WriteString("?socket=" + escape(u.Path, "/"))
		sep = "&"
	}
	for _, k := range slices.Sorted(maps.Keys(u.Params)) {
		b.WriteString(sep + escape(k, "/") + "=" + escape(u.Params[k], "/"))
		sep = "&"
	}
	return b.String()
}

func (u URI) authority() string {
	var host string
	switch u.Kind {
	case Unix:
		return ""
	case VSock:
		host = strconv.FormatUint(uint64(u.CID), 10)
	default:
		host = escape(u.Address, ":")
		if strings.Contains(u.Address, ":") {
			host = "[" + host + "]"
		}
	}
	if u.Port == DefaultPort {
		return host
	}
	return host + ":" + strconv.FormatUint(uint64(u.Port), 10)
}

// escape percent-encodes all but unreserved characters and those in keep.
func escape(s, keep string) string {
	var b strings.Builder
	for i := range len(s) {
		if c := s[i]; unreserved(c) || strings.IndexByte(keep, c) >= 0 {
			b.WriteByte(c)
		} else {
			fmt.Fprintf(&b, "%%%02X", c)
		}
	}
	return b.String()
}
