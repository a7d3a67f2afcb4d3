package daemon

import (
	"fmt"
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

// set makes the groups those of the configuration. What stays changes for the
// exports that use it; what goes limits them as long as they are open.
func (g *groups) set(rates map[string]config.Rate) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	next := map[string]*layer.Limiter{}
	for name, r := range rates {
		l, err := g.byName[name], error(nil)
		if l == nil {
			l, err = layer.NewLimiter(ratesOf(&r))
		} else {
			err = l.Set(ratesOf(&r))
		}
		if err != nil {
			return fmt.Errorf("rate group %q: %w", name, err)
		}
		next[name] = l
	}
	g.byName = next
	return nil
}
