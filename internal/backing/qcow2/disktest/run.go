package disktest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/vmdiskd/vmdiskd/internal/backing"
)

// readStep is how much of a disk is read at once.
const readStep = 256 << 10

// Run carries out scripts on a disk and holds its answers against an oracle.
type Run struct {
	Dev    backing.Device
	Oracle *Oracle

	// Reopen closes Dev, looks at what it has left behind and opens the disk
	// again. Without it, batches that ask for that are passed over.
	Reopen func(ctx context.Context, old backing.Device) (backing.Device, error)

	// Faulty: operations may fail.
	Faulty bool

	Batch int // that is being carried out

	all []byte // what the disk was read as
}

// Do carries out s and reads the whole disk at its end. It fails with the
// first answer that is wrong; the disk is then in no state to go on.
func (r *Run) Do(ctx context.Context, s Script) error {
	for i, batch := range s {
		r.Batch = i
		if err := r.Carry(ctx, batch); err != nil {
			return fmt.Errorf("batch %d: %w", i, err)
		}
		r.Oracle.Prune()
	}
	if err := r.ReadAll(ctx); err != nil {
		return fmt.Errorf("at the end: %w", err)
	}
	return nil
}

// Carry carries out one batch and reads nothing that it does not ask for.
func (r *Run) Carry(ctx context.Context, batch Batch) error {
	if batch[0].Kind == Reopen {
		return r.reopen(ctx)
	}
	errs := make([]error, len(batch))
	var wg sync.WaitGroup
	for i, op := range batch {
		wg.Go(func() {
			if err := r.op(ctx, op); err != nil {
				errs[i] = fmt.Errorf("%s: %w", op, err)
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

func (r *Run) reopen(ctx context.Context) (err error) {
	if r.Reopen == nil {
		return nil
	}
	if r.Dev, err = r.Reopen(ctx, r.Dev); err == nil {
		err = r.ReadAll(ctx)
	}
	if err != nil {
		return fmt.Errorf("reopen: %w", err)
	}
	return nil
}

func (r *Run) op(ctx context.Context, op Op) error {
	fua := op.Flags&backing.FUA != 0
	switch op.Kind {
	case Read:
		m, p := r.Oracle.Now(), make([]byte, op.N)
		if err := r.Dev.ReadAt(ctx, p, op.Off); err != nil {
			return r.excuse(err)
		}
		return r.Oracle.Verify(p, op.Off, m)
	case Flush:
		done := r.Oracle.BeginFlush()
		if err := r.Dev.Flush(ctx); err != nil {
			return r.excuse(err)
		}
		done()
	case Write:
		p := make([]byte, op.N)
		Fill(p, op.Off, op.Version)
		c := r.Oracle.Begin(op.Off, op.N, op.Version, false, fua)
		return r.end(c, r.Dev.WriteAt(ctx, p, op.Off, op.Flags))
	case Zero:
		c := r.Oracle.Begin(op.Off, op.N, 0, false, fua)
		err := r.Dev.Zero(ctx, op.Off, op.N, op.Flags)
		return r.endOptional(c, err, op.Flags&backing.FastZero == 0 && r.Dev.Info().Caps.Has(backing.CanZero))
	case Trim:
		c := r.Oracle.Begin(op.Off, op.N, 0, true, fua)
		return r.endOptional(c, r.Dev.Trim(ctx, op.Off, op.N, op.Flags), r.Dev.Info().Caps.Has(backing.CanTrim))
	}
	return nil
}

// endOptional notes the end of a change that the disk may refuse unless must.
func (r *Run) endOptional(c *Change, err error, must bool) error {
	if !must && errors.Is(err, backing.ErrNotSupported) {
		r.Oracle.Void(c)
		return nil
	}
	return r.end(c, err)
}

// end notes the end of a change.
func (r *Run) end(c *Change, err error) error {
	if err != nil {
		r.Oracle.Fail(c)
		return r.excuse(err)
	}
	r.Oracle.End(c)
	return nil
}

// excuse lets errors pass where they were asked for.
func (r *Run) excuse(err error) error {
	if r.Faulty {
		return nil
	}
	return err
}

// ReadAll reads the whole disk, holds it against the oracle and against what
// the disk says is zero. No operation may be in flight.
func (r *Run) ReadAll(ctx context.Context) error {
	p, err := contents(ctx, r.Dev, r.all)
	r.all = p
	if err != nil {
		return err
	}
	if err := r.Oracle.Resolve(p, 0); err != nil {
		return err
	}
	if !r.Dev.Info().Caps.Has(backing.CanExtents) {
		return nil
	}
	return extents(ctx, r.Dev, p)
}

// contents are all bytes of a disk, in p if there is room. Each new buffer costs
// the race detector new shadow memory.
func contents(ctx context.Context, d backing.Device, p []byte) ([]byte, error) {
	size := int(d.Info().Size)
	p = slices.Grow(p[:0], size)[:size]
	for off := 0; off < len(p); off += readStep {
		if err := d.ReadAt(ctx, p[off:min(off+readStep, len(p))], int64(off)); err != nil {
			return nil, fmt.Errorf("read at %d: %w", off, err)
		}
	}
	return p, nil
}

// extents holds what a disk says of its extents against its contents.
func extents(ctx context.Context, d backing.Device, p []byte) error {
	var at int64
	var wrong error
	err := d.Extents(ctx, 0, int64(len(p)), 0, func(x backing.Extent) bool {
		switch {
		case x.Len <= 0 || x.Len > int64(len(p))-at:
			wrong = fmt.Errorf("extent of %d bytes at %d of %d", x.Len, at, len(p))
		case x.Zero && !backing.AllZero(p[at:at+x.Len]):
			wrong = fmt.Errorf("extent %d+%d is said to be zero and is not", at, x.Len)
		}
		at += x.Len
		return wrong == nil
	})
	if err == nil && wrong == nil && at != int64(len(p)) {
		wrong = fmt.Errorf("extents of %d bytes end at %d", len(p), at)
	}
	return errors.Join(err, wrong)
}
