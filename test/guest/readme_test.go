package guest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// quickStart runs what README.md prints, in folders /run and /srv of its own:
// QEMU with the printed options, the commands of the one terminal, and when the
// service answers those of the other. The words in capitals are put in.
const quickStart = `
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /srv
await() { until eval "$1"; do sleep 0.1; done; }
QEMU -accel tcg -cpu max -smp 1 -m 256 -nodefaults -display none -serial file:DIR/console \
	-kernel DIR/kernel -initrd DIR/initrd -append 'console=ttyS0 quiet panic=-1' \
	$(cat DIR/machine) >&2 &
await 'grep -q "guest: ready" DIR/console 2>/dev/null'
sh -eux DIR/service &
await 'vmdiskctl status >/dev/null 2>&1'
sh -eux DIR/attach
await 'grep -q "1 rounds written and read back" DIR/console'
vmdiskctl export list >&2
head -n 1 /srv/disk.img | tr -d '\0'
`

// TestQuickStartOfTheReadme: the commands, as they are printed, give a running
// guest a disk that it uses.
func TestQuickStartOfTheReadme(t *testing.T) {
	requireGuest(t)
	if k := testenv.Under(t); k.Program != "" {
		t.Skipf("is about vmdiskd, not %s", k.Name)
	}
	testenv.Require(t, "unshare")
	dir := testenv.TempDir(t)
	for _, name := range []string{"machine", "service", "attach"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(testenv.Printed(t, name)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	testenv.CloudKernel(t, stableKernel)
	if err := WriteWatcher(testenv.Context(t), dir); err != nil {
		t.Fatal(err)
	}
	script := strings.NewReplacer("DIR", dir, "QEMU", testenv.Path(t, "qemu-system-x86_64")).Replace(quickStart)
	out, err := inNamespace(t, script)
	if want := "This line was written by the guest.\n"; err != nil || !strings.HasSuffix(out, want) {
		console, _ := os.ReadFile(filepath.Join(dir, "console"))
		t.Errorf("%v, got %q, want %q at the end; console:\n%s", err, out, want, console)
	}
}

// inNamespace runs a script as root of namespaces that end with it, in the
// module's folder, and returns what it prints.
func inNamespace(t *testing.T, script string) (string, error) {
	t.Helper()
	args := []string{"--mount", "--pid", "--fork", "--kill-child"}
	if os.Getuid() != 0 {
		args = append(args, "--user", "--map-root-user")
	}
	if _, err := testenv.Try(t, append([]string{"unshare"}, append(args, "true")...)...); err != nil {
		t.Skipf("needs namespaces of its own: %v", err)
	}
	cmd := exec.CommandContext(testenv.Context(t), testenv.Path(t, "unshare"), append(args, "sh", "-eu", "-c", script)...)
	cmd.Dir = testenv.Root()
	bin := filepath.Dir(testenv.Binary(t, "vmdiskd"))
	testenv.Binary(t, "vmdiskctl")
	cmd.Env = append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH"))
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("%w\n%s", err, stderr.String())
	}
	return string(out), err
}
