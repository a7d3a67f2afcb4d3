// Package apparmor_test holds the AppArmor profile to what its compiler takes.
package apparmor_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/test/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// abi describes the kernels that the profile is for. This machine's may have no
// AppArmor.
const abi = "/etc/apparmor.d/abi/3.0"

// compile has the profile compiled, and nothing loaded or kept.
func compile(t *testing.T, profile string) (string, error) {
	t.Helper()
	return testenv.Command(t.Context(), t.TempDir(), "apparmor_parser",
		"--skip-kernel-load", "--skip-cache", "--features-file="+abi, "--Werror=all", profile)
}

func TestProfileCompiles(t *testing.T) {
	profile, err := filepath.Abs("vmdiskd")
	if err != nil {
		t.Fatal(err)
	}
	if out, err := compile(t, profile); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

// TestRulesForMachinesCompile: inside a profile, as libvirt includes them.
func TestRulesForMachinesCompile(t *testing.T) {
	rules, err := os.ReadFile("libvirt-qemu")
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "machine")
	text := "abi <abi/3.0>,\nprofile machine {\n" + string(rules) + "}\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := compile(t, file); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

// TestServiceEntersTheProfile: the profile has no path of its own.
func TestServiceEntersTheProfile(t *testing.T) {
	for _, unit := range []string{"vmdiskd.service", "vmdiskd@.service"} {
		text, err := os.ReadFile(filepath.Join(testenv.Root(), "systemd", unit))
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(string(text), "\nAppArmorProfile=-vmdiskd\n") {
			t.Errorf("%s does not name the profile", unit)
		}
	}
}
