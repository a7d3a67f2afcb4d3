package main

import (
	"context"
	"encoding/json"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/control/api"
	ctlserver "github.com/vmdiskd/vmdiskd/internal/control/server"
)

// counted are the counters of an export, seconds after a moment.
func counted(name string, seconds int, commands map[string]api.Command) api.Stats {
	return api.Stats{Export: name, Time: time.Unix(int64(1e9+seconds), 0), InFlight: 3, Commands: commands}
}

func TestLoadIsWhatWasCountedBetweenTwoLooks(t *testing.T) {
	before := []api.Stats{counted("a", 0, map[string]api.Command{
		"read":  {Requests: 100, Bytes: 1000, Latency: []uint64{0, 100}},
		"flush": {Requests: 5, Latency: []uint64{0, 0, 5}},
	}), counted("gone", 0, nil)}
	now := []api.Stats{counted("a", 2, map[string]api.Command{
		"read":  {Requests: 298, Bytes: 5000, Errors: 4, Latency: []uint64{0, 100, 0, 198}},
		"write": {Requests: 2, Bytes: 100, Latency: []uint64{0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2}},
		"flush": {Requests: 5, Latency: []uint64{0, 0, 5}},
	}), counted("new", 2, map[string]api.Command{"read": {Requests: 9}})}
	got := loads(before, now, "name")
	want := []load{
		{Export: "a", Seconds: 2, InFlight: 3, IOPS: 100, ReadIOPS: 99, WriteIOPS: 1, ReadBytes: 2000, WriteBytes: 50, Errors: 2, P50: 8, P99: 8},
		{Export: "new", InFlight: 3},
	}
	if len(got) != 2 || got[0] != want[0] || got[1] != want[1] {
		t.Errorf("got %+v\nwant %+v", got, want)
	}
}

// TestCountersThatGoBackAreAnotherExports also holds that hostile ones do no
// harm.
func TestCountersThatGoBackAreAnotherExports(t *testing.T) {
	most := ^uint64(0)
	old := api.Command{Requests: 100, Bytes: 100, Errors: 1, Latency: []uint64{50, 50}}
	for name, now := range map[string]api.Command{
		"requests": {Requests: 2, Bytes: 200, Errors: 1, Latency: []uint64{50, 50}},
		"bytes":    {Requests: 200, Bytes: 2, Errors: 1, Latency: []uint64{50, 50}},
		"errors":   {Requests: 200, Bytes: 200, Latency: []uint64{50, 50}},
		"shorter":  {Requests: 200, Bytes: 200, Errors: 1, Latency: []uint64{50}},
		"latency":  {Requests: 200, Bytes: 200, Errors: 1, Latency: []uint64{50, 49, most}},
		"hostile":  {Requests: most, Latency: []uint64{most, most, most}},
	} {
		got := loadOf(&api.Stats{Time: time.Unix(1, 0), Commands: map[string]api.Command{"read": old}},
			&api.Stats{Time: time.Unix(2, 0), Commands: map[string]api.Command{"read": now}})
		if got.ReadIOPS != float64(now.Requests) || got.Errors != float64(now.Errors) {
			t.Errorf("%s: got %+v, want what there is now", name, got)
		}
	}
	at := &api.Stats{Time: time.Unix(2, 0), Commands: map[string]api.Command{"read": old}}
	if got := loadOf(at, at); got != (load{}) {
		t.Errorf("no time between: got %+v", got)
	}
}

func TestPercentileIsTheEndOfABucket(t *testing.T) {
	long := make([]uint64, 1000)
	long[999] = 1
	for _, tt := range []struct {
		took []uint64
		p    float64
		want int64
	}{
		{nil, 50, 0},
		{[]uint64{0, 0}, 99, 0},
		{[]uint64{1}, 50, 1},
		{[]uint64{0, 50, 50}, 50, 2},
		{[]uint64{0, 49, 51}, 50, 4},
		{[]uint64{0, 99, 1}, 99, 2},
		{[]uint64{0, 98, 2}, 99, 4},
		{long, 50, 1 << longest},
	} {
		if got := percentile(tt.took, tt.p); got != tt.want {
			t.Errorf("percentile(%v, %v) = %d, want %d", tt.took, tt.p, got, tt.want)
		}
	}
}

func TestLatencyHasFewDigits(t *testing.T) {
	for us, want := range map[int64]string{0: "-", 1: "1µs", 512: "512µs", 1024: "1ms", 4096: "4.1ms", 131072: "131.1ms", 1 << 20: "1s", 1 << 23: "8.4s", 1 << 26: "1m7.1s"} {
		if got := latency(us); got != want {
			t.Errorf("latency(%d) = %q, want %q", us, got, want)
		}
	}
}

func TestTopSorts(t *testing.T) {
	at := func(name string, requests, size uint64, bucket int) (before, now api.Stats) {
		took := make([]uint64, bucket+1)
		took[bucket] = requests
		return counted(name, 0, nil), counted(name, 1, map[string]api.Command{"read": {Requests: requests, Bytes: size, Latency: took}})
	}
	var before, now []api.Stats
	for _, x := range []struct {
		name           string
		requests, size uint64
		bucket         int
	}{{"d", 1, 1, 1}, {"c", 3, 1, 2}, {"b", 1, 9, 1}, {"a", 1, 1, 5}} {
		b, n := at(x.name, x.requests, x.size, x.bucket)
		before, now = append(before, b), append(now, n)
	}
	for order, want := range map[string]string{"name": "abcd", "iops": "cabd", "bytes": "bacd", "latency": "acbd"} {
		got := ""
		for _, l := range loads(before, now, order) {
			got += l.Export
		}
		if got != want {
			t.Errorf("--sort=%s: got %s, want %s", order, got, want)
		}
	}
}

func TestTopPrintsATable(t *testing.T) {
	got := strings.Join(topTable([]load{
		{Export: "web", InFlight: 3, IOPS: 1250, ReadIOPS: 1000, WriteIOPS: 250, ReadBytes: 4.096e6, WriteBytes: 1.5e6, P50: 128, P99: 2048},
		{Export: "a b"},
	}).lines(), "\n")
	want := `EXPORT  READ/S  WRITE/S  ALL/S  READ MIB/S  WRITE MIB/S    P50  P99  IN FLIGHT  ERRORS/S
web       1000      250   1250         3.9          1.4  128µs  2ms          3         0
"a b"        0        0      0         0.0          0.0      -    -          0         0`
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

func TestTopFitsTheTerminal(t *testing.T) {
	lines := []string{"HEAD", "aaaa", "bbbb", "cccc"}
	for _, tt := range []struct {
		columns, rows int
		want          string
	}{
		{80, 24, "\x1b[HHEAD\x1b[K\naaaa\x1b[K\nbbbb\x1b[K\ncccc\x1b[K\n\x1b[J"},
		{3, 5, "\x1b[HHEA\x1b[K\naaa\x1b[K\nbbb\x1b[K\nccc\x1b[K\n\x1b[J"},
		{80, 4, "\x1b[HHEAD\x1b[K\naaaa\x1b[K\nand 2 more\x1b[K\n\x1b[J"},
		{3, 0, "\x1b[HHEA\x1b[K\naaa\x1b[K\nbbb\x1b[K\nccc\x1b[K\n\x1b[J"},
		{0, 4, "\x1b[HHEAD\x1b[K\naaaa\x1b[K\nand 2 more\x1b[K\n\x1b[J"},
	} {
		if got := redrawn(lines, tt.columns, tt.rows); got != tt.want {
			t.Errorf("%d × %d: got %q, want %q", tt.columns, tt.rows, got, tt.want)
		}
	}
}

// TestTopThatKnowsNoSizeFitsTheUsualOne: 0 is what a serial console says.
func TestTopThatKnowsNoSizeFitsTheUsualOne(t *testing.T) {
	lines := slices.Repeat([]string{strings.Repeat("x", 100)}, 30)
	if got, want := redrawn(lines, 0, 0), redrawn(lines, 80, 24); got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestTopLooksTwice(t *testing.T) {
	s := controlled(t, ctlserver.Read)
	s.Put(exportOf("web"))
	if got := want(t, exitDone, "top", "--once", "--interval=100ms"); !strings.Contains(got, "\nweb ") || strings.Contains(got, "\x1b") {
		t.Errorf("got %q", got)
	}
	var list []load
	out := want(t, exitDone, "top", "--once", "--interval=100ms", "--json")
	if err := json.Unmarshal([]byte(out), &list); err != nil || len(list) != 1 || list[0].Export != "web" || strings.Count(out, "\n") != 1 {
		t.Errorf("got %q, %v", out, err)
	}
}

// stopping ends a context when it has been written to for the n-th time.
type stopping struct {
	n    int
	stop func()
}

func (s *stopping) Write(p []byte) (int, error) {
	if s.n--; s.n == 0 {
		s.stop()
	}
	return len(p), nil
}

func TestTopThatIsInterruptedIsDone(t *testing.T) {
	s := controlled(t, ctlserver.Read)
	s.Put(exportOf("web"))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	if code := run(ctx, []string{"top", "--interval=100ms"}, &stopping{n: 2, stop: cancel}, os.Stderr); code != exitDone {
		t.Errorf("exit code %d", code)
	}
}
