package config_test

import (
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/config"
)

const before = `
engine = "auto"
[images]
roots = ["/srv"]
[rate-group.gold]
ops = 1
[rate-group.old]
ops = 1
[[listener]]
uri = "nbd://h:1"
[[listener]]
uri = "nbd://h:2"
exports = ["a"]
[[listener]]
uri = "nbd+unix:///?socket=/s"
[[export]]
name = "a"
image = "/srv/a"
[[export]]
name = "b"
image = "/srv/b"
[[export.listener]]
uri = "nbd://b"
[[export]]
name = "same"
image = "/srv/same"
grant = []
`

const after = `
engine = "pool"
[log]
level = "debug"
[images]
roots = ["/srv", "/dev"]
[rate-group.gold]
ops = 2
[rate-group."new\n"]
[[export]]
name = "same"
image = "/srv/same"
format = "raw"
[[export]]
name = "a"
image = "/srv/a"
description = "x"
rate = { ops = 1 }
default = true
[[export.listener]]
uri = "nbd://b"
[[export]]
name = "b\nc\" \u2028"
image = "/srv/c"
[[export]]
name = "b"
image = "/srv/b2"
log-requests = true
[[listener]]
uri = "nbd+unix:///?socket=/s"
mode = "0660"
[[listener]]
uri = "NBD://H:1"
[[listener]]
uri = "nbd://h:2"
exports = ["b"]
`

func TestDiffInWords(t *testing.T) {
	got := config.Diff(parsed(t, before), parsed(t, after))
	want := `change engine from "auto" to "pool": needs a restart
change log.level from "info" to "debug"
change images.roots from ["/srv"] to ["/srv","/dev"]: needs a restart
remove rate-group "old"
change rate-group "gold"
add rate-group "new\n"
remove listener "nbd://b" of export "b"
change listener "nbd://h:2": exports
change listener "nbd+unix:///?socket=/s": mode (is closed and opened again)
add listener "nbd://b" of export "a"
change export "a": description, default, rate
change export "b": image, log-requests (is closed and opened again)
add export "b\nc\" \u2028"
`
	if got.String() != want {
		t.Errorf("got:\n%s\nwant:\n%s", got, want)
	}
	if !got.Restart() || got.Empty() {
		t.Errorf("Restart %v, Empty %v", got.Restart(), got.Empty())
	}
	if same := config.Diff(parsed(t, after), parsed(t, after)); !same.Empty() || same.Restart() || same.String() != "no changes\n" {
		t.Errorf("nothing changed: %s", same)
	}
	live := parsed(t, before)
	live.Log.Level = "warn"
	if c := config.Diff(parsed(t, before), live); c.Restart() || c.Empty() {
		t.Errorf("a live setting: %s", c)
	}
}

// TestFormatThatWasSaidOnceIsNoWordForWriting: an image without a format goes on
// as what it was taken for, but what nobody could write to as that is asked for its
// format when it becomes writable.
func TestFormatThatWasSaidOnceIsNoWordForWriting(t *testing.T) {
	for _, tt := range []struct {
		name     string
		live, to config.Export
		fields   []string
		want     string
	}{
		{name: "writable", live: config.Export{Format: "raw"}, want: "raw"},
		{name: "read-only", live: config.Export{ReadOnly: true}, to: config.Export{ReadOnly: true}},
		{name: "becomes writable", live: config.Export{Format: "raw", ReadOnly: true}, fields: []string{"readonly"}},
		{name: "stays read-only", live: config.Export{Format: "raw", ReadOnly: true}, to: config.Export{ReadOnly: true}, want: "raw"},
		{name: "is read-only by the API", live: config.Export{Format: "raw", ReadOnly: true}, want: "raw"},
		{name: "becomes read-only", live: config.Export{Format: "raw"}, to: config.Export{ReadOnly: true}, fields: []string{"readonly"}, want: "raw"},
		{name: "another image", live: config.Export{Format: "raw"}, to: config.Export{Image: "/srv/other"}},
		{name: "another format", live: config.Export{Format: "qcow2"}},
		{name: "said", live: config.Export{Format: "raw"}, to: config.Export{Format: "qcow2"}, want: "qcow2"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := config.ExportChange{New: &tt.to, Fields: tt.fields}
			if x := c.On(&tt.live); x.Format != tt.want {
				t.Errorf("got format %q, want %q", x.Format, tt.want)
			}
		})
	}
}

// Listeners whose ports the kernel chooses are as many as they are.
func TestListenersWithPort0AreCounted(t *testing.T) {
	one := parsed(t, "[[listener]]\nuri = \"nbd://h:0\"\n")
	two := parsed(t, "[[listener]]\nuri = \"nbd://h:0\"\n[[listener]]\nuri = \"nbd://h:0\"\n")
	if err := two.Validate(); err != nil {
		t.Fatal(err)
	}
	if got := config.Diff(one, two).String(); got != "add listener \"nbd://h:0\"\n" {
		t.Errorf("got %s", got)
	}
	if got := config.Diff(two, one).String(); got != "remove listener \"nbd://h:0\"\n" {
		t.Errorf("got %s", got)
	}
}

// Every key outside of the lists is one of the settings, so that no difference
// is lost.
func TestEverySettingIsCompared(t *testing.T) {
	a := parsed(t, whole)
	for _, key := range keys(reflect.TypeFor[config.Config](), "") {
		b := parsed(t, whole)
		v := at(reflect.ValueOf(b).Elem(), key)
		spoil(v)
		c := config.Diff(a, b)
		top, _, _ := strings.Cut(key, ".")
		switch {
		case top == "listener" || top == "export" || top == "rate-group":
			continue // below
		case len(c.Settings) != 1 || c.Settings[0].Key != key || len(c.Lines()) != 1:
			t.Errorf("%s: got %v", key, c)
		}
	}
	for _, key := range keys(reflect.TypeFor[config.Export](), "") {
		b := parsed(t, whole)
		spoil(at(reflect.ValueOf(&b.Exports[0]).Elem(), key))
		c := config.Diff(a, b)
		top, _, _ := strings.Cut(key, ".")
		live := slices.Contains([]string{"description", "default", "grant", "vsock-trust-cid", "max-connections", "rate", "rate-group", "log-requests", "write-threshold", "fault"}, top)
		switch {
		case key == "name" || key == "listener":
			if c.Empty() {
				t.Errorf("%s: no change", key)
			}
		case len(c.Exports) != 1 || !slices.Equal(c.Exports[0].Fields, []string{top}) || c.Exports[0].Live != live || len(c.Lines()) != 1:
			t.Errorf("%s: got %v", key, c)
		}
	}
}

// TestEveryKeyIsTakenBackOrWasSetSince: the key of a reload goes back, with what was
// set of another, and stays if it was set itself.
func TestEveryKeyIsTakenBackOrWasSetSince(t *testing.T) {
	export := func(spoilt ...string) *config.Export {
		x := &parsed(t, whole).Exports[0]
		for _, key := range spoilt {
			spoil(at(reflect.ValueOf(x).Elem(), key))
		}
		return x
	}
	for _, key := range keys(reflect.TypeFor[config.Export](), "") {
		other := "description"
		if key == other {
			other = "readonly"
		}
		for _, tt := range []struct {
			what       string
			live, want *config.Export
		}{
			{"nothing was set", export(key), export()},
			{"another was set", export(key, other), export(other)},
			{"it was set back", export(), export()},
		} {
			if got := config.TakenBack(export(), export(key), tt.live); !reflect.DeepEqual(&got, tt.want) {
				t.Errorf("%s, %s: got %+v, want %+v", key, tt.what, got, tt.want)
			}
		}
	}
	text := [...]string{"old", "new", "set"}
	got := config.TakenBack(&config.Export{Description: text[0]}, &config.Export{Description: text[1]}, &config.Export{Description: text[2]})
	if got.Description != text[2] {
		t.Errorf("a key that was set itself: got %q, want %q", got.Description, text[2])
	}
}

// keys are the keys of a struct and of the structs in it.
func keys(rt reflect.Type, prefix string) (list []string) {
	for i := range rt.NumField() {
		f := rt.Field(i)
		ft := f.Type
		if f.Tag.Get("toml") == "-" {
			continue
		}
		if ft.Kind() == reflect.Pointer {
			ft = ft.Elem()
		}
		key := prefix + f.Tag.Get("toml")
		if ft.Kind() == reflect.Struct {
			list = append(list, keys(ft, key+".")...)
		} else {
			list = append(list, key)
		}
	}
	return list
}

func at(v reflect.Value, key string) reflect.Value {
	for name := range strings.SplitSeq(key, ".") {
		v = reflect.Indirect(v)
		i := slices.IndexFunc(reflect.VisibleFields(v.Type()), func(f reflect.StructField) bool { return f.Tag.Get("toml") == name })
		v = v.Field(i)
	}
	return v
}

// spoil changes a value.
func spoil(v reflect.Value) {
	switch v.Kind() {
	case reflect.Pointer:
		p := reflect.New(v.Type().Elem())
		p.Elem().Set(v.Elem())
		spoil(p.Elem())
		v.Set(p)
	case reflect.String:
		v.SetString(v.String() + "x")
	case reflect.Bool:
		v.SetBool(!v.Bool())
	case reflect.Int, reflect.Int64:
		v.SetInt(v.Int() + 1)
	case reflect.Slice:
		v.Set(v.Slice(0, v.Len()-1))
	case reflect.Map:
		v.SetZero()
	default:
		panic(v.Kind())
	}
}

// apply does what c says to a copy of old, and looks at nothing of the new
// configuration that c does not name.
func apply(t *testing.T, old *config.Config, c *config.Change) *config.Config {
	t.Helper()
	n := *old
	for _, s := range c.Settings {
		v := reflect.New(at(reflect.ValueOf(n), s.Key).Type())
		if err := json.Unmarshal([]byte(s.New), v.Interface()); err != nil {
			t.Fatal(err)
		}
		at(reflect.ValueOf(&n).Elem(), s.Key).Set(v.Elem())
	}
	n.Groups = maps.Clone(old.Groups)
	if n.Groups == nil {
		n.Groups = map[string]config.Rate{}
	}
	for _, g := range c.Groups {
		if delete(n.Groups, g.Name); g.What != config.Remove {
			n.Groups[g.Name] = g.New
		}
	}
	shared := slices.Clone(old.Listeners)
	own := map[string][]config.Listener{}
	n.Exports = slices.Clone(old.Exports)
	for _, e := range old.Exports {
		own[e.Name] = slices.Clone(e.Listeners)
	}
	for _, l := range c.Listeners {
		list := &shared
		if l.Export != "" {
			x := own[l.Export]
			list = &x
		}
		if l.Old != nil {
			*list = slices.Delete(*list, index(t, *list, l.Old), index(t, *list, l.Old)+1)
		}
		if l.New != nil {
			*list = append(*list, *l.New)
		}
		if l.Export != "" {
			own[l.Export] = *list
		}
	}
	n.Listeners = shared
	for _, e := range c.Exports {
		if e.Old != nil {
			n.Exports = slices.DeleteFunc(n.Exports, func(x config.Export) bool { return x.Name == e.Name })
		}
		if e.New != nil {
			n.Exports = append(n.Exports, *e.New)
		}
	}
	for i := range n.Exports {
		n.Exports[i].Listeners = own[n.Exports[i].Name]
	}
	return &n
}

func index(t *testing.T, list []config.Listener, l *config.Listener) int {
	t.Helper()
	i := slices.IndexFunc(list, func(x config.Listener) bool { return x.URI == l.URI })
	if i < 0 {
		t.Fatalf("listener %q is changed and not there", l.URI)
	}
	return i
}

// random is a valid configuration, made of few parts so that two have much in
// common.
func random(r *rand.Rand) *config.Config {
	c := &config.Config{Groups: map[string]config.Rate{}}
	c.Engine = []string{"auto", "uring", "pool"}[r.IntN(3)]
	c.Log.Level = []string{"info", "debug"}[r.IntN(2)]
	c.Log.Slow = config.Duration(r.IntN(2))
	if b := r.IntN(2) == 0; r.IntN(2) == 0 {
		c.TLS.VerifyPeer = &b
	}
	c.Images.Roots = [][]string{nil, {}, {"/srv"}, {"/srv", "/a"}}[r.IntN(4)]
	for i := range 3 {
		if r.IntN(2) == 0 {
			c.Groups[fmt.Sprint(i)] = config.Rate{Ops: int64(r.IntN(2))}
		}
	}
	for i := range r.IntN(6) { // each address once
		if r.IntN(2) == 0 {
			l := config.Listener{URI: []string{"nbd://h", "nbd://h:10809/", "nbd+unix:///?socket=/s"}[r.IntN(3)]}
			switch {
			case i == 0:
			case strings.Contains(l.URI, "unix"):
				l.URI, l.Mode = fmt.Sprintf("nbd+unix:///?socket=/s%d", i), []string{"", "0660"}[r.IntN(2)]
			default:
				l.URI, l.TLS = fmt.Sprintf("nbd://h%d", i), []string{"", "on"}[r.IntN(2)]
			}
			c.Listeners = append(c.Listeners, l)
		}
	}
	for i := range 5 {
		if r.IntN(2) == 0 {
			c.Exports = append(c.Exports, randomExport(r, i))
		}
	}
	r.Shuffle(len(c.Exports), func(i, j int) { c.Exports[i], c.Exports[j] = c.Exports[j], c.Exports[i] })
	c.SetDefaults()
	return c
}

func randomExport(r *rand.Rand, i int) config.Export {
	e := config.Export{Name: fmt.Sprint(i), Image: fmt.Sprintf("/srv/%d", 2*i+r.IntN(2)), ReadOnly: r.IntN(2) == 0, LogRequests: r.IntN(2) == 0}
	if r.IntN(2) == 0 {
		e.Grants = []config.Grant{{Access: "rw", UIDs: [][]uint32{nil, {}, {1}, {1, 2}}[r.IntN(4)]}}
	}
	if r.IntN(2) == 0 {
		e.Rate = &config.Rate{Bytes: config.Size(r.IntN(2))}
	}
	if r.IntN(2) == 0 {
		e.Listeners = []config.Listener{{URI: fmt.Sprintf("nbd://e%d:%d", i, r.IntN(2)+1), TLS: []string{"", "on"}[r.IntN(2)]}}
	}
	return e
}

// Doing what the difference says makes the one configuration the other, and
// needs nothing else of it.
func TestAppliedDifferenceIsTheOther(t *testing.T) {
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 0))
	some := 0
	for range 2000 {
		old, new := random(r), random(r)
		for _, c := range []*config.Config{old, new} {
			if err := c.Validate(); err != nil {
				t.Fatalf("seed %d: %v", seed, err)
			}
		}
		c := config.Diff(old, new)
		some += len(c.Lines())
		got := apply(t, old, c)
		if left := config.Diff(got, new); !left.Empty() {
			t.Fatalf("seed %d: after\n%sthere is still\n%s", seed, c, left)
		}
		if len(got.Exports) != len(new.Exports) || len(got.Listeners) != len(new.Listeners) {
			t.Fatalf("seed %d: after\n%sthere are %d exports and %d listeners", seed, c, len(got.Exports), len(got.Listeners))
		}
		if same := config.Diff(new, new); !same.Empty() {
			t.Fatalf("seed %d: a configuration differs from itself: %s", seed, same)
		}
		if again := config.Diff(old, new); again.String() != c.String() {
			t.Fatalf("seed %d: first\n%sthen\n%s", seed, c, again)
		}
	}
	if some < 2000 {
		t.Errorf("seed %d: only %d changes in all", seed, some)
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{whole, before, after, "a.b = [{c = 1}]\n", "[[export]]\n[export.rate]\n[[export.grant]]\nuid = [0x1, 1_0]\n"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := config.Parse("f", b)
		if err != nil {
			if err.Error() == "" {
				t.Fatalf("%q: an error without a text", b)
			}
			return
		}
		c.SetDefaults()
		if c.Validate() != nil {
			return
		}
		if d := config.Diff(c, c); !d.Empty() {
			t.Fatalf("%q differs from itself: %s", b, d)
		}
		for _, line := range config.Diff(new(config.Config), c).Lines() {
			if strings.ContainsAny(line, "\n\r\x00") {
				t.Fatalf("%q: line %q", b, line)
			}
		}
		again, err := config.Parse("f", b)
		if err != nil {
			t.Fatal(err)
		}
		again.SetDefaults()
		if d := config.Diff(c, again); !d.Empty() {
			t.Fatalf("%q is read in two ways: %s", b, d)
		}
	})
}
