package daemon

import (
	"bytes"
	"context"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/fstest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/backing/mem"
	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/engine/bufpool"
	"github.com/vmdiskd/vmdiskd/internal/export"
	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd"
	"github.com/vmdiskd/vmdiskd/internal/nbd/client"
	"github.com/vmdiskd/vmdiskd/internal/transport/transporttest"
)

// TestSwapOnTheDiskIsFound: the device, which has the size that the disk had
// when it was attached, a partition of it, what stands on it and files there, and
// nothing that cannot be the disk.
func TestSwapOnTheDiskIsFound(t *testing.T) {
	const size = 1 << 30
	const header = "Filename\tType\tSize\tUsed\tPriority\n"
	for _, tt := range []struct{ name, swaps, want string }{
		{"no swap", header, ""},
		{"another device", header + "/dev/sda2 partition 1 0 -2\n", ""},
		{"the device", header + "/dev/sda2 partition 1 0 -2\n/dev/nbd0 partition 1 0 -3\n", "/dev/nbd0"},
		{"a partition", header + "/dev/nbd0p12 partition 1 0 -3\n", "/dev/nbd0p12"},
		{"a larger disk's device", header + "/dev/nbd1 partition 1 0 -3\n", ""},
		{"a device without a size", header + "/dev/nbd2 partition 1 0 -3\n", "/dev/nbd2"},
		{"a volume on the device", header + "/dev/dm-1 partition 1 0 -3\n", "/dev/dm-1"},
		{"a volume on another", header + "/dev/dm-2 partition 1 0 -3\n", ""},
		{"a volume on itself", header + "/dev/dm-3 partition 1 0 -3\n", "/dev/dm-3"},
		{"the device by another name", header + "/run/disk partition 1 0 -3\n", "/run/disk"},
		{"another by another name", header + "/dev/mapper/swap partition 1 0 -3\n", ""},
		{"a device of which nothing is known", header + "/dev/sdz partition 1 0 -3\n", "/dev/sdz"},
		{"a file on the device", header + "/mnt/swapfile file 1 0 -3\n", "/mnt/swapfile"},
		{"a file on a volume on the device", header + "/vol/swapfile file 1 0 -3\n", "/vol/swapfile"},
		{"a file on another", header + "/a\\040\\011\\012\\134040 file 1 0 -3\n", ""},
		{"a file on a file system of several devices", header + "/btrfs/swapfile file 1 0 -3\n", "/btrfs/swapfile"},
		{"a file that is not seen from here", header + "/gone\\040(deleted) file 1 0 -3\n", "/gone\\040(deleted)"},
		{"half a line", header + "/dev/nbd0", ""},
		{"nothing", "", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			root := sysWith(map[string]string{
				"nbd0": "virtual/block/nbd0", "nbd1": "virtual/block/nbd1", "nbd2": "virtual/block/nbd2",
				"nbd0p12": "virtual/block/nbd0/nbd0p12",
				"sda2":    "pci0000:00/block/sda/sda2", "sda": "pci0000:00/block/sda",
				"dm-0": "virtual/block/dm-0", "dm-1": "virtual/block/dm-1", "dm-2": "virtual/block/dm-2", "dm-3": "virtual/block/dm-3",
			}, map[string][]string{"dm-0": {"nbd0"}, "dm-1": {"sda2", "dm-0"}, "dm-2": {"nbd1"}, "dm-3": {"dm-3"}})
			root["proc/swaps"] = sysFile(tt.swaps)
			for number, name := range map[string]string{"43:0": "nbd0", "8:2": "sda2", "253:1": "dm-1"} {
				root["sys/dev/block/"+number] = sysLink("../../class/block/" + name)
			}
			root["mnt/swapfile"], root["vol/swapfile"] = onDevice(unix.Mkdev(43, 0)), onDevice(unix.Mkdev(253, 1))
			root["a \t\n\\040"], root["btrfs/swapfile"] = onDevice(unix.Mkdev(8, 2)), onDevice(unix.Mkdev(0, 45))
			root["run/disk"], root["dev/mapper/swap"] = deviceNode(unix.Mkdev(43, 0)), deviceNode(unix.Mkdev(8, 2))
			root["sys/devices/virtual/block/nbd0/size"] = sysFile("2097152\n")
			root["sys/devices/virtual/block/nbd1/size"] = sysFile("4194304\n")
			root["sys/devices/virtual/block/nbd2/size"] = sysFile("many\n")
			if got := swapOn(root, size); got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
			for _, more := range []int64{4095, 64 << 10, size / 2} {
				if got := swapOn(root, size+more); got != tt.want {
					t.Errorf("with a disk that has %d bytes more: got %q, want %q", more, got, tt.want)
				}
			}
		})
	}
	if got := swapOn(fstest.MapFS{}, size); got != "" {
		t.Errorf("without /proc/swaps: got %q", got)
	}
}

// onDevice is a file on the file system of a device.
func onDevice(dev uint64) *fstest.MapFile { return &fstest.MapFile{Sys: &syscall.Stat_t{Dev: dev}} }

// deviceNode is a node of a block device, on a file system in memory.
func deviceNode(dev uint64) *fstest.MapFile {
	return &fstest.MapFile{Mode: fs.ModeDevice, Sys: &syscall.Stat_t{Dev: unix.Mkdev(0, 5), Rdev: dev}}
}

// swapsHeader is the first line of /proc/swaps.
const swapsHeader = "Filename\tType\tSize\tUsed\tPriority\n"

// swapServer is a server of swap on a machine that has the swap areas of lines, of
// which it knows nothing more.
type swapServer struct {
	*daemon
	t     *testing.T
	swaps string // the file that tells the areas
	said  said
}

// said is a log that can be read meanwhile.
type said struct {
	mu   sync.Mutex
	text bytes.Buffer // guarded by mu
}

func (s *said) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text.Write(p)
}

func (s *said) count(what string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return strings.Count(s.text.String(), what)
}

func newSwapServer(t *testing.T, lines string) *swapServer {
	t.Helper()
	machine := t.TempDir()
	s := &swapServer{daemon: emptyService(t), t: t, swaps: filepath.Join(machine, "proc", "swaps")}
	s.log, s.root, s.cfg.Swap.On = slog.New(slog.NewTextHandler(&s.said, nil)), os.DirFS(machine), true
	s.stopping, s.stop = context.WithCancel(t.Context())
	s.engine, s.buffers = engine.NewPool(1), bufpool.New(limits.BufferBudget)
	s.server = nbd.NewServer(nbd.Options{Exports: s.exports, Engine: s.engine, Buffers: s.buffers, Log: s.log})
	t.Cleanup(func() {
		_ = s.server.Shutdown(context.Background())
		_ = s.closeDisk()
	})
	device := mem.New(1<<20, nil)
	k := &disk{stack: &stack{top: device}}
	if err := s.disks.claim(k); err != nil {
		t.Fatal(err)
	}
	if err := s.exports.Add(export.Spec{Owner: k, Device: device}); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Dir(s.swaps), 0o700); err != nil {
		t.Fatal(err)
	}
	s.areas(lines)
	return s
}

// areas are those of the machine from now on.
func (s *swapServer) areas(lines string) {
	s.t.Helper()
	if err := os.WriteFile(s.swaps, []byte(swapsHeader+lines), 0o600); err != nil {
		s.t.Fatal(err)
	}
}

// attach connects the machine until leave is called.
func (s *swapServer) attach() (leave func()) {
	s.t.Helper()
	ours, theirs := transporttest.Pair(s.t)
	served := make(chan error, 1)
	go func() { served <- s.server.Serve(context.Background(), ours) }()
	c, err := client.New(s.t.Context(), theirs, client.Options{})
	if err != nil {
		s.t.Fatal(err)
	}
	eventually(s.t, "the client is there", s.server.Busy)
	return func() {
		c.Close()
		<-served
	}
}

// TestRefusedStopIsDoneWhenItMayBe: a service manager asks once.
func TestRefusedStopIsDoneWhenItMayBe(t *testing.T) {
	for name, end := range map[string]func(s *swapServer, leave func()){
		"after swapoff":               func(s *swapServer, _ func()) { s.areas("") },
		"when no client is connected": func(_ *swapServer, leave func()) { leave() },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSwapServer(t, "/dev/nbd0 partition 65532 0 -2\n")
			leave := s.attach()
			signals := &signals{stopping: make(chan os.Signal, 2)}
			signals.stopping <- unix.SIGTERM
			done := make(chan error, 1)
			go func() {
				_, err := s.wait(signals)
				done <- err
			}()
			eventually(t, "the stop is refused", func() bool { return s.said.count("not stopping") == 1 })
			if len(done) > 0 {
				t.Fatal("the server stops while the machine swaps to its disk")
			}
			end(s, leave)
			select {
			case err := <-done:
				close(signals.stopping) // a second signal is waited for
				if err != nil || s.said.count("msg=stopping") != 1 || s.said.count("not stopping") != 1 {
					t.Errorf("%v, log:\n%s", err, s.said.text.String())
				}
			case <-time.After(time.Minute):
				t.Error("the refused stop was forgotten")
			}
		})
	}
}

// TestHeldStopGoesFromAreaToArea: each of them is told of.
func TestHeldStopGoesFromAreaToArea(t *testing.T) {
	const second = "/dev/nbd01 partition 65532 0 -3\n"
	s := newSwapServer(t, "/dev/nbd0 partition 65532 0 -2\n"+second)
	defer s.attach()()
	var h heldStop
	defer h.close()
	for _, step := range []struct{ lines, device string }{
		{"/dev/nbd0\tpartition\t65532\t0\t-2\n" + second, "/dev/nbd0"}, {second, "/dev/nbd01"}, {"", ""},
	} {
		s.areas(step.lines)
		switch held := s.refuseStop(&h, unix.SIGTERM); {
		case held != (step.device != "") || held && h.device != step.device:
			t.Errorf("with %q: held %v, by %q, want %q", step.lines, held, h.device, step.device)
		case s.mustWait(&h) != held:
			t.Errorf("with %q: must wait: %v, want %v", step.lines, !held, held)
		case held && s.said.count("device="+step.device+" ") != 1:
			t.Errorf("with %q: want one line about %q:\n%s", step.lines, step.device, s.said.text.String())
		}
	}
}

// TestHeldStopTakesNoMemory: nobody gives any back below swap, and swapoff may take
// hours.
func TestHeldStopTakesNoMemory(t *testing.T) {
	s := newSwapServer(t, "/dev/sda2 partition 65532 0 -2\n/dev/nbd0 partition 65532 0 -3\n")
	defer s.attach()()
	var h heldStop
	defer h.close()
	if !s.refuseStop(&h, unix.SIGTERM) {
		t.Fatal("the stop is not refused")
	}
	h.device = "/dev/nbd0"
	if n := testing.AllocsPerRun(100, func() {
		if !s.mustWait(&h) {
			t.Error("it need not wait")
		}
	}); n != 0 {
		t.Errorf("%v allocations for each look", n)
	}
}

// TestHeldStopWaitsForWhatCannotBeRead, as long as there is a client.
func TestHeldStopWaitsForWhatCannotBeRead(t *testing.T) {
	s := newSwapServer(t, "")
	leave := s.attach()
	if err := os.Remove(s.swaps); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(s.swaps, 0o700); err != nil {
		t.Fatal(err)
	}
	var h heldStop
	defer h.close()
	if !s.refuseStop(&h, unix.SIGTERM) || !s.mustWait(&h) {
		t.Error("an unreadable list of areas is taken for an empty one")
	}
	if leave(); s.mustWait(&h) || s.refuseStop(&h, h.signal) {
		t.Error("it waits for nobody")
	}
}
