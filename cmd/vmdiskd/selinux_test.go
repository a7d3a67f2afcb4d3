package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/confine/selinux"
)

// TestLabelWithoutSELinuxIsRefused also covers machines with SELinux, whose
// policy does not know the context.
func TestLabelWithoutSELinuxIsRefused(t *testing.T) {
	disk := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(disk, make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	want := "SELinux is not enabled"
	if selinux.Enabled() {
		want = "not valid in the loaded SELinux policy"
	}
	for _, option := range []string{"--selinux-label", "--selinux-path-label"} {
		socket := filepath.Join(shortDir(t), "s")
		cmd := program("-U", socket, option, "no_u:no_r:no_t:s0:c1,c2", disk)
		out, err := cmd.CombinedOutput()
		if code := cmd.ProcessState.ExitCode(); code != exitFailed || !strings.Contains(string(out), want) {
			t.Errorf("%s: exit status %d (%v), output %q, want %d and %q", option, code, err, out, exitFailed, want)
		}
		if strings.Contains(string(out), "invalid argument") {
			t.Errorf("%s: output %q speaks of an argument", option, out)
		}
		if _, err := os.Lstat(socket); !os.IsNotExist(err) {
			t.Errorf("%s: a socket without label was left: %v", option, err)
		}
	}
}
