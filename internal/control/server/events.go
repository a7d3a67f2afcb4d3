package server

import (
	"encoding/json"
	"net/http"

	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// events sends a line for each event, from now on, until the peer leaves or
// the server ends.
func (c *call) events() (any, error) {
	if c.conn.access != Change {
		uid := c.conn.peer.UID
		if !c.s.readers.enter(uid, limits.EventsPerReader, limits.EventReaders, c.conn.access) {
			return nil, &api.Error{Code: api.CodeInUse, Text: "too many listen to events who may not change things"}
		}
		defer c.s.readers.leave(uid)
	}
	ch, cancel, err := c.s.service.Subscribe(limits.EventQueue)
	if err != nil {
		return nil, err
	}
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
