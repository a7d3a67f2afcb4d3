package config_test

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// parsed is a file with its defaults.
func parsed(t testing.TB, text string) *config.Config {
	t.Helper()
	c, err := config.Parse("f", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	c.SetDefaults()
	return c
}

// texts are the lines of the problems in err.
func texts(t testing.TB, err error) []string {
	t.Helper()
	if err == nil {
		return nil
	}
	ps, ok := errors.AsType[config.Problems](err)
	if !ok {
		t.Fatalf("error is a %T: %v", err, err)
	}
	var list []string
	for _, p := range ps {
		list = append(list, p.String())
	}
	return list
}

// good are valid, and bad what the problem begins with.
var (
	goodListeners = []string{
		"nbd://127.0.0.1:10809", "nbd://[::1]", "nbds://[fe80::1%25eth0]:1", "nbds://host.example:0", "NBD://a", "nbd://a/",
		"nbd+unix:///?socket=/run/a", "nbd+unix:///?socket=/run/a+b%20c", "nbds+unix://?socket=/s",
		"nbd+vsock://3:70000", "nbd+vsock://:1", "nbd+vsock://4294967295",
		"systemd:nbd", "systemd:vmdiskd@vm1.socket", "systemd:a,b", "systemd:" + strings.Repeat("a", 255),
	}
	badListeners = map[string]string{
		"": "scheme", "http://a": "scheme", "nbd:a": "the scheme is not", "nbd://": "it needs a host", "nbd://a/disk": "it names an export",
		"nbd://a?x=1": "parameters", "nbd://a?": "parameters", "nbd://a#b": "a fragment", "nbd://u@a": "a user", "nbd://a:65536": "port",
		"nbd://a:x": "it is not a URI", "nbd://a%00b": "it is not a URI", "nbd://a,b": "host", "nbd+unix://a/?socket=/s": "host",
		"nbd+unix:///": "it needs the parameter", "nbd+unix:///?socket=/a&x=1": "it needs the parameter",
		"nbd+unix:///?x=1": "it needs the parameter", "nbd+unix:///?socket=a": "the path of the socket, \"a\", is not absolute",
		"nbd+unix:///?socket=/a/../b": "write the path", "nbd+unix:///?socket=/%zz": "the path",
		"nbd+unix:///?socket=/%00": "the path of the socket has a zero", "nbd+unix:///?socket=/" + strings.Repeat("a", 107): "the path of the socket has 108",
		"nbd+vsock://a": "vsock context id", "nbd+vsock://4294967296": "vsock context id", "nbd+vsock://2:4294967295": "port",
		"systemd:": "it needs the name", "systemd:a b": "\"a b\" is no name", "systemd:a:b": "\"a:b\" is no name", "systemd:é": "\"é\" is no name",
		"systemd:" + strings.Repeat("a", 256): "the name of the socket has 256", "systemd:listener-1": "names that begin", "systemd:a\n": "\"a\\n\" is no name",
		"nbd://" + strings.Repeat("a", 10000): "it is too long",
	}
)

// TestPlaintextForNetworksIsAskedFor: TLS may also be demanded by what is found
// at the listener alone. What a name stands for is not known here.
func TestPlaintextForNetworksIsAskedFor(t *testing.T) {
	const export = "[[export]]\nname = \"a\"\nimage = \"/a\"\n"
	for _, tt := range []struct {
		host string
		open bool
	}{
		{"127.0.0.1", false}, {"127.1.2.3", false}, {"[::1]", false}, {"[::ffff:127.0.0.1]", false}, {"host.example", false},
		{"0.0.0.0", true}, {"[::]", true}, {"192.0.2.1", true}, {"[::ffff:192.0.2.1]", true}, {"[fe80::1%25eth0]", true},
	} {
		uri := "uri = \"nbd://" + tt.host + "\"\n"
		for text, refused := range map[string]bool{
			"[[listener]]\n" + uri:                                                        tt.open,
			"[[listener]]\n" + uri + "tls = \"on\"\n":                                     tt.open,
			"[[listener]]\n" + uri + "tls = \"require\"\n":                                false,
			"[[listener]]\n" + uri + "insecure-plaintext = true\n":                        false,
			export + "[[export.listener]]\n" + uri + "tls = \"on\"\n":                     tt.open,
			export + "require-tls = true\n[[export.listener]]\n" + uri + "tls = \"on\"\n": false,
		} {
			got := texts(t, parsed(t, text).Validate())
			if refused != (len(got) == 1 && strings.Contains(got[0], "is open to networks in plaintext")) || !refused && got != nil {
				t.Errorf("%s: got %q, want it refused: %v", text, got, refused)
			}
		}
	}
}

func TestListenerURIs(t *testing.T) {
	check := func(uri string) []string {
		c := new(config.Config)
		c.Listeners = []config.Listener{{URI: uri}}
		c.SetDefaults()
		return texts(t, c.Validate())
	}
	for _, uri := range goodListeners {
		if got := check(uri); got != nil {
			t.Errorf("%q: %q", uri, got)
		}
	}
	for uri, want := range badListeners {
		got := check(uri)
		if len(got) != 1 || !strings.HasPrefix(got[0], "listener 1: uri: ") || !strings.Contains(got[0], ": "+want) {
			t.Errorf("%.80q: got %q, want %q", uri, got, want)
		}
	}
}

func TestProblemsHaveTheirPlace(t *testing.T) {
	const a = "[[export]]\nname = \"a\"\nimage = \"/a\"\n"
	const q = a + "format = \"qcow2\"\n"
	const m = "[[export]]\nname = \"a\"\nformat = \"mem\"\n"
	in := func(p string) string { return `export "a"` + p + ": " }
	for _, tt := range []struct{ in, want string }{
		{`engine = "aio"`, `engine: "aio" is not one of auto, uring, pool`},
		{`drain-timeout = "-1s"`, `drain-timeout: -1s is not positive`},
		{"[log]\nlevel = \"loud\"", `log: level: "loud"`},
		{"[log]\nformat = \"xml\"", `log: format: "xml"`},
		{"[log]\nslow-request = \"-1s\"", `log: slow-request: -1`},
		{"[tls]\ncertificates = \"pki\"", `tls: certificates: "pki" is not an absolute path`},
		{"[control]\nmode = \"0600\"", `control: without a socket`},
		{"[control]\nread-users = [\"a\"]", `control: without a socket`},
		{"[control]\nsocket = \"/s\"\nmode = \"0888\"", `control: mode: "0888"`},
		{"[control]\nsocket = \"/s\"\nmode = \"1777\"", `control: mode: "1777"`},
		{"[control]\nsocket = \"/s\"\nmode = \"0\"", `control: mode: "0"`},
		{"[control]\nsocket = \"/s\"\nowner = \":\"", `control: owner: ""`},
		{"[control]\nsocket = \"/s\"\nowner = \"a:b:c\"", `control: owner: "b:c"`},
		{"[control]\nsocket = \"/s\"\nchange-users = [\"\"]", `control: change-users: ""`},
		{"[control]\nsocket = \"/s\"\nread-groups = [\"a\\u0000\"]", `control: read-groups: "a\x00" has a control`},
		{"[control]\nsocket = \"/s\"\nread-users = [\"nobody\"]", `control: read-users: "nobody" is never let in`},
		{"[control]\nsocket = \"/s\"\nchange-groups = [\"65534\"]", `control: change-groups: "65534" is never let in`},
		{"[control]\nsocket = \"/s/\"", `control: socket: write "/s/" as "/s"`},
		{"[control]\nsocket = \"/" + strings.Repeat("s", 107) + "\"", `control: socket: the path has 108 bytes`},
		{"[control]\nsocket = \"/s\"\nstate = \"s\"", `control: state: "s"`},
		{"[metrics]\nlisten = \"9000\"", `metrics: listen: "9000" is not HOST:PORT`},
		{"[metrics]\nlisten = \"a:b\"", `metrics: listen: "a:b" is not HOST:PORT`},
		{"[images]\nroots = [\"/a/../b\"]", `images: roots: "/a/../b" has ".." in it`},
		{"[rate-group.\"\"]\nops = 1", `rate-group "": it needs a name`},
		{"[rate-group.g]\nops = -1", `rate-group "g": ops: -1 is negative`},

		{"[[listener]]\nuri = \"nbd://a\"\nmode = \"0600\"", "listener 1: mode, owner and labels are for"},
		{"[[listener]]\nuri = \"nbd://a\"\nselinux-label = \"u:r:t:s0\"", "listener 1: mode, owner and labels are for"},
		{"[[listener]]\nuri = \"nbd+unix:///?socket=/s\"\nselinux-label = \"svirt_t\"", `listener 1: selinux-label: "svirt_t" is not an SELinux context`},
		{"[[listener]]\nuri = \"nbd+unix:///?socket=/s\"\nselinux-path-label = \"u:r:t:s0:c1024\"", `listener 1: selinux-path-label: "u:r:t:s0:c1024" is not`},
		{"[[listener]]\nuri = \"nbd://1.2.3.4\"", `listener 1: uri: "nbd://1.2.3.4" is open to networks in plaintext: say tls = "require", as nbds:// does, or insecure-plaintext = true`},
		{"[[listener]]\nuri = \"nbd://[::]\"\ntls = \"on\"", `listener 1: uri: "nbd://[::]" is open to networks`},
		{a + "[[export.listener]]\nuri = \"nbd://0.0.0.0:0\"", in(", listener 1") + `uri: "nbd://0.0.0.0:0" is open to networks`},
		{"[[listener]]\nuri = \"nbd+vsock://2\"\ninsecure-plaintext = true", `listener 1: insecure-plaintext is for TCP`},
		{"[[listener]]\nuri = \"nbd://a\"\ntls = \"yes\"", `listener 1: tls: "yes"`},
		{"[[listener]]\nuri = \"NBDS://a\"\ntls = \"on\"", "listener 1: tls: the scheme"},
		{"[[listener]]\nuri = \"nbd+unix:///?socket=/s\"\nmode = \"rw\"", `listener 1: mode: "rw"`},
		{"[[listener]]\nuri = \"nbd+unix:///?socket=/s\"\nowner = \"a b\"", `listener 1: owner: "a b"`},
		{"[[listener]]\nuri = \"nbd://a\"\nexports = [\"x\"]", `listener 1: exports: there is none that is called "x"`},
		{"[[listener]]\nuri = \"nbd://1.2.3.4\"\ninsecure-plaintext = true\n[[listener]]\nuri = \"nbds://[::ffff:1.2.3.4]:10809\"", `listener 2: uri: "nbds://[::ffff:1.2.3.4]:10809" is the address of listener 1 too`},
		{"[[listener]]\nuri = \"nbd+vsock://0\"\n[[listener]]\nuri = \"nbd+vsock://4294967295:10809\"", `listener 2: uri: `},
		{"[[listener]]\nuri = \"nbd://h\"\n" + a + "[[export.listener]]\nuri = \"nbd://H:10809\"", `export "a", listener 1: uri: "nbd://H:10809" is the address of listener 1 too`},
		{a + "[[export.listener]]\nuri = \"nbd://h\"\nexports = [\"a\"]", in(", listener 1") + "exports: here is only the one"},
		{a + "require-tls = true\n[[export.listener]]\nuri = \"nbd://h\"", in("") + "require-tls: none of its"},

		{"[[export]]\nimage = \"/a\"", "export 1: it needs a name"},
		{a + "[[export]]\nname = \"a\"\nimage = \"/b\"", in("") + "export 1 has the same name"},
		{a + "default = true\n[[export]]\nname = \"b\"\nimage = \"/b\"\ndefault = true", `export "b": export "a" is the default already`},
		{"[[export]]\nname = \"a\\nb\"\nimage = \"/a\"", `export "a\nb": name: "a\nb" has a control character`},
		{"[[export]]\nname = \"a?" + strings.Repeat("aB0", 21) + "9\"\nimage = \"/a\"", `export "a?aB0` + strings.Repeat("aB0", 20) + `9": name: it ends like one with a token`},
		{"[[export]]\nname = \"a\"\nimage = \"a\"", in("") + `image: "a" is not an absolute path`},
		{"[[export]]\nname = \"a\"", in("") + "image: it needs a path"},
		{"[[export]]\nname = \"a\"\nimage = \"fd:0\"", in("") + `image: "fd:0" is not an absolute path`},
		{"[[export]]\nname = \"a\"\nimage = \"/a\\u0000\"", in("") + `image: "/a\x00" has a control`},
		{a + "description = \"a\\u0007\"", in("") + `description: "a\a" has a control`},
		{a + "format = \"vhd\"", in("") + `format: "vhd"`},
		{a + "cache = \"fast\"", in("") + `cache: "fast"`},
		{a + "image-lock = \"maybe\"", in("") + `image-lock: "maybe"`},
		{a + "max-connections = -1", in("") + "max-connections: -1 is negative"},
		{a + "write-threshold = -1", in("") + "write-threshold: -1 is negative"},
		{a + "backing = \"deny\"", in("") + "backing: it needs format qcow2"},
		{a + "backing-files = [\"/b\"]", in("") + "backing-files: it needs format qcow2"},
		{a + "data-files = [\"/b\"]", in("") + "data-files: it needs format qcow2"},
		{a + "snapshot = \"s\"", in("") + "snapshot: it needs format qcow2"},
		{a + "discard = \"keep\"", in("") + "discard: it needs format qcow2"},
		{a + "l2-cache-size = \"4M\"", in("") + "l2-cache-size: it needs format qcow2"},
		{q + "l2-cache-size = \"1K\"", in("") + "l2-cache-size: 1024 is not from 1048576 to 4294967296"},
		{q + "l2-cache-size = \"5G\"", in("") + "l2-cache-size: 5368709120 is not from 1048576 to 4294967296"},
		{a + "lenient = true", in("") + "lenient: it needs format qcow2"},
		{q + "lenient = true", in("") + "lenient: it needs readonly"},
		{q + "discard = \"free\"", in("") + `discard: "free"`},
		{q + "backing = \"any\"", in("") + `backing: "any"`},
		{q + "backing = \"beneath=b\"", in("") + `backing: "b" is not an absolute path`},
		{q + "backing = \"explicit\"", in("") + "backing: explicit, and"},
		{q + "backing = \"same-dir\"\nbacking-files = [\"/b\"]", in("") + "backing: explicit, and"},
		{q + "backing-files = [\"\"]", in("") + "backing-files: it needs a path"},
		{q + "data-files = [\"b\"]", in("") + `data-files: "b" is not an absolute path`},
		{m, in("") + `image: for format mem it is a size`},
		{m + "image = \"0\"", in("") + `image: for format mem it is a size`},
		{m + "image = \"1M\"\ncache = \"none\"", in("") + "cache: mode none needs a file"},
		{m + "image = \"1M\"\nwrite-threshold = 512", in("") + "write-threshold: format mem has no file"},
		{"[images]\nroots = [\"/srv\"]\n" + a, in("") + `image: "/a" is not in a folder`},
		{"[images]\nroots = [\"/srv\"]\n" + strings.Replace(a, "/a", "/srv", 1), in("") + `image: "/srv" is not in a folder`},
		{"[images]\nroots = [\"/srv\"]\n" + strings.Replace(a, "/a", "/srv2/a", 1), in("") + `image: "/srv2/a" is not in a folder`},
		{"[images]\nroots = [\"/srv\"]\n" + strings.Replace(a, "/a", "/srv/../a", 1), in("") + `image: "/srv/../a" has ".." in it`},
		{"[images]\nroots = [\"/srv\"]\n" + strings.Replace(q, "/a", "/srv/a", 1) + "backing = \"beneath=/b\"", in("") + `backing: "/b" is not in a folder`},
		{"[images]\nroots = [\"/srv\"]\n" + strings.Replace(q, "/a", "/srv/a", 1) + "backing-files = [\"/b:raw\"]", in("") + `backing-files: "/b" is not in a folder`},

		{a + "window = { partition = 129 }", in(", window") + "partition: want 1 to 128"},
		{a + "window = { partition = 1, offset = 512 }", in(", window") + "partition excludes"},
		{a + "window = { sector-size = 512 }", in(", window") + "sector-size: it needs partition"},
		{a + "window = { partition = 1, sector-size = 256 }", in(", window") + "sector-size: want a power of two from 512"},
		{a + "window = { partition = 1, sector-size = 1000 }", in(", window") + "sector-size: want a power of two from 512"},
		{a + "window = { partition = 1, sector-size = -512 }", in(", window") + "sector-size: want a power of two from 512"},
		{a + "window = { partition = 1, sector-size = \"128K\" }", in(", window") + "sector-size: want a power of two from 512"},
		{a + "window = { offset = -1 }", in(", window") + "offset -1"},
		{a + "window = { offset = 9223372036854775807, length = 1 }", in(", window") + "offset 9223372036854775807 and length 1 are beyond"},
		{a + "overlay = {}", in(", overlay") + "quota: it must be"},
		{a + "protect = [{ offset = 1 }]", in(", protect 1") + "length: the range is empty"},
		{a + "block-size = { minimum = 3 }", in(", block-size") + "minimum: want a power of two"},
		{a + "block-size = { minimum = \"128K\" }", in(", block-size") + "minimum: want a power of two"},
		{a + "block-size = { minimum = 4096, maximum = 512 }", in(", block-size") + "maximum: it is smaller"},
		{a + "rate = { write-bytes = -1 }", in(", rate") + "write-bytes: -1 is negative"},
		{a + "rate = { burst = \"2h\" }", in(", rate") + "burst: want 0s to 1h"},
		{a + "rate-group = \"g\"", in("") + `rate-group: there is none that is called "g"`},
		{a + "fault = [{}]", in(", fault 1") + "it has neither"},
		{a + "fault = [{ error = \"EPERM\" }]", in(", fault 1") + `error: "EPERM"`},
		{a + "fault = [{ error = \"EIO\", ops = [\"discard\"] }]", in(", fault 1") + `ops: "discard"`},
		{a + "fault = [{ error = \"EIO\", probability = nan }]", in(", fault 1") + "probability: NaN"},
		{a + "fault = [{ error = \"EIO\", probability = 1.5 }]", in(", fault 1") + "probability: 1.5"},
		{a + "fault = [{ error = \"EIO\", count = -1 }]", in(", fault 1") + "count: -1"},
		{a + "fault = [{ delay = \"-1s\" }]", in(", fault 1") + "delay: want 0s"},

		{a + "grant = [{ access = \"all\", uid = [1] }]", in(", grant 1") + `access: "all"`},
		{a + "grant = [{ access = \"rw\" }, { access = \"ro\", uid = [1] }]", in(", grant 2") + "it is never reached: grant 1"},
		{a + "grant = [{ access = \"ro\", uid = [1], cid = [3] }]", in(", grant 1") + "no peer matches"},
		{a + "grant = [{ access = \"rw\", label = \"l\", address = [\"::1\"] }]", in(", grant 1") + "no peer matches"},
		{a + "grant = [{ access = \"ro\", selinux-type = [\"svirt_t\"], cid = [3] }]", in(", grant 1") + "no peer matches"},
		{a + "grant = [{ access = \"rw\", selinux-type = [\"svirt_t:s0\"] }]", in(", grant 1") + `selinux-type: "svirt_t:s0" is no name`},
		{a + "grant = [{ access = \"rw\", selinux-type = [\"\"] }]", in(", grant 1") + `selinux-type: "" is no name`},
		{a + "grant = [{ access = \"rw\", selinux-level = \"c1,c2\" }]", in(", grant 1") + `selinux-level: "c1,c2": not an SELinux context`},
		{a + "grant = [{ access = \"rw\", selinux-level = \"s0\" }, { access = \"ro\" }, { access = \"ro\" }]", in(", grant 3") + "it is never reached: grant 2"},
		{a + "grant = [{ access = \"ro\", cid = [4294967295] }]", in(", grant 1") + "cid: 4294967295"},
		{a + "grant = [{ access = \"none\", gid = [1, 65534] }]", in(", grant 1") + "gid: 65534"},
		{a + "grant = [{ access = \"rw\", uid = [65534, 1] }]", in(", grant 1") + "uid: 65534"},
		{a + "grant = [{ access = \"rw\", address = [\"192.168.0\"] }]", in(", grant 1") + `address: "192.168.0" is not`},
		{a + "grant = [{ access = \"rw\", cert-name = [\"\"] }]", in(", grant 1") + "cert-name: it is empty"},
	} {
		got := texts(t, parsed(t, tt.in).Validate())
		if len(got) != 1 || !strings.HasPrefix(got[0], tt.want) {
			t.Errorf("%.200q:\ngot  %q\nwant %q", tt.in, got, tt.want)
		}
	}
}

// TestOneImageHasOneWriter: two exports of it are refused where their locks would
// let only one be open.
func TestOneImageHasOneWriter(t *testing.T) {
	const writing = `export "b": image: export "a" has it open for writing`
	const reading = `export "b": image: export "a" has it open for reading`
	for _, tt := range []struct{ a, b, want string }{
		{"", "", writing},
		{"", "readonly = true", writing},
		{"readonly = true", "", reading},
		{"readonly = true", "readonly = true", ""},
		{"image-lock = \"off\"", "", ""},
		{"", "image-lock = \"off\"", ""},
		{"image-lock = \"auto\"", "image-lock = \"on\"", writing},
		{"", "window = { offset = 4096 }", writing},
		{"", "format = \"qcow2\"", writing},
		{"format = \"qcow2\"", "format = \"qcow2\"\nreadonly = true\nsnapshot = \"1\"", writing},
		{"format = \"qcow2\"\nsnapshot = \"2\"", "format = \"qcow2\"\nsnapshot = \"1\"", writing},
		{"format = \"qcow2\"\nreadonly = true\nsnapshot = \"2\"", "format = \"qcow2\"\nreadonly = true\nsnapshot = \"1\"", ""},
	} {
		c := parsed(t, "[[export]]\nname = \"a\"\nimage = \"/i\"\n"+tt.a+"\n[[export]]\nname = \"b\"\nimage = \"/i\"\n"+tt.b)
		switch got := texts(t, c.Validate()); {
		case tt.want == "" && len(got) == 0:
		case tt.want == "" || len(got) != 1 || !strings.HasPrefix(got[0], tt.want):
			t.Errorf("%q and %q: got %q, want %q", tt.a, tt.b, got, tt.want)
		}
	}
	c := parsed(t, strings.Repeat("[[export]]\nname = \"NAME\"\nimage = \"1M\"\nformat = \"mem\"\n", 2))
	c.Exports[1].Name = "b"
	if err := c.Validate(); err != nil {
		t.Errorf("two disks of one size: %v", err)
	}
}

// TestOneImageMayHaveAnOverlay: below that of a snapshot it is only read.
func TestOneImageMayHaveAnOverlay(t *testing.T) {
	dir := t.TempDir()
	c := parsed(t, fmt.Sprintf(`
control = { socket = "/s", state = %q }
export = [{ name = "a", image = "/i", format = "qcow2" }, { name = "b", image = "/i", format = "qcow2", readonly = true }]
`, dir))
	if got := texts(t, c.Validate()); len(got) != 1 || !strings.HasPrefix(got[0], `export "b": image: export "a" has it open`) {
		t.Errorf("without an overlay: got %q", got)
	}
	of := config.ImageOf(c.Exports[0])
	serve := of
	serve.Image = "/overlay"
	if err := config.WriteInstead(dir, config.Instead{Of: of, Serve: serve}); err != nil {
		t.Fatal(err)
	}
	if err := c.Validate(); err != nil {
		t.Errorf("with an overlay above that of a: %v", err)
	}
}

func TestTokensOfAGrant(t *testing.T) {
	const sum = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	for in, want := range map[string]string{
		sum:                                sum,
		strings.ToUpper(sum):               sum,
		sum + "@2026-11-21T12:00:00Z":      sum + "@2026-11-21T12:00:00Z",
		sum + "@2026-11-21T12:00:00+01:00": sum + "@2026-11-21T11:00:00Z",
		sum + "@9999-12-31T23:59:59Z":      sum + "@9999-12-31T23:59:59Z",
	} {
		if got, err := config.ParseToken(in); err != nil || got.String() != want {
			t.Errorf("%q: got %q, %v; want %q", in, got, err, want)
		}
	}
	for _, in := range []string{
		"", "@", sum[:62], sum + "00", "x" + sum[1:], sum + "@", sum + "@24h", sum + "@2026-11-21", sum + "@2026-11-21T12:00:00",
		sum + "@2026-11-21T12:00:00.5Z", sum + "@2026-02-30T12:00:00Z", sum + "@0001-01-01T00:00:00Z", sum + "@9999-12-31T23:59:59-01:00",
		sum + "@2026-11-21T12:00:00Z@2026-11-21T12:00:00Z", sum + "@10000-01-01T00:00:00Z", sum + "@" + strings.Repeat("9", 1<<16),
	} {
		_, err := config.ParseToken(in)
		if err == nil {
			t.Errorf("%.200q was taken", in)
		} else if len(in) > 1 && strings.Contains(err.Error(), in) || strings.Contains(err.Error(), sum[:16]) {
			t.Errorf("%.200q: the error repeats it: %v", in, err)
		}
	}
}

func TestExportMayBeReadOnlyOverVsock(t *testing.T) {
	for text, want := range map[string]bool{
		"":                              true,
		"grant = [{ access = \"rw\" }]": true,
		"grant = [{ access = \"rw\", psk = [\"a\"] }]":               true,
		"grant = [{ access = \"rw\", uid = [1] }]":                   false,
		"grant = [{ access = \"rw\", address = [\"::1\"] }]":         false,
		"grant = [{ access = \"ro\", cid = [3] }]":                   false,
		"grant = [{ access = \"rw\", vm = [\"a\"], psk = [\"a\"] }]": false,
		"readonly = true":        false,
		"vsock-trust-cid = true": false,
	} {
		c := parsed(t, "[[export]]\nname = \"a\"\nimage = \"/a\"\n"+text)
		if got := c.Exports[0].ReadOnlyOverVsock(); got != want {
			t.Errorf("%q: got %v", text, got)
		}
	}
}

// TestWritingOverVsockNeedsProof: a CID is an address and proves nothing.
// Grants that others match as well are valid: vsock peers only read by them.
func TestWritingOverVsockNeedsProof(t *testing.T) {
	const sum = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	const vsock, unix = "\n[[listener]]\nuri = \"nbd+vsock://2\"", "\n[[listener]]\nuri = \"nbd+unix:///?socket=/s\""
	const switched = ", or an export with vsock-trust-cid = true"
	grant := func(facts string) string { return "grant = [{ access = \"rw\", " + facts + " }]" }
	both, key, first := "writing over vsock needs vm, and psk or token-sha256", "writing over vsock needs psk or token-sha256", ", grant 1: "
	for _, tt := range []struct{ export, rest, want string }{
		{grant("cid = [3]"), "", first + both},
		{grant("cid = [3]"), unix, first + both},
		{grant("cid = [3], psk = [\"a\"]"), "", first + "writing over vsock needs vm"},
		{grant("cid = [3], cert-name = [\"a\"]"), "", first + both},
		{grant("vm = [\"a\"]"), "", first + key},
		{grant("vm = [\"a\"], psk = [\"a\"]"), "", ""},
		{grant("vm = [\"a\"], token-sha256 = [\"" + sum + "\"]"), vsock, ""},
		{grant("cid = [1]") + "\nvsock-trust-cid = true", "", ""},
		{grant("cid = [3]") + "\nreadonly = true", "", ""},
		{"grant = [{ access = \"ro\", cid = [3] }, { access = \"none\", vm = [\"a\"] }]", "", ""},
		{grant("psk = [\"a\"]"), vsock, first + "writing over vsock needs vm"},
		{grant("psk = [\"a\"]"), vsock + unix, ""},
		{grant("uid = [1]"), vsock, ""},
		{"grant = [{ access = \"rw\" }]", vsock, first + both},
		{"", vsock, ": " + both},
		{"vsock-trust-cid = true", vsock, ""},
		{"", vsock + unix, ""},
		{"", vsock + "\n[[listener]]\nuri = \"systemd:s\"", ""},
		{"", vsock + "\nexports = [\"b\"]\n[[export]]\nname = \"b\"\nimage = \"/b\"\nreadonly = true", ""},
		{"", unix + "\nexports = [\"b\"]" + vsock + "\n[[export]]\nname = \"b\"\nimage = \"/b\"", ": " + both},
		{"listener = [{ uri = \"nbd+vsock://2\" }]", unix, ": " + both},
		{"listener = [{ uri = \"nbd+vsock://2\" }, { uri = \"nbd://h\" }]", "", ""},
	} {
		c := parsed(t, "[[export]]\nname = \"a\"\nimage = \"/a\"\n"+tt.export+tt.rest)
		var want []string
		if tt.want != "" {
			want = []string{`export "a"` + tt.want + switched}
		}
		if got := texts(t, c.Validate()); !slices.Equal(got, want) {
			t.Errorf("%s %q:\ngot  %q\nwant %q", tt.export, tt.rest, got, want)
		}
		scope := c.APIScope(0)
		scope.Anywhere = true
		if got := texts(t, c.Exports[0].Validate(scope)); len(got) != len(want) {
			t.Errorf("%s %q by the API: got %q", tt.export, tt.rest, got)
		}
	}
}

func TestAllProblemsAreSaidAtOnce(t *testing.T) {
	c := parsed(t, "engine = \"aio\"\n[log]\nlevel = \"x\"\n[[export]]\nname = \"a\"\nimage = \"b\"\ncache = \"c\"\n[[listener]]\nuri = \"d\"")
	got := texts(t, c.Validate())
	want := []string{`engine: "aio"`, `log: level: "x"`, `export "a": cache: "c"`, `export "a": image: "b"`, `listener 1: uri: "d"`}
	if len(got) != len(want) {
		t.Fatalf("got %q", got)
	}
	for i := range want {
		if !strings.HasPrefix(got[i], want[i]) {
			t.Errorf("problem %d: got %q, want %q", i, got[i], want[i])
		}
	}
	c.Exports = make([]config.Export, limits.ConfigExports)
	if got := texts(t, c.Validate()); len(got) != limits.ConfigProblems {
		t.Errorf("got %d problems, want %d", len(got), limits.ConfigProblems)
	}
}

func TestEveryListIsBounded(t *testing.T) {
	for key, spoil := range map[string]func(*config.Config, *config.Export){
		"roots": func(c *config.Config, _ *config.Export) { c.Images.Roots = many(limits.ConfigRoots+1, "/a") },
		"listener": func(c *config.Config, _ *config.Export) {
			c.Listeners = many(limits.ConfigListeners+1, config.Listener{})
		},
		"export":     func(c *config.Config, _ *config.Export) { c.Exports = many(limits.ConfigExports+1, config.Export{}) },
		"exports":    func(c *config.Config, _ *config.Export) { c.Listeners[0].Exports = many(limits.ConfigExports+1, "a") },
		"read-users": func(c *config.Config, _ *config.Export) { c.Control.ReadUsers = many(limits.GrantFacts+1, "a") },
		"rate-group": func(c *config.Config, _ *config.Export) {
			c.Groups = map[string]config.Rate{}
			for i := range limits.ConfigGroups + 1 {
				c.Groups[fmt.Sprint(i)] = config.Rate{}
			}
		},
		"grant":         func(_ *config.Config, e *config.Export) { e.Grants = many(limits.Grants+1, config.Grant{}) },
		"selinux-type":  func(_ *config.Config, e *config.Export) { e.Grants[0].SELinuxTypes = many(limits.GrantTypes+1, "t") },
		"uid":           func(_ *config.Config, e *config.Export) { e.Grants[0].UIDs = many[uint32](limits.GrantFacts+1, 0) },
		"backing-files": func(_ *config.Config, e *config.Export) { e.BackingFiles = many(limits.ChainDepth+1, "/a") },
		"data-files":    func(_ *config.Config, e *config.Export) { e.DataFiles = many(limits.ChainDepth+1, "/a") },
		"protect": func(_ *config.Config, e *config.Export) {
			e.Protect = many(limits.ProtectRanges+1, config.Range{Length: 1})
		},
		"fault":       func(_ *config.Config, e *config.Export) { e.Faults = many(limits.FaultRules+1, config.Fault{}) },
		"name":        func(_ *config.Config, e *config.Export) { e.Name = strings.Repeat("a", limits.MaxString+1) },
		"description": func(_ *config.Config, e *config.Export) { e.Description = strings.Repeat("a", limits.MaxString+1) },
	} {
		c := parsed(t, "[control]\nsocket = \"/s\"\n[[listener]]\nuri = \"nbd://a\"\n[[export]]\nname = \"a\"\nimage = \"/a\"\nformat = \"qcow2\"\nbacking-files = [\"/b\"]\ngrant = [{access = \"rw\"}]")
		if err := c.Validate(); err != nil {
			t.Fatal(err)
		}
		spoil(c, &c.Exports[0])
		got := texts(t, c.Validate())
		if len(got) == 0 || !strings.Contains(strings.Join(got, "\n"), key+": ") || !strings.Contains(strings.Join(got, "\n"), "which is more than") {
			t.Errorf("%s: got %q", key, got)
		}
	}
}

// many is a list of n times v.
func many[T any](n int, v T) []T {
	list := make([]T, n)
	for i := range list {
		list[i] = v
	}
	return list
}

// Names are data: whatever is no control character is a name.
func TestOddNamesAreNames(t *testing.T) {
	for _, name := range []string{"-rf", "a,b=c", `q"uote'`, "<a&b>", "json:{}", "../../etc", "ü 磁", "/", "%00", "a%n"} {
		c := new(config.Config)
		c.Exports = []config.Export{{Name: name, Image: "/a"}}
		c.SetDefaults()
		if err := c.Validate(); err != nil {
			t.Errorf("%q: %v", name, err)
		}
	}
	c := new(config.Config)
	c.Exports = []config.Export{{Name: "a\xff", Image: "/a"}}
	c.SetDefaults()
	if got := texts(t, c.Validate()); len(got) != 1 || !strings.Contains(got[0], "is not UTF-8") {
		t.Errorf("got %q", got)
	}
}

func TestAddressesAreParsedNotCompared(t *testing.T) {
	for in, want := range map[string]string{
		"192.168.0.1": "192.168.0.1/32", "::ffff:192.168.0.1": "192.168.0.1/32", "10.0.0.0/8": "10.0.0.0/8",
		"::ffff:10.0.0.0/104": "10.0.0.0/8", "fe80::/10": "fe80::/10", "::1": "::1/128", "0.0.0.0/0": "0.0.0.0/0",
	} {
		if p, err := config.ParseAddress(in); err != nil || p.String() != want {
			t.Errorf("ParseAddress(%q) = %v, %v; want %s", in, p, err, want)
		}
	}
	for _, in := range []string{
		"", "a", "192.168.0.1%lo", "fe80::1%lo", "192.168.0.1/24", "192.168.0", "192.168.0.01", "10.0.0.0/33", "10.0.0.0/",
		"10.0.0.0/-1", "::ffff:0.0.0.0/90", "1.2.3.4:5", "10.0.0.0/255.0.0.0", " 1.2.3.4",
	} {
		if p, err := config.ParseAddress(in); err == nil {
			t.Errorf("ParseAddress(%q) = %v, want an error", in, p)
		}
	}
}

func TestExportsOfTheAPI(t *testing.T) {
	c := parsed(t, "[images]\nroots = [\"/srv\"]\n[rate-group.g]\n")
	none := new(config.Config)
	for _, tt := range []struct {
		e     config.Export
		scope config.Scope
		want  string
	}{
		{config.Export{Image: "/srv/a", RateGroup: "g"}, c.APIScope(0), ""},
		{config.Export{Image: "/a"}, c.APIScope(0), "image: "},
		{config.Export{Image: "/srv/a"}, none.APIScope(0), "image: "},
		{config.Export{Image: "fd:0"}, c.APIScope(0), "image: "},
		{config.Export{Image: "fd:0"}, none.APIScope(1), ""},
		{config.Export{Image: "fd:1"}, none.APIScope(1), "image: 1 descriptors came"},
		{config.Export{Image: "fd:-1"}, none.APIScope(1), "image: "},
		{config.Export{Image: "fd:00"}, none.APIScope(1), "image: "},
		{config.Export{Image: "fd:0", Format: "qcow2", BackingFiles: []string{"fd:1:qcow2"}, DataFiles: []string{"fd:2"}}, none.APIScope(3), ""},
		{config.Export{Image: "fd:0", Format: "qcow2", BackingFiles: []string{"/etc/shadow:raw"}}, c.APIScope(1), "backing-files: "},
		{config.Export{Image: "1G", Format: "null"}, none.APIScope(0), ""},
		{config.Export{Image: "/srv/a", RateGroup: "h"}, c.APIScope(0), "rate-group: "},
		{config.Export{Image: "/srv/a", Listeners: []config.Listener{{URI: "x"}}}, c.APIScope(0), "uri: "},
		{config.Export{Image: "/srv/a", RequireTLS: true, Listeners: []config.Listener{{URI: "nbd://192.0.2.1"}}}, c.APIScope(0), "require-tls: none of its"},
		{config.Export{Image: "/srv/a", RequireTLS: true, Listeners: []config.Listener{{URI: "nbd://h"}, {URI: "nbds://h:1"}}}, c.APIScope(0), ""},
		{config.Export{Image: "/srv/a", RequireTLS: true}, c.APIScope(0), ""},
	} {
		tt.e.Name = "a"
		tt.e.SetDefaults()
		got := texts(t, tt.e.Validate(tt.scope))
		if tt.want == "" && got != nil || tt.want != "" && (len(got) != 1 || !strings.Contains(got[0], ": "+tt.want)) {
			t.Errorf("%+v: got %q, want %q", tt.e, got, tt.want)
		}
	}
}

// TestDescriptorsOfAnExport are as many as its files name, in whatever order.
func TestDescriptorsOfAnExport(t *testing.T) {
	for _, tt := range []struct {
		e    config.Export
		want int
	}{
		{config.Export{Image: "/a", BackingFiles: []string{"/fd:0:raw"}}, 0},
		{config.Export{Image: "fd:00"}, 0},
		{config.Export{Image: "fd:0"}, 1},
		{config.Export{Image: "/a", DataFiles: []string{"fd:0"}}, 1},
		{config.Export{Image: "fd:1", BackingFiles: []string{"fd:2:qcow2", "fd:0:raw"}, DataFiles: []string{"/d"}}, 3},
	} {
		if got := tt.e.Descriptors(); got != tt.want {
			t.Errorf("%+v: got %d, want %d", tt.e, got, tt.want)
		}
	}
}

func TestDefaults(t *testing.T) {
	c := parsed(t, "[control]\nsocket = \"/s\"\n[[listener]]\nuri = \"nbds://a\"\n[[listener]]\nuri = \"nbd+unix:///?socket=/t\"\n"+
		"[[export]]\nname = \"a\"\nimage = \"/a\"\n[[export]]\nname = \"b\"\nimage = \"/b\"\nformat = \"qcow2\"\n[[export.listener]]\nuri = \"nbd://b\"\n"+
		"[[export]]\nname = \"c\"\nimage = \"/c\"\nformat = \"qcow2\"\ndata-files = [\"/d\"]\nfault = [{ error = \"EIO\" }, { error = \"EIO\", probability = 0.5 }]")
	for _, tt := range []struct{ name, got, want string }{
		{"engine", c.Engine, "auto"}, {"drain", c.Drain.String(), "25s"}, {"level", c.Log.Level, "info"}, {"format", c.Log.Format, "text"},
		{"certificates", c.TLS.Certificates, "/etc/pki/vmdiskd"}, {"control mode", c.Control.Mode, "0600"},
		{"tls of nbds", c.Listeners[0].TLS, "require"}, {"mode of TCP", c.Listeners[0].Mode, ""},
		{"tls of nbd", c.Listeners[1].TLS, "off"}, {"mode of unix", c.Listeners[1].Mode, "0600"},
		{"format that was not said", c.Exports[0].Format, ""}, {"cache", c.Exports[0].Cache, "writeback"}, {"lock", c.Exports[0].Lock, "auto"},
		{"discard of raw", c.Exports[0].Discard, ""}, {"backing of raw", c.Exports[0].Backing, ""},
		{"discard of qcow2", c.Exports[1].Discard, "unmap"}, {"backing of qcow2", c.Exports[1].Backing, "deny"},
		{"own listener", c.Exports[1].Listeners[0].TLS, "off"}, {"backing with files", c.Exports[2].Backing, "explicit"},
		{"probabilities", fmt.Sprint(c.Exports[2].Faults[0].Probability, c.Exports[2].Faults[1].Probability), "1 0.5"},
	} {
		if tt.got != tt.want {
			t.Errorf("%s: got %q, want %q", tt.name, tt.got, tt.want)
		}
	}
	if err := c.Validate(); err != nil {
		t.Error(err)
	}
	empty := new(config.Config)
	empty.SetDefaults()
	if err := empty.Validate(); err != nil || empty.Control.Mode != "" {
		t.Errorf("an empty file: %v, control mode %q", err, empty.Control.Mode)
	}
}

func TestRangesDoNotOverflow(t *testing.T) {
	e := config.Export{Name: "a", Image: "/a", Protect: []config.Range{{Offset: math.MaxInt64 - 1, Length: 1}, {Offset: math.MaxInt64, Length: 1}}}
	e.Rate = &config.Rate{Burst: config.Duration(time.Hour)}
	e.SetDefaults()
	got := texts(t, e.Validate(config.Scope{Anywhere: true}))
	if len(got) != 1 || !strings.HasPrefix(got[0], `export "a", protect 2: offset`) {
		t.Errorf("got %q", got)
	}
}

// TestNamesThatAreAlmostLikeTokens are taken, as those of the server are.
func TestNamesThatAreAlmostLikeTokens(t *testing.T) {
	digits := strings.Repeat("a", limits.TokenDigits)
	for _, name := range []string{"a?", digits, "a?" + digits[1:], "a?a" + digits, "a?g" + digits[1:], "a?" + digits + "?", "a?" + digits + " "} {
		x := config.Export{Name: name, Format: "mem", Image: "1M"}
		x.SetDefaults()
		if err := x.Validate(config.Scope{}); err != nil {
			t.Errorf("%q: %v", name, err)
		}
	}
}
