// Package interop runs the server against the tools that others use with it:
// libnbd, QEMU, fio, nbd-client and systemd, as they are packaged.
// VMDISKD_TEST_SERVER=nbdkit runs the same tests against nbdkit.
package interop

import (
	"context"
	"encoding/json"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/nbd/client"
	"github.com/vmdiskd/vmdiskd/test/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// diskSize is the size of the images that are fully written.
const diskSize = 16 << 20

// serve starts the server under test with an image of the pattern.
func serve(t *testing.T, o testenv.Options) *testenv.Server {
	t.Helper()
	if o.Image == "" {
		o.Image = testenv.PatternImage(t, diskSize)
	}
	return testenv.Start(t, o)
}

// dial opens the default export of a server with this module's client.
func dial(t *testing.T, s *testenv.Server) *client.Client {
	t.Helper()
	ctx := testenv.Context(t)
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", s.Socket)
	if err != nil {
		t.Fatal(err)
	}
	c, err := client.New(ctx, conn, client.Options{Contexts: []string{"base:allocation"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// decode reads a tool's JSON into v.
func decode(t *testing.T, text string, v any) {
	t.Helper()
	if err := json.Unmarshal([]byte(text), v); err != nil {
		t.Fatalf("%v in %q", err, text)
	}
}

// sameFiles compares the first n bytes of two files, n < 0 for all of them.
func sameFiles(t *testing.T, a, b string, n int64) {
	t.Helper()
	args := []string{a, b}
	if n >= 0 {
		args = append([]string{"-n", strconv.FormatInt(n, 10)}, args...)
	}
	if out, err := exec.CommandContext(testenv.Context(t), "cmp", args...).CombinedOutput(); err != nil {
		t.Fatalf("cmp: %v: %s", err, out)
	}
}

// vmdiskdOnly skips what a reference server cannot be asked for.
func vmdiskdOnly(t *testing.T) {
	t.Helper()
	if k := testenv.Under(t); k.Program != "" {
		t.Skipf("is about vmdiskd, not %s", k.Name)
	}
}

// command returns the argv of the server under test with arguments of the
// form that vmdiskd and nbdkit share, the image last.
func command(t *testing.T, image string, args ...string) []string {
	t.Helper()
	switch k := testenv.Under(t); k.Program {
	case "":
		return append(append([]string{testenv.Binary(t, "vmdiskd")}, args...), image)
	case "nbdkit":
		return append(append([]string{testenv.Path(t, "nbdkit")}, args...), "file", image)
	default:
		t.Skipf("%s has no such command line", k.Name)
		return nil
	}
}

// run runs a program with an environment and returns all that it printed.
func run(ctx context.Context, argv []string, env ...string) (string, error) {
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Env = append(os.Environ(), env...)
	out, err := cmd.CombinedOutput()
	return strings.TrimSpace(string(out)), err
}
