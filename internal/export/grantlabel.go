package export

import (
	"slices"

	"github.com/vmdiskd/vmdiskd/internal/confine/selinux"
	"github.com/vmdiskd/vmdiskd/internal/transport"
)

// hasLabel reports whether the peer's security context is as g has it. A peer
// without one, as on a machine without SELinux, has none of the facts.
func (g *Grant) hasLabel(p *transport.Peer) bool {
	if g.Label == "" && len(g.Types) == 0 && g.Level == "" {
		return true
	}
	if p.Label == "" {
		return false
	}
	is, err := selinux.Parse(p.Label)
	if err != nil {
		// Other security modules have labels of other forms.
		return len(g.Types) == 0 && g.Level == "" && g.Label == p.Label
	}
	switch {
	case g.Label != "" && !sameContext(is, g.Label),
		len(g.Types) > 0 && !slices.Contains(g.Types, is.Type),
		g.Level != "" && !sameLevel(is, g.Level):
		return false
	}
	return true
}

func sameContext(is selinux.Context, want string) bool {
	c, err := selinux.Parse(want)
	return err == nil && c == is
}

// sameLevel demands the very range: neither fewer categories nor more.
func sameLevel(is selinux.Context, want string) bool {
	low, high, err := selinux.ParseRange(want)
	return err == nil && is.MLS && low == is.Low && high == is.High
}
