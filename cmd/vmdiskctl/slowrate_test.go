package main

import (
	"strings"
	"testing"
)

// TestRateWithoutASuffixIsNoted: it is bytes per second, by which a machine
// seems to hang. It is asked for all the same.
func TestRateWithoutASuffixIsNoted(t *testing.T) {
	d := startDaemon(t)
	image := d.image(t, "a")
	for _, tt := range []struct {
		args []string
		note string
	}{
		{[]string{"export", "add", "--rate=50", "a", image}, "50 bytes per second; 50M is 50 MiB/s"},
		{[]string{"export", "set", "a", "rate=65535"}, "65535 bytes"},
		{[]string{"export", "set", "a", "rate.write-bytes=60K"}, "61440 bytes"},
		{[]string{"export", "set", "a", "rate=ops=5"}, ""},
		{[]string{"export", "set", "a", "rate=64K"}, ""},
		{[]string{"export", "set", "a", "rate=none"}, ""},
	} {
		code, _, stderr := ctl(t, tt.args...)
		if code != exitDone || !strings.Contains(stderr, tt.note) || (tt.note == "") != (stderr == "") {
			t.Errorf("%q: exit code %d, %q, want %q", tt.args, code, stderr, tt.note)
		}
	}
}
