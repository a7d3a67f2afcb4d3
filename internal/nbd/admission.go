package nbd

import (
	"errors"
	"sync"
	"sync/atomic"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

var (
	errTooManyConns       = errors.New("too many connections")
	errTooManyPeerConns   = errors.New("too many connections of this peer")
	errTooManyHandshaking = errors.New("too many connections in handshake")
)

// admission counts connections: all of them, those in handshake, and both
// for each peer. A slot that a flood of half-open connections takes is not
// one that an established guest loses.
type admission struct {
	mu    sync.Mutex
	all   int              // guarded by mu
	early int              // guarded by mu; in handshake
	peers map[string]*peer // guarded by mu
}

// peer is what the connections of one peer share.
type peer struct {
	key    string
	all    int // guarded by admission.mu
	early  int // guarded by admission.mu
	budget budget
}

// slot is one connection's place.
type slot struct {
	a     *admission
	peer  *peer
	early bool
}

func (a *admission) enter(key string) (*slot, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	p := a.peers[key]
	if p == nil {
		p = &peer{key: key}
		p.budget.init(limits.RequestsPerPeer, limits.BytesPerPeer)
	}
	switch {
	case a.all >= limits.Connections:
		return nil, errTooManyConns
	case p.all >= limits.ConnectionsPerPeer:
		return nil, errTooManyPeerConns
	case a.early >= limits.Handshaking || p.early >= limits.HandshakingPerPeer:
		return nil, errTooManyHandshaking
	}
	if a.peers == nil {
		a.peers = make(map[string]*peer)
	}
	a.peers[key] = p
	a.all++
	a.early++
	p.all++
	p.early++
	return &slot{a: a, peer: p, early: true}, nil
}

// established ends the handshake's claim.
func (s *slot) established() {
	s.a.mu.Lock()
	defer s.a.mu.Unlock()
	s.leaveEarlyLocked()
}

func (s *slot) leaveEarlyLocked() {
	if s.early {
		s.early = false
		s.a.early--
		s.peer.early--
	}
}

func (s *slot) leave() {
	s.a.mu.Lock()
	defer s.a.mu.Unlock()
	s.leaveEarlyLocked()
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

func (b *budget) give(requests, bytes int) {
	b.requests.Add(int64(-requests))
	b.bytes.Add(int64(-bytes))
	b.wake()
}

func (b *budget) full() bool {
	return b.requests.Load() >= b.maxRequests || b.bytes.Load() >= b.maxBytes
}

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
