package main

import (
	"fmt"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"
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
func versionLine() string { return fmt.Sprintf("vmdiskctl %s (%s)\n", version(), runtime.Version()) }

// stamped is the version of a package, set by the linker.
var stamped string

// version is that of the package, or of the module, which the toolchain takes
// from the tag.
func version() string {
	if stamped != "" {
		return stamped
	}
	if b, ok := debug.ReadBuildInfo(); ok && b.Main.Version != "" {
		return b.Main.Version
	}
	return "(devel)"
}
