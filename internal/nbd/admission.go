package nbd

import (
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

var (
	errTooManyConns       = errors.New("too many connections")
	errTooManyPeerConns   = errors.New("too many connections of this peer")
	errTooManyHandshaking = errors.New("too many connections in handshake")
)

// admission counts connections: all of them, those in handshake, and both for
// each peer. What is one too many is refused; what is one too many in
// handshake waits for its turn, so that a burst is served and a flood of
// half-open connections cannot take the slot of an established guest.
type admission struct {
	early chan struct{} // holds a token per connection in handshake

	mu    sync.Mutex
	all   int              // guarded by mu
	peers map[string]*peer // guarded by mu
}

// peer is what the connections of one peer share.
type peer struct {
	key    string
	early  chan struct{} // as in admission
	all    int           // guarded by admission.mu
	budget budget
}

// slot is one connection's place.
type slot struct {
	a     *admission
	peer  *peer
	early bool // holds its tokens
}

func newAdmission() *admission {
	return &admission{
		early: make(chan struct{}, limits.Handshaking),
		peers: make(map[string]*peer),
	}
}

// enter takes a place for a connection of the peer that key names.
func (a *admission) enter(key string) (*slot, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.all >= limits.Connections {
		return nil, errTooManyConns
	}
	p := a.peers[key]
	if p == nil {
		p = &peer{key: key, early: make(chan struct{}, limits.HandshakingPerPeer)}
		p.budget.init(limits.RequestsPerPeer, limits.BytesPerPeer)
		a.peers[key] = p
	}
	if p.all >= limits.ConnectionsPerPeer {
		return nil, errTooManyPeerConns
	}
	a.all++
	p.all++
	return &slot{a: a, peer: p}, nil
}

// handshake waits until the connection may begin its handshake, until the
// time for that is over, or until quit is closed.
func (s *slot) handshake(over <-chan time.Time, quit <-chan struct{}) error {
	for _, tokens := range [...]chan struct{}{s.peer.early, s.a.early} {
		select {
		case tokens <- struct{}{}:
			continue
		case <-over:
		case <-quit:
		}
		if tokens == s.a.early {
			<-s.peer.early
		}
		return errTooManyHandshaking
	}
	s.early = true
	return nil
}

// established ends the handshake's claim.
func (s *slot) established() {
	if s.early {
		s.early = false
		<-s.a.early
		<-s.peer.early
	}
}

func (s *slot) leave() {
	s.established()
	s.a.mu.Lock()
	defer s.a.mu.Unlock()
	s.a.all--
	s.peer.all--
	if s.peer.all == 0 {
		delete(s.a.peers, s.peer.key)
	}
}

// budget bounds requests and bytes in flight. Taking never waits; whoever is
// about to take more waits first until it is within bounds, so that one
// request may overshoot, but no second one follows it.
type budget struct {
	requests, bytes       atomic.Int64
	maxRequests, maxBytes int64

	waiters atomic.Int32
	mu      sync.Mutex
	room    sync.Cond
}

func (b *budget) init(requests, bytes int64) {
	b.room.L = &b.mu
	b.maxRequests, b.maxBytes = requests, bytes
}

func (b *budget) take(requests, bytes int) {
	b.requests.Add(int64(requests))
	b.bytes.Add(int64(bytes))
}

// reserve takes bytes unless most are taken. The last one may exceed that.
func (b *budget) reserve(bytes int, most int64) bool {
	for {
		old := b.bytes.Load()
		if old >= most {
			return false
		}
		if b.bytes.CompareAndSwap(old, old+int64(bytes)) {
			return true
		}
	}
}

func (b *budget) give(requests, bytes int) {
	b.requests.Add(int64(-requests))
	b.bytes.Add(int64(-bytes))
	b.wake()
}

func (b *budget) full() bool {
	return b.requests.Load() >= b.maxRequests || b.bytes.Load() >= b.maxBytes
}

func (b *budget) empty() bool { return b.requests.Load() == 0 && b.bytes.Load() == 0 }

// wait returns when there is room, or stop says so; whoever makes stop true
// calls wake.
func (b *budget) wait(stop func() bool) {
	b.waiters.Add(1)
	defer b.waiters.Add(-1)
	b.mu.Lock()
	defer b.mu.Unlock()
	for b.full() && !stop() {
		b.room.Wait()
	}
}

func (b *budget) wake() {
	if b.waiters.Load() == 0 {
		return
	}
	// A waiter between its test and its sleep holds mu.
	b.mu.Lock()
	b.room.Broadcast()
	b.mu.Unlock()
}
