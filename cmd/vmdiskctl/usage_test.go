package main

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

// TestMistakesSayWhatToWrite: no command does anything here.
func TestMistakesSayWhatToWrite(t *testing.T) {
	raw := filepath.Join(t.TempDir(), "raw.img")
	must(t, os.WriteFile(raw, make([]byte, 1<<20), 0o600))
	t.Chdir(t.TempDir())
	for _, tt := range []struct {
		code       int
		line, says string
	}{
		{exitUsage, "exprt", `there is no command "exprt": did you mean export?; see vmdiskctl --help`},
		{exitUsage, "quite-else", `there is no command "quite-else"; see vmdiskctl --help`},
		{exitUsage, "list", `there is no command "list": did you mean device list or export list`},
		{exitUsage, "help nosuch", `there is no command "nosuch"; see vmdiskctl --help`},
		{exitUsage, "help export ad", `there is no command "ad": did you mean add?; see vmdiskctl export --help`},
		{exitUsage, "completion tcsh", `there is no command "tcsh"`},
		{exitUsage, "completion", "a command is missing: see vmdiskctl completion --help"},
		{exitUsage, "export ad a b", "did you mean add?; see vmdiskctl export --help"},
		{exitUsage, "export lst --jsn", "did you mean list?"},
		{exitUsage, "copy", "want SOURCE DESTINATION, got 0 arguments; see vmdiskctl copy --help"},
		{exitUsage, "copy a", "got 1; see"},
		{exitUsage, "status all", "want no argument, got 1;"},
		{exitUsage, "clients a b", "want [EXPORT], got 2 arguments"},
		{exitUsage, "copy --sorce-format=qcow2 a b", "did you mean --source-format?"},
		{exitUsage, "image create -F raw x", "it is --backing-format"},
		{exitUsage, "image info --output=json x", "it is --json"},
		{exitUsage, "resize vm disk -1G", "-1G: disks do not shrink"},
		{exitUsage, "image resize x -1G", "disks do not shrink"},
		{exitUsage, "image resize -- x -1G", "disks do not shrink"},
		{exitUsage, "image create x 10GB", `size "10GB" is not a number of bytes with an optional suffix K, M, G or T`},
		{exitUsage, "image create x +5", `size "+5" is not a number of bytes`},
		{exitUsage, "image resize x ++5", `size "+5" is not a number of bytes`},
		{exitUsage, "image resize x +-5", `size "-5" is not a number of bytes`},
		{exitUsage, "export resize a ++5", `size "+5" is not a number of bytes`},
		{exitUsage, "copy --request-size=+1M a b", `size "+1M" is not a number of bytes`},
		{exitUsage, "copy --request-size=1x a b", "with an optional suffix"},
		{exitUsage, "copy " + raw + " -", "a file of that name is ./-"},
		{exitUsage, "copy - x", "a file of that name is ./-"},
		{exitUsage, "copy " + raw + " nbd:localhost:10809", "NBD URIs begin with nbd://; a file of that name is ./nbd:localhost:10809"},
		{exitUsage, "copy nbd+unix:x " + raw, "begin with nbd+unix://"},
		{exitUsage, "info localhost:10809", "an NBD URI is nbd://host[:port]/export or nbd+unix:///export?socket=PATH; for an image: vmdiskctl image info"},
		{exitUsage, "info disk.img", "vmdiskctl image info"},
		{exitFailed, "image info " + raw, "if it is raw, say so: -f raw"},
		{exitFailed, "copy -f qcow2 " + raw + " x", "if it is raw, say so: -f raw"},
		{exitFailed, "status --socket=" + filepath.Join(t.TempDir(), "no"), "is vmdiskd --config running (systemctl status vmdiskd)?"},
		{exitUsage, "export set a rate=ops=abc", `rate: ops: "abc": want a number`},
		{exitUsage, "export set a rate.ops=abc", `rate: ops: "abc": want a number`},
		{exitUsage, "export add a b --rate ops=abc", `--rate: ops: "abc": want a number`},
		{exitUsage, "export add a b --partition 0", "--partition: want a number from 1"},
		{exitUsage, "export add a b --window 1M --sector-size 4K", "it needs --partition"},
		{exitUsage, "export add a b -f qcow2 --snapshot=", "--snapshot: it is empty"},
		{exitUsage, "export add a b --cache=", "--cache: it is empty"},
		{exitUsage, "export add a b --rate-group=", "--rate-group: it is empty"},
		{exitUsage, "attach --via=qmp a b -f qcow2 --snapshot=", "--snapshot: it is empty"},
		{exitUsage, "export remove a --timeout 10", `--timeout: "10": want a time such as 10s`},
		{exitUsage, "copy --flush=maybe a b", "want true or false"},
	} {
		code, _, stderr := ctl(t, strings.Fields(tt.line)...)
		if code != tt.code || !strings.Contains(stderr, tt.says) {
			t.Errorf("%s: exit code %d, want %d with %s:\n%s", tt.line, code, tt.code, tt.says, stderr)
		}
	}
	if made, err := os.ReadDir("."); err != nil || len(made) > 0 {
		t.Errorf("files were made: %v, %v", made, err)
	}
}

func TestHelpFitsIntoATerminal(t *testing.T) {
	var look func(c *cobra.Command, words []string)
	look = func(c *cobra.Command, words []string) {
		out := want(t, exitDone, append(words, "--help")...)
		for line := range strings.Lines(out) {
			if strings.HasPrefix(line, "Use \"vmdiskctl ") { // cobra's
				continue
			}
			if n := len([]rune(strings.TrimSpace(line))); n > helpColumns {
				t.Errorf("%s --help has a line of %d columns:\n%s", strings.Join(words, " "), n, line)
			}
		}
		for _, sub := range c.Commands() {
			look(sub, append(words[:len(words):len(words)], sub.Name()))
		}
	}
	look(newRoot(os.Stderr), nil)
}

// TestNameOfNoMachineIsLookedForInTheFileToo: and the message says in which.
func TestNameOfNoMachineIsLookedForInTheFileToo(t *testing.T) {
	file := filepath.Join(t.TempDir(), "vmdiskctl.toml")
	must(t, os.WriteFile(file, []byte("[machines.web]\nqmp = \"/run/web\"\n"), 0o600))
	t.Setenv(machinesVariable, file)
	code, _, stderr := ctl(t, "vm", "show", "wbe", "--libvirt-socket="+filepath.Join(t.TempDir(), "no"))
	if code == exitDone || !strings.Contains(stderr, file+` names no machine "wbe"`) {
		t.Errorf("exit code %d: %s", code, stderr)
	}
}

// TestContextThatIsNotOffered: those that are, are named.
func TestContextThatIsNotOffered(t *testing.T) {
	code, _, stderr := ctl(t, "info", "--map=foo", nbdkit(t, "memory", "1M"))
	if want := `does not offer the context "foo"; it offers base:allocation`; code != exitFailed || !strings.Contains(stderr, want) {
		t.Errorf("exit code %d, want %s: %s", code, want, stderr)
	}
}

// TestUnknownAuthorityIsAnswered as the handshake wraps it.
func TestUnknownAuthorityIsAnswered(t *testing.T) {
	err := fmt.Errorf("tls handshake: %w", &tls.CertificateVerificationError{Err: x509.UnknownAuthorityError{}})
	if got := advice(err); !strings.Contains(got, "--tls-certificates=FOLDER") {
		t.Errorf("got %q", got)
	}
}
