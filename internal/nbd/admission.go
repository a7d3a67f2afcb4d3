package nbd

import (
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

var (
	errTooManyConns       = errors.New("too many connections")
	errTooManyPeerConns   = errors.New("too many connections of this peer")
	errTooManyHandshaking = errors.New("too many connections in handshake")
	errMadeRoom           = errors.New("half open when another peer needed the place")
)

// admission counts connections: all of them, those of each peer, and those that
// are half open, not in transmission yet. Of these few are in handshake and the
// others wait for their turn, so that a burst is served. They hold no place
// against anybody who has fewer: the oldest of whoever has most makes room.
type admission struct {
	mu     sync.Mutex
	all    int               // guarded by mu
	turns  int               // guarded by mu; connections in handshake
	peers  map[string]*peer  // guarded by mu
	guests map[string]*guest // guarded by mu
	early  []*slot           // guarded by mu; the half-open ones, as they came
	again  *time.Timer       // guarded by mu; nil until somebody waits for limits.HandshakeGrace
}

// peer is what the connections of one peer share.
type peer struct {
	key    string
	all    int // guarded by admission.mu
	budget budget
}

// guest is what one guest has of half-open connections: one user runs many, and
// none of them keeps the others out. Its counts are guarded by admission.mu.
type guest struct {
	name       string
	all, turns int
}

// slot is one connection's place.
type slot struct {
	a     *admission
	peer  *peer
	guest *guest
	end   func()        // closes the connection, and waits for nothing
	turn  chan struct{} // closed when the handshake may begin, or is cut

	stage stage     // guarded by admission.mu
	since time.Time // guarded by admission.mu; when the handshake began, or zero
}

// stage is how far a connection is.
type stage uint8

const (
	isWaiting stage = iota
	inHandshake
	isEstablished
	wasCut // to make room
	hasLeft
)

func newAdmission() *admission {
	return &admission{peers: make(map[string]*peer), guests: make(map[string]*guest)}
}

// enter takes a place for a connection of a guest of the peer that key names.
// end closes the connection.
func (a *admission) enter(key, name string, end func()) (*slot, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	s := &slot{a: a, peer: a.peers[key], guest: a.guests[name], end: end, turn: make(chan struct{})}
	if s.peer == nil {
		s.peer = &peer{key: key}
		s.peer.budget.init(limits.RequestsPerPeer, limits.BytesPerPeer)
	}
	if s.guest == nil {
		s.guest = &guest{name: name}
	}
	if s.peer.all >= limits.ConnectionsPerPeer && !a.cutLocked(s.spareLocked(ofAll, func(x *slot) bool { return x.peer == s.peer })) {
		return nil, errTooManyPeerConns
	}
	if a.all >= limits.Connections && !a.cutLocked(s.spareLocked(ofAll, func(*slot) bool { return true })) {
		return nil, errTooManyConns
	}
	a.peers[key], a.guests[name] = s.peer, s.guest
	a.all++
	s.peer.all++
	s.guest.all++
	a.early = append(a.early, s)
	a.passLocked()
	return s, nil
}

func ofAll(g *guest) int   { return g.all }
func ofTurns(g *guest) int { return g.turns }

// spareLocked is who makes room for s among some that are half open: the oldest
// of the guest that has most by what count counts, and what waits before what is
// in handshake. It is nil if none has more than the guest of s.
func (s *slot) spareLocked(count func(*guest) int, some func(*slot) bool) (spare *slot) {
	most := count(s.guest)
	for _, x := range s.a.early {
		if !some(x) {
			continue
		}
		n := count(x.guest)
		if n > most || n == most && spare != nil && x.since.Before(spare.since) {
			most, spare = n, x
		}
	}
	return spare
}

// cutLocked ends the connection of s, and reports whether there is one.
func (a *admission) cutLocked(s *slot) bool {
	if s == nil {
		return false
	}
	if s.stage == isWaiting {
		close(s.turn)
	}
	s.removeLocked(wasCut)
	s.end()
	return true
}

// passLocked gives turns while there are places, or spare ones whose grace is
// over.
func (a *admission) passLocked() {
	for s := a.nextLocked(); s != nil; s = a.nextLocked() {
		if a.turns >= limits.Handshaking {
			x := s.spareLocked(ofTurns, func(x *slot) bool { return x.stage == inHandshake })
			if x == nil {
				return
			}
			if grace := limits.HandshakeGrace - time.Since(x.since); grace > 0 {
				a.passInLocked(grace)
				return
			}
			a.cutLocked(x)
		}
		a.turns++
		s.guest.turns++
		s.stage, s.since = inHandshake, time.Now()
		close(s.turn)
	}
}

// passInLocked has turns given after d.
func (a *admission) passInLocked(d time.Duration) {
	if a.again != nil {
		a.again.Reset(d)
		return
	}
	a.again = time.AfterFunc(d, func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		a.passLocked()
	})
}

// nextLocked is the first that waits of the guests with fewest turns, or nil:
// none waits, or they have all the turns that one may have.
func (a *admission) nextLocked() (next *slot) {
	fewest := limits.HandshakingPerPeer
	for _, x := range a.early {
		if x.stage == isWaiting && x.guest.turns < fewest {
			fewest, next = x.guest.turns, x
		}
	}
	return next
}

// handshake waits until the connection may begin its handshake, until the
// time for that is over, or until quit is closed.
func (s *slot) handshake(over <-chan time.Time, quit <-chan struct{}) error {
	select {
	case <-s.turn:
		return nil
	case <-over:
	case <-quit:
	}
	return errTooManyHandshaking
}

// established ends the handshake's claim.
func (s *slot) established() {
	s.a.mu.Lock()
	defer s.a.mu.Unlock()
	if s.stage < isEstablished {
		s.settleLocked()
		s.stage = isEstablished
		s.a.passLocked()
	}
}

// madeRoom tells whether the connection was ended to make room.
func (s *slot) madeRoom() bool {
	s.a.mu.Lock()
	defer s.a.mu.Unlock()
	return s.stage == wasCut
}

// settleLocked takes s from what is half open.
func (s *slot) settleLocked() {
	a := s.a
	i := slices.Index(a.early, s)
	a.early = slices.Delete(a.early, i, i+1)
	s.guest.all--
	if s.stage == inHandshake {
		s.guest.turns--
		a.turns--
	}
	if s.guest.all == 0 {
		delete(a.guests, s.guest.name)
	}
}

func (s *slot) leave() {
	s.a.mu.Lock()
	defer s.a.mu.Unlock()
	if s.stage != wasCut {
		s.removeLocked(hasLeft)
		s.a.passLocked()
	}
}

// removeLocked gives the place of s back.
func (s *slot) removeLocked(as stage) {
	if s.stage < isEstablished {
		s.settleLocked()
	}
	s.stage = as
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
