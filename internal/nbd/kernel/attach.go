package kernel

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"net/url"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd/client"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
	"github.com/vmdiskd/vmdiskd/internal/transport"
)

// Server is an export and the way to it.
type Server struct {
	Target transport.Target
	// Export is the name to ask for.
	Export string
	// TLS is called for each connection, by several goroutines, so that keys and
	// certificates are those of the day; nil for none.
	TLS func() (*tls.Config, error)

	// name is what the server calls the export, without a token. It is known,
	// and does not change, from the first connection on.
	name  string
	known bool
}

// Direct tells whether the driver can speak to the server by itself; if not,
// every connection has a relay in this process.
func (s *Server) Direct() bool {
	return s.TLS == nil && (s.Target.Kind == transport.Unix || s.Target.Kind == transport.TCP)
}

// settle has the export asked for by the name that the server has for it, and no
// other be taken for it: what opens to a name, as to the empty one, may be
// another export later. A token is shown with that name too.
func (s *Server) settle(name string) {
	_, token := transport.CutToken(s.Export)
	s.name, s.known = name, true
	if s.Export = name; token != "" {
		s.Export += "?" + token
	}
}

// called is the name of what was asked for: the one that was asked for, if the
// server tells none (NBD proto.md, "NBD_INFO_NAME").
func (s *Server) called(e client.Export) string {
	name := e.Canonical
	if name == "" {
		name = s.Export
	}
	name, _ = transport.CutToken(name)
	return name
}

// check refuses an export that is another one than at the first connection.
func (s *Server) check(e client.Export) error {
	if name := s.called(e); s.known && name != s.name {
		return refused("the server calls the export %q, not %q: it is another one", clip(name), clip(s.name))
	}
	return nil
}

// hide keeps tokens out of the text of an error that names the export.
func hide(err error) error {
	if err == nil {
		return nil
	}
	if text := transport.HideTokens(err.Error()); text != err.Error() {
		return &hidden{text, err}
	}
	return err
}

// hidden is an error with another text.
type hidden struct {
	text string
	err  error
}

func (e *hidden) Error() string { return e.text }
func (e *hidden) Unwrap() error { return e.err }

// alias is the name of the export for a device that asked for another one, or
// "". It holds nothing of the token that was asked with.
func (s *Server) alias(asked string) string {
	_, token := transport.CutToken(asked)
	if s.Export == asked || token != "" && strings.Contains(strings.ToLower(s.name), strings.ToLower(token)) {
		return ""
	}
	return s.name
}

// Config says how to attach a device.
type Config struct {
	Server Server
	// URI is what the device's users are told of the server, as ShownURI.
	URI string
	// Index is that of the device, or Any.
	Index int
	// Connections is how many, from 1 to limits.DeviceSockets. More than one
	// is refused unless the server says that they may share the export.
	Connections int
	// Timeout and DeadConn are those of Setup.
	Timeout, DeadConn time.Duration
	ReadOnly          bool
	// Block is the logical block size in bytes, or 0 for the smallest.
	Block uint32
	// Swap makes a device that is safe to swap on: refused unless Server is a
	// Unix socket and there is one connection that never times out.
	Swap bool
	// Sysfs is where the device's limits are set.
	Sysfs Sysfs
	// Holds is a folder in which the process that keeps the device claims it,
	// or "" for a device that nobody keeps. With it, a device of that Index that
	// is attached from this URI already, and whose keeper has died, is taken
	// over: see Device.TakenOver.
	Holds string
}

// Device is one that this process has attached.
type Device struct {
	driver *Driver
	config Config
	setup  Setup
	links  []*link
	hold   *hold // nil for a device that nobody keeps

	// TakenOver says that the device was attached by a process that has died.
	// Then direct connections may be the driver's alone: the links of those are
	// spare ones, until they are offered to the driver in their place.
	TakenOver bool
}

// Attach negotiates the connections and gives them to the driver. The device
// stays attached when the process ends, if its connections are direct. It fails
// with ErrBusy for a device that is attached and cannot be taken over.
func Attach(ctx context.Context, d *Driver, c Config) (*Device, error) {
	if err := c.Check(); err != nil {
		return nil, err
	}
	v := &Device{driver: d, config: c}
	var err error
	if now, ok := c.attached(); ok {
		err = v.takeOver(ctx, now)
	} else {
		err = v.attach(ctx)
	}
	if err != nil {
		v.Close()
		return nil, err
	}
	return v, nil
}

// Check refuses what cannot work or would not be safe, as far as that is known
// before the server has been asked. Attach does it too.
func (c *Config) Check() error {
	switch {
	case c.Connections < 1 || c.Connections > limits.DeviceSockets:
		return refused("%d connections: from 1 to %d are possible", c.Connections, limits.DeviceSockets)
	case c.Timeout < 0 || c.Timeout > limits.DeviceTimeMost, c.DeadConn < 0 || c.DeadConn > limits.DeviceTimeMost:
		return refused("a timeout is from 0 to %v", limits.DeviceTimeMost)
	case !c.Swap:
		return nil
	case c.Server.TLS != nil || c.Server.Target.Kind != transport.Unix:
		return refused("swap needs a Unix socket: any other way to the server needs memory that swapping has to give first")
	case c.Connections != 1 || c.Timeout != 0:
		return refused("swap needs one connection without a timeout: a slow disk is no reason to lose pages")
	case c.ReadOnly:
		return refused("swap on a device that is read-only")
	}
	return nil
}

func (v *Device) attach(ctx context.Context) error {
	c := &v.config
	asked := c.Server.Export
	export, err := v.connectAll(ctx)
	if err != nil {
		return err
	}
	if c.Connections > 1 && !export.Has(wire.CanMultiConn) {
		return refused("the server does not allow %d connections to share this export", c.Connections)
	}
	text, err := backend(c.URI, c.Server.alias(asked))
	if err != nil {
		return err
	}
	v.setup = Setup{Index: c.Index, Flags: export.Flags, Timeout: c.Timeout, DeadConn: c.DeadConn, Backend: text}
	if c.ReadOnly {
		v.setup.Flags |= wire.ReadOnly
	}
	block := c.Block
	if c.Swap && block == 0 {
		block = limits.DeviceBlock
	}
	if v.setup.Block, err = blockSize(block, export.Blocks.Min); err != nil {
		return err
	}
	if v.setup.Size, err = usable(export.Size, v.setup.Block); err != nil {
		return err
	}
	if c.Swap && v.setup.Flags&wire.ReadOnly != 0 {
		return refused("swap on an export that is read-only")
	}
	v.setup.Sockets = v.sockets()
	if c.Holds != "" {
		if v.hold, err = claimHold(c.Holds, v.setup.Backend); err != nil {
			return err
		}
	}
	if v.setup.Index, err = v.driver.Connect(v.setup); err != nil {
		return err
	}
	if err = v.tune(export); err != nil {
		err = errors.Join(fmt.Errorf("%s: %w", Name(v.setup.Index), err), v.driver.Disconnect(v.setup.Index))
	}
	return err
}

// sockets are those for the driver.
func (v *Device) sockets() (list []*os.File) {
	for _, l := range v.links {
		list = append(list, l.file)
	}
	return list
}

// connectAll makes the connections, which must all find the same export.
func (v *Device) connectAll(ctx context.Context) (client.Export, error) {
	var first client.Export
	for n := range v.config.Connections {
		l, e, err := connect(ctx, &v.config.Server)
		if err != nil {
			return first, err
		}
		v.links = append(v.links, l)
		if n == 0 {
			first = e
			v.config.Server.settle(v.config.Server.called(e))
		} else if e.Size != first.Size || e.Flags != first.Flags || e.Blocks != first.Blocks {
			return first, senseless("the server describes the export in two ways")
		}
	}
	return first, nil
}

// tune keeps requests below the largest that the server takes, which the
// driver does not ask for, and a swap device below what is safe.
func (v *Device) tune(e client.Export) error {
	kib := int64(e.MaxPayload()) >> 10
	if v.config.Swap {
		kib = min(kib, limits.SwapRequestKiB)
		if err := v.config.Sysfs.lower(v.setup.Index, "queue/nr_requests", limits.SwapRequests); err != nil {
			return err
		}
	}
	return v.config.Sysfs.lower(v.setup.Index, "queue/max_sectors_kb", kib)
}

// Index is the device's number.
func (v *Device) Index() int { return v.setup.Index }

// Path is that of the device's node.
func (v *Device) Path() string { return "/dev/" + Name(v.setup.Index) }

// Size is the device's in bytes, when it was attached.
func (v *Device) Size() uint64 { return v.setup.Size }

// Block is the device's logical block size in bytes.
func (v *Device) Block() uint32 { return v.setup.Block }

// Flags are what the driver was told about the export.
func (v *Device) Flags() wire.ExportFlags { return v.setup.Flags }

// Close lets go of the device, which stays attached as far as its connections
// are direct: those of relays end.
func (v *Device) Close() {
	for _, l := range v.links {
		l.close()
	}
	v.links = nil
	v.hold.release()
	v.hold = nil
}

// backendPrefix begins what the driver remembers of devices attached here; a
// random number follows, so that one who reconnects a device knows it from one
// that was attached since, a blank, and the URI. Before that stands, with another
// blank, aliasPrefix and the name of the export, escaped as in a URI, if the URI
// has another one.
const (
	backendPrefix = "vmdiskctl-"
	aliasPrefix   = "export="
)

// backend refuses an alias for which limits.Backend has no room: without it the
// device would go on with whatever has the name then.
func backend(uri, alias string) (string, error) {
	var nonce [8]byte
	rand.Read(nonce[:]) // never fails
	id, uri := backendPrefix+hex.EncodeToString(nonce[:])+" ", ShownURI(uri)
	if alias == "" {
		return id + uri, nil
	}
	text := id + aliasPrefix + url.PathEscape(alias) + " " + uri
	if len(text) > limits.Backend {
		return "", refused("the driver has no room for the name of the export, %q, beside its URI: attach it by that name", clip(alias))
	}
	return text, nil
}

// parseBackend is false for a device that others have attached.
func parseBackend(backend string) (uri, alias string, ours bool) {
	rest, ours := strings.CutPrefix(backend, backendPrefix)
	_, uri, blank := strings.Cut(rest, " ")
	if !ours || !blank {
		return "", "", false
	}
	name, after, _ := strings.Cut(uri, " ")
	if name, ok := strings.CutPrefix(name, aliasPrefix); ok && after != "" {
		if alias, err := url.PathUnescape(name); err == nil {
			return after, alias, true
		}
	}
	return uri, "", true
}

// ShownURI is what everybody may know of a URI: transport.ShownToken stands for a
// token. One of more than limits.Backend - 64 bytes is cut off, and ends with digits
// of its SHA-256, which tell it from others that begin alike.
func ShownURI(uri string) string {
	const most, digits = limits.Backend - 64, 32
	uri = hideToken(uri)
	if len(uri) <= most {
		return uri
	}
	sum := sha256.Sum256([]byte(uri))
	return uri[:most-digits] + hex.EncodeToString(sum[:])[:digits]
}

// hideToken shortens the token of a URI, however it is written.
func hideToken(uri string) string {
	u, err := url.Parse(uri)
	if err != nil {
		return uri
	}
	name, token := transport.CutToken(u.Path)
	if token == "" {
		return uri
	}
	u.Path, u.RawPath = name+"?"+transport.ShownToken(token), ""
	return u.String()
}

// BackendURI is the URI in what the driver remembers, as ShownURI, or all of it
// when others have attached the device. It is data.
func BackendURI(backend string) string {
	if uri, _, ours := parseBackend(backend); ours {
		return ShownURI(uri)
	}
	return backend
}

// link is one connection of a device.
type link struct {
	file  *os.File // the driver's socket
	relay *Relay   // nil for a direct connection
}

// connect negotiates one connection to the export, up to its first request.
func connect(ctx context.Context, s *Server) (*link, client.Export, error) {
	ctx, cancel := context.WithTimeout(ctx, limits.Handshake)
	defer cancel()
	session, conn, err := negotiate(ctx, s)
	if err != nil {
		return nil, client.Export{}, err
	}
	way, e, err := session.Handover(ctx, s.Export)
	if err != nil {
		return nil, e, hide(err)
	}
	if err := s.check(e); err != nil {
		way.Close()
		return nil, e, err
	}
	if !s.Direct() {
		r, file, err := NewRelay(way)
		if err != nil {
			return nil, e, err
		}
		return &link{file: file, relay: r}, e, nil
	}
	defer conn.Close()
	file, err := duplicate(conn)
	if err != nil {
		return nil, e, err
	}
	return &link{file: file}, e, nil
}

// negotiate begins a session whose replies are those that the driver knows. The
// session owns the connection.
func negotiate(ctx context.Context, s *Server) (*client.Session, transport.Conn, error) {
	o := client.Options{Replies: client.Simple}
	if s.TLS != nil {
		var err error
		if o.TLS, err = s.TLS(); err != nil {
			return nil, nil, err
		}
	}
	conn, err := transport.Dial(ctx, s.Target)
	if err != nil {
		return nil, nil, err
	}
	session, err := client.Negotiate(ctx, conn, o)
	return session, conn, err
}

// duplicate gives the socket of a connection a descriptor of its own.
func duplicate(conn transport.Conn) (*os.File, error) {
	var fd int
	var err error
	if e := conn.Raw().Control(func(p uintptr) { fd, err = unix.FcntlInt(p, unix.F_DUPFD_CLOEXEC, 0) }); e != nil {
		return nil, e
	}
	if err != nil {
		return nil, os.NewSyscallError("fcntl", err)
	}
	return os.NewFile(uintptr(fd), "nbd connection"), nil
}

// dead tells whether the connection has ended: the driver shuts down both
// directions of a socket when it gives it up.
func (l *link) dead() bool {
	p := []unix.PollFd{{Fd: int32(l.file.Fd())}}
	for {
		_, err := unix.Poll(p, 0)
		if err == unix.EINTR {
			continue
		}
		return err != nil || p[0].Revents&(unix.POLLHUP|unix.POLLERR|unix.POLLNVAL) != 0
	}
}

func (l *link) close() {
	l.file.Close()
	if l.relay != nil {
		l.relay.Close()
	}
}
