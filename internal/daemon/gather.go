package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"slices"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/layer"
	"github.com/vmdiskd/vmdiskd/internal/backing/open"
	"github.com/vmdiskd/vmdiskd/internal/backing/raw"
	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/engine/bufpool"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// gathered are the files of the image of an export, or why there are none, with what
// its overlay is to go on with. An export without files may have nothing.
type gathered struct {
	table *open.Table
	delta *layer.Delta
	err   error
}

// settled tells whether g.err is the last word: another attempt would wait as long, for
// silent storage, or for who has the image. Of other errors addDisk complains.
func (g *gathered) settled() bool {
	return errors.Is(g.err, errNoAnswer) || errors.Is(g.err, backing.ErrLocked)
}

// close closes what nobody took.
func (g *gathered) close() {
	h := held{files: g.table, delta: g.delta}
	h.close()
}

// sought is an export whose files are to be opened, while those in known are open
// that may be its too.
type sought struct {
	config.Export
	known []*os.File
}

// gatherAll opens the files of all images without locking them. Storage that
// hangs holds up no other's: its images have errNoAnswer after limits.ImageAnswers,
// and so have those whose turn does not come before.
func (d *daemon) gatherAll(list []sought) []gathered {
	out := make([]gathered, len(list))
	var images []int
	for i := range list {
		if hasFiles(&list[i].Export) {
			images = append(images, i)
		}
	}
	buffers := d.asking.memory()
	all := d.asking.all(d.stopping, len(images), func(ctx context.Context, n int) gathered {
		return d.gatherOne(ctx, &list[images[n]], buffers)
	})
	for n, i := range images {
		out[i] = all[n].of(list[i].Image)
	}
	return out
}

// of names the image that has not answered.
func (g gathered) of(image string) gathered {
	if errors.Is(g.err, errNoAnswer) {
		g.err = fmt.Errorf("image %q: %w", image, g.err)
	}
	return g
}

// gatherFirst is gatherAll for the worker. Beside the error of a block device that
// somebody else has is its file, opened to be read: an overlay that the worker
// remembers may stand on it. A lease is not waited for again.
func (s *stage0) gatherFirst(list []sought) []gathered {
	all := s.gatherAll(list)
	readers := make([]sought, len(list))
	for i, g := range all {
		if errors.Is(g.err, backing.ErrLocked) && !errors.Is(g.err, raw.ErrLeased) && s.served() {
			readers[i] = list[i]
			readers[i].ReadOnly = true
		}
	}
	for i, g := range s.gatherAll(readers) {
		switch {
		case g.settled(): // it answers no more
			all[i] = g
		case g.table != nil:
			all[i].table = g.table
		}
	}
	return all
}

// errNoTurn is errNoAnswer for an image that nobody was asked for.
var errNoTurn = fmt.Errorf("%w: others took all of the time", errNoAnswer)

// hasFiles tells whether an export is of an image.
func hasFiles(x *config.Export) bool {
	return x.Image != "" && x.Format != "mem" && x.Format != "null"
}

// gatherOne opens the files of one image. It may hang.
func (d *daemon) gatherOne(ctx context.Context, x *sought, buffers *bufpool.Pool) gathered {
	spec, err := d.imageSpec(&x.Export, nil)
	if err != nil {
		return gathered{err: err}
	}
	spec.Log, spec.Known, spec.Buffers = slog.New(slog.DiscardHandler), x.known, buffers
	t, err := gatherAlone(ctx, spec)
	return gathered{table: t, err: d.explain(spec.Path, err)}
}

// asking bounds the calls that open files of images, those included that hang. A
// call that hangs can be given up, but not ended: it keeps its goroutine and its
// threads until the storage answers, and what comes of it then is closed. The zero
// value is ready.
type asking struct {
	once  sync.Once
	calls chan struct{} // has a value for each; made by once

	reads   sync.Once
	buffers *bufpool.Pool // made by reads
}

// memory is what all calls read with, as long as the process lives: one that hangs
// has its buffers until the storage answers, and takes none from clients.
func (a *asking) memory() *bufpool.Pool {
	a.reads.Do(func() { a.buffers = bufpool.New(limits.BufferBudget) })
	return a.buffers
}

func (a *asking) places() chan struct{} {
	a.once.Do(func() { a.calls = make(chan struct{}, limits.ImagesAsked) })
	return a.calls
}

// all has ask open the files of n images, limits.ImagesAtOnce side by side. One
// that does not answer in limits.ImageYields lets the next one begin, as long as
// limits.ImagesAsked allows; together they have limits.ImageAnswers.
func (a *asking) all(ctx context.Context, n int, ask func(ctx context.Context, i int) gathered) []gathered {
	ctx, cancel := context.WithTimeout(ctx, limits.ImageAnswers)
	defer cancel()
	out := make([]gathered, n)
	turns := make(chan struct{}, limits.ImagesAtOnce)
	var begun sync.WaitGroup
	for i := range out {
		if !enter(ctx, turns) {
			out[i].err = errNoTurn
			continue
		}
		begun.Go(func() {
			yield := sync.OnceFunc(func() { <-turns })
			defer yield()
			defer time.AfterFunc(limits.ImageYields, yield).Stop()
			out[i] = a.one(ctx, func() gathered { return ask(ctx, i) })
		})
	}
	begun.Wait()
	return out
}

// one is ask, or errNoAnswer when ctx ends.
func (a *asking) one(ctx context.Context, ask func() gathered) gathered {
	if !enter(ctx, a.places()) {
		return gathered{err: errNoTurn}
	}
	done := make(chan gathered)
	go func() {
		g := ask()
		<-a.places()
		select {
		case done <- g:
		case <-ctx.Done():
			g.table.Close()
		}
	}()
	select {
	case g := <-done:
		return g
	case <-ctx.Done():
		return gathered{err: errNoAnswer}
	}
}

// enter takes a place, unless ctx ends before there is one.
func enter(ctx context.Context, places chan struct{}) bool {
	if ctx.Err() != nil {
		return false
	}
	select {
	case places <- struct{}{}:
		return true
	case <-ctx.Done():
		return false
	}
}

// gatherInTime is open.Gather, by limits.ImageAnswers at the latest.
func (d *daemon) gatherInTime(ctx context.Context, spec open.Spec) (*open.Table, error) {
	ctx, cancel := context.WithTimeout(ctx, limits.ImageAnswers)
	defer cancel()
	g := d.asking.one(ctx, func() gathered {
		t, err := gatherAlone(ctx, spec)
		return gathered{table: t, err: err}
	}).of(spec.Path)
	return g.table, g.err
}

// gatherAlone reads what it has to by an engine of its own, which a read that
// hangs takes from nobody.
func gatherAlone(ctx context.Context, s open.Spec) (*open.Table, error) {
	e := engine.NewPool(1)
	defer e.Close()
	s.Engine = e
	return open.Gather(ctx, s)
}

// silentVar is the environment variable by which stage 0, executed anew, knows the
// exports whose storage did not answer: the descriptor of a file with handover.Silent
// in JSON, which may be longer than a variable.
const silentVar = "VMDISKD_SILENT"

// takeSilent reads what silentVar names, and unsets it.
func takeSilent() (silent map[string]bool, err error) {
	word := os.Getenv(silentVar)
	if word == "" {
		return map[string]bool{}, nil
	}
	fd, err := strconv.ParseUint(word, 10, 31)
	if err == nil {
		f := os.NewFile(uintptr(fd), "silent exports")
		defer f.Close()
		err = json.NewDecoder(io.NewSectionReader(f, 0, limits.Handover)).Decode(&silent)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", silentVar, err)
	}
	return silent, os.Unsetenv(silentVar)
}

// keepSilent is a file for takeSilent that stays open in what is executed next.
func keepSilent(silent map[string]bool) (*os.File, error) {
	fd, err := unix.MemfdCreate("vmdiskd-silent", 0)
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	f := os.NewFile(uintptr(fd), "silent exports")
	if err := json.NewEncoder(f).Encode(silent); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// startAnew executes stage 0 again, which ends the threads that wait for storage:
// Landlock is set on all threads (psx), and one that waits never does it. What
// was made is undone before. It returns only if that is impossible.
func (s *stage0) startAnew() error {
	f, err := keepSilent(s.out.Silent)
	if err != nil {
		return err
	}
	defer f.Close()
	s.undo()
	if sig := s.signals.release(); sig != nil {
		return errStopped
	}
	err = unix.Exec("/proc/self/exe", os.Args, append(os.Environ(), fmt.Sprint(silentVar, "=", f.Fd())))
	return fmt.Errorf("start without the %d exports whose storage does not answer: %w", len(s.out.Silent), err)
}

// filesOf gathers the files of exports that are to be opened, which have them then. For
// the first exports of the worker stage 0 has opened what the configuration names, and
// knows whose did not answer, or are in use.
func (d *daemon) filesOf(list []*disk) []gathered {
	var first *Handed
	if d.server == nil {
		first = d.cfg.Handed
	}
	out := first.gathered(list)
	images := make([]sought, len(list))
	for i, k := range list {
		if k.failed != nil || out[i].err != nil {
			continue // it is not opened, and the export without an image has no files
		}
		images[i].Export = k.opens(k.cfg)
		if k.origin == fromConfig {
			if placed, err := d.placed(images[i].Export); err == nil { // addDisk complains
				images[i].Export = placed
			}
		}
		images[i], out[i].err = first.lacks(images[i].Export)
		images[i].known = append(images[i].known, d.disks.heldFor(k)...)
	}
	for i, g := range d.gatherAll(images) {
		if out[i].err == nil {
			out[i] = g
		}
		d.disks.takeOver(list[i], &images[i], &out[i])
		list[i].files, list[i].delta = out[i].table, out[i].delta
	}
	return out
}

// gathered says of which exports there are no tables because their images did not
// answer stage 0.
func (t *Handed) gathered(list []*disk) []gathered {
	out := make([]gathered, len(list))
	if t == nil {
		return out
	}
	for i, k := range list {
		asked, silent := t.in.Silent[k.cfg.Name]
		switch {
		case silent && asked:
			out[i].err = errNoAnswer
		case silent:
			out[i].err = errNoTurn
		}
		out[i] = out[i].of(k.cfg.Image)
	}
	return out
}

// lacks is x if its image has not been handed over, such as a remembered overlay, and
// no image otherwise: openImage finds what has. Error: that of stage 0, for an image
// that it has found in use.
func (t *Handed) lacks(x config.Export) (sought, error) {
	if t == nil {
		return sought{Export: x}, nil
	}
	h, ok := t.in.Images[x.Name]
	switch {
	case ok && h.Image == x.Image && h.InUse != "":
		return sought{}, inUseError(h.InUse)
	case ok && h.Image == x.Image:
		return sought{}, nil
	}
	known, _ := h.open() // images complains
	return sought{x, slices.Collect(maps.Values(known))}, nil
}

// inUseError is backing.ErrLocked in the words of another process.
type inUseError string

func (e inUseError) Error() string { return string(e) }
func (inUseError) Unwrap() error   { return backing.ErrLocked }
