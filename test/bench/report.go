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
	const head = "| %-10s | %-*s | %9s | %6s | %9s | %8s | %9s | %9s |\n"
	fmt.Fprintf(w, head, "case", width, "peer", "CPU us/io", "ratio", "IOPS", "MB/s", "p50 us", "p99 us")
	fmt.Fprintf(w, "|%s|%s|%s|%s|%s|%s|%s|%s|\n", dashes(12), dashes(width+2),
		dashes(10)+":", dashes(7)+":", dashes(10)+":", dashes(9)+":", dashes(10)+":", dashes(10)+":")
	for _, r := range rows {
		if r.RSS > 0 || r.Starts > 0 {
			continue
		}
		fmt.Fprintf(w, "| %-10s | %-*s | %9.2f | %6s | %9.0f | %8.0f | %9.1f | %9.1f |\n",
			r.Case, width, r.Peer, r.PerIO, ratioText(r.Ratio), r.IOPS, r.MBps, r.P50, r.P99)
	}
	writeMemory(w, rows, width)
	writeStarts(w, rows, width)
	writeRates(w, rows, width)
	writeSpreads(w, rows, width)
}

func writeRates(w io.Writer, rows []row, width int) {
	first := true
	for _, r := range rows {
		if r.Limit == 0 {
			continue
		}
		if first {
			first = false
			fmt.Fprintf(w, "\n| %-10s | %-*s | %17s | %14s | %13s |\n", "case", width, "peer", "part of the limit", "quietest 10 ms", "busiest 10 ms")
			fmt.Fprintf(w, "|%s|%s|%s|%s|%s|\n", dashes(12), dashes(width+2), dashes(18)+":", dashes(15)+":", dashes(14)+":")
		}
		fmt.Fprintf(w, "| %-10s | %-*s | %17.3f | %14.2f | %13.2f |\n", r.Case, width, r.Peer, r.MBps/r.Limit, r.WindowMin, r.WindowMax)
	}
}

func writeMemory(w io.Writer, rows []row, width int) {
	first := true
	for _, r := range rows {
		if r.RSS == 0 {
			continue
		}
		if first {
			first = false
			fmt.Fprintf(w, "\n| %-10s | %-*s | %22s | %26s | %22s |\n", "case", width, "peer",
				"MiB with 1 connection", "KiB per further connection", "KiB per further export")
			fmt.Fprintf(w, "|%s|%s|%s|%s|%s|\n", dashes(12), dashes(width+2), dashes(23)+":", dashes(27)+":", dashes(23)+":")
		}
		further := "-"
		if r.RSSPerExport != 0 {
			further = fmt.Sprintf("%.1f", r.RSSPerExport)
		}
		fmt.Fprintf(w, "| %-10s | %-*s | %22.1f | %26.1f | %22s |\n", r.Case, width, r.Peer, r.RSS/1024, r.RSSPerCon, further)
	}
}

func dashes(n int) string { return strings.Repeat("-", n) }

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
