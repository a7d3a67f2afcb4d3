package layer_test

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/layer"
	"github.com/vmdiskd/vmdiskd/internal/backing/mem"
	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

func TestPauseConforms(t *testing.T) {
	conform(t, 0, func(_ testing.TB, d backing.Device) backing.Device { return layer.NewPause(d) })
}

// quick is a disk whose flushes cost nothing: each pause ends with one.
type quick struct{ backing.Device }

func (quick) Flush(context.Context) error { return nil }

// restless is a disk that is paused again and again until it is closed.
type restless struct {
	*layer.Pause
	stop func()
}

func newRestless(t testing.TB, d backing.Device) restless {
	p := layer.NewPause(quick{d})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			h, err := p.Pause(ctx, time.Minute)
			if err == nil {
				err = h.Resume()
			}
			if err != nil && ctx.Err() == nil {
				t.Errorf("pause: %v", err)
			}
		}
	}()
	return restless{p, func() { cancel(); <-done }}
}

func (r restless) Close() error {
	r.stop()
	return r.Pause.Close()
}

func TestPausingDisturbsNothing(t *testing.T) {
	conformOn(t, bases[:2], 0, func(t testing.TB, d backing.Device) backing.Device { return newRestless(t, d) })
}

// slow lets requests in and keeps them until the gate is open.
type slow struct {
	backing.Device
	gate    chan struct{}
	flushes int
}

func (s *slow) WriteAt(ctx context.Context, p []byte, off int64, f backing.Flags) error {
	<-s.gate
	return s.Device.WriteAt(ctx, p, off, f)
}

func (s *slow) Flush(context.Context) error {
	s.flushes++
	return nil
}

// Map names zeroes, under a lease.
func (s *slow) Map(_ engine.Op, _, n int64, m *backing.Mapping) error {
	m.Runs[0], m.N, m.Lease = backing.Run{Len: n}, 1, nil
	return nil
}

func TestPauseWaitsForRequestsAndLeasesThenFlushes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &slow{Device: mem.New(1000, nil), gate: make(chan struct{})}
		p := layer.NewPause(s)
		written := make(chan error, 1)
		go func() { written <- p.WriteAt(t.Context(), make([]byte, 10), 0, 0) }()
		var m backing.Mapping
		if err := p.Map(engine.OpRead, 0, 10, &m); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		paused := make(chan *layer.Hold, 1)
		go func() { paused <- must(p.Pause(t.Context(), time.Minute)) }()
		synctest.Wait()
		if n := p.InFlight(); n != 2 || len(paused) != 0 || s.flushes != 0 {
			t.Fatalf("with a write and a lease open: got %d in flight, %d flushes, paused is %v", n, s.flushes, len(paused) != 0)
		}
		close(s.gate)
		synctest.Wait()
		if len(paused) != 0 || s.flushes != 0 {
			t.Fatal("the pause did not wait for the lease")
		}
		m.Release()
		synctest.Wait()
		if len(paused) != 1 || s.flushes != 1 || <-written != nil {
			t.Fatalf("with nothing in flight: got %d flushes, paused is %v", s.flushes, len(paused) != 0)
		}
		if err := (<-paused).Resume(); err != nil {
			t.Errorf("resume: %v", err)
		}
	})
}

func TestPausedDiskHoldsEveryRequest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := layer.NewPause(&growing{Device: mem.New(1000, nil)})
		h := must(p.Pause(t.Context(), time.Minute))
		var m backing.Mapping
		isKind(t, "map", p.Map(engine.OpRead, 0, 10, &m), backing.ErrNotMappable)
		b := make([]byte, 10)
		all := map[string]func(context.Context) error{
			"read":   func(ctx context.Context) error { return p.ReadAt(ctx, b, 0) },
			"write":  func(ctx context.Context) error { return p.WriteAt(ctx, make([]byte, 10), 20, 0) },
			"zero":   func(ctx context.Context) error { return p.Zero(ctx, 0, 10, 0) },
			"trim":   func(ctx context.Context) error { return p.Trim(ctx, 0, 10, 0) },
			"flush":  p.Flush,
			"cache":  func(ctx context.Context) error { return p.Cache(ctx, 0, 10) },
			"resize": func(ctx context.Context) error { return p.Resize(ctx, 2000) },
			"extents": func(ctx context.Context) error {
				return p.Extents(ctx, 0, 10, 0, func(backing.Extent) bool { return true })
			},
			"describe": func(ctx context.Context) error {
				return p.Describe(ctx, "x", 0, 10, 0, func(backing.Status) bool { return true })
			},
		}
		patient, impatient := make(chan error, len(all)), make(chan error, len(all))
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		for _, do := range all {
			go func() { patient <- do(t.Context()) }()
			go func() { impatient <- do(ctx) }()
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if len(patient) != 0 || len(impatient) != len(all) {
			t.Fatalf("paused: %d requests ended, and %d of those with a deadline, want 0 and %d", len(patient), len(impatient), len(all))
		}
		for range all {
			if err := <-impatient; !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("request with a deadline: got %v, want %v", err, context.DeadlineExceeded)
			}
		}
		if err := h.Resume(); err != nil || p.Paused() {
			t.Fatalf("resume: %v, paused is %v", err, p.Paused())
		}
		for range all {
			if err := <-patient; err != nil {
				t.Errorf("request after resume: %v", err)
			}
		}
		if n := p.InFlight(); n != 0 {
			t.Errorf("in flight: got %d, want 0", n)
		}
	})
}

// looking is a context that notes when it is asked whether it has ended.
type looking struct {
	context.Context
	note func()
}

func (l looking) Err() error {
	l.note()
	return l.Context.Err()
}

// TestThoseThatWaitForAPauseEnterByOrderOfArrival: what one client has asked for, and
// then left, does not go after what another did later.
func TestThoseThatWaitForAPauseEnterByOrderOfArrival(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := layer.NewPause(mem.New(1000, nil))
		h := must(p.Pause(t.Context(), time.Minute))
		const requests = 50
		let := make(chan int, requests) // in, while nobody else may be
		errs := make(chan error, requests)
		for i := range requests {
			ctx := looking{t.Context(), func() { let <- i }}
			go func() { errs <- p.WriteAt(ctx, make([]byte, 1), int64(i), 0) }()
			synctest.Wait()
		}
		if err := h.Resume(); err != nil {
			t.Fatal(err)
		}
		for want := range requests {
			if err := <-errs; err != nil {
				t.Errorf("write: %v", err)
			}
			select {
			case got := <-let:
				if got != want {
					t.Errorf("let in: got request %d, want %d", got, want)
				}
			default:
				t.Fatal("a request was let in beside others")
			}
		}
	})
}

// TestWhoComesAsAPauseEndsEntersAfterThoseThatWaited, also one that would map; and a
// pause that begins then holds those that have not entered.
func TestWhoComesAsAPauseEndsEntersAfterThoseThatWaited(t *testing.T) {
	for name, again := range map[string]bool{"running": false, "paused again": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := &slow{Device: mem.New(1000, nil), gate: make(chan struct{})}
				close(s.gate)
				p := layer.NewPause(s)
				const requests = 10
				entered := make(chan int, 4*requests) // while nobody else may
				errs, after := make(chan error, requests+1), make(chan int, 1)
				var m backing.Mapping
				var second *layer.Hold
				ended := make(chan struct{})
				meanwhile := sync.OnceFunc(func() {
					defer close(ended)
					isKind(t, "map", p.Map(engine.OpWrite, 0, 10, &m), backing.ErrNotMappable)
					go func() {
						errs <- p.WriteAt(t.Context(), make([]byte, 1), 0, 0)
						after <- len(entered)
					}()
					synctest.Wait()
					if again {
						second = must(p.Begin(time.Minute))
					}
				})
				first := must(p.Pause(t.Context(), time.Minute))
				for i := range requests {
					ctx := looking{t.Context(), func() {
						if entered <- i; i == 0 {
							meanwhile()
						}
					}}
					go func() { errs <- p.WriteAt(ctx, make([]byte, 1), 0, 0) }()
					synctest.Wait()
				}
				if err := first.Resume(); err != nil {
					t.Fatal(err)
				}
				<-ended
				synctest.Wait()
				if again {
					if err := second.Settle(t.Context()); err != nil || len(entered) != 1 {
						t.Fatalf("paused again: %v, with %d entered, want 1", err, len(entered))
					}
					if err := second.Resume(); err != nil {
						t.Fatal(err)
					}
				}
				for range requests + 1 {
					if err := <-errs; err != nil {
						t.Errorf("write: %v", err)
					}
				}
				if n := <-after; n != requests {
					t.Errorf("who came as the pause had ended entered after %d, want %d", n, requests)
				}
				for want := range requests {
					if got := <-entered; got != want {
						t.Errorf("entered: got request %d, want %d", got, want)
					}
				}
				if err := p.Map(engine.OpWrite, 0, 10, &m); err != nil {
					t.Errorf("map afterwards: %v", err)
				}
				m.Release()
				if n := p.InFlight(); n != 0 {
					t.Errorf("in flight: got %d, want 0", n)
				}
			})
		})
	}
}

// TestWhoLeavesAPauseHoldsUpNobodyBehind, and is not let in.
func TestWhoLeavesAPauseHoldsUpNobodyBehind(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := layer.NewPause(quick{mem.New(1000, nil)})
		h := must(p.Begin(time.Minute))
		ctx, leave := context.WithCancel(t.Context())
		gone, stays := make(chan error, 1), make(chan error, 1)
		go func() { gone <- p.Flush(ctx) }()
		synctest.Wait()
		go func() { stays <- p.Flush(t.Context()) }()
		synctest.Wait()
		leave()
		if err := h.Resume(); err != nil {
			t.Fatal(err)
		}
		if err := <-gone; !errors.Is(err, context.Canceled) {
			t.Errorf("request of who has left: got %v, want %v", err, context.Canceled)
		}
		if err := <-stays; err != nil {
			t.Errorf("request behind it: %v", err)
		}
	})
}

func TestPauseEndsByItself(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := layer.NewPause(mem.New(1000, nil))
		begin := time.Now()
		h := must(p.Pause(t.Context(), 3*time.Second))
		if err := p.WriteAt(t.Context(), make([]byte, 1), 0, 0); err != nil {
			t.Fatal(err)
		}
		if d := time.Since(begin); d != 3*time.Second {
			t.Errorf("a request went on after %v, want 3s", d)
		}
		<-h.Ended()
		next := must(p.Pause(t.Context(), time.Minute))
		if err := h.Resume(); !errors.Is(err, layer.ErrResumed) || !p.Paused() {
			t.Errorf("resume of an earlier pause: got %v, paused is %v, want %v and a later pause untouched", err, p.Paused(), layer.ErrResumed)
		}
		if err := next.Resume(); err != nil {
			t.Error(err)
		}
	})
}

func TestPauseThatCannotBeLetsTheDiskGoOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &slow{Device: mem.New(1000, nil), gate: make(chan struct{})}
		p := layer.NewPause(s)
		go func() { _ = p.WriteAt(t.Context(), make([]byte, 1), 0, 0) }()
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := p.Pause(ctx, time.Minute); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("pause with a request stuck: got %v, want %v", err, context.DeadlineExceeded)
		}
		if _, err := p.Pause(t.Context(), time.Second); !errors.Is(err, layer.ErrResumed) {
			t.Errorf("pause shorter than a request: got %v, want %v", err, layer.ErrResumed)
		}
		close(s.gate)
		lost := errors.New("lost")
		q := layer.NewPause(&recorder{Device: mem.New(1000, nil), err: lost})
		if _, err := q.Pause(t.Context(), time.Second); !errors.Is(err, lost) {
			t.Errorf("pause with a failing flush: got %v, want %v", err, lost)
		}
		for _, l := range []*layer.Pause{p, q} {
			if l.Paused() {
				t.Error("the disk is still paused")
			}
		}
		for _, limit := range []time.Duration{0, -1, limits.PauseLongest + 1} {
			_, err := p.Pause(t.Context(), limit)
			isKind(t, "pause of a wrong length", err, backing.ErrInvalid)
		}
		h := must(p.Pause(t.Context(), time.Minute))
		_, err := p.Pause(t.Context(), time.Minute)
		isKind(t, "pause within a pause", err, backing.ErrInvalid)
		if err := p.Close(); err != nil || p.Paused() {
			t.Errorf("close: %v, paused is %v", err, p.Paused())
		}
		<-h.Ended()
	})
}

// held keeps a flush until the gate is open, and notes whether it was closed before.
type held struct {
	backing.Device
	gate                chan struct{}
	closed, closedEarly bool
}

func (h *held) Flush(context.Context) error {
	<-h.gate
	h.closedEarly = h.closed
	return nil
}

func (h *held) Close() error {
	h.closed = true
	return h.Device.Close()
}

func TestCloseWaitsForTheFlushOfAPause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &held{Device: mem.New(1000, nil), gate: make(chan struct{})}
		p := layer.NewPause(s)
		h := must(p.Begin(time.Minute))
		settled, closed := make(chan error, 1), make(chan error, 1)
		go func() { settled <- h.Settle(t.Context()) }()
		synctest.Wait()
		go func() { closed <- p.Close() }()
		synctest.Wait()
		close(s.gate)
		if err := <-settled; !errors.Is(err, layer.ErrResumed) {
			t.Errorf("pause of a disk that is closed: got %v, want %v", err, layer.ErrResumed)
		}
		if err := <-closed; err != nil || s.closedEarly {
			t.Errorf("close: %v, during the flush: %t", err, s.closedEarly)
		}
		if err := h.Settle(t.Context()); !errors.Is(err, layer.ErrResumed) {
			t.Errorf("settle after the end: got %v, want %v", err, layer.ErrResumed)
		}
	})
}

func TestPauseMapsWithoutAllocating(t *testing.T) {
	p := closing(t, layer.NewPause(newRaw(t, "pool", 1<<20, 0)))
	if n := mapAllocates(t, p); n != 0 {
		t.Errorf("map: got %v allocations, want none", n)
	}
}

// TestPauseTellsItsBeginAndItsEnd, whatever ends it: who resumes, its limit, a flush
// that fails, or the end of the disk.
func TestPauseTellsItsBeginAndItsEnd(t *testing.T) {
	lost := errors.New("lost")
	for name, tt := range map[string]struct {
		flush error
		end   func(p *layer.Pause, h *layer.Hold) error
		want  error
	}{
		"resumed": {end: func(_ *layer.Pause, h *layer.Hold) error { return h.Resume() }},
		"limit":   {end: func(_ *layer.Pause, h *layer.Hold) error { <-h.Ended(); synctest.Wait(); return nil }},
		"flush":   {flush: lost, end: func(_ *layer.Pause, h *layer.Hold) error { return h.Settle(t.Context()) }, want: lost},
		"closed":  {end: func(p *layer.Pause, _ *layer.Hold) error { return p.Close() }},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := layer.NewPause(&recorder{Device: mem.New(1000, nil), err: tt.flush})
				told := make(chan bool, 10)
				p.Changed = func() { told <- p.Paused() }
				h, err := p.Begin(time.Second)
				if err != nil {
					t.Fatal(err)
				}
				if err := tt.end(p, h); !errors.Is(err, tt.want) {
					t.Errorf("got %v, want %v", err, tt.want)
				}
				if n := len(told); n != 2 || !<-told || <-told {
					t.Errorf("told %d times, want first that it is paused, then that it is not", n)
				}
			})
		})
	}
}
