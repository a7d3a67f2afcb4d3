// Package systemd_test holds the units to what systemd and the security of the
// service demand.
package systemd_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/test/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// installed copies the units, and those of the examples, into a folder, with a
// program that exists where they name ours and with names for the templates, as systemd-analyze
// wants them.
func installed(t *testing.T) string {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	units, err := filepath.Glob("*.*")
	if err != nil {
		t.Fatal(err)
	}
	examples, err := filepath.Glob("../packaging/examples/*.service")
	if err != nil || len(examples) == 0 {
		t.Fatalf("examples %q, error %v", examples, err)
	}
	dir := t.TempDir()
	for _, name := range append(units, examples...) {
		if !isUnit(name) {
			continue
		}
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		said := strings.NewReplacer("/usr/sbin/vmdiskd", self, "/usr/bin/vmdiskctl", self).Replace(string(text))
		to := filepath.Join(dir, strings.Replace(filepath.Base(name), "@.", "@vm1.", 1))
		if err := os.WriteFile(to, []byte(said), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func isUnit(name string) bool {
	switch filepath.Ext(name) {
	case ".service", ".socket", ".slice":
		return true
	}
	return false
}

func TestUnitsAreRight(t *testing.T) {
	dir := installed(t)
	list, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil || len(list) < 5 {
		t.Fatalf("units %q, error %v", list, err)
	}
	cmd := exec.Command("systemd-analyze", append([]string{"verify", "--man=no", "--recursive-errors=one"}, list...)...)
	cmd.Env = append(os.Environ(), "SYSTEMD_UNIT_PATH="+dir+":")
	out, err := cmd.CombinedOutput()
	if err != nil || len(out) > 0 {
		t.Errorf("systemd-analyze verify: %v\n%s", err, out)
	}
}

// TestReloadOfAUnitLooksAtTheFileFirst: the signal cannot fail, a check of the file
// that the service is started with can.
func TestReloadOfAUnitLooksAtTheFileFirst(t *testing.T) {
	for _, name := range []string{"vmdiskd.service", "vmdiskd@.service"} {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		var file string
		var reload []string
		for line := range strings.Lines(string(text)) {
			key, value, _ := strings.Cut(strings.TrimSpace(line), "=")
			switch key {
			case "ExecStart":
				_, file, _ = strings.Cut(value, "--config ")
			case "ExecReload":
				reload = append(reload, value)
			}
		}
		if want := "/usr/sbin/vmdiskd --config " + file + " --check"; len(reload) != 2 || reload[0] != want || !strings.Contains(reload[1], "kill -HUP") {
			t.Errorf("%s: a reload does %q, want %q and the signal", name, reload, want)
		}
	}
}

// TestBootWithSwapHasNoRing: the server of swap space is before all that waits
// for swap space, such as a /tmp of memory, and waits for none of that.
func TestBootWithSwapHasNoRing(t *testing.T) {
	dir := installed(t)
	wants := map[string]string{"multi-user.target": "vmdiskd-swap@vm1.service", "local-fs.target": "tmp.mount"}
	err := os.WriteFile(filepath.Join(dir, "tmp.mount"), []byte("[Unit]\nDefaultDependencies=no\nConflicts=umount.target\n"+
		"Before=local-fs.target umount.target\nAfter=swap.target\n[Mount]\nWhat=tmpfs\nWhere=/tmp\nType=tmpfs\n"), 0o600)
	for target, unit := range wants {
		folder := filepath.Join(dir, target+".wants")
		err = errors.Join(err, os.Mkdir(folder, 0o700), os.Symlink("../"+unit, filepath.Join(folder, unit)))
	}
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("systemd-analyze", "verify", "--man=no", "--recursive-errors=yes", "multi-user.target")
	cmd.Env = append(os.Environ(), "SYSTEMD_UNIT_PATH="+dir+":")
	if out, _ := cmd.CombinedOutput(); strings.Contains(string(out), "cycle") { // other units of the machine have faults of their own
		t.Errorf("systemd-analyze verify:\n%s", out)
	}
}

// TestSwapGoesBeforeItsServer: at a shutdown, on each device that the kernel's client
// makes by itself, of which nbds_max has 16.
func TestSwapGoesBeforeItsServer(t *testing.T) {
	text, err := os.ReadFile("vmdiskd-swap@.service")
	if err != nil {
		t.Fatal(err)
	}
	var before []string
	for line := range strings.Lines(string(text)) {
		if units, ok := strings.CutPrefix(line, "Before="); ok {
			before = append(before, strings.Fields(units)...)
		}
	}
	for i := range 16 {
		if unit := fmt.Sprintf("dev-nbd%d.swap", i); !slices.Contains(before, unit) {
			t.Errorf("Before= has no %s", unit)
		}
	}
}

// TestStartsHaveTheirTime: storage that is silent takes three of the times that it
// has, and what else a start does fits in, whatever systemd allows by itself.
func TestStartsHaveTheirTime(t *testing.T) {
	const rest = 15 * time.Second
	for name := range exposure {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		_, said, found := strings.Cut(string(text), "\nTimeoutStartSec=")
		said, _, _ = strings.Cut(said, "\n")
		limit, err := time.ParseDuration(said)
		if !found || err != nil || limit < 3*limits.ImageAnswers+rest {
			t.Errorf("%s: TimeoutStartSec=%s (%v), want %v at least", name, said, err, 3*limits.ImageAnswers+rest)
		}
	}
}

// TestStopsHaveTheirTime: what changes the service and what its clients wait for is
// given up, and the disks of others are flushed, before systemd kills it.
func TestStopsHaveTheirTime(t *testing.T) {
	const rest = 5 * time.Second
	const want = limits.EndChanges + limits.Drain + limits.Sever + limits.LastClose + limits.Sever + rest
	for _, name := range []string{"vmdiskd.service", "vmdiskd@.service"} {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		_, said, found := strings.Cut(string(text), "\nTimeoutStopSec=")
		said, _, _ = strings.Cut(said, "\n")
		if limit, err := time.ParseDuration(said); !found || err != nil || limit < want {
			t.Errorf("%s: TimeoutStopSec=%s (%v), want %v at least", name, said, err, want)
		}
	}
}

// exposure is the most that systemd-analyze may count for a unit, in tenths.
var exposure = map[string]string{
	"vmdiskd@.service":      "5",
	"vmdiskd.service":       "12",
	"vmdiskd-swap@.service": "18",
}

func TestUnitsAreConfined(t *testing.T) {
	services, err := filepath.Glob("*.service")
	if err != nil || len(services) != len(exposure) {
		t.Fatalf("services %q (%v), want those of the table: %v", services, err, exposure)
	}
	dir := installed(t)
	for _, name := range services {
		t.Run(name, func(t *testing.T) {
			unit := filepath.Join(dir, strings.Replace(name, "@.", "@vm1.", 1))
			out, err := exec.Command("systemd-analyze", "security", "--no-pager", "--offline=true", "--threshold="+exposure[name], unit).CombinedOutput()
			if err != nil {
				t.Errorf("exposure above %s tenths: %v\n%s", exposure[name], err, out)
			}
		})
	}
}

// TestThresholdIsObeyed shows that the tool of the test above can say no.
func TestThresholdIsObeyed(t *testing.T) {
	unit := filepath.Join(t.TempDir(), "open.service")
	if err := os.WriteFile(unit, []byte("[Service]\nExecStart=/bin/true\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := exec.Command("systemd-analyze", "security", "--no-pager", "--offline=true", "--threshold=12", unit).Run(); err == nil {
		t.Error("a unit without any confinement passes")
	}
}

func TestConfigurationOfThePackageIsValid(t *testing.T) {
	file := filepath.Join("..", "packaging", "etc", "vmdiskd.toml")
	out, err := exec.Command(testenv.Binary(t, "vmdiskd"), "--config", file, "--check").CombinedOutput()
	if err != nil {
		t.Errorf("vmdiskd --check: %v\n%s", err, out)
	}
}
