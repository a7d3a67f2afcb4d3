package export

import (
	"crypto/sha256"
	"crypto/subtle"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/transport"
)

// digest is the SHA-256 of a token, which is all that is kept of it.
type digest = [sha256.Size]byte

// Token is what a grant has of a token.
type Token struct {
	SHA256  digest
	Expires time.Time // from then on it is wrong; zero for never
}

// cutToken takes the token off a name; nil if there is none.
func cutToken(name string) (string, *digest) {
	export, token := transport.CutToken(name)
	if token == "" {
		return name, nil
	}
	d := sha256.Sum256([]byte(strings.ToLower(token)))
	return export, &d
}

// shownToken is the token that came with a name, and when.
type shownToken struct {
	digest
	at time.Time // by the clock of the registry
}

// hasToken reports whether t is one of the tokens of g that have not expired, if
// g names any. It compares all of them.
func (g *Grant) hasToken(t *shownToken) bool {
	if len(g.Tokens) == 0 {
		return true
	}
	if t == nil {
		return false
	}
	same := 0
	for i := range g.Tokens {
		x := &g.Tokens[i]
		is := subtle.ConstantTimeCompare(x.SHA256[:], t.digest[:])
		if x.Expires.IsZero() || t.at.Before(x.Expires) {
			same |= is
		}
	}
	return same == 1
}

// clock never goes back: when the clock of the system is set back, it goes on
// from where it was, at the pace of the monotonic clock. So a token that was
// refused once for its age is never taken again.
type clock struct {
	read func() time.Time // with a monotonic reading
	last time.Time        // what read has said last
	told time.Time        // without a monotonic reading
}

func newClock(read func() time.Time) clock {
	now := read()
	return clock{read, now, now.Round(0)}
}

func (c *clock) now() time.Time {
	t := c.read()
	c.told = c.told.Add(max(0, t.Sub(c.last)))
	c.last = t
	if t = t.Round(0); t.After(c.told) {
		c.told = t
	}
	return c.told
}

// private tells whether a token of p was seen by nobody else: TCP without
// encryption shows it to the network.
func private(p *transport.Peer) bool {
	return p != nil && (p.Kind != transport.TCP || p.Encrypted)
}

// attempts bounds the wrong tokens of each peer for each export.
type attempts struct {
	now func() time.Time

	mu   sync.Mutex
	made map[guessed]*failures // guarded by mu
}

// guessed is who guesses at what. Each name by itself: if guesses at one kept a peer from
// another, it could tell by its own export whether the one exists.
type guessed struct {
	peer string // transport.Peer.Key
	name string // as it was asked for, without the token
}

// failures are the last wrong tokens for a name, each once, the oldest first.
type failures struct {
	list [limits.TokenAttempts]failure
	n    int
}

type failure struct {
	token digest
	at    time.Time
}

func newAttempts() *attempts {
	return &attempts{now: time.Now, made: map[guessed]*failures{}}
}

// allowed tells whether another token is looked at.
func (a *attempts) allowed(g guessed) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	f := a.made[g]
	return f == nil || f.recent(a.now()) < limits.TokenAttempts
}

// wrong counts a wrong token, which is no other guess when it is shown again. What
// cannot be counted any more takes the place of what was wrong the longest time ago.
func (a *attempts) wrong(g guessed, token digest) {
	a.mu.Lock()
	defer a.mu.Unlock()
	now := a.now()
	f := a.made[g]
	if f == nil {
		if len(a.made) >= limits.TokenPeers {
			a.makeRoomLocked(now)
		}
		f = &failures{}
		a.made[g] = f
	}
	if f.recent(now); f.n < len(f.list) && !f.has(token) {
		f.list[f.n] = failure{token, now}
		f.n++
	}
}

func (a *attempts) makeRoomLocked(now time.Time) {
	var oldest guessed
	var found time.Time
	for g, f := range a.made {
		if f.recent(now) == 0 {
			delete(a.made, g)
			continue
		}
		if last := f.list[f.n-1].at; found.IsZero() || last.Before(found) {
			oldest, found = g, last
		}
	}
	if len(a.made) >= limits.TokenPeers {
		delete(a.made, oldest)
	}
}

// has tells whether a token was counted.
func (f *failures) has(token digest) bool {
	return slices.ContainsFunc(f.list[:f.n], func(x failure) bool { return x.token == token })
}

// recent forgets what is older than limits.TokenWindow and counts the rest.
func (f *failures) recent(now time.Time) int {
	kept := 0
	for _, x := range f.list[:f.n] {
		if now.Sub(x.at) < limits.TokenWindow {
			f.list[kept] = x
			kept++
		}
	}
	f.n = kept
	return kept
}
