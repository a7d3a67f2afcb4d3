package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// Images of the cases, by name. The raw one is the pattern, fully written.
const (
	rawImage    = ""
	plainImage  = "plain.qcow2"  // the pattern in clusters of 64 KiB
	chainImage  = "chain.qcow2"  // nine empty overlays above the plain image
	sparseImage = "sparse.qcow2" // a disk of 10 TiB that has the same data at its start
	zlibImage   = "zlib.qcow2"   // files of this system, compressed
	zstdImage   = "zstd.qcow2"

	overlayImage = "overlay.qcow2" // an empty overlay on a large disk without data
	copyImage    = "copy.qcow2"    // an empty overlay on the pattern
)

// chainDepth is the number of images of the chain.
const chainDepth = 10

// recipes make the images in b.dir out of the pattern, when a case wants one
// first.
var recipes = map[string]func(ctx context.Context, b *bench, path string) error{
	plainImage: func(ctx context.Context, b *bench, path string) error {
		return qemuImg(ctx, "convert", "-O", "qcow2", b.raw, path)
	},
	chainImage: makeChain,
	sparseImage: func(ctx context.Context, b *bench, path string) error {
		return errors.Join(
			qemuImg(ctx, "convert", "-O", "qcow2", b.raw, path),
			qemuImg(ctx, "resize", path, "10T"))
	},
	overlayImage: func(ctx context.Context, b *bench, path string) error {
		base := filepath.Join(b.dir, "sparse.raw")
		return errors.Join(
			qemuImg(ctx, "create", "-q", "-f", "raw", base, "64G"),
			qemuImg(ctx, "create", "-q", "-f", "qcow2", "-F", "raw", "-b", base, path))
	},
	copyImage: func(ctx context.Context, b *bench, path string) error {
		return qemuImg(ctx, "create", "-q", "-f", "qcow2", "-F", "raw", "-b", b.raw, path)
	},
	zlibImage: func(ctx context.Context, b *bench, path string) error { return b.compress(ctx, "zlib", path) },
	zstdImage: func(ctx context.Context, b *bench, path string) error { return b.compress(ctx, "zstd", path) },
}

func qemuImg(ctx context.Context, args ...string) error {
	if out, err := exec.CommandContext(ctx, "qemu-img", args...).CombinedOutput(); err != nil {
		return fmt.Errorf("qemu-img %s: %w\n%s", args[0], err, out)
	}
	return nil
}

// use makes the named image the one that is served, and makes it first if it
// is not there yet.
func (b *bench) use(ctx context.Context, name string) error {
	path := b.raw
	if name != rawImage {
		path = filepath.Join(b.dir, name)
		if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
			if err := recipes[name](ctx, b, path); err != nil {
				return err
			}
		}
	}
	if path != b.image {
		b.image, b.small = path, false
	}
	return nil
}

// makeChain puts empty overlays above an image with all the data.
func makeChain(ctx context.Context, b *bench, path string) error {
	below := filepath.Join(b.dir, "chain-0.qcow2")
	if err := qemuImg(ctx, "convert", "-O", "qcow2", b.raw, below); err != nil {
		return err
	}
	for i := 1; i < chainDepth; i++ {
		next := path
		if i < chainDepth-1 {
			next = filepath.Join(b.dir, fmt.Sprintf("chain-%d.qcow2", i))
		}
		if err := qemuImg(ctx, "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", filepath.Base(below), next); err != nil {
			return err
		}
		below = next
	}
	return nil
}

// compress makes a compressed image of this system's own files: what disks of
// guests are full of.
func (b *bench) compress(ctx context.Context, kind, path string) error {
	raw := filepath.Join(b.dir, "files.img")
	if _, err := os.Stat(raw); errors.Is(err, fs.ErrNotExist) {
		if err := collectFiles(raw, b.size); err != nil {
			return err
		}
	}
	return qemuImg(ctx, "convert", "-c", "-O", "qcow2", "-o", "compression_type="+kind, raw, path)
}

// errFull ends the walk when there is enough.
var errFull = errors.New("enough")

// collectFiles writes the contents of /usr, file after file and again from the
// start if need be, until the image has size bytes.
func collectFiles(path string, size int64) (err error) {
	out, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	for left := size; left > 0; {
		before := left
		walk := filepath.WalkDir("/usr", func(name string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return nil // what cannot be read is left out
			}
			n, err := appendFile(out, name, left)
			if left -= n; err == nil && left == 0 {
				err = errFull
			}
			return err
		})
		if walk != nil && !errors.Is(walk, errFull) {
			return walk
		}
		if left == before {
			return errors.New("/usr has no file that can be read")
		}
	}
	return nil
}

func appendFile(out io.Writer, name string, limit int64) (int64, error) {
	f, err := os.Open(name)
	if err != nil {
		return 0, nil // left out
	}
	defer f.Close()
	return io.Copy(out, io.LimitReader(f, limit))
}

// imageArgs are what makes a server serve an image of the case. A program
// without an entry reads raw images only.
var imageArgs = map[string]testenv.Options{
	"":         {Format: "qcow2", Extra: []string{"--backing=same-dir"}}, // vmdiskd
	"qemu-nbd": {Format: "qcow2"},
}
