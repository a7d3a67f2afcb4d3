package server

import (
	"bufio"
	"context"
	"net/http"
	"strconv"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

func (c *call) status() (any, error) {
	s := c.s.service.Status()
	s.Listeners = list(s.Listeners)
	if s.Memory == nil {
		s.Memory = map[string]int64{}
	}
	return s, nil
}

func (c *call) exports() (any, error) {
	all := list(c.s.service.Exports())
	for i := range all {
		all[i].URIs = list(all[i].URIs)
	}
	return all, nil
}

func (c *call) export() (any, error) { return whole(c.s.service.Export(c.name)) }

// whole makes the list of an export's URIs one, even if there are none.
func whole(e api.Export, err error) (any, error) {
	e.URIs = list(e.URIs)
	return e, err
}

func (c *call) stats() (any, error) {
	all := list(c.s.service.Stats())
	for i := range all {
		if all[i].Commands == nil {
			all[i].Commands = map[string]api.Command{}
		}
		for k, v := range all[i].Commands {
			v.Latency = list(v.Latency)
			all[i].Commands[k] = v
		}
	}
	return all, nil
}

func (c *call) resume() (any, error) { return nil, c.s.service.Resume(c.name) }

// list is an empty list where there is none: JSON would say null.
func list[T any](v []T) []T {
	if v == nil {
		return []T{}
	}
	return v
}

func (c *call) add() (any, error) {
	var a api.AddExport
	if err := c.into(&a); err != nil {
		return nil, err
	}
	c.added, c.asked = a.Name, addInAudit(a)
	if len(a.Name) > limits.ControlName {
		return nil, invalid("the name is longer than %d bytes", limits.ControlName)
	}
	if err := checkFiles(c.files, addUses(&a)); err != nil {
		return nil, err
	}
	e, err := whole(c.s.service.Add(c.ctx, a, c.files))
	return created{e}, err
}

func (c *call) patch() (any, error) {
	var p api.Patch
	if err := c.into(&p); err != nil {
		return nil, err
	}
	c.asked = inAudit(p)
	if p.Rate != nil && len(p.RateKeys) > 0 {
		return nil, invalid("rate and rate-keys exclude each other")
	}
	return whole(c.s.service.Patch(c.ctx, c.name, p))
}

// addInAudit is a with a description that is cut. Of tokens it has the hashes.
func addInAudit(a api.AddExport) api.AddExport {
	a.Description = short(a.Description, limits.ControlAuditText)
	return a
}

// inAudit is p with a description that is cut. Of tokens it has the hashes.
func inAudit(p api.Patch) api.Patch {
	if p.Description != nil {
		cut := short(*p.Description, limits.ControlAuditText)
		p.Description = &cut
	}
	return p
}

func (c *call) remove() (any, error) {
	force, err := c.flag("force")
	if err != nil {
		return nil, err
	}
	timeout := limits.ControlRemove
	if v, ok := c.query["timeout"]; ok {
		timeout, err = time.ParseDuration(v[0])
		if err != nil || timeout < 0 || timeout > limits.ControlRemoveMost {
			return nil, invalid("timeout is no duration from 0s to %s", limits.ControlRemoveMost)
		}
	}
	ctx, cancel := context.WithTimeout(c.ctx, timeout)
	defer cancel()
	return nil, c.s.service.Remove(ctx, c.name, force)
}

func (c *call) pause() (any, error) {
	var p api.Pause
	if len(c.body) > 0 {
		if err := c.into(&p); err != nil {
			return nil, err
		}
		c.asked = p
	}
	if p.Limit < 0 || p.Limit > config.Duration(limits.PauseLongest) {
		return nil, invalid("limit is not from 0s to %s", limits.PauseLongest)
	}
	return nil, c.s.service.Pause(c.ctx, c.name, time.Duration(p.Limit))
}

func (c *call) resize() (any, error) {
	var r api.Resize
	if err := c.into(&r); err != nil {
		return nil, err
	}
	c.asked = r
	if r.Size < 0 || r.By < 0 || (r.Size > 0) == (r.By > 0) {
		return nil, invalid("want one of size and by, above 0")
	}
	return whole(c.s.service.Resize(c.ctx, c.name, r))
}

func (c *call) snapshot() (any, error) {
	var s api.Snapshot
	if err := c.into(&s); err != nil {
		return nil, err
	}
	c.asked = s
	if s.Overlay == "" {
		return nil, invalid("no overlay")
	}
	if err := checkFiles(c.files, []fdUse{{s.Overlay, "overlay", true}}); err != nil {
		return nil, err
	}
	return whole(c.s.service.Snapshot(c.ctx, c.name, s, c.files))
}

func (c *call) forget() (any, error) {
	force, err := c.flag("force")
	if err != nil {
		return nil, err
	}
	dry, err := c.flag("dry-run")
	if err != nil {
		return nil, err
	}
	return c.s.service.Forget(c.ctx, c.name, force, dry)
}

func (c *call) clients() (any, error) {
	var export *string
	if v, ok := c.query["export"]; ok {
		export = &v[0]
	}
	all := list(c.s.service.Clients(export))
	for i := range all {
		all[i].Features = list(all[i].Features)
	}
	return all, nil
}

func (c *call) disconnect() (any, error) {
	id, err := strconv.ParseUint(c.name, 10, 64)
	if err != nil {
		return nil, &api.Error{Code: api.CodeNotFound, Text: "no such client"}
	}
	return nil, c.s.service.Disconnect(id)
}

func (c *call) leases() (any, error) { return list(c.s.service.Leases()), nil }

func (c *call) openLease() (any, error) {
	var l api.OpenLease
	if err := c.into(&l); err != nil {
		return nil, err
	}
	return c.s.service.OpenLease(l)
}

func (c *call) closeLease() (any, error) {
	cid, err := strconv.ParseUint(c.name, 10, 32)
	start := c.query["start"]
	if err != nil || len(start) == 0 {
		return nil, &api.Error{Code: api.CodeNotFound, Text: "no such lease"}
	}
	return nil, c.s.service.CloseLease(uint32(cid), start[0], c.query.Get("holder"))
}

func (c *call) reload() (any, error) {
	dry, err := c.flag("dry-run")
	if err != nil {
		return nil, err
	}
	r, err := c.s.service.Reload(c.ctx, dry)
	r.Changes = list(r.Changes)
	return r, err
}

// metrics streams, since the text of many exports is long. A failure before
// the first piece has left is an error as any other, and later cuts the reply.
func (c *call) metrics() (any, error) {
	if err := c.writeDeadline(); err != nil {
		return nil, err
	}
	pieces := &metricsWriter{c: c}
	w := bufio.NewWriterSize(pieces, 64<<10)
	err := c.s.metrics.Metrics(w)
	if err != nil && !pieces.begun {
		return nil, err
	}
	if err == nil {
		err = w.Flush()
	}
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	return sent{}, nil
}

// metricsWriter sends the header before the first piece.
type metricsWriter struct {
	c     *call
	begun bool
}

func (m *metricsWriter) Write(p []byte) (int, error) {
	if !m.begun {
		m.begun = true
		m.c.sentStatus = http.StatusOK
		m.c.w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	}
	return m.c.w.Write(p)
}
