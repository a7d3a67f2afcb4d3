package main

import (
	"bytes"
	"encoding/json"
	"math"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/test/testenv"
)

func TestServiceIsReadFromItsWords(t *testing.T) {
	for list, want := range map[string]service{
		"service 1":           {exports: 1},
		"service 1000":        {exports: 1000},
		"service 10 adding":   {exports: 10, adding: true},
		"service 1 rate=100M": {exports: 1, rate: 100 << 20},
	} {
		peers, err := parsePeers(list)
		if err != nil || len(peers) != 1 || peers[0].service != want || peers[0].name != list {
			t.Errorf("%s: got %+v, %v, want %+v", list, peers, err, want)
		}
	}
	for _, bad := range []string{"service", "service 0", "service 10001", "service x", "service 1 fast", "service 1 rate=", "service 1 adding 2"} {
		if _, err := parsePeers(bad); err == nil {
			t.Errorf("parsePeers(%q) succeeds", bad)
		}
	}
}

func TestPeersOfCasesAreKnown(t *testing.T) {
	for _, c := range cases {
		if c.peers == "" {
			continue
		}
		peers, err := parsePeers(c.peers)
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
		}
		known := c.versus == ""
		for _, p := range peers {
			known = known || p.name == c.versus
		}
		if !known {
			t.Errorf("%s: it is compared with %q, which takes no part", c.name, c.versus)
		}
	}
}

func TestMemoryOfAnExportIsWhatAServiceHasMore(t *testing.T) {
	rows := summarize([]sample{
		{Case: "s-memory", Peer: "service 1", RSS: 1000},
		{Case: "s-memory", Peer: "service 101", RSS: 2500},
		{Case: "memory", Peer: "vmdiskd", RSS: 900},
	}, "")
	for i, want := range []float64{0, 15, 0} {
		if got := rows[i].RSSPerExport; got != want {
			t.Errorf("%s, %s: got %v KiB, want %v", rows[i].Case, rows[i].Peer, got, want)
		}
	}
}

// TestServiceIsMeasured: with several exports, with one that comes and goes,
// and within its limit.
func TestServiceIsMeasured(t *testing.T) {
	testenv.Require(t, "cc", "taskset", "qemu-system-x86_64")
	var out, progress bytes.Buffer
	err := run(testenv.Context(t), []string{"--cases", "s-layers,s-add,s-rate,s-attach", "--rounds", "1",
		"--secs", "0.5", "--size", "8", "--json", "--dir", ""}, &out, &progress)
	if err != nil {
		t.Fatal(err)
	}
	var got struct{ Samples []sample }
	if err := json.Unmarshal(out.Bytes(), &got); err != nil {
		t.Fatal(err)
	}
	if len(got.Samples) != 6 {
		t.Fatalf("%d samples, want 6: %+v", len(got.Samples), got.Samples)
	}
	for _, s := range got.Samples {
		adding := strings.HasSuffix(s.Peer, "adding")
		if s.Case == "s-attach" && (s.P50 <= 0 || s.P99 < s.P50 || s.PerIO <= 0 || s.Requests < leastAttached) {
			t.Errorf("attach: %+v", s)
		}
		if s.Requests == 0 || adding != (s.Added > 0) {
			t.Errorf("%s, %s: %d requests, %d exports added", s.Case, s.Peer, s.Requests, s.Added)
		}
		// What a burst adds is within a few of its lengths.
		if most := 1.2 * rateMiB * (1 << 20) / 1e6; s.Case == "s-rate" && (s.MBps > most || s.WindowMax < 1 || s.WindowMin > 1) {
			t.Errorf("%s: %.1f MB/s, windows %v to %v; want at most %.1f", s.Case, s.MBps, s.WindowMin, s.WindowMax, most)
		}
	}
}

// TestWindowsAreCounted: their mean lies between the extremes.
func TestWindowsAreCounted(t *testing.T) {
	load, server, _ := startLoad(t)
	s := runLoad(t, load, server, "-j", "10")
	if s.WindowMin > 1 || s.WindowMax < 1 || math.IsNaN(s.WindowMax) {
		t.Errorf("windows: %v to %v of the mean, want 1 between them", s.WindowMin, s.WindowMax)
	}
	if s := runLoad(t, load, server); s.WindowMin != 0 || s.WindowMax != 0 {
		t.Errorf("windows that nobody asked for: %v to %v", s.WindowMin, s.WindowMax)
	}
}
