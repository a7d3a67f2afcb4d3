package main

import (
	"bytes"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// TestMedianIsBoundedByRanks against the tables of the sign test.
func TestMedianIsBoundedByRanks(t *testing.T) {
	for n, want := range map[int]int{1: 0, 5: 0, 6: 1, 8: 1, 9: 2, 20: 6, 40: 14, 60: 22, 100: 40} {
		if got := outermost(n); got != want {
			t.Errorf("%d ratios: got rank %d, want %d", n, got, want)
		}
	}
	if s := spreadOf([]float64{6, 2, 3, 5, 4, 1}); s != (spread{Rounds: 6, LowQuarter: 2, HighQuarter: 5, Low: 1, High: 6}) {
		t.Errorf("spread of 1 to 6: %+v", s)
	}
	if s := spreadOf([]float64{1, 2}); s.Low != 0 || s.High != 0 {
		t.Errorf("two ratios have bounds %+v", s)
	}
	if s := spreadOf(nil); s != (spread{}) {
		t.Errorf("spread of nothing: %+v", s)
	}
}

// TestBoundsHoldWhatTheyPromise: of rounds that are 5 % off each, of which some
// are off by much more, the median is within its bounds in 95 of 100 runs, and
// these are less than 3 % apart.
func TestBoundsHoldWhatTheyPromise(t *testing.T) {
	const seed, runs, rounds, more = 1, 1000, 400, 1.02
	random := rand.New(rand.NewPCG(seed, seed))
	measured := func() float64 {
		if random.IntN(10) == 0 {
			return 2
		}
		return 1 + 0.05*random.NormFloat64()
	}
	within := 0
	var widths []float64
	for range runs {
		var r []float64
		for range rounds {
			r = append(r, more*measured()/measured())
		}
		s := spreadOf(r)
		widths = append(widths, s.High-s.Low)
		if s.Low <= more && more <= s.High {
			within++
		}
	}
	if within < 950-20 || median(widths) > 0.03 {
		t.Errorf("seed %d: %d of %d runs within bounds that are %.3f apart; want about 950 and 0.03", seed, within, runs, median(widths))
	}
}

// TestPartsAreMeasuredInPairs of servers that run at once: each has its turn to
// be the first.
func TestPartsAreMeasuredInPairs(t *testing.T) {
	testenv.Require(t, "cc", "taskset")
	ctx := testenv.Context(t)
	b, err := newBench(ctx, testenv.TempDir(t), 8<<20, 1)
	if err != nil {
		t.Fatal(err)
	}
	c := cases[indexCase("c-q32")]
	c.parts = 2
	peers, err := parsePeers(c.peers)
	if err != nil {
		t.Fatal(err)
	}
	samples, err := b.round(ctx, c, peers, 1)
	if err != nil || len(samples) != 4 {
		t.Fatalf("%d samples, %v; want 4", len(samples), err)
	}
	for i, want := range []struct{ peer, round int }{{0, 2}, {1, 2}, {1, 3}, {0, 3}} {
		if s := samples[i]; s.Peer != peers[want.peer].name || s.Round != want.round || s.PerIO <= 0 {
			t.Errorf("sample %d: got %+v, want one of %q in round %d", i, s, peers[want.peer].name, want.round)
		}
	}
}

// TestRoundWithoutARequestIsNotCompared, on either side.
func TestRoundWithoutARequestIsNotCompared(t *testing.T) {
	samples := []sample{
		{Case: "rr4k-q1", Peer: "base", Round: 0}, {Case: "rr4k-q1", Peer: "other", Round: 0, PerIO: 2},
		{Case: "rr4k-q1", Peer: "base", Round: 1, PerIO: 2}, {Case: "rr4k-q1", Peer: "other", Round: 1},
		{Case: "rr4k-q1", Peer: "base", Round: 2, PerIO: 2}, {Case: "rr4k-q1", Peer: "other", Round: 2, PerIO: 3},
	}
	if got := ratios(samples, "rr4k-q1", "other", "base"); len(got) != 1 || got[0] != 1.5 {
		t.Errorf("ratios: got %v, want 1.5 of round 2", got)
	}
}

func TestSpreadIsOfCasesOfManyRounds(t *testing.T) {
	var samples []sample
	c := cases[indexCase("c-q32")]
	peers, err := parsePeers(c.peers)
	if err != nil || len(peers) != 2 {
		t.Fatalf("peers %+v, %v", peers, err)
	}
	for round := range 9 {
		samples = append(samples,
			sample{Case: c.name, Peer: peers[0].name, Round: round, PerIO: 100},
			sample{Case: c.name, Peer: peers[1].name, Round: round, PerIO: 97 + float64(round)},
			sample{Case: "rr4k-q32", Peer: "vmdiskd", Round: round, PerIO: 3})
	}
	rows := summarize(samples, "vmdiskd")
	for i, want := range []spread{{}, {Rounds: 9, LowQuarter: 0.99, HighQuarter: 1.03, Low: 0.98, High: 1.04}, {}} {
		if got := rows[i].Spread; got != want {
			t.Errorf("%s, %s: got %+v, want %+v", rows[i].Case, rows[i].Peer, got, want)
		}
	}
	var out bytes.Buffer
	writeTable(&out, rows)
	if want := "|      9 |    +1.0 % |   -1.0 % to +3.0 % |    -2.0 % to +4.0 % |"; !strings.Contains(out.String(), want) {
		t.Errorf("no %q in\n%s", want, out.String())
	}
}
