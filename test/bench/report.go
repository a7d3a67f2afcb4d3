package main

import (
	"cmp"
	"context"
	_ "embed"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// row is one line of the table: medians over the rounds.
type row struct {
	Case, Peer           string
	PerIO, Ratio         float64 // Ratio 0: there is nothing to compare with
	IOPS, MBps, P50, P99 float64
	RSS, RSSPerCon       float64
	RSSPerExport         float64 // 0: there is nothing to compare with
	WindowMin, WindowMax float64 // 0 and 0: not looked at
	Limit                float64 // of a service in MB/s; 0 is none
	Ready                float64 // 0: it is not said
	Starts               float64 // of one round
	Spread               spread  // of the ratio, in a case of many short rounds
}

// summarize returns a row for each case and peer, in the order of appearance.
// The ratio is the median of each round's server CPU per request divided by
// the baseline's in the same round; a case may name another baseline and
// another value.
func summarize(samples []sample, baseline string) []row {
	var rows []row
	for _, s := range samples {
		if !slices.ContainsFunc(rows, func(r row) bool { return r.Case == s.Case && r.Peer == s.Peer }) {
			rows = append(rows, summarizeOne(samples, s.Case, s.Peer, baseline))
		}
	}
	return rows
}

func summarizeOne(samples []sample, name, peerName, baseline string) row {
	of := func(value func(sample) float64) float64 {
		var values []float64
		for _, s := range samples {
			if s.Case == name && s.Peer == peerName {
				values = append(values, value(s))
			}
		}
		return median(values)
	}
	compared := ratios(samples, name, peerName, baseline)
	r := row{
		Case: name, Peer: peerName, Ratio: median(compared),
		PerIO:     of(func(s sample) float64 { return s.PerIO }),
		IOPS:      of(func(s sample) float64 { return s.IOPS }),
		MBps:      of(func(s sample) float64 { return s.MBps }),
		P50:       of(func(s sample) float64 { return s.P50 }),
		P99:       of(func(s sample) float64 { return s.P99 }),
		RSS:       of(func(s sample) float64 { return s.RSS }),
		RSSPerCon: of(func(s sample) float64 { return s.RSSPerCon }),
		WindowMin: of(func(s sample) float64 { return s.WindowMin }),
		WindowMax: of(func(s sample) float64 { return s.WindowMax }),
		Ready:     of(func(s sample) float64 { return s.Ready }),
		Starts:    of(func(s sample) float64 { return float64(s.Starts) }),
	}
	if p, err := parsePeers(peerName); err == nil && p[0].exports > 0 {
		r.Limit = float64(p[0].rate) / 1e6
		r.RSSPerExport = perExport(samples, name, r.RSS, p[0].exports)
	}
	if i := indexCase(name); i >= 0 && cases[i].parts > 0 && peerName != cases[i].versus {
		r.Spread = spreadOf(compared)
	}
	return r
}

// perExport compares the memory of a service with that of one with a single
// export.
func perExport(samples []sample, name string, rss float64, exports int) float64 {
	var single []float64
	for _, s := range samples {
		if s.Case == name && s.Peer == serviceName+" 1" {
			single = append(single, s.RSS)
		}
	}
	if len(single) == 0 || exports < 2 {
		return 0
	}
	return (rss - median(single)) / float64(exports-1)
}

// ratios compares round by round what the case is about; where there is nothing
// to compare with, it has none.
func ratios(samples []sample, name, peerName, baseline string) []float64 {
	value := func(s sample) float64 { return s.PerIO }
	if i := indexCase(name); i >= 0 {
		baseline = cmp.Or(cases[i].versus, baseline)
		if cases[i].by != nil {
			value = cases[i].by
		}
	}
	base := map[int]float64{}
	for _, s := range samples {
		if s.Case == name && s.Peer == baseline {
			base[s.Round] = value(s)
		}
	}
	var ratios []float64
	for _, s := range samples {
		// A short round of a busy machine may have no request at all.
		if s.Case == name && s.Peer == peerName && base[s.Round] > 0 && value(s) > 0 {
			ratios = append(ratios, value(s)/base[s.Round])
		}
	}
	return ratios
}

// median returns 0 for no values.
func median(values []float64) float64 {
	if len(values) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(values))
	mid := len(sorted) / 2
	if len(sorted)%2 == 1 {
		return sorted[mid]
	}
	return (sorted[mid-1] + sorted[mid]) / 2
}

// writeTable prints the rows for a terminal and for Markdown alike.
func writeTable(w io.Writer, rows []row) {
	width := 0
	for _, r := range rows {
		width = max(width, len(r.Peer))
	}
	t := sheet{w: w, peer: width, columns: []column{{"CPU us/io", 9}, {"ratio", 6}, {"IOPS", 9}, {"MB/s", 8}, {"p50 us", 9}, {"p99 us", 9}}}
	t.begin()
	for _, r := range rows {
		if r.RSS > 0 || r.Starts > 0 {
			continue
		}
		t.add(r, fixed(r.PerIO, 2), ratioText(r.Ratio), fixed(r.IOPS, 0), fixed(r.MBps, 0), fixed(r.P50, 1), fixed(r.P99, 1))
	}
	writeMemory(w, rows, width)
	writeStarts(w, rows, width)
	writeRates(w, rows, width)
	writeSpreads(w, rows, width)
}

func writeRates(w io.Writer, rows []row, width int) {
	t := sheet{w: w, peer: width, columns: []column{{"part of the limit", 17}, {"quietest 10 ms", 14}, {"busiest 10 ms", 13}}}
	for _, r := range rows {
		if r.Limit != 0 {
			t.add(r, fixed(r.MBps/r.Limit, 3), fixed(r.WindowMin, 2), fixed(r.WindowMax, 2))
		}
	}
}

func writeMemory(w io.Writer, rows []row, width int) {
	t := sheet{w: w, peer: width, columns: []column{{"MiB with 1 connection", 22}, {"KiB per further connection", 26}, {"KiB per further export", 22}}}
	for _, r := range rows {
		if r.RSS == 0 {
			continue
		}
		further := "-"
		if r.RSSPerExport != 0 {
			further = fixed(r.RSSPerExport, 1)
		}
		t.add(r, fixed(r.RSS/1024, 1), fixed(r.RSSPerCon, 1), further)
	}
}

// sheet is a table of rows with so wide a column for the peer and some of its own.
// One without rows is not there, unless it was begun.
type sheet struct {
	w       io.Writer
	peer    int
	columns []column
	begun   bool
}

type column struct {
	head  string
	width int
}

// begin writes the head.
func (t *sheet) begin() {
	t.begun = true
	var heads []string
	under := fmt.Sprintf("|%s|%s|", dashes(12), dashes(t.peer+2))
	for _, c := range t.columns {
		heads = append(heads, c.head)
		under += dashes(c.width+1) + ":|"
	}
	t.line("case", "peer", heads)
	fmt.Fprintln(t.w, under)
}

// add writes a row with a cell for each column.
func (t *sheet) add(r row, cells ...string) {
	if !t.begun {
		fmt.Fprintln(t.w)
		t.begin()
	}
	t.line(r.Case, r.Peer, cells)
}

func (t *sheet) line(name, peer string, cells []string) {
	fmt.Fprintf(t.w, "| %-10s | %-*s |", name, t.peer, peer)
	for i, c := range t.columns {
		fmt.Fprintf(t.w, " %*s |", c.width, cells[i])
	}
	fmt.Fprintln(t.w)
}

func dashes(n int) string { return strings.Repeat("-", n) }

// fixed is v with so many digits behind the point.
func fixed(v float64, digits int) string { return strconv.FormatFloat(v, 'f', digits, 64) }

func ratioText(ratio float64) string {
	if ratio == 0 {
		return "-"
	}
	return fmt.Sprintf("%.2f", ratio)
}

// facts describe where and with what a run was made.
type facts struct {
	Date     string            `json:"date"`
	CPU      string            `json:"cpu"`
	CPUs     int               `json:"cpus"`
	Memory   string            `json:"memory"`
	Kernel   string            `json:"kernel"`
	Versions map[string]string `json:"versions"`
	Secs     float64           `json:"seconds"`
	Rounds   int               `json:"rounds"`
	Image    int64             `json:"image_bytes"`
}

func gatherFacts(ctx context.Context, peers []peer, secs float64, rounds int, image int64) facts {
	var uts unix.Utsname
	unix.Uname(&uts)
	f := facts{
		Date: time.Now().UTC().Format(time.DateOnly), CPUs: runtime.NumCPU(),
		CPU: field("/proc/cpuinfo", "model name"), Memory: field("/proc/meminfo", "MemTotal"),
		Kernel: unix.ByteSliceToString(uts.Release[:]), Secs: secs, Rounds: rounds, Image: image,
		Versions: map[string]string{"go": runtime.Version()},
	}
	for _, p := range peers {
		if p.kind.Program != "" {
			f.Versions[p.kind.Program] = firstLine(ctx, p.kind.Program, "--version")
			continue
		}
		f.Versions["vmdiskd"] = "commit " + firstLine(ctx, "git", "-C", testenv.Root(), "describe", "--always", "--dirty")
	}
	f.Versions["fio"] = firstLine(ctx, "fio", "--version")
	return f
}

// field returns the value of the first line that starts with the key.
func field(path, key string) string {
	text, _ := os.ReadFile(path)
	for line := range strings.Lines(string(text)) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == key {
			return strings.TrimSpace(value)
		}
	}
	return "unknown"
}

func firstLine(ctx context.Context, name string, args ...string) string {
	out, err := exec.CommandContext(ctx, name, args...).Output()
	if err != nil {
		return "unknown"
	}
	line, _, _ := strings.Cut(string(out), "\n")
	return line
}

// pageHead is what the page starts with, whatever was measured.
//
//go:embed head.md
var pageHead string

// writeMarkdown writes the page that docs/benchmarks.md is.
func writeMarkdown(w io.Writer, f facts, chosen []testCase, rows []row) {
	fmt.Fprint(w, pageHead)
	fmt.Fprintf(w, "| what | value |\n|---|---|\n| date | %s |\n| processor | %s, %d CPUs |\n| memory | %s |\n| kernel | %s |\n",
		f.Date, f.CPU, f.CPUs, f.Memory, f.Kernel)
	for _, name := range slices.Sorted(maps.Keys(f.Versions)) {
		fmt.Fprintf(w, "| %s | %s |\n", name, f.Versions[name])
	}
	fmt.Fprintf(w, "| image | %d MiB, fully written, raw or as the case says; in the page cache except in the direct case |\n", f.Image>>20)
	fmt.Fprintf(w, "| run | %d rounds of %g s; server on CPU %s, load on CPU %s, Unix socket |\n\n", f.Rounds, f.Secs, serverCPU, loadCPU)
	fmt.Fprintf(w, "## Cases\n\n| case | what |\n|---|---|\n")
	for _, c := range chosen {
		fmt.Fprintf(w, "| %s | %s |\n", c.name, c.about)
	}
	fmt.Fprintf(w, "\n## Results\n\n`CPU us/io` is the server's own processor time (user and system) per request. "+
		"`ratio` is that time divided by the first peer's in the same round; in the direct case it is IOPS divided by those of "+
		"fio on the same file; the q- cases are compared with qemu-nbd-uring, those of 1 MiB from compressed images by MB/s; the s- cases name what they are compared with, and the c- cases are compared with the same server that nothing confines. "+
		"All figures are medians over the rounds. Where rounds are many and short, a table says how far half of them lie apart, "+
		"and within what bounds the median is known: a difference that they hold on both sides of 0 is none that this run can show.\n\n")
	writeTable(w, rows)
}
