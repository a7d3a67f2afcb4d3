package transport

import (
	"slices"
	"sync/atomic"
)

// Scope is which exports a listener shows, to those too that came in by it
// before it was changed. The zero value shows all. Safe for concurrent use.
type Scope struct {
	names  atomic.Pointer[[]string] // nil: all
	hidden atomic.Pointer[[]string] // nil: none
}

// Show has the listener show the named exports and no others.
func (s *Scope) Show(names ...string) {
	names = slices.Clone(names)
	s.names.Store(&names)
}

// ShowAll has the listener show all exports.
func (s *Scope) ShowAll() { s.names.Store(nil) }

// Names are the exports that are shown, in the order of Show. all says that
// there is no such list; so does a nil Scope.
func (s *Scope) Names() (names []string, all bool) {
	if s == nil {
		return nil, true
	}
	p := s.names.Load()
	if p == nil {
		return nil, true
	}
	return *p, false
}

// Hide has the listener show the named exports to nobody, whatever Show says, until
// the next Hide, which may name none.
func (s *Scope) Hide(names ...string) {
	names = slices.Clone(names)
	s.hidden.Store(&names)
}

// Hides tells whether Hide has named an export; that of a nil Scope has named none.
func (s *Scope) Hides(name string) bool {
	if s == nil {
		return false
	}
	p := s.hidden.Load()
	return p != nil && slices.Contains(*p, name)
}
