// The race detector makes sync.Pool forget at random.
//go:build !race

package nbd

import (
	"flag"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/backing/open"
	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/engine/bufpool"
	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

var swapRequests = flag.Int("nbd.swap-requests", 10_000, "requests of TestServerOfSwapNeedsNothing")

// measure returns how often the process has allocated and has waited for
// memory from storage.
func measure(t *testing.T) (mallocs uint64, majflt int64) {
	t.Helper()
	var r unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &r); err != nil {
		t.Fatal(err)
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.Mallocs, r.Majflt
}

// freeLists is what may still be missing in lists of things that are used
// again and again (requests, locks of ranges, waiters of the runtime), one list
// for each processor: the largest number at a time may come late, but does not
// grow with the requests.
const freeLists = 512

// TestServerOfSwapNeedsNothing: what --swap serves costs no allocation and
// no major fault, however long it lasts: -nbd.swap-requests=1000000 shows it.
func TestServerOfSwapNeedsNothing(t *testing.T) {
	bufs, eng := bufpool.New(limits.SwapBudget), engine.NewInlinePool(0)
	eng.StartAll()
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, make([]byte, 8<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	dev, err := open.Open(t.Context(), open.Spec{Path: path, Format: "raw", Cache: open.CacheNone, Engine: eng, Buffers: bufs})
	if err != nil {
		t.Fatal(err)
	}
	r := newRig(t, dev, eng, bufs)
	r.opt.Requests, r.opt.Bytes, r.opt.Poll = limits.SwapServerRequests, limits.SwapServerBytes, limits.Poll
	for _, b := range limits.SwapBuffers {
		if err := bufs.Keep(b.Bytes, b.Count); err != nil {
			t.Fatal(err)
		}
	}
	c := r.rawClient(t)
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	// As the kernel swaps: out by 128 KiB and by single pages, in by 32 KiB.
	shapes := []struct {
		cmd         wire.Cmd
		count, size int
	}{
		{wire.CmdWrite, 8, 128 << 10}, {wire.CmdWrite, 16, 4096}, {wire.CmdRead, 16, 32 << 10}, {wire.CmdRead, 1, 4096},
	}
	round := func(i int) int {
		s := shapes[i%len(shapes)]
		if !c.round(c.batch(s.cmd, s.count, s.size)) {
			t.Fatal("connection lost")
		}
		return s.count
	}
	for i := range 400 {
		round(i)
	}
	// Where that is allowed, as the product does; else the host may drop pages
	// of the program, and only the allocations tell something.
	locked := unix.Mlockall(unix.MCL_CURRENT|unix.MCL_FUTURE) == nil
	if locked {
		defer unix.Munlockall()
	}
	measure(t)
	mallocs, majflt := measure(t)
	done := 0
	for i := 0; done < *swapRequests; i++ {
		done += round(i)
	}
	mallocsNow, majfltNow := measure(t)
	t.Logf("%d requests: %d allocations, %d major faults, memory locked: %v", done, mallocsNow-mallocs, majfltNow-majflt, locked)
	if n := mallocsNow - mallocs; n > freeLists || locked && majfltNow != majflt {
		t.Errorf("%d requests: %d allocations, %d major faults, want at most %d and none", done, n, majfltNow-majflt, freeLists)
	}
}
