package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// topFlags are the flags of top.
type topFlags struct {
	ctlFlags
	interval time.Duration
	once     bool
	sort     string
}

// load is what one export did between two looks, per second. A percentile is
// the upper end of its bucket: the request took less, and no less than half.
type load struct {
	Export     string  `json:"export"`
	Seconds    float64 `json:"seconds"`
	InFlight   int     `json:"in-flight"`
	IOPS       float64 `json:"iops"`
	ReadIOPS   float64 `json:"read-iops"`
	WriteIOPS  float64 `json:"write-iops"`
	ReadBytes  float64 `json:"read-bytes"`
	WriteBytes float64 `json:"write-bytes"`
	Errors     float64 `json:"errors"`
	P50        int64   `json:"p50-us"` // 0: there were no requests
	P99        int64   `json:"p99-us"`
}

// topOrders are the words of --sort, the largest first but for names.
var topOrders = map[string]func(a, b load) int{
	"name":    func(a, b load) int { return 0 },
	"iops":    func(a, b load) int { return cmp.Compare(b.IOPS, a.IOPS) },
	"bytes":   func(a, b load) int { return cmp.Compare(b.ReadBytes+b.WriteBytes, a.ReadBytes+a.WriteBytes) },
	"latency": func(a, b load) int { return cmp.Compare(b.P99, a.P99) },
}

func newTop() *cobra.Command {
	f := &topFlags{}
	c := f.reading(&cobra.Command{
		Use:   "top",
		Short: "Watch what the exports do",
		Long: `Watch what the exports do: requests and bytes per second, and how long requests
took, half of them (P50) and 99 of 100 (P99) less than shown. On a terminal the
screen is drawn again after each interval; elsewhere a line is written for each
export. With --json it is a list on a line of its own.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if topOrders[f.sort] == nil {
				return usage("--sort is %q, allowed are bytes, iops, latency and name", f.sort)
			}
			if f.interval < limits.TopIntervalLeast || f.interval > limits.TopIntervalMost {
				return usage("--interval: want %v to %v", limits.TopIntervalLeast, limits.TopIntervalMost)
			}
			return told(f.watch(c))
		},
	})
	n := c.Flags()
	n.DurationVar(&f.interval, "interval", time.Second, "`TIME` between two looks")
	n.BoolVar(&f.once, "once", false, "end after the first interval")
	n.StringVar(&f.sort, "sort", "iops", "bytes, iops, latency or name")
	flagWords(c, "sort", "bytes", "iops", "latency", "name")
	return c
}

// watch looks again and again. That the user interrupts it is no failure.
func (f *topFlags) watch(c *cobra.Command) error {
	cl, err := f.dial()
	if err != nil {
		return err
	}
	ctx, out := c.Context(), c.OutOrStdout()
	before, err := cl.Stats(ctx)
	if ctx.Err() != nil {
		return nil
	}
	if err != nil {
		return err
	}
	tick := time.NewTicker(f.interval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		now, err := cl.Stats(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		if err := f.draw(out, loads(before, now, f.sort)); err != nil || f.once {
			return err
		}
		before = now
	}
}

func (f *topFlags) draw(w io.Writer, list []load) error {
	if f.json {
		j := json.NewEncoder(w)
		j.SetEscapeHTML(false)
		return j.Encode(list)
	}
	lines := topTable(list).lines()
	text := strings.Join(lines, "\n") + "\n"
	if screen, ok := w.(*os.File); ok && !f.once {
		if columns, rows, err := term.GetSize(int(screen.Fd())); err == nil {
			text = redrawn(lines, columns, rows)
		}
	}
	_, err := io.WriteString(w, text)
	return err
}

// The size of a terminal that knows none, as a serial console.
const usualColumns, usualRows = 80, 24

// redrawn are lines for a terminal, over what is there: they are cut where
// its screen ends. A size of 0 is unknown.
func redrawn(lines []string, columns, rows int) string {
	columns, rows = cmp.Or(columns, usualColumns), cmp.Or(rows, usualRows)
	var b strings.Builder
	b.WriteString("\x1b[H")
	for i, s := range lines {
		if i == rows-2 && i < len(lines)-1 {
			s = fmt.Sprintf("and %d more", len(lines)-i)
		}
		if i > rows-2 {
			break
		}
		if r := []rune(s); len(r) > columns {
			s = string(r[:columns])
		}
		b.WriteString(s + "\x1b[K\n")
	}
	return b.String() + "\x1b[J"
}

func topTable(list []load) *table {
	t := &table{head: []string{"EXPORT", "READ/S ", "WRITE/S ", "ALL/S ", "READ MIB/S ", "WRITE MIB/S ", "P50 ", "P99 ", "IN FLIGHT ", "ERRORS/S "}}
	rate := func(v float64) string { return strconv.FormatFloat(v, 'f', 0, 64) }
	mega := func(v float64) string { return strconv.FormatFloat(v/(1<<20), 'f', 1, 64) }
	for _, l := range list {
		t.add(shown(l.Export), rate(l.ReadIOPS), rate(l.WriteIOPS), rate(l.IOPS), mega(l.ReadBytes), mega(l.WriteBytes),
			latency(l.P50), latency(l.P99), strconv.Itoa(l.InFlight), rate(l.Errors))
	}
	return t
}

// latency is a bound in microseconds for people, with two digits or a few
// more.
func latency(us int64) string {
	if us == 0 {
		return "-"
	}
	d := time.Duration(us) * time.Microsecond
	for _, unit := range [...]time.Duration{time.Second, time.Millisecond} {
		if d >= unit {
			d = d.Round(unit / 10)
			break
		}
	}
	return d.String()
}

// loads are what happened between two looks, in an order of topOrders, and by
// name where that sees no difference. An export that is new counts from 0, and
// one that is gone is left out.
func loads(before, now []api.Stats, order string) []load {
	old := map[string]*api.Stats{}
	for i := range before {
		old[before[i].Export] = &before[i]
	}
	list := []load{}
	for i := range now {
		list = append(list, loadOf(old[now[i].Export], &now[i]))
	}
	slices.SortFunc(list, func(a, b load) int {
		return cmp.Or(topOrders[order](a, b), cmp.Compare(a.Export, b.Export))
	})
	return list
}

// loadOf compares two looks; before is nil for an export that is new.
func loadOf(before, now *api.Stats) load {
	l := load{Export: now.Export, InFlight: now.InFlight}
	if before == nil {
		return l
	}
	l.Seconds = now.Time.Sub(before.Time).Seconds()
	if l.Seconds <= 0 {
		l.Seconds = 0
		return l
	}
	var took []uint64
	for name, c := range now.Commands {
		d := since(before.Commands[name], c)
		requests, size := float64(d.Requests)/l.Seconds, float64(d.Bytes)/l.Seconds
		l.IOPS += requests
		l.Errors += float64(d.Errors) / l.Seconds
		switch name {
		case "read":
			l.ReadIOPS, l.ReadBytes = requests, size
		case "write":
			l.WriteIOPS, l.WriteBytes = requests, size
		}
		for i, n := range d.Latency {
			if i >= len(took) {
				took = append(took, 0)
			}
			took[i] += n
		}
	}
	l.P50, l.P99 = percentile(took, 50), percentile(took, 99)
	return l
}

// since is what was counted between two looks. Counters that went back belong
// to another export of the same name, which counts from 0.
func since(before, now api.Command) api.Command {
	back := now.Requests < before.Requests || now.Bytes < before.Bytes || now.Errors < before.Errors
	for i, n := range before.Latency {
		back = back || i >= len(now.Latency) || now.Latency[i] < n
	}
	if back {
		return now
	}
	d := api.Command{Requests: now.Requests - before.Requests, Errors: now.Errors - before.Errors, Bytes: now.Bytes - before.Bytes}
	d.Latency = slices.Clone(now.Latency)
	for i, n := range before.Latency {
		d.Latency[i] -= n
	}
	return d
}

// longest is the last bucket that is told from later ones, of 13 days.
const longest = 40

// percentile is the microseconds that p of 100 requests took less than, from
// counts as api.Command has them; 0 if there are none.
func percentile(took []uint64, p float64) int64 {
	var all float64
	for _, n := range took {
		all += float64(n)
	}
	if all == 0 {
		return 0
	}
	var sum float64
	for i, n := range took {
		if sum += float64(n); sum >= all*p/100 {
			return 1 << min(i, longest)
		}
	}
	return 1 << longest
}
