package server

import (
	"encoding/json"
	"net/http"

	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// events sends a line for each event, from now on, until the peer leaves or may read
// no more, or the server ends.
func (c *call) events() (any, error) {
	uid, access := c.conn.peer.UID, c.conn.access
	open, perUID := &c.s.readers, limits.EventsPerReader
	if access == Change {
		open, perUID = &c.s.changers, limits.EventsPerUser
	}
	if !open.enter(uid, perUID, limits.EventReaders, access) {
		return nil, &api.Error{Code: api.CodeInUse, Text: "too many streams of events of this user, or of those who may not change things"}
	}
	defer open.leave(uid)
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
			if !ok || c.s.accessOf(c.conn.peer) == NoAccess || c.writeDeadline() != nil || enc.Encode(e) != nil || c.flush(rc) != nil {
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
