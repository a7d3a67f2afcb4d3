package interop

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// snapshotContents is what QEMU reads from an internal snapshot.
func snapshotContents(t *testing.T, image, snapshot string) string {
	t.Helper()
	out := filepath.Join(testenv.TempDir(t), "snapshot.raw")
	testenv.Run(t, "qemu-img", "convert", "-f", "qcow2", "-l", snapshot, "-O", "raw", image, out)
	return out
}

// TestWritesLeaveSnapshotsAlone: clusters that a snapshot shares, some of them
// compressed, are copied before they are written to, zeroed or trimmed.
func TestWritesLeaveSnapshotsAlone(t *testing.T) {
	testenv.Require(t, "fio")
	vmdiskdOnly(t)
	needQEMU(t)
	for name, options := range map[string][]string{
		"version 3":   nil,
		"version 2":   {"-o", "compat=0.10"},
		"subclusters": {"-o", "extended_l2=on,cluster_size=32k"},
	} {
		t.Run(name, func(t *testing.T) {
			source := testenv.PatternImage(t, diskSize)
			dir := filepath.Dir(source)
			image := filepath.Join(dir, "disk.qcow2")
			testenv.Run(t, append(append([]string{"qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2"}, options...), source, image)...)
			testenv.Run(t, "qemu-io", "-f", "qcow2", "-c", "write -P 9 2M 6M", image)
			testenv.Run(t, "qemu-img", "snapshot", "-c", "one", image)
			testenv.Run(t, "qemu-io", "-f", "qcow2", "-c", "write -P 8 4M 1M", image)
			testenv.Run(t, "qemu-img", "snapshot", "-c", "two", image)
			before := map[string]string{"one": snapshotContents(t, image, "one"), "two": snapshotContents(t, image, "two")}
			s := serveQcow2(t, image)
			testenv.Run(t, "qemu-io", "-f", "raw", "-d", "unmap", "-c", "discard 3M 2M", "-c", "write -z 6M 512k", "-c", "write -z -u 7M 512k",
				"-c", "discard 14M 1M", "-c", "write -z 15M 1M", s.URI)
			testenv.Run(t, "fio", "--ioengine=nbd", "--uri="+s.URI, "--name=verify", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1",
				"--verify_state_save=0", "--rw=randwrite", "--bsrange=512-100k", "--verify_interval=512", "--iodepth=8", "--size=1m", "--fsync=50")
			stopAndCompare(t, s, image, served(t, s))
			for name, want := range before {
				sameFiles(t, want, snapshotContents(t, image, name), -1)
			}
			// They can be deleted and gone back to.
			testenv.Run(t, "qemu-img", "snapshot", "-a", "one", image)
			testenv.Run(t, "qemu-img", "snapshot", "-d", "two", image)
			testenv.Run(t, "qemu-img", "snapshot", "-d", "one", image)
			wantSound(t, image, false)
			testenv.Run(t, "qemu-img", "compare", "-f", "raw", "-F", "qcow2", before["one"], image)
		})
	}
}

// dirtyRanges is what QEMU finds in a dirty bitmap.
func dirtyRanges(t *testing.T, image, bitmap string) (ranges [][2]int64) {
	t.Helper()
	socket := filepath.Join(testenv.TempDir(t), "s")
	cmd := exec.Command(testenv.Path(t, "qemu-nbd"), "-r", "-f", "qcow2", "-B", bitmap, "-k", socket, image)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	var out string
	var err error
	ctx := testenv.Context(t)
	if late := testenv.Await(ctx, func() bool {
		out, err = run(ctx, []string{testenv.Path(t, "nbdinfo"), "--json", "--map=qemu:dirty-bitmap:" + bitmap, "nbd+unix:///?socket=" + socket})
		return err == nil || !strings.Contains(out, "connect")
	}); late != nil || err != nil {
		t.Fatalf("nbdinfo: %v, %v: %s", late, err, out)
	}
	var extents []struct{ Offset, Length, Type int64 }
	decode(t, out, &extents)
	for _, e := range extents {
		if e.Type != 0 {
			ranges = append(ranges, [2]int64{e.Offset, e.Length})
		}
	}
	return ranges
}

// TestBitmapsKnowWhatWasWritten: a backup by QEMU's bitmap misses nothing. A
// server that is killed leaves the bitmap marked as one not to trust.
func TestBitmapsKnowWhatWasWritten(t *testing.T) {
	testenv.Require(t, "qemu-nbd", "nbdinfo")
	image := newQcow2(t, "64M")
	testenv.Run(t, "qemu-img", "bitmap", "--add", image, "b0")
	s := serveQcow2(t, image)
	testenv.Run(t, "qemu-io", "-f", "raw", "-d", "unmap", "-c", "write 3M 64k", "-c", "write -z 8M 1M", "-c", "write 20000k 4k", s.URI)
	if err := s.Stop(); err != nil {
		t.Fatal(err)
	}
	got := dirtyRanges(t, image, "b0")
	want := [][2]int64{{3 << 20, 64 << 10}, {8 << 20, 1 << 20}, {20000 << 10 &^ 0xffff, 64 << 10}}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("dirty: got %v, want %v", got, want)
	}
	k := testenv.StartToKill(t, writable(image))
	testenv.Run(t, "qemu-io", "-f", "raw", "-c", "write 30M 64k", "-c", "flush", k.URI)
	k.Kill()
	wantSound(t, image, true)
	if info := testenv.Run(t, "qemu-img", "info", "-f", "qcow2", image); !strings.Contains(info, "in-use") {
		t.Errorf("the bitmap of a killed server is trusted: %s", info)
	}
}
