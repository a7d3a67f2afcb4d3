package selinux_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/confine/selinux"
)

const label = "system_u:system_r:svirt_t:s0:c1,c2"

// machine is a folder that looks like the kernel's files of a machine with
// SELinux. Writing to a file of it stores what was written.
func machine(t *testing.T, enforce string) selinux.System {
	t.Helper()
	dir := t.TempDir()
	s := selinux.System{FS: filepath.Join(dir, "fs"), Proc: filepath.Join(dir, "proc")}
	for path, text := range map[string]string{
		s.FS + "/enforce":                       enforce,
		s.FS + "/context":                       "",
		s.Proc + "/thread-self/attr/sockcreate": "",
		s.Proc + "/thread-self/attr/fscreate":   "",
	} {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

// replace puts a link to a file of the kernel in place of one of the machine's.
func replace(t *testing.T, path, target string) {
	t.Helper()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(target, path); err != nil {
		t.Fatal(err)
	}
}

func text(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestStateIsReadFromSELinuxFS(t *testing.T) {
	for _, tt := range []struct {
		enforce            string
		enabled, enforcing bool
	}{{"1", true, true}, {"0", true, false}, {"", false, false}, {"2", false, false}} {
		s := machine(t, tt.enforce)
		if s.Enabled() != tt.enabled || s.Enforcing() != tt.enforcing {
			t.Errorf("enforce %q: enabled %v, enforcing %v, want %v, %v", tt.enforce, s.Enabled(), s.Enforcing(), tt.enabled, tt.enforcing)
		}
	}
	none := selinux.System{FS: t.TempDir()}
	if none.Enabled() || none.Enforcing() {
		t.Error("an empty selinuxfs counts as SELinux")
	}
}

func TestLabelIsOnTheThreadWhileCreateRunsOnly(t *testing.T) {
	for name, with := range map[string]func(selinux.System, string, func() error) error{
		"sockcreate": selinux.System.WithSocketLabel,
		"fscreate":   selinux.System.WithFileLabel,
	} {
		s := machine(t, "1")
		path := s.Proc + "/thread-self/attr/" + name
		cause := errors.New("cause")
		during := ""
		err := with(s, label, func() error {
			during = text(t, path)
			return cause
		})
		if !errors.Is(err, cause) {
			t.Errorf("%s: got error %v, want that of create", name, err)
		}
		if during != label {
			t.Errorf("%s while create runs: %q, want %q", name, during, label)
		}
		if after := text(t, path); after != "" {
			t.Errorf("%s afterwards: %q, want nothing", name, after)
		}
		if asked := text(t, s.FS+"/context"); asked != label {
			t.Errorf("%s: the policy was asked about %q, want %q", name, asked, label)
		}
	}
}

func TestNoLabelTouchesNothing(t *testing.T) {
	s := selinux.System{FS: "/nonexistent", Proc: "/nonexistent"}
	ran := false
	if err := s.WithSocketLabel("", func() error { ran = true; return nil }); err != nil || !ran {
		t.Errorf("WithSocketLabel without a label: ran %v, error %v", ran, err)
	}
}

func TestLabelThatCannotBeSetKeepsCreateFromRunning(t *testing.T) {
	for _, tt := range []struct {
		name, label string
		prepare     func(t *testing.T, s *selinux.System)
		want        error
	}{
		{"no SELinux", label, func(_ *testing.T, s *selinux.System) { s.FS = "/nonexistent" }, selinux.ErrDisabled},
		{"no context", "svirt_t", func(*testing.T, *selinux.System) {}, selinux.ErrSyntax},
		{"policy does not know it", label, func(t *testing.T, s *selinux.System) {
			// Text is refused there with EINVAL, as a context in selinuxfs.
			replace(t, s.FS+"/context", "/proc/self/oom_score_adj")
		}, selinux.ErrContext},
		{"policy may not be asked", label, func(t *testing.T, s *selinux.System) { replace(t, s.FS+"/context", "/dev/full") }, syscall.ENOSPC},
		{"attribute is refused", label, func(t *testing.T, s *selinux.System) {
			replace(t, s.Proc+"/thread-self/attr/sockcreate", "/proc/self/oom_score_adj")
		}, syscall.EINVAL},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := machine(t, "1")
			tt.prepare(t, &s)
			err := s.WithSocketLabel(tt.label, func() error {
				t.Error("create ran")
				return nil
			})
			if !errors.Is(err, tt.want) {
				t.Errorf("got %v, want %v", err, tt.want)
			}
		})
	}
}

func TestLabelThatStaysOnTheThreadIsAnError(t *testing.T) {
	s := machine(t, "1")
	path := s.Proc + "/thread-self/attr/sockcreate"
	done := make(chan error)
	go func() { // its thread ends with it
		done <- s.WithSocketLabel(label, func() error { return os.Remove(path) })
	}()
	if err := <-done; !errors.Is(err, os.ErrNotExist) && !errors.Is(err, syscall.ENOENT) {
		t.Errorf("reset of an attribute that is gone: got %v, want ENOENT", err)
	}

	stuck := machine(t, "1")
	path = stuck.Proc + "/thread-self/attr/sockcreate"
	go func() {
		done <- stuck.WithSocketLabel(label, func() error {
			replace(t, path, "/dev/urandom") // takes every write and is never empty
			return nil
		})
	}()
	if err := <-done; err == nil || !strings.Contains(err.Error(), "take sockcreate back") {
		t.Errorf("attribute that stays: got %v", err)
	}
}

func TestErrorsOfThisMachineNameTheReason(t *testing.T) {
	want := selinux.ErrDisabled
	if selinux.Enabled() {
		want = selinux.ErrContext
	}
	if err := selinux.CheckContext("no_u:no_r:no_t:s0"); !errors.Is(err, want) {
		t.Errorf("CheckContext of an unknown context: got %v, want %v", err, want)
	}
	if selinux.Enforcing() {
		t.Error("SELinux is enforcing and not enabled")
	}
}

func TestFileLabelReadsTheAttribute(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	if _, err := selinux.FileLabel(path); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("label of a missing file: got %v, want ENOENT", err)
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	err := syscall.Setxattr(path, "security.selinux", []byte(label+"\x00"), 0)
	if err != nil {
		if _, err := selinux.FileLabel(path); err == nil && !selinux.Enabled() {
			t.Error("a file without a label has one")
		}
		return
	}
	link := path + ".link"
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	if got, err := selinux.FileLabel(path); got != label || err != nil {
		t.Errorf("FileLabel: got %q, %v, want %q", got, err, label)
	}
	if got, err := selinux.FileLabel(link); err == nil && got == label {
		t.Error("the label of a link is that of its target")
	}
}
