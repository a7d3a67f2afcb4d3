package transport_test

import (
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/transport"
)

func TestTokensAreHidden(t *testing.T) {
	token := strings.Repeat("aB", limits.TokenDigits/2)
	const shown = "271a413b" // sha256sum of the token in lower case begins so
	for text, want := range map[string]string{
		"nbd+unix:///web%3F" + token + "?socket=/s":   "nbd+unix:///web%3F" + shown + "?socket=/s",
		"nbd+unix:///web%3f" + token:                  "nbd+unix:///web%3f" + shown,
		"web?" + token + ": no, a?" + token + "?x=/s": "web?" + shown + ": no, a?" + shown + "?x=/s",
		"web?" + token[1:]:                            "web?" + token[1:],
		token:                                         token,
		"":                                            "",
	} {
		if got := transport.HideTokens(text); got != want {
			t.Errorf("%q is shown as %q, want %q", text, got, want)
		}
	}
	for name, want := range map[string][2]string{
		"a?b?" + token:         {"a?b", token},
		"a?" + token[1:]:       {"a?" + token[1:], ""},
		"a?" + token[1:] + "g": {"a?" + token[1:] + "g", ""},
		"":                     {"", ""},
	} {
		if export, got := transport.CutToken(name); export != want[0] || got != want[1] {
			t.Errorf("%q is export %q with token %q", name, export, got)
		}
	}
}
