package daemon

import (
	"io"

	"github.com/vmdiskd/vmdiskd/internal/backing/open"
	"github.com/vmdiskd/vmdiskd/internal/confine"
	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/obs"
	"github.com/vmdiskd/vmdiskd/internal/version"
)

// Metrics writes what there is to count.
func (s service) Metrics(w io.Writer) error {
	d := s.d
	lent, used := d.buffers.Outstanding()
	m := obs.Metrics{
		Version: version.Version, Engine: d.engine.Name(), Started: d.started,
		BuffersLent: lent, BufferBytes: used, BufferLimit: limits.BufferBudget,
		Refused: d.refused.Load(), ReloadFailed: d.staleConf.Load(),
	}
	values := map[string]float64{confine.Enforced: 1, confine.Degraded: 0.5}
	for _, c := range d.cage {
		m.Controls = append(m.Controls, obs.ControlMetrics{Name: c.Name, Value: values[c.State]})
	}
	for _, x := range d.all() {
		h := d.disks.healthOf(d.disks.get(x.Spec.Name))
		k := d.disks.find(x.Spec.Name)
		e := obs.ExportMetrics{
			Name: x.Spec.Name, State: d.shown(k, x.State), Size: x.Info.Size, Clients: x.Clients, Writable: writable(&x, h),
			Unopened: h.failed != nil && k == nil, Poisoned: h.poisoned != nil, Stats: x.Spec.Stats.Snapshot(),
		}
		if k != nil {
			e.Threshold = k.stack.threshold.At()
			if t, ok := open.MapStats(k.stack.swap.Below()); ok {
				e.Map = (*obs.MapMetrics)(&t)
			}
		}
		m.Exports = append(m.Exports, e)
	}
	for _, c := range d.server.Clients() {
		m.Clients = append(m.Clients, obs.ClientMetrics{
			ID: c.ID, Export: c.Export, Peer: c.Peer.String(), Via: c.Peer.Via, TLS: c.TLSVersion,
			Structured: c.Agreed.Structured, Extended: c.Agreed.Extended, Contexts: len(c.Agreed.Contexts),
			InFlight: c.InFlight, Requests: c.Requests, BytesIn: c.BytesIn, BytesOut: c.BytesOut, Stalled: c.Stalled,
		})
	}
	return obs.WriteMetrics(w, &m)
}
