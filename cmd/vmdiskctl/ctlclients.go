package main

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/vmdiskd/vmdiskd/internal/control/api"
	control "github.com/vmdiskd/vmdiskd/internal/control/client"
)

func newClients() *cobra.Command {
	f := &ctlFlags{}
	c := f.reading(&cobra.Command{
		Use:   "clients [EXPORT]",
		Short: "List who is connected, or cut somebody off",
		Long: `List who is connected, to one export or at all: from where, how, what was
negotiated and what is in flight.

The clients of an export that is called kick: vmdiskctl clients -- kick`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			return f.call(c.Context(), func(ctx context.Context, cl *control.Client) error {
				var export *string
				if len(args) > 0 {
					export = &args[0]
				}
				list, err := cl.Clients(ctx, export)
				if err != nil {
					return err
				}
				if export != nil && *export != "" && len(list) == 0 {
					if _, err := cl.Export(ctx, *export); err != nil { // a name that nobody has
						return err
					}
				}
				slices.SortFunc(list, func(a, b api.Client) int { return cmp.Compare(a.ID, b.ID) })
				if f.json {
					return writeJSON(c.OutOrStdout(), list)
				}
				return clientTable(list).print(c.OutOrStdout())
			})
		},
		ValidArgsFunction: f.exportNames,
	})
	c.AddCommand(newKick())
	return c
}

func clientTable(list []api.Client) *table {
	t := &table{head: []string{"ID ", "EXPORT", "PEER", "VIA", "SINCE", "ACCESS", "IN FLIGHT ", "REQUESTS ", "RECEIVED ", "SENT ", "NEGOTIATED"}}
	for i := range list {
		c := &list[i]
		access := "ro"
		if c.Writable {
			access = "rw"
		}
		var words []string
		if c.TLS != "" {
			words = append(words, shown(c.TLS))
		}
		if c.Cert != "" {
			words = append(words, "cert="+shown(c.Cert))
		}
		if c.PSK != "" {
			words = append(words, "psk="+shown(c.PSK))
		}
		for _, x := range c.Features {
			words = append(words, shown(x))
		}
		if c.Stalled {
			words = append(words, "STALLED")
		}
		t.add(strconv.FormatUint(c.ID, 10), shown(c.Export), shown(c.Peer), shown(c.Via), stamp(c.Since), access,
			strconv.Itoa(c.InFlight), strconv.FormatUint(c.Requests, 10),
			roundSize(int64(c.BytesIn)), roundSize(int64(c.BytesOut)), strings.Join(words, ","))
	}
	return t
}

func newKick() *cobra.Command {
	f := &ctlFlags{}
	return f.changing(&cobra.Command{
		Use:   "kick ID",
		Short: "Cut a client off",
		Long: `Cut a client off. It may connect again: to keep it out, change the grants of the
export first.`,
		Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			id, err := strconv.ParseUint(args[0], 10, 64)
			if err != nil {
				return usage("%q is not the number of a client", args[0])
			}
			return f.call(c.Context(), func(ctx context.Context, cl *control.Client) error {
				if !f.dryRun {
					if err := cl.Disconnect(ctx, id); err != nil {
						return err
					}
					return f.did(c, map[string]uint64{"id": id}, "client %d is cut off", id)
				}
				all, err := cl.Clients(ctx, nil)
				if err != nil {
					return err
				}
				i := slices.IndexFunc(all, func(x api.Client) bool { return x.ID == id })
				if i < 0 {
					return &api.Error{Code: api.CodeNotFound, Text: fmt.Sprintf("there is no client %d", id)}
				}
				return f.did(c, all[i], "client %d, %s at export %s, would be cut off", id, shown(all[i].Peer), shown(all[i].Export))
			})
		},
	})
}

// did says what was done, or would be: v in JSON, or the line.
func (f *ctlFlags) did(c *cobra.Command, v any, format string, args ...any) (err error) {
	if f.json {
		err = writeJSON(c.OutOrStdout(), v)
	} else {
		_, err = fmt.Fprintf(c.OutOrStdout(), format+"\n", args...)
	}
	if f.dryRun {
		return err
	}
	return reported(err)
}
