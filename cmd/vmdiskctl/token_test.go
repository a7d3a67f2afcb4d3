package main

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

func newPair(t *testing.T, args ...string) (p tokenPair) {
	t.Helper()
	must(t, json.Unmarshal([]byte(want(t, exitDone, append([]string{"token", "new", "--json"}, args...)...)), &p))
	if len(p.Token) != limits.TokenDigits || !strings.HasPrefix(p.SHA, fmt.Sprintf("%x", sha256.Sum256([]byte(p.Token)))) {
		t.Fatalf("got %+v", p)
	}
	return p
}

func TestTokenMayExpire(t *testing.T) {
	if p := newPair(t); p.Expires != nil || strings.Contains(p.SHA, "@") {
		t.Errorf("without an end: got %+v", p)
	}
	if a, b := newPair(t), newPair(t); a.Token == b.Token {
		t.Error("two tokens are the same")
	}
	before := time.Now().Truncate(time.Second)
	p := newPair(t, "--expires=24h")
	if p.Expires == nil || p.Expires.Before(before.Add(24*time.Hour)) || p.Expires.After(time.Now().Add(24*time.Hour)) ||
		!strings.HasSuffix(p.SHA, "@"+p.Expires.UTC().Format(time.RFC3339)) {
		t.Errorf("after a day: got %+v", p)
	}
	if p := newPair(t, "--expires=9000-01-01T02:00:00+02:00"); !strings.HasSuffix(p.SHA, "@9000-01-01T00:00:00Z") {
		t.Errorf("at a time: got %+v", p)
	}
	if out := want(t, exitDone, "token", "new", "--expires=9000-01-01T00:00:00Z"); !strings.Contains(out, "\nexpires:      9000-01-01T00:00:00Z\n") {
		t.Errorf("got %q", out)
	}
	for _, bad := range []string{"0", "0s", "-1h", "1d", "24", "2001-01-01T00:00:00Z", "9000-01-01", "9000-01-01T00:00:00.5Z", "10000-01-01T00:00:00Z", "9223372036854775807h", "soon"} {
		want(t, exitUsage, "token", "new", "--expires="+bad)
	}
}

// TestDaemonTakesTokensThatHaveNotExpired: a token of the command opens the
// export that has its sum, one with a time that is over does not, and the list
// tells them apart.
func TestDaemonTakesTokensThatHaveNotExpired(t *testing.T) {
	d := startDaemon(t)
	fresh, old, lasting := newPair(t, "--expires=24h"), newPair(t), newPair(t)
	want(t, exitDone, "export", "add", "--grant=rw,token-sha256="+fresh.SHA+",token-sha256="+old.SHA+"@2001-01-01T00:00:00Z", "a", d.image(t, "a.img"))
	want(t, exitDone, "export", "add", "--grant=ro,token-sha256="+lasting.SHA, "b", d.image(t, "b.img"))
	uri := func(name string) string {
		return "nbd+unix:///" + url.PathEscape(name) + "?socket=" + url.QueryEscape(d.dir+"/nbd")
	}
	want(t, exitDone, "info", uri("a?"+fresh.Token))
	want(t, exitDone, "info", uri("b?"+lasting.Token))
	want(t, exitFailed, "info", uri("a?"+old.Token))
	want(t, exitFailed, "info", uri("a?"+lasting.Token))
	var rows []tokenRow
	must(t, json.Unmarshal([]byte(want(t, exitDone, "token", "list", "--json")), &rows))
	if len(rows) != 3 || rows[0].Export != "a" || rows[0].Expired || rows[0].Expires == nil || !rows[0].Expires.Equal(*fresh.Expires) ||
		!rows[1].Expired || rows[1].SHA != old.SHA || rows[2].Export != "b" || rows[2].Access != "ro" || rows[2].Expires != nil {
		t.Errorf("got %+v", rows)
	}
	table := want(t, exitDone, "token", "list")
	for _, line := range []string{
		"a       rw      2001-01-01T00:00:00Z (expired)  " + old.SHA, "b       ro      never                           " + lasting.SHA,
	} {
		if !strings.Contains(table, line+"\n") {
			t.Errorf("%q is not in\n%s", line, table)
		}
	}
	for _, p := range []tokenPair{fresh, old, lasting} {
		if strings.Contains(table+want(t, exitDone, "export", "list", "--json"), p.Token) {
			t.Error("a token is told")
		}
	}
}
