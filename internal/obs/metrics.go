package obs

import (
	"bufio"
	"io"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// MetricsType is the content type of what WriteMetrics writes.
const MetricsType = "text/plain; version=0.0.4; charset=utf-8"

// Metrics are what a monitoring system is told, gathered by the caller.
type Metrics struct {
	Version string    // of the program
	Engine  string    // that is in use
	Started time.Time // the program

	BuffersLent int    // I/O buffers
	BufferBytes int64  // that they hold of the budget
	BufferLimit int64  // the budget
	Refused     uint64 // connections closed before the greeting

	ReloadFailed bool // the last reload of the configuration

	Controls []ControlMetrics // what confines the program

	Exports []ExportMetrics // with different names
	Clients []ClientMetrics // with different IDs
}

// ExportMetrics are those of one export.
type ExportMetrics struct {
	Name     string
	State    string
	Unopened bool  // it could not be opened, and has no size
	Size     int64 // bytes
	Writable bool
	Poisoned bool // no more writes until the image is opened anew
	Clients  int
	Stats    Snapshot

	Threshold int64 // of writes, an offset in bytes; 0 for none

	// Map is for images whose mapping is kept in memory; nil for others.
	Map *MapMetrics
}

// MapMetrics tell how well the mapping of an image is kept in memory.
type MapMetrics struct{ Pages, Bytes, Hits, Misses int64 }

// ClientMetrics are those of one connection.
type ClientMetrics struct {
	ID                uint64
	Export, Peer, Via string
	TLS               string // version, "" without TLS
	Structured        bool
	Extended          bool
	Contexts          int // that it has negotiated
	InFlight          int64
	Requests          uint64
	BytesIn, BytesOut uint64
	Stalled           bool
}

// WriteMetrics writes m in the text format of Prometheus. The error is w's.
// Names are data: whatever is in them, it stays inside its label.
func WriteMetrics(w io.Writer, m *Metrics) error {
	e := &exposition{w: bufio.NewWriter(w)}
	e.program(m)
	for i := range exportFamilies {
		f := &exportFamilies[i]
		e.family(f.name, f.kind, f.help)
		for k := range m.Exports {
			f.write(e, &m.Exports[k])
		}
	}
	for i := range clientFamilies {
		f := &clientFamilies[i]
		e.family(f.name, f.kind, f.help)
		for k := range m.Clients {
			f.write(e, &m.Clients[k])
		}
	}
	return e.w.Flush()
}

// exposition writes the format; the writer keeps the first error.
type exposition struct {
	w    *bufio.Writer
	name string // of the family
	num  [32]byte
}

// label is a name, which is ours, and a value, which may be anything.
type label struct{ name, value string }

const (
	gauge     = "gauge"
	counter   = "counter"
	histogram = "histogram"
)

// family begins the samples of one name.
func (e *exposition) family(name, kind, help string) {
	e.name = "vmdiskd_" + name
	e.w.WriteString("# HELP " + e.name + " " + help + "\n# TYPE " + e.name + " " + kind + "\n")
}

// sample writes one line.
func (e *exposition) sample(v float64, labels ...label) { e.line("", v, labels) }

// quote makes a label's value out of any string.
var quote = strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`)

func (e *exposition) line(suffix string, v float64, labels []label) {
	e.w.WriteString(e.name)
	e.w.WriteString(suffix)
	sep := byte('{')
	for _, l := range labels {
		e.w.WriteByte(sep)
		e.w.WriteString(l.name)
		e.w.WriteString(`="`)
		quote.WriteString(e.w, strings.ToValidUTF8(l.value, "\uFFFD"))
		e.w.WriteByte('"')
		sep = ','
	}
	if len(labels) > 0 {
		e.w.WriteByte('}')
	}
	e.w.WriteByte(' ')
	e.w.Write(strconv.AppendFloat(e.num[:0], v, 'g', -1, 64))
	e.w.WriteByte('\n')
}

// one writes a family that has one sample.
func (e *exposition) one(name, kind, help string, v float64, labels ...label) {
	e.family(name, kind, help)
	e.sample(v, labels...)
}

// ControlMetrics is one measure that confines the program.
type ControlMetrics struct {
	Name  string
	Value float64 // 1 enforced, 0.5 degraded, 0 off
}

// program writes what is not about an export or a client.
func (e *exposition) program(m *Metrics) {
	e.one("build_info", gauge, "The program; always 1.", 1, label{"version", m.Version}, label{"go", runtime.Version()})
	e.one("engine_info", gauge, "The I/O engine in use; always 1.", 1, label{"engine", m.Engine})
	e.one("start_time_seconds", gauge, "When the program started, since the epoch.", float64(m.Started.UnixMilli())/1000)
	e.one("cpu_seconds_total", counter, "Processor time of the program, user and system.", cpuSeconds())
	e.one("goroutines", gauge, "Goroutines of the program.", float64(runtime.NumGoroutine()))
	e.one("buffers_lent", gauge, "I/O buffers in use.", float64(m.BuffersLent))
	e.one("buffers_lent_bytes", gauge, "Budget that I/O buffers in use hold.", float64(m.BufferBytes))
	e.one("buffers_limit_bytes", gauge, "Budget of all I/O buffers.", float64(m.BufferLimit))
	e.one("refused_connections_total", counter, "Connections closed before the greeting, since no export is for their peer.", float64(m.Refused))
	e.one("config_last_reload_success", gauge, "Whether the last reload of the configuration was done, or there was none yet.", flag(!m.ReloadFailed))
	e.family("confinement", gauge, "Measures that confine the program: 1 enforced, 0.5 degraded, 0 off.")
	for _, c := range m.Controls {
		e.sample(c.Value, label{"control", c.Name})
	}
	e.one("exports", gauge, "Exports.", float64(len(m.Exports)))
	e.one("clients", gauge, "Connections in transmission.", float64(len(m.Clients)))
}

func cpuSeconds() float64 {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano()).Seconds()
}

func flag(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// byCommand writes a sample for each operation of an export.
func byCommand(of func(*OpSnapshot) float64) func(*exposition, *ExportMetrics) {
	return func(e *exposition, x *ExportMetrics) {
		for op := range Ops {
			e.sample(of(&x.Stats[op]), label{"export", x.Name}, label{"command", op.String()})
		}
	}
}

// ofMap writes a sample for an export that has a mapping in memory.
func ofMap(of func(*MapMetrics) int64) func(*exposition, *ExportMetrics) {
	return func(e *exposition, x *ExportMetrics) {
		if x.Map != nil {
			e.sample(float64(of(x.Map)), label{"export", x.Name})
		}
	}
}

// ofExport writes one sample for each export.
func ofExport(of func(*ExportMetrics) float64) func(*exposition, *ExportMetrics) {
	return func(e *exposition, x *ExportMetrics) { e.sample(of(x), label{"export", x.Name}) }
}

// sizes are of exports that are open.
func sizes(e *exposition, x *ExportMetrics) {
	if !x.Unopened {
		e.sample(float64(x.Size), label{"export", x.Name})
	}
}

// exportFamilies is the table of the metrics of an export.
var exportFamilies = [...]struct {
	name, kind, help string
	write            func(*exposition, *ExportMetrics)
}{
	{"export_info", gauge, "State of an export; always 1.", func(e *exposition, x *ExportMetrics) {
		e.sample(1, label{"export", x.Name}, label{"state", x.State})
	}},
	{"export_size_bytes", gauge, "Size of the disk.", sizes},
	{"export_writable", gauge, "Whether the disk can be written to.", ofExport(func(x *ExportMetrics) float64 { return flag(x.Writable) })},
	{"export_poisoned", gauge, "Whether the disk takes no more writes until its image is opened anew: one was lost, or the image damaged.", ofExport(func(x *ExportMetrics) float64 { return flag(x.Poisoned) })},
	{"export_write_threshold_bytes", gauge, "Offset in the image's file beyond which a write is told of; 0 for none, and when it was reached.", ofExport(func(x *ExportMetrics) float64 { return float64(x.Threshold) })},
	{"export_clients", gauge, "Connections that have the export open.", ofExport(func(x *ExportMetrics) float64 { return float64(x.Clients) })},
	{"export_requests_total", counter, "Requests answered.", byCommand(func(o *OpSnapshot) float64 { return float64(o.Requests) })},
	{"export_errors_total", counter, "Requests answered with an error.", byCommand(func(o *OpSnapshot) float64 { return float64(o.Errors) })},
	{"export_bytes_total", counter, "Bytes that requests without error moved or covered.", byCommand(func(o *OpSnapshot) float64 { return float64(o.Bytes) })},
	{"export_requests_waiting", gauge, "Requests that wait for the storage.", byCommand(func(o *OpSnapshot) float64 { return float64(o.InFlight) })},
	{"export_request_duration_seconds", histogram, "Time from request to reply, of commands that were used.", latencies},
	{"export_map_pages", gauge, "Pages of the image's mapping in memory.", ofMap(func(s *MapMetrics) int64 { return s.Pages })},
	{"export_map_bytes", gauge, "Memory that the image's mapping takes.", ofMap(func(s *MapMetrics) int64 { return s.Bytes })},
	{"export_map_hits_total", counter, "Lookups of the mapping that memory answered.", ofMap(func(s *MapMetrics) int64 { return s.Hits })},
	{"export_map_misses_total", counter, "Lookups of the mapping that read the image.", ofMap(func(s *MapMetrics) int64 { return s.Misses })},
}

// Buckets that are exposed: every second one from 4 microseconds to 17
// seconds. A bound counts what was below it; Prometheus includes the bound
// itself, which is a difference of a nanosecond.
const (
	firstBound = 2
	lastBound  = 24
	boundStep  = 2
)

func latencies(e *exposition, x *ExportMetrics) {
	for op := range Ops {
		o := &x.Stats[op]
		if o.Requests == 0 {
			continue
		}
		labels := []label{{"export", x.Name}, {"command", op.String()}, {"le", ""}}
		sum := uint64(0)
		for i, n := range o.Histogram {
			if sum += n; i >= firstBound && i <= lastBound && (i-firstBound)%boundStep == 0 {
				labels[2].value = strconv.FormatFloat(BucketBound(i).Seconds(), 'g', -1, 64)
				e.line("_bucket", float64(sum), labels)
			}
		}
		labels[2].value = "+Inf"
		e.line("_bucket", float64(sum), labels)
		e.line("_sum", o.Total.Seconds(), labels[:2])
		e.line("_count", float64(sum), labels[:2])
	}
}

// ofClient writes one sample for each client.
func ofClient(of func(*ClientMetrics) float64) func(*exposition, *ClientMetrics) {
	return func(e *exposition, c *ClientMetrics) {
		e.sample(of(c), label{"client", strconv.FormatUint(c.ID, 10)}, label{"export", c.Export})
	}
}

// clientFamilies is the table of the metrics of a connection.
var clientFamilies = [...]struct {
	name, kind, help string
	write            func(*exposition, *ClientMetrics)
}{
	{"client_info", gauge, "Who is connected and what was negotiated; always 1.", func(e *exposition, c *ClientMetrics) {
		e.sample(1, label{"client", strconv.FormatUint(c.ID, 10)}, label{"export", c.Export}, label{"peer", c.Peer},
			label{"via", c.Via}, label{"tls", c.TLS}, label{"structured", strconv.FormatBool(c.Structured)},
			label{"extended", strconv.FormatBool(c.Extended)}, label{"contexts", strconv.Itoa(c.Contexts)})
	}},
	{"client_requests_total", counter, "Requests received.", ofClient(func(c *ClientMetrics) float64 { return float64(c.Requests) })},
	{"client_received_bytes_total", counter, "Bytes received.", ofClient(func(c *ClientMetrics) float64 { return float64(c.BytesIn) })},
	{"client_sent_bytes_total", counter, "Bytes sent.", ofClient(func(c *ClientMetrics) float64 { return float64(c.BytesOut) })},
	{"client_requests_in_flight", gauge, "Requests that wait for the storage or for the client to take the reply.", ofClient(func(c *ClientMetrics) float64 { return float64(c.InFlight) })},
	{"client_stalled", gauge, "Whether the client leaves replies unread or a request half sent.", ofClient(func(c *ClientMetrics) float64 { return flag(c.Stalled) })},
}
