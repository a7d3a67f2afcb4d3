package storetest

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
)

func sectors(fill ...byte) []byte {
	var p []byte
	for _, b := range fill {
		p = append(p, bytes.Repeat([]byte{b}, pageSize)...)
	}
	return p
}

// summary is the first byte of each sector.
func summary(m *Mem) string {
	var s []byte
	for c := range slices.Chunk(m.Contents(), pageSize) {
		s = append(s, c[0])
	}
	return string(s)
}

// outcomes are all files that a power cut can leave, sorted.
func outcomes(c *Crash) []string {
	var list []string
	for _, m := range c.Crashes(rand.New(rand.NewPCG(1, 1)), 1<<15) {
		list = append(list, summary(m))
	}
	slices.Sort(list)
	return slices.Compact(list)
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestCrashKeepsAnyPartOfWhatIsNotSynced gives all outcomes of short logs.
func TestCrashKeepsAnyPartOfWhatIsNotSynced(t *testing.T) {
	type calls = func(c *Crash) error
	ctx := context.Background()
	write := func(at int64, fill string, durable bool) calls {
		return func(c *Crash) error { return c.WriteAt(ctx, sectors([]byte(fill)...), at*pageSize, durable) }
	}
	punch := func(at, n int64) calls {
		return func(c *Crash) error { return c.Punch(ctx, at*pageSize, n*pageSize) }
	}
	zero := func(at, n int64) calls {
		return func(c *Crash) error { return c.Zero(ctx, at*pageSize, n*pageSize) }
	}
	cut := func(at int64) calls { return func(c *Crash) error { return c.Truncate(at * pageSize) } }
	sync := func(c *Crash) error { return c.Sync(ctx) }
	for _, tt := range []struct {
		name, start string
		calls       []calls
		want        []string
	}{
		{"nothing", "abc", nil, []string{"abc"}},
		{"one write is torn", "abc", []calls{write(0, "XY", false)}, []string{"XYc", "Xbc", "aYc", "abc"}},
		{"older, newer or neither", "a", []calls{write(0, "X", false), write(0, "Y", false)}, []string{"X", "Y", "a"}},
		{"order does not hold", "ab", []calls{write(0, "X", false), write(1, "Y", false)}, []string{"XY", "Xb", "aY", "ab"}},
		{"synced", "ab", []calls{write(0, "X", false), sync, write(1, "Y", false)}, []string{"XY", "Xb"}},
		{"durable", "ab", []calls{write(1, "X", false), write(0, "Y", true)}, []string{"YX", "Yb"}},
		{"durable over another", "ab", []calls{write(0, "XY", false), write(0, "Z", true)}, []string{"ZY", "Zb"}},
		{"punch", "ab", []calls{punch(0, 2)}, []string{"\x00\x00", "\x00b", "a\x00", "ab"}},
		{"write after punch", "a", []calls{punch(0, 1), write(0, "X", false)}, []string{"\x00", "X", "a"}},
		{"punch after write", "a", []calls{write(0, "X", false), zero(0, 1)}, []string{"\x00", "X", "a"}},
		{"growth comes with the sector", "", []calls{write(1, "X", false)}, []string{"", "\x00X"}},
		{"growth by truncate", "a", []calls{cut(2), write(1, "X", false)}, []string{"a", "a\x00", "aX"}},
		{"shrink", "abc", []calls{cut(1), write(0, "X", false)}, []string{"X", "Xbc", "a", "abc"}},
		{"behind a shrink", "abc", []calls{cut(1), write(2, "X", false)}, []string{"a", "a\x00X", "abc"}},
		{"ends move in order", "abc", []calls{cut(1), cut(3)}, []string{"a", "a\x00\x00", "abc"}},
		{"written before a shrink", "ab", []calls{write(1, "X", false), cut(1)}, []string{"a", "aX", "ab"}},
		{"durable after a shrink", "abc", []calls{write(1, "X", false), cut(1), write(0, "Y", true)}, []string{"Y"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := NewCrash(New(sectors([]byte(tt.start)...)))
			for _, call := range tt.calls {
				must(t, call(c))
			}
			if got := outcomes(c); !slices.Equal(got, tt.want) {
				t.Errorf("outcomes: got %q, want %q", got, tt.want)
			}
		})
	}
}

// TestCrashStatesAgreeWithHistory runs random calls; in any state each sector
// must be one that there was since the last Sync.
func TestCrashStatesAgreeWithHistory(t *testing.T) {
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 0))
	ctx := context.Background()
	const size = 40 * pageSize
	c := NewCrash(New(bytes.Repeat([]byte{1}, size)))
	var past [][]byte // contents since the last Sync
	past = append(past, c.Contents())
	for i := range 600 {
		off, n := r.Int64N(size), r.Int64N(4*pageSize)
		n = min(n, size-off)
		var err error
		switch r.IntN(8) {
		case 0:
			err = c.Punch(ctx, off, n)
		case 1:
			err = c.Zero(ctx, off, n)
		case 2:
			err = c.Sync(ctx)
			past = nil
		default:
			err = c.WriteAt(ctx, bytes.Repeat([]byte{byte(i)}, int(n)), off, false)
		}
		must(t, err)
		past = append(past, c.Contents())
		if got := c.State(func(Unit) bool { return true }).Contents(); !bytes.Equal(got, past[len(past)-1]) {
			t.Fatalf("seed %d: state that keeps all differs from the file after call %d", seed, i)
		}
		if got := c.State(nil).Contents(); !bytes.Equal(got, past[0]) {
			t.Fatalf("seed %d: state that keeps nothing differs from what was synced after call %d", seed, i)
		}
		for name, m := range c.Crashes(r, 8) {
			for at := int64(0); at < size; at += pageSize {
				got := make([]byte, pageSize)
				if _, err := m.ReadAt(ctx, got, at); err != nil {
					t.Fatal(err)
				}
				if !slices.ContainsFunc(past, func(p []byte) bool { return bytes.Equal(p[at:at+pageSize], got) }) {
					t.Fatalf("seed %d, call %d, state %s: the sector at %d never was like that", seed, i, name, at)
				}
			}
		}
	}
}

func TestCrashStatesAreApart(t *testing.T) {
	ctx := context.Background()
	c := NewCrash(New(sectors('a', 'b')))
	must(t, c.WriteAt(ctx, []byte("XY"), 511, false))
	m := c.State(nil)
	must(t, m.WriteAt(ctx, []byte("Z"), 1, false))
	must(t, m.Truncate(600))
	if got := outcomes(c); !slices.Equal(got, []string{"aY", "ab"}) {
		t.Errorf("outcomes: got %q, want those without what a state was used for", got)
	}
	if p := c.Contents(); p[511] != 'X' || p[512] != 'Y' || p[1] != 'a' || len(p) != 1024 {
		t.Errorf("file: got %q, want it untouched", p[508:514])
	}
}

func TestCrashAfterFailedSyncKeepsItsLog(t *testing.T) {
	ctx, boom := context.Background(), errors.New("boom")
	c := NewCrash(New(sectors('a')))
	c.FailOp(Write, 1, boom)
	if err := c.WriteAt(ctx, sectors('W'), 0, false); err != boom {
		t.Errorf("write: got %v, want boom", err)
	}
	must(t, c.WriteAt(ctx, sectors('X'), 0, false))
	c.FailOp(Sync, 1, boom)
	if err := c.Sync(ctx); err != boom {
		t.Errorf("sync: got %v, want boom", err)
	}
	if err := c.WriteAt(ctx, sectors('Y'), 0, false); !errors.Is(err, backing.ErrPoisoned) {
		t.Errorf("write after: got %v, want %v", err, backing.ErrPoisoned)
	}
	if got := outcomes(c); !slices.Equal(got, []string{"X", "a"}) {
		t.Errorf("outcomes: got %q, want X and a", got)
	}
}

func TestCrashLogIsBounded(t *testing.T) {
	ctx, p := context.Background(), make([]byte, 1<<20)
	c := NewCrash(New(nil))
	for i := range 2*maxUnits*pageSize/len(p) + 3 {
		for k := range p {
			p[k] = byte(i + 1)
		}
		must(t, c.WriteAt(ctx, p, int64(i%4)<<20, false))
	}
	if got := len(c.Log()); got > maxUnits || got < maxUnits/4 {
		t.Errorf("log: got %d units, want at most %d", got, maxUnits)
	}
	if got := c.State(nil).Contents(); len(got) != 4<<20 || got[0] == 0 {
		t.Errorf("what is durable has %d bytes, want what was dropped from the log", len(got))
	}
	states := 0
	for range c.Crashes(rand.New(rand.NewPCG(1, 1)), 20) {
		states++
	}
	if states != 20 {
		t.Errorf("%d states, want 20", states)
	}
}

func TestCrashHookSeesCallsBeforeAndAfter(t *testing.T) {
	ctx := context.Background()
	c := NewCrash(New(sectors('a')))
	var got []string
	var calls []Call
	c.SetHook(func(x Call) {
		got = append(got, summary(c.State(nil)))
		calls = append(calls, x)
	})
	must(t, c.WriteAt(ctx, sectors('X'), 0, false))
	if _, err := c.ReadAt(ctx, make([]byte, 3), 7); err != nil {
		t.Fatal(err)
	}
	must(t, c.Sync(ctx))
	if !slices.Equal(got, []string{"a", "a", "a", "a", "X"}) {
		t.Errorf("durable contents: got %q, want a until the end of the sync", got)
	}
	want := []Call{{Op: Write, Len: 512}, {Op: Write, Len: 512, Done: true}, {Op: Read, Off: 7, Len: 3}, {Op: Sync}, {Op: Sync, Done: true}}
	if !slices.Equal(calls, want) {
		t.Errorf("calls: got %+v, want %+v", calls, want)
	}
}

func TestCrashStateOfABlockDeviceIsOne(t *testing.T) {
	m := New(sectors('a'))
	m.SetFixed(true)
	c := NewCrash(m)
	if st := c.State(nil); !c.Fixed() || !st.Fixed() {
		t.Error("block device: a state is a regular file")
	}
}
