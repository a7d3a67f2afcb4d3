package interop

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/nbd/nbdtest"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// needQEMU fails where QEMU's tools for images are missing: without them
// nothing is known about an image.
func needQEMU(t *testing.T) {
	t.Helper()
	for _, name := range []string{"qemu-img", "qemu-io"} {
		if _, err := testenv.Tool(name); err != nil {
			t.Fatal(err)
		}
	}
}

// newQcow2 makes an empty image with the arguments of qemu-img create. Relative
// names are those of its folder.
func newQcow2(t *testing.T, size string, args ...string) (path string) {
	t.Helper()
	vmdiskdOnly(t)
	needQEMU(t)
	dir := testenv.TempDir(t)
	createQcow2(t, dir, "disk.qcow2", size, args...)
	return filepath.Join(dir, "disk.qcow2")
}

func createQcow2(t *testing.T, dir, name, size string, args ...string) {
	t.Helper()
	args = append([]string{"create", "-q", "-f", "qcow2"}, args...)
	args = append(args, name)
	if size != "" {
		args = append(args, size)
	}
	cmd := exec.CommandContext(testenv.Context(t), testenv.Path(t, "qemu-img"), args...)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("qemu-img %q: %v: %s", args, err, out)
	}
}

// writable are the options of a server that writes to an image, and may use
// what lies beside it.
func writable(image string, extra ...string) testenv.Options {
	return testenv.Options{Image: image, Format: "qcow2", Extra: append([]string{"--backing=same-dir"}, extra...)}
}

// serveQcow2 serves an image for writing. When the test ends, the server must
// end well and leave a sound image behind.
func serveQcow2(t *testing.T, image string, extra ...string) *testenv.Server {
	t.Helper()
	t.Cleanup(func() { wantSound(t, image, false) })
	return testenv.Start(t, writable(image, extra...))
}

// wantSound holds an image against qemu-img check; leaks says that clusters
// nobody uses are no fault. The kernel lets go of what an io_uring had locked a
// while after its process.
func wantSound(t *testing.T, image string, leaks bool) {
	t.Helper()
	// Patience is that of the command, not of the test, which may be over.
	ctx, cancel := context.WithTimeout(context.Background(), testenv.Patience)
	defer cancel()
	var out []byte
	var err error
	if late := testenv.Await(ctx, func() bool {
		out, err = exec.CommandContext(ctx, testenv.Path(t, "qemu-img"), "check", "-f", "qcow2", image).CombinedOutput()
		return !bytes.Contains(out, []byte(`"write" lock`))
	}); late != nil {
		t.Errorf("qemu-img check %s: %v: %s", image, late, out)
		return
	}
	const onlyLeaks = 3
	if exit, ok := err.(*exec.ExitError); leaks && ok && exit.ExitCode() == onlyLeaks {
		return
	}
	if err != nil {
		t.Errorf("qemu-img check %s: %v: %s", image, err, out)
	}
}

// stopAndCompare ends the server in good order and holds what QEMU reads from
// the image against a raw file.
func stopAndCompare(t *testing.T, s *testenv.Server, image, want string) {
	t.Helper()
	if err := s.Stop(); err != nil {
		t.Fatal(err)
	}
	testenv.Run(t, "qemu-img", "compare", "-f", "raw", "-F", "qcow2", want, image)
}

// qcow2Flags is what the export of a writable image offers.
const qcow2Flags = wire.HasFlags | wire.SendFlush | wire.SendFUA | wire.SendTrim | wire.SendZero |
	wire.SendDF | wire.CanMultiConn | wire.SendCache | wire.SendFastZero

func TestWritableQcow2SpeaksNBDByTheRules(t *testing.T) {
	vmdiskdOnly(t)
	needQEMU(t)
	const size = nbdtest.MinSize + 25*512
	for _, tt := range []struct {
		name, engine, cache string
		above               bool
	}{
		{"uring", "vmdiskd-uring", "writeback", false},
		{"uring direct", "vmdiskd-uring", "none", false},
		{"pool", "vmdiskd-pool", "writeback", false},
		{"pool direct", "vmdiskd-pool", "none", false},
		{"overlay", "vmdiskd", "writeback", true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := testenv.TempDir(t)
			var args []string
			if tt.above {
				if err := os.WriteFile(filepath.Join(dir, "base.raw"), nil, 0o600); err != nil {
					t.Fatal(err)
				}
				if err := os.Truncate(filepath.Join(dir, "base.raw"), size-1<<20); err != nil {
					t.Fatal(err)
				}
				args = []string{"-b", "base.raw", "-F", "raw"}
			}
			createQcow2(t, dir, "disk.qcow2", fmt.Sprint(int64(size)), args...)
			image := filepath.Join(dir, "disk.qcow2")
			kind, err := testenv.KindByName(tt.engine)
			if err != nil {
				t.Fatal(err)
			}
			o := writable(image, "--cache="+tt.cache)
			o.Export = "disk"
			s, err := kind.Launch(testenv.Context(t), dir, o)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(s.Kill)
			nbdtest.Conformance(t, nbdtest.Server{
				Dial: func(ctx context.Context) (net.Conn, error) {
					var d net.Dialer
					return d.DialContext(ctx, "unix", s.Socket)
				},
				Export: "disk", Size: size,
				Features: nbdtest.Features{Flags: qcow2Flags, Structured: true, Extended: true, Contexts: true, BlockSizes: true},
			})
			if err := s.Stop(); err != nil {
				t.Error(err)
			}
			wantSound(t, image, false)
		})
	}
}
