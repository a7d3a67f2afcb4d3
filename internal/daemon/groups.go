package daemon

import (
	"fmt"
	"maps"
	"sync"

	"github.com/vmdiskd/vmdiskd/internal/backing/layer"
	"github.com/vmdiskd/vmdiskd/internal/config"
)

// groups are the rate limits that exports share. Its zero value has none.
type groups struct {
	mu     sync.Mutex
	byName map[string]*layer.Limiter // guarded by mu
}

// find is the limiter of a group, or nil.
func (g *groups) find(name string) *layer.Limiter {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.byName[name]
}

// set gives the groups of a configuration their rates, also for the exports that
// use them, and adds those that there are not. What the configuration does not
// have stays until keep, so that exports can be taken out of it, and put back by
// undo: that leaves every group the limiter and the rates that it had.
func (g *groups) set(rates map[string]config.Rate) (undo func(), err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	old, before := maps.Clone(g.byName), map[*layer.Limiter]layer.Rates{}
	undoLocked := func() {
		g.byName = old
		for l, r := range before {
			_ = l.Set(r) // they were valid
		}
	}
	if g.byName == nil {
		g.byName = map[string]*layer.Limiter{}
	}
	for name, r := range rates {
		l, err := g.byName[name], error(nil)
		if l == nil {
			l, err = layer.NewLimiter(ratesOf(&r))
		} else {
			before[l] = l.Rates()
			err = l.Set(ratesOf(&r))
		}
		if err != nil {
			undoLocked()
			return nil, fmt.Errorf("rate group %q: %w", name, err)
		}
		g.byName[name] = l
	}
	return func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		undoLocked()
	}, nil
}

// keep forgets the groups that a configuration does not have.
func (g *groups) keep(rates map[string]config.Rate) {
	g.mu.Lock()
	defer g.mu.Unlock()
	maps.DeleteFunc(g.byName, func(name string, _ *layer.Limiter) bool {
		_, has := rates[name]
		return !has
	})
}
