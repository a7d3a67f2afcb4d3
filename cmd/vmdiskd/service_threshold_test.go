package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/backing/backingtest"
	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
)

// thresholds follows the events. What it returns takes those of thresholds that
// have come until it is called.
func (s *testService) thresholds() (take func() []api.Event) {
	s.Helper()
	ctx, cancel := context.WithTimeout(s.Context(), 5*time.Minute)
	s.Cleanup(cancel)
	events, err := s.ctl.Events(ctx)
	if err != nil {
		s.Fatal(err)
	}
	heard := make(chan api.Event, 100)
	go func() {
		defer close(heard)
		for e, err := range events {
			if err != nil {
				return
			}
			heard <- e
		}
	}()
	marks := 0
	return func() (list []api.Event) {
		s.Helper()
		marks++ // what comes is behind all that was before
		mark := fmt.Sprint("mark", marks)
		if _, err := s.ctl.Add(ctx, api.AddExport{Export: config.Export{Name: mark, Format: "null", Image: "1M"}}); err != nil {
			s.Fatal(err)
		}
		for e := range heard {
			if e.Export == mark && e.State == api.StateReady {
				return list
			}
			if e.Kind == "threshold" {
				list = append(list, e)
			}
		}
		s.Fatal("the events have ended")
		return nil
	}
}

// wantReached asserts what thresholds were told of since the last call: the offset of
// each, and by how much it was exceeded unless that is 0.
func (s *testService) wantReached(when string, take func() []api.Event, want ...[2]int64) {
	s.Helper()
	got := take()
	if len(got) != len(want) {
		s.Fatalf("%s: got %+v, want %d of %v", when, got, len(want), want)
	}
	for i, e := range got {
		text := fmt.Sprintf("a write went %d bytes beyond its threshold of %d", e.Exceeded, want[i][0])
		if e.Export != "a" || e.Threshold != want[i][0] || e.Exceeded <= 0 || want[i][1] != 0 && e.Exceeded != want[i][1] || e.Text != text {
			s.Errorf("%s: got %+v, want %v", when, e, want[i])
		}
	}
}

// wantThreshold asserts where that of export a is armed, -1 for one that there
// never was. The metrics say the same.
func (s *testService) wantThreshold(when string, want int64) {
	s.Helper()
	x, err := s.ctl.Export(s.Context(), "a")
	if err != nil {
		s.Fatal(err)
	}
	got := int64(-1)
	if x.WriteThreshold != nil {
		got = x.Threshold()
	}
	if measured := s.metric(`export_write_threshold_bytes{export="a"}`); got != want || measured != float64(max(want, 0)) {
		s.Errorf("%s: got %d, and %v in the metrics; want %d", when, got, measured, want)
	}
}

func (s *testService) setThreshold(at int64) {
	s.Helper()
	n := config.Size(at)
	if _, err := s.ctl.Patch(s.Context(), "a", api.Patch{WriteThreshold: &n}); err != nil {
		s.Fatal(err)
	}
}

const keyThreshold = "write-threshold = \"512K\"\n"

// TestThresholdIsAnEventForEachTimeThatItIsArmed: by the configuration, by the API,
// by a reload that finds it changed and by a start, and by nothing else.
func TestThresholdIsAnEventForEachTimeThatItIsArmed(t *testing.T) {
	const open = "cache = \"writethrough\"\n"
	const exportB = "[[export]]\nname = \"b\"\nimage = \"DIR/b.img\"\n"
	s := newService(t, exportA+keyThreshold+exportB)
	take := s.thresholds()
	first := [2]int64{512 << 10, 64 << 10}
	s.wantThreshold("at the start", 512<<10)
	s.write("a", "1", "448k")
	s.wantReached("below", take)
	s.write("a", "1", "512k")
	s.write("a", "1", "512k")
	s.wantReached("by the configuration", take, first)
	s.wantThreshold("when it was reached", 0)
	s.wantLogged("write threshold of export is reached")
	if n := strings.Count(s.log(), "write threshold of export is reached"); n != 1 {
		t.Errorf("the log tells it %d times", n)
	}

	text := "x"
	if _, err := s.ctl.Patch(t.Context(), "a", api.Patch{Description: &text}); err != nil {
		t.Fatal(err)
	}
	for _, change := range []string{"log-requests = true\n", open} { // in use, and closed for it
		if err := s.reload(exportA + keyThreshold + change + exportB); err != nil {
			t.Fatal(err)
		}
		s.wantThreshold("after a reload of "+change, 0)
	}
	s.write("a", "1", "512k")
	s.wantReached("after other changes", take)

	s.setThreshold(512 << 10)
	s.wantThreshold("armed anew", 512<<10)
	s.write("a", "1", "960k")
	s.write("a", "1", "512k")
	s.wantReached("by the API", take, [2]int64{512 << 10, 512 << 10})
	s.setThreshold(4096)
	s.setThreshold(0)
	s.write("a", "1", "512k")
	s.wantReached("taken away", take)

	if err := s.reload(exportA + "write-threshold = 65536\n" + open + exportB); err != nil {
		t.Fatal(err)
	}
	s.wantThreshold("after a reload that has changed it", 64<<10)
	s.write("a", "1", "64k")
	s.wantReached("by a reload", take, [2]int64{64 << 10, 64 << 10})
	if err := s.reload(exportA + "write-threshold = 4096\n" + open + strings.Replace(exportB, "b.img", "none", 1)); err == nil {
		t.Error("an image that is not there was opened")
	}
	s.wantThreshold("after a reload that failed", 0)
	s.write("a", "1", "512k")
	s.wantReached("after a reload that failed", take)
	s.configure(exportA + keyThreshold)
	s.stop()
	s.start()
	take = s.thresholds()
	s.write("a", "1", "512k")
	s.wantReached("by a start", take, first)
	s.stop()
}

// TestThresholdStaysWithAnExport that goes on above a snapshot, and then is for the
// file of the overlay. One that is kept has it after a restart as it was set.
func TestThresholdStaysWithAnExport(t *testing.T) {
	const at = 2 << 20 // the tables of the overlay are below
	s := newService(t, "")
	image := s.newQcow2("c.qcow2")
	if out, err := tool(t, s.dir, "qemu-img", "resize", "-q", image, "16M"); err != nil {
		t.Fatal(err, out)
	}
	x := config.Export{Name: "a", Image: image, Format: "qcow2", Backing: "same-dir"}
	if _, err := s.ctl.Add(t.Context(), api.AddExport{Export: x, Persist: true}); err != nil {
		t.Fatal(err)
	}
	s.wantThreshold("never set", -1)
	take := s.thresholds()
	write := func() { // 4M behind what was written before
		t.Helper()
		if out, err := tool(t, s.dir, "qemu-io", "-f", "raw", "-c", "write 4M 4M", "-c", "flush", s.uri("a")); err != nil {
			t.Fatal(err, out)
		}
	}
	write()
	s.wantReached("never set", take)
	s.setThreshold(at)
	write() // in place, and the file reaches further: the write does
	s.wantReached("in place", take, [2]int64{at})
	s.setThreshold(at)
	if _, err := s.ctl.Snapshot(t.Context(), "a", api.Snapshot{Overlay: s.dir + "/top.qcow2"}); err != nil {
		t.Fatal(err)
	}
	s.wantThreshold("after a snapshot", at)
	s.write("a", "1", "0")
	s.wantReached("a little of the overlay", take)
	write()
	s.wantReached("the overlay", take, [2]int64{at})
	s.wantThreshold("when it was reached", 0)
	s.stop()
	s.start()
	s.wantThreshold("after a restart", at)
	s.stop()
}

// TestVolumeGrowsBelowAnImage when the service has told that it fills, or is full:
// the guest goes on, and the image is what QEMU takes for sound.
func TestVolumeGrowsBelowAnImage(t *testing.T) {
	s := &testService{T: t, dir: t.TempDir()}
	volume := filepath.Join(s.dir, "volume")
	if err := errors.Join(os.WriteFile(volume, nil, 0o600), os.Truncate(volume, 4<<20)); err != nil {
		t.Fatal(err)
	}
	node := backingtest.Loop(t, volume, 512)
	if out, err := tool(t, s.dir, "qemu-img", "create", "-q", "-f", "qcow2", node, "32M"); err != nil {
		t.Fatal(err, out)
	}
	s.configure("[[export]]\nname = \"a\"\nimage = \"" + node + "\"\nformat = \"qcow2\"\nwrite-threshold = \"3M\"\n")
	s.rewrite(`roots = ["`+s.dir+`"]`, `roots = ["`+s.dir+`", "/dev"]`)
	s.start()
	take := s.thresholds()
	grow := func(size int64) {
		t.Helper()
		f, err := os.OpenFile(node, os.O_RDONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if err := errors.Join(os.Truncate(volume, size), unix.IoctlSetInt(int(f.Fd()), unix.LOOP_SET_CAPACITY, 0)); err != nil {
			t.Fatal(err)
		}
	}
	write := func(at string) error {
		t.Helper()
		out, err := tool(t, s.dir, "qemu-io", "-f", "raw", "-c", "write -P 7 "+at, "-c", "flush", s.uri("a"))
		if err != nil || strings.Contains(out, "failed") {
			return fmt.Errorf("qemu-io: %v: %s", err, out)
		}
		return nil
	}
	if err := write("0 3M"); err != nil {
		t.Fatal(err)
	}
	s.wantReached("three of four", take, [2]int64{3 << 20})
	grow(8 << 20)
	s.setThreshold(7 << 20)
	if err := write("3M 3M"); err != nil {
		t.Fatal("a volume that has grown in time: ", err)
	}
	s.wantReached("six of eight", take)
	if err := write("6M 6M"); err == nil || !strings.Contains(err.Error(), "No space") {
		t.Fatalf("a volume that is full: got %v", err)
	}
	s.wantReached("eight of eight", take, [2]int64{7 << 20})
	grow(64 << 20)
	if err := write("6M 26M"); err != nil {
		t.Fatal("a volume that was full: ", err)
	}
	s.stop()
	if out, err := tool(t, s.dir, "qemu-img", "check", "-f", "qcow2", node); err != nil {
		t.Error(err, out)
	}
	if out, err := tool(t, s.dir, "qemu-io", "-r", "-f", "qcow2", "-c", "read -P 7 0 32M", node); err != nil || strings.Contains(out, "failed") {
		t.Error(err, out)
	}
}

// TestWritersOfAGuestReachAThresholdOnce: four connections race over both ways of a
// write, that which is mapped and that which allocates.
func TestWritersOfAGuestReachAThresholdOnce(t *testing.T) {
	for _, engine := range []string{"uring", "pool"} {
		for _, format := range []string{"raw", "qcow2"} {
			t.Run(engine+","+format, func(t *testing.T) {
				s := &testService{T: t, dir: t.TempDir()}
				if out, err := tool(t, s.dir, "qemu-img", "create", "-q", "-f", format, "a.img", "32M"); err != nil {
					t.Fatal(err, out)
				}
				s.configure(exportA + "format = \"" + format + "\"\n")
				s.rewrite("[control]", "engine = \""+engine+"\"\n[control]")
				s.start()
				take := s.thresholds()
				for round := range 3 {
					s.setThreshold(4 << 20)
					out, err := exec.Command("/usr/bin/python3", "-c", `
import nbd, sys, threading
def connect():
    h = nbd.NBD()
    h.connect_uri(sys.argv[1])
    return h
all = [connect() for _ in range(4)]
begin = threading.Barrier(len(all))
failed = []
def run(n, h):
    try:
        begin.wait()
        for i in range(n, 128, len(all)):
            h.pwrite(bytes([n + 1]) * 262144, i * 262144)
    except BaseException as e:
        failed.append(e)
threads = [threading.Thread(target=run, args=x) for x in enumerate(all)]
for x in threads: x.start()
for x in threads: x.join()
sys.exit(repr(failed) if failed else 0)
`, s.uri("a")).CombinedOutput()
					if err != nil {
						t.Fatalf("python3: %v\n%s", err, out)
					}
					s.wantReached(fmt.Sprint("round ", round), take, [2]int64{4 << 20})
					s.wantThreshold("after it", 0)
				}
				s.stop()
			})
		}
	}
}
