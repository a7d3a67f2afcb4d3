package nbd

import (
	"cmp"
	"crypto/tls"
	"log/slog"
	"slices"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/obs"
	"github.com/vmdiskd/vmdiskd/internal/transport"
)

// ClientInfo describes a connection in transmission. Its texts may be the
// peer's own.
type ClientInfo struct {
	ID     uint64 // rises from connection to connection, from 1
	Peer   transport.Peer
	Export string    // canonical name
	Since  time.Time // when transmission began

	TLSVersion string // "" without TLS
	TLSCipher  string // "" without TLS
	CertName   string // common name of the verified client certificate, or ""

	Writable bool
	Agreed   Features

	InFlight int64  // requests that wait for the storage or for the peer to take the reply
	Requests uint64 // decoded
	BytesIn  uint64 // received since transmission began
	BytesOut uint64 // sent since transmission began
	Stalled  bool   // leaves replies unread or a request half sent
	Leaving  bool   // no further requests are read
}

// Features are what a connection has negotiated.
type Features struct {
	Structured bool     // structured replies
	Extended   bool     // extended headers
	Contexts   []string // metadata contexts, in the order of their IDs
}

// Clients describes the connections in transmission, in the order of their
// IDs.
func (s *Server) Clients() []ClientInfo {
	sessions := s.sessions()
	all := make([]ClientInfo, len(sessions))
	for i, x := range sessions {
		all[i] = x.info()
	}
	return all
}

// Busy tells whether there is a connection in transmission. It allocates nothing.
func (s *Server) Busy() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for k := range s.conns {
		if k.session != nil {
			return true
		}
	}
	return false
}

// sessions are those in transmission, in the order of their IDs.
func (s *Server) sessions() []*session {
	s.mu.Lock()
	all := make([]*session, 0, len(s.conns))
	for k := range s.conns {
		if k.session != nil {
			all = append(all, k.session)
		}
	}
	s.mu.Unlock()
	slices.SortFunc(all, func(a, b *session) int { return cmp.Compare(a.id, b.id) })
	return all
}

// Disconnect makes one connection leave: it reads no further requests, is
// answered those in flight and is closed. It does not wait for that; a second
// call gives up what is in flight. It reports whether there is a connection with
// that ID.
func (s *Server) Disconnect(id uint64) bool {
	for _, x := range s.sessions() {
		if x.id != id {
			continue
		}
		if x.leaving.Load() {
			x.abandon()
		} else {
			x.drain()
		}
		return true
	}
	return false
}

// SetSlow changes the threshold of slow requests, for connections that are
// open, too; 0 turns their report off.
func (s *Server) SetSlow(d time.Duration) { s.slow.Store(int64(max(d, 0))) }

// info may be called by anybody: it reads what never changes and counters.
func (s *session) info() ClientInfo {
	i := ClientInfo{
		ID:       s.id,
		Peer:     *s.conn.Peer(),
		Export:   s.name,
		Since:    s.since,
		Writable: s.dev.Info().Caps.Has(backing.CanWrite),
		Agreed:   Features{Structured: s.structured, Extended: s.extended},
		InFlight: s.own.requests.Load(),
		Requests: s.requests.Load(),
		BytesIn:  s.bytesIn.Load(),
		BytesOut: s.bytesOut.Load(),
		Stalled:  s.stalled.Load(),
		Leaving:  s.leaving.Load(),
	}
	for _, c := range s.contexts {
		i.Agreed.Contexts = append(i.Agreed.Contexts, c.name)
	}
	if t, ok := s.conn.(interface{ ConnectionState() tls.ConnectionState }); ok {
		state := t.ConnectionState()
		i.TLSVersion, i.TLSCipher = tls.VersionName(state.Version), tls.CipherSuiteName(state.CipherSuite)
	}
	if i.Peer.Cert != nil {
		i.CertName = i.Peer.Cert.Subject.CommonName
	}
	return i
}

// announce tells that the session begins; the function it returns, that it has
// ended. The log cuts a flood of either line, by export.
func (s *session) announce() (left func(error)) {
	s.publish(obs.Event{Kind: obs.ClientConnected})
	log := s.opt.Log.With("peer", s.conn.Peer(), "export", s.name, "client", s.id)
	s.logConnected(log)
	return func(err error) {
		e := obs.Event{Kind: obs.ClientLeft}
		switch {
		case err != nil:
			e.Reason = err.Error()
		case s.leaving.Load():
			e.Reason = "told to leave"
		}
		s.publish(e)
		s.logLeft(log, e.Reason)
	}
}

// logRefused tells that there is no place for a peer, which somebody else may have
// taken who shares its key. The log cuts a flood of these lines, by that key.
func (s *Server) logRefused(p *transport.Peer, why error) {
	s.opt.Log.Warn("connection refused", "peer", p.Key(), "error", why,
		"remedy", "max-connections bounds those of an export")
}

func (s *session) logConnected(log *slog.Logger) {
	i := s.info()
	more := []any{"tls", cmp.Or(i.TLSVersion, "off")}
	if i.CertName != "" {
		more = append(more, "certificate", i.CertName)
	}
	log.Info("client connected", append(more, "readonly", !i.Writable)...)
}

func (s *session) logLeft(log *slog.Logger, reason string) {
	more := []any{"lasted", time.Since(s.since).Round(time.Millisecond), "requests", s.requests.Load(),
		"bytes-in", s.bytesIn.Load(), "bytes-out", s.bytesOut.Load()}
	if reason != "" {
		more = append(more, "reason", reason)
	}
	log.Info("client left", more...)
}
