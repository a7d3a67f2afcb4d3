// Package qcowtest makes qcow2 images for differential tests with qemu-img and
// qemu-io. The images are the same for the same seed, but for the order in
// which QEMU places clusters.
package qcowtest

import (
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"
)

// Seed of Cases.
const Seed = 1

// patience bounds the making of all images.
const patience = 5 * time.Minute

// workers is how many images are made at once.
const workers = 2

// Image is an image and what a guest reads from it.
type Image struct {
	Name   string // fit for a subtest
	Path   string // of the top image
	Format string // of the top image

	// Options are what the top image was made with.
	Options Options

	// Raw is the path of a raw file with the guest's bytes, as
	// `qemu-img convert` sees them. It is made at the first call.
	Raw func() string
}

// Cases makes images so that every two values of any two axes that go
// together occur together. They are removed when t ends. Needs qemu-img and
// qemu-io, and fails without them.
func Cases(t testing.TB) []Image {
	t.Helper()
	return Make(t, Seed, Pairwise(Seed))
}

// Make makes one image for each element of all, with contents from seed.
func Make(t testing.TB, seed uint64, all []Options) []Image {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	dir := t.TempDir()
	source := filepath.Join(dir, "source")
	if err := writeSource(source, seed); err != nil {
		t.Fatal(err)
	}
	images, errs := make([]Image, len(all)), make([]error, len(all))
	next := make(chan int)
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for i := range next {
				b := builder{ctx: ctx, dir: filepath.Join(dir, fmt.Sprintf("%03d", i)), source: source}
				images[i].Path, errs[i] = b.build(all[i], seed+uint64(i))
			}
		})
	}
	for i := range all {
		next <- i
	}
	close(next)
	wg.Wait()
	for i, o := range all {
		if errs[i] != nil {
			t.Fatalf("seed %d, image %s: %v", seed, o, errs[i])
		}
		path := images[i].Path
		images[i] = Image{Name: fmt.Sprintf("%03d-%s", i, o), Path: path, Format: "qcow2", Options: o,
			Raw: sync.OnceValue(func() string { return convert(t, path) })}
	}
	return images
}

// convert makes the raw file of an image beside it.
func convert(t testing.TB, path string) string {
	t.Helper()
	raw := path + ".raw"
	out, err := exec.Command("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, raw).CombinedOutput()
	if err != nil {
		t.Fatalf("qemu-img convert %s: %v\n%s", path, err, out)
	}
	return raw
}
