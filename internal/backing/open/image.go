package open

import (
	"context"
	"errors"
	"os"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2"
	"github.com/vmdiskd/vmdiskd/internal/backing/raw"
)

// Image is an image and the chain below it, open for reading: for those who
// ask where the bytes are.
type Image struct {
	// Top is the image, and what it stands on is below.
	Top qcow2.Layer

	// Files has the paths of each layer's files, that of Top first.
	Files []LayerFiles

	seen map[raw.ID]string
}

// LayerFiles are the paths of the files of one layer.
type LayerFiles struct {
	Path string
	Data string // of the file with the guest's data: Path or the data file
}

// OpenImage opens an image of format "raw" or "qcow2" for reading, through the
// same gate and with the same errors as Open. The caller closes it.
func OpenImage(ctx context.Context, s Spec) (*Image, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if !s.ReadOnly || s.Format != formatRaw && s.Format != formatQcow2 {
		return nil, invalid(s, errors.New("layers are those of a raw or qcow2 image that is opened read-only"))
	}
	cache, ok := cacheModes[s.Cache]
	if !ok {
		return nil, invalid(s, errors.New("unknown cache mode"))
	}
	ch := &chain{spec: s, cache: cache, seen: make(map[raw.ID]string)}
	defer ch.close()
	if err := ch.open(ctx); err != nil {
		return nil, err
	}
	i := &Image{Files: ch.files(), seen: ch.seen}
	if err := ch.stack(ctx); err != nil {
		return nil, err
	}
	l := ch.cut()
	var err error
	if i.Top, err = ch.layer(ctx, l); err != nil {
		return nil, inImage(l.path, err)
	}
	return i, nil
}

// Device serves the image. It takes over Top: to close it closes all.
func (i *Image) Device() backing.Device {
	return qcow2.NewChainDevice(i.Top, qcow2.Options{Path: i.Files[0].Path})
}

// Has reports whether f is one of the files of the image.
func (i *Image) Has(f *os.File) (bool, error) {
	id, err := raw.Identify(f)
	return i.seen[id] != "", err
}

// Close closes all files.
func (i *Image) Close() error { return i.Top.Close() }
