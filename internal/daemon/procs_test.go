package daemon

import (
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// ringed is an engine that is no pool.
type ringed struct{ engine.Engine }

func (ringed) Name() string { return "uring" }

func TestThreadsOfAPoolFindProcessors(t *testing.T) {
	pool := engine.NewPool(1)
	defer pool.Close()
	swap := Config{}
	swap.Swap.On = true
	for name, tt := range map[string]struct {
		cfg  Config
		eng  engine.Engine
		want int
	}{
		"pool":         {eng: pool, want: limits.PoolProcs},
		"ring":         {eng: ringed{}, want: limits.MinProcs},
		"pool of swap": {cfg: swap, eng: pool, want: limits.MinProcs},
	} {
		if got := (&daemon{cfg: tt.cfg, engine: tt.eng}).minProcs(); got != tt.want {
			t.Errorf("%s: got %d, want %d", name, got, tt.want)
		}
	}
}
