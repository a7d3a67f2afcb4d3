package uring

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/engine/bufpool"
)

const (
	benchFile  = 512 << 20
	benchBlock = 4096
	benchDepth = 32
)

// benchDisk is a file without holes, made once per run of the benchmarks.
func benchDisk(b *testing.B) string {
	b.Helper()
	p := filepath.Join(b.TempDir(), "disk")
	f, err := os.Create(p)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	chunk := make([]byte, 4<<20)
	for i := range chunk {
		chunk[i] = byte(i * 7)
	}
	for off := 0; off < benchFile; off += len(chunk) {
		if _, err := f.Write(chunk); err != nil {
			b.Fatal(err)
		}
	}
	if err := f.Sync(); err != nil {
		b.Fatal(err)
	}
	return p
}

// cpuTime is what this process has used so far.
func cpuTime() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// fioResult is what fio measured in the same run, on the same file.
type fioResult struct{ iops, cpuPerIO float64 }

// fio reads at random from p with its own io_uring engine.
func fio(b *testing.B, p string) (fioResult, bool) {
	b.Helper()
	if _, err := exec.LookPath("fio"); err != nil {
		return fioResult{}, false
	}
	cmd := exec.Command("fio", "--name=r", "--filename="+p, "--rw=randread", "--bs=4k", "--direct=1",
		"--ioengine=io_uring", fmt.Sprintf("--iodepth=%d", benchDepth), "--runtime=1", "--time_based",
		"--fixedbufs=1", "--registerfiles=1", "--norandommap", "--output-format=json")
	out, err := cmd.Output()
	if err != nil {
		b.Fatalf("fio: %v", err)
	}
	var r struct {
		Jobs []struct {
			Read struct {
				IOPS     float64 `json:"iops"`
				TotalIOs float64 `json:"total_ios"`
			} `json:"read"`
		} `json:"jobs"`
	}
	if err := json.Unmarshal(out, &r); err != nil || len(r.Jobs) != 1 {
		b.Fatalf("fio: %v in %s", err, out)
	}
	u := cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	return fioResult{r.Jobs[0].Read.IOPS, float64(u.Nanoseconds()) / 1e3 / r.Jobs[0].Read.TotalIOs}, true
}

// benchReads is the work of one round.
const benchReads = 50000

// BenchmarkDirectRandomRead compares engines with fio on the same file, in
// turns, so that a drift of the machine hits both: one operation is 50000 direct
// reads of 4 KiB, 32 at a time. "chained" submits the next read from Done, as
// fio does; "turns" has a goroutine submit batches, as a connection does. The
// metrics are medians of the rounds.
func BenchmarkDirectRandomRead(b *testing.B) {
	disk := benchDisk(b)
	for _, shape := range []struct {
		name string
		run  func(*testing.B, engine.Engine, *engine.File, *bufpool.Pool)
	}{{"chained", chained}, {"turns", turns}} {
		b.Run(shape.name+"/uring", func(b *testing.B) {
			bufs := bufpool.New(64 << 20)
			defer bufs.Close()
			e, err := New(Options{Buffers: bufs})
			if err != nil {
				b.Skipf("no io_uring: %v", err)
			}
			benchRounds(b, disk, e, bufs, shape.run)
		})
		b.Run(shape.name+"/pool", func(b *testing.B) {
			bufs := bufpool.New(64 << 20)
			defer bufs.Close()
			benchRounds(b, disk, engine.NewPool(benchDepth), bufs, shape.run)
		})
	}
}

func benchRounds(b *testing.B, disk string, e engine.Engine, bufs *bufpool.Pool,
	run func(*testing.B, engine.Engine, *engine.File, *bufpool.Pool)) {
	b.Helper()
	defer e.Close()
	osf, err := os.OpenFile(disk, os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		b.Fatal(err)
	}
	f, err := e.Open(osf)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	var iops, cpu, ofFio, fioCPU []float64
	for range b.N {
		used, start := cpuTime(), time.Now()
		run(b, e, f, bufs)
		iops = append(iops, benchReads/time.Since(start).Seconds())
		cpu = append(cpu, float64((cpuTime()-used).Nanoseconds())/1e3/benchReads)
		b.StopTimer()
		if r, ok := fio(b, disk); ok {
			ofFio = append(ofFio, iops[len(iops)-1]/r.iops)
			fioCPU = append(fioCPU, r.cpuPerIO)
		}
		b.StartTimer()
	}
	b.ReportMetric(median(iops), "iops")
	b.ReportMetric(median(cpu), "cpu-us/io")
	if len(ofFio) > 0 {
		b.ReportMetric(median(ofFio), "of-fio")
		b.ReportMetric(median(fioCPU), "fio-cpu-us/io")
	}
}

func median(v []float64) float64 {
	slices.Sort(v)
	return v[len(v)/2]
}

// randomBlock is an offset in the file.
func randomBlock(r *rand.Rand) int64 { return r.Int64N(benchFile/benchBlock) * benchBlock }

// chained keeps benchDepth reads in flight, each submitting the next.
func chained(b *testing.B, e engine.Engine, f *engine.File, bufs *bufpool.Pool) {
	var left atomic.Int64
	left.Store(benchReads)
	var wg sync.WaitGroup
	var held []*bufpool.Buf
	var first []*engine.IO
	for i := range benchDepth {
		buf := bufs.TryGet(benchBlock)
		held = append(held, buf)
		r := rand.New(rand.NewPCG(1, uint64(i)))
		io := &engine.IO{File: f, Buf: buf.Bytes(), Off: randomBlock(r)}
		again := []*engine.IO{io}
		io.Done = func(io *engine.IO) {
			if io.Err != nil {
				b.Error(io.Err)
			}
			if left.Add(-1) < benchDepth {
				wg.Done()
				return
			}
			io.Off = randomBlock(r)
			e.Submit(again)
		}
		first = append(first, io)
	}
	wg.Add(len(first))
	e.Submit(first)
	wg.Wait()
	for _, buf := range held {
		buf.Release()
	}
}

// turns keeps benchDepth reads in flight from one goroutine, which submits
// again whatever has ended when it gets to run.
func turns(b *testing.B, e engine.Engine, f *engine.File, bufs *bufpool.Pool) {
	var mu sync.Mutex
	var ended []*engine.IO
	wake := make(chan struct{}, 1)
	done := func(io *engine.IO) {
		mu.Lock()
		ended = append(ended, io)
		first := len(ended) == 1
		mu.Unlock()
		if first {
			wake <- struct{}{}
		}
	}
	r := rand.New(rand.NewPCG(1, 1))
	var batch, spare []*engine.IO
	for range benchDepth {
		buf := bufs.TryGet(benchBlock)
		defer buf.Release()
		batch = append(batch, &engine.IO{File: f, Buf: buf.Bytes(), Done: done})
	}
	for submitted, over := 0, 0; over < benchReads; {
		batch = batch[:min(len(batch), benchReads-submitted)]
		for _, io := range batch {
			io.Off = randomBlock(r)
		}
		submitted += len(batch)
		e.Submit(batch)
		<-wake
		mu.Lock()
		batch, ended, spare = ended, spare[:0], batch
		mu.Unlock()
		over += len(batch)
		for _, io := range batch {
			if io.Err != nil {
				b.Fatal(io.Err)
			}
		}
	}
}
