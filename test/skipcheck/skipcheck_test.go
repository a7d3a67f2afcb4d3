package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// stream is what go test prints for one package that passes, skips and fails.
const stream = `{"Action":"start","Package":"m/a"}
{"Action":"run","Package":"m/a","Test":"TestGood"}
{"Action":"output","Package":"m/a","Test":"TestGood","Output":"=== RUN   TestGood\n"}
{"Action":"output","Package":"m/a","Test":"TestGood","Output":"    a_test.go:1: quiet please\n"}
{"Action":"pass","Package":"m/a","Test":"TestGood","Elapsed":0.1}
{"Action":"output","Package":"m/a","Test":"TestLazy","Output":"    a_test.go:7: needs fio (package fio)\n"}
{"Action":"output","Package":"m/a","Test":"TestLazy","Output":"--- SKIP: TestLazy (0.00s)\n"}
{"Action":"skip","Package":"m/a","Test":"TestLazy","Elapsed":0}
{"Action":"output","Package":"m/a","Test":"TestBad","Output":"    a_test.go:9: got 1, want 2\n"}
{"Action":"fail","Package":"m/a","Test":"TestBad","Elapsed":0}
{"Action":"output","Package":"m/a","Output":"FAIL\n"}
{"Action":"output","Package":"m/a","Output":"FAIL\tm/a\t2.500s\n"}
{"Action":"fail","Package":"m/a","Elapsed":2.5}
{"Action":"output","Package":"m/b","Output":"PASS\n"}
{"Action":"output","Package":"m/b","Output":"ok  \tm/b\t0.100s\n"}
{"Action":"pass","Package":"m/b","Elapsed":0.1}
`

func reportOf(t *testing.T, in string, rules ...rule) (text string, unknown int) {
	t.Helper()
	var out bytes.Buffer
	r := newReport(&out)
	if err := r.read(strings.NewReader(in)); err != nil {
		t.Fatal(err)
	}
	unknown = r.summary(rules)
	return out.String(), unknown
}

func TestOnlyFailuresShowTheirOutput(t *testing.T) {
	text, _ := reportOf(t, stream)
	for _, want := range []string{
		"got 1, want 2", "FAIL\tm/a\t2.500s\n", "ok  \tm/b\t0.100s\n",
		"1 passed, 1 failed, 1 skipped in 2 packages\n      2.5 s  m/a\n      0.1 s  m/b\n      0.1 s  m/a TestGood\n",
		"m/a TestLazy: needs fio (package fio)", "FAILED: m/a TestBad",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is missing in:\n%s", want, text)
		}
	}
	if strings.Contains(text, "quiet please") {
		t.Errorf("a passed test is shown:\n%s", text)
	}
}

func TestBuildFailureIsShownAndCounted(t *testing.T) {
	text, _ := reportOf(t, `{"ImportPath":"m/a","Action":"build-output","Output":"a.go:1:1: syntax error\n"}
{"ImportPath":"m/a","Action":"build-fail"}
{"Action":"output","Package":"m/a","Output":"FAIL\tm/a [build failed]\n"}
{"Action":"fail","Package":"m/a","Elapsed":0,"FailedBuild":"m/a"}
`)
	if !strings.Contains(text, "syntax error") || !strings.Contains(text, "[build failed]") || !strings.Contains(text, "1 failed") {
		t.Errorf("got:\n%s", text)
	}
}

func TestPanicOutsideATestIsShown(t *testing.T) {
	text, _ := reportOf(t, `{"Action":"output","Package":"m/a","Test":"TestHang","Output":"goroutine 1 [running]\n"}
{"Action":"output","Package":"m/a","Output":"panic: test timed out\n"}
{"Action":"output","Package":"m/a","Output":"FAIL\tm/a\t1.000s\n"}
{"Action":"fail","Package":"m/a","Elapsed":1}
`)
	if !strings.Contains(text, "goroutine 1 [running]") || !strings.Contains(text, "panic: test timed out") {
		t.Errorf("got:\n%s", text)
	}
}

func TestLineThatIsNoEventIsShown(t *testing.T) {
	if text, _ := reportOf(t, "go: cannot find main module\n"); !strings.Contains(text, "cannot find main module") {
		t.Errorf("got:\n%s", text)
	}
}

func TestAllowedSkipIsByPackageAndWholeName(t *testing.T) {
	for _, tt := range []struct {
		line string
		want int // skips that stay unknown
	}{
		{"a TestLazy no fio here", 0},
		{"m/a Test(Lazy|Other) no fio here", 0},
		{"a TestLaz no fio here", 1},
		{"b TestLazy no fio here", 1},
		{"# a comment", 1},
		{"", 1},
	} {
		r, ok, err := parseRule(tt.line)
		if err != nil {
			t.Fatal(err)
		}
		var rules []rule
		if ok {
			rules = append(rules, r)
		}
		if _, got := reportOf(t, stream, rules...); got != tt.want {
			t.Errorf("%q leaves %d skips unknown, want %d", tt.line, got, tt.want)
		}
	}
}

func TestListWithoutReasonIsRefused(t *testing.T) {
	for _, bad := range []string{"a TestLazy", "a Test( no closing bracket"} {
		file := filepath.Join(t.TempDir(), "skips.allowed")
		if err := os.WriteFile(file, []byte("\n"+bad+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := readAllowed(file); err == nil || !strings.Contains(err.Error(), "skips.allowed:2") {
			t.Errorf("%q is answered %v, want an error with the line", bad, err)
		}
	}
}

func TestExitStatusIsTheCommands(t *testing.T) {
	file := filepath.Join(t.TempDir(), "stream")
	if err := os.WriteFile(file, []byte(stream), 0o600); err != nil {
		t.Fatal(err)
	}
	allowed := filepath.Join(t.TempDir(), "skips.allowed")
	if err := os.WriteFile(allowed, []byte("a TestLazy no fio here\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name string
		args []string
		want int
	}{
		{"success", []string{"--", "true"}, 0},
		{"failure", []string{"--", "sh", "-c", "exit 7"}, 7},
		{"signal", []string{"--", "sh", "-c", "kill -9 $$"}, 1},
		{"no such command", []string{"--", "/no/such/command"}, 1},
		{"skip outside CI", []string{"-strict=false", "--", "cat", file}, 0},
		{"unknown skip in CI", []string{"-strict", "--", "cat", file}, 1},
		{"allowed skip in CI", []string{"-strict", "-allowed", allowed, "--", "cat", file}, 0},
		{"no list", []string{"-allowed", "/no/such/list", "--", "true"}, 2},
		{"no command", nil, 2},
		{"unknown flag", []string{"-x"}, 2},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var out, errs bytes.Buffer
			if got := run(tt.args, &out, &errs); got != tt.want {
				t.Errorf("status %d, want %d\n%s%s", got, tt.want, out.String(), errs.String())
			}
		})
	}
}

func TestRepositoryListIsReadable(t *testing.T) {
	rules, err := readAllowed(filepath.Join("..", "skips.allowed"))
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range rules {
		if len(r.reason) < 10 {
			t.Errorf("%s %v: reason %q says little", r.pkg, r.name, r.reason)
		}
	}
}
