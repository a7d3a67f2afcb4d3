package daemon

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/backing/open"
	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/engine/bufpool"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// gathered are the files of the image of an export, or why there are none. An
// export without files has neither.
type gathered struct {
	table *open.Table
	err   error
}

// gatherAll opens the files of all images without locking them. Storage that
// hangs holds up no other's: its image has errNoAnswer after limits.ImageAnswers.
func (d *daemon) gatherAll(list []config.Export) []gathered {
	out := make([]gathered, len(list))
	buffers := bufpool.New(limits.BufferBudget)
	slots := make(chan struct{}, limits.ImagesAtOnce)
	var all sync.WaitGroup
	for i := range list {
		slots <- struct{}{}
		all.Add(1)
		go func() {
			defer all.Done()
			out[i] = d.gatherOne(&list[i], buffers)
			<-slots
		}()
	}
	all.Wait()
	return out
}

// hasFiles tells whether an export is of an image.
func hasFiles(x *config.Export) bool {
	return x.Image != "" && x.Format != "mem" && x.Format != "null"
}

// gatherOne opens the files of one image, if it has files.
func (d *daemon) gatherOne(x *config.Export, buffers *bufpool.Pool) (g gathered) {
	if !hasFiles(x) {
		return gathered{}
	}
	spec, err := d.imageSpec(x, nil)
	if err != nil {
		return gathered{err: err}
	}
	spec.Log, spec.Buffers = slog.New(slog.DiscardHandler), buffers
	g.table, g.err = gatherInTime(d.stopping, spec)
	g.err = d.explain(spec.Path, g.err)
	return g
}

// gatherInTime is open.Gather with errNoAnswer when ctx ends, after
// limits.ImageAnswers at the latest. A call that hangs can be given up, but not
// ended: it keeps its goroutine and its thread, and what comes of it later is
// closed.
func gatherInTime(ctx context.Context, spec open.Spec) (*open.Table, error) {
	ctx, cancel := context.WithTimeout(ctx, limits.ImageAnswers)
	defer cancel()
	done := make(chan gathered)
	go func() {
		t, err := gatherAlone(ctx, spec)
		select {
		case done <- gathered{t, err}:
		case <-ctx.Done():
			t.Close()
		}
	}()
	select {
	case g := <-done:
		return g.table, g.err
	case <-ctx.Done():
		return nil, noAnswer(spec.Path)
	}
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
// exports whose storage did not answer: their names in JSON.
const silentVar = "VMDISKD_SILENT"

// takeSilent reads silentVar and unsets it.
func takeSilent() (names []string, err error) {
	word := os.Getenv(silentVar)
	if word == "" {
		return nil, nil
	}
	if err := json.Unmarshal([]byte(word), &names); err != nil {
		return nil, fmt.Errorf("%s: %w", silentVar, err)
	}
	return names, os.Unsetenv(silentVar)
}

// startAnew executes stage 0 again, which ends the threads that wait for storage:
// Landlock is set on all threads (psx), and one that waits never does it. What
// was made is undone before. It returns only if that is impossible.
func (s *stage0) startAnew(silent []string) error {
	word, err := json.Marshal(silent)
	if err != nil {
		return err
	}
	s.undo()
	if sig := s.signals.release(); sig != nil {
		return errStopped
	}
	err = unix.Exec("/proc/self/exe", os.Args, append(os.Environ(), silentVar+"="+string(word)))
	return fmt.Errorf("start without the exports %q, whose storage does not answer: %w", silent, err)
}

// filesOf gathers the files of exports that are to be opened. Those of the first
// exports of the worker stage 0 has opened, which knows whose did not answer.
func (d *daemon) filesOf(list []*disk) []gathered {
	if t := d.cfg.Handed; t != nil && d.server == nil {
		return t.gathered(list)
	}
	images := make([]config.Export, len(list))
	for i, k := range list {
		if k.failed != nil {
			continue // it is not opened, and the export without an image has no files
		}
		images[i] = k.cfg
		if k.origin != fromConfig {
			continue
		}
		if placed, err := d.placed(k.cfg); err == nil { // addDisk complains
			images[i] = placed
		}
	}
	return d.gatherAll(images)
}

// gathered has no tables: openImage finds what was handed over.
func (t *Handed) gathered(list []*disk) []gathered {
	out := make([]gathered, len(list))
	for i, k := range list {
		if slices.Contains(t.in.Silent, k.cfg.Name) {
			out[i].err = noAnswer(k.cfg.Image)
		}
	}
	return out
}

func noAnswer(image string) error { return fmt.Errorf("image %q: %w", image, errNoAnswer) }
