package export

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/backing/mem"
	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd"
	"github.com/vmdiskd/vmdiskd/internal/transport"
)

var (
	goodToken  = strings.Repeat("a1", 32)
	wrongToken = strings.Repeat("b2", 32)
)

// withToken is a registry with the exports a, for the good token, and b, for
// everybody, and its clock.
func withToken(t *testing.T) (*Registry, *time.Time) {
	t.Helper()
	now := time.Now()
	r := NewRegistry()
	r.attempts.now = func() time.Time { return now }
	grants := []Grant{{Access: ReadWrite, Tokens: []Token{{SHA256: sha256.Sum256([]byte("x"))}, {SHA256: sha256.Sum256([]byte(goodToken))}}}}
	for name, g := range map[string][]Grant{"a": grants, "b": nil, "c?d": grants} {
		s := Spec{Name: name, Device: mem.New(4096, nil), Settings: Settings{Grants: g}}
		if err := r.Add(s); err != nil {
			t.Fatal(err)
		}
	}
	return r, &now
}

func TestTokenOpensWhatItIsFor(t *testing.T) {
	unix := &transport.Peer{Kind: transport.Unix, UID: 7}
	plain := &transport.Peer{Kind: transport.TCP, Addr: "10.0.0.1:5"}
	tls := &transport.Peer{Kind: transport.TCP, Addr: "10.0.0.1:5", Encrypted: true}
	for _, tt := range []struct {
		ask  string
		peer *transport.Peer
		want string // canonical name; "" is none
	}{
		{"a?" + goodToken, unix, "a"},
		{"a?" + strings.ToUpper(goodToken), unix, "a"},
		{"a?" + goodToken, tls, "a"},
		{"a?" + goodToken, plain, ""},
		{"c?d?" + goodToken, unix, "c?d"},
		{"a", unix, ""},
		{"a?", unix, ""},
		{"a?" + wrongToken, unix, ""},
		{"a?" + goodToken[:62], unix, ""},
		{"a?" + goodToken + "00", unix, ""},
		{"a?" + goodToken + "?" + goodToken, unix, ""},
		{goodToken, unix, ""},
		{"b?" + wrongToken, unix, "b"}, // needs none
		{"x?" + goodToken, unix, ""},
	} {
		r, _ := withToken(t)
		info, err := r.Find(tt.ask, tt.peer)
		switch {
		case tt.want == "" && !errors.Is(err, nbd.ErrUnknownExport):
			t.Errorf("%s from %v: got %q, %v; want an unknown export", tt.ask, tt.peer, info.Name, err)
		case tt.want != "" && (err != nil || info.Name != tt.want):
			t.Errorf("%s from %v: got %q, %v; want %q", tt.ask, tt.peer, info.Name, err, tt.want)
		}
		for _, x := range r.List(tt.peer) {
			if x.Name != "b" {
				t.Errorf("the list names %q, which is for a token", x.Name)
			}
		}
	}
}

// TestWrongTokensOfAPeerAreBounded is AU-12: after five within a minute the
// right one is wrong, too, until the minute is over; other peers, and exports
// without tokens, are not affected.
func TestWrongTokensOfAPeerAreBounded(t *testing.T) {
	r, now := withToken(t)
	peer, other := &transport.Peer{Kind: transport.Unix, UID: 7}, &transport.Peer{Kind: transport.Unix, UID: 8}
	good := func(p *transport.Peer) bool {
		x, err := r.Open(t.Context(), "a?"+goodToken, p)
		if err == nil {
			x.Close()
		}
		return err == nil
	}
	for i := range 1000 {
		if i == limits.TokenAttempts-1 && !good(peer) {
			t.Fatal("the right token is refused too early")
		}
		if _, err := r.Find(fmt.Sprintf("a?%064x", i), peer); err == nil {
			t.Fatal("a wrong token was taken")
		}
	}
	if good(peer) {
		t.Error("the right token is looked at after a thousand wrong ones")
	}
	if !good(other) {
		t.Error("another peer suffers")
	}
	if _, err := r.Find("b", peer); err != nil {
		t.Errorf("an export without tokens: %v", err)
	}
	*now = now.Add(limits.TokenWindow - 1)
	if good(peer) {
		t.Error("the right token is looked at within the minute")
	}
	*now = now.Add(limits.TokenWindow)
	if !good(peer) {
		t.Error("the right token is refused after the minute")
	}
}

// TestOnlyGuessesAreCounted: a right token is none, whatever keeps its export from being
// opened, nor is one for a name that nobody has, nor the same wrong one again; and guesses
// at one export are none at another.
func TestOnlyGuessesAreCounted(t *testing.T) {
	peer := &transport.Peer{Kind: transport.Unix, UID: 7}
	elsewhere := &transport.Peer{Kind: transport.Unix, UID: 7, Scope: new(transport.Scope)}
	elsewhere.Scope.Show("b")
	for _, tt := range []struct {
		what  string
		ask   func(i int) string
		peer  *transport.Peer
		begin func(t *testing.T, r *Registry) // what is done before that
		end   func(t *testing.T, r *Registry) // and after it
	}{
		{what: "an unknown name", ask: func(i int) string { return fmt.Sprintf("x?%064x", i) }},
		{what: "one wrong token", ask: func(int) string { return "a?" + wrongToken }},
		{what: "another export", ask: func(i int) string { return fmt.Sprintf("c?d?%064x", i) }},
		{what: "another listener", ask: func(i int) string { return fmt.Sprintf("a?%064x", i) }, peer: elsewhere},
		{what: "an export that leaves", ask: func(int) string { return "a?" + goodToken },
			begin: func(t *testing.T, r *Registry) {
				x, err := r.Open(t.Context(), "a?"+goodToken, peer)
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(x.Close)
				over, cancel := context.WithCancel(t.Context())
				cancel()
				if err := r.Remove(over, "a", nil, true); !errors.Is(err, ErrInUse) {
					t.Fatalf("removal: %v, want %v", err, ErrInUse)
				}
			},
			end: func(t *testing.T, r *Registry) {
				if !r.Readmit("a", nil) {
					t.Fatal("the export does not come back")
				}
			}},
		{what: "an export that is away", ask: func(int) string { return "a?" + goodToken },
			begin: func(t *testing.T, r *Registry) {
				if err := r.Remove(t.Context(), "a", nil, true); err != nil {
					t.Fatal(err)
				}
			},
			end: func(t *testing.T, r *Registry) {
				s := Spec{Name: "a", Device: mem.New(4096, nil)}
				s.Grants = []Grant{{Access: ReadWrite, Tokens: []Token{{SHA256: sha256.Sum256([]byte(goodToken))}}}}
				if err := r.Add(s); err != nil {
					t.Fatal(err)
				}
			}},
	} {
		t.Run(tt.what, func(t *testing.T) {
			r, _ := withToken(t)
			if tt.begin != nil {
				tt.begin(t, r)
			}
			for i := range 2 * limits.TokenAttempts {
				if _, err := r.Find(tt.ask(i), cmp.Or(tt.peer, peer)); !errors.Is(err, nbd.ErrUnknownExport) {
					t.Fatalf("got %v, want %v", err, nbd.ErrUnknownExport)
				}
			}
			if tt.end != nil {
				tt.end(t, r)
			}
			if _, err := r.Find("a?"+goodToken, peer); err != nil {
				t.Errorf("the right token after that: %v", err)
			}
		})
	}
}

func TestWrongTokensOfManyPeersTakeBoundedMemory(t *testing.T) {
	r, now := withToken(t)
	const peers = limits.TokenPeers + 100
	for i := range peers {
		*now = now.Add(time.Millisecond)
		r.attempts.wrong(guessed{fmt.Sprint(i), "a"}, digest{})
	}
	if n := len(r.attempts.made); n > limits.TokenPeers {
		t.Errorf("%d peers are counted, allowed are %d", n, limits.TokenPeers)
	}
	if r.attempts.made[guessed{fmt.Sprint(peers - 1), "a"}] == nil {
		t.Error("the newest peer is not counted")
	}
}

// TestTokenExpires: from its time on a token is as wrong as any other, and a
// clock that is set back makes no token good again.
func TestTokenExpires(t *testing.T) {
	peer := &transport.Peer{Kind: transport.Unix, UID: 7}
	start := time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
	now := start
	r := NewRegistry()
	r.clock = newClock(func() time.Time { return now })
	long := strings.Repeat("c3", 32)
	grants := []Grant{{Access: ReadWrite, Tokens: []Token{
		{SHA256: sha256.Sum256([]byte(goodToken)), Expires: start.Add(time.Hour)},
		{SHA256: sha256.Sum256([]byte(long))},
	}}}
	if err := r.Add(Spec{Name: "a", Device: mem.New(4096, nil), Settings: Settings{Grants: grants}}); err != nil {
		t.Fatal(err)
	}
	_, wrong := r.Find("a?"+wrongToken, peer)
	for _, tt := range []struct {
		at   time.Duration // of the system's clock, since the start
		want bool
	}{
		{0, true}, {time.Hour - time.Nanosecond, true}, {-24 * time.Hour, true},
		{time.Hour, false}, {2 * time.Hour, false}, {0, false}, {-24 * time.Hour, false},
	} {
		now = start.Add(tt.at)
		x, err := r.Open(t.Context(), "a?"+goodToken, peer)
		if (err == nil) != tt.want || err != nil && err != wrong {
			t.Errorf("after %v: got %v, want it taken: %v, or %v", tt.at, err, tt.want, wrong)
		}
		if err == nil {
			x.Close()
		}
		r.attempts = newAttempts()
		if _, err := r.Find("a?"+long, peer); err != nil {
			t.Errorf("after %v, a token without an end: %v", tt.at, err)
		}
	}
	now = start.Add(2 * time.Hour)
	_, _ = r.Find("a?"+goodToken, peer)
	for i := range limits.TokenAttempts - 1 {
		_, _ = r.Find(fmt.Sprintf("a?%064x", i), peer)
	}
	if _, err := r.Find("a?"+long, peer); err == nil {
		t.Error("expired tokens are not counted as wrong ones")
	}
}

// TestClockGoesOnWhenItIsSetBack: by the monotonic clock, which the system's
// setting does not touch.
func TestClockGoesOnWhenItIsSetBack(t *testing.T) {
	real := time.Now()
	at := real
	c := newClock(func() time.Time { return at })
	if got := c.now(); !got.Equal(real) {
		t.Errorf("at the start: got %v, want %v", got, real)
	}
	at = real.Add(time.Minute)
	c.told = c.told.Add(time.Hour) // as it is when the clock was ahead by an hour
	if got, want := c.now(), real.Add(time.Hour+time.Minute); !got.Equal(want) {
		t.Errorf("a minute after it was set back: got %v, want %v", got, want)
	}
	at = real.Add(2 * time.Hour)
	if got, want := c.now(), real.Add(3*time.Hour); !got.Equal(want) {
		t.Errorf("later: got %v, want %v", got, want)
	}
	at = time.Date(9000, 1, 1, 0, 0, 0, 0, time.UTC)
	if got := c.now(); !got.Equal(at) {
		t.Errorf("set forward: got %v, want %v", got, at)
	}
}

func TestExportCannotBeNamedLikeAToken(t *testing.T) {
	r := NewRegistry()
	if err := r.Add(Spec{Name: "a?" + goodToken, Device: mem.New(4096, nil)}); err == nil {
		t.Error("the name was taken")
	}
}
