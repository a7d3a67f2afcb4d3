package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/vmdiskd/vmdiskd/cmd/vmdiskctl/internal/copier"
	"github.com/vmdiskd/vmdiskd/internal/attach"
	"github.com/vmdiskd/vmdiskd/internal/backing/open"
	"github.com/vmdiskd/vmdiskd/internal/nbd/client"
	"github.com/vmdiskd/vmdiskd/internal/nbd/kernel"
	"github.com/vmdiskd/vmdiskd/internal/version"
)

// Exit codes.
const (
	exitDone    = 0
	exitFailed  = 1
	exitUsage   = 2
	exitRefused = 3
	exitHalf    = 4 // rolled back incompletely, or done and not reported
)

// usageError is a mistake on the command line.
type usageError struct{ err error }

func (e usageError) Error() string { return e.err.Error() }
func (e usageError) Unwrap() error { return e.err }

func usage(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// unreported is an error of a command that has done its work and cannot say so.
// To take it for undone, and do it again, could do harm.
type unreported struct{ err error }

func (e unreported) Error() string {
	return "it is done, but the report of that is lost: " + e.err.Error()
}
func (e unreported) Unwrap() error { return e.err }

// reported is err, if any, of the report of what is done.
func reported(err error) error {
	if err == nil {
		return nil
	}
	return unreported{err}
}

// interrupted says of an error, if it is one, that a signal has ended the command.
func interrupted(ctx context.Context, err error) error {
	if err == nil || ctx.Err() == nil {
		return err
	}
	return fmt.Errorf("interrupted: %w", err)
}

// run executes one command line and returns its exit code.
func run(ctx context.Context, args []string, stdout io.Writer, stderr *os.File) int {
	begun := false
	text := &helpText{Writer: stdout}
	root := newRoot(stderr)
	root.PersistentPreRun = func(c *cobra.Command, _ []string) {
		begun = true
		if c.Name() != "help" {
			root.SetOut(stdout)
		}
	}
	root.SetArgs(args)
	root.SetOut(text)
	root.SetErr(stderr)
	explainDefaults(root)
	err := interrupted(ctx, root.ExecuteContext(ctx))
	if text.err != nil {
		begun, err = true, text.err
	}
	if err == nil {
		return exitDone
	}
	fmt.Fprintf(stderr, "vmdiskctl: %v%s\n", err, advice(err))
	return exitCode(err, begun)
}

// helpText is standard output for what cobra itself prints, the help and the
// version: it does not tell of every error, as the commands do.
type helpText struct {
	io.Writer
	err error // the first
}

func (t *helpText) Write(p []byte) (int, error) {
	n, err := t.Writer.Write(p)
	t.err = cmp.Or(t.err, err)
	return n, err
}

// exitCode classifies an error; one from before a command began is cobra's
// about the command line.
func exitCode(err error, begun bool) int {
	var refused *client.OptionError
	var found unsound
	var holder *holderError
	switch {
	case errors.As(err, &holder):
		return holder.code
	case errors.As(err, &found):
		return found.code()
	case errors.Is(err, attach.ErrIncomplete), errors.As(err, new(unreported)):
		return exitHalf
	case !begun, errors.As(err, new(usageError)):
		return exitUsage
	case forbidden(err), refusedByMachine(err), errors.Is(err, copier.ErrRefused), errors.Is(err, kernel.ErrRefused), errors.Is(err, kernel.ErrPermission), errors.Is(err, open.ErrDenied), errors.Is(err, client.ErrNoTLS), errors.As(err, &refused) && refused.Refused():
		return exitRefused
	}
	return exitFailed
}

// newRoot has all commands. terminal is where progress is shown.
func newRoot(terminal *os.File) *cobra.Command {
	root := &cobra.Command{
		Use:   "vmdiskctl",
		Short: "Run the disks of a daemon, and look at and copy network block devices",
		Long: `Run the disks of a daemon, and look at and copy network block devices.

The commands status, export, clients, top, events and reload speak to a daemon
on this machine, by its control socket; attach, detach, resize, snapshot, vm and
domain-xml to running machines too, by QEMU's monitor or libvirt. The commands
of device give this kernel a disk as /dev/nbdN.

Disks are named by NBD URIs: nbd://host[:port]/export,
nbd+unix:///export?socket=PATH, nbd+vsock://cid[:port]/export, and nbds for
TLS.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 refused, 4 rolled back
incompletely, or done and not reported.`,
		Version:       version.Version,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          cobra.NoArgs,
		RunE:          missingCommand,
	}
	root.SetVersionTemplate(versionLine())
	root.AddCommand(
		newInfo(),
		newCopy(terminal),
		newImage(terminal),
		newStatus(),
		newExport(),
		newClients(),
		newTop(),
		newEvents(),
		newReload(),
		newAttach(),
		newDetach(),
		newResize(),
		newSnapshot(),
		newVM(),
		newPSK(),
		newToken(),
		newDomainXML(),
		newDevice(),
		newVersion(),
	)
	explain(root)
	return root
}
