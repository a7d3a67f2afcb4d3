package server_test

import (
	"encoding/json"
	"os/exec"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/internal/control/controltest"
	"github.com/vmdiskd/vmdiskd/internal/control/server"
)

// TestCurlUsesAllOfIt is what an operator without vmdiskctl does.
func TestCurlUsesAllOfIt(t *testing.T) {
	s := &controltest.Service{}
	w := start(t, s, server.Change)
	for _, tt := range []struct {
		args []string
		want string // the reply, or its begin, and the status
	}{
		{[]string{"http://x/v1/exports"}, "[]\n200"},
		{[]string{"http://x/v1/exports", "-d", `{"name":"a/b","image":"/i","rate":{"bytes":"10M"}}`}, `{"name":"a/b","image":"/i","rate":{"bytes":10485760},`},
		{[]string{"http://x/v1/exports", "-d", `{"name":"a/b","image":"/i"}`}, `{"code":"exists",`},
		{[]string{"http://x/v1/exports/a%2Fb"}, `{"name":"a/b",`},
		{[]string{"http://x/v1/exports/a/b"}, `{"code":"not-found",`},
		{[]string{"-XPATCH", "http://x/v1/exports/a%2Fb", "-d", `{"description":"words"}`}, `{"name":"a/b","description":"words",`},
		{[]string{"-XPOST", "http://x/v1/exports/a%2Fb/pause"}, "204"},
		{[]string{"-XPOST", "http://x/v1/exports/a%2Fb/pause", "-d", `{"limit":"1s"}`}, "204"},
		{[]string{"-XPOST", "http://x/v1/exports/a%2Fb/resume"}, "204"},
		{[]string{"http://x/v1/exports/a%2Fb/resize", "-d", `{"size":1048576}`}, `{"name":"a/b",`},
		{[]string{"http://x/v1/exports/a%2Fb/snapshot", "-d", `{"overlay":"/o"}`}, `{"name":"a/b",`},
		{[]string{"-XDELETE", "http://x/v1/exports/a%2Fb/snapshot"}, `{"code":"forbidden",`},
		{[]string{"-G", "http://x/v1/clients", "--data-urlencode", "export=a/b"}, "[]\n200"},
		{[]string{"-XDELETE", "http://x/v1/clients/1"}, `{"code":"not-found",`},
		{[]string{"http://x/v1/stats"}, `[{"export":"a/b",`},
		{[]string{"-XPOST", "http://x/v1/reload?dry-run"}, "{\"dry-run\":true,\"changes\":[]}\n200"},
		{[]string{"http://x/metrics"}, "vmdiskd_exports 1\n200"},
		{[]string{"-XDELETE", "http://x/v1/exports/a%2Fb?force&timeout=1s"}, "204"},
		{[]string{"-I", "http://x/v1/status"}, "HTTP/1.1 405 "},
	} {
		args := append([]string{"-sS", "-m30", "-w", "%{http_code}", "--unix-socket", w.path}, tt.args...)
		out, err := exec.CommandContext(testContext(t), "curl", args...).CombinedOutput()
		if err != nil || !strings.HasPrefix(string(out), tt.want) {
			t.Errorf("curl %q: got %q, %v, want %q", tt.args, out, err, tt.want)
		}
	}
	want := `add "a/b" image "/i" files 0 persist false|add "a/b" image "/i" files 0 persist false|patch "a/b"|` +
		`pause "a/b" for 0s|pause "a/b" for 1s|resume "a/b"|resize "a/b" to 1048576 by 0|snapshot "a/b" overlay "/o" files 0|forget "a/b" force false dry false|disconnect 1|reload dry true|remove "a/b" force true`
	if got := strings.Join(s.Calls(), "|"); got != want {
		t.Errorf("calls:\n got %s\nwant %s", got, want)
	}
}

func TestCurlFollowsEvents(t *testing.T) {
	s := &controltest.Service{}
	w := start(t, s, server.Read)
	cmd := exec.CommandContext(testContext(t), "curl", "-sSN", "-m30", "--unix-socket", w.path, "http://x/v1/events")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	// Nothing says when curl is connected: there are events until it is.
	stop := make(chan struct{})
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			default:
				s.Publish(api.Event{Kind: "reloaded"})
			}
		}
	}()
	var e api.Event
	if err := json.NewDecoder(out).Decode(&e); err != nil || e.Kind != "reloaded" {
		t.Errorf("got %+v, %v", e, err)
	}
	close(stop)
	<-done
	if err := cmd.Process.Kill(); err != nil {
		t.Error(err)
	}
	_ = cmd.Wait()
}
