package config

import (
	"github.com/vmdiskd/vmdiskd/internal/confine/selinux"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// context demands the text of an SELinux context, or none. What the policy
// knows is asked when a socket gets it.
func (c checker) context(key, s string) {
	if s == "" || !c.text(key, s, limits.SecurityLabel, "") {
		return
	}
	if _, err := selinux.Parse(s); err != nil {
		c.fail("%s: %q is %v", key, cut(s), err)
	}
}

// hasLabel tells whether g names a fact of a security context.
func (g *Grant) hasLabel() bool {
	return g.Label != "" || len(g.SELinuxTypes) > 0 || g.SELinuxLevel != ""
}

// checkLabel looks at those facts. A whole label may be of another security
// module, and have another form.
func (g *Grant) checkLabel(k checker) {
	k.text("label", g.Label, limits.SecurityLabel, "")
	k.most("selinux-type", len(g.SELinuxTypes), limits.GrantTypes)
	for _, name := range g.SELinuxTypes {
		if !selinux.ValidName(name) {
			k.fail("selinux-type: %q is no name of a type", cut(name))
		}
	}
	if g.SELinuxLevel == "" || !k.text("selinux-level", g.SELinuxLevel, limits.SecurityLabel, "") {
		return
	}
	if _, _, err := selinux.ParseRange(g.SELinuxLevel); err != nil {
		k.fail("selinux-level: %q: %v", cut(g.SELinuxLevel), err)
	}
}
