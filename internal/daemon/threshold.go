package daemon

import (
	"fmt"

	"github.com/vmdiskd/vmdiskd/internal/backing/raw"
	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/obs"
)

// newThreshold is the write threshold of an export that is about to be opened.
// When it is reached, that is an event.
func (d *daemon) newThreshold(x *config.Export) *raw.Threshold {
	name := x.Name
	return raw.NewThreshold(x.Threshold(), func(at, beyond int64) {
		d.log.Info("write threshold of export is reached, and disarmed", "export", name, "threshold", at, "exceeded", beyond)
		d.bus.Publish(obs.Event{
			Kind: obs.WriteThreshold, Export: name, Threshold: at, Exceeded: beyond,
			Reason: fmt.Sprintf("a write went %d bytes beyond its threshold of %d", beyond, at),
		})
	})
}

// live is an export with the threshold that it has now: one that was reached is
// disarmed. Without an image, nil, it has the one that was set.
func (s *stack) live(x config.Export) config.Export {
	if s != nil && x.WriteThreshold != nil {
		at := config.Size(s.threshold.At())
		x.WriteThreshold = &at
	}
	return x
}
