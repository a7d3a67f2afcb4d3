package qcow2

import (
	"context"
	"errors"
	"log/slog"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/bitmaps"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/check"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/store"
)

// DropBitmaps takes all bitmaps away, durably, from the image in st, whose header is
// h, if they cannot be loaded and nothing else is corrupt in it: only then dropped
// is true. What they had are leaks then. The header is to be read anew.
func DropBitmaps(ctx context.Context, st store.Store, h *format.Header) (dropped bool, err error) {
	_, err = bitmaps.Load(ctx, st, h, int64(h.Size), bitmaps.Options{Log: slog.New(slog.DiscardHandler)})
	if err == nil || !errors.Is(err, backing.ErrInvalid) {
		return false, err
	}
	rest := *h
	rest.Autoclear &^= format.AutoclearBitmaps
	rest.Bitmaps, rest.BitmapsErr = nil, nil
	_, err = check.Run(ctx, st, &rest, check.Options{Sound: true})
	if isCorrupt(err) {
		return false, nil
	}
	if err == nil {
		err = bitmaps.Forget(ctx, st, h)
	}
	return err == nil, err
}
