package main

import (
	"crypto/sha256"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

// TestTokenIsToldToNobody is AU-12 and AU-17 for tokens: a token opens its
// export, wrong and expired ones get what a name gets that does not exist, and nothing
// that the service says or keeps has a token in it.
func TestTokenIsToldToNobody(t *testing.T) {
	t.Parallel()
	token, expired := strings.Repeat("c3", 32), strings.Repeat("f6", 32)
	soon := time.Now().Add(time.Hour).Truncate(time.Second)
	s := newService(t, `
[log]
level = "debug"
`+exportA+fmt.Sprintf("[[export.grant]]\naccess = \"rw\"\ntoken-sha256 = [%q, %q]\n",
		config.Token{SHA256: sha256.Sum256([]byte(token)), Expires: soon},
		config.Token{SHA256: sha256.Sum256([]byte(expired)), Expires: soon.Add(-time.Hour)})+exportB)
	connect := func() net.Conn {
		t.Helper()
		c, err := net.Dial("unix", filepath.Join(s.dir, "nbd"))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		_ = c.SetDeadline(time.Now().Add(hangLimit))
		return c
	}
	dial := func() *client { return greet(t, connect()) }
	ask := func(c *client, o wire.Opt, name string) (wire.Rep, string) {
		t.Helper()
		rep, raw := c.option(o, wire.AppendInfoRequest(nil, wire.InfoRequest{Name: name, Infos: []wire.Info{wire.InfoName}}))
		return rep, string(raw)
	}
	missingRep, missing := ask(dial(), wire.OptInfo, "x")
	rep, raw := ask(dial(), wire.OptInfo, "a?"+strings.Repeat("d4", 32))
	if rep != missingRep || raw != missing {
		t.Errorf("a wrong token gets %v %q, a missing name %v %q", rep, raw, missingRep, missing)
	}
	if rep, raw := ask(dial(), wire.OptInfo, "a?"+expired); rep != missingRep || raw != missing {
		t.Errorf("an expired token gets %v %q, a missing name %v %q", rep, raw, missingRep, missing)
	}
	c := dial()
	rep, raw = ask(c, wire.OptInfo, "a?"+token)
	if rep != wire.RepAck || strings.Contains(raw, token) {
		t.Errorf("the right token: got %v %q", rep, raw)
	}
	_, list := c.option(wire.OptList, nil)
	if strings.Contains(string(list), token) || strings.Contains(string(list), "\x00\x00\x00\x01a") {
		t.Errorf("the list names what is for a token: %q", list)
	}
	k, _ := mustGo(t, connect(), "a?"+token)
	k.works()
	clients, err := s.ctl.Clients(t.Context(), nil)
	if err != nil || len(clients) != 1 || clients[0].Export != "a" {
		t.Errorf("clients: %+v, %v; want one of a", clients, err)
	}
	for i := range 10 {
		ask(dial(), wire.OptInfo, fmt.Sprintf("a?%064x", i))
	}
	if rep, _ := ask(dial(), wire.OptInfo, "a?"+token); rep != missingRep {
		t.Errorf("the right token after many wrong ones: got %v, want %v", rep, missingRep)
	}
	exports, err := s.ctl.Exports(t.Context())
	said := fmt.Sprintf("%+v %v", exports, err) + s.log()
	for _, name := range []string{"cmdline", "environ"} {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", s.cmd.Process.Pid, name))
		if err != nil {
			t.Fatal(err)
		}
		said += string(b)
	}
	hasNone(t, "what the service says", said, []string{token, expired, strings.Repeat("d4", 32), strings.Repeat("e5", 32)})
	s.stop()
}
