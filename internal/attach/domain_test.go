package attach_test

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"libvirt.org/go/libvirtxml"

	"github.com/vmdiskd/vmdiskd/internal/attach"
	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/qmp"
	"github.com/vmdiskd/vmdiskd/internal/qmp/libvirtd"
	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// host is a libvirt of the test's own with a domain whose processor never
// runs, and a service.
type host struct {
	lab
	*testenv.Libvirt
	notes []string
	*attach.Domain

	newer bool // libvirt 11, which puts no raw node above the client
}

// domainName is syntax for shells, XML and libvirt's own tools.
const domainName = `-v,"m'<&1`

func startHost(t *testing.T) *host {
	t.Helper()
	return startHostOf(t, testenv.StartLibvirt(t), libvirtd.Private)
}

// startNewerHost is startHost with Debian 13's libvirt and QEMU.
func startNewerHost(t *testing.T) *host {
	t.Helper()
	h := startHostOf(t, testenv.StartNewerLibvirt(t), libvirtd.System)
	h.newer = true
	return h
}

// startHostOf is startHost with another libvirt and its driver, and more in the
// configuration of the service.
func startHostOf(t *testing.T, l *testenv.Libvirt, driver string, conf ...string) *host {
	t.Helper()
	h := &host{lab: lab{dir: testenv.TempDir(t)}, Libvirt: l}
	must(t, os.Chmod(h.dir, 0o755)) // QEMU's user comes through it
	h.startService(t, conf...)
	h.boot(t)
	s, err := libvirtd.Dial(testenv.Context(t), h.Socket, driver)
	must(t, err)
	t.Cleanup(func() { s.Close() })
	d, err := s.Lookup(testenv.Context(t), domainName)
	must(t, err)
	h.Domain = &attach.Domain{Session: s, Domain: d, Server: h.service, Note: func(s string) { h.notes = append(h.notes, s) }}
	return h
}

func (h *host) boot(t *testing.T) {
	t.Helper()
	x := libvirtxml.Domain{
		Type: "qemu", Name: domainName, Memory: &libvirtxml.DomainMemory{Value: 64, Unit: "MiB"},
		OS:        &libvirtxml.DomainOS{Type: &libvirtxml.DomainOSType{Arch: "x86_64", Machine: "q35", Type: "hvm"}},
		IOThreads: 1,
		Devices: &libvirtxml.DomainDeviceList{Emulator: "/usr/bin/qemu-system-x86_64", MemBalloon: &libvirtxml.DomainMemBalloon{Model: "none"},
			Controllers: []libvirtxml.DomainController{
				{Type: "pci", Model: "pcie-root"}, {Type: "scsi", Model: "virtio-scsi", Driver: &libvirtxml.DomainControllerDriver{IOThread: 1}}, {Type: "usb", Model: "none"},
			}},
	}
	text, err := x.Marshal()
	must(t, err)
	file := filepath.Join(t.TempDir(), "d.xml")
	must(t, os.WriteFile(file, []byte(text), 0o600))
	h.Virsh(t, "define", file)
	h.Virsh(t, "start", "--paused", "--domain="+domainName)
	t.Cleanup(func() { h.Virsh(t, "destroy", "--domain="+domainName) })
}

// source is an image with a socket that the domain's QEMU may connect to.
func (h *host) source(image string) attach.Source {
	s := h.lab.source(image)
	if s.Mode = "0600"; os.Getuid() == 0 && !h.newer {
		s.Owner = fmt.Sprintf("%d:%d", testenv.Nobody, testenv.Nobody)
	}
	return s
}

// TestDiskOfADomain takes a disk through its life in a real libvirt, in the
// running machine and in its configuration.
func TestDiskOfADomain(t *testing.T) {
	t.Parallel()
	diskOfADomain(t, startHost(t))
}

// TestDiskOfADomainOfANewerLibvirt is the same with libvirt 11.
func TestDiskOfADomainOfANewerLibvirt(t *testing.T) {
	t.Parallel()
	diskOfADomain(t, startNewerHost(t))
}

func diskOfADomain(t *testing.T, h *host) {
	t.Helper()
	ctx := testenv.Context(t)
	image := h.image(t, oddName, diskSize)
	o := attach.Options{Model: qmp.SCSIDisk, Serial: "S1"}
	attached := func() *attach.Plan {
		p, err := h.Attach(ctx, h.source(image), o)
		must(t, err)
		return p
	}
	if p := attached(); !do(t, p, nil) || p.Disk != "sda" {
		t.Errorf("attach as %q", p.Disk)
	}
	if do(t, attached(), nil) {
		t.Error("the second attach changed something")
	}
	if text := h.Virsh(t, "domblkinfo", "--domain="+domainName, "--device=sda"); !strings.Contains(text, fmt.Sprint(diskSize)) {
		t.Errorf("domblkinfo: %s", text)
	}
	if text := h.Virsh(t, "dumpxml", "--inactive", "--domain="+domainName); strings.Contains(text, "protocol='nbd'") {
		t.Errorf("the configuration has the disk:\n%s", text)
	}
	kept := strings.Contains(h.Virsh(t, "dumpxml", "--domain="+domainName), "<reconnect")
	if told := strings.Contains(strings.Join(h.notes, "\n"), "forgotten the reconnect delay"); told == kept {
		t.Errorf("reconnect delay kept: %v, told that it is not: %v", kept, told)
	}
	o.Persist = true
	if !do(t, attached(), nil) || do(t, attached(), nil) {
		t.Error("attach to the configuration must change it once")
	}
	target, err := h.Resolve(ctx, image)
	if err != nil || target != "sda" {
		t.Errorf("resolved as %q, %v", target, err)
	}
	overlay := filepath.Join(h.dir, "overlay")
	p, err := h.Snapshot(ctx, target, "", overlay, false)
	do(t, p, err)
	if _, err := os.Stat(overlay); err != nil {
		t.Error(err)
	}
	for i := range int64(2) {
		size := (i + 2) * diskSize
		p, err = h.Resize(ctx, target, "", attach.Size{Bytes: diskSize, More: true})
		do(t, p, err)
		if text := h.Virsh(t, "domblkinfo", "--domain="+domainName, "--device=sda"); !strings.Contains(text, fmt.Sprint(size)) {
			t.Errorf("domblkinfo after growing to %d: %s", size, text)
		}
		h.wantNodes(t, 1, size)
	}
	p, err = h.Resize(ctx, target, "", attach.Size{Bytes: 3 * diskSize})
	if do(t, p, err) {
		t.Error("growing to the size that is there changed something")
	}
	if _, err := h.Attach(ctx, h.source(image), attach.Options{Serial: "S2"}); !errors.Is(err, attach.ErrDiffers) || !strings.Contains(err.Error(), overlay) {
		t.Errorf("another serial number: got %v, want ErrDiffers with the overlay", err)
	}
	p, err = h.Detach(ctx, target, false)
	do(t, p, err)
	if told := strings.Join(h.notes, "\n"); !strings.Contains(told, overlay) {
		t.Errorf("notes of detach %q do not tell of the overlay", told)
	}
	h.wantNothing(t)
	p, err = h.Detach(ctx, target, false)
	if do(t, p, err) {
		t.Error("the second detach changed something")
	}
}

// TestDiskOfADomainIsInOneStateAlone takes a disk into the configuration and out
// of it while the domain runs, without its guest, and the other way round. The
// export lasts as long as either has the disk, and from the first that the
// configuration has it past the daemon's end.
func TestDiskOfADomainIsInOneStateAlone(t *testing.T) {
	t.Parallel()
	h := startHost(t)
	ctx := testenv.Context(t)
	plain := h.source(h.image(t, "disk", diskSize))
	keep := plain
	keep.Add.Persist = true
	const both = libvirtd.Live | libvirtd.Config
	give := func(scope libvirtd.Scope, s attach.Source) (*attach.Plan, error) {
		h.Scope = scope
		return h.Attach(ctx, s, attach.Options{Model: qmp.SCSIDisk})
	}
	take := func(scope libvirtd.Scope) (*attach.Plan, error) {
		h.Scope = scope
		return h.Detach(ctx, "sda", false)
	}
	for _, tt := range []struct {
		name string
		plan func() (*attach.Plan, error)
		says string
		want libvirtd.Scope
	}{
		{"into the configuration", func() (*attach.Plan, error) { return give(libvirtd.Config, keep) }, "give the domain's configuration disk sda", libvirtd.Config},
		{"into the machine", func() (*attach.Plan, error) { return give(libvirtd.Live, plain) }, "give the running domain disk sda", both},
		{"out of the configuration", func() (*attach.Plan, error) { return take(libvirtd.Config) }, "take disk sda out of the domain's configuration", libvirtd.Live},
		{"into the configuration beside the machine", func() (*attach.Plan, error) { return give(libvirtd.Config, keep) }, "give the domain's configuration disk sda", both},
		{"out of the machine", func() (*attach.Plan, error) { return take(libvirtd.Live) }, "have the guest release disk sda", libvirtd.Config},
		{"out of the machine that has it no more", func() (*attach.Plan, error) { return take(libvirtd.Live) }, "", libvirtd.Config},
		{"out of the configuration, which is the last", func() (*attach.Plan, error) { return take(libvirtd.Config) }, "remove export", 0},
		{"into both", func() (*attach.Plan, error) { return give(both, keep) }, "give the running domain and its configuration disk sda", both},
		{"out of both", func() (*attach.Plan, error) { return take(both) }, "and take it out of the domain's configuration", 0},
	} {
		for _, first := range []bool{true, false} {
			p, err := tt.plan()
			must(t, err)
			var text strings.Builder
			must(t, p.Print(&text))
			if changed := do(t, p, nil); changed != (first && tt.says != "") || first && !strings.Contains(text.String(), tt.says) {
				t.Errorf("%s: changed %v, the first time %v, by the plan, which should say %q:\n%s", tt.name, changed, first, tt.says, text.String())
			}
		}
		if got := h.states(t); got != tt.want {
			t.Errorf("%s: the disk is in %b, want %b", tt.name, got, tt.want)
		}
		list, err := h.service.Exports(ctx)
		must(t, err)
		if len(list) > 1 || (len(list) == 1) != (tt.want != 0) || len(list) == 1 && list[0].Origin != "state" {
			t.Errorf("%s: exports %+v", tt.name, list)
		}
	}
	h.wantNothing(t)
}

// TestTargetWithAnotherDiskInEachState has the running domain and its
// configuration differ in what a target is, as virsh may leave them: no disk goes
// that was not asked for, and none loses its export.
func TestTargetWithAnotherDiskInEachState(t *testing.T) {
	t.Parallel()
	h := startHost(t)
	ctx := testenv.Context(t)
	x, y := h.image(t, "x", diskSize), h.image(t, "y", diskSize)
	names := map[string]string{}
	for name, image := range map[string]string{"x": x, "y": y} {
		names[attach.ExportName(h.Domain.Domain.UUID, attach.DiskID(image))] = name
	}
	plain := fmt.Sprintf("<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='%s'/><target dev='sda' bus='scsi'/></disk>", y)
	const both = libvirtd.Live | libvirtd.Config
	for _, tt := range []struct {
		name, live, config string // target=disk
		word               string
		scope              libvirtd.Scope
		refused            bool
		left, exports      string
	}{
		{"a file in the configuration", "sda=x", "sda=file sdb=x", "sda", 0, true, "sda=x, sda=file sdb=x", "x y"},
		{"a file in the configuration, both asked for", "sda=x", "sda=file sdb=x", "sda", both, true, "sda=x, sda=file sdb=x", "x y"},
		{"a file in the configuration, which is not asked", "sda=x", "sda=file sdb=x", x, libvirtd.Live, false, ", sda=file sdb=x", "x y"},
		{"another disk in the machine", "sda=y", "sda=x", x, 0, true, "sda=y, sda=x", "x y"},
		{"another disk in the machine, which is asked", "sda=y", "sda=x", x, libvirtd.Live, true, "sda=y, sda=x", "x y"},
		{"another disk in the machine, which is not asked", "sda=y", "sda=x", x, libvirtd.Config, false, "sda=y, ", "y"},
		{"one disk under two targets", "", "sda=x sdb=x", "sda", 0, false, ", sdb=x", "x y"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			elements := map[string]string{"sda=file": plain}
			h.Scope = 0
			for i, image := range []string{x, y} {
				p, err := h.Attach(ctx, h.source(image), attach.Options{Model: qmp.SCSIDisk})
				do(t, p, err)
				for _, target := range []string{"sda", "sdb"} {
					elements[target+"="+[]string{"x", "y"}[i]] = h.element(t, p.Disk, target)
				}
			}
			h.empty(t)
			h.put(t, "--live", elements, tt.live)
			h.put(t, "--config", elements, tt.config)
			defer h.empty(t)
			h.Scope = tt.scope
			p, err := h.detachByName(ctx, tt.word)
			if err == nil {
				_, err = p.Run(ctx)
			}
			if errors.Is(err, attach.ErrDiffers) != tt.refused || !tt.refused && err != nil {
				t.Errorf("detach %q: %v, want it refused: %v", tt.word, err, tt.refused)
			}
			if left := h.disksOf(t, names) + ", " + h.disksOf(t, names, "--inactive"); left != tt.left {
				t.Errorf("left %q, want %q", left, tt.left)
			}
			var exports []string
			list, err := h.service.Exports(ctx)
			must(t, err)
			for _, e := range list {
				exports = append(exports, names[e.Name])
			}
			slices.Sort(exports)
			if got := strings.Join(exports, " "); got != tt.exports {
				t.Errorf("exports %q, want %q", got, tt.exports)
			}
			if tt.live == "" || !tt.refused {
				return
			}
			h.Scope = 0
			_, grown := h.Resize(ctx, "sda", "", attach.Size{Bytes: diskSize, More: true})
			_, kept := h.Snapshot(ctx, "sda", "", filepath.Join(h.dir, "overlay"), false)
			if !errors.Is(grown, attach.ErrDiffers) || !errors.Is(kept, attach.ErrDiffers) {
				t.Errorf("resize: %v, snapshot: %v, want ErrDiffers", grown, kept)
			}
		})
	}
}

// detachByName is a detach as its user asks for it.
func (h *host) detachByName(ctx context.Context, word string) (*attach.Plan, error) {
	target, err := h.Resolve(ctx, word)
	if err != nil {
		return nil, err
	}
	return h.Detach(ctx, target, false)
}

// describe is the domain as virsh says.
func (h *host) describe(t *testing.T, more ...string) *libvirtxml.Domain {
	t.Helper()
	x := &libvirtxml.Domain{}
	must(t, x.Unmarshal(h.Virsh(t, append([]string{"dumpxml", "--domain=" + domainName}, more...)...)))
	return x
}

// element is a disk of the running domain with another target.
func (h *host) element(t *testing.T, target, as string) string {
	t.Helper()
	disk := libvirtd.Disk(h.describe(t), target)
	disk.Target.Dev, disk.Address, disk.Alias = as, nil, nil
	text, err := disk.Marshal()
	must(t, err)
	return text
}

// put has virsh give a state of the domain the named elements.
func (h *host) put(t *testing.T, state string, elements map[string]string, which string) {
	t.Helper()
	for _, name := range strings.Fields(which) {
		file := filepath.Join(t.TempDir(), "disk.xml")
		must(t, os.WriteFile(file, []byte(elements[name]), 0o600))
		h.Virsh(t, "attach-device", state, "--domain="+domainName, "--file="+file)
	}
}

// empty has virsh take every disk out of both states.
func (h *host) empty(t *testing.T) {
	t.Helper()
	for state, more := range map[string][]string{"--live": nil, "--config": {"--inactive"}} {
		for _, disk := range h.describe(t, more...).Devices.Disks {
			h.Virsh(t, "detach-disk", state, "--domain="+domainName, "--target="+disk.Target.Dev)
		}
	}
}

// disksOf are the disks of a state, those with an export by its name.
func (h *host) disksOf(t *testing.T, names map[string]string, more ...string) string {
	t.Helper()
	var all []string
	for _, disk := range h.describe(t, more...).Devices.Disks {
		name := "file"
		if disk.Source.Network != nil {
			name = names[disk.Source.Network.Name]
		}
		all = append(all, disk.Target.Dev+"="+name)
	}
	slices.Sort(all)
	return strings.Join(all, " ")
}

// states are those that have a disk, as virsh says.
func (h *host) states(t *testing.T) (in libvirtd.Scope) {
	t.Helper()
	for scope, more := range map[libvirtd.Scope][]string{libvirtd.Live: nil, libvirtd.Config: {"--inactive"}} {
		if strings.Contains(h.Virsh(t, append([]string{"dumpxml", "--domain=" + domainName}, more...)...), "<disk") {
			in |= scope
		}
	}
	return in
}

// TestDiskForTheConfigurationThatFailsLeavesNothing: the user interrupts after
// each step.
func TestDiskForTheConfigurationThatFailsLeavesNothing(t *testing.T) {
	t.Parallel()
	h := startHost(t)
	h.Scope = libvirtd.Config
	ctx := testenv.Context(t)
	s := h.source(h.image(t, "disk", diskSize))
	s.Add.Persist = true
	for at := 0; ; at++ {
		p, err := h.Attach(ctx, s, attach.Options{Model: qmp.SCSIDisk})
		must(t, err)
		if at == len(p.Steps)-1 {
			break
		}
		if err := interrupted(ctx, p, at); !errors.Is(err, context.Canceled) || errors.Is(err, attach.ErrIncomplete) {
			t.Errorf("interrupted at %q: %v", p.Steps[at].Name, err)
		}
		h.wantNothing(t)
	}
}

// TestConfigurationThatCannotBeSaved is refused by libvirt when the running domain
// has got the disk, or has lost it: attach takes it back, and detach tells what it
// cannot take back, and is done by a second one.
func TestConfigurationThatCannotBeSaved(t *testing.T) {
	t.Parallel()
	h := startHost(t)
	ctx := testenv.Context(t)
	inTheWay := filepath.Join(h.Dir, "c/libvirt/qemu", domainName+".xml.new") // where libvirt writes
	s := h.source(h.image(t, "disk", diskSize))
	s.Add.Persist = true
	attached := func() *attach.Plan {
		p, err := h.Attach(ctx, s, attach.Options{Model: qmp.SCSIDisk, Persist: true})
		must(t, err)
		return p
	}
	must(t, os.Mkdir(inTheWay, 0o700))
	if _, err := attached().Run(ctx); !errors.As(err, new(*libvirtd.Error)) || errors.Is(err, attach.ErrIncomplete) {
		t.Errorf("attach: %v, want libvirt's refusal alone", err)
	}
	h.wantNothing(t)
	if left := h.nodes(t); left != "" {
		t.Errorf("nodes left:\n%s", left)
	}
	must(t, os.Remove(inTheWay))
	do(t, attached(), nil)
	must(t, os.Mkdir(inTheWay, 0o700))
	p, err := h.Detach(ctx, "sda", false)
	must(t, err)
	if changed, err := p.Run(ctx); !changed || !errors.As(err, new(*libvirtd.Error)) || !errors.Is(err, attach.ErrIncomplete) {
		t.Errorf("detach: changed %v, %v, want libvirt's refusal and ErrIncomplete", changed, err)
	}
	if in := h.states(t); in != libvirtd.Config {
		t.Errorf("detach: the disk is in %b, want %b", in, libvirtd.Config)
	}
	must(t, os.Remove(inTheWay))
	p, err = h.Detach(ctx, "sda", false)
	if !do(t, p, err) {
		t.Error("the second detach changed nothing")
	}
	h.wantNothing(t)
}

// nodes are the machine's by libvirt's monitor, with their sizes.
func (h *host) nodes(t *testing.T) (text string) {
	t.Helper()
	list, err := qmp.QueryNamedBlockNodes(testenv.Context(t), h.Session.Monitor(h.Domain.Domain))
	must(t, err)
	slices.SortFunc(list, func(a, b qmp.Node) int { return strings.Compare(a.Name, b.Name) })
	for _, n := range list {
		text += fmt.Sprintf("%s %s %d\n", n.Name, n.Driver, n.Image.VirtualSize)
	}
	return text
}

// wantNodes checks that the machine has the nodes of one disk, those that
// libvirt has made and knows by its n-th attempt.
func (h *host) wantNodes(t *testing.T, n int, size int64) {
	t.Helper()
	want := fmt.Sprintf("libvirt-%d-storage nbd %d\n", n, size)
	if !h.newer {
		want = fmt.Sprintf("libvirt-%d-format raw %d\n", n, size) + want
	}
	if got := h.nodes(t); got != want {
		t.Errorf("nodes\n%swant\n%s", got, want)
	}
}

// keep attaches a disk, as target, to the running machine and to its configuration.
func (h *host) keep(t *testing.T) (s attach.Source, o attach.Options, target string) {
	t.Helper()
	s, o = h.source(h.image(t, "disk", diskSize)), attach.Options{Model: qmp.SCSIDisk, Persist: true}
	s.Add.Persist = true
	p, err := h.Attach(testenv.Context(t), s, o)
	do(t, p, err)
	return s, o, p.Disk
}

// TestDiskBelowAnOverlayIsTheDomainsStill: libvirt's external snapshots put a file
// above a disk, which the guest has all the same.
func TestDiskBelowAnOverlayIsTheDomainsStill(t *testing.T) {
	t.Parallel()
	h := startHost(t)
	ctx := testenv.Context(t)
	s, o, target := h.keep(t)
	dir := testenv.TempDir(t)
	must(t, os.Chmod(dir, 0o777))
	h.Virsh(t, "snapshot-create-as", "--domain="+domainName, "--disk-only", "--no-metadata", "--diskspec="+target+",file="+filepath.Join(dir, "snap"))
	refused := func(when string) {
		t.Helper()
		if _, err := h.Attach(ctx, s, o); !errors.Is(err, attach.ErrDiffers) || !strings.Contains(err.Error(), target) {
			t.Errorf("%s: second attach: %v", when, err)
		}
		for _, of := range []attach.Source{s, {Export: attach.ExportName(h.Domain.Domain.UUID, attach.DiskID(s.Image))}} {
			if x, err := h.Element(ctx, of, o); !errors.Is(err, attach.ErrDiffers) || !strings.Contains(err.Error(), target) {
				t.Errorf("%s: an element for a second disk: %s, %v", when, x, err)
			}
		}
		for _, word := range []string{s.Image, "sdz"} {
			if id, err := h.Resolve(ctx, word); err == nil {
				t.Errorf("%s: detach of %q means %q", when, word, id)
			}
		}
		list, err := h.service.Exports(ctx)
		must(t, err)
		id := strings.TrimPrefix(list[0].Name, attach.ExportName(h.Domain.Domain.UUID, ""))
		if _, err := h.Detach(ctx, id, false); !errors.Is(err, attach.ErrDiffers) {
			t.Errorf("%s: detach of %q: %v", when, id, err)
		}
	}
	refused("while it runs")
	h.Virsh(t, "destroy", "--domain="+domainName)
	refused("while it is off")
	h.Virsh(t, "start", "--paused", "--domain="+domainName)
}

// TestPausedDiskOfADomainStaysAsItIs is TestPausedDiskStaysAsItIs with a domain, whose
// configuration loses the disk all the same.
func TestPausedDiskOfADomainStaysAsItIs(t *testing.T) {
	t.Parallel()
	h := startHost(t)
	ctx := testenv.Context(t)
	s, o, _ := h.keep(t)
	export := attach.ExportName(h.Domain.Domain.UUID, attach.DiskID(s.Image))
	must(t, h.service.Pause(ctx, export, 0))
	for what, plan := range map[string]func() (*attach.Plan, error){
		"attach":   func() (*attach.Plan, error) { return h.Attach(ctx, s, o) },
		"named":    func() (*attach.Plan, error) { return h.Attach(ctx, attach.Source{Export: export}, o) },
		"detach":   func() (*attach.Plan, error) { return h.Detach(ctx, "sda", true) },
		"resize":   func() (*attach.Plan, error) { return h.Resize(ctx, "sda", "", attach.Size{Bytes: diskSize}) },
		"snapshot": func() (*attach.Plan, error) { return h.Snapshot(ctx, "sda", "", h.dir+"/overlay", false) },
	} {
		p, err := plan()
		if err == nil {
			_, err = p.Run(ctx)
		}
		if in := h.states(t); !errors.Is(err, attach.ErrPaused) || errors.Is(err, attach.ErrIncomplete) || in != libvirtd.Live|libvirtd.Config {
			t.Errorf("%s: %v, the disk is in %v", what, err, in)
		}
	}
	h.Scope = libvirtd.Config
	if p, err := h.Detach(ctx, "sda", true); !do(t, p, err) || h.states(t) != libvirtd.Live {
		t.Errorf("detach from the configuration: the disk is in %v", h.states(t))
	}
	h.Scope = 0
	must(t, h.service.Resume(ctx, export))
	p, err := h.Detach(ctx, "sda", true)
	do(t, p, err)
	h.wantNothing(t)
}

// TestDiskOfADomainComesOverTLS has libvirt give QEMU the certificates that its
// qemu.conf names, for a service that takes nothing but TLS and certificates. The
// disk gets the reconnect delay that libvirt has forgotten, and grows, with the
// same certificates. A disk at a socket of its own has none, whatever qemu.conf says
// of those of which nothing is said.
func TestDiskOfADomainComesOverTLS(t *testing.T) {
	t.Parallel()
	dir := readable(t, testenv.Certificates(t), testenv.Nobody)
	l := testenv.StartLibvirt(t, fmt.Sprintf("nbd_tls_x509_cert_dir = %q", dir), "nbd_tls = 1")
	overTLS(t, dir, func(conf string) *host { return startHostOf(t, l, libvirtd.Private, conf) })
}

// TestDiskOfANewerLibvirtComesOverTLS is the same with libvirt 11.
func TestDiskOfANewerLibvirtComesOverTLS(t *testing.T) {
	t.Parallel()
	dir := readable(t, testenv.Certificates(t), testenv.SystemQEMU)
	l := testenv.StartNewerLibvirt(t, fmt.Sprintf("nbd_tls_x509_cert_dir = %q", dir), "nbd_tls = 1")
	overTLS(t, dir, func(conf string) *host {
		h := startHostOf(t, l, libvirtd.System, conf)
		h.newer = true
		return h
	})
}

func overTLS(t *testing.T, dir string, start func(conf string) *host) {
	t.Helper()
	port := testenv.FreePort(t)
	h := start(fmt.Sprintf("[tls]\ncertificates = %q\n[[listener]]\nuri = \"nbds://127.0.0.1:%d\"", dir, port))
	ctx := testenv.Context(t)
	_, err := h.service.Add(ctx, addExport("web", h.image(t, "disk", diskSize)))
	must(t, err)
	uri := fmt.Sprintf("nbds://localhost:%d/web", port)
	plain := attach.Source{URI: strings.Replace(uri, "nbds", "nbd", 1)}
	p, err := h.Attach(ctx, plain, attach.Options{Model: qmp.SCSIDisk})
	must(t, err)
	if _, err := p.Run(ctx); !errors.As(err, new(*libvirtd.Error)) || errors.Is(err, attach.ErrIncomplete) || h.nodes(t) != "" {
		t.Errorf("without TLS: %v, nodes %s", err, h.nodes(t))
	}
	for i, renew := range []bool{false, true} {
		p, err = h.Attach(ctx, attach.Source{URI: uri}, attach.Options{Model: qmp.SCSIDisk, Renew: renew})
		do(t, p, err)
		x, err := h.service.Export(ctx, "web")
		must(t, err)
		h.wantNodes(t, i+2, x.Size)
		if text := h.Virsh(t, "dumpxml", "--domain="+domainName); !strings.Contains(text, "tls='yes'") {
			t.Errorf("the domain has no disk with TLS:\n%s", text)
		}
		list, err := h.service.Clients(ctx, nil)
		if err != nil || len(list) != 1 || list[0].TLS == "" || list[0].Cert == "" {
			t.Errorf("clients %+v, %v", list, err)
		}
		p, err = h.Resize(ctx, "sda", "web", attach.Size{Bytes: diskSize, More: true})
		do(t, p, err)
		h.wantNodes(t, i+2, x.Size+diskSize)
		p, err = h.Detach(ctx, "sda", false)
		do(t, p, err)
		objects, err := qmp.Objects(ctx, h.Session.Monitor(h.Domain.Domain))
		if err != nil || h.nodes(t) != "" || slices.ContainsFunc(slices.Collect(maps.Values(objects)), func(kind string) bool { return strings.Contains(kind, "tls") }) {
			t.Errorf("left: objects %q, nodes %s, %v", objects, h.nodes(t), err)
		}
	}
	p, err = h.Attach(ctx, h.source(h.image(t, "other", diskSize)), attach.Options{Model: qmp.SCSIDisk})
	do(t, p, err)
}

// readable lets a user, whom root lends them to, read the files of a folder.
func readable(t *testing.T, dir string, user int) string {
	t.Helper()
	must(t, os.Chmod(dir, 0o755))
	if os.Getuid() != 0 {
		return dir
	}
	files, err := filepath.Glob(dir + "/*")
	must(t, err)
	for _, f := range files {
		must(t, os.Chown(f, user, user))
	}
	return dir
}

// TestDiskOfASystemDomain: the socket of the disk belongs to the user that
// libvirt runs the domain's QEMU as, and to nobody else.
func TestDiskOfASystemDomain(t *testing.T) {
	t.Parallel()
	h := startHostOf(t, testenv.StartSystemLibvirt(t), libvirtd.System)
	ctx := testenv.Context(t)
	p, err := h.Attach(ctx, h.lab.source(h.image(t, "disk", diskSize)), attach.Options{Model: qmp.SCSIDisk, Persist: true})
	do(t, p, err)
	if text := h.Virsh(t, "domblkinfo", "--domain="+domainName, "--device=sda"); !strings.Contains(text, fmt.Sprint(diskSize)) {
		t.Errorf("domblkinfo: %s", text)
	}
	sockets, err := filepath.Glob(h.dir + "/*.sock")
	must(t, err)
	if len(sockets) != 1 {
		t.Fatalf("sockets %q", sockets)
	}
	info, err := os.Stat(sockets[0])
	must(t, err)
	st := info.Sys().(*syscall.Stat_t)
	if st.Uid != testenv.SystemQEMU || st.Gid != testenv.SystemQEMU || info.Mode().Perm()&0o077 != 0 {
		t.Errorf("the socket is of %d:%d, mode %v", st.Uid, st.Gid, info.Mode())
	}
	p, err = h.Detach(ctx, "sda", false)
	do(t, p, err)
	h.wantNothing(t)
}

// TestDiskOfADomainGrowsInAnOldMachine is TestDiskGrowsInAnOldMachine with a domain.
func TestDiskOfADomainGrowsInAnOldMachine(t *testing.T) {
	t.Parallel()
	h := startHost(t)
	h.tapped(t).hide("open-timeout")
	ctx := testenv.Context(t)
	p, err := h.Attach(ctx, h.source(h.image(t, "disk", diskSize)), attach.Options{Model: qmp.SCSIDisk, Renew: true})
	do(t, p, err)
	p, err = h.Resize(ctx, "sda", "", attach.Size{Bytes: 2 * diskSize})
	do(t, p, err)
	h.wantNodes(t, 1, 2*diskSize)
}

// TestDiskOfADomainThatGrowsWaitsForItsServerAsBefore reads the delay of each client
// that the machine is given through libvirt's monitor, where libvirt has no word for
// it. The domain keeps it until the disk is detached.
func TestDiskOfADomainThatGrowsWaitsForItsServerAsBefore(t *testing.T) {
	t.Parallel()
	h := startHost(t)
	p := h.tapped(t)
	ctx := testenv.Context(t)
	image := h.image(t, "disk", diskSize)
	before := h.Virsh(t, "dumpxml", "--domain="+domainName)
	delay := regexp.MustCompile(`"reconnect-delay":([0-9]+)`)
	for _, tt := range []struct {
		name string
		said attach.Options
		want []string // of clients while the disk is attached, and grows twice
	}{
		{"another delay", attach.Options{Renew: true, Reconnect: 2 * time.Second}, []string{"2", "2", "2", "2", "2", "2"}},
		{"the default", attach.Options{Renew: true}, []string{"60", "60", "60", "60", "60", "60"}},
		{"none, until it grows", attach.Options{Reconnect: 2 * time.Second}, []string{"60", "60", "60", "60"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var got []string
			p.hear(func(message []byte) {
				if found := delay.FindSubmatch(message); found != nil {
					got = append(got, string(found[1]))
				}
			})
			tt.said.Model = qmp.SCSIDisk
			plan, err := h.Attach(ctx, h.source(image), tt.said)
			do(t, plan, err)
			for range 2 {
				plan, err = h.Resize(ctx, "sda", "", attach.Size{Bytes: diskSize, More: true})
				do(t, plan, err)
			}
			plan, err = h.Detach(ctx, "sda", false)
			do(t, plan, err)
			p.hear(nil)
			if !slices.Equal(got, tt.want) {
				t.Errorf("reconnect delays %q, want %q", got, tt.want)
			}
			if after := h.Virsh(t, "dumpxml", "--domain="+domainName); strings.Contains(after, "vmdiskd") || strings.Contains(before, "vmdiskd") {
				t.Errorf("the domain keeps something of the disk:\n%s", after)
			}
		})
	}
}

// TestDiskOfADomainGetsWhatEachAdds is TestDiskGetsWhatEachAdds with a domain.
func TestDiskOfADomainGetsWhatEachAdds(t *testing.T) {
	t.Parallel()
	h := startHost(t)
	ctx := testenv.Context(t)
	p, err := h.Attach(ctx, h.source(h.image(t, "disk", diskSize)), attach.Options{Model: qmp.SCSIDisk})
	do(t, p, err)
	eachAdds(t, func() (*attach.Plan, error) {
		return h.Resize(ctx, "sda", "", attach.Size{Bytes: diskSize, More: true})
	})
	h.wantNodes(t, 1, 3*diskSize)
}

// TestResizeOfADomainNeedsAPlaceForASecondClient is
// TestResizeNeedsAPlaceForASecondClient with a domain.
func TestResizeOfADomainNeedsAPlaceForASecondClient(t *testing.T) {
	t.Parallel()
	h := startHost(t)
	ctx := testenv.Context(t)
	image := h.image(t, "disk", diskSize)
	p, err := h.Attach(ctx, h.source(image), attach.Options{Model: qmp.SCSIDisk})
	do(t, p, err)
	needsAPlace(t, h.service, attach.ExportName(h.Domain.Domain.UUID, attach.DiskID(image)), image, func(size int64) (*attach.Plan, error) {
		return h.Resize(ctx, "sda", "", attach.Size{Bytes: size})
	})
}

// TestAttachToADomainNeedsAPlaceForItsClient is TestAttachNeedsAPlaceForItsClient with
// a domain. One that gets a delay which libvirt forgets needs two, also for a disk that
// it has.
func TestAttachToADomainNeedsAPlaceForItsClient(t *testing.T) {
	t.Parallel()
	h := startHost(t)
	ctx := testenv.Context(t)
	h.endService()
	h.startService(t, fmt.Sprintf("[[listener]]\nuri = \"nbd+unix:///?socket=%s/shared\"\nmode = \"0666\"", h.dir))
	_, err := h.service.Add(ctx, addExport("web", h.image(t, "web", diskSize)))
	must(t, err)
	bound(t, h.service, "web", 1)
	image := h.source(h.image(t, "disk", diskSize))
	image.Add.Connections = 1
	web, o := attach.Source{Export: "web"}, attach.Options{Model: qmp.SCSIDisk}
	renewed := o
	renewed.Renew = true
	full := func(what string, s attach.Source, o attach.Options, in libvirtd.Scope) {
		t.Helper()
		p, err := h.Attach(ctx, s, o)
		must(t, err)
		_, err = p.Run(ctx)
		if is := h.states(t); !errors.Is(err, attach.ErrFull) || errors.Is(err, attach.ErrIncomplete) || is != in {
			t.Errorf("%s: %v, the disk is in %v; want ErrFull and %v", what, err, is, in)
		}
	}
	full("a new export with a delay", image, renewed, 0)
	full("an export with a delay", web, renewed, 0)
	h.lab.startMachine(t, q35...)
	m := h.lab.machine(t, h.lab.monitor, nil)
	p, err := m.Attach(ctx, web, o)
	do(t, p, err)
	full("an export with another client", web, o, 0)
	p, err = m.Detach(ctx, p.Disk, true)
	do(t, p, err)
	p, err = h.Attach(ctx, web, o)
	do(t, p, err)
	full("a disk that gets a delay", web, renewed, libvirtd.Live)
	bound(t, h.service, "web", 2)
	if p, err = h.Attach(ctx, web, renewed); !do(t, p, err) {
		t.Error("no delay was set")
	}
	p, err = h.Detach(ctx, "sda", true)
	do(t, p, err)
}

// TestDiskOfADomainIsNoOtherExportThanItsOwn is TestDiskIsNoOtherExportThanItsOwn
// with a domain.
func TestDiskOfADomainIsNoOtherExportThanItsOwn(t *testing.T) {
	t.Parallel()
	h := startHost(t)
	ctx := testenv.Context(t)
	h.endService()
	h.startService(t, fmt.Sprintf("[[listener]]\nuri = \"nbd+unix:///?socket=%s/shared\"\nmode = \"0666\"", h.dir))
	for _, name := range []string{"web", "other"} {
		x := addExport(name, h.image(t, name, diskSize))
		x.Default = name == "web"
		_, err := h.service.Add(ctx, x)
		must(t, err)
	}
	unnamed := attach.Source{URI: "nbd+unix:///?socket=" + h.dir + "/shared"}
	for _, s := range []attach.Source{h.source(h.image(t, "own", diskSize)), {Export: "web"}, unnamed} { // sda, sdb, sdc
		p, err := h.Attach(ctx, s, attach.Options{Model: qmp.SCSIDisk})
		do(t, p, err)
	}
	own := attach.ExportName(h.Domain.Domain.UUID, attach.DiskID(filepath.Join(h.dir, "own")))
	state := func() string {
		list, err := h.service.Exports(ctx)
		must(t, err)
		return fmt.Sprint(list)
	}
	before := state()
	overlay := filepath.Join(h.dir, "overlay")
	for target, named := range map[string][]string{"sda": {"other", "web"}, "sdb": {"other", own}, "sdc": {"other", own, "web"}} {
		for _, export := range named {
			if _, err := h.Resize(ctx, target, export, attach.Size{Bytes: 3 * diskSize}); !errors.Is(err, attach.ErrDiffers) {
				t.Errorf("resize %s with export %s: %v", target, export, err)
			}
			if _, err := h.Snapshot(ctx, target, export, overlay, false); !errors.Is(err, attach.ErrDiffers) {
				t.Errorf("snapshot %s with export %s: %v", target, export, err)
			}
		}
	}
	if _, err := h.Snapshot(ctx, "sdb", "", overlay, false); !errors.Is(err, attach.ErrNoServer) {
		t.Errorf("snapshot of an export that is not named: %v", err)
	}
	if got := state(); got != before {
		t.Errorf("changed to %s", got)
	}
	for target, export := range map[string]string{"sda": own, "sdb": "web"} {
		p, err := h.Resize(ctx, target, export, attach.Size{Bytes: 3 * diskSize})
		if !do(t, p, err) {
			t.Errorf("%s was not grown", target)
		}
	}
}

// TestExportIsOneDiskOfADomain is TestExportIsOneDiskOfAMachine with a domain. What
// another has attached since a plan was made is found too.
func TestExportIsOneDiskOfADomain(t *testing.T) {
	t.Parallel()
	h := startHost(t)
	ctx := testenv.Context(t)
	restart := func(listeners ...string) {
		h.endService()
		h.startService(t, listeners...)
	}
	tcp := fmt.Sprintf("[[listener]]\nuri = \"nbd://127.0.0.1:%d\"", testenv.FreePort(t))
	unix := fmt.Sprintf("[[listener]]\nuri = \"nbd+unix:///?socket=%s/shared\"\nmode = \"0666\"", h.dir)
	attached := func(o attach.Options) *attach.Plan {
		t.Helper()
		o.Model = qmp.SCSIDisk
		p, err := h.Attach(ctx, attach.Source{Export: "web"}, o)
		must(t, err)
		return p
	}
	restart(tcp, unix)
	web := addExport("web", h.image(t, "web", diskSize))
	web.Persist = true
	_, err := h.service.Add(ctx, web)
	must(t, err)
	early := attached(attach.Options{})
	restart(tcp)
	do(t, attached(attach.Options{ID: "sdc"}), nil)
	restart(tcp, unix)
	if changed := do(t, early, nil); changed || early.Disk != "sdc" {
		t.Errorf("a plan from before the disk was there: changed %v, disk %q", changed, early.Disk)
	}
	for _, tt := range []struct {
		o       attach.Options
		changed bool
	}{
		{attach.Options{}, false}, {attach.Options{ID: "sdc"}, false},
		{attach.Options{Persist: true}, true}, {attach.Options{Persist: true}, false},
	} {
		p := attached(tt.o)
		if changed := do(t, p, nil); changed != tt.changed || p.Disk != "sdc" {
			t.Errorf("attached again with %+v: changed %v, disk %q", tt.o, changed, p.Disk)
		}
	}
	for _, tt := range []struct {
		s attach.Source
		o attach.Options
	}{
		{attach.Source{Export: "web"}, attach.Options{ID: "sda"}}, {attach.Source{Export: "web", ReadOnly: true}, attach.Options{}},
	} {
		if _, err := h.Attach(ctx, tt.s, tt.o); !errors.Is(err, attach.ErrDiffers) {
			t.Errorf("%+v: got %v, want it refused", tt, err)
		}
	}
	text, err := h.Element(ctx, attach.Source{Export: "web"}, attach.Options{Model: qmp.SCSIDisk})
	if err != nil || !strings.Contains(text, "127.0.0.1") || !strings.Contains(text, `"sdc"`) {
		t.Errorf("the element of the disk: %s, %v", text, err)
	}
	names := map[string]string{"web": "web"}
	if disks := h.disksOf(t, names) + ", " + h.disksOf(t, names, "--inactive"); disks != "sdc=web, sdc=web" {
		t.Errorf("disks %q", disks)
	}
}

// TestPlanOfAResizeDoesNotTaint: libvirt marks a domain whose monitor somebody
// has used, and nothing has been changed yet.
func TestPlanOfAResizeDoesNotTaint(t *testing.T) {
	t.Parallel()
	h := startHost(t)
	ctx := testenv.Context(t)
	p, err := h.Attach(ctx, h.source(h.image(t, "disk", diskSize)), attach.Options{Model: qmp.SCSIDisk})
	do(t, p, err)
	for _, run := range []bool{false, true} {
		p, err := h.Resize(ctx, "sda", "", attach.Size{Bytes: 2 * diskSize})
		must(t, err)
		if run {
			do(t, p, nil)
		}
		if tainted := strings.Contains(h.Virsh(t, "dominfo", "--domain="+domainName), "custom monitor control"); tainted != run {
			t.Errorf("tainted: %v, the plan was run: %v", tainted, run)
		}
	}
}

// TestDiskOfADomainThatIsOffNeedsAnOwner: QEMU runs as a user that libvirt names
// only while it does, and the domain would not start.
func TestDiskOfADomainThatIsOffNeedsAnOwner(t *testing.T) {
	t.Parallel()
	h := startHost(t)
	ctx := testenv.Context(t)
	h.Virsh(t, "destroy", "--domain="+domainName)
	var err error
	h.Domain.Domain, err = h.Session.Lookup(ctx, domainName)
	must(t, err)
	image := h.image(t, "disk", diskSize)
	h.Scope = libvirtd.Live
	if _, err := h.Attach(ctx, h.source(image), attach.Options{}); !errors.Is(err, attach.ErrOff) {
		t.Errorf("into the machine: got %v, want ErrOff", err)
	}
	h.Scope = 0
	o := attach.Options{Model: qmp.SCSIDisk, Persist: true}
	if _, err := h.Attach(ctx, h.lab.source(image), o); !errors.Is(err, attach.ErrUnowned) {
		t.Errorf("without an owner: got %v, want ErrUnowned", err)
	}
	h.wantNothing(t)
	p, err := h.Attach(ctx, h.source(image), o)
	do(t, p, err)
	h.Virsh(t, "start", "--paused", "--domain="+domainName)
}

// TestDomainThatIsShutOffMeanwhile, after it was looked up, has nothing plugged and
// nothing grown but what its next start will have.
func TestDomainThatIsShutOffMeanwhile(t *testing.T) {
	t.Parallel()
	h := startHost(t)
	ctx := testenv.Context(t)
	s := h.source(h.image(t, "disk", diskSize))
	s.Add.Persist = true
	p, err := h.Attach(ctx, s, attach.Options{Model: qmp.SCSIDisk, Persist: true})
	do(t, p, err)
	planned, err := h.Attach(ctx, h.source(h.image(t, "other", diskSize)), attach.Options{Model: qmp.SCSIDisk})
	must(t, err)
	h.Virsh(t, "destroy", "--domain="+domainName)
	if _, err := planned.Run(ctx); !errors.As(err, new(*libvirtd.Error)) || errors.Is(err, attach.ErrIncomplete) {
		t.Errorf("a plan from before: %v, want libvirt's refusal alone", err)
	}
	for _, scope := range []libvirtd.Scope{0, libvirtd.Live} {
		h.Scope = scope
		if _, err := h.Attach(ctx, s, attach.Options{Model: qmp.SCSIDisk}); !errors.Is(err, attach.ErrOff) {
			t.Errorf("attach with scope %d: got %v, want ErrOff", scope, err)
		}
	}
	h.Scope = 0
	p, err = h.Resize(ctx, "sda", "", attach.Size{Bytes: 2 * diskSize})
	do(t, p, err)
	x, err := h.service.Export(ctx, attach.ExportName(h.Domain.Domain.UUID, attach.DiskID(s.Image)))
	if err != nil || x.Size != 2*diskSize {
		t.Errorf("export of %d bytes, %v", x.Size, err)
	}
	h.Virsh(t, "start", "--paused", "--domain="+domainName)
}

// TestSavedGuestKeepsItsExport, whether its configuration has the disk too or
// nothing but the export is left of it.
func TestSavedGuestKeepsItsExport(t *testing.T) {
	t.Parallel()
	h := startHost(t)
	ctx := testenv.Context(t)
	s := h.source(h.image(t, "disk", diskSize))
	s.Add.Persist = true
	for _, persist := range []bool{true, false} {
		p, err := h.Attach(ctx, s, attach.Options{Model: qmp.SCSIDisk, Persist: persist})
		do(t, p, err)
		h.Virsh(t, "resume", "--domain="+domainName)
		h.Virsh(t, "managedsave", "--domain="+domainName)
		for _, word := range []string{s.Image, "sda"} {
			if _, err := h.detachByName(ctx, word); !errors.Is(err, attach.ErrSaved) {
				t.Errorf("persist %v: detach %q: %v, want ErrSaved", persist, word, err)
			}
		}
		h.Virsh(t, "start", "--paused", "--domain="+domainName)
		if got := h.states(t); got&libvirtd.Live == 0 {
			t.Errorf("persist %v: the guest that was saved has no disk", persist)
		}
		h.Virsh(t, "resume", "--domain="+domainName)
		h.Virsh(t, "managedsave", "--domain="+domainName)
		id, err := h.Resolve(ctx, s.Image)
		must(t, err)
		p, err = h.Detach(ctx, id, true)
		do(t, p, err)
		h.wantNothing(t)
		h.Virsh(t, "managedsave-remove", "--domain="+domainName)
		h.Virsh(t, "start", "--paused", "--domain="+domainName)
	}
}

// TestDiskOfATransientDomain, of which libvirt has no configuration: the disk comes
// and goes with its export, and a configuration that is asked for is refused before
// anything is done.
func TestDiskOfATransientDomain(t *testing.T) {
	t.Parallel()
	h := startHost(t)
	ctx := testenv.Context(t)
	h.makeTransient(t)
	s := h.source(h.image(t, "disk", diskSize))
	for _, scope := range []libvirtd.Scope{0, libvirtd.Live} {
		h.Scope = libvirtd.Config
		_, intoConfig := h.Attach(ctx, s, attach.Options{Model: qmp.SCSIDisk})
		h.Scope = scope
		_, intoBoth := h.Attach(ctx, s, attach.Options{Model: qmp.SCSIDisk, Persist: true})
		if !errors.Is(intoConfig, attach.ErrTransient) || !errors.Is(intoBoth, attach.ErrTransient) {
			t.Errorf("into a configuration: %v, into both states: %v, want ErrTransient", intoConfig, intoBoth)
		}
		h.wantNothing(t)
		for _, want := range []bool{true, false} {
			p, err := h.Attach(ctx, s, attach.Options{Model: qmp.SCSIDisk})
			if changed := do(t, p, err); changed != want {
				t.Errorf("attach: changed %v, want %v", changed, want)
			}
		}
		h.Scope = libvirtd.Config
		p, err := h.Detach(ctx, "sda", false)
		if do(t, p, err) {
			t.Error("a disk was taken out of a configuration")
		}
		h.Scope = scope
		p, err = h.detachByName(ctx, s.Image)
		do(t, p, err)
		h.wantNothing(t)
	}
}

// makeTransient makes another domain of the host's, without a configuration.
func (h *host) makeTransient(t *testing.T) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "d.xml")
	must(t, os.WriteFile(file, []byte(h.Virsh(t, "dumpxml", "--inactive", "--domain="+domainName)), 0o600))
	h.Virsh(t, "destroy", "--domain="+domainName)
	h.Virsh(t, "undefine", "--domain="+domainName)
	h.Virsh(t, "create", "--paused", file)
	var err error
	h.Domain.Domain, err = h.Session.Lookup(testenv.Context(t), domainName)
	must(t, err)
}

// wantNothing checks that no disk and no export is there.
func (h *host) wantNothing(t *testing.T) {
	t.Helper()
	for _, more := range [][]string{nil, {"--inactive"}} {
		if text := h.Virsh(t, append([]string{"dumpxml", "--domain=" + domainName}, more...)...); strings.Contains(text, "<disk") {
			t.Errorf("a disk is left:\n%s", text)
		}
	}
	list, err := h.service.Exports(testenv.Context(t))
	if err != nil || len(list) != 0 {
		t.Errorf("exports left: %+v, %v", list, err)
	}
}

// TestAttachToADomainThatFailsLeavesNothing has libvirt refuse the disk, and
// the user interrupt after each step.
func TestAttachToADomainThatFailsLeavesNothing(t *testing.T) {
	t.Parallel()
	h := startHost(t)
	ctx := testenv.Context(t)
	image := h.image(t, "disk", diskSize)
	p, err := h.Attach(ctx, h.source(image), attach.Options{Model: qmp.SCSIDisk, ID: "no,such<name"})
	must(t, err)
	if _, err := p.Run(ctx); !errors.As(err, new(*libvirtd.Error)) || errors.Is(err, attach.ErrIncomplete) {
		t.Errorf("a target that libvirt does not know: %v", err)
	}
	h.wantNothing(t)
	if _, err := h.Attach(ctx, h.source(image), attach.Options{Model: qmp.NVMe}); !errors.Is(err, attach.ErrLibvirt) {
		t.Errorf("nvme: %v", err)
	}
	for at := 0; ; at++ {
		p, err := h.Attach(ctx, h.source(image), attach.Options{Model: qmp.SCSIDisk, Renew: true})
		must(t, err)
		if at == len(p.Steps)-1 {
			break
		}
		if err := interrupted(ctx, p, at); !errors.Is(err, context.Canceled) || errors.Is(err, attach.ErrIncomplete) {
			t.Errorf("interrupted at %q: %v", p.Steps[at].Name, err)
		}
		h.wantNothing(t)
		if left := h.nodes(t); left != "" {
			t.Errorf("interrupted at %q, nodes left:\n%s", p.Steps[at].Name, left)
		}
	}
}

// TestDomainThatEndsLeavesNothing: it ends before the first step of an attach, or
// before the last, and a transient one is unknown then.
func TestDomainThatEndsLeavesNothing(t *testing.T) {
	t.Parallel()
	h := startHost(t)
	ctx := testenv.Context(t)
	s := h.source(h.image(t, "disk", diskSize))
	for _, tt := range []struct{ transient, last bool }{{false, true}, {true, false}, {true, true}} {
		if tt.transient && !tt.last {
			h.makeTransient(t)
		}
		file := filepath.Join(t.TempDir(), "d.xml")
		must(t, os.WriteFile(file, []byte(h.Virsh(t, "dumpxml", "--inactive", "--domain="+domainName)), 0o600))
		p, err := h.Attach(ctx, s, attach.Options{Model: qmp.SCSIDisk, Renew: true})
		must(t, err)
		at := 0
		if tt.last {
			at = len(p.Steps) - 1
		}
		before(p, at, func() { h.Virsh(t, "destroy", "--domain="+domainName) })
		if _, err := p.Run(ctx); err == nil || errors.Is(err, attach.ErrIncomplete) {
			t.Errorf("transient %v, ended before %q: %v", tt.transient, p.Steps[at].Name, err)
		}
		if list, err := h.service.Exports(ctx); err != nil || len(list) > 0 {
			t.Errorf("transient %v, ended before %q: exports left: %+v, %v", tt.transient, p.Steps[at].Name, list, err)
		}
		h.Virsh(t, "create", "--paused", file)
	}
}

// TestDiskOfADomainThatEndsIsDetached is TestDiskOfAMachineThatDiesIsDetached with a
// domain, one that has a delay of its disk to be forgotten. A transient one is unknown
// then.
func TestDiskOfADomainThatEndsIsDetached(t *testing.T) {
	t.Parallel()
	h := startHost(t)
	ctx := testenv.Context(t)
	s := h.source(h.image(t, "disk", diskSize))
	file := filepath.Join(t.TempDir(), "d.xml")
	must(t, os.WriteFile(file, []byte(h.Virsh(t, "dumpxml", "--inactive", "--domain="+domainName)), 0o600))
	for _, transient := range []bool{false, true} {
		if transient {
			h.makeTransient(t)
		}
		for at, last := 0, 0; at <= last; at++ {
			p, err := h.Attach(ctx, s, attach.Options{Model: qmp.SCSIDisk, Renew: true})
			do(t, p, err)
			p, err = h.Detach(ctx, "sda", false)
			must(t, err)
			last = len(p.Steps) - 1
			before(p, at, func() { h.Virsh(t, "destroy", "--domain="+domainName) })
			if changed, err := p.Run(ctx); err != nil || !changed {
				t.Errorf("transient %v, ended before %q: changed %v, %v", transient, p.Steps[at].Name, changed, err)
			}
			if list, err := h.service.Exports(ctx); err != nil || len(list) > 0 {
				t.Fatalf("transient %v, ended before %q: exports left: %+v, %v", transient, p.Steps[at].Name, list, err)
			}
			h.Virsh(t, "create", "--paused", file)
		}
	}
}

// TestDomainThatEndsWhileItsDiskGrowsLeavesTheExport is
// TestMachineThatDiesWhileItsDiskGrowsLeavesTheExport with a domain.
func TestDomainThatEndsWhileItsDiskGrowsLeavesTheExport(t *testing.T) {
	t.Parallel()
	h := startHost(t)
	ctx := testenv.Context(t)
	s := h.source(h.image(t, "disk", diskSize))
	for at, size, last := 1, int64(diskSize), 1; at <= last; at++ {
		p, err := h.Attach(ctx, s, attach.Options{Model: qmp.SCSIDisk})
		do(t, p, err)
		size += diskSize
		p, err = h.Resize(ctx, "sda", "", attach.Size{Bytes: size})
		must(t, err)
		last = len(p.Steps) - 1
		before(p, at, func() { h.Virsh(t, "destroy", "--domain="+domainName) })
		_, err = p.Run(ctx)
		wantGrown(t, p.Steps[at].Name, err)
		h.Virsh(t, "start", "--paused", "--domain="+domainName)
	}
}

// interrupted runs a plan whose user interrupts it in a step.
func interrupted(ctx context.Context, p *attach.Plan, at int) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	step := p.Steps[at].Do
	p.Steps[at].Do = func(ctx context.Context) (bool, error) {
		defer cancel()
		return step(ctx)
	}
	_, err := p.Run(ctx)
	return err
}

// TestDelayIsSetLater in QEMU, for a disk that was attached without it: whoever
// follows the note of the first attach has a guest that waits for its server.
func TestDelayIsSetLater(t *testing.T) {
	t.Parallel()
	h := startHost(t)
	ctx := testenv.Context(t)
	s := h.source(h.image(t, "disk", diskSize))
	s.Add.Persist = true
	for _, tt := range []struct {
		renew         bool
		changed, says string
	}{
		{false, "true", "--keep-reconnect sets it"},
		{false, "false", "--keep-reconnect sets it"},
		{true, "true", "QEMU has it"},
		{true, "true", "QEMU has it"}, // which does not say so
	} {
		h.notes = nil
		p, err := h.Attach(ctx, s, attach.Options{Model: qmp.SCSIDisk, Renew: tt.renew})
		if changed := do(t, p, err); fmt.Sprint(changed) != tt.changed || len(h.notes) != 1 || !strings.Contains(h.notes[0], tt.says) {
			t.Errorf("renew %v: changed %v, notes %q, want %s and %q", tt.renew, changed, h.notes, tt.changed, tt.says)
		}
		h.wantNodes(t, 1, diskSize)
	}
	h.endService()
	h.beginRead(t)
	h.startService(t)
	await(t, func() bool {
		done, failed := h.reads(t)
		if failed > 0 {
			t.Fatal("a read from before the service was started again has failed")
		}
		return done > 0
	})
	p, err := h.Detach(ctx, "sda", true)
	do(t, p, err)
	h.wantNothing(t)
}

// TestDelayThatIsKeptIsThatOfTheDisk where libvirt has no word for it: it is kept
// where nothing is said, another is refused unless QEMU is to connect anew with it,
// and it does not outlast the disk that it was given to.
func TestDelayThatIsKeptIsThatOfTheDisk(t *testing.T) {
	t.Parallel()
	h := startHost(t)
	ctx := testenv.Context(t)
	s := h.source(h.image(t, "disk", diskSize))
	s.Add.Persist = true
	kept := regexp.MustCompile(`<[^>]*:kept [^>]*value=['"]([0-9]+)`)
	const has, sets = "QEMU has it", "--keep-reconnect sets it"
	for i, tt := range []struct {
		said    attach.Options
		changed bool
		kept    string
		says    string // "": refused
	}{
		{attach.Options{Renew: true, Reconnect: 5 * time.Minute}, true, "300", has},
		{attach.Options{Renew: true}, true, "300", has}, // QEMU does not say what it has
		{attach.Options{}, false, "300", has},
		{attach.Options{Reconnect: 5 * time.Minute}, false, "300", has},
		{attach.Options{Reconnect: 30 * time.Second}, false, "300", ""},
		{attach.Options{Reconnect: 30 * time.Second, Renew: true}, true, "30", has},
		{attach.Options{Persist: true}, true, "30", has},
		{attach.Options{Reconnect: 5 * time.Minute, Persist: true}, false, "30", ""},
		{attach.Options{}, true, "", sets}, // after virsh has taken it away
		{attach.Options{Reconnect: 30 * time.Second}, false, "", sets},
	} {
		if tt.says == sets && tt.changed {
			h.empty(t)
		}
		h.notes, tt.said.Model = nil, qmp.SCSIDisk
		p, err := h.Attach(ctx, s, tt.said)
		if refused := tt.says == ""; errors.Is(err, attach.ErrDiffers) != refused || refused && !strings.Contains(err.Error(), "waiting") {
			t.Fatalf("%d: %v, want it refused: %v", i, err, refused)
		}
		changed := err == nil && do(t, p, nil)
		var is string
		if found := kept.FindStringSubmatch(h.Virsh(t, "dumpxml", "--domain="+domainName)); found != nil {
			is = found[1]
		}
		if notes := strings.Join(h.notes, "; "); changed != tt.changed || is != tt.kept || !strings.Contains(notes, tt.says) || strings.Contains(notes, sets) != (tt.says == sets) {
			t.Errorf("%d: changed %v, kept %q, notes %q, want %+v", i, changed, is, notes, tt)
		}
	}
}

// beginRead has QEMU begin a read from the domain's one disk.
func (h *host) beginRead(t *testing.T) {
	t.Helper()
	ctx, monitor := testenv.Context(t), h.Session.Monitor(h.Domain.Domain)
	disks, err := qmp.QueryBlock(ctx, monitor)
	must(t, err)
	_, err = monitor.Execute(ctx, "human-monitor-command", map[string]any{"command-line": fmt.Sprintf(`qemu-io -d %s "aio_read 0 512"`, disks[0].QDev)})
	must(t, err)
}

// reads are those from the domain's one disk that have ended, as QEMU counts them.
func (h *host) reads(t *testing.T) (done, failed int) {
	t.Helper()
	out, err := h.Session.Monitor(h.Domain.Domain).Execute(testenv.Context(t), "query-blockstats", nil)
	must(t, err)
	var disks []struct {
		Stats struct {
			Done   int `json:"rd_operations"`
			Failed int `json:"failed_rd_operations"`
		}
	}
	must(t, json.Unmarshal(out, &disks))
	return disks[0].Stats.Done, disks[0].Stats.Failed
}

// tap passes on what a session with libvirt says, and calls heard before each
// message.
type tap struct {
	mu     sync.Mutex
	heard  func(message []byte) // guarded by mu
	hidden string               // guarded by mu; as a proxy's
	guest  func() []byte        // guarded by mu; says what getFsinfo returns, nil hangs up
}

// getFsinfo is the number of libvirt's call for a guest's file systems.
const getFsinfo = 349

// answer is the tap's own answer to a message, if it has one.
func (p *tap) answer(message []byte) (reply []byte, own bool) {
	if p.guest == nil || binary.BigEndian.Uint32(message[12:]) != getFsinfo {
		return nil, false
	}
	says := p.guest()
	if says == nil {
		return nil, true
	}
	reply = append(slices.Clone(message[:28]), says...)
	binary.BigEndian.PutUint32(reply, uint32(len(reply)))
	binary.BigEndian.PutUint32(reply[16:], 1) // a reply
	return reply, true
}

// filesystem is a mounted file system on disks as libvirt describes it to clients.
func filesystem(name string, targets ...string) []byte {
	b := binary.BigEndian.AppendUint32(nil, 1)
	text := func(s string) {
		b = append(binary.BigEndian.AppendUint32(b, uint32(len(s))), s...)
		b = append(b, make([]byte, -len(b)&3)...)
	}
	text("/mnt")
	text(name)
	text("ext4")
	b = binary.BigEndian.AppendUint32(b, uint32(len(targets)))
	for _, target := range targets {
		text(target)
	}
	return binary.BigEndian.AppendUint32(b, 1)
}

// hide is as a proxy's.
func (p *tap) hide(option string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.hidden = option
}

// speak makes f the guest that the tap asks in libvirt's place.
func (p *tap) speak(f func() []byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.guest = f
}

// hear makes f what the tap calls, nil for nothing.
func (p *tap) hear(f func(message []byte)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.heard = f
}

// tapped has the host's domain speak to libvirt through a tap.
func (h *host) tapped(t *testing.T) *tap {
	t.Helper()
	path := filepath.Join(testenv.TempDir(t), "tap")
	l, err := net.Listen("unix", path)
	must(t, err)
	var all sync.WaitGroup
	t.Cleanup(func() { l.Close(); all.Wait() })
	p := &tap{}
	all.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			all.Go(func() { p.serve(c, h.Socket) })
		}
	})
	h.Session, err = libvirtd.Dial(testenv.Context(t), path, libvirtd.Private)
	must(t, err)
	t.Cleanup(func() { h.Session.Close() })
	return p
}

func (p *tap) serve(c net.Conn, to string) {
	defer c.Close()
	l, err := net.Dial("unix", to)
	if err != nil {
		return
	}
	answers := make(chan struct{})
	go func() {
		defer close(answers)
		p.pass(l, c, func([]byte) {})
	}()
	defer func() { l.Close(); <-answers }()
	p.pass(c, l, func(message []byte) {
		if p.heard != nil {
			p.heard(message)
		}
	})
}

// pass passes messages on, which begin with their length, until one side ends.
// before is called with p.mu, for each.
func (p *tap) pass(from, to net.Conn, before func(message []byte)) {
	for {
		message := make([]byte, 4)
		if _, err := io.ReadFull(from, message); err != nil {
			return
		}
		message = append(message, make([]byte, binary.BigEndian.Uint32(message)-4)...)
		if _, err := io.ReadFull(from, message[4:]); err != nil {
			return
		}
		p.mu.Lock()
		before(message)
		message = veil(message, p.hidden)
		reply, own := p.answer(message)
		p.mu.Unlock()
		where := to
		if own {
			message, where = reply, from
		}
		if _, err := where.Write(message); err != nil || message == nil {
			return
		}
	}
}

// addAgent starts the domain with a channel for an agent.
func (h *host) addAgent(t *testing.T) {
	t.Helper()
	text := h.Virsh(t, "dumpxml", "--inactive", "--domain="+domainName)
	channel := "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>"
	file := filepath.Join(t.TempDir(), "d.xml")
	must(t, os.WriteFile(file, []byte(strings.Replace(text, "</devices>", channel+"</devices>", 1)), 0o600))
	h.Virsh(t, "destroy", "--domain="+domainName)
	h.Virsh(t, "define", file)
	h.Virsh(t, "start", "--paused", "--domain="+domainName)
}

// TestMountedDiskOfADomainIsNotDetached, unless its guest falls silent: the session
// that has asked it ends then, and the detach goes on.
func TestMountedDiskOfADomainIsNotDetached(t *testing.T) {
	t.Parallel()
	h := startHost(t)
	ctx := testenv.Context(t)
	h.addAgent(t)
	libvirt := h.tapped(t)
	s := h.source(h.image(t, "disk", diskSize))
	for _, tt := range []struct {
		guest   string
		says    []byte
		mounted bool
		note    string
	}{
		{"has mounted it", filesystem("sda1", "sdz", "sda"), true, ""},
		{"has mounted another", filesystem("sdz1", "sdz"), false, ""},
		{"has mounted what libvirt does not find", filesystem("sda1"), false, "could not be checked"},
		{"has mounted a file", filesystem("loop0"), false, ""},
		{"falls silent", nil, false, "could not be checked"},
	} {
		t.Run(tt.guest, func(t *testing.T) {
			libvirt.speak(func() []byte { return tt.says })
			p, err := h.Attach(ctx, s, attach.Options{Model: qmp.SCSIDisk})
			do(t, p, err)
			h.notes = nil
			p, err = h.Detach(ctx, "sda", false)
			must(t, err)
			_, err = p.Run(ctx)
			notes := strings.Join(h.notes, "\n")
			if errors.Is(err, attach.ErrMounted) != tt.mounted || (err != nil) != tt.mounted || !strings.Contains(notes, tt.note) || tt.note == "" && notes != "" {
				t.Errorf("detach: %v, notes %q", err, notes)
			}
			p, err = h.Detach(ctx, "sda", true)
			do(t, p, err)
			h.wantNothing(t)
		})
	}
}

// TestInterruptWhileLibvirtIsAskedLeavesNothing has the user interrupt an attach
// at each of its messages to libvirt in turn, before libvirt has it.
func TestInterruptWhileLibvirtIsAskedLeavesNothing(t *testing.T) {
	t.Parallel()
	h := startHost(t)
	p := h.tapped(t)
	image := h.image(t, "disk", diskSize)
	at := 1
	for ; ; at++ {
		plan, err := h.Attach(testenv.Context(t), h.source(image), attach.Options{Model: qmp.SCSIDisk, Renew: true})
		must(t, err)
		ctx, cancel := context.WithCancel(testenv.Context(t))
		defer cancel()
		said := 0
		p.hear(func([]byte) {
			if said++; said == at {
				cancel()
			}
		})
		_, err = plan.Run(ctx)
		p.hear(nil)
		if err == nil { // nothing was left to be done
			break
		}
		if !errors.Is(err, context.Canceled) || errors.Is(err, attach.ErrIncomplete) {
			t.Fatalf("interrupted at message %d: %v", at, err)
		}
		h.wantNothing(t)
	}
	list, err := h.service.Exports(testenv.Context(t))
	if err != nil || len(list) != 1 || at < 10 || !strings.Contains(h.Virsh(t, "dumpxml", "--domain="+domainName), "protocol='nbd'") {
		t.Errorf("done in spite of an interrupt at message %d: exports %+v, %v", at, list, err)
	}
}

// TestAttachesAtOneTime has another attach be done while one is under way, before
// each of its messages to libvirt: of the same disk, which is there then, and of
// another, which has the target that both were planned for.
func TestAttachesAtOneTime(t *testing.T) {
	t.Parallel()
	h := startHost(t)
	other := *h.Domain
	p := h.tapped(t)
	for _, same := range []bool{true, false} {
		for at := 1; at <= 5; at++ {
			t.Run(fmt.Sprintf("same disk %v, before message %d", same, at), func(t *testing.T) {
				ctx := testenv.Context(t)
				mine := h.image(t, "mine", diskSize)
				theirs := mine
				if !same {
					theirs = h.image(t, "theirs", diskSize)
				}
				first, err := h.Attach(ctx, h.source(mine), attach.Options{Model: qmp.SCSIDisk})
				must(t, err)
				second, err := other.Attach(ctx, h.source(theirs), attach.Options{Model: qmp.SCSIDisk})
				must(t, err)
				said, inTheirs := 0, errors.New("not done")
				p.hear(func([]byte) {
					if said++; said == at {
						_, inTheirs = second.Run(ctx)
					}
				})
				_, err = first.Run(ctx)
				p.hear(nil)
				if err := errors.Join(err, inTheirs); err != nil {
					t.Fatal(err)
				}
				if (first.Disk == second.Disk) != same {
					t.Errorf("attached as %q and %q", first.Disk, second.Disk)
				}
				for i, image := range []string{mine, theirs} {
					target, err := h.Resolve(ctx, image)
					if want := []string{first.Disk, second.Disk}[i]; err != nil || target != want {
						t.Errorf("%q is %q, %v, want %q", image, target, err, want)
					}
					if _, err := h.service.Export(ctx, attach.ExportName(h.Domain.Domain.UUID, attach.DiskID(image))); err != nil {
						t.Error(err)
					}
				}
				for _, target := range []string{first.Disk, second.Disk} {
					plan, err := h.Detach(ctx, target, false)
					do(t, plan, err)
				}
				h.wantNothing(t)
			})
		}
	}
}

// TestResizeOfADomainThatFailsIsDoneByASecond interrupts it in each step: all
// is as it was, or the guest has the size and the same command does the rest.
func TestResizeOfADomainThatFailsIsDoneByASecond(t *testing.T) {
	t.Parallel()
	secondResize(t, startHost(t))
}

// TestResizeByANewerLibvirtThatFailsIsDoneByASecond is the same with libvirt 11.
func TestResizeByANewerLibvirtThatFailsIsDoneByASecond(t *testing.T) {
	t.Parallel()
	secondResize(t, startNewerHost(t))
}

func secondResize(t *testing.T, h *host) {
	t.Helper()
	ctx := testenv.Context(t)
	p, err := h.Attach(ctx, h.source(h.image(t, "disk", diskSize)), attach.Options{Model: qmp.SCSIDisk})
	do(t, p, err)
	size, last := int64(diskSize), 0
	for at := 0; at <= last; at++ {
		p, err := h.Resize(ctx, "sda", "", attach.Size{Bytes: size + diskSize})
		must(t, err)
		last = len(p.Steps) - 2
		before := h.nodes(t)
		if err := interrupted(ctx, p, at); !errors.Is(err, context.Canceled) {
			t.Errorf("interrupted at %q: %v", p.Steps[at].Name, err)
		}
		final := slices.IndexFunc(p.Steps, func(s attach.Step) bool { return strings.HasPrefix(s.Name, "tell") })
		if at < final && h.nodes(t) != before {
			t.Errorf("interrupted at %q: nodes\n%swere\n%s", p.Steps[at].Name, h.nodes(t), before)
		}
		size += diskSize
		p, err = h.Resize(ctx, "sda", "", attach.Size{Bytes: size})
		do(t, p, err)
		h.wantNodes(t, 1, size)
	}
	for at := 0; at <= last; at++ {
		size += diskSize
		p, err := h.Resize(ctx, "sda", "", attach.Size{Bytes: size})
		must(t, err)
		killed(t, p, at)
		if h.newer {
			h.leaveCarrier(t)
		}
		p, err = h.Resize(ctx, "sda", "", attach.Size{Bytes: size})
		do(t, p, err)
		h.wantNodes(t, 1, size)
	}
	p, err = h.Detach(ctx, "sda", true)
	do(t, p, err)
	h.wantNothing(t)
}

// TestDetachEndsWhatAResizeHasLeft that was cut short in any step: no client is left,
// and the export goes without force.
func TestDetachEndsWhatAResizeHasLeft(t *testing.T) {
	t.Parallel()
	h := startHost(t)
	ctx := testenv.Context(t)
	image, size := h.image(t, "disk", diskSize), int64(diskSize)
	for at, last := 0, 0; at <= last; at++ {
		p, err := h.Attach(ctx, h.source(image), attach.Options{Model: qmp.SCSIDisk})
		do(t, p, err)
		size += diskSize
		p, err = h.Resize(ctx, "sda", "", attach.Size{Bytes: size})
		must(t, err)
		last = len(p.Steps) - 2
		killed(t, p, at)
		p, err = h.Detach(ctx, "sda", false)
		do(t, p, err)
		h.wantNothing(t)
		if left := h.nodes(t); left != "" {
			t.Errorf("cut short after %q: nodes are left:\n%s", p.Steps[at].Name, left)
		}
	}
}

// TestDiskThatLibvirtTookAwayLeavesNoClient: a resize was cut short when libvirt was
// told to take the disk away, and Detach has nothing of it but its export.
func TestDiskThatLibvirtTookAwayLeavesNoClient(t *testing.T) {
	t.Parallel()
	h := startHost(t)
	ctx := testenv.Context(t)
	s := h.source(h.image(t, "disk", diskSize))
	p, err := h.Attach(ctx, s, attach.Options{Model: qmp.SCSIDisk})
	do(t, p, err)
	p, err = h.Resize(ctx, "sda", "", attach.Size{Bytes: 2 * diskSize})
	must(t, err)
	at := slices.IndexFunc(p.Steps, func(s attach.Step) bool { return strings.Contains(s.Name, "a second time") })
	killed(t, p, at)
	h.Virsh(t, "detach-disk", "--domain="+domainName, "sda", "--live")
	id, err := h.Resolve(ctx, s.Image)
	must(t, err)
	p, err = h.Detach(ctx, id, false)
	do(t, p, err)
	h.wantNothing(t)
	if left := h.nodes(t); left != "" {
		t.Errorf("nodes are left:\n%s", left)
	}
}

// killed runs a plan to the end of a step, and what has begun stays.
func killed(t *testing.T, p *attach.Plan, at int) {
	t.Helper()
	for _, s := range p.Steps[:at+1] {
		if _, err := s.Do(testenv.Context(t)); err != nil {
			t.Fatalf("%s: %v", s.Name, err)
		}
	}
}

// leaveCarrier leaves what a resize has above the disk's client for a moment, if
// one was begun.
func (h *host) leaveCarrier(t *testing.T) {
	t.Helper()
	monitor := h.Session.Monitor(h.Domain.Domain)
	disks, err := qmp.QueryBlock(testenv.Context(t), monitor)
	must(t, err)
	list, err := qmp.QueryNamedBlockNodes(testenv.Context(t), monitor)
	must(t, err)
	for _, n := range list {
		if prefix, second := strings.CutSuffix(n.Name, "-1"); second {
			must(t, qmp.Raw{Node: prefix, ReadOnly: true}.Add(testenv.Context(t), monitor, disks[0].Inserted.Name))
		}
	}
}

// TestDisksWithOneNameAreToldApart: two servers have an export of one name. That
// of the daemon which is asked is meant, and without one neither.
func TestDisksWithOneNameAreToldApart(t *testing.T) {
	t.Parallel()
	h := startHost(t)
	ctx := testenv.Context(t)
	theirs := &lab{dir: testenv.TempDir(t)}
	must(t, os.Chmod(theirs.dir, 0o755))
	theirs.startService(t)
	uris := map[*lab]string{}
	for _, l := range []*lab{&h.lab, theirs} {
		socket := filepath.Join(l.dir, "own.sock")
		x := addExport("disk0", l.image(t, "disk", diskSize))
		x.Listeners = []config.Listener{{URI: "nbd+unix:///?socket=" + socket, Mode: "0666"}}
		_, err := l.service.Add(ctx, x)
		must(t, err)
		uris[l] = "nbd+unix:///disk0?socket=" + socket
		p, err := h.Attach(ctx, attach.Source{URI: uris[l]}, attach.Options{Model: qmp.SCSIDisk})
		do(t, p, err)
	}
	for word, want := range map[string]string{"disk0": "sda", uris[&h.lab]: "sda", uris[theirs]: "sdb", "sdb": "sdb"} {
		if target, err := h.Resolve(ctx, word); err != nil || target != want {
			t.Errorf("%q is %q, %v, want %q", word, target, err, want)
		}
	}
	alone := *h.Domain
	alone.Server = nil
	if target, err := alone.Resolve(ctx, "disk0"); !errors.Is(err, qmp.ErrInvalid) || !strings.Contains(err.Error(), `"sda" "sdb"`) {
		t.Errorf("without a daemon: %q, %v", target, err)
	}
}

// TestDiskThatIsThereOtherwiseIsRefused: what the user has said of a disk is
// compared with the disk that the domain has, when the plan is made and when it
// runs. What was not said is as it is there.
func TestDiskThatIsThereOtherwiseIsRefused(t *testing.T) {
	t.Parallel()
	h := startHost(t)
	ctx := testenv.Context(t)
	s := h.source(h.image(t, "disk", diskSize))
	readOnly := attach.Source{URI: "nbd+unix:///" + attach.ExportName(h.Domain.Domain.UUID, attach.DiskID(s.Image)) +
		"?socket=" + h.dir + "/none.sock", ReadOnly: true}
	plan, err := h.Attach(ctx, s, attach.Options{Model: qmp.SCSIDisk})
	do(t, plan, err)
	sockets, err := filepath.Glob(h.dir + "/*.sock")
	must(t, err)
	readOnly.URI = strings.Replace(readOnly.URI, h.dir+"/none.sock", sockets[0], 1)
	for name, tt := range map[string]struct {
		s    attach.Source
		o    attach.Options
		says string
	}{
		"read-only":      {readOnly, attach.Options{Model: qmp.SCSIDisk}, `"sda", writable`},
		"another bus":    {s, attach.Options{Model: qmp.VirtIOBlk}, `on bus scsi`},
		"another serial": {s, attach.Options{Model: qmp.SCSIDisk, Serial: "ABC"}, `with serial number "VMD`},
	} {
		if _, err := h.Attach(ctx, tt.s, tt.o); !errors.Is(err, attach.ErrDiffers) || !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%s: got %v, want ErrDiffers with %s", name, err, tt.says)
		}
		if x, err := h.Element(ctx, tt.s, tt.o); !errors.Is(err, attach.ErrDiffers) || !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%s: element %s, %v, want ErrDiffers with %s", name, x, err, tt.says)
		}
	}
	if x, err := h.Element(ctx, s, attach.Options{}); err != nil || !strings.Contains(x, `dev="sda" bus="scsi"`) {
		t.Errorf("the element of the disk that is there: %s, %v", x, err)
	}
	keep := s
	keep.Add.Persist = true
	plan, err = h.Attach(ctx, keep, attach.Options{Model: qmp.SCSIDisk, Persist: true})
	must(t, err)
	if _, err := plan.Run(ctx); !errors.Is(err, attach.ErrDiffers) || strings.Contains(h.Virsh(t, "dumpxml", "--inactive", "--domain="+domainName), "nbd") {
		t.Errorf("an export that is not kept: %v", err)
	}
	anyBus := attach.Options{Persist: true}
	if plan, err = h.Attach(ctx, s, anyBus); !do(t, plan, err) {
		t.Error("nothing was put into the configuration")
	}
	if plan, err = h.Attach(ctx, s, anyBus); do(t, plan, err) {
		t.Error("the second attach changed something")
	}
	text := h.Virsh(t, "dumpxml", "--inactive", "--domain="+domainName)
	if !strings.Contains(text, "<target dev='sda' bus='scsi'/>") || strings.Contains(text, "'virtio'/>") {
		t.Errorf("the configuration has another disk than the machine:\n%s", text)
	}
	plan, err = h.Detach(ctx, "sda", false)
	do(t, plan, err)
	early, err := h.Attach(ctx, s, attach.Options{Model: qmp.SCSIDisk, Serial: "EARLY"})
	must(t, err)
	plan, err = h.Attach(ctx, s, attach.Options{Model: qmp.SCSIDisk})
	do(t, plan, err)
	if changed, err := early.Run(ctx); changed || !errors.Is(err, attach.ErrDiffers) {
		t.Errorf("a plan that was made before the disk was there: changed %v, %v", changed, err)
	}
}

// TestOtherDelayIsRefused where libvirt knows that of the disk. One that comes to
// as many seconds is no other, and what was not said is as it is there.
func TestOtherDelayIsRefused(t *testing.T) {
	t.Parallel()
	h := startNewerHost(t)
	ctx := testenv.Context(t)
	s := h.source(h.image(t, "disk", diskSize))
	for i, tt := range []struct {
		said time.Duration
		want error
	}{
		{4900 * time.Millisecond, nil},
		{5 * time.Second, nil},
		{0, nil},
		{5 * time.Minute, attach.ErrDiffers},
		{limits.AttachReconnect, attach.ErrDiffers},
	} {
		for _, renew := range []bool{false, true} {
			p, err := h.Attach(ctx, s, attach.Options{Model: qmp.SCSIDisk, Reconnect: tt.said, Renew: renew})
			if !errors.Is(err, tt.want) || err != nil && !strings.Contains(err.Error(), "waiting 5s") {
				t.Errorf("%v, renew %v: got %v, want %v", tt.said, renew, err, tt.want)
			}
			if first := i == 0 && !renew; err == nil && do(t, p, nil) != first {
				t.Errorf("%v, renew %v: changed the domain, or did not", tt.said, renew)
			}
		}
	}
	p, err := h.Attach(ctx, s, attach.Options{Persist: true})
	do(t, p, err)
	if delay := libvirtd.ReconnectDelay(libvirtd.Disk(h.describe(t, "--inactive"), "sda")); delay != 5*time.Second {
		t.Errorf("the configuration has a delay of %v, want that of the machine, 5s", delay)
	}
}

// TestDomainComesToNoOtherContentsByARestart of the service: the disk that the
// domain has is told from one that its image would be with other options, and one
// that forgets from its next opening.
func TestDomainComesToNoOtherContentsByARestart(t *testing.T) {
	t.Parallel()
	h := startHost(t)
	ctx := testenv.Context(t)
	s := h.source(h.image(t, "disk", diskSize))
	p, err := h.Attach(ctx, s, attach.Options{Model: qmp.SCSIDisk})
	do(t, p, err)
	other := s
	other.Add.Overlay = &config.Overlay{Quota: 1 << 20}
	for _, says := range []string{"overlay is none, not", `as ["sda"], attached with other options`} {
		for _, target := range []string{"", "sda", "sdb"} {
			if _, err := h.Attach(ctx, other, attach.Options{Model: qmp.SCSIDisk, ID: target}); !errors.Is(err, attach.ErrDiffers) || !strings.Contains(err.Error(), says) {
				t.Errorf("as %q: got %v, want ErrDiffers with %s", target, err, says)
			}
		}
		h.endService()
		h.startService(t)
	}
	p, err = h.Attach(ctx, s, attach.Options{Model: qmp.SCSIDisk})
	if !do(t, p, err) || p.Disk != "sda" {
		t.Errorf("the same disk: as %q, or it was not served again", p.Disk)
	}
	p, err = h.Detach(ctx, "sda", false)
	do(t, p, err)
	h.wantNothing(t)
	forgets := attach.Options{Model: qmp.SCSIDisk, Reconnect: time.Second}
	for _, first := range []bool{true, false} {
		if p, err = h.Attach(ctx, other, forgets); do(t, p, err) != first {
			t.Errorf("a disk that forgets: changed the domain is not %t", first)
		}
	}
	h.endService()
	h.startService(t)
	if _, err := h.Attach(ctx, other, forgets); !errors.Is(err, attach.ErrDiffers) || !strings.Contains(err.Error(), "an export that ended") {
		t.Errorf("its next opening: got %v, want ErrDiffers", err)
	}
	if _, err := h.Element(ctx, other, forgets); !errors.Is(err, qmp.ErrInvalid) {
		t.Errorf("its element: got %v, want ErrInvalid", err)
	}
	p, err = h.Detach(ctx, "sda", false)
	do(t, p, err)
	h.wantNothing(t)
}

// TestExportOfADiskThatIsGoneIsRemoved has exports left of disks that the domain
// has no more, as after a detach that could not remove one, and after the
// domain's end.
func TestExportOfADiskThatIsGoneIsRemoved(t *testing.T) {
	t.Parallel()
	h := startHost(t)
	ctx := testenv.Context(t)
	image := h.image(t, "disk", diskSize)
	id := attach.DiskID(image)
	export := attach.ExportName(h.Domain.Domain.UUID, id)
	leave := func(image string) {
		t.Helper()
		p, err := h.Attach(ctx, h.source(image), attach.Options{Model: qmp.SCSIDisk})
		do(t, p, err)
		p, err = h.Detach(ctx, p.Disk, true)
		must(t, err)
		p.Steps = p.Steps[:len(p.Steps)-1] // the export stays
		do(t, p, nil)
	}
	for _, word := range []string{image, id, export, "sda"} {
		leave(image)
		got, err := h.Resolve(ctx, word)
		if err != nil || got != id {
			t.Fatalf("%q is %q, %v, want %q", word, got, err, id)
		}
		p, err := h.Detach(ctx, got, false)
		if !do(t, p, err) {
			t.Errorf("%q: nothing was removed", word)
		}
		h.wantNothing(t)
		p, err = h.Detach(ctx, got, false)
		if do(t, p, err) {
			t.Errorf("%q: the second detach changed something", word)
		}
	}
	leave(image)
	if got, err := h.Resolve(ctx, image+"2"); !errors.Is(err, attach.ErrNoDisk) {
		t.Errorf("an image that was never attached is %q, %v", got, err)
	}
	leave(h.image(t, "another", diskSize))
	if got, err := h.Resolve(ctx, "sda"); !errors.Is(err, attach.ErrNoDisk) || !strings.Contains(err.Error(), export) {
		t.Errorf("with two exports left sda is %q, %v", got, err)
	}
	p, err := h.Attach(ctx, h.source(h.image(t, "third", diskSize)), attach.Options{Model: qmp.SCSIDisk})
	do(t, p, err)
	if got, err := h.Resolve(ctx, attach.ExportName(h.Domain.Domain.UUID, attach.DiskID(filepath.Join(h.dir, "third")))); err != nil || got != p.Disk {
		t.Errorf("a disk that is there is %q, %v", got, err)
	}
}

// TestImageInMemoryIsFoundByItsSize, which it was attached by, while a domain has
// the disk and when the export alone is left.
func TestImageInMemoryIsFoundByItsSize(t *testing.T) {
	t.Parallel()
	h := startHost(t)
	ctx := testenv.Context(t)
	s := h.source("1M")
	s.Add.Format = "mem"
	p, err := h.Attach(ctx, s, attach.Options{Model: qmp.SCSIDisk})
	do(t, p, err)
	if got, err := h.Resolve(ctx, "1M"); err != nil || got != "sda" {
		t.Fatalf("1M is %q, %v, want sda", got, err)
	}
	h.empty(t)
	p, err = h.detachByName(ctx, "1M")
	do(t, p, err)
	h.wantNothing(t)
}

// TestElementOfADomain names what Attach would make, and makes nothing.
func TestElementOfADomain(t *testing.T) {
	t.Parallel()
	h := startHost(t)
	ctx := testenv.Context(t)
	text, err := h.Element(ctx, h.source(h.image(t, oddName, diskSize)), attach.Options{Model: qmp.SCSIDisk})
	must(t, err)
	var disk libvirtxml.DomainDisk
	must(t, disk.Unmarshal(text))
	if disk.Target.Dev != "sda" || !strings.HasPrefix(disk.Source.Network.Name, "vm-") || !strings.HasPrefix(disk.Source.Network.Hosts[0].Socket, h.dir) {
		t.Errorf("element %s", text)
	}
	h.wantNothing(t)
}
