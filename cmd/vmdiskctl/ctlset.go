package main

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
	control "github.com/vmdiskd/vmdiskd/internal/control/client"
)

// setting is a key of an export's configuration with its value in JSON, or
// the text.
type setting struct{ key, value string }

// settings are those of an export that printExport has no line for.
func settings(x config.Export) ([]setting, error) {
	b, err := json.Marshal(x)
	if err != nil {
		return nil, err
	}
	var all map[string]json.RawMessage
	if err := json.Unmarshal(b, &all); err != nil {
		return nil, err
	}
	for _, shown := range []string{"name", "description", "image", "format"} {
		delete(all, shown)
	}
	var list []setting
	for _, k := range slices.Sorted(maps.Keys(all)) {
		var text string
		if json.Unmarshal(all[k], &text) != nil {
			text = string(all[k])
		}
		list = append(list, setting{k, text})
	}
	return list, nil
}

func newExportSet() *cobra.Command {
	f := &ctlFlags{}
	return f.changing(&cobra.Command{
		Use:   "set NAME KEY=VALUE...",
		Short: "Change an export while it is in use",
		Long: `Change an export while it is in use. What is not named stays.

  description=TEXT
  readonly=true|false
  default=true|false       whether the empty name opens it too
  max-connections=N        0: no bound
  log-requests=true|false
  write-threshold=SIZE     offset in the image's file, as 10G: the first write
                           beyond it is an event (vmdiskctl events), and
                           sets it to 0, which is none
  rate=RATE                10M, or bytes=10M,ops=500,burst=2s, or none; the keys
                           are bytes, read-bytes, write-bytes, ops, read-ops,
                           write-ops, per second, and burst
  rate.KEY=VALUE           one of these, the others stay
  grant=GRANT              rw, ro or none, and facts of the peer: rw,uid=1000;
                           the facts are uid, gid, cid, vm, address, psk,
                           token-sha256, selinux-type, label, selinux-level
                           and cert-name, and the last three take the rest of
                           the text. Or JSON. Several grants make the list, of
                           which the first that fits decides
  grants=JSON              the whole list; [] lets everybody in
  vsock-trust-cid=true|false
                           whether vsock peers write without a lease (vm), and
                           a key or a token (psk, token-sha256)
  faults=JSON              the whole list`,
		Args: cobra.MinimumNArgs(2),
		RunE: func(c *cobra.Command, args []string) error {
			p, err := parsePatch(args[1:])
			if err != nil {
				return err
			}
			if r, err := p.Rate.With(p.RateKeys); err == nil {
				noteSlow(c, r)
			}
			return f.call(c.Context(), func(ctx context.Context, cl *control.Client) error {
				return f.set(ctx, c, cl, args[0], p)
			})
		},
		ValidArgsFunction: func(c *cobra.Command, args []string, word string) ([]string, cobra.ShellCompDirective) {
			if len(args) == 0 {
				return f.exportNames(c, args, word)
			}
			var keys []string
			for _, k := range slices.Sorted(maps.Keys(patchKeys)) {
				keys = append(keys, k+"=")
			}
			return keys, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveNoSpace
		},
	})
}

// set sends p.
func (f *ctlFlags) set(ctx context.Context, c *cobra.Command, cl *control.Client, name string, p api.Patch) error {
	if f.dryRun {
		if _, err := cl.Export(ctx, name); err != nil {
			return err
		}
		b, err := oneLine(p)
		if err != nil {
			return err
		}
		return f.did(c, p, "export %s would be changed: %s", shown(name), b)
	}
	e, err := cl.Patch(ctx, name, p)
	if err != nil {
		return err
	}
	return f.did(c, e, "export %s is changed", shown(name))
}

// patchKeys are those of parsePatch, each with what reads its value.
var patchKeys = map[string]func(p *api.Patch, value string) error{
	"description":     func(p *api.Patch, v string) error { p.Description = &v; return nil },
	"readonly":        func(p *api.Patch, v string) error { return setBool(&p.ReadOnly, v) },
	"default":         func(p *api.Patch, v string) error { return setBool(&p.Default, v) },
	"log-requests":    func(p *api.Patch, v string) error { return setBool(&p.LogRequests, v) },
	"max-connections": func(p *api.Patch, v string) error { return setNumber(&p.Connections, v) },
	"write-threshold": func(p *api.Patch, v string) error { return setSize(&p.WriteThreshold, v) },
	"rate":            func(p *api.Patch, v string) (err error) { p.Rate, err = parseRate(v); return err },
	"vsock-trust-cid": func(p *api.Patch, v string) error { return setBool(&p.TrustCID, v) },
	"grants":          func(p *api.Patch, v string) error { return setJSON(p, "grants", v) },
	"faults":          func(p *api.Patch, v string) error { return setJSON(p, "faults", v) },
	"grant": func(p *api.Patch, v string) error {
		g, err := parseGrant(v)
		if err == nil && p.Grants == nil {
			p.Grants = &[]config.Grant{}
		}
		if err == nil {
			*p.Grants = append(*p.Grants, g)
		}
		return err
	},
}

// parsePatch reads KEY=VALUE.
func parsePatch(args []string) (p api.Patch, err error) {
	seen := map[string]bool{}
	for _, arg := range args {
		key, value, ok := strings.Cut(arg, "=")
		rate, one := strings.CutPrefix(key, "rate.")
		read := patchKeys[key]
		switch {
		case !ok:
			return p, usage("%q is not KEY=VALUE", arg)
		case seen[key] && key != "grant":
			return p, usage("%q is given twice", key)
		case one:
			if p.RateKeys == nil {
				p.RateKeys = map[string]string{}
			}
			p.RateKeys[rate] = value
		case read == nil:
			return p, usage("%q is none of %s, rate.KEY", key, strings.Join(slices.Sorted(maps.Keys(patchKeys)), ", "))
		default:
			if err := read(&p, value); err != nil {
				return p, usage("%s: %v", key, err)
			}
		}
		seen[key] = true
	}
	switch {
	case len(p.RateKeys) > 0 && seen["rate"]:
		return p, usage("rate and rate.KEY exclude each other")
	case seen["grant"] && seen["grants"]:
		return p, usage("grant and grants exclude each other")
	}
	if _, err := p.Rate.With(p.RateKeys); err != nil {
		return p, usageError{err}
	}
	return p, nil
}

func setBool(to **bool, s string) error {
	switch s {
	case "true", "false":
		v := s == "true"
		*to = &v
		return nil
	}
	return usage("%q is neither true nor false", s)
}

func setNumber(to **int, s string) error {
	n, err := strconv.ParseUint(s, 10, 31)
	if err != nil {
		return usage("%q is no number", s)
	}
	v := int(n)
	*to = &v
	return nil
}

func setSize(to **config.Size, s string) error {
	v := new(config.Size)
	if err := v.UnmarshalText([]byte(s)); err != nil {
		return err
	}
	*to = v
	return nil
}

// setJSON reads a value in JSON as strictly as the daemon does.
func setJSON(p *api.Patch, key, value string) error {
	b, err := json.Marshal(map[string]json.RawMessage{key: json.RawMessage(value)})
	if err != nil {
		return usage("it is not JSON")
	}
	return config.DecodeJSON(b, p)
}

// parseRate reads RATE: bytes per second alone, or key=value with commas
// between, or "none".
func parseRate(s string) (*config.Rate, error) {
	r := &config.Rate{}
	if s == "none" {
		return r, nil
	}
	seen := map[string]bool{}
	for _, part := range strings.Split(s, ",") {
		if !strings.Contains(part, "=") {
			part = "bytes=" + part
		}
		key, value, _ := strings.Cut(part, "=")
		if seen[key] {
			return nil, usage("%q is given twice", key)
		}
		seen[key] = true
		if err := r.Set(key, value); err != nil {
			return nil, usageError{err}
		}
	}
	return r, nil
}

// slowRate is the rate, in bytes per second, below which a suffix was forgotten
// more likely than meant: one request of 64 KiB takes longer than a second.
const slowRate = 64 << 10

// noteSlow tells of a rate by which a machine seems to hang.
func noteSlow(c *cobra.Command, r *config.Rate) {
	if r == nil {
		return
	}
	for _, n := range [...]config.Size{r.Bytes, r.ReadBytes, r.WriteBytes} {
		if n > 0 && n < slowRate {
			fmt.Fprintf(c.ErrOrStderr(), "vmdiskctl: note: the rate is %d bytes per second; 50M is 50 MiB/s\n", n)
		}
	}
}

// parseGrant reads GRANT: the access and facts with commas between, or JSON.
func parseGrant(s string) (g config.Grant, err error) {
	if strings.HasPrefix(s, "{") {
		if err := config.DecodeJSON([]byte(s), &g); err != nil {
			return g, usage("grant: %w", err)
		}
		return g, nil
	}
	word, rest, more := strings.Cut(s, ",")
	if word != "rw" && word != "ro" && word != "none" {
		return g, usage("grant: %q is none of rw, ro, none", word)
	}
	g.Access = word
	for more {
		if rest, more, err = takeFact(&g, rest); err != nil {
			return g, err
		}
	}
	return g, nil
}

// takeFact reads the first fact of s into g.
func takeFact(g *config.Grant, s string) (rest string, more bool, err error) {
	key, value, ok := strings.Cut(s, "=")
	if !ok {
		return "", false, usage("grant: %q is not FACT=VALUE", s)
	}
	switch key {
	case "label":
		g.Label = value
		return "", false, nil
	case "selinux-level":
		g.SELinuxLevel = value
		return "", false, nil
	case "cert-name":
		g.CertNames = append(g.CertNames, value)
		return "", false, nil
	}
	value, rest, more = strings.Cut(value, ",")
	texts := map[string]*[]string{
		"address": &g.Addresses, "psk": &g.PSKs, "vm": &g.VMs, "token-sha256": &g.Tokens, "selinux-type": &g.SELinuxTypes,
	}[key]
	if texts != nil {
		*texts = append(*texts, value)
		return rest, more, nil
	}
	list := map[string]*[]uint32{"uid": &g.UIDs, "gid": &g.GIDs, "cid": &g.CIDs}[key]
	if list == nil {
		return "", false, usage("grant: %q is none of uid, gid, cid, vm, address, psk, token-sha256, selinux-type, label, selinux-level, cert-name", key)
	}
	n, err := strconv.ParseUint(value, 10, 32)
	if err != nil {
		return "", false, usage("grant: %s: %q is no number", key, value)
	}
	*list = append(*list, uint32(n))
	return rest, more, nil
}
