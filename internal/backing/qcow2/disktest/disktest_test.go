package disktest

import (
	"context"
	"errors"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/storetest"
)

func toyFormat(b bugs) Format { return Format{Open: openToy(b), Audit: auditToy} }

// episode runs one script on a toy, with power cuts if there shall be states.
func episode(b bugs, seed uint64, s Script, states int) (int, error) {
	ctx, rnd := context.Background(), rand.New(rand.NewPCG(seed, 1))
	disk := storetest.NewCrash(storetest.New(make([]byte, toyTable)))
	format := toyFormat(b)
	dev, err := format.Open(ctx, Files{Image: disk}, false)
	if err != nil {
		return 0, err
	}
	r := Run{Dev: dev, Oracle: NewOracle(make([]byte, toySize))}
	r.Reopen = func(ctx context.Context, old backing.Device) (backing.Device, error) {
		if err := old.Close(); err != nil {
			return nil, err
		}
		disk.Reopen()
		return format.Open(ctx, Files{Image: disk}, false)
	}
	cuts := PowerCuts{Format: format, Oracle: r.Oracle, Files: []*storetest.Crash{disk}, PerSync: 6}
	if states > 0 {
		cuts.Start(rnd, states)
	}
	err = r.Do(ctx, s)
	n, broken := cuts.Stop()
	return n, errors.Join(err, broken, r.Dev.Close())
}

var toyShape = Shape{Size: toySize, Cluster: 2048, Largest: 64 << 10, Ops: 60, Reopen: true}

func TestSoundDiskPasses(t *testing.T) {
	states := 0
	for range 30 {
		seed := rand.Uint64()
		script := toyShape.Random(rand.New(rand.NewPCG(seed, 0)))
		n, err := episode(bugs{}, seed, script, 60)
		if err != nil {
			t.Fatalf("seed %d: %v\n%s", seed, err, script)
		}
		states += n
	}
	if states < 500 {
		t.Errorf("%d states, want at least 500", states)
	}
}

// TestWrongDiskIsFound has one bug at a time: some script must find it.
func TestWrongDiskIsFound(t *testing.T) {
	for _, tt := range []struct {
		name   string
		bugs   bugs
		states int
	}{
		{"no barrier before the table", bugs{noBarrierA: true}, 100},
		{"no barrier after the table", bugs{noBarrierB: true}, 100},
		{"sectors are used again at once", bugs{reuseAtOnce: true}, 100},
		{"writes go to another place", bugs{misplaces: true}, 0},
		{"trims round outwards", bugs{trimsEdges: true}, 0},
		{"close loses what was not flushed", bugs{forgetsAtClose: true}, 0},
		{"extents lie", bugs{saysZero: true}, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for seed := range uint64(60) {
				script := toyShape.Random(rand.New(rand.NewPCG(seed, 0)))
				if _, err := episode(tt.bugs, seed, script, tt.states); err != nil {
					t.Logf("seed %d: %v", seed, err)
					return
				}
			}
			t.Error("no script has found it")
		})
	}
}

func TestShrinkKeepsWhatMatters(t *testing.T) {
	b := bugs{trimsEdges: true}
	for seed := range uint64(20) {
		script := toyShape.Random(rand.New(rand.NewPCG(seed, 0)))
		fails := func(s Script) bool { _, err := episode(b, seed, s, 0); return err != nil }
		if !fails(script) {
			continue
		}
		short := Shrink(script, fails)
		if !fails(short) || len(short) > 2 || !strings.Contains(short.String(), "trim") {
			t.Errorf("seed %d: of %d batches these are left:\n%s", seed, len(script), short)
		}
		return
	}
	t.Error("no script has failed")
}

// TestOracleKnowsWhatMayBeRead gives histories of one sector and all answers.
func TestOracleKnowsWhatMayBeRead(t *testing.T) {
	var o *Oracle
	write := func(v uint32) *Change { return o.Begin(0, Sector, v, false, false) }
	flush := func() { o.BeginFlush()() }
	for _, tt := range []struct {
		name        string
		do          func()
		live, crash string // versions, 0 for zeroes, i for what it was at first
	}{
		{"nothing", func() {}, "i", "i"},
		{"in flight", func() { write(1) }, "1i", "1i"},
		{"done", func() { o.End(write(1)) }, "1", "1i"},
		{"flushed", func() { o.End(write(1)); flush() }, "1", "1"},
		{"flush before its end", func() { c := write(1); flush(); o.End(c) }, "1", "1i"},
		{"flush began before its end", func() {
			c := write(1)
			done := o.BeginFlush()
			o.End(c)
			done()
		}, "1", "1i"},
		{"flush not done", func() { o.End(write(1)); o.BeginFlush() }, "1", "1i"},
		{"durable", func() { o.End(o.Begin(0, Sector, 1, false, true)) }, "1", "1"},
		{"one after the other", func() { o.End(write(1)); flush(); o.End(write(2)) }, "2", "12"},
		{"both at once", func() { a, b := write(1), write(2); o.End(a); o.End(b); flush() }, "12", "12"},
		{"failed", func() { o.End(write(1)); flush(); o.Fail(write(2)) }, "12", "12"},
		{"written after a failure", func() { o.Fail(write(1)); o.End(write(2)); flush() }, "2", "2"},
		{"refused", func() { o.Void(write(1)) }, "i", "i"},
		{"zeroed", func() { o.End(write(1)); o.End(o.Begin(0, Sector, 0, false, false)); flush() }, "0", "0"},
		{"trimmed", func() { o.End(write(1)); flush(); o.End(o.Begin(0, Sector, 0, true, false)); flush() }, "01", "01"},
		{"pruned", func() {
			for range 9 {
				o.End(write(1))
			}
			o.End(write(2))
			flush()
			o.End(write(3))
			o.Prune()
		}, "3", "23"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			first := make([]byte, Sector)
			first[0] = 'i'
			o = NewOracle(first)
			tt.do()
			for _, q := range []struct {
				at   Moment
				want string
			}{{o.Now(), tt.live}, {o.Crash(), tt.crash}} {
				for _, content := range "0123i" {
					p := make([]byte, Sector)
					if content == 'i' {
						p[0] = 'i'
					} else if content != '0' {
						Fill(p, 0, uint32(content-'0'))
					}
					if got := o.Verify(p, 0, q.at) == nil; got != strings.ContainsRune(q.want, content) {
						t.Errorf("%c at %+v: got %v, want one of %q", content, q.at, got, q.want)
					}
				}
			}
		})
	}
}

func TestOracleLooksAtEachByte(t *testing.T) {
	o := NewOracle(make([]byte, 4*Sector))
	o.End(o.Begin(100, 1000, 1, false, false))
	o.End(o.Begin(700, 5, 2, false, false))
	p := make([]byte, 4*Sector)
	Fill(p[100:1100], 100, 1)
	Fill(p[700:705], 700, 2)
	if err := o.Verify(p, 0, o.Now()); err != nil {
		t.Fatal(err)
	}
	for _, at := range []int{0, 99, 100, 699, 700, 704, 705, 1099, 1100, 2047} {
		p[at] ^= 1
		if o.Verify(p, 0, o.Now()) == nil || o.Verify(p[at:at+1], int64(at), o.Now()) == nil {
			t.Errorf("another byte at %d passes", at)
		}
		p[at] ^= 1
	}
	Fill(p[:Sector], 512, 1)
	if err := o.Verify(p, 0, o.Now()); err == nil || !strings.Contains(err.Error(), "sector 1 of version 1") {
		t.Errorf("sector of another place: %v, want it named", err)
	}
}

func TestResolveAsksForWhatWasSeen(t *testing.T) {
	o := NewOracle(make([]byte, Sector))
	a, b := o.Begin(0, Sector, 1, false, false), o.Begin(0, Sector, 2, false, false)
	o.End(a)
	o.End(b)
	one, two := make([]byte, Sector), make([]byte, Sector)
	Fill(one, 0, 1)
	Fill(two, 0, 2)
	if err := o.Resolve(one, 0); err != nil {
		t.Fatal(err)
	}
	if o.Verify(one, 0, o.Now()) != nil || o.Verify(two, 0, o.Now()) == nil {
		t.Error("after version 1 was seen, version 2 passes")
	}
	if err := o.Verify(two, 0, o.Crash()); err != nil {
		t.Errorf("after a power cut: %v", err)
	}
}
