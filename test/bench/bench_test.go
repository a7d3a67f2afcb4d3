package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/test/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

func TestMedianIsTheMiddleOrTheMeanOfTwo(t *testing.T) {
	for _, tt := range []struct {
		in   []float64
		want float64
	}{
		{nil, 0},
		{[]float64{7}, 7},
		{[]float64{9, 1, 5}, 5},
		{[]float64{4, 1, 3, 2}, 2.5},
	} {
		if got := median(tt.in); got != tt.want {
			t.Errorf("median(%v) = %v, want %v", tt.in, got, tt.want)
		}
	}
}

func TestRatioComparesWithinARound(t *testing.T) {
	// The machine was twice as slow in round 1: the ratio must not see it.
	samples := []sample{
		{Case: "rr4k-q32", Peer: "nbdkit", Round: 0, PerIO: 4},
		{Case: "rr4k-q32", Peer: "vmdiskd", Round: 0, PerIO: 2},
		{Case: "rr4k-q32", Peer: "nbdkit", Round: 1, PerIO: 8},
		{Case: "rr4k-q32", Peer: "vmdiskd", Round: 1, PerIO: 4},
	}
	rows := summarize(samples, "nbdkit")
	if len(rows) != 2 || rows[0].Ratio != 1 || rows[1].Ratio != 0.5 {
		t.Fatalf("rows %+v, want ratios 1 and 0.5", rows)
	}
	if rows[1].PerIO != 3 {
		t.Errorf("median of 2 and 4 us is %v, want 3", rows[1].PerIO)
	}
}

func TestDirectCaseIsComparedWithFio(t *testing.T) {
	rows := summarize([]sample{
		{Case: "direct", Peer: "vmdiskd", IOPS: 90, PerIO: 5},
		{Case: "direct", Peer: fioPeer, IOPS: 100, PerIO: 2},
	}, "nbdkit")
	if rows[0].Ratio != 0.9 || rows[1].Ratio != 1 {
		t.Fatalf("ratios %v and %v, want 0.9 and 1", rows[0].Ratio, rows[1].Ratio)
	}
}

func TestRatioWithoutBaselineIsADash(t *testing.T) {
	rows := summarize([]sample{{Case: "rr4k-q1", Peer: "vmdiskd", PerIO: 5}}, "nbdkit")
	var out bytes.Buffer
	writeTable(&out, rows)
	if rows[0].Ratio != 0 || !strings.Contains(out.String(), "|      - |") {
		t.Fatalf("ratio %v, table:\n%s", rows[0].Ratio, out.String())
	}
}

func TestTableLinesHaveEqualWidth(t *testing.T) {
	rows := []row{
		{Case: "rr4k-q1", Peer: "a peer with a long name", PerIO: 1234.5, Ratio: 12.34, IOPS: 1e6},
		{Case: "rr4k-q32", Peer: "b"},
		{Case: "memory", Peer: "b", RSS: 2048, RSSPerCon: 16},
		{Case: "s-memory", Peer: "b", RSS: 2048, RSSPerCon: 16, RSSPerExport: 12.3},
		{Case: "start", Peer: "b", Starts: 10, P50: 12345, P99: 98765, Ready: 10000, Ratio: 0.5},
		{Case: "start", Peer: "c", Starts: 10, P50: 12345, P99: 98765},
		{Case: "c-q32", Peer: "b", Ratio: 1.01, Spread: spread{Rounds: 60, LowQuarter: 0.9, HighQuarter: 1.1, Low: 1, High: 1.02}},
		{Case: "s-rate", Peer: "b", MBps: 50, Limit: 50, WindowMin: 0.9, WindowMax: 1.1},
	}
	var out bytes.Buffer
	writeTable(&out, rows)
	for _, block := range strings.Split(strings.TrimSpace(out.String()), "\n\n") {
		lines := strings.Split(block, "\n")
		for _, line := range lines {
			if len(line) != len(lines[0]) {
				t.Errorf("%d bytes wide, the head has %d: %q", len(line), len(lines[0]), line)
			}
		}
	}
}

func TestChosenCasesKeepTheirOrder(t *testing.T) {
	got, err := chooseCases("memory,rr4k-q1")
	if err != nil || len(got) != 2 || got[0].name != "memory" || got[1].name != "rr4k-q1" {
		t.Fatalf("got %+v, %v", got, err)
	}
	if all, err := chooseCases(""); err != nil || len(all) != len(cases) {
		t.Errorf("no names choose %d cases, %v; want all %d", len(all), err, len(cases))
	}
	if _, err := chooseCases("rr4k"); err == nil || !strings.Contains(err.Error(), "rr4k-q32c4") {
		t.Errorf("an unknown case is answered %v, want an error with the known ones", err)
	}
}

func TestPeerTakesArgumentsOfItsOwn(t *testing.T) {
	peers, err := parsePeers("nbdkit,vmdiskd --engine=pool -s")
	if err != nil {
		t.Fatal(err)
	}
	o, ok := peers[1].options(cases[0], "disk.img")
	args := strings.Join(peers[1].kind.Args(o, "a.sock"), " ")
	if want := "-f -U a.sock --engine=pool -s disk.img"; !ok || args != want {
		t.Errorf("arguments %q, want %q", args, want)
	}
	for _, bad := range []string{"", "nbdkit,,vmdiskd", "nbd-server"} {
		if _, err := parsePeers(bad); err == nil {
			t.Errorf("parsePeers(%q) succeeds", bad)
		}
	}
}

func TestOnlyServersThatCanTakePartInTheDirectCase(t *testing.T) {
	peers, err := parsePeers("nbdkit,qemu-nbd-uring,vmdiskd")
	if err != nil {
		t.Fatal(err)
	}
	direct := cases[indexCase("direct")]
	for i, want := range []bool{false, true, true} {
		if _, ok := peers[i].options(direct, "disk.img"); ok != want {
			t.Errorf("%s takes part: %v, want %v", peers[i].name, ok, want)
		}
	}
}

func TestOnlyServersThatReadQcow2TakePartInItsCases(t *testing.T) {
	peers, err := parsePeers("nbdkit,qemu-nbd-uring,vmdiskd -v")
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []string{"", "-f qcow2 -e 300 -t -x  -k a.sock -r --aio=io_uring chain.qcow2",
		"-f -U a.sock -r --backing=same-dir -v --format=qcow2 chain.qcow2"} {
		o, ok := peers[i].options(cases[indexCase("q-chain")], "chain.qcow2")
		if ok != (want != "") {
			t.Errorf("%s takes part: %v", peers[i].name, ok)
		}
		if args := strings.Join(peers[i].kind.Args(o, "a.sock"), " "); ok && args != want {
			t.Errorf("%s: arguments %q, want %q", peers[i].name, args, want)
		}
	}
}

func TestRatioOfACaseMayHaveItsOwnBaselineAndValue(t *testing.T) {
	samples := []sample{
		{Case: "q-zlib-1m", Peer: qemuPeer, PerIO: 9, MBps: 500},
		{Case: "q-zlib-1m", Peer: "vmdiskd", PerIO: 1, MBps: 1500},
	}
	if got := ratios(samples, "q-zlib-1m", "vmdiskd", "nbdkit"); len(got) != 1 || got[0] != 3 {
		t.Errorf("ratios: got %v, want 3, by MB/s", got)
	}
}

func TestFioReportBecomesASample(t *testing.T) {
	s, err := parseFio([]byte(`{"jobs":[{"usr_cpu":10,"sys_cpu":30,"job_runtime":2000,"read":{
		"iops":5000,"bw_bytes":20480000,"total_ios":10000,
		"clat_ns":{"percentile":{"50.000000":100000,"99.000000":250000}}}}]}`))
	want := sample{Requests: 10000, IOPS: 5000, MBps: 20.48, P50: 100, P99: 250, PerIO: 80}
	if err != nil || s != want {
		t.Fatalf("got %+v, %v; want %+v", s, err, want)
	}
	for _, bad := range []string{"", "{}", `{"jobs":[{}]}`} {
		if _, err := parseFio([]byte(bad)); err == nil {
			t.Errorf("report %q is taken", bad)
		}
	}
}

func TestCommandLineRefusesNonsense(t *testing.T) {
	for _, args := range [][]string{{"--rounds", "0"}, {"--secs", "0"}, {"--size", "-1"}, {"stray"}, {"--unknown"}} {
		if _, err := parseFlags(args, &bytes.Buffer{}); err == nil {
			t.Errorf("%q is taken", args)
		}
	}
}

func TestMarkdownTellsMachineCasesAndHowToRepeat(t *testing.T) {
	var out bytes.Buffer
	f := facts{CPU: "a processor", Kernel: "6.18", Versions: map[string]string{"nbdkit": "nbdkit 1.32"}, Image: 1 << 30}
	writeMarkdown(&out, f, cases[:1], []row{{Case: "rr4k-q1", Peer: "nbdkit", PerIO: 20, Ratio: 1}})
	for _, want := range []string{"a processor", "6.18", "nbdkit 1.32", "1024 MiB", "4 KiB random read, QD1", "20.00", "make bench"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is missing in:\n%s", want, out.String())
		}
	}
}

// TestPageStartsWithTheHead: how to run the cases does not wait for the next run
// of all, and names cases and options that there are.
func TestPageStartsWithTheHead(t *testing.T) {
	page, err := os.ReadFile(filepath.Join(testenv.Root(), "docs", "benchmarks.md"))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(string(page), pageHead) {
		t.Error("docs/benchmarks.md does not start with test/bench/head.md")
	}
	commands := 0
	for line := range strings.Lines(pageHead) {
		args, ok := strings.CutPrefix(strings.TrimSpace(line), "go run ./test/bench --cases ")
		if !ok {
			continue
		}
		commands++
		names, _, _ := strings.Cut(args, " ")
		if _, err := chooseCases(names); err != nil {
			t.Errorf("%s: %v", line, err)
		}
	}
	if commands == 0 {
		t.Error("the head has no command that chooses cases")
	}
	var help bytes.Buffer
	if _, err := parseFlags([]string{"--help"}, &help); !errors.Is(err, flag.ErrHelp) {
		t.Fatalf("help: %v", err)
	}
	for _, m := range regexp.MustCompile("--([a-z]+)").FindAllStringSubmatch(pageHead, -1) {
		if name := m[1]; name != "help" && name != "engine" && !strings.Contains(help.String(), "  -"+name) {
			t.Errorf("the head names --%s, which the help does not", name)
		}
	}
}

// startLoad returns nbdload and a server whose image holds the pattern.
func startLoad(t *testing.T) (load string, server *testenv.Server, image string) {
	t.Helper()
	testenv.Require(t, "cc", "nbdkit")
	ctx := testenv.Context(t)
	load, err := compileLoad(ctx, testenv.TempDir(t))
	if err != nil {
		t.Fatal(err)
	}
	kind, err := testenv.KindByName("nbdkit")
	if err != nil {
		t.Fatal(err)
	}
	image = testenv.PatternImage(t, 16<<20)
	server, err = kind.Launch(ctx, testenv.TempDir(t), testenv.Options{Image: image})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(server.Kill)
	return load, server, image
}

func TestLoadReadsTheRightData(t *testing.T) {
	load, server, _ := startLoad(t)
	for _, args := range [][]string{
		{"-o", "read", "-q", "1"},
		{"-o", "read", "-b", "1048576", "-q", "8", "-s"},
		{"-o", "randread", "-q", "32", "-c", "4"},
		{"-o", "randread", "-q", "32", "-s"},
		{"-o", "randread", "-b", "512", "-q", "7", "-c", "64", "-s"},
		{"-o", "randread", "-b", "1000", "-q", "3", "-l", "100000"},
	} {
		s := runLoad(t, load, server, append(args, "-V")...)
		if s.Requests == 0 || s.Errors != 0 || s.IOPS <= 0 || s.P99 < s.P50 {
			t.Errorf("%q: %+v", args, s)
		}
	}
}

func TestLoadNoticesWrongData(t *testing.T) {
	load, server, image := startLoad(t)
	f, err := os.OpenFile(image, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte{0x55}, 4321); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(load, "-u", server.Socket, "-o", "read", "-q", "1", "-l", "8192", "-t", "0.1", "-V").Output()
	if err == nil || strings.Contains(string(out), `"mismatches":0`) {
		t.Fatalf("one changed byte goes unnoticed: %v %s", err, out)
	}
}

func TestLoadWritesAndMixes(t *testing.T) {
	load, server, _ := startLoad(t)
	for _, args := range [][]string{
		{"-o", "randwrite", "-q", "32"},
		{"-o", "write", "-b", "1048576", "-q", "4", "-s"},
		{"-o", "mix", "-q", "16", "-c", "4"},
	} {
		if s := runLoad(t, load, server, args...); s.Requests == 0 || s.Errors != 0 {
			t.Errorf("%q: %+v", args, s)
		}
	}
}

func TestLoadRefusesNonsense(t *testing.T) {
	testenv.Require(t, "cc")
	load, err := compileLoad(testenv.Context(t), testenv.TempDir(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{}, {"-u", "a", "-T", "b:1"}, {"-u", "a", "-q", "0"}, {"-u", "a", "-c", "257"},
		{"-u", "a", "-o", "erase"}, {"-u", "a", "-o", "write", "-V"}, {"-T", "127.0.0.1"},
	} {
		if err := exec.Command(load, args...).Run(); err == nil {
			t.Errorf("nbdload %q succeeds", args)
		}
	}
}

func runLoad(t *testing.T, load string, server *testenv.Server, args ...string) (s sample) {
	t.Helper()
	out := testenv.Run(t, append([]string{load, "-u", server.Socket, "-t", "0.1", "-w", "0.05"}, args...)...)
	if err := json.Unmarshal([]byte(out), &s); err != nil {
		t.Fatalf("%s: %v", out, err)
	}
	return s
}

// TestServerTimeIsFinerThanATick: the kernel's tick is 10 ms.
func TestServerTimeIsFinerThanATick(t *testing.T) {
	load, server, _ := startLoad(t)
	var s struct {
		CPU float64 `json:"server_cpu_s"`
	}
	for range 5 {
		out := testenv.Run(t, load, "-u", server.Socket, "-p", strconv.Itoa(server.Pid()), "-t", "0.05", "-w", "0.05")
		if err := json.Unmarshal([]byte(out), &s); err != nil {
			t.Fatal(err)
		}
		if math.Abs(math.Remainder(s.CPU, 0.01)) > 1e-5 {
			return
		}
	}
	t.Errorf("processor time is a whole number of ticks: %v s", s.CPU)
}

func TestMemoryIsReadWithIdleConnections(t *testing.T) {
	load, server, _ := startLoad(t)
	b := &bench{load: load}
	kib, err := b.idleRSS(testenv.Context(t), server, 8)
	if err != nil || kib <= 0 {
		t.Fatalf("resident size %v KiB, %v", kib, err)
	}
}

func TestWholeRunWritesTableAndPage(t *testing.T) {
	testenv.Require(t, "cc", "nbdkit", "qemu-nbd", "qemu-img", "taskset", "fio")
	page := filepath.Join(testenv.TempDir(t), "benchmarks.md")
	var out, progress bytes.Buffer
	err := run(testenv.Context(t), []string{"--peers", "nbdkit,qemu-nbd-uring", "--cases", "rr4k-q32,rw4k-q32,q-rr4k,q-chain,q-10T,q-zlib-1m,q-zstd-4k",
		"--rounds", "1", "--secs", "0.1", "--size", "8", "--out", page}, &out, &progress)
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(page)
	if err != nil || !strings.Contains(out.String(), "nbdkit") || !strings.Contains(string(text), out.String()) {
		t.Fatalf("%v; table:\n%s\npage:\n%s", err, out.String(), text)
	}
}
