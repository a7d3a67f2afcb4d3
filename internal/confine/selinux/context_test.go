package selinux_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/confine/selinux"
)

func parse(t *testing.T, s string) selinux.Context {
	t.Helper()
	c, err := selinux.Parse(s)
	if err != nil {
		t.Fatalf("Parse(%q): %v", s, err)
	}
	return c
}

func TestContextsAreEqualWhenTheyListTheSameCategories(t *testing.T) {
	const base = "system_u:system_r:svirt_t:"
	for _, tt := range []struct {
		a, b string
		same bool
	}{
		{"s0:c1,c2", "s0:c2,c1", true},
		{"s0:c1,c2,c3", "s0:c1.c3", true},
		{"s0:c1,c1", "s0:c1", true},
		{"s0", "s0-s0", true},
		{"s0:c5", "s0:c5-s0:c5", true},
		{"s0:c63.c64", "s0:c63,c64", true},
		{"s0:c1,c2", "s0:c1", false},
		{"s0:c1,c2", "s0:c1,c2,c3", false},
		{"s0:c1,c2", "s0:c1,c20", false},
		{"s0:c1,c2", "s0", false},
		{"s0:c1,c2", "s1:c1,c2", false},
		{"s0:c1,c2", "s0-s0:c1,c2", false},
	} {
		if got := parse(t, base+tt.a) == parse(t, base+tt.b); got != tt.same {
			t.Errorf("%s equals %s: got %v, want %v", tt.a, tt.b, got, tt.same)
		}
	}
	if parse(t, "u:r:t") == parse(t, "u:r:t:s0") {
		t.Error("a context without a level equals one with s0")
	}
}

func TestContextPrintsAsTheKernelWritesIt(t *testing.T) {
	for in, want := range map[string]string{
		"u:r:t":                    "u:r:t",
		"u:r:t:s0":                 "u:r:t:s0",
		"u:r:t:s0:c7,c1":           "u:r:t:s0:c1,c7",
		"u:r:t:s0:c1,c2":           "u:r:t:s0:c1,c2",
		"u:r:t:s0:c1,c2,c3,c9":     "u:r:t:s0:c1.c3,c9",
		"u:r:t:s0-s0:c0.c1023":     "u:r:t:s0-s0:c0.c1023",
		"u:r:t:s0:c1022,c1023":     "u:r:t:s0:c1022,c1023",
		"u:r:t:s2:c3-s5:c3,c4":     "u:r:t:s2:c3-s5:c3,c4",
		"u:r:t:s0:c63.c65,c100":    "u:r:t:s0:c63.c65,c100",
		"u-1:r.2:t_3:s0:c01,c0002": "u-1:r.2:t_3:s0:c1,c2",
	} {
		if got := parse(t, in).String(); got != want {
			t.Errorf("Parse(%q) prints %q, want %q", in, got, want)
		}
	}
}

func TestTextThatIsNoContextIsRefused(t *testing.T) {
	for _, in := range []string{
		"", "svirt_t", "u:r", "u:r:", ":r:t", "u:r:t:", "u:r:t:c1", "u:r:t:s", "u:r:t:s16", "u:r:t:s-1",
		"u:r:t:s0:", "u:r:t:s0:c", "u:r:t:s0:c1024", "u:r:t:s0:c1,", "u:r:t:s0:,c1", "u:r:t:s0:c5.c1", "u:r:t:s0:c1.c2.c3",
		"u:r:t:s0:c+1", "u:r:t:s0: c1", "u:r:t:s0:c1-s0", "u:r:t:s1-s0", "u:r:t:s0-", "u:r:t:s0-s0-s0", "u:r:t:s0:c1:c2",
		"u:r:t:s0:c99999999999999999999", "u r:r:t:s0", "u:r:t\n:s0", "u:r:\"t\":s0", "-u:r:t", "u:r:t:s0\n", "u:r:t:s0\x00",
		"u:r:t:s0:" + strings.Repeat("c1,", 4096) + "c1",
	} {
		if c, err := selinux.Parse(in); !errors.Is(err, selinux.ErrSyntax) {
			t.Errorf("Parse(%.40q): got %v, %v, want ErrSyntax", in, c, err)
		}
	}
}

func TestWithRangeTakesTheCategoriesOfAMachine(t *testing.T) {
	vm := parse(t, "system_u:system_r:svirt_t:s0:c525,c596")
	got := parse(t, "system_u:system_r:vmdiskd_t:s0").WithRange(vm).String()
	if want := "system_u:system_r:vmdiskd_t:s0:c525,c596"; got != want {
		t.Errorf("WithRange: got %q, want %q", got, want)
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"u:r:t:s0:c1.c5,c9-s1:c0.c1023", "u:r:t", "::::", "u:r:t:s0-s0"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		c, err := selinux.Parse(s)
		if err != nil {
			return
		}
		again, err := selinux.Parse(c.String())
		if err != nil || again != c {
			t.Errorf("Parse(%q) prints %q, which reads as %v, %v", s, c, again, err)
		}
	})
}
