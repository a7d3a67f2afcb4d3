package server

import (
	"encoding/json"
	"net/http"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// events sends a line for each event, from now on, until the peer leaves or
// the server ends.
func (c *call) events() (any, error) {
	ch, cancel := c.s.service.Subscribe(limits.EventQueue)
	defer cancel()
	c.sentStatus = http.StatusOK
	c.w.Header().Set("Content-Type", "application/x-ndjson")
	rc := http.NewResponseController(c.w)
	if err := c.flush(rc); err != nil {
		return sent{}, nil
	}
	enc := json.NewEncoder(c.w)
	for {
		select {
		case <-c.ctx.Done():
			return sent{}, nil
		case <-c.s.ended:
			return sent{}, nil
		case e, ok := <-ch:
			if !ok || c.writeDeadline() != nil || enc.Encode(e) != nil || c.flush(rc) != nil {
				return sent{}, nil
			}
		}
	}
}

func (c *call) flush(rc *http.ResponseController) error {
	if err := c.writeDeadline(); err != nil {
		return err
	}
	return rc.Flush()
}
