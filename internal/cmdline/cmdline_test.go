package cmdline_test

import (
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"

	"github.com/vmdiskd/vmdiskd/internal/cmdline"
)

func TestNearestIsAMisspelling(t *testing.T) {
	list := []string{"readonly", "run", "user", "unix", "export", "exportname", "r"}
	for in, want := range map[string]string{
		"readonly": "readonly", "read-only": "readonly", "redaonly": "readonly", "exprt": "export",
		"usr": "user", "unixx": "unix", "x": "", "": "", "zz": "", "something-else": "", "rnu": "", // two replacements are many for three letters
	} {
		if got := cmdline.Nearest(in, list); got != want {
			t.Errorf("Nearest(%q) = %q, want %q", in, got, want)
		}
	}
}

func TestFlagErrorsSayWhatToWrite(t *testing.T) {
	for line, want := range map[string]string{
		"--readnly":    "there is no option --readnly: did you mean --readonly?",
		"--socket=x":   "there is no option --socket: it is --unix here",
		"-k x":         "there is no option -k: it is --unix here",
		"-rk":          "there is no option -k: it is --unix here",
		"-é":           "there is no option -?",
		"--quite-else": "there is no option --quite-else",
		"--secret1":    "there is no option --secret1",
		"--timeout 10": `--timeout: "10": want a time such as 10s or 250ms`,
		"-n x":         `--number: "x": want a whole number`,
		"--readonly=m": `--readonly: "m": want true or false`,
		"--timeout":    "flag needs an argument: --timeout",
	} {
		f := pflag.NewFlagSet("test", pflag.ContinueOnError)
		f.BoolP("readonly", "r", false, "")
		f.IntP("number", "n", 0, "")
		f.Duration("timeout", time.Second, "")
		f.Bool("secret", false, "")
		f.Lookup("secret").Hidden = true
		foreign := map[string]string{"k": "it is --unix here", "socket": "it is --unix here"}
		if err := cmdline.FlagError(f.Parse(strings.Fields(line)), f, foreign); err == nil || err.Error() != want {
			t.Errorf("%s: got %v, want %s", line, err, want)
		}
	}
}
