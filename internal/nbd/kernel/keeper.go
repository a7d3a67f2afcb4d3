package kernel

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd/client"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

// Keeper holds a device for as long as it is attached: it replaces connections
// that have died and follows the size of the export.
type Keeper struct {
	Device *Device
	// Dead is that of Watch; nil is looked at no more than once in
	// limits.DeviceTick.
	Dead <-chan int
	// Poll is how often the size is asked for, not below
	// limits.DevicePollLeast; 0 leaves it to reconnections. It tells as well of
	// a server that takes no new connection while the old ones live.
	Poll time.Duration
	// Say reports what a keeper does and what fails. Each failure is told
	// once, until something succeeds.
	Say func(format string, args ...any)
	// Leave asks the keeper to detach the device. It goes on when that fails.
	Leave <-chan os.Signal

	unseen  bool          // a connection of a device that was taken over may have died
	spare   int           // the link that is offered for the next such one
	said    string        // the failure that was told last, without our port
	pause   time.Duration // before the next attempt to connect; 0 when there was no failure
	polled  chan sizeTold // what the poll found; nil while none runs
	leaving chan error    // how leaving went; nil while nobody leaves
}

// sizeTold is a server's answer to the question for the size of the export in
// bytes.
type sizeTold struct {
	size int64
	err  error
}

// Keep works until the device is detached, by whomever, which it reports as
// nil, or ctx ends. Then the device stays as it is.
func (k *Keeper) Keep(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer k.wait()
	defer cancel()
	tick := time.NewTicker(limits.DeviceTick)
	defer tick.Stop()
	poll := time.NewTicker(max(k.Poll, limits.DevicePollLeast))
	defer poll.Stop()
	if k.Poll == 0 {
		poll.Stop()
	}
	for {
		if !k.ours() {
			return nil
		}
		var retry <-chan time.Time
		if !k.mend(ctx) {
			retry = time.After(k.pause)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case index, ok := <-k.Dead:
			if !ok {
				k.Dead = nil // the tick is left
			}
			k.unseen = k.unseen || ok && index == k.Device.Index()
		case <-tick.C:
			k.unseen = k.unseen || k.Dead == nil
		case <-retry:
		case <-poll.C:
			k.ask(ctx)
		case found := <-k.polled:
			k.polled = nil
			k.hear(found)
		case <-k.Leave:
			k.leave(ctx)
		case err := <-k.leaving:
			k.leaving = nil
			if err != nil {
				k.Say("%s stays: %v", k.Device.Path(), err)
			}
		}
	}
}

// ours tells whether the device is still the one that was attached. Where sysfs
// cannot be read it is believed to be.
func (k *Keeper) ours() bool {
	_, err := k.Device.info()
	return !errors.Is(err, ErrNoDevice)
}

// info fails with ErrNoDevice also when another device has the number by now.
func (v *Device) info() (Info, error) {
	now, err := v.config.Sysfs.Info(v.setup.Index)
	if err == nil && now.Backend != "" && now.Backend != v.setup.Backend {
		err = ErrNoDevice
	}
	return now, err
}

// mend replaces dead connections and, when all live, follows the size that the
// server told last. It is false when a dead one is left.
func (k *Keeper) mend(ctx context.Context) bool {
	size := int64(-1)
	for _, i := range k.broken() {
		var err error
		if size, err = k.replace(ctx, i); err != nil {
			k.pause = min(max(2*k.pause, limits.DeviceRetryLeast), limits.DeviceRetryMost)
			k.fail("connection %d of %s: %w", i+1, k.Device.Path(), err)
			k.unseen = true
			return false
		}
		k.said, k.pause = "", 0
		k.Say("connection %d of %s is new", i+1, k.Device.Path())
	}
	if size >= 0 {
		k.follow(size)
	}
	return true
}

// broken are the links to replace: those that are dead or, when none is but
// one that only the driver had, the one that has been offered for the longest
// time. The driver leaves a new one alone for which it has no use.
func (k *Keeper) broken() (list []int) {
	v := k.Device
	for i, l := range v.links {
		if l.dead() {
			list = append(list, i)
		}
	}
	if k.unseen && v.TakenOver && len(list) == 0 && v.config.Server.Direct() {
		list = []int{k.spare}
		k.spare = (k.spare + 1) % len(v.links)
	}
	k.unseen = false
	return list
}

// replace makes a new connection and returns the size of the export. A
// handshake lies between the look at the old one and the driver's, which so has
// written it off.
func (k *Keeper) replace(ctx context.Context, i int) (int64, error) {
	v := k.Device
	l, e, err := connect(ctx, &v.config.Server)
	if err != nil {
		return 0, err
	}
	if err = v.same(e); err == nil {
		err = v.driver.Replace(v.setup.Index, v.setup.Backend, l.file)
	}
	if err != nil {
		l.close()
		return 0, err
	}
	v.links[i].close()
	v.links[i] = l
	return e.Size, nil
}

// same refuses an export that lacks what the driver was told.
func (v *Device) same(e client.Export) error {
	need := v.setup.Flags &^ (wire.ReadOnly | wire.Rotational)
	switch {
	case e.Flags&need != need:
		return refused("the export is not what it was: it has lost abilities (%#x, before %#x)", uint16(e.Flags), uint16(v.setup.Flags))
	case e.Has(wire.ReadOnly) && v.setup.Flags&wire.ReadOnly == 0:
		return refused("the export has become read-only")
	case e.Blocks.Min > v.setup.Block:
		return refused("the server takes no requests below %d bytes any more", e.Blocks.Min)
	}
	return nil
}

// follow gives the device the size of the export. A device in use keeps its
// size when the export has become smaller: its end would vanish under a file
// system.
func (k *Keeper) follow(bytes int64) {
	v := k.Device
	size, err := usable(bytes, v.setup.Block)
	if err != nil {
		k.fail("%s: %w", v.Path(), err)
		return
	}
	if size == v.setup.Size {
		k.said = ""
		return
	}
	if size < v.setup.Size {
		k.fail("%s: %w", v.Path(), refused("the export has shrunk from %d to %d bytes: the device keeps its size", v.setup.Size, size))
		return
	}
	if err := v.driver.Resize(v.setup.Index, v.setup.Backend, size, v.setup.Block); err != nil {
		k.fail("size of %s: %w", v.Path(), err)
		return
	}
	k.Say("%s has %d bytes, %d before", v.Path(), size, v.setup.Size)
	k.said, v.setup.Size = "", size
}

// ask begins to ask for the size, unless that is being done or a connection is
// lost. What it finds comes in k.polled.
func (k *Keeper) ask(ctx context.Context) {
	if k.polled != nil || k.pause != 0 {
		return
	}
	k.polled = make(chan sizeTold, 1)
	go func(found chan<- sizeTold, s *Server) {
		size, err := sizeOf(ctx, s)
		found <- sizeTold{size, err}
	}(k.polled, &k.Device.config.Server)
}

// hear follows the size that the server has told. A question that fails is how a
// new connection would fail while the old ones live, which is the time to put
// keys or certificates right. Of a server that was lost meanwhile mend speaks.
func (k *Keeper) hear(found sizeTold) {
	switch {
	case k.pause != 0:
	case found.err != nil:
		k.fail("asking the server of %s for the size: %w", k.Device.Path(), found.err)
	default:
		k.follow(found.size)
	}
}

// wait ends with the goroutines of ask and leave.
func (k *Keeper) wait() {
	if k.polled != nil {
		<-k.polled
	}
	if k.leaving != nil {
		<-k.leaving
	}
}

// sizeOf asks a server for the size of its export.
func sizeOf(ctx context.Context, s *Server) (int64, error) {
	ctx, cancel := context.WithTimeout(ctx, limits.Handshake)
	defer cancel()
	session, _, err := negotiate(ctx, s)
	if err != nil {
		return 0, err
	}
	e, err := session.Info(ctx, s.Export)
	if err == nil {
		err = s.check(e)
	}
	if err != nil {
		session.Close()
		return 0, hide(err)
	}
	return e.Size, session.Abort(ctx)
}

// leave begins to detach the device unless it is in use. What it flushes may
// need new connections, which are made meanwhile.
func (k *Keeper) leave(ctx context.Context) {
	if k.leaving != nil {
		return
	}
	k.leaving = make(chan error, 1)
	go func(result chan<- error, v *Device) { result <- v.detach(ctx) }(k.leaving, k.Device)
}

// detach takes the server away from the device unless it is in use, which is done
// as well when the device is gone and another one may have its number.
func (v *Device) detach(ctx context.Context) error {
	now, err := v.info()
	if err == nil {
		err = detachUnused(ctx, v.driver, v.config.Sysfs, now)
	}
	if errors.Is(err, ErrNoDevice) {
		return nil
	}
	return err
}

func (k *Keeper) fail(format string, args ...any) {
	err := fmt.Errorf(format, args...)
	said := err.Error()
	if op, ok := errors.AsType[*net.OpError](err); ok && op.Source != nil {
		said = strings.ReplaceAll(said, op.Source.String(), "") // each connection has another port
	}
	if said != k.said {
		k.said = said
		k.Say("%v", err)
	}
}
