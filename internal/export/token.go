package export

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"strings"
	"sync"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/transport"
)

// A token comes with the name of an export: NAME?TOKEN, TOKEN being
// limits.TokenDigits hexadecimal digits. No export has a name of that form, so
// that a token is never taken for a part of a name and told to somebody.

// digest is the SHA-256 of a token, which is all that is kept of it.
type digest = [sha256.Size]byte

// Token is what a grant has of a token.
type Token struct {
	SHA256  digest
	Expires time.Time // from then on it is wrong; zero for never
}

// cutToken takes the token off a name; nil if there is none.
func cutToken(name string) (string, *digest) {
	i := strings.LastIndexByte(name, '?')
	if i < 0 || len(name)-i-1 != limits.TokenDigits {
		return name, nil
	}
	token := name[i+1:]
	if _, err := hex.DecodeString(token); err != nil {
		return name, nil
	}
	d := sha256.Sum256([]byte(strings.ToLower(token)))
	return name[:i], &d
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

// attempts bounds the wrong tokens of each peer.
type attempts struct {
	now func() time.Time

	mu    sync.Mutex
	peers map[string]*failures // guarded by mu
}

// failures are the last wrong tokens of a peer, the oldest first.
type failures struct {
	at [limits.TokenAttempts]time.Time
	n  int
}

func newAttempts() *attempts {
	return &attempts{now: time.Now, peers: map[string]*failures{}}
}

// allowed tells whether another token of the peer is looked at.
func (a *attempts) allowed(key string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	f := a.peers[key]
	return f == nil || f.recent(a.now()) < limits.TokenAttempts
}

// wrong counts a wrong token. Peers that cannot be counted any more take the
// place of the one that was wrong the longest time ago.
func (a *attempts) wrong(key string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	now := a.now()
	f := a.peers[key]
	if f == nil {
		if len(a.peers) >= limits.TokenPeers {
			a.makeRoomLocked(now)
		}
		f = &failures{}
		a.peers[key] = f
	}
	if f.recent(now); f.n < len(f.at) {
		f.at[f.n] = now
		f.n++
	}
}

func (a *attempts) makeRoomLocked(now time.Time) {
	oldest, found := "", time.Time{}
	for key, f := range a.peers {
		if f.recent(now) == 0 {
			delete(a.peers, key)
			continue
		}
		if last := f.at[f.n-1]; oldest == "" || last.Before(found) {
			oldest, found = key, last
		}
	}
	if len(a.peers) >= limits.TokenPeers {
		delete(a.peers, oldest)
	}
}

// recent forgets what is older than limits.TokenWindow and counts the rest.
func (f *failures) recent(now time.Time) int {
	kept := 0
	for _, t := range f.at[:f.n] {
		if now.Sub(t) < limits.TokenWindow {
			f.at[kept] = t
			kept++
		}
	}
	f.n = kept
	return kept
}
