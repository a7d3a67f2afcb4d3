package guest

import (
	"context"
	"flag"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// bootPatience bounds one guest from power on to power off. A boot takes some
// seconds on an idle machine.
const bootPatience = 4 * time.Minute

// kernels are the meta packages whose kernels are booted: the stable one,
// whose nbd driver cannot zero, and the newest of the release.
var kernels = []string{stableKernel, newKernel}

const (
	stableKernel = "linux-image-cloud-amd64"
	newKernel    = "linux-image-6.12-cloud-amd64"
)

// requireGuest skips what cannot be done without QEMU and the tools that
// build a guest.
func requireGuest(t testing.TB) {
	t.Helper()
	if testing.Short() {
		t.Skip("boots a guest: not with -short")
	}
	testenv.Require(t, "qemu-system-x86_64", "busybox", "mke2fs", "e2fsck", "debugfs", "ldd", "xz")
}

// status finds the line by which a scenario ends.
var status = regexp.MustCompile(`(?m)^LAB-RC=(\d+)`)

// boot runs a guest to its end and returns its console and the scenario's
// exit status, which is an error if there is none.
func boot(ctx context.Context, in *initramfs, memoryMiB int, devices ...string) (console string, code int, err error) {
	ctx, cancel := context.WithTimeout(ctx, bootPatience)
	defer cancel()
	return bootUntil(ctx, in, memoryMiB, devices...)
}

// bootUntil is boot with no other bound than ctx.
func bootUntil(ctx context.Context, in *initramfs, memoryMiB int, devices ...string) (console string, code int, err error) {
	dir, err := os.MkdirTemp("", "vmdg")
	if err != nil {
		return "", 0, err
	}
	defer os.RemoveAll(dir)
	cmd, err := command(ctx, in, dir, memoryMiB, devices...)
	if err != nil {
		return "", 0, err
	}
	out, err := cmd.CombinedOutput()
	if err != nil {
		return string(out), 0, fmt.Errorf("qemu: %w", err)
	}
	m := status.FindSubmatch(out)
	if m == nil {
		return string(out), 0, fmt.Errorf("the guest reports no status")
	}
	code, err = strconv.Atoi(string(m[1]))
	return string(out), code, err
}

// mustBoot fails the test, showing the console, unless the scenario succeeds.
func mustBoot(t testing.TB, in *initramfs, memoryMiB int, devices ...string) (console string) {
	t.Helper()
	console, code, err := boot(context.Background(), in, memoryMiB, devices...)
	if err != nil || code != 0 {
		t.Fatalf("status %d, %v; console:\n%s", code, err, console)
	}
	return console
}

var kernelsAll = flag.Bool("kernels.all", false, "boot every kernel also where one is enough for a short run")

// eachKernel runs a scenario with every kernel.
func eachKernel(t *testing.T, scenario func(t *testing.T, k testenv.Kernel)) {
	t.Helper()
	onKernels(t, kernels, scenario)
}

// oneKernel is eachKernel for scenarios that are long and in which kernels
// differ little: those beside meta take -kernels.all.
func oneKernel(t *testing.T, meta string, scenario func(t *testing.T, k testenv.Kernel)) {
	t.Helper()
	on := kernels
	if !*kernelsAll {
		on = []string{meta}
	}
	onKernels(t, on, scenario)
}

func onKernels(t *testing.T, list []string, scenario func(t *testing.T, k testenv.Kernel)) {
	t.Helper()
	requireGuest(t)
	for _, meta := range list {
		t.Run(meta, func(t *testing.T) {
			t.Parallel()
			scenario(t, testenv.CloudKernel(t, meta))
		})
	}
}

// guestServer puts the server under test into the guest, vmdiskd together with
// vmdiskctl, and returns the words
// of the shell that start it, to be followed by options that vmdiskd and
// nbdkit share and by $IMAGE.
func guestServer(t testing.TB, in *initramfs) (start string) {
	t.Helper()
	ctx := testenv.Context(t)
	switch k := testenv.Under(t); k.Program {
	case "":
		for _, name := range []string{"vmdiskd", "vmdiskctl"} {
			if err := in.copyFile(testenv.Binary(t, name), "usr/bin/"+name); err != nil {
				t.Fatal(err)
			}
		}
		return "vmdiskd"
	case "nbdkit":
		const plugin = "/usr/lib/x86_64-linux-gnu/nbdkit/plugins/nbdkit-file-plugin.so"
		if err := in.addPrograms(ctx, "nbdkit", plugin); err != nil {
			t.Fatal(err)
		}
		return "nbdkit file"
	default:
		t.Skipf("%s is not started inside a guest", k.Name)
		return ""
	}
}
