package daemon

import (
	"context"
	"net"
	"os"
	"slices"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/server"
	"github.com/vmdiskd/vmdiskd/internal/transport"
)

// control is a server of the control API, or of the metrics alone.
type control struct {
	*server.Server
	at net.Listener
}

// bindControl listens for the control API, and for Prometheus where it is to
// find the metrics alone.
func (d *daemon) bindControl() error {
	if d.conf.Load() == nil {
		return nil
	}
	log := d.logs.For("control")
	if c := &d.conf.Load().Control; c.Socket != "" {
		rules, err := rulesOf(c)
		if err != nil {
			return err
		}
		l, err := d.listenControl(c)
		if err != nil {
			return err
		}
		d.rules.Store(rules)
		allow := func(p server.Peer) server.Access {
			if int(p.UID) == os.Geteuid() {
				return server.Change
			}
			return d.rules.Load().Access(p)
		}
		s := server.New(server.Config{Service: service{d}, Authorize: allow, Log: log})
		d.controls = append(d.controls, control{s, l})
	}
	if at := d.conf.Load().Metrics.Listen; at != "" {
		l, err := d.listenMetrics(at)
		if err != nil {
			return err
		}
		d.controls = append(d.controls, control{server.NewMetrics(service{d}, log), l})
	}
	return nil
}

// startControl begins to answer.
func (d *daemon) startControl() error {
	for _, c := range d.controls {
		d.accepted.Add(1)
		go func() {
			defer d.accepted.Done()
			if err := c.Serve(c.at); err != nil {
				d.log.Error("control socket failed", "at", c.at.Addr(), "error", err)
			}
		}()
	}
	return nil
}

// closeControl ends the control API: what it has begun is finished, unless ctx ends.
func (d *daemon) closeControl(ctx context.Context) {
	for _, c := range d.controls {
		if err := c.Close(ctx); err != nil {
			what := "control socket was not closed"
			if ctx.Err() != nil {
				what = "control requests were given up"
			}
			d.log.Warn(what, "error", err)
		}
		_ = c.at.Close() // if it was never served
	}
}

// listenControl and listenMetrics take up what stage 0 has opened.
func (d *daemon) listenControl(c *config.Control) (net.Listener, error) {
	if l, err := d.cfg.Handed.control(); l != nil || err != nil {
		return l, err
	}
	return listenControl(d.ctx, c)
}

func (d *daemon) listenMetrics(at string) (net.Listener, error) {
	if l, err := d.cfg.Handed.metrics(); l != nil || err != nil {
		return l, err
	}
	return net.Listen("tcp", at)
}

// listenControl makes the control socket as sockets of exports are made: in
// place of one that nobody listens to, with its mode from the first moment.
func listenControl(ctx context.Context, c *config.Control) (net.Listener, error) {
	e := transport.Endpoint{Kind: transport.Unix, Path: c.Socket}
	if err := setAccess(&e, c.Mode, c.Owner); err != nil {
		return nil, err
	}
	return transport.ListenUnix(ctx, e)
}

// rulesOf are the users and groups of the configuration, with root, who may do
// everything. So may the user of the daemon, which start finds out later.
func rulesOf(c *config.Control) (*server.Rules, error) {
	r := &server.Rules{ChangeUsers: []uint32{0}}
	for _, x := range [...]struct {
		to    *[]uint32
		names []string
		id    func(string) (int, error)
	}{
		{&r.ReadUsers, c.ReadUsers, transport.LookupUser}, {&r.ReadGroups, c.ReadGroups, transport.LookupGroup},
		{&r.ChangeUsers, c.ChangeUsers, transport.LookupUser}, {&r.ChangeGroups, c.ChangeGroups, transport.LookupGroup},
	} {
		for _, name := range x.names {
			id, err := x.id(name)
			if err != nil {
				return nil, err
			}
			*x.to = append(*x.to, uint32(id))
		}
		slices.Sort(*x.to)
	}
	return r, nil
}
