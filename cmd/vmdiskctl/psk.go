package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/transport/psk"
)

func newPSK() *cobra.Command {
	return group("psk", "Make pre-shared keys for TLS", newPSKNew(), newPSKList())
}

func newPSKNew() *cobra.Command {
	var only bool
	var bytes int
	c := &cobra.Command{
		Use:   "new IDENTITY FILE",
		Short: "Put a new random key into a key file",
		Long: `Put a new random key for an identity, one for each machine, into a key file,
which is made if it is not there. Only its owner may read it.

A key that the identity has stays beside the new one, so that its machine can
change over; --only takes it away. A daemon reads the file again on SIGHUP. The
key is not printed: a machine's own file is made with new and another FILE, or
from the line of its identity.`,
		Args: cobra.ExactArgs(2),
		RunE: func(c *cobra.Command, args []string) error {
			if err := psk.CheckIdentity(args[0]); err != nil {
				return usageError{err}
			}
			if bytes < limits.MinPSK || bytes > limits.MaxPSK {
				return usage("--bytes: want %d to %d", limits.MinPSK, limits.MaxPSK)
			}
			return psk.Add(args[1], args[0], bytes, only)
		},
	}
	c.Flags().BoolVar(&only, "only", false, "take away the other keys of the identity")
	c.Flags().IntVar(&bytes, "bytes", limits.StrongPSK, "`LENGTH` of the key")
	return c
}

func newPSKList() *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:   "list FILE",
		Short: "List the identities of a key file",
		Args:  cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			list, err := psk.List(args[0])
			if err != nil {
				return err
			}
			if asJSON {
				return writeJSON(c.OutOrStdout(), list)
			}
			t := &table{head: []string{"IDENTITY", "KEY BYTES"}}
			for _, x := range list {
				t.add(shown(x.Identity), strings.Trim(fmt.Sprint(x.Bytes), "[]"))
			}
			return t.print(c.OutOrStdout())
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "write JSON")
	return c
}
