package obs

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

// hostile are names that a careless writer would let out of their labels.
var hostile = []string{"disk", `a"b`, `a\b`, "a\nb", `a\`, "} 1\n#", "-x,y=<z>", "é\x00", `a\"} 1`}

func exampleMetrics() *Metrics {
	m := &Metrics{
		Version: "0.1.0", Engine: "uring", Started: time.Unix(1700000000, 0),
		BuffersLent: 3, BufferBytes: 4096, BufferLimit: 1 << 30, Refused: 17,
	}
	for i, name := range hostile {
		var s ExportStats
		s.Done(Read, 10, 1, 9*4096, 3*time.Microsecond)
		s.Done(Read, 2, 0, 8192, 5*time.Second)
		s.Done(Read, 1, 0, 512, time.Hour)
		s.Fly(Flush, 2)
		x := ExportMetrics{Name: name, State: "ready", Size: 1 << 30, Writable: i > 0, Clients: i, Stats: s.Snapshot()}
		if i == 0 {
			x.Map = &MapMetrics{Pages: 1, Bytes: 2, Hits: 3, Misses: 4}
		}
		m.Exports = append(m.Exports, x)
		m.Clients = append(m.Clients, ClientMetrics{
			ID: uint64(i) + 1, Export: name, Peer: name, Via: name, TLS: "TLS 1.3", Structured: true, Contexts: 1,
			InFlight: 5, Requests: 6, BytesIn: 7, BytesOut: 8, Stalled: true,
		})
	}
	return m
}

// parse reads what m is written as by Prometheus's own parser.
func parse(t *testing.T, m *Metrics) map[string]*dto.MetricFamily {
	t.Helper()
	var b bytes.Buffer
	if err := WriteMetrics(&b, m); err != nil {
		t.Fatal(err)
	}
	p := expfmt.NewTextParser(model.LegacyValidation)
	families, err := p.TextToMetricFamilies(bytes.NewReader(b.Bytes()))
	if err != nil {
		t.Fatalf("parse: %v\n%s", err, b.Bytes())
	}
	return families
}

// find is the metric of a family whose labels have these values, in pairs.
func find(t *testing.T, f *dto.MetricFamily, pairs ...string) *dto.Metric {
	t.Helper()
	for _, m := range f.GetMetric() {
		have := map[string]string{}
		for _, l := range m.GetLabel() {
			have[l.GetName()] = l.GetValue()
		}
		same := true
		for i := 0; i < len(pairs); i += 2 {
			v, ok := have[pairs[i]]
			same = same && ok && v == pairs[i+1]
		}
		if same {
			return m
		}
	}
	t.Fatalf("%s has no sample with %q", f.GetName(), pairs)
	return nil
}

func TestMetricsAreReadByPrometheus(t *testing.T) {
	families := parse(t, exampleMetrics())
	for _, name := range hostile {
		requests := find(t, families["vmdiskd_export_requests_total"], "export", name, "command", "read")
		if got := requests.GetCounter().GetValue(); got != 13 {
			t.Errorf("requests of %q: got %v, want 13", name, got)
		}
		errs := find(t, families["vmdiskd_export_errors_total"], "export", name, "command", "read")
		if got := errs.GetCounter().GetValue(); got != 1 {
			t.Errorf("errors of %q: got %v, want 1", name, got)
		}
		waiting := find(t, families["vmdiskd_export_requests_waiting"], "export", name, "command", "flush")
		if got := waiting.GetGauge().GetValue(); got != 2 {
			t.Errorf("waiting flushes of %q: got %v, want 2", name, got)
		}
		find(t, families["vmdiskd_client_info"], "export", name, "peer", name, "via", name, "tls", "TLS 1.3")
	}
	for name, f := range families {
		if want := len(hostile); strings.HasPrefix(name, "vmdiskd_client_") && len(f.GetMetric()) != want {
			t.Errorf("%s has %d samples, want %d", name, len(f.GetMetric()), want)
		}
	}
	if got := find(t, families["vmdiskd_build_info"], "version", "0.1.0").GetGauge().GetValue(); got != 1 {
		t.Errorf("build info: got %v, want 1", got)
	}
	if got := families["vmdiskd_refused_connections_total"].GetMetric()[0].GetCounter().GetValue(); got != 17 {
		t.Errorf("%v connections are refused, want 17", got)
	}
	if got := families["vmdiskd_start_time_seconds"].GetMetric()[0].GetGauge().GetValue(); got != 1700000000 {
		t.Errorf("start: got %v, want 1700000000", got)
	}
	if got := len(families["vmdiskd_export_map_hits_total"].GetMetric()); got != 1 {
		t.Errorf("mappings: got %d samples, want 1", got)
	}
}

// TestExportThatIsNotOpenHasNoSize: 0 would be one. That it takes no more writes is a
// gauge of its own.
func TestExportThatIsNotOpenHasNoSize(t *testing.T) {
	families := parse(t, &Metrics{Exports: []ExportMetrics{{Name: "lost", State: "failed", Unopened: true}, {Name: "db", State: "ready", Size: 512, Poisoned: true}}})
	if got := families["vmdiskd_export_size_bytes"].GetMetric(); len(got) != 1 || got[0].GetGauge().GetValue() != 512 {
		t.Errorf("sizes: got %v, want that of the open export", got)
	}
	for name, want := range map[string]float64{"lost": 0, "db": 1} {
		if got := find(t, families["vmdiskd_export_poisoned"], "export", name).GetGauge().GetValue(); got != want {
			t.Errorf("%s poisoned: got %v, want %v", name, got, want)
		}
	}
}

func TestLatencyHistogramIsCumulative(t *testing.T) {
	f := parse(t, exampleMetrics())["vmdiskd_export_request_duration_seconds"]
	if got := len(f.GetMetric()); got != len(hostile) {
		t.Errorf("histograms: got %d, want %d: only of commands that were used", got, len(hostile))
	}
	h := find(t, f, "export", "disk", "command", "read").GetHistogram()
	if h.GetSampleCount() != 13 || h.GetSampleSum() != 3610.00003 {
		t.Errorf("got %d samples, sum %v, want 13 and 3610.00003", h.GetSampleCount(), h.GetSampleSum())
	}
	last := uint64(0)
	for _, b := range h.GetBucket() {
		want := uint64(10)
		if b.GetUpperBound() > 5 {
			want = 12
		}
		if b.GetUpperBound() > 3600 {
			want = 13
		}
		if b.GetCumulativeCount() != want || b.GetCumulativeCount() < last {
			t.Errorf("up to %v s: got %d, want %d", b.GetUpperBound(), b.GetCumulativeCount(), want)
		}
		last = b.GetCumulativeCount()
	}
	if n := len(h.GetBucket()); n != 13 || last != 13 {
		t.Errorf("buckets: got %d with %d in the last, want 13 and 13", n, last)
	}
}

func TestNoExportsAreMetricsToo(t *testing.T) {
	families := parse(t, &Metrics{})
	if f := families["vmdiskd_exports"]; f == nil || f.GetMetric()[0].GetGauge().GetValue() != 0 {
		t.Errorf("exports: got %v, want 0", f)
	}
}

// full is a disk without room.
type full struct{}

var errFull = errors.New("no room")

func (full) Write([]byte) (int, error) { return 0, errFull }

func TestWriterErrorIsTold(t *testing.T) {
	if err := WriteMetrics(full{}, exampleMetrics()); !errors.Is(err, errFull) {
		t.Errorf("got %v, want %v", err, errFull)
	}
}

func FuzzMetricsNames(f *testing.F) {
	for _, name := range hostile {
		f.Add(name)
	}
	f.Fuzz(func(t *testing.T, name string) {
		m := &Metrics{Exports: []ExportMetrics{{Name: name}}}
		x := find(t, parse(t, m)["vmdiskd_export_size_bytes"], "export", strings.ToValidUTF8(name, "\uFFFD"))
		if len(x.GetLabel()) != 1 {
			t.Errorf("name %q has become %d labels", name, len(x.GetLabel()))
		}
	})
}

func BenchmarkMetricsOfManyExports(b *testing.B) {
	m := &Metrics{}
	for range 1000 {
		m.Exports = append(m.Exports, exampleMetrics().Exports[1])
	}
	for b.Loop() {
		if err := WriteMetrics(io.Discard, m); err != nil {
			b.Fatal(err)
		}
	}
}
