package attach

import (
	"context"
	"fmt"
	"strconv"
	"time"

	"libvirt.org/go/libvirtxml"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/qmp/libvirtd"
	"github.com/vmdiskd/vmdiskd/internal/transport"
)

// delayName is the name under which a running domain keeps the reconnect delay
// that a renewal has given a disk: QEMU does not say it, and libvirt before 9.2
// has no word for it.
func delayName(target string, uri transport.URI) string {
	return "reconnect-" + key(16, target, uri.String())
}

// delay is what a renewal has given the disk, 0 if none has.
func (d *Domain) delay(ctx context.Context, target string, uri transport.URI) (time.Duration, error) {
	text, err := d.Session.Kept(ctx, d.Domain, delayName(target, uri))
	if err != nil {
		return 0, err
	}
	seconds, err := strconv.ParseUint(text, 10, 32)
	if delay := time.Duration(seconds) * time.Second; err == nil && delay <= limits.NBDReconnect {
		return delay, nil
	}
	return 0, nil // none, or nothing that was kept by Keep
}

// delayOf is how long a disk that the domain has waits for its server: as libvirt
// describes it, or else as a renewal has given it to the running machine; 0 where
// neither is known.
func (d *Domain) delayOf(ctx context.Context, all states, disk *libvirtxml.DomainDisk) (time.Duration, error) {
	if delay := libvirtd.ReconnectDelay(disk); delay > 0 || disk.Target == nil {
		return delay, nil
	}
	target, uri := disk.Target.Dev, source(disk)
	if in, _ := all.scope(isDisk(target, uri)); in&libvirtd.Live == 0 {
		return 0, nil
	}
	return d.delay(ctx, target, uri)
}

// keepStep keeps the delay for those who make the client anew at a later time.
func (r *renewal) keepStep() Step {
	var before string
	return Step{
		Name: "keep the delay with the running domain",
		Do: func(ctx context.Context) (bool, error) {
			if !r.needed {
				return false, nil
			}
			ctx, cancel := steady(ctx)
			defer cancel()
			var err error
			if before, err = r.Session.Kept(ctx, r.Domain.Domain, r.delayName); err != nil {
				return false, err
			}
			err = r.Session.Keep(ctx, r.Domain.Domain, r.delayName, strconv.Itoa(wholeSeconds(r.client.ReconnectDelay)))
			return true, err
		},
		Undo: func(ctx context.Context) error { return r.Session.Keep(ctx, r.Domain.Domain, r.delayName, before) },
	}
}

// forgetStale is the step that ends the delay of an earlier disk, which others have
// taken away, before the running domain gets one in its place; none where none is
// kept.
func (d *Domain) forgetStale(ctx context.Context, all states, target string, uri transport.URI) ([]Step, error) {
	if in, _ := all.scope(isDisk(target, uri)); in&libvirtd.Live != 0 {
		return nil, nil
	}
	delay, err := d.delay(ctx, target, uri)
	if err != nil || delay == 0 {
		return nil, err
	}
	return []Step{d.forgetDelayStep(target, uri)}, nil
}

// forgetDelayStep ends that of a disk that is gone, with the domain's metadata as
// it was before.
func (d *Domain) forgetDelayStep(target string, uri transport.URI) Step {
	return Step{
		Name: fmt.Sprintf("forget the reconnect delay of disk %s", target),
		Do: func(ctx context.Context) (bool, error) {
			ctx, cancel := steady(ctx)
			defer cancel()
			return true, d.Session.Keep(ctx, d.Domain, delayName(target, uri), "")
		},
	}
}
