// The race detector makes sync.Pool forget at random.
//go:build !race

package nbd

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/backing/layer"
	"github.com/vmdiskd/vmdiskd/internal/backing/open"
	"github.com/vmdiskd/vmdiskd/internal/confine"
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

// TestServerOfSwapNeedsNothing: what --swap serves costs no allocation and
// no major fault, from the first request on and however long it lasts:
// -nbd.swap-requests=1000000 shows it. The runtime is left as the product leaves
// it, for good: the test runs in a process of its own.
func TestServerOfSwapNeedsNothing(t *testing.T) {
	const child = "NBD_TEST_SWAP"
	if os.Getenv(child) == "" {
		cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v", fmt.Sprintf("-nbd.swap-requests=%d", *swapRequests))
		cmd.Env = append(os.Environ(), child+"=1")
		out, err := cmd.CombinedOutput()
		t.Logf("%s", out)
		if err != nil {
			t.Error(err)
		}
		return
	}
	c := swapClient(t)
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
	for _, s := range shapes { // the client's own memory
		c.batch(s.cmd, s.count, s.size)
	}
	// Where that is allowed, as the product does; else the host may drop pages
	// of the program, and only the allocations tell something.
	locked := unix.Mlockall(unix.MCL_CURRENT|unix.MCL_FUTURE) == nil
	measure(t)
	mallocs, majflt := measure(t)
	done := 0
	for i := 0; done < *swapRequests; i++ {
		done += round(i)
	}
	mallocsNow, majfltNow := measure(t)
	t.Logf("%d requests: %d allocations, %d major faults, memory locked: %v", done, mallocsNow-mallocs, majfltNow-majflt, locked)
	if mallocsNow != mallocs || locked && majfltNow != majflt {
		t.Error("want none of either")
	}
}

// swapClient is connected to a server that has what the product gives to one of
// swap.
func swapClient(t *testing.T) *rawClient {
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
	r := newRig(t, layer.NewSwap(dev), eng, bufs) // as the daemon's exports are
	r.opt.Requests, r.opt.Bytes, r.opt.Poll, r.opt.Keep = limits.SwapServerRequests, limits.SwapServerBytes, limits.Poll, limits.SwapKeep
	for _, b := range limits.SwapBuffers {
		if err := bufs.Keep(b.Bytes, b.Count); err != nil {
			t.Fatal(err)
		}
	}
	if err := confine.SettleRuntime(); err != nil {
		t.Fatal(err)
	}
	return r.rawClient(t)
}
