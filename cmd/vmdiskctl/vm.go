package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/vmdiskd/vmdiskd/internal/attach"
	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/qmp"
	"github.com/vmdiskd/vmdiskd/internal/transport"
)

func newVM() *cobra.Command {
	return group("vm", "Look at machines", newVMList(), newVMShow(), newVMLease())
}

// vmRow is a machine in a list.
type vmRow struct {
	VM    string `json:"vm"`
	UUID  string `json:"uuid,omitempty"`
	State string `json:"state,omitempty"`
	QEMU  string `json:"qemu,omitempty"`
	Error string `json:"error,omitempty"`
}

func newVMList() *cobra.Command {
	f := &vmFlags{}
	c := &cobra.Command{
		Use:   "list [SOCKET|FOLDER]...",
		Short: "List machines",
		Long: `List machines: those with the QMP sockets that are named, or lie in the folders
that are, or without any the domains of libvirt. A machine that cannot be asked
hides no other, nor does a name without a file, which makes the list a failure.`,
		RunE: func(c *cobra.Command, args []string) error {
			rows, err := f.list(c.Context(), args)
			if rows == nil {
				return plugError(err)
			}
			return cmp.Or(f.printList(c.OutOrStdout(), rows), plugError(err))
		},
	}
	c.Flags().BoolVar(&f.json, "json", false, "write JSON")
	f.libvirt.add(c)
	return c
}

func (f *vmFlags) printList(w io.Writer, rows []vmRow) error {
	if f.json {
		return writeJSON(w, rows)
	}
	t := &table{head: []string{"VM", "STATE", "QEMU", "UUID"}}
	for _, r := range rows {
		if r.Error != "" {
			r.State = "error: " + visible(r.Error)
		}
		t.add(shown(r.VM), r.State, visible(r.QEMU), r.UUID)
	}
	return t.print(w)
}

// list has a row for each machine, and with the first error of a path one for each
// path that has such an error. With any other error there are no rows.
func (f *vmFlags) list(ctx context.Context, paths []string) (rows []vmRow, wrong error) {
	if len(paths) == 0 {
		return f.libvirt.list(ctx)
	}
	rows = []vmRow{}
	for _, path := range paths {
		sockets, err := socketsAt(path)
		if len(rows)+len(sockets) > limits.LibvirtDomains {
			return nil, fmt.Errorf("more than %d sockets", limits.LibvirtDomains)
		}
		for _, s := range sockets {
			rows = append(rows, rowOf(ctx, s))
		}
		if err != nil {
			rows, wrong = append(rows, vmRow{VM: path, Error: err.Error()}), cmp.Or(wrong, err)
		}
	}
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	return rows, wrong
}

// socketsAt is the socket, or those in the folder. With an error, they are some of
// them.
func socketsAt(path string) ([]string, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !info.IsDir() {
		return []string{path}, nil
	}
	entries, err := os.ReadDir(path)
	var all []string
	for _, e := range entries {
		if e.Type()&fs.ModeSocket != 0 {
			all = append(all, filepath.Join(path, e.Name()))
		}
	}
	return all, err
}

// rowOf asks a machine for its state.
func rowOf(ctx context.Context, path string) vmRow {
	r := vmRow{VM: path}
	m, err := qmp.Dial(ctx, path)
	if err != nil {
		r.Error = err.Error()
		return r
	}
	defer m.Close()
	s, err := qmp.QueryStatus(ctx, m)
	if err != nil {
		r.Error = err.Error()
		return r
	}
	r.State, r.QEMU = s.State, versionOf(m)
	return r
}

func versionOf(m *qmp.Monitor) string {
	v := m.Version()
	return fmt.Sprintf("%d.%d.%d", v.Major, v.Minor, v.Micro)
}

// list are libvirt's domains.
func (f *libvirtFlags) list(ctx context.Context) ([]vmRow, error) {
	s, err := f.dial(ctx)
	if err != nil {
		return nil, err
	}
	defer s.Close()
	all, err := s.Domains(ctx)
	if err != nil {
		return nil, err
	}
	rows := []vmRow{}
	for _, d := range all {
		r := vmRow{VM: d.Name, UUID: d.UUID}
		if r.State, err = s.State(ctx, d); err != nil {
			r.Error = err.Error() // it may be gone
		}
		rows = append(rows, r)
	}
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	return rows, nil
}

// vmShown is a machine with its disks.
type vmShown struct {
	vmRow
	Disks []vmDisk `json:"disks"`
	PCI   int      `json:"free-pci-places"`
	SCSI  int      `json:"scsi-controllers-with-room"`
}

// vmDisk is a disk of a machine, as the machine says.
type vmDisk struct {
	Device   string `json:"device"`
	Node     string `json:"node,omitempty"`
	Driver   string `json:"driver,omitempty"`
	Size     int64  `json:"size"`
	ReadOnly bool   `json:"readonly"`
	Status   string `json:"io-status,omitempty"`
	Source   string `json:"source,omitempty"`
}

func newVMShow() *cobra.Command {
	f := &vmFlags{}
	c := &cobra.Command{
		Use:   "show VM",
		Short: "Show a machine with its disks and the room that it has for more",
		Args:  cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			v, err := f.show(c.Context(), args[0])
			if err != nil {
				return plugError(err)
			}
			if f.json {
				return writeJSON(c.OutOrStdout(), v)
			}
			return v.print(&printer{w: c.OutOrStdout()})
		},
	}
	c.Flags().BoolVar(&f.json, "json", false, "write JSON")
	f.addSocket(c)
	f.addVM(c)
	return c
}

func (f *vmFlags) show(ctx context.Context, name string) (*vmShown, error) {
	found, err := f.find(name)
	if err != nil {
		return nil, err
	}
	m, close, err := f.machine(ctx, found)
	if err != nil && f.via == "" && !strings.Contains(name, "/") {
		err = fmt.Errorf("%w; and %s names no machine %q", err, cmp.Or(os.Getenv(machinesVariable), machinesFile), name)
	}
	if err != nil {
		return nil, err
	}
	defer close()
	v := &vmShown{vmRow: vmRow{VM: name}, Disks: []vmDisk{}}
	var x qmp.Executor
	switch m := m.(type) {
	case *attach.Machine:
		x, v.QEMU = m.Monitor, versionOf(m.Monitor)
	case *attach.Domain:
		v.UUID, v.State = m.Domain.UUID, "off"
		if !m.Domain.Active {
			return v, nil
		}
		x = m.Session.Monitor(m.Domain)
	}
	return v, v.ask(ctx, x)
}

// ask fills in what the machine says.
func (v *vmShown) ask(ctx context.Context, x qmp.Executor) error {
	s, err := qmp.QueryStatus(ctx, x)
	if err != nil {
		return err
	}
	v.State = s.State
	disks, err := qmp.QueryBlock(ctx, x)
	if err != nil {
		return err
	}
	for _, d := range disks {
		one := vmDisk{Device: d.ID(), Status: d.IOStatus}
		if n := d.Inserted; n != nil {
			one.Node, one.Driver, one.Size, one.ReadOnly, one.Source = n.Name, n.Driver, n.Image.VirtualSize, n.ReadOnly, transport.HideTokens(n.File)
		}
		v.Disks = append(v.Disks, one)
	}
	places, err := qmp.FreePCI(ctx, x)
	if err != nil && !errors.Is(err, qmp.ErrNoPCIPlace) {
		return err
	}
	targets, err := qmp.FreeSCSI(ctx, x)
	if err != nil && !errors.Is(err, qmp.ErrNoSCSIPlace) {
		return err
	}
	controllers := map[string]bool{}
	for _, t := range targets {
		controllers[t.Bus] = true
	}
	v.PCI, v.SCSI = len(places), len(controllers)
	return nil
}

// orDash is shown of what may be absent.
func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return shown(s)
}

func (v *vmShown) print(p *printer) error {
	p.print("vm: %s\nstate: %s\n", shown(v.VM), visible(v.State))
	if v.UUID != "" {
		p.print("uuid: %s\n", v.UUID)
	}
	if v.QEMU != "" {
		p.print("qemu: %s\n", v.QEMU)
	}
	p.print("free PCI places: %d\nSCSI controllers with room: %d\n", v.PCI, v.SCSI)
	if p.err != nil || len(v.Disks) == 0 {
		return p.err
	}
	t := &table{head: []string{"DISK", "SIZE ", "ACCESS", "DRIVER", "NODE", "SOURCE"}}
	for _, d := range v.Disks {
		access := "rw"
		if d.ReadOnly {
			access = "ro"
		}
		size := roundSize(d.Size)
		if d.Driver == "" { // an empty drive
			size, access = "-", "-"
		}
		t.add(orDash(d.Device), size, access, orDash(d.Driver), orDash(d.Node), orDash(d.Source))
	}
	return t.print(p.w)
}
