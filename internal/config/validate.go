package config

import (
	"errors"
	"io/fs"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// Validate finds all problems of a configuration that has its defaults. An
// error is of type Problems. What only the system knows, such as whether a file
// or a user exists, is not looked at, but for the overlays in control.state: they
// say which exports have one image.
func (c *Config) Validate() error {
	k := newChecker("")
	k.word("engine", c.Engine, "auto", "uring", "pool")
	if c.Drain <= 0 {
		k.fail("drain-timeout: %v is not positive", c.Drain)
	}
	c.Log.check(k.in("log"))
	c.TLS.check(k.in("tls"))
	c.Control.check(k.in("control"))
	c.Metrics.check(k.in("metrics"))
	if k.most("roots", len(c.Images.Roots), limits.ConfigRoots) {
		for _, r := range c.Images.Roots {
			k.in("images").path("roots", r)
		}
	}
	c.checkGroups(k)
	if k.most("export", len(c.Exports), limits.ConfigExports) {
		c.checkExports(k)
	}
	if k.most("listener", c.countListeners(), limits.ConfigListeners) {
		c.checkListeners(k)
	}
	return k.err()
}

func (t *TLS) check(k checker) {
	if t.PSK != "" {
		k.path("psk", t.PSK)
	}
	switch {
	case t.PSK == "" || t.Certificates != "":
		k.path("certificates", t.Certificates)
	case t.VerifyPeer != nil:
		k.fail("verify-peer: there are no certificates")
	}
}

func (l *Log) check(k checker) {
	k.word("level", l.Level, "debug", "info", "warn", "error")
	k.word("format", l.Format, "text", "json", "journal")
	k.notNegative("slow-request", int64(l.Slow))
}

func (c *Control) check(k checker) {
	if c.Socket == "" {
		words := []string{c.Mode, c.Owner, c.State}
		for _, list := range [][]string{c.ReadUsers, c.ReadGroups, c.ChangeUsers, c.ChangeGroups} {
			words = append(words, list...)
		}
		if strings.Join(words, "") != "" {
			k.fail("without a socket the other keys have no meaning")
		}
		return
	}
	if k.path("socket", c.Socket) && len(c.Socket) > limits.SocketPath {
		k.fail("socket: the path has %d bytes, which is more than %d", len(c.Socket), limits.SocketPath)
	}
	k.mode(c.Mode)
	k.owner(c.Owner)
	if c.State != "" {
		k.path("state", c.State)
	}
	for _, l := range [...]struct {
		key  string
		list []string
	}{
		{"read-users", c.ReadUsers}, {"read-groups", c.ReadGroups},
		{"change-users", c.ChangeUsers}, {"change-groups", c.ChangeGroups},
	} {
		if k.most(l.key, len(l.list), limits.GrantFacts) {
			for _, name := range l.list {
				k.user(l.key, name)
				k.known(l.key, name)
			}
		}
	}
}

// overflow are the user and the group that all unknown ones seem to be
// (user_namespaces(7)), which the control socket lets in under no name.
var overflow = []string{"nobody", "nogroup", "65534"}

// known refuses a rule that nobody ever fulfils.
func (c checker) known(key, s string) {
	if slices.Contains(overflow, s) {
		c.fail("%s: %q is never let in: every user or group that is not known here seems to be 65534", key, s)
	}
}

func (m *Metrics) check(k checker) {
	if m.Listen == "" {
		return
	}
	_, port, err := net.SplitHostPort(m.Listen)
	if err == nil {
		_, err = strconv.ParseUint(port, 10, 16)
	}
	if err != nil {
		k.fail("listen: %q is not HOST:PORT", cut(m.Listen))
	}
	k.text("listen", m.Listen, limits.MaxString, "")
}

// mode demands an octal mode of a socket.
func (c checker) mode(s string) {
	if n, err := strconv.ParseUint(s, 8, 32); err != nil || n == 0 || n > 0o777 {
		c.fail("mode: %q is not an octal mode, as 0660", cut(s))
	}
}

// owner demands USER, USER:GROUP, :GROUP or nothing.
func (c checker) owner(s string) {
	if s == "" {
		return
	}
	user, group, both := strings.Cut(s, ":")
	if user != "" || !both {
		c.user("owner", user)
	}
	if group != "" || user == "" {
		c.user("owner", group)
	}
}

// user demands what may be the name or the number of a user or a group.
func (c checker) user(key, s string) {
	if s == "" || strings.ContainsAny(s, ":,/ ") {
		c.fail("%s: %q is not the name or the number of a user or group", key, cut(s))
		return
	}
	c.text(key, s, limits.UserName, "")
}

func (c *Config) checkGroups(k checker) {
	if !k.most("rate-group", len(c.Groups), limits.ConfigGroups) {
		return
	}
	for _, name := range slices.Sorted(maps.Keys(c.Groups)) {
		g := k.in("rate-group %q", cut(name))
		g.name(name)
		r := c.Groups[name]
		r.check(g)
	}
}

// name demands what an export can be called.
func (c checker) name(s string) {
	if s == "" {
		c.fail("it needs a name")
	}
	c.text("name", s, limits.MaxString, "")
}

func (c *Config) checkExports(k checker) {
	seen := make(map[string]int, len(c.Exports))
	images := make(map[string]users, len(c.Exports))
	dflt := 0
	for i := range c.Exports {
		e := &c.Exports[i]
		in := k.export(e, i)
		if first := seen[e.Name]; first > 0 {
			in.fail("export %d has the same name", first)
		} else {
			seen[e.Name] = i + 1
		}
		if e.Default {
			if dflt > 0 {
				in.fail("export %q is the default already", cut(c.Exports[dflt-1].Name))
			}
			dflt = i + 1
		}
		e.check(in, c.scope())
		c.checkShared(in, e, images)
		if k.full() {
			return
		}
	}
}

// users are exports that have one image open, an example of each kind.
type users struct{ reads, writes *Export }

// checkShared refuses e where it and an export before it name one image, and the
// locks of images let only one of the two be open: one of them writes, and neither
// goes without a lock. An export whose image a snapshot has put below an overlay is
// left out.
func (c *Config) checkShared(k checker, e *Export, images map[string]users) {
	if e.Format == "mem" || e.Format == "null" || e.Image == "" || e.Lock == "off" || c.mayHaveOverlay(e) {
		return
	}
	at := images[e.Image]
	other, how := at.writes, "writing"
	if other == nil && !e.ReadOnly {
		other, how = at.reads, "reading"
	}
	switch {
	case other != nil:
		k.fail("image: export %q has it open for %s: one export may write to an image, or all only read", cut(other.Name), how)
	case e.ReadOnly:
		at.reads = e
	default:
		at.writes = e
	}
	images[e.Image] = at
}

// mayHaveOverlay tells whether a snapshot may have put another image in place of
// that of e: there is a file that says so, or none can be looked for.
func (c *Config) mayHaveOverlay(e *Export) bool {
	if c.Control.State == "" {
		return false
	}
	_, err := os.Lstat(filepath.Join(c.Control.State, overlayPrefix+stateFile(e.Name)))
	return !errors.Is(err, fs.ErrNotExist)
}

// export is a checker for the export at index i: people know it by its name.
func (c checker) export(e *Export, i int) checker {
	in := c.in("export %d", i+1)
	if e.Name != "" {
		in.place = c.in("export %q", cut(e.Name)).place
	}
	return in
}

// scope is what exports of the file may name.
func (c *Config) scope() Scope {
	return Scope{Roots: c.Images.Roots, Anywhere: len(c.Images.Roots) == 0, Groups: c.Groups, Listeners: c.Listeners}
}

// Scope is what an export may name.
type Scope struct {
	Roots    []string // folders of images
	Anywhere bool     // images may lie outside of Roots
	API      bool     // an image may also come as a descriptor
	Groups   map[string]Rate

	// Listeners are those that exports share.
	Listeners []Listener

	// Descriptors is how many files came with the export. Its images are
	// then "fd:0", "fd:1" and so on, or paths.
	Descriptors int
}

// APIScope is the scope of exports that are made through the control API, with
// a number of descriptors: their files lie in the roots.
func (c *Config) APIScope(descriptors int) Scope {
	return Scope{Roots: c.Images.Roots, API: true, Groups: c.Groups, Listeners: c.Listeners, Descriptors: descriptors}
}

// Validate finds all problems of an export that has its defaults. An error is
// of type Problems. Whether its name, its addresses or its being the default
// collide with other exports is not looked at.
func (e *Export) Validate(s Scope) error {
	k := newChecker("")
	in := k.in("export %q", cut(e.Name))
	e.check(in, s)
	if k.most("listener", len(e.Listeners), limits.ConfigListeners) {
		for i := range e.Listeners {
			e.Listeners[i].check(in.in("listener %d", i+1), e.RequireTLS)
		}
		e.checkRequireTLS(in)
	}
	return k.err()
}

// Contains tells whether path, absolute and clean, lies in a root. It compares
// text: symbolic links are the matter of who opens.
func (s *Scope) Contains(path string) bool {
	return s.Anywhere || slices.ContainsFunc(s.Roots, func(r string) bool {
		rel, err := filepath.Rel(r, path)
		return err == nil && rel != "." && rel != ".." && !strings.HasPrefix(rel, "../")
	})
}

// onlyVsock tells whether e is found at listeners, and at none that others than
// vsock peers reach. What systemd opens may be anything.
func (s *Scope) onlyVsock(e *Export) bool {
	list := e.Listeners
	if len(list) == 0 {
		list = slices.DeleteFunc(slices.Clone(s.Listeners), func(l Listener) bool {
			return len(l.Exports) > 0 && !slices.Contains(l.Exports, e.Name)
		})
	}
	other := func(l Listener) bool {
		a, err := parseAddress(l.URI)
		return err != nil || a.kind != "vsock"
	}
	return len(list) > 0 && !slices.ContainsFunc(list, other)
}

// check looks at a rate.
func (r *Rate) check(k checker) {
	for _, n := range [...]struct {
		key string
		n   int64
	}{
		{"bytes", int64(r.Bytes)}, {"read-bytes", int64(r.ReadBytes)}, {"write-bytes", int64(r.WriteBytes)},
		{"ops", r.Ops}, {"read-ops", r.ReadOps}, {"write-ops", r.WriteOps},
	} {
		k.notNegative(n.key, n.n)
	}
	if r.Burst < 0 || time.Duration(r.Burst) > limits.RateBurst {
		k.fail("burst: want 0s to %v", limits.RateBurst)
	}
}
