package config

import (
	"cmp"
	"encoding/json"
	"fmt"
	"iter"
	"maps"
	"reflect"
	"slices"
	"strings"
)

// What says what becomes of a thing in a reload.
type What uint8

// Values of What, in the order of the lists. They are done in the reverse: what
// comes is open before anything is taken away. So an image cannot go from one
// export to another in a single reload.
const (
	Remove What = iota
	Alter
	Add
)

var whats = [...]string{"remove", "change", "add"}

// String is the verb.
func (w What) String() string { return whats[w] }

// Change is what a reload does: the difference of two configurations. Each list
// is sorted: by What, then by name.
type Change struct {
	Settings  []SettingChange
	Groups    []GroupChange
	Listeners []ListenerChange
	Exports   []ExportChange
}

// SettingChange is another value of a key outside of the lists.
type SettingChange struct {
	Key      string // such as "log.level"
	Old, New string // JSON
	Restart  bool   // a reload does not do it: the daemon must be started again
}

// GroupChange is a rate that exports share. It changes while they are in use.
type GroupChange struct {
	What     What
	Name     string
	Old, New Rate // zero where there is none
}

// ListenerChange is an address. A listener whose address, or whose export, is
// another one is removed and added.
type ListenerChange struct {
	What     What
	Place    Place
	Export   string    // that it belongs to; "" for those of all
	Old, New *Listener // nil where there is none
	Fields   []string  // the keys that change, for Alter
	Live     bool      // no client notices: else it is closed and opened again
}

// ExportChange is a disk.
type ExportChange struct {
	What     What
	Name     string
	Old, New *Export  // nil where there is none
	Fields   []string // the keys that change, for Alter, without listeners
	Live     bool     // clients stay: else it is closed and opened again
}

// liveFields are the keys of an export that change while it is in use.
// Connections that are open keep the access that they have.
var liveFields = []string{
	"description", "default", "grant", "vsock-trust-cid", "max-connections", "rate", "rate-group", "log-requests",
	"write-threshold", "fault",
}

// To is the change of e to next, which has its name.
func (e *Export) To(next *Export) *ExportChange {
	f := slices.DeleteFunc(fields(e.asOpened(), next.asOpened()), func(f string) bool { return f == "listener" })
	return &ExportChange{What: Alter, Name: next.Name, Old: e, New: next, Fields: f, Live: !slices.ContainsFunc(f, isFixed)}
}

// isFixed tells whether an export is closed and opened again for that key.
func isFixed(key string) bool { return !slices.Contains(liveFields, key) }

// On is New for an export that is in use as live says: the keys of it that the
// control API sets stay as they are, but for Fields.
func (c *ExportChange) On(live *Export) Export {
	x := *c.New
	to, from := reflect.ValueOf(&x).Elem(), reflect.ValueOf(live).Elem()
	for i := range to.NumField() {
		key := to.Type().Field(i).Tag.Get("toml")
		set := key == "readonly" || slices.Contains(liveFields, key)
		if set && !slices.Contains(c.Fields, key) {
			to.Field(i).Set(from.Field(i))
		}
	}
	begins := live.ReadOnly && !x.ReadOnly // to be written to as what nobody says by now
	if x.Format == "" && x.Image == live.Image && live.Format == x.ImageFormat() && !begins {
		x.Format = live.Format // it was taken for raw, whatever the guest has written since
	}
	return x
}

// TakenBack is an export that is in use as live says, without what made after of
// before: each key in which those differ is that of before again, unless somebody has
// set it since.
func TakenBack(before, after, live *Export) Export {
	x := *live
	to, old, set := reflect.ValueOf(&x).Elem(), reflect.ValueOf(before).Elem(), reflect.ValueOf(after).Elem()
	for i := range to.NumField() {
		if same(to.Field(i), set.Field(i)) {
			to.Field(i).Set(old.Field(i))
		}
	}
	return x
}

// AddAbsent makes additions of what changes in exports of c, which c leads to, that
// are not there: their listeners included.
func (c *Change) AddAbsent(to *Config, absent func(name string) bool) {
	changed := map[string]bool{}
	for _, x := range c.Exports {
		changed[x.Name] = x.What == Alter
	}
	for _, l := range c.Listeners {
		if _, other := changed[l.Export]; l.Export != "" && !other {
			changed[l.Export] = true
		}
	}
	for name, x := range to.byName() {
		if changed[name] && absent(name) {
			c.Exports = slices.DeleteFunc(c.Exports, func(x ExportChange) bool { return x.Name == name })
			c.Exports = append(c.Exports, ExportChange{What: Add, Name: name, New: x, Live: true})
		}
	}
	slices.SortFunc(c.Exports, func(a, b ExportChange) int {
		return cmp.Or(cmp.Compare(a.What, b.What), cmp.Compare(a.Name, b.Name))
	})
}

// setting is a key outside of the lists.
type setting struct {
	key     string
	restart bool
	of      func(*Config) any
}

// settings are all of them. Those with restart are needed before the daemon
// gives up its rights, or hold what has no second of its kind.
var settings = []setting{
	{"engine", true, func(c *Config) any { return c.Engine }},
	{"drain-timeout", false, func(c *Config) any { return c.Drain }},
	{"log.level", false, func(c *Config) any { return c.Log.Level }},
	{"log.format", true, func(c *Config) any { return c.Log.Format }},
	{"log.slow-request", false, func(c *Config) any { return c.Log.Slow }},
	{"tls.certificates", true, func(c *Config) any { return c.TLS.Certificates }},
	{"tls.psk", true, func(c *Config) any { return c.TLS.PSK }},
	{"tls.verify-peer", true, func(c *Config) any { return c.TLS.VerifyPeer }},
	{"control.socket", true, func(c *Config) any { return c.Control.Socket }},
	{"control.mode", true, func(c *Config) any { return c.Control.Mode }},
	{"control.owner", true, func(c *Config) any { return c.Control.Owner }},
	{"control.read-users", false, func(c *Config) any { return c.Control.ReadUsers }},
	{"control.read-groups", false, func(c *Config) any { return c.Control.ReadGroups }},
	{"control.change-users", false, func(c *Config) any { return c.Control.ChangeUsers }},
	{"control.change-groups", false, func(c *Config) any { return c.Control.ChangeGroups }},
	{"control.state", true, func(c *Config) any { return c.Control.State }},
	{"metrics.listen", true, func(c *Config) any { return c.Metrics.Listen }},
	{"images.roots", true, func(c *Config) any { return c.Images.Roots }},
}

// Diff says what leads from old to new, both valid and with their defaults. It
// keeps pointers into both.
func Diff(old, new *Config) *Change {
	return &Change{
		Settings:  diffSettings(old, new),
		Groups:    diffGroups(old.Groups, new.Groups),
		Listeners: diffListeners(old, new),
		Exports:   diffExports(old, new),
	}
}

func diffSettings(old, new *Config) (list []SettingChange) {
	for _, s := range settings {
		if a, b := s.of(old), s.of(new); !equal(a, b) {
			list = append(list, SettingChange{s.key, text(a), text(b), s.restart})
		}
	}
	return list
}

// text is a value of a setting as JSON.
func text(v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		return err.Error()
	}
	return string(b)
}

func diffGroups(old, new map[string]Rate) (list []GroupChange) {
	for name, w := range match(old, new) {
		if w != Alter || old[name] != new[name] {
			list = append(list, GroupChange{w, name, old[name], new[name]})
		}
	}
	slices.SortFunc(list, func(a, b GroupChange) int {
		return cmp.Or(cmp.Compare(a.What, b.What), cmp.Compare(a.Name, b.Name))
	})
	return list
}

// match says of each key whether only old has it, both, or only new.
func match[K comparable, V any](old, new map[K]V) map[K]What {
	m := make(map[K]What, len(new))
	for k := range new {
		m[k] = Add
	}
	for k := range old {
		if _, both := new[k]; both {
			m[k] = Alter
		} else {
			m[k] = Remove
		}
	}
	return m
}

// Place is what makes a listener the same in two configurations.
type Place struct {
	export string
	at     address
	nth    int // of those with a port that the kernel chooses
}

// Without is the place of a listener when the one at q is not there any more.
func (p Place) Without(q Place) Place {
	if p.export == q.export && p.at == q.at && p.nth > q.nth {
		p.nth--
	}
	return p
}

// Shared are the listeners that exports share, in their order.
func (c *Config) Shared() iter.Seq2[Place, *Listener] {
	return func(yield func(Place, *Listener) bool) {
		taken := map[Place]bool{}
		for i := range c.Listeners {
			if l := &c.Listeners[i]; !yield(l.place("", taken), l) {
				return
			}
		}
	}
}

// place is where a listener is, after those that have taken places.
func (l *Listener) place(export string, taken map[Place]bool) Place {
	a, err := parseAddress(l.URI)
	if err != nil {
		a = address{kind: l.URI} // not valid, but not lost
	}
	p := Place{export: export, at: a}
	for taken[p] {
		p.nth++
	}
	taken[p] = true
	return p
}

// listeners are all of a configuration.
func (c *Config) listeners() map[Place]*Listener {
	m := maps.Collect(c.Shared())
	taken := map[Place]bool{}
	for i := range c.Exports {
		for j := range c.Exports[i].Listeners {
			l := &c.Exports[i].Listeners[j]
			m[l.place(c.Exports[i].Name, taken)] = l
		}
	}
	return m
}

// SpellAs gives the listeners that old has too the URIs that they have there. A
// listener that is open goes by the URI by which it was opened, and one address
// can be written in several ways.
func (c *Config) SpellAs(old *Config) {
	there := old.listeners()
	for at, l := range c.listeners() {
		if o := there[at]; o != nil {
			l.URI = o.URI
		}
	}
}

func diffListeners(oldConfig, newConfig *Config) (list []ListenerChange) {
	old, new := oldConfig.listeners(), newConfig.listeners()
	m := match(old, new)
	order := slices.SortedFunc(maps.Keys(m), func(a, b Place) int {
		return cmp.Or(cmp.Compare(m[a], m[b]), cmp.Compare(a.export, b.export),
			cmp.Compare(a.at.String(), b.at.String()), cmp.Compare(a.nth, b.nth))
	})
	for _, p := range order {
		c := ListenerChange{What: m[p], Place: p, Export: p.export, Old: old[p], New: new[p], Live: true}
		if c.What == Alter {
			if c.Fields = fields(*c.Old, *c.New); len(c.Fields) == 0 {
				continue
			}
			c.Live = len(c.Fields) == 1 && c.Fields[0] == "exports"
		}
		list = append(list, c)
	}
	return list
}

func diffExports(oldConfig, newConfig *Config) (list []ExportChange) {
	old, new := oldConfig.byName(), newConfig.byName()
	m := match(old, new)
	order := slices.SortedFunc(maps.Keys(m), func(a, b string) int {
		return cmp.Or(cmp.Compare(m[a], m[b]), cmp.Compare(a, b))
	})
	for _, name := range order {
		c := ExportChange{What: m[name], Name: name, Old: old[name], New: new[name], Live: true}
		if c.What == Alter {
			if c = *c.Old.To(c.New); len(c.Fields) == 0 {
				continue
			}
		}
		list = append(list, c)
	}
	return list
}

// asOpened is e with the format that it is opened with: to say the default
// changes nothing.
func (e *Export) asOpened() Export {
	x := *e
	x.Format = x.ImageFormat()
	return x
}

func (c *Config) byName() map[string]*Export {
	m := make(map[string]*Export, len(c.Exports))
	for i := range c.Exports {
		m[c.Exports[i].Name] = &c.Exports[i]
	}
	return m
}

// fields are the keys in which two structs of one type differ, but for the uri
// of a listener, which can be written in several ways.
func fields[T any](a, b T) (list []string) {
	x, y := reflect.ValueOf(a), reflect.ValueOf(b)
	for i := range x.NumField() {
		key := x.Type().Field(i).Tag.Get("toml")
		if key != "uri" && key != "-" && !same(x.Field(i), y.Field(i)) {
			list = append(list, key)
		}
	}
	return list
}

// Misfits says of each key that does not change while an export is in use, and of
// those of its listeners, what it is in e where want has something else. Both have
// their defaults, and one name.
func (e *Export) Misfits(want *Export) (list []string) {
	list = misfits(e.asOpened(), want.asOpened(), append([]string{"listener"}, liveFields...))
	for _, c := range diffListeners(&Config{Exports: []Export{*e}}, &Config{Exports: []Export{*want}}) {
		switch c.What {
		case Alter:
			list = append(list, misfits(*c.Old, *c.New, []string{"uri"})...)
		case Remove:
			list = append(list, fmt.Sprintf("it listens at %q", c.Old.URI))
		case Add:
			list = append(list, fmt.Sprintf("it does not listen at %q", c.New.URI))
		}
	}
	return list
}

// misfits is Misfits of two structs of one type, but for the keys that may
// differ.
func misfits[T any](is, want T, may []string) (list []string) {
	x, y := reflect.ValueOf(is), reflect.ValueOf(want)
	for _, key := range fields(is, want) {
		if slices.Contains(may, key) {
			continue
		}
		i := slices.IndexFunc(reflect.VisibleFields(x.Type()), func(f reflect.StructField) bool { return f.Tag.Get("toml") == key })
		list = append(list, fmt.Sprintf("%s is %s, not %s", key, orNone(x.Field(i)), orNone(y.Field(i))))
	}
	return list
}

// orNone is text of a value that may be absent.
func orNone(v reflect.Value) string {
	if (v.Kind() == reflect.Pointer || v.Kind() == reflect.Slice) && v.IsNil() || v.Kind() == reflect.String && v.Len() == 0 {
		return "none"
	}
	return text(v.Interface())
}

// Empty tells that there is nothing to do.
func (c *Change) Empty() bool {
	return len(c.Settings)+len(c.Groups)+len(c.Listeners)+len(c.Exports) == 0
}

// Restart tells that not all can be done by a reload.
func (c *Change) Restart() bool {
	return slices.ContainsFunc(c.Settings, func(s SettingChange) bool { return s.Restart })
}

// Lines has a line for each change, in the order of the lists. Names are
// quoted, so that a name is never more than a name.
func (c *Change) Lines() []string {
	lines := []string{}
	for _, s := range c.Settings {
		line := fmt.Sprintf("change %s from %s to %s", s.Key, s.Old, s.New)
		if s.Restart {
			line += ": needs a restart"
		}
		lines = append(lines, line)
	}
	for _, g := range c.Groups {
		lines = append(lines, fmt.Sprintf("%v rate-group %q", g.What, g.Name))
	}
	for _, l := range c.Listeners {
		which := l.New
		if which == nil {
			which = l.Old
		}
		line := fmt.Sprintf("%v listener %q", l.What, which.URI)
		if l.Export != "" {
			line += fmt.Sprintf(" of export %q", l.Export)
		}
		lines = append(lines, line+how(l.Fields, l.Live))
	}
	for _, e := range c.Exports {
		lines = append(lines, fmt.Sprintf("%v export %q", e.What, e.Name)+how(e.Fields, e.Live))
	}
	return lines
}

// how says which keys of a thing change, and what that costs.
func how(fields []string, live bool) string {
	if len(fields) == 0 {
		return ""
	}
	s := ": " + strings.Join(fields, ", ")
	if !live {
		s += " (is closed and opened again)"
	}
	return s
}

// String is Lines, each ended; "no changes" if there are none.
func (c *Change) String() string {
	if c.Empty() {
		return "no changes\n"
	}
	return strings.Join(c.Lines(), "\n") + "\n"
}
