package server_test

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/internal/control/controltest"
	"github.com/vmdiskd/vmdiskd/internal/control/server"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// names are names of exports that are syntax somewhere.
var names = []string{
	"disk", "a/b", "a%2Fb", "%", "..", ".", "a b", `quo"te`, "it's", "a,b=c", "<x>&amp;", "new\nline\r\n", "-rf", "json:{}", "ä☃", "?x=1", "#f", "a//b", "fd:0", "", "{name}", "exports", ";", "+",
	strings.Repeat("ä", limits.MaxString/2),
}

func TestNamesAreDataInPathsAndBodies(t *testing.T) {
	w := start(t, &controltest.Service{}, server.Change)
	ctx := testContext(t)
	for _, name := range names {
		if _, err := w.client.Add(ctx, api.AddExport{Export: config.Export{Name: name, Image: "/x"}}); err != nil {
			t.Fatalf("add %q: %v", name, err)
		}
		if e, err := w.client.Export(ctx, name); err != nil || e.Name != name {
			t.Errorf("export %q: got %q, %v", name, e.Name, err)
		}
		if err := w.client.Pause(ctx, name, time.Second); err != nil {
			t.Errorf("pause %q: %v", name, err)
		}
		if e, err := w.client.Resize(ctx, name, api.Resize{Size: 4096}); err != nil || e.Name != name || e.State != "paused" || e.Size != 4096 {
			t.Errorf("resize %q: got %+v, %v", name, e, err)
		}
	}
	all, err := w.client.Exports(ctx)
	if err != nil || len(all) != len(names) {
		t.Errorf("exports: got %d, %v, want %d", len(all), err, len(names))
	}
	for _, name := range names {
		if err := w.client.Remove(ctx, name, true, 0); err != nil {
			t.Errorf("remove %q: %v", name, err)
		}
	}
	if all, err := w.client.Exports(ctx); err != nil || len(all) != 0 {
		t.Errorf("exports at the end: got %v, %v", all, err)
	}
}

func TestEachCallReachesTheServiceAsItWasMade(t *testing.T) {
	s := &controltest.Service{}
	s.Put(export("a"))
	s.PutClient(api.Client{ID: 7, Export: "a"})
	s.PutClient(api.Client{ID: 8, Export: ""})
	w := start(t, s, server.Change)
	ctx := testContext(t)
	text, yes, a, none := "words", true, "a", ""

	st, err := w.client.Status(ctx)
	check(t, "status", err, st.Exports == 1 && st.Listeners != nil && st.Memory != nil)
	e, err := w.client.Patch(ctx, "a", api.Patch{Description: &text, ReadOnly: &yes, Rate: &config.Rate{Bytes: 5, Burst: config.Duration(time.Second)}})
	check(t, "patch", err, e.Description == text && e.ReadOnly && e.Rate.Bytes == 5 && e.Rate.Burst == config.Duration(time.Second))
	check(t, "resume", w.client.Resume(ctx, "a"), true)
	e, err = w.client.Snapshot(ctx, "a", api.Snapshot{Overlay: "/o"})
	check(t, "snapshot", err, e.Image == "/o")
	f, err := w.client.Forget(ctx, "a", true, true)
	check(t, "forget", err, f == api.Forgotten{DryRun: true, Overlay: "/o.qcow2", Image: "/o"})
	cs, err := w.client.Clients(ctx, nil)
	check(t, "clients", err, len(cs) == 2 && cs[0].Features != nil)
	cs, err = w.client.Clients(ctx, &a)
	check(t, "clients of a", err, len(cs) == 1 && cs[0].ID == 7)
	cs, err = w.client.Clients(ctx, &none)
	check(t, "clients of the empty name", err, len(cs) == 1 && cs[0].ID == 8)
	check(t, "disconnect", w.client.Disconnect(ctx, 7), true)
	_, err = w.client.OpenLease(ctx, api.OpenLease{CID: 5, VM: "vm 1", Start: "s?1", Holder: "h&1", TTL: config.Duration(time.Minute)})
	check(t, "open a lease", err, true)
	ls, err := w.client.Leases(ctx)
	check(t, "leases", err, len(ls) == 1 && ls[0].CID == 5 && ls[0].VM == "vm 1" && ls[0].Start == "s?1")
	check(t, "close a lease", w.client.CloseLease(ctx, 5, "s?1", "h&1"), true)
	stats, err := w.client.Stats(ctx)
	check(t, "stats", err, len(stats) == 1 && stats[0].Commands["read"].Requests == 1)
	r, err := w.client.Reload(ctx, true)
	check(t, "reload", err, r.DryRun && r.Changes != nil)
	var m bytes.Buffer
	err = w.client.Metrics(ctx, &m)
	check(t, "metrics", err, m.String() == "vmdiskd_exports 1\n")

	want := `patch "a"|resume "a"|snapshot "a" overlay "/o" files 0|forget "a" force true dry true|disconnect 7|open lease 5 of "vm 1" "s?1" by "h&1"|close lease 5 "s?1" by "h&1"|reload dry true`
	if got := strings.Join(s.Calls(), "|"); got != want {
		t.Errorf("calls:\n got %s\nwant %s", got, want)
	}
}

func check(t *testing.T, what string, err error, ok bool) {
	t.Helper()
	if err != nil || !ok {
		t.Errorf("%s: err %v, as expected %t", what, err, ok)
	}
}

func TestErrorsKeepTheirCode(t *testing.T) {
	for _, code := range []string{
		api.CodeInvalid, api.CodeForbidden, api.CodeNotFound, api.CodeExists,
		api.CodeInUse, api.CodeUnsupported, api.CodeTimeout, api.CodeFailed,
	} {
		w := start(t, &controltest.Service{Fail: &api.Error{Code: code, Text: "why <" + code + ">"}}, server.Change)
		err := w.client.Resume(testContext(t), "a")
		var e *api.Error
		if !errors.As(err, &e) || e.Code != code || e.Text != "why <"+code+">" {
			t.Errorf("%s: got %#v", code, err)
		}
	}
}

// TestErrorsAreOfOneLine: a line break would reach a terminal escaped.
func TestErrorsAreOfOneLine(t *testing.T) {
	both := errors.Join(errors.New("no name"), errors.New("no image"))
	for _, fail := range []error{both, &api.Error{Code: api.CodeFailed, Text: both.Error()}} {
		w := start(t, &controltest.Service{Fail: fail}, server.Change)
		var e *api.Error
		if err := w.client.Resume(testContext(t), "a"); !errors.As(err, &e) || e.Text != "no name; no image" {
			t.Errorf("got %#v", err)
		}
	}
}

func TestReadersAreNotToldCausesAndChangeNothing(t *testing.T) {
	s := &controltest.Service{Fail: errors.New("open /secret/disk: no such file")}
	w := start(t, s, server.Read)
	ctx := testContext(t)
	_, err := w.client.Export(ctx, "a")
	var e *api.Error
	if !errors.As(err, &e) || e.Code != api.CodeFailed || strings.Contains(e.Text, "secret") {
		t.Errorf("export: got %v", err)
	}
	if err := w.client.Metrics(ctx, &bytes.Buffer{}); !errors.As(err, &e) || strings.Contains(e.Text, "secret") {
		t.Errorf("metrics: got %v", err)
	}
	err = w.client.Resume(ctx, "a")
	if !errors.As(err, &e) || e.Code != api.CodeForbidden {
		t.Errorf("resume: got %v, want forbidden", err)
	}
	if got := s.Calls(); len(got) != 0 {
		t.Errorf("the service was asked for %q", got)
	}
	owner := start(t, s, server.Change)
	if _, err = owner.client.Export(ctx, "a"); !errors.As(err, &e) || !strings.Contains(e.Text, "secret") {
		t.Errorf("export, by an owner: got %v", err)
	}
}

func TestSuccessHasTheStatusThatIsDescribed(t *testing.T) {
	s := &controltest.Service{}
	s.Put(export("a"))
	s.PutClient(api.Client{ID: 1})
	w := start(t, s, server.Change)
	for _, tt := range []struct{ send, want string }{
		{request("GET", "/v1/status", ""), "200"},
		{request("GET", "/v1/exports", ""), "200"},
		{post("/v1/exports", `{"name":"b","image":"/x"}`), "201"},
		{request("GET", "/v1/exports/a", ""), "200"},
		{request("PATCH", "/v1/exports/a", `{}`), "200"},
		{request("DELETE", "/v1/exports/b", ""), "204"},
		{post("/v1/exports/a/pause", ""), "204"},
		{post("/v1/exports/a/resume", ""), "204"},
		{post("/v1/exports/a/resize", `{"size":1}`), "200"},
		{post("/v1/exports/a/snapshot", `{"overlay":"/o"}`), "200"},
		{request("DELETE", "/v1/exports/a/snapshot?force", ""), "200"},
		{request("GET", "/v1/clients", ""), "200"},
		{request("DELETE", "/v1/clients/1", ""), "204"},
		{request("GET", "/v1/stats", ""), "200"},
		{post("/v1/reload", ""), "200"},
		{request("GET", "/metrics", ""), "200"},
		{request("GET", "http://host/v1/status", ""), "200"},
	} {
		got := w.raw(t, tt.send)
		if status(got) != tt.want || !strings.Contains(got, "Connection: close\r\n") {
			t.Errorf("%.40q: got %q, want %s", tt.send, got, tt.want)
		}
		if _, body, _ := strings.Cut(got, "\r\n\r\n"); (body == "") != (tt.want == "204") || strings.Contains(body, "null") {
			t.Errorf("%.40q: body %q", tt.send, body)
		}
	}
}
