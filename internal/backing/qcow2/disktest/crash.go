package disktest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/store"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/storetest"
)

// Files are what an image lies in. Data is nil unless it has a data file.
type Files struct{ Image, Data store.Store }

// Format opens and checks images.
type Format struct {
	// Open takes over the files, also when it fails.
	Open func(ctx context.Context, f Files, readOnly bool) (backing.Device, error)

	// Audit says what is wrong with an image, leaks aside, and how many leaks
	// there are. It reads only and does not close. It may be nil.
	Audit func(ctx context.Context, f Files) (leaks int64, err error)
}

func (f Format) audit(ctx context.Context, files Files) (leaks int64, err error) {
	if f.Audit == nil {
		return 0, nil
	}
	return f.Audit(ctx, files)
}

// PowerCuts takes what power cuts can leave while a Run goes on and verifies
// it: that the audit finds leaks at most, that it opens, that the contents are
// right, and that all this holds when it is written to.
type PowerCuts struct {
	Format Format
	Oracle *Oracle

	// Files are the image and its data file, if it has one.
	Files []*storetest.Crash

	// PerSync is how many states are taken before and after each Sync, and
	// PerCall after any other call. If that is 0, it is some after some calls.
	PerSync, PerCall int

	// Check looks at each state once more, while the run goes on and at up to
	// checksAtOnce at a time. The files are its own. It may be nil.
	Check func(f Files) error

	room   chan struct{} // of checksAtOnce
	checks sync.WaitGroup

	mu     sync.Mutex
	rnd    *rand.Rand // guarded by mu
	states int        // guarded by mu
	most   int        // guarded by mu
	err    error      // guarded by mu

	first, again []byte // guarded by mu: what a state reads as
}

// checksAtOnce bounds the states that wait for Check, each a copy of the files.
const checksAtOnce = 2

// Start begins to take up to most states, at calls that rnd picks.
func (k *PowerCuts) Start(rnd *rand.Rand, most int) {
	k.rnd, k.most, k.room = rnd, most, make(chan struct{}, checksAtOnce)
	for _, c := range k.Files {
		c.SetHook(k.hook)
	}
}

// Stop ends that. It returns how many states there were and what is wrong with
// the first that was.
func (k *PowerCuts) Stop() (states int, err error) {
	for _, c := range k.Files {
		c.SetHook(nil)
	}
	k.checks.Wait()
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.states, k.err
}

func (k *PowerCuts) hook(x storetest.Call) {
	k.mu.Lock()
	defer k.mu.Unlock()
	n := k.PerSync
	if x.Op != storetest.Sync {
		if !x.Done || k.PerCall == 0 && k.rnd.IntN(k.PerSync) > 0 {
			return
		}
		n = max(k.PerCall, 2)
	}
	if n = min(n, k.most-k.states); k.err == nil && n > 0 {
		k.take(fmt.Sprintf("%s %d+%d (done %v)", x.Op, x.Off, x.Len, x.Done), n)
	}
}

// take verifies n states of now. k.mu is held.
func (k *PowerCuts) take(when string, n int) {
	m := k.Oracle.Crash() // before the cut: later promises do not bind
	cuts := storetest.CutPower(k.Files...)
	var data []*storetest.Mem
	if len(cuts) > 1 {
		for _, s := range cuts[1].Crashes(k.rnd, n) {
			data = append(data, s)
		}
	}
	for name, image := range cuts[0].Crashes(k.rnd, n) {
		files := []*storetest.Mem{image}
		if len(cuts) > 1 {
			files = append(files, data[k.rnd.IntN(len(data))].Clone())
		}
		k.states++
		what := fmt.Sprintf("power cut at %s, which kept %s", when, name)
		k.check(files, what)
		if err := k.verify(files, m); err != nil {
			k.err = fmt.Errorf("%s: %w", what, err)
			return
		}
	}
}

// check begins a Check of a copy of files. k.mu is held.
func (k *PowerCuts) check(files []*storetest.Mem, what string) {
	if k.Check == nil {
		return
	}
	k.room <- struct{}{}
	var list []*storetest.Mem
	for _, m := range files {
		list = append(list, m.Clone())
	}
	k.checks.Go(func() {
		err := k.Check(filesOf(list))
		<-k.room // before mu: who holds it may wait for room
		if err == nil {
			return
		}
		k.mu.Lock()
		defer k.mu.Unlock()
		if k.err == nil {
			k.err = fmt.Errorf("%s: %w", what, err)
		}
	})
}

// filesOf opens files once more.
func filesOf(list []*storetest.Mem) (f Files) {
	for _, m := range list {
		m.Reopen()
	}
	f.Image = list[0]
	if len(list) > 1 {
		f.Data = list[1]
	}
	return f
}

// verify looks at one state from the outside and then writes to it.
func (k *PowerCuts) verify(files []*storetest.Mem, m Moment) error {
	ctx := context.Background()
	if _, err := k.Format.audit(ctx, filesOf(files)); err != nil {
		return fmt.Errorf("audit: %w", err)
	}
	dev, err := k.Format.Open(ctx, filesOf(files), true)
	if err != nil {
		return fmt.Errorf("open for reading: %w", err)
	}
	p, err := contents(ctx, dev, k.first)
	k.first = p
	if err = errors.Join(err, dev.Close()); err != nil {
		return err
	}
	if err := k.Oracle.Verify(p, 0, m); err != nil {
		return err
	}
	if err := k.goOn(ctx, files, p); err != nil {
		return fmt.Errorf("used after it: %w", err)
	}
	return nil
}

// laterVersion is above the versions that scripts write before a power cut.
const laterVersion = 1 << 24

// goOn opens a state that reads as p for writing, and uses every fourth.
func (k *PowerCuts) goOn(ctx context.Context, files []*storetest.Mem, p []byte) error {
	dev, err := k.Format.Open(ctx, filesOf(files), false)
	if err != nil {
		return fmt.Errorf("open for writing: %w", err)
	}
	again, err := contents(ctx, dev, k.again)
	k.again = again
	if err == nil && !bytes.Equal(again, p) {
		err = errors.New("for writing it has other contents than for reading")
	}
	if err == nil && k.states%4 == 0 {
		r := Run{Dev: dev, Oracle: NewOracle(p)}
		shape := Shape{Size: int64(len(p)), Ops: 8, Version: laterVersion, Largest: 64 << 10}
		script := shape.Random(k.rnd)
		if err = r.Do(ctx, append(script, Batch{{Kind: Flush}})); err != nil {
			err = fmt.Errorf("%w\n%s", err, script)
		}
	}
	if err = errors.Join(err, dev.Close()); err != nil {
		return err
	}
	if _, err := k.Format.audit(ctx, filesOf(files)); err != nil {
		return fmt.Errorf("audit at its end: %w", err)
	}
	return nil
}
