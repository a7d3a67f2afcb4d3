package export

import (
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/transport"
)

// TestLabelGrantsWantTheVeryCategories is AU-07 and AU-08: subset, superset,
// no categories and no SELinux are all denied.
func TestLabelGrantsWantTheVeryCategories(t *testing.T) {
	const svirt = "system_u:system_r:svirt_t:"
	whole := Grant{Access: ReadWrite, Label: svirt + "s0:c1,c2,c3"}
	level := Grant{Access: ReadWrite, Level: "s0:c1.c3"}
	types := Grant{Access: ReadWrite, Types: []string{"svirt_tcg_t", "svirt_t"}}
	both := Grant{Access: ReadWrite, Types: types.Types, Level: level.Level}
	for _, tt := range []struct {
		label                      string
		whole, level, types, exact bool
	}{
		{svirt + "s0:c1,c2,c3", true, true, true, true},
		{svirt + "s0:c3,c1.c2", true, true, true, true},
		{svirt + "s0:c1,c2", false, false, true, false},
		{svirt + "s0:c1,c2,c3,c4", false, false, true, false},
		{svirt + "s0:c1,c2,c30", false, false, true, false},
		{svirt + "s0", false, false, true, false},
		{svirt + "s0-s0:c1.c3", false, false, true, false},
		{svirt + "s1:c1.c3", false, false, true, false},
		{"system_u:system_r:svirt_t", false, false, true, false},
		{"system_u:system_r:svirt_tcg_t:s0:c1.c3", false, true, true, true},
		{"system_u:system_r:svirt_t_x:s0:c1.c3", false, true, false, false},
		{"system_u:system_r:user_t:s0:c1.c3", false, true, false, false},
		{"other_u:system_r:svirt_t:s0:c1.c3", false, true, true, true},
		{"", false, false, false, false},
		{"libvirt-1234 (enforce)", false, false, false, false},
		{svirt + "s0:c1.c3\x00", false, false, false, false},
	} {
		p := &transport.Peer{Kind: transport.Unix, UID: 107, Label: tt.label}
		for _, x := range []struct {
			name  string
			grant Grant
			want  bool
		}{{"label", whole, tt.whole}, {"level", level, tt.level}, {"type", types, tt.types}, {"type and level", both, tt.exact}} {
			if got := given([]Grant{x.grant}, p) == ReadWrite; got != x.want {
				t.Errorf("grant by %s, peer %q: admitted %v, want %v", x.name, tt.label, got, x.want)
			}
		}
	}
}

// TestLabelsOfOtherSecurityModulesAreComparedWhole: AppArmor gives one too.
func TestLabelsOfOtherSecurityModulesAreComparedWhole(t *testing.T) {
	g := []Grant{{Access: ReadOnly, Label: "libvirt-1234 (enforce)"}}
	for label, want := range map[string]Access{
		"libvirt-1234 (enforce)": ReadOnly, "libvirt-12345 (enforce)": NoAccess, "libvirt-1234": NoAccess, "": NoAccess,
	} {
		if got := given(g, &transport.Peer{Kind: transport.Unix, Label: label}); got != want {
			t.Errorf("label %q: access %d, want %d", label, got, want)
		}
	}
}

// TestGrantsThatCannotBeReadAdmitNobody: no text makes a rule wider.
func TestGrantsThatCannotBeReadAdmitNobody(t *testing.T) {
	p := &transport.Peer{Kind: transport.Unix, Label: "u:r:t:s0:c1"}
	for _, g := range []Grant{{Level: "c1"}, {Level: "s0:c1,"}, {Level: "s0:c1-s0"}, {Label: "u:r:t:s0:c1,"}, {Types: []string{""}}, {Types: []string{"T"}}} {
		g.Access = ReadWrite
		if got := given([]Grant{g}, p); got != NoAccess {
			t.Errorf("%+v: access %d", g, got)
		}
	}
}
