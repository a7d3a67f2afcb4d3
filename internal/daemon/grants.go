package daemon

import (
	"fmt"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/export"
)

// accesses are the words of the configuration.
var accesses = map[string]export.Access{"none": export.NoAccess, "ro": export.ReadOnly, "rw": export.ReadWrite}

// grantsOf are the grants of an export as the registry wants them.
func grantsOf(list []config.Grant) ([]export.Grant, error) {
	var out []export.Grant
	for i, g := range list {
		access, ok := accesses[g.Access]
		if !ok {
			return nil, fmt.Errorf("grant %d: access %q is none of none, ro, rw", i+1, g.Access)
		}
		x := export.Grant{
			Access: access, UIDs: g.UIDs, GIDs: g.GIDs, CIDs: g.CIDs,
			Label: g.Label, Types: g.SELinuxTypes, Level: g.SELinuxLevel, CertNames: g.CertNames, PSKs: g.PSKs, VMs: g.VMs,
		}
		for _, a := range g.Addresses {
			p, err := config.ParseAddress(a)
			if err != nil {
				return nil, fmt.Errorf("grant %d: %w", i+1, err)
			}
			x.Addresses = append(x.Addresses, p)
		}
		for _, t := range g.Tokens {
			token, err := config.ParseToken(t)
			if err != nil {
				return nil, fmt.Errorf("grant %d: %w", i+1, err)
			}
			x.Tokens = append(x.Tokens, export.Token(token))
		}
		out = append(out, x)
	}
	return out, nil
}
