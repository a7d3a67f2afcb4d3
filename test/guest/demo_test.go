package guest

import (
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// TestDemo: what `make demo` shows happens, while the guest writes and reads
// back without an error.
func TestDemo(t *testing.T) {
	requireGuest(t)
	if k := testenv.Under(t); k.Program != "" {
		t.Skipf("is about vmdiskd, not %s", k.Name)
	}
	testenv.Require(t, "depmod")
	testenv.CloudKernel(t, stableKernel)
	bin := filepath.Dir(testenv.Binary(t, "vmdiskd"))
	testenv.Binary(t, "vmdiskctl")
	cmd := exec.CommandContext(testenv.Context(t), filepath.Join(testenv.Root(), "scripts/demo.sh"), bin)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v:\n%s", err, out)
	}
	said := string(out)
	for _, want := range []string{
		"guest: the disk has 64 MiB", "guest: the disk has 96 MiB", "vmdiskd has ended",
		"guest: the disk is gone", "This line was written by the guest.", "without an error",
	} {
		_, rest, ok := strings.Cut(said, want)
		if !ok {
			t.Errorf("the demo does not show %q in its place:\n%s", want, out)
		}
		said = rest
	}
}
