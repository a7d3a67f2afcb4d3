package main

import (
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/store"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

func newImageSnapshot() *cobra.Command {
	c := &cobra.Command{
		Use:   "snapshot",
		Short: "Look at the snapshots within an image",
		Args:  cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			return usage("a command is missing: see vmdiskctl image %s --help", c.Name())
		},
	}
	f := &imageFlags{}
	list := &cobra.Command{
		Use:   "list FILE",
		Short: "List the snapshots within a qcow2 image",
		Args:  cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			if err := f.check(); err != nil {
				return err
			}
			if f.format != formatQcow2 {
				return usage("images of format %q have no snapshots", f.format)
			}
			return withImage(c.Context(), args[0], true, func(st store.Store) error {
				h, err := qcow2.ReadHeader(c.Context(), st)
				if err != nil {
					return err
				}
				list, _, err := qcow2.ReadSnapshots(c.Context(), st, h, limits.CheckTable)
				if err != nil {
					return err
				}
				return f.printSnapshots(c.OutOrStdout(), reportSnapshots(list))
			})
		},
	}
	f.add(list)
	c.AddCommand(list)
	return c
}

// snapshotReport has the names of qemu-img info.
type snapshotReport struct {
	ID          string  `json:"id"`
	Name        string  `json:"name"`
	VMStateSize uint64  `json:"vm-state-size"`
	DateSec     uint32  `json:"date-sec"`
	DateNsec    uint32  `json:"date-nsec"`
	ClockSec    uint64  `json:"vm-clock-sec"`
	ClockNsec   uint64  `json:"vm-clock-nsec"`
	ICount      *uint64 `json:"icount,omitempty"`
	DiskSize    uint64  `json:"disk-size,omitempty"`
}

func reportSnapshots(list []format.Snapshot) []snapshotReport {
	const second = uint64(time.Second)
	reports := make([]snapshotReport, len(list))
	for i := range list {
		s := &list[i]
		reports[i] = snapshotReport{
			ID: s.ID, Name: s.Name, VMStateSize: s.VMStateSize, DateSec: s.Seconds, DateNsec: s.Nanoseconds,
			ClockSec: s.VMClock / second, ClockNsec: s.VMClock % second, DiskSize: s.DiskSize,
		}
		if s.HasICount() {
			reports[i].ICount = &s.ICount
		}
	}
	return reports
}

func (f *imageFlags) printSnapshots(w io.Writer, list []snapshotReport) error {
	if f.json {
		return writeJSON(w, list)
	}
	p := &printer{w: w}
	p.snapshots("", list)
	return p.err
}

// snapshots prints a line for each.
func (p *printer) snapshots(indent string, list []snapshotReport) {
	for _, s := range list {
		taken := time.Unix(int64(s.DateSec), 0).UTC().Format(time.RFC3339)
		p.print("%s\n", indent+fmt.Sprintf("%-10s %-20s %s", printable(s.ID), printable(s.Name), taken))
	}
}
