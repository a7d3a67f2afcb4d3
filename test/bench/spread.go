package main

import (
	"fmt"
	"io"
	"math"
	"slices"
)

// missed is how often, at most, the middle of all ratios that there could be
// lies outside Low and High of a spread.
const missed = 0.05

// spread tells how far the ratios of single rounds lie apart, and how well their
// median is known by that. The zero value is of no ratios.
type spread struct {
	Rounds                  int
	LowQuarter, HighQuarter float64 // half of the ratios lie between them
	Low, High               float64 // and the middle, but for missed; 0 and 0: too few ratios
}

// spreadOf assumes nothing of the distribution: each ratio lies above the
// middle or below it like a thrown coin.
func spreadOf(ratios []float64) (s spread) {
	n := len(ratios)
	if n == 0 {
		return s
	}
	sorted := slices.Sorted(slices.Values(ratios))
	s.Rounds, s.LowQuarter, s.HighQuarter = n, sorted[n/4], sorted[n-1-n/4]
	if k := outermost(n); k > 0 {
		s.Low, s.High = sorted[k-1], sorted[n-k]
	}
	return s
}

// outermost returns the greatest k for which fewer than k heads of n throws
// are no likelier than half of missed.
func outermost(n int) (k int) {
	term := math.Pow(0.5, float64(n)) // k heads
	for sum := term; sum <= missed/2; sum += term {
		k++
		term *= float64(n-k+1) / float64(k)
	}
	return k
}

// writeSpreads says of the cases of many short rounds what their ratio is worth.
func writeSpreads(w io.Writer, rows []row, width int) {
	t := sheet{w: w, peer: width, columns: []column{{"rounds", 6}, {"CPU more", 9}, {"half of the rounds", 18}, {"median, 95 % sure", 19}}}
	for _, r := range rows {
		if r.Spread.Rounds == 0 {
			continue
		}
		s, sure := r.Spread, "-"
		if s.Low > 0 {
			sure = percents(s.Low, s.High)
		}
		t.add(r, fmt.Sprint(s.Rounds), percent(r.Ratio), percents(s.LowQuarter, s.HighQuarter), sure)
	}
}

// percent is how much more than 1 a ratio is.
func percent(ratio float64) string { return fmt.Sprintf("%+.1f %%", 100*(ratio-1)) }

func percents(low, high float64) string { return percent(low) + " to " + percent(high) }
