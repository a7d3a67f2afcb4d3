package nbdtest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

const (
	// patience detects hangs. No check takes a noticeable part of it.
	patience = 20 * time.Second
	// deviantPatience is the same for a check that is expected to fail.
	deviantPatience = 250 * time.Millisecond
)

// check is one claim about a server.
type check struct {
	id, claim string
	// negative checks break a rule on purpose.
	negative bool
	// slow checks wait for the server's time limits.
	slow bool
	run  func(*script)
}

// script is one run of a check. Its methods end the run on failure.
type script struct {
	s        *Server
	ctx      context.Context
	patience time.Duration
	closers  []func()
}

// failure ends a script from any depth.
type failure struct{ text string }

func (c *script) failf(format string, args ...any) {
	panic(failure{fmt.Sprintf(format, args...)})
}

// attempt runs f and returns how it failed, or nil. All connections of the
// script are closed afterwards.
func (c *script) attempt(f func(*script)) (err error) {
	defer func() {
		for _, f := range slices.Backward(c.closers) {
			f()
		}
		switch r := recover().(type) {
		case nil:
		case failure:
			err = errors.New(r.text)
		default:
			panic(r)
		}
	}()
	f(c)
	return nil
}

// together runs f(0..n-1), each in a goroutine with a script of its own, and
// fails with the first failure.
func (c *script) together(n int, f func(c *script, i int)) {
	errs := make(chan error, n)
	for i := range n {
		go func() {
			sub := &script{s: c.s, ctx: c.ctx, patience: c.patience}
			errs <- sub.attempt(func(c *script) { f(c, i) })
		}()
	}
	var all []error
	for range n {
		all = append(all, <-errs)
	}
	if err := errors.Join(all...); err != nil {
		c.failf("%v", err)
	}
}

// catalogue is every check that applies to s, in a fixed order.
func catalogue(s *Server) []check {
	var l []check
	for _, f := range []func(*Server) []check{
		greetingChecks, optionChecks, nameChecks, infoChecks, metaChecks, extendedChecks,
		tlsChecks, requestChecks, errorChecks, dataChecks, zeroChecks, extentChecks,
		flowChecks, closeChecks, modelChecks, largeChecks, slowChecks,
	} {
		l = append(l, f(s)...)
	}
	return l
}

// matches reports whether a key of Deviations stands for the check.
func matches(key, id string) bool {
	if prefix, ok := strings.CutSuffix(key, "*"); ok {
		return strings.HasPrefix(id, prefix)
	}
	base, _, _ := strings.Cut(id, "@")
	return key == id || key == base
}

// deviation returns the reason why s is known not to pass the check.
func (s *Server) deviation(id string) (reason string, ok bool) {
	for key, reason := range s.Deviations {
		if matches(key, id) {
			return reason, true
		}
	}
	return "", false
}

// verdict turns the outcome of a check into the text of a test failure, or "".
func verdict(err error, deviates bool, reason string) string {
	switch {
	case err != nil && !deviates:
		return err.Error()
	case err == nil && deviates && !strings.HasPrefix(reason, Races):
		return fmt.Sprintf("passes, but is listed as a deviation (%s): take it off the list", reason)
	}
	return ""
}

// stale returns the listed deviations that name no check, sorted.
func stale(s *Server, l []check) []string {
	var out []string
	for id := range s.Deviations {
		if !slices.ContainsFunc(l, func(ck check) bool { return matches(id, ck.id) }) {
			out = append(out, id)
		}
	}
	slices.Sort(out)
	return out
}

// Conformance runs every check that applies to s, one subtest each, but for those
// of TimeLimits. A second client stays connected all the time; that it keeps working
// is part of every check.
func Conformance(t *testing.T, s Server) {
	t.Helper()
	all := catalogue(&s)
	for _, id := range stale(&s, all) {
		t.Errorf("deviation %q names no check that applies to this server", id)
	}
	s.witnessed(t, func(w *witness) {
		for _, ck := range all {
			if ck.slow {
				continue
			}
			t.Run(ck.id+" "+ck.claim, func(t *testing.T) { s.judge(t, w, ck, s.outcome(t.Context(), ck)) })
			if w.broken() {
				t.Fatalf("client on another connection has lost it after %s: the rest of the suite makes no sense", ck.id)
			}
		}
	})
}

// TimeLimits runs the checks that wait for the time limits of the server, s.Handshake
// and s.Stall, as Conformance runs the others. They run side by side, whatever
// -parallel says.
func TimeLimits(t *testing.T, s Server) {
	t.Helper()
	slow := slices.DeleteFunc(catalogue(&s), func(ck check) bool { return !ck.slow })
	s.witnessed(t, func(w *witness) {
		outcomes := make([]chan error, len(slow))
		for i, ck := range slow {
			outcomes[i] = make(chan error, 1)
			go func() { outcomes[i] <- s.outcome(t.Context(), ck) }()
		}
		for i, ck := range slow {
			err := <-outcomes[i]
			t.Run(ck.id+" "+ck.claim, func(t *testing.T) { s.judge(t, w, ck, err) })
		}
	})
	if s.Invariants != nil {
		s.Invariants(t)
	}
}

// witnessed runs checks of s while a client stays connected.
func (s *Server) witnessed(t *testing.T, checks func(w *witness)) {
	t.Helper()
	if s.Size < MinSize {
		t.Fatalf("export of %d bytes, want at least %d", s.Size, int64(MinSize))
	}
	if s.Invariants != nil {
		s.Invariants(t)
	}
	w := startWitness(t.Context(), t, s)
	checks(w)
	if err := w.stop(); err != nil {
		t.Errorf("client on another connection, at the end: %v", err)
	}
}

// outcome runs a check and returns how it failed, or nil.
func (s *Server) outcome(ctx context.Context, ck check) error {
	c := &script{s: s, ctx: ctx, patience: patience}
	if _, deviates := s.deviation(ck.id); deviates && !ck.slow {
		c.patience = deviantPatience
	}
	return c.attempt(ck.run)
}

// judge reports the outcome of a check and looks after the rest of the world.
func (s *Server) judge(t *testing.T, w *witness, ck check, err error) {
	t.Helper()
	reason, deviates := s.deviation(ck.id)
	if text := verdict(err, deviates, reason); text != "" {
		t.Error(text)
	} else if err != nil {
		t.Logf("deviates, %s: %v", reason, err)
	}
	if err := w.beat(); err != nil {
		t.Errorf("client on another connection, after the check: %v", err)
	}
	if s.Invariants != nil && ck.negative && !ck.slow {
		s.Invariants(t)
	}
}

// perForm makes one check per form of replies.
func perForm(s *Server, ck check, run func(*script, form)) []check {
	var l []check
	for _, f := range s.forms() {
		one := ck
		one.id += "@" + string(f)
		one.run = func(c *script) { run(c, f) }
		l = append(l, one)
	}
	return l
}
