package libvirtd_test

import (
	"strings"
	"testing"

	libvirt "github.com/digitalocean/go-libvirt"

	"github.com/vmdiskd/vmdiskd/internal/qmp/libvirtd"
	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// TestRunningDomainKeepsTexts by their names until they are ended, and its
// configuration none.
func TestRunningDomainKeepsTexts(t *testing.T) {
	d := &daemon{testenv.StartLibvirt(t)}
	d.boot(t)
	s := d.dial(t)
	ctx := testenv.Context(t)
	dom := wantDomain(t, s)
	for _, tt := range []struct{ name, text, other string }{
		{"a", "", ""}, {"a", "1", ""}, {"b", `<&>'"` + "\n", "1"}, {"a", "2", `<&>'"` + "\n"}, {"a", "", `<&>'"` + "\n"}, {"b", "", ""},
	} {
		if err := s.Keep(ctx, dom, tt.name, tt.text); err != nil {
			t.Fatalf("keep %q as %s: %v", tt.text, tt.name, err)
		}
		other := map[string]string{"a": "b", "b": "a"}[tt.name]
		for name, want := range map[string]string{tt.name: tt.text, other: tt.other} {
			if got, err := s.Kept(ctx, dom, name); err != nil || got != want {
				t.Errorf("%s kept as %q: %s has %q, %v, want %q", tt.name, tt.text, name, got, err, want)
			}
		}
	}
	if err := s.Keep(ctx, dom, "a", "x"); err != nil {
		t.Fatal(err)
	}
	for state, want := range map[string]bool{"": true, "--inactive": false} {
		text := d.Virsh(t, strings.Fields("dumpxml "+state+" --domain="+domainName)...)
		if got := strings.Contains(text, "vmdiskd:kept"); got != want {
			t.Errorf("dumpxml %s has the text: %v, want %v:\n%s", state, got, want, text)
		}
	}
	d.Virsh(t, "destroy", "--domain="+domainName)
	if _, err := s.Kept(ctx, dom, "a"); !libvirtd.HasCode(err, libvirt.ErrOperationInvalid) {
		t.Errorf("of a domain that has ended: %v", err)
	}
	d.Virsh(t, "start", "--paused", "--domain="+domainName)
	if got, err := s.Kept(ctx, wantDomain(t, s), "a"); err != nil || got != "" {
		t.Errorf("after the next start: %q, %v", got, err)
	}
}
