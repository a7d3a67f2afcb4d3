package config_test

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// whole is a file with every key that there is.
const whole = `
engine = "pool"
drain-timeout = "5s"

[log]
level = "debug"
format = "json"
slow-request = "250ms"

[tls]
certificates = "/pki"
psk = "/keys.psk"
verify-peer = false

[control]
socket = "/run/vmdiskd/control"
mode = "0660"
owner = "root:kvm"
read-users = ["alice"]
read-groups = ["kvm"]
change-users = ["1000"]
change-groups = ["wheel"]
state = "/var/lib/vmdiskd"

[metrics]
listen = "127.0.0.1:9000"

[images]
roots = ["/srv/images", "/dev"]

[[listener]]
uri = "nbd+unix:///?socket=/run/vmdiskd/nbd"
mode = "0660"
owner = ":kvm"
selinux-label = "system_u:system_r:vmdiskd_t:s0:c1,c2"
selinux-path-label = "system_u:object_r:svirt_image_t:s0:c1,c2"
tls = "off"
exports = ["a"]

[[listener]]
uri = "nbds://[::]:10810"
insecure-plaintext = true

[rate-group.Gold]
bytes = "100M"
burst = "1s"

[rate-group."with a space"]
ops = 5

[[export]]
name = "a"
description = "the first"
default = true
image = "/srv/images/a.qcow2"
format = "qcow2"
readonly = true
cache = "none"
image-lock = "on"
backing = "explicit"
backing-files = ["/srv/images/base.qcow2:qcow2"]
data-files = ["/srv/images/a.data"]
snapshot = "s1"
discard = "keep"
l2-cache-size = "4M"
write-threshold = "8G"
lenient = true
require-tls = true
max-connections = 4
rate-group = "Gold"
log-requests = true
flush-on-close = true
vsock-trust-cid = true
window = { partition = 2, sector-size = "4K" }
overlay = { quota = "1G" }
block-size = { minimum = 512, preferred = 4096, maximum = "1M" }
protect = [{ offset = 512, length = 512 }]

[[export.listener]]
uri = "nbd+vsock://2:10809"
tls = "on"

[[export.grant]]
access = "rw"
uid = [107]
gid = [107]
label = "system_u:object_r:svirt_t:s0:c1,c2"
selinux-type = ["svirt_t", "svirt_tcg_t"]
selinux-level = "s0:c1,c2"
[[export.grant]]
access = "ro"
cid = [3, 4]
vm = ["vm1"]
[[export.grant]]
access = "none"
address = ["10.0.0.0/8"]
cert-name = ["backup"]
[[export.grant]]
access = "ro"
psk = ["vm1"]
token-sha256 = ["0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"]

[export.rate]
bytes = 1048576
read-bytes = "2M"
write-bytes = "3M"
ops = 100
read-ops = 200
write-ops = 300
burst = "100ms"

[[export.fault]]
ops = ["write"]
offset = "1M"
length = "4k"
probability = 0.5
count = 3
error = "EIO"
delay = "10ms"

[[export]]
name = "b"
image = "/srv/images/b.img"
window.offset = "1M"
window.length = "2M"
`

func TestEveryKeyIsRead(t *testing.T) {
	c, err := config.Parse("f", []byte(whole))
	if err != nil {
		t.Fatal(err)
	}
	// The first of each list has all keys but those that exclude others, which
	// the lines below look at.
	for name := range zeroFields(reflect.ValueOf(*c), "") {
		switch {
		case strings.HasPrefix(name, "Exports.Listeners."), strings.HasPrefix(name, "Exports.Grants."),
			name == "TLS.VerifyPeer", name == "Exports.Snapshots", name == "Listeners.InsecurePlaintext", name == "Exports.Window.Offset", name == "Exports.Window.Length":
		default:
			t.Errorf("%s was not read, or is not in the test's file", name)
		}
	}
	if !c.Listeners[1].InsecurePlaintext || c.Exports[0].Rate.Bytes != 1<<20 || c.Exports[0].Rate.Burst != config.Duration(100*time.Millisecond) ||
		c.Exports[1].Window.Length != 2<<20 || c.Exports[0].Threshold() != 8<<30 || c.Exports[1].Threshold() != 0 || c.Groups["Gold"].Bytes != 100<<20 || *c.TLS.VerifyPeer ||
		c.Groups["with a space"].Ops != 5 || c.Exports[0].Grants[1].CIDs[1] != 4 ||
		c.Exports[0].Grants[0].SELinuxTypes[1] != "svirt_tcg_t" || c.Exports[0].Grants[0].SELinuxLevel != "s0:c1,c2" {
		t.Errorf("read %+v", c)
	}
	if err := c.Validate(); err == nil {
		t.Error("an empty word passed before the defaults")
	}
	c.SetDefaults()
	if err := c.Validate(); err != nil {
		t.Errorf("the whole file is not valid:\n%v", err)
	}
}

// zeroFields are the fields that are not set in the first element of each list.
func zeroFields(v reflect.Value, path string) map[string]bool {
	zero := map[string]bool{}
	if v.Kind() == reflect.Pointer && !v.IsNil() {
		v = v.Elem()
	}
	if v.Kind() == reflect.Slice && v.Len() > 0 && v.Index(0).Kind() == reflect.Struct {
		v = v.Index(0)
	}
	if v.Kind() != reflect.Struct {
		if v.IsZero() {
			zero[path] = true
		}
		return zero
	}
	for i := range v.NumField() {
		for name := range zeroFields(v.Field(i), strings.TrimPrefix(path+"."+v.Type().Field(i).Name, ".")) {
			zero[name] = true
		}
	}
	return zero
}

func TestMistakesHaveTheirPlace(t *testing.T) {
	for _, tt := range []struct{ name, in, want string }{
		{"unknown key", "engine = \"auto\"\nengin = \"pool\"\n", `f:2:1: there is no key "engin" here: did you mean "engine"?`},
		{"other case", "Engine = \"auto\"", `f:1:1: there is no key "Engine" here: did you mean "engine"?`},
		{"kelvin", "loc\u212a = 1", "f:1:"},
		{"unknown table", "\n[loog]\nlevel = \"info\"", `f:2:2: there is no key "loog" here: did you mean "log"?`},
		{"unknown in a table", "[log]\nlevel = \"info\"\n  size = 3", `f:3:3: there is no key "size" here`},
		{"unknown in a list", "[[export]]\nname = \"a\"\n[[export.grant]]\nuser = 1", `f:4:1: there is no key "user" here`},
		{"unknown inline", "[[export]]\nwindow = { part = 1 }", `f:2:12: there is no key "part" here`},
		{"unknown in a group", "[rate-group.a]\nbits = 1", `f:2:1: there is no key "bits" here`},
		{"key twice", "engine = \"auto\"\nengine = \"auto\"", "f:2:1: "},
		{"table twice", "[log]\n[tls]\n[log]", "f:3:2: "},
		{"key twice inline", "[[export]]\nwindow = { offset = 1, offset = 2 }", "f:2:"},
		{"number for text", "engine = 3", `f:1:1: "engine": want text in quotes`},
		{"text for number", "[[export]]\nmax-connections = \"3\"", `f:2:1: "max-connections": want a whole number`},
		{"text for bool", "[[export]]\nreadonly = \"yes\"", `f:2:1: "readonly": want true or false`},
		{"text for list", "[images]\nroots = \"/a\"", `f:2:1: "roots": want a list in [ ]`},
		{"number in list of text", "[images]\nroots = [\"/a\", 3]", `f:2:1: "roots": want text in quotes`},
		{"list for table", "log = [1]", `f:1:1: "log": want a table`},
		{"number for duration", "drain-timeout = 5", `f:1:1: "drain-timeout": want a duration`},
		{"duration without unit", "drain-timeout = \"5\"", `f:1:17: duration "5" is not`},
		{"float for size", "[[export]]\noverlay = { quota = 1.5 }", `f:2:13: "quota": want a size`},
		{"bad size", "[[export]]\noverlay = { quota = \"1P\" }", `f:2:21: size "1P" is not`},
		{"large number", "[[export]]\n[[export.grant]]\nuid = [4294967296]", "f:3:8: integer value 4294967296 cannot"},
		{"negative number", "[[export]]\n[[export.grant]]\ncid = [-1]", "f:3:8: negative integer value -1 cannot"},
		{"table for list", "[export]\nname = \"a\"", `f:1:2: "export" is a list of tables: write it in [[ ]]`},
		{"list for one table", "[[log]]\nlevel = \"info\"", `f:1:3: "log" is not a list of tables`},
		{"part of no export", "[export.rate]\nops = 1", `f:1:2: "export" is a list of tables: write [[export]] first`},
		{"part of a later export", "[[export]]\nname = \"a\"\n[[export.grant]]\naccess = \"rw\"\n[[export]]\n[export.grant.access]\n", `f:6:9: "grant" is a list`},
		{"dotted list", "export.name = \"a\"", `f:1:1: "export" is a list of tables`},
		{"table of text", "[engine]\n", `f:1:2: "engine" is not a table`},
		{"no toml", "engine = \"auto\"\nengine", "f:2:"},
		{"not closed", "engine = \"auto", "f:1:"},
		{"no utf-8", "engine = \"\xff\"", "f:1:11: "},
		{"control character", "engine = \"a\x01\"", "f:1:12: "},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, err := config.Parse("f", []byte(tt.in))
			if err == nil || !strings.HasPrefix(err.Error(), tt.want) {
				t.Fatalf("Parse: got %v, %v; want %q", c, err, tt.want)
			}
			if _, ok := errors.AsType[config.Errors](err); !ok {
				t.Errorf("error is a %T", err)
			}
		})
	}
}

func TestAllMistakesAreSaidAtOnce(t *testing.T) {
	_, err := config.Parse("f", []byte("one = 1\n[log]\ntwo = 2\nlevel = 3\n[x]\ny = 4\n"))
	want := "f:1:1: there is no key \"one\" here\nf:3:1: there is no key \"two\" here\n" +
		"f:4:1: \"level\": want text in quotes\nf:5:2: there is no key \"x\" here"
	if err == nil || err.Error() != want {
		t.Errorf("got:\n%v\nwant:\n%s", err, want)
	}
	_, err = config.Parse("f", []byte(strings.Repeat("[x]\n", 10*limits.ConfigProblems)))
	if es, ok := errors.AsType[config.Errors](err); !ok || len(es) != limits.ConfigProblems {
		t.Errorf("a thousand mistakes: got %d", len(es))
	}
}

func TestDeepAndLargeFilesAreRefused(t *testing.T) {
	deep := "[images]\nroots = " + strings.Repeat("[", 1<<20)
	if _, err := config.Parse("f", []byte(deep)); err == nil {
		t.Error("a million brackets passed")
	}
	if _, err := config.Parse("f", make([]byte, limits.ConfigFile+1)); err == nil || !strings.Contains(err.Error(), "larger than") {
		t.Errorf("a large file: %v", err)
	}
}

// TestSaysTLS: what is there by default counts if it is said, and else not.
func TestSaysTLS(t *testing.T) {
	for text, want := range map[string]bool{
		"": false, "[tls]": false, "[[listener]]\nuri = \"nbds://127.0.0.1:1\"": false,
		"[tls]\ncertificates = \"/etc/pki/vmdiskd\"": true, "[tls]\npsk = \"/k\"": true, "[tls]\nverify-peer = false": true,
	} {
		if got := config.SaysTLS([]byte(text)); got != want {
			t.Errorf("%q: got %t, want %t", text, got, want)
		}
	}
}

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	good := write("good.toml", "[[export]]\nname = \"a\"\nimage = \"/a\"\n")
	c, err := config.Load(good)
	if err != nil || c.Exports[0].Cache != "writeback" || c.Drain != config.Duration(limits.Drain) {
		t.Errorf("Load: %+v, %v", c, err)
	}
	if _, err := config.Load(write("bad.toml", "a = 1")); err == nil || !strings.HasPrefix(err.Error(), dir) {
		t.Errorf("a bad file: %v", err)
	}
	_, err = config.Load(write("invalid.toml", "engine = \"aio\""))
	if _, ok := errors.AsType[config.Errors](err); !ok || !strings.HasPrefix(err.Error(), filepath.Join(dir, "invalid.toml")+":1:1: engine: ") {
		t.Errorf("an invalid file: %v", err)
	}
	fifo := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	large := write("large", "")
	if err := os.Truncate(large, limits.ConfigFile+1); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{dir, fifo, large, filepath.Join(dir, "none"), "/dev/zero"} {
		if _, err := config.Load(name); err == nil {
			t.Errorf("Load(%q) passed", name)
		}
	}
}
