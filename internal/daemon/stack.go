package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/layer"
	"github.com/vmdiskd/vmdiskd/internal/backing/raw"
	"github.com/vmdiskd/vmdiskd/internal/config"
)

// stack is an image with its layers. Those that can be worked on while it is
// served have a name; nil is one that is not there.
type stack struct {
	top   backing.Device
	swap  *layer.Swap // the image is below it
	rate  *layer.RateLimit
	own   *layer.Limiter // one of those of rate; the other is that of the group
	log   *layer.RequestLog
	fault *layer.Faults // only with --enable-fault-injection
	pause *layer.Pause
	ro    *layer.ReadOnly
	over  *layer.Overlay
	x     config.Export // how the image was opened last
	image               // below swap; with disk.busy

	// threshold is of the file with the guest's data, also if a snapshot gives
	// it another.
	threshold *raw.Threshold
}

// build opens the image of k, and puts the layers of x on it. What fails leaves
// nothing open.
func (d *daemon) build(ctx context.Context, k *disk, x *config.Export, files []*os.File) (*stack, error) {
	opened, th := k.opens(*x), d.newThreshold(x)
	i, err := d.openIn(ctx, k, &opened, files, th)
	if err != nil {
		return nil, err
	}
	s := &stack{swap: layer.NewSwap(i.dev), image: i, x: opened, threshold: th}
	if !opened.ReadOnly { // it was asked for its format, and a guest may make it look like another
		s.x.Format = opened.ImageFormat()
	}
	s.top = s.swap
	for _, put := range [...]func(*stack, *config.Export) error{
		(*stack).putWindow, k.putOverlay, (*stack).putBlockSize, (*stack).putFlush,
		d.putReadOnly, d.putPause, d.putFaults, d.putRate, (*stack).putProtect, d.putLog,
	} {
		if err := put(s, x); err != nil {
			return nil, errors.Join(err, s.top.Close())
		}
	}
	return s, nil
}

// openIn opens the image of k as x says, whose files may be in k.files. If none are,
// and the daemon serves already, they are gathered first: storage that hangs holds up
// nothing then but a while.
func (d *daemon) openIn(ctx context.Context, k *disk, x *config.Export, files []*os.File, th *raw.Threshold) (image, error) {
	t := k.files
	if t == nil && d.server != nil && len(files) == 0 && hasFiles(x) {
		var err error
		if t, err = d.gather(ctx, x, nil); err != nil {
			return image{}, err
		}
		defer t.Close()
	}
	p, err := k.record(x.ReadOnly, t)
	if err != nil {
		return image{}, err
	}
	s, err := d.imageSpec(x, files)
	if err != nil {
		return image{}, err
	}
	if err := d.unguard(k); err != nil {
		return image{}, err
	}
	s.Writes, s.Threshold = d.mayWrite(x), th
	if t != nil {
		s.Table = t
		return d.openSpec(ctx, x.Name, s, p)
	}
	return d.openImage(ctx, x, s, p)
}

// putReadOnly lets a served disk be made read-only for those who use it. It is
// below the pause: what waited there finds it.
func (d *daemon) putReadOnly(s *stack, x *config.Export) error {
	if d.served() {
		s.ro = layer.NewReadOnly(s.top, x.ReadOnly)
		s.top = s.ro
	}
	return nil
}

// putPause lets a served disk be paused. What waits above for its turn, by a
// rate or a fault, is not in flight.
func (d *daemon) putPause(s *stack, x *config.Export) error {
	if d.served() {
		name := x.Name
		s.pause = layer.NewPause(s.top)
		s.pause.Changed = func() { d.tellState(name) }
		s.top = s.pause
	}
	return nil
}

func (s *stack) putWindow(x *config.Export) error {
	if x.Window == nil {
		return nil
	}
	o := layer.WindowOptions{Off: int64(x.Window.Offset), Size: int64(x.Window.Length)}
	if n := x.Window.Partition; n > 0 {
		r, err := layer.FindPartition(context.Background(), s.top, n, int64(x.Window.SectorSize))
		if err != nil {
			return fmt.Errorf("window: %w", err)
		}
		o.Off, o.Size = r.Off, r.Len
	}
	w, err := layer.NewWindow(s.top, o)
	if err != nil {
		return fmt.Errorf("window: %w", err)
	}
	s.top = w
	return nil
}

// putOverlay puts one on a stack of k that goes on with k.delta, if there is one.
func (k *disk) putOverlay(s *stack, x *config.Export) (err error) {
	if x.Overlay == nil {
		return nil
	}
	o := layer.OverlayOptions{Quota: int64(x.Overlay.Quota), Delta: k.delta}
	if o.Delta == nil {
		if o.File, err = layer.OpenTemporary(""); err != nil {
			return fmt.Errorf("overlay: %w", err)
		}
	}
	if s.over, err = layer.NewOverlay(s.top, o); err != nil {
		closeFiles([]*os.File{o.File})
		return fmt.Errorf("overlay: %w", err)
	}
	s.top = s.over
	return nil
}

// putProtect protects ranges, above all that does a request in pieces: one that is
// refused has changed nothing.
func (s *stack) putProtect(x *config.Export) error {
	if len(x.Protect) == 0 {
		return nil
	}
	var o layer.ProtectOptions
	for _, r := range x.Protect {
		o.Ranges = append(o.Ranges, layer.Range{Off: int64(r.Offset), Len: int64(r.Length)})
	}
	p, err := layer.NewProtect(s.top, o)
	if err != nil {
		return fmt.Errorf("protect: %w", err)
	}
	s.top = p
	return nil
}

func (s *stack) putBlockSize(x *config.Export) error {
	if x.BlockSize == nil {
		return nil
	}
	b, err := layer.NewBlockSize(s.top, layer.BlockSizeOptions{
		Min: int64(x.BlockSize.Minimum), Preferred: int64(x.BlockSize.Preferred), Max: int64(x.BlockSize.Maximum),
	})
	if err != nil {
		return fmt.Errorf("block size: %w", err)
	}
	s.top = b
	return nil
}

func (s *stack) putFlush(x *config.Export) error {
	if x.FlushOnClose {
		s.top = layer.NewFlushOnClose(s.top)
	}
	return nil
}

// putFaults puts the faults of a served disk on it, where the operator allowed
// that to be done at all.
func (d *daemon) putFaults(s *stack, x *config.Export) error {
	rules, err := faultsOf(x.Faults)
	if err != nil || len(rules) == 0 && !d.cfg.FaultInjection {
		return err
	}
	f, err := layer.NewFaults(s.top, layer.FaultOptions{Enabled: d.cfg.FaultInjection, Faults: rules})
	if err != nil {
		return fmt.Errorf("fault: %w", err)
	}
	s.fault, s.top = f, f
	return nil
}

// The words of the configuration.
var (
	faultOps = map[string]layer.FaultOps{
		"read": layer.FaultRead, "write": layer.FaultWrite, "zero": layer.FaultZero,
		"trim": layer.FaultTrim, "flush": layer.FaultFlush,
	}
	faultErrors = map[string]backing.Kind{"": "", "EIO": backing.ErrIO, "ENOSPC": backing.ErrNoSpace}
)

// faultsOf are the faults of the configuration as the layer wants them.
func faultsOf(list []config.Fault) (out []layer.Fault, err error) {
	for i, f := range list {
		kind, known := faultErrors[f.Error]
		x := layer.Fault{
			Range: layer.Range{Off: int64(f.Offset), Len: int64(f.Length)}, Probability: f.Probability,
			Count: int64(f.Count), Delay: time.Duration(f.Delay), Error: kind,
		}
		if x.Probability == 0 {
			x.Probability = 1
		}
		for _, op := range f.Ops {
			known = known && faultOps[op] != 0
			x.Ops |= faultOps[op]
		}
		if len(f.Ops) == 0 {
			x.Ops = layer.FaultRead | layer.FaultWrite | layer.FaultZero | layer.FaultTrim | layer.FaultFlush
		}
		if !known {
			return nil, fmt.Errorf("fault %d: unknown operation or error", i+1)
		}
		out = append(out, x)
	}
	return out, nil
}

// putLog puts the request log of a served disk on it, on or off.
func (d *daemon) putLog(s *stack, x *config.Export) error {
	if d.served() {
		s.log = layer.NewRequestLog(s.top, layer.RequestLogOptions{
			Log: d.logs.For("requests").With("export", x.Name), On: x.LogRequests,
		})
		s.top = s.log
	}
	return nil
}

// putRate puts the limits of a served disk on it, which can be changed later,
// and those of its group.
func (d *daemon) putRate(s *stack, x *config.Export) (err error) {
	if !d.served() {
		return nil
	}
	if s.own, err = layer.NewLimiter(ratesOf(x.Rate)); err != nil {
		return fmt.Errorf("rate: %w", err)
	}
	o, err := d.limitersOf(s, x)
	if err != nil {
		return err
	}
	l, err := layer.NewRateLimit(s.top, o)
	if err != nil {
		return fmt.Errorf("rate: %w", err)
	}
	s.rate, s.top = l, l
	return nil
}

// limitersOf are the disk's own limiter and that of the group that x names.
func (d *daemon) limitersOf(s *stack, x *config.Export) (o layer.RateOptions, err error) {
	o.Limiters = append(o.Limiters, s.own)
	if x.RateGroup == "" {
		return o, nil
	}
	g := d.groups.find(x.RateGroup)
	if g == nil {
		return o, errNoGroup(x.RateGroup, false)
	}
	o.Limiters = append(o.Limiters, g)
	return o, nil
}

// ratesOf are the limits of the configuration as the layer wants them; nil is
// none.
func ratesOf(r *config.Rate) layer.Rates {
	if r == nil {
		return layer.Rates{}
	}
	one := func(bytes config.Size, ops int64) layer.Rate {
		return layer.Rate{Bytes: int64(bytes), Ops: ops, Burst: time.Duration(r.Burst)}
	}
	return layer.Rates{Total: one(r.Bytes, r.Ops), Read: one(r.ReadBytes, r.ReadOps), Write: one(r.WriteBytes, r.WriteOps)}
}
