package guest

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/confine"
	"github.com/vmdiskd/vmdiskd/test/testenv"
)

var (
	swapHog      = flag.Int("swap.hog", 125, "mebibytes that each guest of 192 uses")
	swapRuns     = flag.Int("swap.runs", 1, "how often each guest swaps to its own server")
	swapLoad     = flag.String("swap.load", "one", "what takes the memory: one program, four, one beside reads of the page cache (cache), or four beside them (hard)")
	swapAblation = flag.Bool("swap.ablation", false, "take each protection of a server of swap away: it must fail once in three runs")
)

// Mebibytes of a guest's memory and of its disks.
const (
	swapMemory = 192
	swapDisk   = 512
)

// swapPrelude starts the server on a virtio disk and gives it to the kernel. A
// task that waits for a minute without running once ends the guest, and so does
// a minute without a page swapped, much more than a busy host takes from it: the machine waits for its server, which
// waits for the machine.
const swapPrelude = `
echo 60 >/proc/sys/kernel/hung_task_timeout_secs
echo 1 >/proc/sys/kernel/hung_task_panic
trap 'rc=$?; [ $rc = 0 ] || { cat /run/server.log; dmesg | tail -n 20; }' EXIT
field() { sed -n "s/^$1:[^0-9]*\([0-9]*\).*/\1/p" /proc/$server/status; }
faults() { sed 's/.*) //' /proc/$server/stat | cut -d' ' -f10; }
start() {
	: >/run/server.log
	vmdiskd $OPTIONS -U /run/s /dev/vda >/run/server.log 2>&1 &
	server=$!
	i=0
	while ! grep -q msg=serving /run/server.log; do sleep 0.1; i=$((i+1)); [ $i -lt 300 ]; kill -0 $server; done
	plug
}
plug() {
	/usr/sbin/nbd-client -swap -unix /run/s /dev/nbd0 -b 4096
	mkswap /dev/nbd0 >/dev/null
	swapon /dev/nbd0
}
unplug() {
	swapoff /dev/nbd0
	/usr/sbin/nbd-client -d /dev/nbd0
}
stop() {
	unplug
	kill $server
	wait $server
}
`

// swapPlug is the kernel's side by vmdiskctl.
const swapPlug = swapPrelude + `
plug() {
	vmdiskctl device attach 'nbd+unix:///?socket=/run/s' /dev/nbd0 --swap --swapon
	grep "^/dev/nbd0 " /proc/swaps
	[ "$(cat /sys/block/nbd0/queue/nr_requests)" = 4 ]
	[ "$(cat /sys/block/nbd0/queue/max_sectors_kb)" = 32 ]
}
unplug() {
	vmdiskctl device detach /dev/nbd0
	if grep "^/dev/nbd0 " /proc/swaps; then return 1; fi
}
# served: swapping went on, and the server needed nothing for it.
served() {
	grep -E 'VmLck|VmRSS|VmSwap|Threads' /proc/$server/status
	grep -E 'pswp(in|out)' /proc/vmstat
	[ "$(sed -n 's/^pswpout //p' /proc/vmstat)" -gt $1 ]
	[ "$(faults)" = "$before" ]
	[ "$(field Threads)" = "$threads" ]
	[ "$(field VmSwap)" = 0 ]
}
begin() {
	sysctl -w vm.min_free_kbytes=8192
	OPTIONS=--swap
	start
	threads=$(field Threads)
	before=$(faults)
	/hog watch 60 >/dev/console &
	watcher=$!
}
`

// swapScenario: the guest's memory goes to its own server and comes back
// whole, while the server needs none. It stops when that is over, as it was told.
const swapScenario = swapPlug + `
rc=0; vmdiskd --swap -U /run/s /dev/vda 2>/run/refused || rc=$?
cat /run/refused
[ $rc = 1 ]
grep -q "sysctl -w vm.min_free_kbytes=8192" /run/refused
begin
kill $server
LOAD
kill $watcher
grep "not stopping: the machine swaps to this disk" /run/server.log
echo "ticks of the server, user and system: $(sed 's/.*) //' /proc/$server/stat | cut -d' ' -f12,13); of all: $(head -n 1 /proc/stat)"
served 15000
swapoff /dev/nbd0
wait $server
`

// swapFileScenario: the guest swaps to a file on its device.
const swapFileScenario = swapPlug + `
sysctl -w vm.min_free_kbytes=8192
OPTIONS=--swap
start
swapoff /dev/nbd0
/usr/sbin/mke2fs -q -F -t ext4 /dev/nbd0
mount -t ext4 /dev/nbd0 /mnt
dd if=/dev/zero of=/mnt/swapfile bs=1M count=16 2>/dev/null
mkswap /mnt/swapfile >/dev/null
swapon /mnt/swapfile
kill $server
i=0
until grep 'not stopping.* device=/mnt/swapfile ' /run/server.log; do sleep 0.1; i=$((i+1)); [ $i -lt 300 ]; done
kill -0 $server
sync
swapoff /mnt/swapfile
wait $server
`

// swapLoads are the values of -swap.load; HOG is in mebibytes. What they read is
// not the disk of the server: see vmdiskd(8).
var swapLoads = map[string]string{
	"one":   "/hog HOG 1",
	"four":  "pids=; for i in 1 2 3 4; do /hog $((HOG / 4)) 1 & pids=\"$pids $!\"; done; for p in $pids; do wait $p; done",
	"cache": "(while :; do dd if=/dev/vdb of=/dev/null bs=1M 2>/dev/null; done) & reads=$!; /hog HOG 1; kill $reads",
	// For the ablation: reclaim by several tasks, and little of it from clean pages.
	"hard": "(while :; do dd if=/dev/vdb of=/dev/null bs=1M 2>/dev/null; done) & reads=$!; pids=; for i in 1 2 3 4; do /hog $((HOG / 4)) 2 & pids=\"$pids $!\"; done; for p in $pids; do wait $p; done; kill $reads",
}

// swapPressed are machines that swap while something else presses on their
// memory.
var swapPressed = []struct{ name, scenario string }{
	// Reads through the page cache take each page that swapping gives.
	{"by reads of the page cache", swapPlug + `
begin
(while :; do dd if=/dev/vdb of=/dev/null bs=1M 2>/dev/null; done) &
reads=$!
/hog HOG 1
[ -d /proc/$reads ]
kill $reads
kill $watcher
served 15000
stop
`},
	// What a program uses all the while comes back from the device, and the
	// device goes, although the page cache takes what it can get.
	{"by swapoff", swapPlug + `
begin
/hog keep 16 &
kept=$!
/hog HOG 1
(while :; do dd if=/dev/vdb of=/dev/null bs=1M 2>/dev/null; done) &
reads=$!
grep "^/dev/nbd0 " /proc/swaps
kill $watcher
swapoff /dev/nbd0
[ -d /proc/$reads ]
kill $reads
if grep "^/dev/nbd0 " /proc/swaps; then exit 9; fi
kill $kept
wait $kept
served 15000
stop
`},
}

// swapBare has only the least to tell life from death: no headroom.
const swapBare = swapPrelude + `
OPTIONS="--swap=best-effort --swap-headroom=skip"
start
/hog watch 60 >/dev/console &
watcher=$!
LOAD
kill $watcher
stop
`

// swapProgram builds a package without symbols, which a small guest has no
// room for, and without some protections.
func swapProgram(t *testing.T, pkg, without string) string {
	t.Helper()
	const variable = "github.com/vmdiskd/vmdiskd/internal/confine.without"
	name := strings.Join([]string{"swap", filepath.Base(pkg), without}, "-")
	path, err := testenv.BuildAs(testenv.Context(t), name, pkg, "-ldflags=-s -w -X "+variable+"="+without)
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// swapGuest is a guest that runs a scenario with a server without some
// protections.
func swapGuest(t *testing.T, k testenv.Kernel, scenario, without string) *initramfs {
	t.Helper()
	ctx := testenv.Context(t)
	load, ok := swapLoads[*swapLoad]
	if !ok {
		t.Fatalf("-swap.load=%q is not known", *swapLoad)
	}
	script := strings.NewReplacer("HOG", strconv.Itoa(*swapHog)).Replace(strings.ReplaceAll(scenario, "LOAD", load))
	in, err := newInitramfs(ctx, k, script, "virtio_pci", "virtio_blk", "nbd")
	if err != nil {
		t.Fatal(err)
	}
	for to, from := range map[string]string{
		"usr/bin/vmdiskd":   swapProgram(t, "./cmd/vmdiskd", without),
		"usr/bin/vmdiskctl": swapProgram(t, "./cmd/vmdiskctl", ""),
		"hog":               swapProgram(t, "./test/guest/hog", ""),
	} {
		if err := in.copyFile(from, to); err != nil {
			t.Fatal(err)
		}
	}
	if err := in.addPrograms(ctx, "nbd-client"); err != nil {
		t.Fatal(err)
	}
	return in
}

// swapBoot boots a guest with two empty disks: one to swap to, and one to read.
func swapBoot(t *testing.T, ctx context.Context, in *initramfs) (console string, code int, err error) {
	t.Helper()
	var drives []string
	for _, name := range []string{"swap", "other"} {
		disk := filepath.Join(testenv.TempDir(t), name+".img")
		if err := os.WriteFile(disk, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(disk, swapDisk<<20); err != nil {
			t.Fatal(err)
		}
		defer os.Remove(disk)
		drives = append(drives, "-drive", "if=virtio,format=raw,cache=unsafe,file="+disk)
	}
	ctx, cancel := context.WithTimeout(ctx, swapPatience)
	defer cancel()
	return bootUntil(ctx, in, swapMemory, drives...)
}

// TestMachineSwapsToItsOwnServer: -swap.runs times.
func TestMachineSwapsToItsOwnServer(t *testing.T) {
	onlyVmdiskd(t)
	testenv.Require(t, "nbd-client")
	oneKernel(t, newKernel, func(t *testing.T, k testenv.Kernel) {
		in := swapGuest(t, k, swapScenario, "")
		for run := range *swapRuns {
			began := time.Now()
			console, code, err := swapBoot(t, t.Context(), in)
			if err != nil || code != 0 {
				t.Fatalf("run %d: status %d, %v; console:\n%s", run+1, code, err, console)
			}
			if *swapRuns > 1 {
				fmt.Printf("%s: run %d of %d passes after %v\n", t.Name(), run+1, *swapRuns, time.Since(began).Round(time.Second))
			}
			if testing.Verbose() && run == 0 {
				t.Log(console)
			}
		}
	})
}

// TestStopWaitsForASwapFile on a file system of the server's device.
func TestStopWaitsForASwapFile(t *testing.T) {
	onlyVmdiskd(t)
	testenv.Require(t, "nbd-client", "mke2fs")
	oneKernel(t, stableKernel, func(t *testing.T, k testenv.Kernel) {
		in := swapGuest(t, k, swapFileScenario, "")
		if err := errors.Join(in.addModules(t.Context(), []string{"ext4"}), in.addPrograms(t.Context(), "mke2fs")); err != nil {
			t.Fatal(err)
		}
		console, code, err := swapBoot(t, t.Context(), in)
		if err != nil || code != 0 {
			t.Fatalf("status %d, %v; console:\n%s", code, err, console)
		}
		if testing.Verbose() {
			t.Log(console)
		}
	})
}

func TestMachineSwapsUnderOtherPressure(t *testing.T) {
	onlyVmdiskd(t)
	testenv.Require(t, "nbd-client")
	oneKernel(t, stableKernel, func(t *testing.T, k testenv.Kernel) {
		for _, tt := range swapPressed {
			t.Run(tt.name, func(t *testing.T) {
				console, code, err := swapBoot(t, t.Context(), swapGuest(t, k, tt.scenario, ""))
				if err != nil || code != 0 {
					t.Fatalf("status %d, %v; console:\n%s", code, err, console)
				}
				if testing.Verbose() {
					t.Log(console)
				}
			})
		}
	})
}

// swapPatience ends a guest whose watcher is stuck too.
const swapPatience = 15 * time.Minute

// TestEachProtectionOfSwapIsNeeded: a guest without headroom gets through with
// all of them, and without any one it shall fail once in three runs: one that
// never does is not shown to be of use.
func TestEachProtectionOfSwapIsNeeded(t *testing.T) {
	if !*swapAblation {
		t.Skip("takes minutes for each protection: -swap.ablation")
	}
	onlyVmdiskd(t)
	requireGuest(t)
	testenv.Require(t, "nbd-client")
	for _, without := range []string{
		"", confine.SwapLocked, confine.SwapIOFlusher, confine.SwapRealtime, confine.SwapDirect,
	} {
		for _, meta := range kernels {
			t.Run("without "+without+" "+meta, func(t *testing.T) {
				in := swapGuest(t, testenv.CloudKernel(t, meta), swapBare, without)
				failed, runs := false, 3
				if without == "" {
					runs = 1
				}
				for run := 1; run <= runs && !failed; run++ {
					console, code, err := swapBoot(t, t.Context(), in)
					failed = err != nil || code != 0
					fmt.Printf("%s: run %d: status %d, %v: %s\n", t.Name(), run, code, err, lastWords(console))
				}
				if failed != (without != "") {
					t.Errorf("failed: %v", failed)
				}
			})
		}
	}
}

// lastWords are the lines of a console that tell how a guest ended.
func lastWords(console string) string {
	var said []string
	for line := range strings.Lines(console) {
		for _, word := range [...]string{"hog:", "STUCK", "blocked for", "hung_task", "Out of memory", "I/O error", "LAB-RC"} {
			if strings.Contains(line, word) {
				said = append(said, strings.TrimSpace(line))
				break
			}
		}
	}
	if !strings.Contains(console, "LAB-RC") {
		return console[max(0, len(console)-2000):]
	}
	return strings.Join(said[max(0, len(said)-6):], " | ")
}
