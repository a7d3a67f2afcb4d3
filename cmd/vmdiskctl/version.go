package main

import (
	"fmt"
	"runtime"

	"github.com/spf13/cobra"

	"github.com/vmdiskd/vmdiskd/internal/version"
)

func newVersion() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			_, err := fmt.Fprint(c.OutOrStdout(), versionLine())
			return err
		},
	}
}

// versionLine is what the command version and the flag --version print.
func versionLine() string {
	return fmt.Sprintf("vmdiskctl %s (%s)\n", version.Version, runtime.Version())
}
