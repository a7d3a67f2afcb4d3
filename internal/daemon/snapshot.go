package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/layer"
	"github.com/vmdiskd/vmdiskd/internal/backing/open"
	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// snapshot puts a new overlay, which must not be there yet, above the image of
// an export. Its clients wait meanwhile and see no error: where it fails the
// image goes on as it was, and the overlay is gone. All files are opened before
// one is closed, so that what fails after that is the storage, or another program
// that locks an image in the moment in which it is not locked here: then the
// export has failed.
func (d *daemon) snapshot(ctx context.Context, k *disk, overlay string) error {
	ctx, cancel := context.WithTimeout(ctx, limits.PauseLongest/2)
	defer cancel()
	cfg, s, failed := d.disks.look(k)
	if failed != nil {
		return fmt.Errorf("export %q has failed: %w", cfg.Name, failed)
	}
	if err := d.mayLast(k, cfg.Name); err != nil {
		return err
	}
	if k.origin == fromAPI { // it would be kept
		if err := d.mayJoin(&cfg, true); err != nil {
			return err
		}
	}
	next, err := overlayOf(&s.x, overlay)
	if err == nil {
		err = d.mayRemember()
	}
	if err != nil {
		return &api.Error{Code: api.CodeUnsupported, Text: err.Error()}
	}
	back, err := d.gatherKnown(ctx, s, &s.x, 0)
	if err != nil {
		return err
	}
	defer back.Close()
	if err := d.createOverlay(ctx, &s.x, &next, s.swap.Info().Size); err != nil {
		return err
	}
	named, err := d.putAbove(ctx, k, next, back)
	if err != nil && !named {
		err = errors.Join(err, os.Remove(next.Image))
	}
	return err
}

// putAbove opens an overlay above the image of an export, as next says, and has
// the export go on with it; back are the files of the image. With an error the
// overlay is not in use; named tells that the export may be opened with it after a
// restart all the same.
func (d *daemon) putAbove(ctx context.Context, k *disk, next config.Export, back *open.Table) (named bool, err error) {
	s := k.stack
	files, err := d.gatherKnown(ctx, s, &next, 1)
	if err != nil {
		return false, err
	}
	defer files.Close()
	hold, err := s.pause.Pause(ctx, limits.PauseLongest)
	if err != nil {
		return false, err
	}
	old, err := s.takeOut(hold)
	if err != nil {
		return false, err // the pause is over
	}
	defer func() {
		if hold.Resume() != nil {
			d.log.Warn("snapshot took longer than a pause may, requests of clients have failed", "export", next.Name)
		}
	}()
	if named, err = d.raise(ctx, k, old, next, files); err != nil {
		return named, errors.Join(err, d.goOn(k, back))
	}
	return false, nil
}

// gatherKnown opens the files of an image that the one of s is, or is to be a
// part of. All but others of them must be files of s: an overlay that names the
// image by its path would have another below it, now or after a restart.
func (d *daemon) gatherKnown(ctx context.Context, s *stack, x *config.Export, others int) (*open.Table, error) {
	t, err := d.gather(ctx, x, s.known())
	if err != nil {
		return nil, err
	}
	if list := t.Others(s.known()); len(list) > others {
		t.Close()
		return nil, fmt.Errorf("what is at %q is not the file that is served", list)
	}
	return t, nil
}

// errExchanged is what requests get that come while there is no image, because a
// pause was over before its time.
var errExchanged = errors.New("its image is being exchanged for another")

// takeOut takes the image out of a stack that is paused. No request is in it, and
// none comes any more: until there is another, requests fail. ErrResumed says that
// the pause is over, and the image still there.
func (s *stack) takeOut(hold *layer.Hold) (backing.Device, error) {
	old := s.swap.Below()
	s.swap.To(layer.NewFailed(old, errExchanged))
	select {
	case <-hold.Ended(): // a request may have come before
		s.swap.To(old)
		return nil, layer.ErrResumed
	default:
		return old, nil
	}
}

// put serves another image.
func (s *stack) put(i image, x config.Export) {
	s.swap.To(i.dev)
	s.image, s.x = i, x
}

// raise closes the image of an export, which was taken out, and opens it again
// below an overlay, with the files in t. named is as with putAbove.
func (d *daemon) raise(ctx context.Context, k *disk, old backing.Device, next config.Export, t *open.Table) (named bool, err error) {
	// An image is open once only: what is the top must be closed before it can
	// be below.
	if err := old.Close(); err != nil {
		return false, err
	}
	i, err := d.openGathered(ctx, &next, t, k.stack.threshold, new(poison))
	if err != nil {
		return false, err
	}
	cfg := k.cfg // with k.busy
	cfg.Image, cfg.Format, cfg.Snapshot, cfg.Discard = next.Image, next.Format, next.Snapshot, next.Discard
	cfg.Backing, cfg.BackingFiles, cfg.Snapshots = next.Backing, next.BackingFiles, next.Snapshots
	undo, err := d.remember(k, cfg, i.below)
	if err != nil {
		if errors.Is(err, config.ErrUnsynced) {
			undone := undo()
			named, err = undone != nil, errors.Join(err, undone)
		}
		return named, errors.Join(err, i.dev.Close())
	}
	k.stack.put(i, next)
	d.disks.mu.Lock()
	k.cfg, k.poison, k.file, k.lost = cfg, i.poison, i.file, nil
	if k.origin == fromAPI { // it is kept by now
		k.origin = fromState
	}
	d.disks.mu.Unlock()
	return false, nil
}

// goOn opens an image again that was closed, with the files in t. If that cannot
// be done the export has failed.
func (d *daemon) goOn(k *disk, t *open.Table) error {
	i, err := d.openGathered(context.Background(), &k.stack.x, t, k.stack.threshold, k.stack.poison)
	if err != nil {
		d.fail(k, fmt.Errorf("image cannot be opened again: %w", err))
		return err
	}
	k.stack.put(i, k.stack.x)
	return nil
}

// fail leaves an export without its image, which is closed. Its clients get
// errors until it is removed.
func (d *daemon) fail(k *disk, why error) {
	d.log.Error("export has failed", "export", k.cfg.Name, "error", why)
	k.stack.swap.To(layer.NewFailed(k.stack.swap.Below(), why))
	d.disks.mu.Lock()
	k.failed = why
	d.disks.mu.Unlock()
	d.exports.Fail(k.cfg.Name)
}

// sector is what the size of a qcow2 image is a multiple of.
const sector = 512

// createOverlay makes the overlay.
func (d *daemon) createOverlay(ctx context.Context, x, next *config.Export, size int64) error {
	if past := size % sector; past != 0 {
		return &api.Error{Code: api.CodeUnsupported, Text: fmt.Sprintf(
			"export %q has %d bytes, and an overlay has whole sectors of %d: vmdiskctl export resize %s %d comes first", x.Name, size, sector, x.Name, size-past+sector)}
	}
	name := x.Image
	if filepath.Dir(next.Image) == filepath.Dir(x.Image) {
		name = filepath.Base(x.Image)
	}
	return open.CreateOverlay(ctx, open.Spec{
		Path: next.Image, Engine: d.engine, Buffers: d.buffers, Log: d.logs.For("backing"), Roots: d.roots(),
	}, size, name, x.ImageFormat())
}

// overlayOf is how an export opens an overlay above its image, by the policy
// that it has.
func overlayOf(x *config.Export, overlay string) (config.Export, error) {
	next := *x
	next.Image, next.Format, next.Snapshot = overlay, "qcow2", ""
	next.SetDefaults()
	p, err := open.ParsePolicy(x.Backing, x.BackingFiles, x.DataFiles)
	switch {
	case err != nil:
		return next, err
	case x.ReadOnly:
		return next, errors.New("the export is read-only: nothing would be written to an overlay")
	case x.Overlay != nil:
		return next, errors.New("the export throws away what is written: nothing would be written to an overlay of its image")
	case !hasFiles(x):
		return next, fmt.Errorf("a disk of format %s has no image", x.Format)
	case x.Descriptors() > 0:
		return next, errors.New("the image or a file below it came as a descriptor, which has no name that an overlay could give")
	case !filepath.IsAbs(overlay) || !filepath.IsAbs(x.Image):
		return next, errors.New("the overlay and the image must have absolute paths")
	case slices.Contains(strings.Split(overlay, "/"), ".."):
		return next, fmt.Errorf("the path %q of the overlay has \"..\" in it: write what it leads to", overlay)
	case p.Mode == open.SameDir && filepath.Dir(overlay) != filepath.Dir(x.Image):
		return next, fmt.Errorf("the backing policy same-dir needs the overlay in %q", filepath.Dir(x.Image))
	case p.Mode == open.Deny || p.Mode == open.Explicit:
		next.Backing = string(open.Explicit)
		next.BackingFiles = append([]string{x.Image + ":" + x.ImageFormat()}, x.BackingFiles...)
		next.Snapshots++
	}
	return next, nil
}
