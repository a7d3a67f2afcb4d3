package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"slices"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/vmdiskd/vmdiskd/internal/attach"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
	control "github.com/vmdiskd/vmdiskd/internal/control/client"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

func newExport() *cobra.Command {
	return group("export", "Make, look at, change and remove exports of the daemon",
		newExportList(), newExportShow(), newExportAdd(), newExportRemove(), newExportSet(),
		newExportPause(), newExportResume(), newExportResize(), newExportSnapshot(), newExportForget())
}

func newExportList() *cobra.Command {
	f := &ctlFlags{}
	return f.reading(&cobra.Command{
		Use:   "list",
		Short: "List all exports",
		Args:  cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			return f.call(c.Context(), func(ctx context.Context, cl *control.Client) error {
				list, err := cl.Exports(ctx)
				if err != nil {
					return err
				}
				slices.SortFunc(list, func(a, b api.Export) int { return cmp.Compare(a.Name, b.Name) })
				if f.json {
					return writeJSON(c.OutOrStdout(), list)
				}
				return exportTable(list).print(c.OutOrStdout())
			})
		},
	})
}

// access is what clients may do at most.
func access(e *api.Export) string {
	switch {
	case e.State == api.StateFailed:
		return "-"
	case e.Writable:
		return "rw"
	}
	return "ro"
}

// knownSize is a size as it is written, unless the export never had one.
func knownSize(e *api.Export, written string) string {
	if e.State == api.StateFailed && e.Size == 0 {
		return "-"
	}
	return written
}

func exportTable(list []api.Export) *table {
	t := &table{head: []string{"NAME", "STATE", "SIZE ", "ACCESS", "CLIENTS ", "FORMAT", "ORIGIN", "IMAGE"}}
	for i := range list {
		e := &list[i]
		t.add(shown(e.Name), shown(e.State), knownSize(e, roundSize(e.Size)), access(e), strconv.Itoa(e.Clients),
			shown(e.ImageFormat()), shown(e.Origin), shown(e.Image))
	}
	return t
}

func newExportShow() *cobra.Command {
	f := &ctlFlags{}
	return f.reading(&cobra.Command{
		Use:   "show NAME",
		Short: "Show an export",
		Args:  cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			return f.call(c.Context(), func(ctx context.Context, cl *control.Client) error {
				e, err := cl.Export(ctx, args[0])
				if err != nil {
					return err
				}
				return f.printExport(c.OutOrStdout(), &e)
			})
		},
		ValidArgsFunction: f.exportNames,
	})
}

// printExport shows what an export is, and the rest of its configuration as
// JSON has it.
func (f *ctlFlags) printExport(w io.Writer, e *api.Export) error {
	if f.json {
		return writeJSON(w, e)
	}
	p := &printer{w: w}
	p.print("name: %s\nstate: %s\n", shown(e.Name), shown(e.State))
	if e.Error != "" {
		p.print("error: %s\n", visible(e.Error))
	}
	if e.Description != "" {
		p.print("description: %s\n", visible(e.Description))
	}
	p.print("image: %s\nformat: %s\nsize: %s\naccess: %s\nclients: %d\norigin: %s\n", shown(e.Image),
		shown(e.ImageFormat()), knownSize(e, fmt.Sprintf("%d (%s)", e.Size, byteSize(e.Size))), access(e), e.Clients, shown(e.Origin))
	if e.Device != "" {
		p.print("device: %s\n", shown(e.Device))
	}
	if e.Inode != 0 {
		p.print("inode: %d\n", e.Inode)
	}
	settings, err := settings(e.Export)
	if err != nil {
		return err
	}
	for _, s := range settings {
		p.print("%s: %s\n", shown(s.key), visible(s.value))
	}
	p.list("uris", e.URIs)
	return p.err
}

func newExportRemove() *cobra.Command {
	f := &ctlFlags{}
	var force bool
	var timeout time.Duration
	c := f.changing(&cobra.Command{
		Use:   "remove NAME",
		Short: "Remove an export",
		Long: `Remove an export. One that clients have open is refused; with --force nobody can
open it any more at once, and its clients are told to leave. The image stays.`,
		Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			if timeout < 0 || timeout > limits.ControlRemoveMost {
				return usage("--timeout: want 0s to %v", limits.ControlRemoveMost)
			}
			return f.call(c.Context(), func(ctx context.Context, cl *control.Client) error {
				if f.dryRun {
					e, err := cl.Export(ctx, args[0])
					if err != nil {
						return err
					}
					return f.did(c, e, "export %s, with %d clients, would be removed", shown(e.Name), e.Clients)
				}
				if err := cl.Remove(ctx, args[0], force, timeout); err != nil {
					return notRemoved(err, args[0], force)
				}
				return f.did(c, map[string]string{"name": args[0]}, "export %s is removed", shown(args[0]))
			})
		},
		ValidArgsFunction: f.exportNames,
	})
	c.Flags().BoolVar(&force, "force", false, "cut its clients off")
	c.Flags().DurationVar(&timeout, "timeout", 0, "`TIME` after which what is in flight is given up; 0: the daemon's own idea")
	return c
}

// notRemoved adds to the error of a removal what can be done where clients have the
// export open.
func notRemoved(err error, name string, force bool) error {
	if e := control.RefusalOf(err); force || e == nil || e.Code != api.CodeInUse {
		return err
	}
	return fmt.Errorf("%w; vmdiskctl clients %s lists who has it open, --force cuts them off", err, shown(name))
}

// stateCommand changes the state of an export and shows it.
func (f *ctlFlags) stateCommand(use, short, long string, do func(context.Context, *control.Client, string) error) *cobra.Command {
	return f.reading(&cobra.Command{
		Use:   use,
		Short: short,
		Long:  long,
		Args:  cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			return f.call(c.Context(), func(ctx context.Context, cl *control.Client) error {
				if err := do(ctx, cl, args[0]); err != nil {
					return err
				}
				e, err := cl.Export(ctx, args[0])
				if err != nil {
					return err
				}
				return f.did(c, e, "export %s is %s", shown(e.Name), shown(e.State))
			})
		},
		ValidArgsFunction: f.exportNames,
	})
}

func newExportPause() *cobra.Command {
	f := &ctlFlags{}
	var limit time.Duration
	c := f.stateCommand("pause NAME", "Hold back the requests of an export", `Hold back the requests of an export: those in flight are finished and the disk
is flushed, and its clients wait until the export is resumed. An export that
nobody resumes goes on by itself.`,
		func(ctx context.Context, cl *control.Client, name string) error {
			if limit < 0 || limit > limits.PauseLongest {
				return usage("--limit: want 0s to %v", limits.PauseLongest)
			}
			return cl.Pause(ctx, name, limit)
		})
	c.Flags().DurationVar(&limit, "limit", 0, "`TIME` after which it goes on by itself; 0: the longest that the daemon allows")
	return c
}

func newExportResume() *cobra.Command {
	f := &ctlFlags{}
	return f.stateCommand("resume NAME", "Let a paused export go on", "", func(ctx context.Context, cl *control.Client, name string) error {
		return cl.Resume(ctx, name)
	})
}

func newExportResize() *cobra.Command {
	f := &ctlFlags{}
	return f.changing(&cobra.Command{
		Use:   "resize NAME [+]SIZE",
		Short: "Make the disk of an export larger",
		Long: `Make the disk of an export larger while it is in use: to SIZE, or by SIZE after
a plus sign. SIZE is in bytes, or with a suffix K, M, G, T. What is new reads as
zeroes. Disks do not shrink. Clients see the new size when they connect again.`,
		Args: cobra.ExactArgs(2),
		RunE: func(c *cobra.Command, args []string) error {
			want, err := parseResize(args[1])
			if err != nil {
				return err
			}
			return f.call(c.Context(), func(ctx context.Context, cl *control.Client) error {
				e, err := cl.Export(ctx, args[0])
				if err != nil {
					return err
				}
				size, err := want.of(e.Size)
				if err != nil {
					return err
				}
				if f.dryRun {
					return f.did(c, api.Resize{Size: size}, "export %s would grow from %d to %d bytes", shown(e.Name), e.Size, size)
				}
				r := api.Resize{Size: size}
				if want.more && want.n > 0 {
					r = api.Resize{By: want.n} // others may make it larger meanwhile
				}
				if e, err = cl.Resize(ctx, args[0], r); err != nil {
					return err
				}
				return f.did(c, e, "export %s has %d bytes (%s)", shown(e.Name), e.Size, byteSize(e.Size))
			})
		},
		ValidArgsFunction: f.exportNames,
	})
}

func newExportSnapshot() *cobra.Command {
	f := &ctlFlags{}
	return f.changing(&cobra.Command{
		Use:   "snapshot NAME OVERLAY",
		Short: "Freeze the image of an export below a new overlay",
		Long: `Make a new qcow2 image, OVERLAY, above the image of an export, while its
clients wait. What is written from then on goes there, and the image does not
change any more. A guest knows nothing of it: what its file systems have in
memory is not in the image, unless the guest is frozen meanwhile.`,
		Args: cobra.ExactArgs(2),
		RunE: func(c *cobra.Command, args []string) error {
			overlay, err := absolute(args[1])
			if err != nil {
				return err
			}
			s := api.Snapshot{Overlay: overlay}
			return f.call(c.Context(), func(ctx context.Context, cl *control.Client) error {
				if f.dryRun {
					e, err := cl.Export(ctx, args[0])
					if err != nil {
						return err
					}
					return f.did(c, s, "%s would be made above %s, the image of export %s", shown(overlay), shown(e.Image), shown(e.Name))
				}
				e, err := cl.Snapshot(ctx, args[0], s)
				if err != nil {
					return err
				}
				return f.did(c, e, "export %s writes to %s", shown(e.Name), shown(e.Image))
			})
		},
		ValidArgsFunction: func(c *cobra.Command, args []string, word string) ([]string, cobra.ShellCompDirective) {
			if len(args) == 1 {
				return nil, cobra.ShellCompDirectiveDefault
			}
			return f.exportNames(c, args, word)
		},
	})
}

func newExportForget() *cobra.Command {
	f := &ctlFlags{}
	force := false
	c := f.changing(&cobra.Command{
		Use:   "forget NAME",
		Short: "Forget the overlay of an export of the configuration",
		Long: `Forget the overlay that a snapshot has put above the image of an export of the
configuration file, and which the daemon serves in place of that image. The
overlay's file stays. The export serves what the configuration names at once,
and clients of another image are cut off.

Unless the configuration names the overlay itself by now, what guests have
written since the snapshot may be missing from its image: this is refused
without --force. Merge the overlay first, and those of earlier snapshots with
it, as "qemu-img commit -f qcow2 -b IMAGE OVERLAY" does while the export is
removed from the configuration or the daemon is stopped. Without -b, qemu-img
merges the last one only.`,
		Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			return f.call(c.Context(), func(ctx context.Context, cl *control.Client) error {
				out, err := cl.Forget(ctx, args[0], force, f.dryRun)
				if err != nil {
					return err
				}
				will, image := "is", "the configuration does not have it"
				if out.DryRun {
					will = "would be"
				}
				if out.Image != "" {
					image = "the configuration names " + shown(out.Image)
				}
				return f.did(c, out, "overlay %s of export %s %s forgotten: %s", shown(out.Overlay), shown(args[0]), will, image)
			})
		},
		ValidArgsFunction: f.exportNames,
	})
	c.Flags().BoolVar(&force, "force", false, "also if a guest may have written to the overlay")
	return c
}

// absolute is the path that the daemon, which has another working directory,
// knows a file by.
func absolute(path string) (string, error) {
	if path == "" {
		return "", usage("the name of a file is missing")
	}
	return attach.Path(path)
}

// absoluteOrNone is absolute for a path that may be left out.
func absoluteOrNone(path string) (string, error) {
	if path == "" {
		return "", nil
	}
	return attach.Path(path)
}
