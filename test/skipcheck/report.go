package main

import (
	"bufio"
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"
)

// event is one line of `go test -json` (go doc test2json).
type event struct {
	Action     string
	Package    string
	ImportPath string
	Test       string
	Elapsed    float64 // seconds
	Output     string
}

// How many of the slowest packages and tests the summary names.
const (
	slowPackages = 5
	slowTests    = 12
)

// maxLine bounds one line of JSON: a line of output, escaped.
const maxLine = 16 << 20

type test struct{ pkg, name string }

type skip struct {
	test
	reason string
}

type timing struct {
	test
	seconds float64
}

// report collects the events of one run. It belongs to one goroutine.
type report struct {
	out             io.Writer
	output          map[test]*strings.Builder // of tests that have not ended
	order           map[string][]test         // those of a package, as they began
	passed, skipped int
	failed          []test
	skips           []skip
	packages, tests []timing // tests without those within them
}

func newReport(out io.Writer) *report {
	return &report{out: out, output: map[test]*strings.Builder{}, order: map[string][]test{}}
}

// read consumes the stream to its end. Lines that are no JSON are shown.
func (r *report) read(in io.Reader) error {
	lines := bufio.NewScanner(in)
	lines.Buffer(nil, maxLine)
	for lines.Scan() {
		var e event
		if json.Unmarshal(lines.Bytes(), &e) != nil || e.Action == "" {
			fmt.Fprintln(r.out, lines.Text())
			continue
		}
		r.add(e)
	}
	return lines.Err()
}

func (r *report) add(e event) {
	t := test{e.Package, e.Test}
	switch e.Action {
	case "build-output":
		io.WriteString(r.out, e.Output)
	case "output":
		r.keep(t, e.Output)
	case "pass", "skip", "fail":
		if e.Test == "" {
			r.endPackage(e)
		} else {
			r.endTest(t, e.Action)
			if !strings.Contains(e.Test, "/") {
				r.tests = append(r.tests, timing{t, e.Elapsed})
			}
		}
	}
}

func (r *report) keep(t test, text string) {
	b := r.output[t]
	if b == nil {
		b = &strings.Builder{}
		r.output[t] = b
		r.order[t.pkg] = append(r.order[t.pkg], t)
	}
	b.WriteString(text)
}

func (r *report) endTest(t test, action string) {
	switch action {
	case "pass":
		r.passed++
	case "skip":
		r.skipped++
		r.skips = append(r.skips, skip{t, reason(r.text(t))})
	case "fail":
		r.failed = append(r.failed, t)
		return // its output is shown with the package
	}
	delete(r.output, t)
}

// endPackage shows the closing line of the package, and for a failed one all
// that its failed and unfinished tests have printed.
func (r *report) endPackage(e event) {
	whole := test{pkg: e.Package}
	if e.Action == "fail" {
		for _, t := range r.order[e.Package] {
			if t != whole {
				io.WriteString(r.out, r.text(t))
			}
		}
		io.WriteString(r.out, withoutClosing(r.text(whole)))
		if len(r.failed) == 0 || r.failed[len(r.failed)-1].pkg != e.Package {
			r.failed = append(r.failed, whole)
		}
	}
	io.WriteString(r.out, closing(r.text(whole)))
	r.packages = append(r.packages, timing{whole, e.Elapsed})
	for _, t := range r.order[e.Package] {
		delete(r.output, t)
	}
	delete(r.order, e.Package)
}

func (r *report) text(t test) string {
	if b := r.output[t]; b != nil {
		return b.String()
	}
	return ""
}

// closingLine is how go test ends a package: "ok", "FAIL" or "?", the package
// and its time.
var closingLine = regexp.MustCompile(`(?m)^(ok  |FAIL|\?   )\t.*\n`)

func closing(text string) string {
	return strings.Join(closingLine.FindAllString(text, -1), "")
}

func withoutClosing(text string) string {
	return closingLine.ReplaceAllString(text, "")
}

// logLine is what t.Skip leaves: file, line and text.
var logLine = regexp.MustCompile(`^\s+\S+\.go:\d+: (.*)`)

// reason returns the last text that the test logged before it was skipped.
func reason(text string) string {
	last := "no reason given"
	for line := range strings.Lines(text) {
		if m := logLine.FindStringSubmatch(strings.TrimRight(line, "\n")); m != nil {
			last = m[1]
		}
	}
	return last
}

// slowest prints the first n of the list, the slowest first.
func (r *report) slowest(list []timing, n int) {
	slices.SortFunc(list, func(a, b timing) int {
		return cmp.Or(cmp.Compare(b.seconds, a.seconds), strings.Compare(a.pkg, b.pkg), strings.Compare(a.name, b.name))
	})
	for _, t := range list[:min(n, len(list))] {
		fmt.Fprintf(r.out, "  %7.1f s  %s\n", t.seconds, strings.TrimSpace(t.pkg+" "+t.name))
	}
}

// summary prints the end of the report and returns how many skips the list
// does not allow.
func (r *report) summary(allowed []rule) (unknown int) {
	fmt.Fprintf(r.out, "\n%d passed, %d failed, %d skipped in %d packages\n",
		r.passed, len(r.failed), r.skipped, len(r.packages))
	r.slowest(r.packages, slowPackages)
	r.slowest(r.tests, slowTests)
	for _, s := range r.skips {
		mark := "not allowed in CI"
		if allows(allowed, s.test) {
			mark = "allowed"
		} else {
			unknown++
		}
		fmt.Fprintf(r.out, "skip (%s): %s %s: %s\n", mark, s.pkg, s.name, s.reason)
	}
	for _, t := range r.failed {
		fmt.Fprintf(r.out, "FAILED: %s %s\n", t.pkg, t.name)
	}
	return unknown
}
