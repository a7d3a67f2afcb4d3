package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/vmdiskd/vmdiskd/internal/backing/open"
	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// snapshot puts a new overlay, which must not be there yet, above the image of
// an export. Its clients wait meanwhile and see no error: where it fails the
// image goes on as it was, and the overlay is gone.
func (d *daemon) snapshot(ctx context.Context, k *disk, overlay string) error {
	ctx, cancel := context.WithTimeout(ctx, limits.PauseLongest/2)
	defer cancel()
	s := k.stack
	next, err := overlayOf(&s.x, overlay)
	if err == nil {
		err = d.mayRemember(k)
	}
	if err != nil {
		return &api.Error{Code: api.CodeUnsupported, Text: err.Error()}
	}
	if err := d.createOverlay(ctx, &s.x, &next, s.swap.Info().Size); err != nil {
		return err
	}
	named, err := d.putAbove(ctx, k, next)
	if err != nil && !named {
		err = errors.Join(err, os.Remove(next.Image))
	}
	return err
}

// putAbove opens an overlay above the image of an export, as next says, and has
// the export go on with it. With an error the overlay is not in use; named tells
// that the export may be opened with it after a restart all the same.
func (d *daemon) putAbove(ctx context.Context, k *disk, next config.Export) (named bool, err error) {
	s := k.stack
	hold, err := s.pause.Pause(ctx, limits.PauseLongest)
	if err != nil {
		return false, err
	}
	defer hold.Resume() // an error is that it ended by itself
	// An image is open once only: what is the top must be closed before it can
	// be below.
	old := s.swap.Below()
	if err := old.Close(); err != nil {
		return false, errors.Join(err, d.goOn(s, &s.x))
	}
	dev, err := d.openImage(ctx, &next, nil)
	if err != nil {
		return false, errors.Join(err, d.goOn(s, &s.x))
	}
	cfg := k.cfg // with k.busy
	cfg.Image, cfg.Format, cfg.Snapshot, cfg.Discard = next.Image, next.Format, next.Snapshot, next.Discard
	cfg.Backing, cfg.BackingFiles = next.Backing, next.BackingFiles
	undo, err := d.remember(k, cfg)
	if err != nil {
		if errors.Is(err, config.ErrUnsynced) {
			undone := undo()
			named, err = undone != nil, errors.Join(err, undone)
		}
		return named, errors.Join(err, dev.Close(), d.goOn(s, &s.x))
	}
	s.swap.To(dev)
	s.x = next
	d.disks.mu.Lock()
	k.cfg = cfg
	d.disks.mu.Unlock()
	return false, nil
}

// goOn opens an image again that was closed.
func (d *daemon) goOn(s *stack, x *config.Export) error {
	dev, err := d.openImage(context.Background(), x, nil)
	if err != nil {
		d.log.Error("image cannot be opened again, its export fails", "export", x.Name, "error", err)
		return err
	}
	s.swap.To(dev)
	return nil
}

// createOverlay makes the overlay.
func (d *daemon) createOverlay(ctx context.Context, x, next *config.Export, size int64) error {
	format := formatOf(x)
	name := x.Image
	if filepath.Dir(next.Image) == filepath.Dir(x.Image) {
		name = filepath.Base(x.Image)
	}
	return open.CreateOverlay(ctx, open.Spec{
		Path: next.Image, Engine: d.engine, Buffers: d.buffers, Log: d.logs.For("backing"), Roots: d.roots(),
	}, size, name, format)
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
	case x.Format == "mem" || x.Format == "null":
		return next, fmt.Errorf("a disk of format %s has no image", x.Format)
	case !filepath.IsAbs(overlay) || !filepath.IsAbs(x.Image):
		return next, errors.New("the overlay and the image must have absolute paths")
	case p.Mode == open.SameDir && filepath.Dir(overlay) != filepath.Dir(x.Image):
		return next, fmt.Errorf("the backing policy same-dir needs the overlay in %q", filepath.Dir(x.Image))
	case p.Mode == open.Deny || p.Mode == open.Explicit:
		next.Backing = string(open.Explicit)
		next.BackingFiles = append([]string{x.Image + ":" + formatOf(x)}, x.BackingFiles...)
	}
	return next, nil
}

// formatOf is the format of the image of an export.
func formatOf(x *config.Export) string {
	if x.Format == "" {
		return "raw"
	}
	return x.Format
}
