package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// The server and the load each have a processor of their own.
const (
	serverCPU = "0"
	loadCPU   = "1"
)

// sample is one measurement of one peer. Its names are those that nbdload
// prints; the memory fields are of the memory case only.
type sample struct {
	Case      string  `json:"case"`
	Peer      string  `json:"peer"`
	Round     int     `json:"round"`
	Requests  uint64  `json:"requests,omitempty"`
	Errors    uint64  `json:"errors,omitempty"`
	IOPS      float64 `json:"iops,omitempty"`
	MBps      float64 `json:"mb_per_s,omitempty"`
	P50       float64 `json:"p50_us,omitempty"`
	P99       float64 `json:"p99_us,omitempty"`
	PerIO     float64 `json:"server_us_per_io,omitempty"`
	RSS       float64 `json:"rss_kib,omitempty"`      // with 1 idle connection
	RSSPerCon float64 `json:"rss_conn_kib,omitempty"` // for each further one
	Added     int     `json:"added,omitempty"`        // exports, while it was measured
	Starts    int     `json:"starts,omitempty"`       // whose greetings P50 and P99 are about
	Ready     float64 `json:"ready_us,omitempty"`     // median of READY=1; 0: it is not said
	WindowMin float64 `json:"window_min,omitempty"`   // quietest and busiest window of -j,
	WindowMax float64 `json:"window_max,omitempty"`   // as part of their mean
}

// bench holds what all measurements share.
type bench struct {
	dir   string // of the images and nbdload; removed by the caller
	raw   string // the pattern
	size  int64  // of the pattern in bytes
	image string // what is served now
	small bool   // the page cache holds the image page by page
	load  string // path of nbdload
	secs  float64
}

// newBench compiles nbdload and writes the image into dir.
func newBench(ctx context.Context, dir string, size int64, secs float64) (*bench, error) {
	b := &bench{dir: dir, raw: filepath.Join(dir, "disk.img"), size: size, secs: secs}
	b.image = b.raw
	var err error
	if b.load, err = compileLoad(ctx, dir); err != nil {
		return nil, err
	}
	if err := testenv.CreatePattern(b.image, size); err != nil {
		return nil, err
	}
	return b, b.settle()
}

// compileLoad builds nbdload into dir and returns its path.
func compileLoad(ctx context.Context, dir string) (string, error) {
	cc, err := testenv.Tool("cc")
	if err != nil {
		return "", err
	}
	out := filepath.Join(dir, "nbdload")
	source := filepath.Join(testenv.Root(), "test", "bench", "nbdload", "nbdload.c")
	cmd := exec.CommandContext(ctx, cc, "-O2", "-Wall", "-Wextra", "-Werror", "-o", out, source)
	if text, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("compile nbdload: %w\n%s", err, text)
	}
	return out, nil
}

// pageBytes is the unit of the page cache.
var pageBytes = os.Getpagesize()

// warm brings the image into the page cache, in large folios by reading ahead
// or page by page.
func (b *bench) warm(small bool) error {
	f, err := os.Open(b.image)
	if err != nil {
		return err
	}
	defer f.Close()
	fd := int(f.Fd())
	if small != b.small {
		// What is there keeps its shape: it has to go first.
		if err := errors.Join(f.Sync(), unix.Fadvise(fd, 0, 0, unix.FADV_DONTNEED)); err != nil {
			return err
		}
		b.small = small
	}
	advice, step := unix.FADV_SEQUENTIAL, 1<<20
	if small {
		advice, step = unix.FADV_RANDOM, pageBytes
	}
	if err := unix.Fadvise(fd, 0, 0, advice); err != nil {
		return err
	}
	_, err = io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{f}, make([]byte, step))
	return err
}

// settle writes back what a case has dirtied, so that the next measurement
// does not share the processor with writeback.
func (b *bench) settle() error {
	f, err := os.OpenFile(b.image, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}

// measure runs one case once against one peer. ok is false when the peer does
// not take part in this case.
func (b *bench) measure(ctx context.Context, c testCase, p peer) (s sample, ok bool, err error) {
	if _, ok := p.options(c, b.image); !ok {
		return sample{}, false, nil
	}
	dir, err := os.MkdirTemp("", "vmdb")
	if err != nil {
		return sample{}, true, err
	}
	defer os.RemoveAll(dir)
	if c.fresh {
		if err := recipes[c.image](ctx, b, b.image); err != nil {
			return sample{}, true, err
		}
	}
	if err := b.warm(c.small); err != nil {
		return sample{}, true, err
	}
	if c.start {
		s, err := b.starts(ctx, c, p)
		return s, true, err
	}
	server, err := b.launch(ctx, c, p, dir)
	if err != nil {
		return sample{}, true, err
	}
	// An orderly end gives up the image's locks before the next peer wants
	// them. Some peers end badly, and what was measured holds all the same.
	defer server.Stop()
	switch {
	case c.attach:
		s, err = b.attach(ctx, dir)
	case c.load == nil:
		s, err = b.memory(ctx, server)
	case p.adding:
		stop := b.disturb(ctx, dir)
		s, err = b.runLoad(ctx, server, c)
		n, failed := stop()
		s.Added, err = n, errors.Join(err, failed)
	default:
		s, err = b.runLoad(ctx, server, c)
	}
	if err == nil && c.writes {
		err = b.settle()
	}
	if err != nil {
		return s, true, fmt.Errorf("%s, %s: %w\n%s", c.name, p.name, err, server.Log())
	}
	return s, true, nil
}

// launch starts a peer that takes part in the case, with a folder of its own.
// The caller calls Stop.
func (b *bench) launch(ctx context.Context, c testCase, p peer, dir string, wrap ...string) (*testenv.Server, error) {
	if p.exports > 0 {
		if err := b.configure(dir, b.image, p.service); err != nil {
			return nil, err
		}
	}
	o, _ := p.options(c, b.image)
	return p.kind.Launch(ctx, dir, o, append([]string{"taskset", "-c", serverCPU}, wrap...)...)
}

func (b *bench) runLoad(ctx context.Context, server *testenv.Server, c testCase) (s sample, err error) {
	seconds := func(s float64) string { return strconv.FormatFloat(s, 'f', -1, 64) }
	args := []string{"-c", loadCPU, b.load, "-u", server.Socket, "-p", strconv.Itoa(server.Pid())}
	if c.parts > 0 {
		part := seconds(b.secs / float64(c.parts))
		args = append(args, "-t", part, "-w", part)
	} else {
		args = append(args, "-t", seconds(b.secs))
	}
	var stderr strings.Builder
	cmd := exec.CommandContext(ctx, "taskset", append(args, c.load...)...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return s, fmt.Errorf("nbdload: %w\n%s", err, stderr.String())
	}
	if err := json.Unmarshal(out, &s); err != nil {
		return s, fmt.Errorf("nbdload printed %q: %w", out, err)
	}
	if s.Errors != 0 {
		return s, fmt.Errorf("%d of %d requests failed", s.Errors, s.Requests)
	}
	return s, nil
}

// memory reads the server's resident size with few and with many connections.
func (b *bench) memory(ctx context.Context, server *testenv.Server) (s sample, err error) {
	one, err := b.idleRSS(ctx, server, 1)
	if err != nil {
		return s, err
	}
	many, err := b.idleRSS(ctx, server, idleConnections)
	if err != nil {
		return s, err
	}
	s.RSS, s.RSSPerCon = one, (many-one)/(idleConnections-1)
	return s, nil
}

func (b *bench) idleRSS(ctx context.Context, server *testenv.Server, connections int) (kib float64, err error) {
	cmd := exec.CommandContext(ctx, "taskset", "-c", loadCPU, b.load,
		"-u", server.Socket, "-o", "idle", "-c", strconv.Itoa(connections))
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return 0, err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return 0, err
	}
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	if _, err = bufio.NewReader(stdout).ReadString('\n'); err == nil {
		kib, err = rss(server.Pid())
	}
	stdin.Close()
	return kib, errors.Join(err, cmd.Wait())
}

// rss returns the resident size of a process in KiB.
func rss(pid int) (float64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			return strconv.ParseFloat(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 64)
		}
	}
	return 0, fmt.Errorf("process %d has no VmRSS", pid)
}

// fioReport is the part of fio's JSON that is used here.
type fioReport struct {
	Jobs []struct {
		Read struct {
			IOPS  float64 `json:"iops"`
			BW    float64 `json:"bw_bytes"`
			Total uint64  `json:"total_ios"`
			Clat  struct {
				Percentile map[string]float64 `json:"percentile"`
			} `json:"clat_ns"`
		} `json:"read"`
		User   float64 `json:"usr_cpu"` // percent of the run time
		System float64 `json:"sys_cpu"`
		Millis float64 `json:"job_runtime"`
	} `json:"jobs"`
}

// fio reads the image itself with io_uring on the server's processor: the
// speed of the disk, with no server in between.
func (b *bench) fio(ctx context.Context) (s sample, err error) {
	cmd := exec.CommandContext(ctx, "taskset", "-c", serverCPU, "fio", "--name=direct", "--readonly",
		"--filename="+b.image, "--rw=randread", "--bs=4k", "--direct=1", "--ioengine=io_uring",
		fmt.Sprintf("--iodepth=%d", directDepth), "--time_based",
		fmt.Sprintf("--runtime=%dms", int(b.secs*1000)), "--output-format=json")
	out, err := cmd.Output()
	if err != nil {
		return s, fmt.Errorf("fio: %w", err)
	}
	return parseFio(out)
}

func parseFio(out []byte) (s sample, err error) {
	var r fioReport
	if err := json.Unmarshal(out, &r); err != nil {
		return s, fmt.Errorf("fio's report: %w", err)
	}
	if len(r.Jobs) != 1 || r.Jobs[0].Read.Total == 0 {
		return s, errors.New("fio reports no reads")
	}
	j := r.Jobs[0]
	s.Requests, s.IOPS, s.MBps = j.Read.Total, j.Read.IOPS, j.Read.BW/1e6
	s.P50 = j.Read.Clat.Percentile["50.000000"] / 1000
	s.P99 = j.Read.Clat.Percentile["99.000000"] / 1000
	s.PerIO = (j.User + j.System) / 100 * j.Millis * 1000 / float64(s.Requests)
	return s, nil
}

// runAll measures every case with every peer, round by round: a drift of the
// machine hits all of them alike.
func (b *bench) runAll(ctx context.Context, chosen []testCase, peers []peer, rounds int, progress io.Writer) ([]sample, error) {
	var all []sample
	for _, c := range chosen {
		if err := b.use(ctx, c.image); err != nil {
			return all, err
		}
		peers := peers
		if c.peers != "" {
			var err error
			if peers, err = parsePeers(c.peers); err != nil {
				return all, err
			}
		}
		for round := range rounds {
			some, err := b.round(ctx, c, peers, round)
			if err != nil {
				return all, err
			}
			all = append(all, some...)
		}
		fmt.Fprintf(progress, "%s %s\n", time.Now().Format(time.TimeOnly), c.name)
	}
	return all, nil
}

// round measures a case once with every peer that takes part.
func (b *bench) round(ctx context.Context, c testCase, peers []peer, round int) (all []sample, err error) {
	if c.parts > 0 {
		return b.roundInParts(ctx, c, peers, round)
	}
	for _, p := range inTurn(peers, round) {
		s, ok, err := b.measure(ctx, c, p)
		if err != nil {
			return nil, err
		}
		if ok {
			s.Case, s.Peer, s.Round = c.name, p.name, round
			all = append(all, s)
		}
	}
	if !c.direct {
		return all, nil
	}
	s, err := b.fio(ctx)
	s.Case, s.Peer, s.Round = c.name, fioPeer, round
	return append(all, s), err
}

// inTurn has odd rounds go backwards: nobody is always the first.
func inTurn[T any](list []T, round int) []T {
	list = slices.Clone(list)
	if round%2 == 1 {
		slices.Reverse(list)
	}
	return list
}

// onDisk refuses a folder whose files would live in memory only.
func onDisk(dir string) error {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return fmt.Errorf("%q: %w", dir, err)
	}
	if st.Type == unix.TMPFS_MAGIC || st.Type == unix.RAMFS_MAGIC {
		return fmt.Errorf("%q is in memory: the image needs a disk (--dir)", dir)
	}
	return nil
}
