package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
	control "github.com/vmdiskd/vmdiskd/internal/control/client"
	"github.com/vmdiskd/vmdiskd/internal/control/controltest"
	ctlserver "github.com/vmdiskd/vmdiskd/internal/control/server"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// controlled answers the control API with a service that has no disks, on the
// socket that all commands of the test use.
func controlled(t *testing.T, access ctlserver.Access) *controltest.Service {
	t.Helper()
	return controlledBy(t, &controltest.Service{}, access)
}

func controlledBy(t *testing.T, service *controltest.Service, access ctlserver.Access) *controltest.Service {
	t.Helper()
	t.Cleanup(func() {
		service.Close()
		for _, f := range service.Files() {
			f.Close()
		}
	})
	answer(t, service, access)
	return service
}

// answer serves the control API of any service, for all commands of the test.
func answer(t *testing.T, service ctlserver.Service, access ctlserver.Access) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "control")
	stop, err := answerAt(path, service, access)
	must(t, err)
	t.Cleanup(stop)
	t.Setenv(socketVariable, path)
}

// answerAt does so at a path, until stop.
func answerAt(path string, service ctlserver.Service, access ctlserver.Access) (stop func(), err error) {
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	return answerOn(l, service, access), nil
}

// answerOn does so on a listener.
func answerOn(l net.Listener, service ctlserver.Service, access ctlserver.Access) (stop func()) {
	s := ctlserver.New(ctlserver.Config{
		Service: service, Log: slog.New(slog.DiscardHandler),
		Authorize: func(ctlserver.Peer) ctlserver.Access { return access },
	})
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	return func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := errors.Join(s.Close(ctx), <-done); err != nil {
			panic(err)
		}
	}
}

// nasty is a name that must not reach a terminal as it is.
const nasty = "a b\"\n\x1b[31m\u202e,<'"

func exportOf(name string) api.Export {
	return api.Export{
		Export: config.Export{Name: name, Image: "/images/a.raw", Format: "raw"},
		State:  "ready", Size: 1 << 30, Writable: true, Clients: 2, Origin: "config", URIs: []string{"nbd://h/" + name},
	}
}

// calls compares what has changed something.
func calls(t *testing.T, s *controltest.Service, want ...string) {
	t.Helper()
	if got := s.Calls(); strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("calls: got %q, want %q", got, want)
	}
}

// sameJSON decodes out and compares it.
func sameJSON[T any](t *testing.T, out string, want T) {
	t.Helper()
	var got T
	if err := json.Unmarshal([]byte(out), &got); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, %v, want %+v", got, err, want)
	}
}

func TestExportListIsATableAndJSON(t *testing.T) {
	s := controlled(t, ctlserver.Read)
	s.Put(exportOf("web"))
	s.Put(exportOf("db"))
	s.Put(exportOf(""))
	got := want(t, exitDone, "export", "list")
	expect := `NAME  STATE  SIZE  ACCESS  CLIENTS  FORMAT  ORIGIN  IMAGE
""    ready    1G  rw            2  raw     config  /images/a.raw
db    ready    1G  rw            2  raw     config  /images/a.raw
web   ready    1G  rw            2  raw     config  /images/a.raw
`
	if got != expect {
		t.Errorf("got\n%s\nwant\n%s", got, expect)
	}
	sameJSON(t, want(t, exitDone, "export", "list", "--json"), []api.Export{exportOf(""), exportOf("db"), exportOf("web")})
}

// TestExportThatIsNotWellShowsSo: no access and no size of one that could not be
// opened, and the reason.
func TestExportThatIsNotWellShowsSo(t *testing.T) {
	s := controlled(t, ctlserver.Read)
	e := exportOf("db")
	e.State, e.Writable, e.Error = "poisoned", false, "a write was lost"
	s.Put(e)
	f := exportOf("lost")
	f.State, f.Writable, f.Error, f.Size, f.Clients, f.URIs = "failed", false, "no such file", 0, 0, nil
	s.Put(f)
	expect := `NAME  STATE     SIZE  ACCESS  CLIENTS  FORMAT  ORIGIN  IMAGE
db    poisoned    1G  ro            2  raw     config  /images/a.raw
lost  failed       -  -             0  raw     config  /images/a.raw
`
	if got := want(t, exitDone, "export", "list"); got != expect {
		t.Errorf("got\n%s\nwant\n%s", got, expect)
	}
	for _, tt := range []struct{ name, head, rest string }{
		{"db", "state: poisoned\nerror: a write was lost\n", "size: 1073741824 (1G)\naccess: ro\n"},
		{"lost", "state: failed\nerror: no such file\n", "size: -\naccess: -\n"},
	} {
		if got := want(t, exitDone, "export", "show", tt.name); !strings.Contains(got, tt.head) || !strings.Contains(got, tt.rest) {
			t.Errorf("got\n%s\nwant %q and %q in it", got, tt.head, tt.rest)
		}
	}
}

func TestExportShow(t *testing.T) {
	s := controlled(t, ctlserver.Read)
	e := exportOf("web")
	e.Description = "two\nlines"
	e.Cache = "none"
	e.Rate = &config.Rate{Bytes: 10 << 20}
	e.File = api.File{Device: "8:1", Inode: 131}
	s.Put(e)
	got := want(t, exitDone, "export", "show", "web")
	expect := `name: web
state: ready
description: two\nlines
image: /images/a.raw
format: raw
size: 1073741824 (1G)
access: rw
clients: 2
origin: config
device: 8:1
inode: 131
cache: none
rate: {"bytes":10485760}
uris:
  nbd://h/web
`
	if got != expect {
		t.Errorf("got\n%s\nwant\n%s", got, expect)
	}
	sameJSON(t, want(t, exitDone, "export", "show", "--json", "web"), e)
	want(t, exitFailed, "export", "show", "none")
}

// TestNamesAreNoTerminalCodes also looks at errors, which repeat names.
func TestNamesAreNoTerminalCodes(t *testing.T) {
	s := controlled(t, ctlserver.Change)
	e := exportOf(nasty)
	e.Image, e.Description, e.Error, e.State, e.Origin = nasty, nasty, nasty, nasty, nasty
	s.Put(e)
	s.PutClient(api.Client{ID: 1, Export: nasty, Peer: nasty, Via: nasty, TLS: nasty, Cert: nasty, Features: []string{nasty}})
	for _, args := range [][]string{
		{"export", "list"},
		{"export", "show", nasty},
		{"export", "show", nasty + "x"},
		{"export", "set", nasty, "description=" + nasty},
		{"export", "set", nasty, "--dry-run", "description=" + nasty},
		{"export", "pause", nasty},
		{"export", "resume", nasty},
		{"export", "resize", nasty, "+1G"},
		{"export", "resize", "--dry-run", nasty, "+1G"},
		{"export", "snapshot", "--dry-run", nasty, nasty},
		{"export", "snapshot", nasty, nasty},
		{"export", "add", nasty, nasty},
		{"export", "add", "--dry-run", nasty + "x", nasty},
		{"clients"},
		{"clients", nasty},
		{"clients", "kick", "--dry-run", "1"},
		{"top", "--once", "--interval=100ms"},
		{"__complete", "export", "show", ""},
		{"export", "remove", "--dry-run", nasty},
		{"export", "remove", nasty},
	} {
		_, stdout, stderr := ctl(t, args...)
		if strings.ContainsAny(stdout+stderr, "\x1b\u202e") {
			t.Errorf("vmdiskctl %q: got %q, %q", args, stdout, stderr)
		}
	}
	if got := s.Calls()[len(s.Calls())-1]; got != fmt.Sprintf("remove %q force false", nasty) {
		t.Errorf("the last call is %s", got)
	}
}

func TestChangesReachTheDaemon(t *testing.T) {
	s := controlled(t, ctlserver.Change)
	s.Put(exportOf("web"))
	s.PutClient(api.Client{ID: 7, Export: "web", Peer: "uid 1000"})
	for _, tt := range []struct {
		args       []string
		said, call string
	}{
		{[]string{"export", "pause", "--limit=5s", "web"}, "export web is paused\n", `pause "web" for 5s`},
		{[]string{"export", "resume", "web"}, "export web is ready\n", `resume "web"`},
		{[]string{"export", "resize", "web", "+1G"}, "export web has 2147483648 bytes (2G)\n", `resize "web" to 0 by 1073741824`},
		{[]string{"export", "resize", "web", "3G"}, "export web has 3221225472 bytes (3G)\n", `resize "web" to 3221225472 by 0`},
		{[]string{"export", "snapshot", "web", "/images/top"}, "export web writes to /images/top\n", `snapshot "web" overlay "/images/top" files 0`},
		{[]string{"export", "set", "web", "readonly=true"}, "export web is changed\n", `patch "web"`},
		{[]string{"clients", "kick", "7"}, "client 7 is cut off\n", "disconnect 7"},
		{[]string{"reload"}, "no changes\n", "reload dry false"},
		{[]string{"reload", "--dry-run"}, "no changes\n", "reload dry true"},
		{[]string{"export", "remove", "--force", "web"}, "export web is removed\n", `remove "web" force true`},
	} {
		if got := want(t, exitDone, tt.args...); got != tt.said {
			t.Errorf("%q: said %q, want %q", tt.args, got, tt.said)
		}
		if all := s.Calls(); all[len(all)-1] != tt.call {
			t.Errorf("%q: called %s, want %s", tt.args, all[len(all)-1], tt.call)
		}
	}
	want(t, exitFailed, "export", "show", "web")
}

func TestDryRunChangesNothing(t *testing.T) {
	s := controlled(t, ctlserver.Change)
	s.Put(exportOf("web"))
	s.PutClient(api.Client{ID: 7, Export: "web", Peer: "uid:1000"})
	for _, tt := range []struct {
		args []string
		said string
	}{
		{[]string{"export", "remove", "web"}, "export web, with 2 clients, would be removed\n"},
		{[]string{"export", "resize", "web", "2G"}, "export web would grow from 1073741824 to 2147483648 bytes\n"},
		{[]string{"export", "snapshot", "web", "/o"}, "/o would be made above /images/a.raw, the image of export web\n"},
		{[]string{"export", "set", "web", "rate.ops=5"}, `export web would be changed: {"rate-keys":{"ops":"5"}}` + "\n"},
		{[]string{"export", "add", "new", "/i"}, `export new would be made: {"name":"new","image":"/i"}` + "\n"},
		{[]string{"export", "add", "new", "/i", "-f", "raw"}, `export new would be made: {"name":"new","image":"/i","format":"raw"}` + "\n"},
		{[]string{"clients", "kick", "7"}, "client 7, uid:1000 at export web, would be cut off\n"},
	} {
		if got := want(t, exitDone, append(tt.args, "--dry-run")...); got != tt.said {
			t.Errorf("%q: said %q, want %q", tt.args, got, tt.said)
		}
	}
	want(t, exitRefused, "export", "add", "--dry-run", "web", "/i")
	want(t, exitFailed, "export", "remove", "--dry-run", "none")
	want(t, exitFailed, "clients", "kick", "--dry-run", "8")
	calls(t, s)
}

func TestExitCodesTellRefusalFromFailure(t *testing.T) {
	s := controlled(t, ctlserver.Read)
	s.Put(exportOf("web"))
	for _, args := range [][]string{
		{"export", "remove", "web"}, {"export", "pause", "web"}, {"export", "set", "web", "readonly=true"},
		{"export", "add", "x", "/i"}, {"clients", "kick", "1"}, {"reload"},
		{"export", "resize", "web", "1M"}, // it would shrink
	} {
		want(t, exitRefused, args...)
	}
	calls(t, s)
	for _, args := range [][]string{
		{"export"}, {"export", "show"}, {"export", "show", "a", "b"}, {"export", "remove", "--timeout=-1s", "web"},
		{"export", "pause", "--limit=1h", "web"}, {"export", "resize", "web", "-1G"}, {"export", "resize", "web", "big"},
		{"export", "set", "web"}, {"export", "set", "web", "readonly"}, {"export", "set", "web", "image=/x"},
		{"export", "snapshot", "web", ""}, {"export", "add", "x", ""}, {"clients", "kick", "-1"}, {"clients", "kick", "x"},
		{"export", "add", "--fd", "--persist", "x", "/i"}, {"export", "add", "--fd", "-f", "mem", "x", "1G"},
		{"export", "add", "--grant=all", "x", "/i"}, {"export", "add", "--rate=fast", "x", "/i"},
		{"export", "add", "--protect=5", "x", "/i"}, {"export", "add", "--protect=5+x", "x", "/i"},
		{"top", "--interval=1ms"}, {"top", "--sort=size"}, {"events", "--count=-1"}, {"status", "x"},
		{"status", "--socket="}, {"status", "--socket=" + strings.Repeat("x", limits.SocketPath+1)}, {"status", "--socket=a\x00b"},
		{"export", "show", "\xff"}, {"export", "add", "x", "/\xff"}, {"export", "add", "x", "/i", "--data-file=/\xff"},
	} {
		want(t, exitUsage, args...)
	}
	want(t, exitFailed, "export", "show", "none")
	want(t, exitFailed, "status", "--socket="+filepath.Join(t.TempDir(), "none"))
	broken := controlledBy(t, &controltest.Service{Fail: &api.Error{Code: api.CodeFailed, Text: "the \"disk\" is\x1b broken"}}, ctlserver.Read)
	broken.Put(exportOf("web"))
	if code, _, stderr := ctl(t, "export", "show", "web"); code != exitFailed || stderr != `vmdiskctl: the "disk" is\x1b broken`+"\n" {
		t.Errorf("got %d, %q", code, stderr)
	}
}

func TestSocketThatTheUserMayNotUseIsARefusal(t *testing.T) {
	denied := fmt.Errorf("socket: %w", &net.OpError{Op: "dial", Err: os.ErrPermission})
	for _, err := range []error{told(denied), plugError(denied), plugError(fmt.Errorf("step: %w", denied))} {
		if code := exitCode(err, true); code != exitRefused {
			t.Errorf("%v: exit code %d", err, code)
		}
	}
	if code := exitCode(os.ErrPermission, true); code != exitFailed {
		t.Errorf("a file that cannot be read: exit code %d", code)
	}
}

func TestExportAddSaysWhatItIsTold(t *testing.T) {
	controlled(t, ctlserver.Change)
	t.Chdir(t.TempDir())
	dir, err := os.Getwd()
	must(t, err)
	threshold := config.Size(3 << 30)
	out := want(t, exitDone, "export", "add", "--json", "--dry-run", "-f", "qcow2", "-r", "--cache=none", "--image-lock=off",
		"--backing-file=base:raw", "--data-file=data", "--snapshot=1", "--discard=keep", "--lenient", "--l2-cache-size=4M", "--partition=2", "--sector-size=4K",
		"--overlay=1G", "--protect=0+4K", "--protect=1M+512", "--description="+nasty, "--default", "--require-tls",
		"--listen=nbd://[::1]:1", "--listen=nbd+unix:///?socket=/s", "--socket-owner=a:b", "--socket-mode=0660",
		"--selinux-label=a:b:c:s0:c1,c2", "--selinux-path-label=a:b:d:s0:c1,c2", "--grant=rw,uid=1000,uid=1,gid=5",
		"--grant=ro,label=a:b:c:s0:c1,c2", "--grant=ro,selinux-type=t,selinux-type=u,selinux-level=s0:c1,c2",
		`--grant={"access":"none","cert-name":["x, y"]}`, "--max-connections=4", "--rate=10M,ops=500,burst=2s",
		"--rate-group=all", "--write-threshold=3G", "--log-requests", "--flush-on-close", "--persist", "--", "-name", "image")
	sameJSON(t, out, api.AddExport{Persist: true, Export: config.Export{
		Name: "-name", Image: filepath.Join(dir, "image"), Format: "qcow2", ReadOnly: true, Cache: "none", Lock: "off",
		Backing: "explicit", BackingFiles: []string{filepath.Join(dir, "base:raw")}, DataFiles: []string{filepath.Join(dir, "data")},
		Snapshot: "1", Discard: "keep", Lenient: true, L2CacheSize: 4 << 20, Window: &config.Window{Partition: 2, SectorSize: 4096}, Overlay: &config.Overlay{Quota: 1 << 30},
		Protect:     []config.Range{{Length: 4096}, {Offset: 1 << 20, Length: 512}},
		Description: nasty, Default: true, RequireTLS: true, Listeners: []config.Listener{{URI: "nbd://[::1]:1"}, {
			URI: "nbd+unix:///?socket=/s", Owner: "a:b", Mode: "0660", SELinuxLabel: "a:b:c:s0:c1,c2", SELinuxPathLabel: "a:b:d:s0:c1,c2",
		}},
		Grants: []config.Grant{
			{Access: "rw", UIDs: []uint32{1000, 1}, GIDs: []uint32{5}}, {Access: "ro", Label: "a:b:c:s0:c1,c2"},
			{Access: "ro", SELinuxTypes: []string{"t", "u"}, SELinuxLevel: "s0:c1,c2"},
			{Access: "none", CertNames: []string{"x, y"}},
		},
		Connections: 4, Rate: &config.Rate{Bytes: 10 << 20, Ops: 500, Burst: config.Duration(2 * time.Second)},
		RateGroup: "all", WriteThreshold: &threshold, LogRequests: true, FlushOnClose: true,
	}})
}

func TestWhatIsAskedForASocketIsNotIgnored(t *testing.T) {
	s := controlled(t, ctlserver.Change)
	for _, flag := range []string{"--socket-owner=a", "--socket-mode=0660", "--selinux-label=a:b:c:s0", "--selinux-path-label=a:b:c:s0"} {
		want(t, exitUsage, "export", "add", flag, "x", "image")
		want(t, exitUsage, "export", "add", flag, "--listen=nbd://[::1]:1", "x", "image")
		name, _, _ := strings.Cut(flag, "=")
		want(t, exitUsage, "export", "add", name+"=", "--listen=nbd+unix:///?socket=/s", "x", "image")
	}
	calls(t, s)
}

func TestPathWithALinkIsThatOfTheKernel(t *testing.T) {
	s := controlled(t, ctlserver.Change)
	dir, err := filepath.EvalSymlinks(t.TempDir())
	must(t, err)
	link := filepath.Join(t.TempDir(), "link")
	must(t, os.Mkdir(filepath.Join(dir, "sub"), 0o700))
	must(t, os.Symlink(filepath.Join(dir, "sub"), link))
	t.Chdir(link)
	image := filepath.Join(dir, "image")
	want(t, exitDone, "export", "add", "x", "../image")
	want(t, exitDone, "export", "add", "y", link+"/../image")
	want(t, exitFailed, "export", "add", "z", "none/../image")
	calls(t, s, `add "x" image "`+image+`" files 0 persist false`, `add "y" image "`+image+`" files 0 persist false`)
}

func TestExportAddSendsDescriptors(t *testing.T) {
	s := controlled(t, ctlserver.Change)
	t.Chdir(t.TempDir())
	must(t, os.WriteFile("top", []byte("top"), 0o600))
	must(t, os.WriteFile("base", []byte("base"), 0o400))
	out := want(t, exitDone, "export", "add", "--json", "--fd", "-f", "qcow2", "--backing-file=base", "x", "top")
	var e api.Export
	must(t, json.Unmarshal([]byte(out), &e))
	if e.Image != "fd:0" || len(e.BackingFiles) != 1 || e.BackingFiles[0] != "fd:1" {
		t.Errorf("got %+v", e)
	}
	calls(t, s, `add "x" image "fd:0" files 2 persist false`)
	files := s.Files()
	if len(files) != 2 {
		t.Fatalf("%d files have come", len(files))
	}
	for i, wanted := range []string{"top", "base"} {
		got, err := io.ReadAll(files[i])
		if err != nil || string(got) != wanted {
			t.Errorf("descriptor %d: read %q, %v, want %q", i, got, err, wanted)
		}
		_, err = files[i].WriteAt([]byte("x"), 0)
		if (err == nil) != (i == 0) {
			t.Errorf("descriptor %d: write: %v", i, err)
		}
		files[i].Close()
	}
	want(t, exitFailed, "export", "add", "--fd", "y", "none")
	want(t, exitFailed, "export", "add", "--fd", "y", "/dev/null")
	want(t, exitRefused, "export", "add", "--fd", "x", "top") // the name is taken
	many := []string{"export", "add", "--fd", "y", "top"}
	for range limits.ControlFiles {
		many = append(many, "--backing-file=base")
	}
	want(t, exitUsage, many...)
	want(t, exitUsage, "export", "add", "--fd", "-f", "qcow2", "--backing-file=base:raw", "y", "top")
}

func TestClientsAreATableAndJSON(t *testing.T) {
	s := controlled(t, ctlserver.Read)
	since := time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
	web := api.Client{ID: 12, Export: "web", Peer: "uid:1000", Via: "unix:/s", Since: since, Writable: true, InFlight: 3,
		Requests: 1000, BytesIn: 2 << 20, BytesOut: 100, Features: []string{"structured", "base:allocation"}}
	kick := api.Client{ID: 2, Export: "kick", Peer: "cid:3", Via: "v", Since: since, TLS: "TLS 1.3 X", Cert: "n", Stalled: true, Features: []string{}}
	s.PutClient(web)
	s.PutClient(kick)
	got := want(t, exitDone, "clients")
	expect := `ID  EXPORT  PEER      VIA      SINCE                 ACCESS  IN FLIGHT  REQUESTS  RECEIVED  SENT  NEGOTIATED
 2  kick    cid:3     v        2026-11-21T12:00:00Z  ro              0         0         0     0  "TLS 1.3 X",cert=n,STALLED
12  web     uid:1000  unix:/s  2026-11-21T12:00:00Z  rw              3      1000        2M   100  structured,base:allocation
`
	if got != expect {
		t.Errorf("got\n%s\nwant\n%s", got, expect)
	}
	sameJSON(t, want(t, exitDone, "clients", "--json", "web"), []api.Client{web})
	sameJSON(t, want(t, exitDone, "clients", "--json", "--", "kick"), []api.Client{kick})
	sameJSON(t, want(t, exitDone, "clients", "--json", ""), []api.Client{})
}

func TestStatus(t *testing.T) {
	s := controlled(t, ctlserver.Read)
	s.Put(exportOf("web"))
	got := want(t, exitDone, "status")
	expect := fmt.Sprintf("version: test\npid: %d\nstarted: 0001-01-01T00:00:00Z\nengine: none\nexports: 1\nclients: 0\n", os.Getpid())
	if got != expect {
		t.Errorf("got\n%s\nwant\n%s", got, expect)
	}
	var b bytes.Buffer
	must(t, printStatus(&b, api.Status{Config: "/c", Listeners: []string{"nbd://h"}, Memory: map[string]int64{"buffers": 1536, "a": 3},
		Security: []api.Control{{Name: "seccomp", State: "enforced"}, {Name: "user", State: "off", Reason: "it runs\nas root"}},
		Notes:    map[string]string{"export \x1b": "no such\nfile"}}))
	expect = "config: /c\nexports: 0\nclients: 0\nlisteners:\n  nbd://h\nmemory:\n  a: 3\n  buffers: 1.5K\nsecurity:\n  seccomp: enforced\n  user: off, it runs\\nas root\nnotes:\n  export \\x1b: no such\\nfile\n"
	if !strings.HasSuffix(b.String(), expect) {
		t.Errorf("got\n%s\nwant the end\n%s", b.String(), expect)
	}
	var j api.Status
	must(t, json.Unmarshal([]byte(want(t, exitDone, "status", "--json")), &j))
	if j.Version != "test" || j.Exports != 1 {
		t.Errorf("got %+v", j)
	}
}

// TestOnlyClientsAreToldOfWhereAnExportIsNotRemoved: a daemon without room for the
// connection has the same code.
func TestOnlyClientsAreToldOfWhereAnExportIsNotRemoved(t *testing.T) {
	inUse := &api.Error{Code: api.CodeInUse, Text: "export is in use"}
	for _, tt := range []struct {
		err   error
		force bool
		want  string
	}{
		{inUse, false, "export is in use; vmdiskctl clients web lists who has it open, --force cuts them off"},
		{inUse, true, "export is in use"},
		{&control.NoRoomError{Refusal: &api.Error{Code: api.CodeInUse, Text: "too many connections"}}, false, "too many connections"},
		{&api.Error{Code: api.CodeForbidden, Text: "not allowed"}, false, "not allowed"},
	} {
		if err := notRemoved(tt.err, "web", tt.force); err.Error() != tt.want || !errors.Is(err, tt.err) {
			t.Errorf("%v, force %t: got %q, want %q", tt.err, tt.force, err, tt.want)
		}
	}
}

func TestCompletionNamesExports(t *testing.T) {
	s := controlled(t, ctlserver.Read)
	s.Put(exportOf("web"))
	for _, command := range []string{"show", "remove", "set", "pause", "resume", "resize", "snapshot", "forget"} {
		if got := want(t, exitDone, "__complete", "export", command, ""); got != "web\tready, 1G\n:4\n" {
			t.Errorf("%s: got %q", command, got)
		}
	}
	if got := want(t, exitDone, "__complete", "events", "--export", ""); got != "web\tready, 1G\n:4\n" {
		t.Errorf("events --export: got %q", got)
	}
	if got := want(t, exitDone, "__complete", "clients", "w"); got != "web\tready, 1G\n:4\n" {
		t.Errorf("clients: got %q", got)
	}
	if got := want(t, exitDone, "__complete", "export", "show", "web", ""); got != ":4\n" {
		t.Errorf("a second name: got %q", got)
	}
	if got := want(t, exitDone, "__complete", "export", "set", "web", "des"); !strings.Contains(got, "description=") {
		t.Errorf("keys: got %q", got)
	}
	if got := want(t, exitDone, "__complete", "export", "show", "--socket=/none", ""); got != ":4\n" {
		t.Errorf("without a daemon: got %q", got)
	}
}

// TestCompletionNamesOnlyWhatAShellTakesAsItIs: bash puts what several names
// begin with on the command line unquoted, and evaluates that line at the next
// TAB.
func TestCompletionNamesOnlyWhatAShellTakesAsItIs(t *testing.T) {
	s := controlled(t, ctlserver.Read)
	var offered []string
	for r := range rune(0x100) {
		name := fmt.Sprintf("a%cb", r)
		s.Put(exportOf(name))
		if unicode.In(r, unicode.Letter, unicode.Digit) && r < 0x80 || strings.ContainsRune("._:@%+/-", r) {
			offered = append(offered, name)
		}
	}
	for _, name := range []string{"", "-x", "--force", nasty, "`touch${IFS}/tmp/x`1", "$(id)", "~root", "a\u4e00"} {
		s.Put(exportOf(name))
	}
	var got []string
	for line := range strings.Lines(want(t, exitDone, "__complete", "export", "show", "")) {
		if name, _, has := strings.Cut(line, "\t"); has {
			got = append(got, name)
		}
	}
	slices.Sort(got)
	slices.Sort(offered)
	if !slices.Equal(got, offered) {
		t.Errorf("got %q, want %q", got, offered)
	}
}

func TestCompletionShowsNoControlCharacters(t *testing.T) {
	s := controlled(t, ctlserver.Read)
	e := exportOf("web")
	e.State = "\x1b[31m"
	s.Put(e)
	if got, expect := want(t, exitDone, "__complete", "export", "show", ""), "web\t\"\\x1b[31m\", 1G\n:4\n"; got != expect {
		t.Errorf("got %q, want %q", got, expect)
	}
}
