package libvirtd_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	libvirt "github.com/digitalocean/go-libvirt"
	"github.com/digitalocean/go-qemu/qemu"
	"libvirt.org/go/libvirtxml"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/qmp"
	"github.com/vmdiskd/vmdiskd/internal/qmp/libvirtd"
	"github.com/vmdiskd/vmdiskd/test/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

const diskSize = 1 << 20

// daemon is a libvirtd of the test's own.
type daemon struct{ *testenv.Libvirt }

func (d *daemon) dial(t *testing.T) *libvirtd.Session {
	t.Helper()
	s, err := libvirtd.Dial(testenv.Context(t), d.Socket, libvirtd.Private)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

const (
	domainName = `-v,"m'<&1`
	exportName = `-a,"b'<&`
)

// boot defines and starts a domain whose processor does not run.
func (d *daemon) boot(t *testing.T) {
	t.Helper()
	x := libvirtxml.Domain{
		Type: "qemu", Name: domainName, Memory: &libvirtxml.DomainMemory{Value: 64, Unit: "MiB"},
		OS: &libvirtxml.DomainOS{Type: &libvirtxml.DomainOSType{Arch: "x86_64", Machine: "q35", Type: "hvm"}},
		Devices: &libvirtxml.DomainDeviceList{Emulator: "/usr/bin/qemu-system-x86_64", MemBalloon: &libvirtxml.DomainMemBalloon{Model: "none"},
			Controllers: []libvirtxml.DomainController{
				{Type: "pci", Model: "pcie-root"}, {Type: "pci", Model: "pcie-root-port"}, {Type: "pci", Model: "pcie-root-port"},
				{Type: "scsi", Model: "virtio-scsi"}, {Type: "usb", Model: "none"},
			}},
	}
	text, err := x.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "d.xml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	d.Virsh(t, "define", file)
	d.Virsh(t, "start", "--paused", "--domain="+domainName)
	t.Cleanup(func() { d.Virsh(t, "destroy", "--domain="+domainName) })
}

// serve has a disk that the domain's QEMU, of another user, may connect to.
func serve(t *testing.T) string {
	t.Helper()
	s := testenv.Start(t, testenv.Options{Image: testenv.PatternImage(t, diskSize), Export: exportName})
	if err := os.Chmod(s.Socket, 0o666); err != nil {
		t.Fatal(err)
	}
	for dir := filepath.Dir(s.Socket); dir != "/tmp" && dir != "/"; dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return s.Socket
}

// TestDiskComesAndGoesThroughLibvirt is the life of a disk in a real libvirt.
func TestDiskComesAndGoesThroughLibvirt(t *testing.T) {
	d := &daemon{testenv.StartLibvirt(t)}
	d.boot(t)
	s := d.dial(t)
	ctx := testenv.Context(t)
	if v, err := s.Version(ctx); err != nil || v.Major < 9 {
		t.Errorf("version %v, %v", v, err)
	}
	dom := wantDomain(t, s)
	t.Run("disk", func(t *testing.T) { diskLife(t, d, s, dom) })
	t.Run("monitor", func(t *testing.T) { monitorThroughLibvirt(t, s, dom) })
	t.Run("no such", func(t *testing.T) {
		for _, name := range []string{"none", "--all", "00000000-0000-0000-0000-000000000000", strings.Repeat("0", 32)} {
			if _, err := s.Lookup(ctx, name); !libvirtd.HasCode(err, libvirt.ErrNoDomain) {
				t.Errorf("lookup %q: %v", name, err)
			}
		}
		for _, name := range []string{"", "a\x00b", strings.Repeat("x", 1000)} {
			if _, err := s.Lookup(ctx, name); !errors.Is(err, qmp.ErrInvalid) {
				t.Errorf("lookup %.20q: %v", name, err)
			}
		}
	})
}

// wantDomain finds the domain in the list, by name and by UUID.
func wantDomain(t *testing.T, s *libvirtd.Session) libvirtd.Domain {
	t.Helper()
	ctx := testenv.Context(t)
	list, err := s.Domains(ctx)
	if err != nil || len(list) != 1 || list[0].Name != domainName || !list[0].Active {
		t.Fatalf("domains %+v, %v", list, err)
	}
	for _, name := range []string{list[0].Name, list[0].UUID, strings.ToUpper(list[0].UUID)} {
		if dom, err := s.Lookup(ctx, name); err != nil || dom != list[0] {
			t.Errorf("lookup %q: %+v, %v", name, dom, err)
		}
	}
	return list[0]
}

func diskLife(t *testing.T, d *daemon, s *libvirtd.Session, dom libvirtd.Domain) {
	ctx := testenv.Context(t)
	w, err := s.Watch(ctx, dom)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	socket := serve(t)
	for _, bus := range []string{"scsi", "virtio"} {
		disk := element(t, s, dom, libvirtd.NBDDisk{Socket: socket, Export: exportName, Bus: bus, Serial: "S-" + bus, Reconnect: 10 * time.Second, Discard: true})
		target := disk.Target.Dev
		if err := s.AttachDisk(ctx, dom, disk, libvirtd.Live|libvirtd.Config); err != nil {
			t.Fatal(err)
		}
		if c, err := w.Next(ctx); err != nil || c.Kind != libvirtd.Added {
			t.Errorf("change %+v, %v", c, err)
		}
		for _, config := range []bool{false, true} {
			x, err := s.Describe(ctx, dom, config)
			if err != nil {
				t.Fatal(err)
			}
			got := libvirtd.Disk(x, target)
			if got == nil || got.Source.Network.Name != exportName || got.Source.Network.Hosts[0].Socket != socket || got.Serial != "S-"+bus {
				t.Errorf("described %+v", got)
			}
		}
		if text := d.Virsh(t, "domblkinfo", "--domain="+domainName, "--device="+target); !strings.Contains(text, fmt.Sprint(diskSize)) {
			t.Errorf("domblkinfo: %s", text)
		}
		if bus == "virtio" {
			wantNotReleased(t, d, dom, disk)
			continue
		}
		if err := s.DetachDisk(ctx, dom, disk, libvirtd.Live|libvirtd.Config); err != nil {
			t.Fatal(err)
		}
		if c, err := w.Next(ctx); err != nil || c.Kind != libvirtd.Removed {
			t.Errorf("change %+v, %v", c, err)
		}
		if err := s.DetachDisk(ctx, dom, disk, libvirtd.Live); err == nil {
			t.Error("a second detach worked")
		}
	}
}

// element is the disk at the first free target.
func element(t *testing.T, s *libvirtd.Session, dom libvirtd.Domain, n libvirtd.NBDDisk) *libvirtxml.DomainDisk {
	t.Helper()
	x, err := s.Describe(testenv.Context(t), dom, false)
	if err != nil {
		t.Fatal(err)
	}
	if n.Target, err = libvirtd.FreeTarget(n.Bus, x); err != nil {
		t.Fatal(err)
	}
	disk, err := n.Element()
	if err != nil {
		t.Fatal(err)
	}
	return disk
}

// wantNotReleased detaches a disk that a guest has to release, without a
// guest. It has a session of its own: the context may end it.
func wantNotReleased(t *testing.T, d *daemon, dom libvirtd.Domain, disk *libvirtxml.DomainDisk) {
	t.Helper()
	ctx, cancel := context.WithTimeout(testenv.Context(t), 8*time.Second)
	defer cancel()
	s := d.dial(t)
	if err := s.DetachDisk(ctx, dom, disk, libvirtd.Live); !errors.Is(err, libvirtd.ErrNotReleased) && !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("detach without a guest: %v", err)
	}
}

func monitorThroughLibvirt(t *testing.T, s *libvirtd.Session, dom libvirtd.Domain) {
	ctx := testenv.Context(t)
	m := s.Monitor(dom)
	if st, err := qmp.QueryStatus(ctx, m); err != nil || st.Running {
		t.Errorf("status %+v, %v", st, err)
	}
	if nodes, err := qmp.QueryNamedBlockNodes(ctx, m); err != nil || len(nodes) == 0 {
		t.Errorf("nodes %+v, %v", nodes, err)
	}
	if err := qmp.BlockdevDel(ctx, m, "none"); !qmp.HasClass(err, qmp.ClassGeneric) {
		t.Errorf("blockdev-del: %v", err)
	}
	if err := qmp.DeviceAdd(ctx, m, qmp.Device{Model: qmp.SCSIDisk, ID: "x", Node: "none", Bus: "scsi0.0"}); !qmp.HasClass(err, qmp.ClassGeneric) {
		t.Errorf("device_add: %v", err)
	}
	if _, err := m.Execute(ctx, "getfd", nil, os.Stdin); !errors.Is(err, qmp.ErrInvalid) {
		t.Errorf("getfd: %v", err)
	}
	if raw, err := m.Execute(ctx, "query-qmp-schema", nil); err != nil || len(raw) < 64<<10 {
		t.Errorf("schema of %d bytes, %v", len(raw), err)
	}
	q, err := qemu.NewDomain(m, dom.Name)
	if err != nil {
		t.Fatal(err)
	}
	if disks, err := q.BlockDevices(); err != nil || len(disks) == 0 {
		t.Errorf("go-qemu's block devices: %+v, %v", disks, err)
	}
	q.Close()
	live, cancel := context.WithCancel(ctx)
	events, err := m.Events(live)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.Execute(ctx, "system_reset", nil); err != nil {
		t.Fatal(err)
	}
	for e := range events {
		if e.Event == "RESET" {
			cancel() // ends the stream, not the session
		}
	}
	cancel()
	if _, err := s.Domains(ctx); err != nil {
		t.Errorf("the session after its events: %v", err)
	}
}

func TestDialOfNoLibvirt(t *testing.T) {
	dir := t.TempDir()
	if _, err := libvirtd.Dial(testenv.Context(t), filepath.Join(dir, "none"), libvirtd.System); err == nil {
		t.Error("dialled nothing")
	}
	for name, answer := range map[string]func(c net.Conn){
		"closes": func(c net.Conn) {},
		"short":  func(c net.Conn) { binary.Write(c, binary.BigEndian, uint32(27)); c.Read(make([]byte, 1)) },
		"zero":   func(c net.Conn) { c.Write(make([]byte, 64)); c.Read(make([]byte, 1)) },
		"huge":   func(c net.Conn) { binary.Write(c, binary.BigEndian, uint32(1<<31)); c.Read(make([]byte, 1)) },
		"too long": func(c net.Conn) {
			binary.Write(c, binary.BigEndian, uint32(limits.LibvirtMessage+1))
			c.Read(make([]byte, 1))
		},
		"another protocol": func(c net.Conn) {
			c.Write([]byte("HTTP/1.1 400 Bad Request\r\n\r\n"))
		},
		"message of zeroes": func(c net.Conn) {
			b := make([]byte, 28)
			b[3] = 28
			c.Write(b)
		},
	} {
		t.Run(name, func(t *testing.T) {
			path := listen(t, answer)
			ctx, cancel := context.WithTimeout(testenv.Context(t), 10*time.Second)
			defer cancel()
			if _, err := libvirtd.Dial(ctx, path, libvirtd.System); err == nil || ctx.Err() != nil {
				t.Errorf("dial: %v, context %v", err, ctx.Err())
			}
		})
	}
}

// listen answers the first bytes of each connection and closes it.
func listen(t *testing.T, answer func(c net.Conn)) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "l.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.Read(make([]byte, 1<<10))
			answer(c)
			c.Close()
		}
	}()
	return path
}

func TestSilentLibvirtCostsTheDeadline(t *testing.T) {
	release := make(chan struct{})
	defer close(release)
	path := listen(t, func(net.Conn) { <-release })
	ctx, cancel := context.WithTimeout(testenv.Context(t), 50*time.Millisecond)
	defer cancel()
	if _, err := libvirtd.Dial(ctx, path, libvirtd.System); !errors.Is(err, qmp.ErrUnanswered) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("dial: %v", err)
	}
}

func TestElementsHoldNamesAsData(t *testing.T) {
	odd := "/run/a,b\"c'<d>&\n\t-e"
	disk, err := (&libvirtd.NBDDisk{Socket: odd, Export: odd, Target: "vda", Bus: "virtio", Serial: `s<"`, Reconnect: 1500 * time.Millisecond, ReadOnly: true, Discard: true}).Element()
	if err != nil {
		t.Fatal(err)
	}
	text, err := disk.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	var back libvirtxml.DomainDisk
	if err := back.Unmarshal(text); err != nil {
		t.Fatal(err)
	}
	if back.Source.Network.Hosts[0].Socket != odd || back.Source.Network.Name != odd || back.Serial != `s<"` || back.ReadOnly == nil || back.Driver.Discard != "unmap" || libvirtd.ReconnectDelay(&back) != 2*time.Second {
		t.Errorf("read back from %s", text)
	}
	tcp, err := (&libvirtd.NBDDisk{Host: "::1", Port: 10809, Target: "sda", Bus: "scsi"}).Element()
	if err != nil || tcp.Source.Network.Hosts[0] != (libvirtxml.DomainDiskSourceHost{Transport: "tcp", Name: "::1", Port: "10809"}) || libvirtd.ReconnectDelay(tcp) != 0 {
		t.Errorf("tcp %+v, %v", tcp, err)
	}
	for name, n := range map[string]libvirtd.NBDDisk{
		"control character": {Socket: "/a\x01", Target: "vda", Bus: "virtio"},
		"no UTF-8":          {Socket: "/a\xff", Target: "vda", Bus: "virtio"},
		"no address":        {Target: "vda", Bus: "virtio"},
		"two addresses":     {Socket: "/a", Host: "h", Port: 1, Target: "vda", Bus: "virtio"},
		"no port":           {Host: "h", Target: "vda", Bus: "virtio"},
		"long path":         {Socket: "/" + strings.Repeat("p", 107), Target: "vda", Bus: "virtio"},
		"no target":         {Socket: "/a", Bus: "virtio"},
		"no bus":            {Socket: "/a", Target: "vda"},
		"long export":       {Socket: "/a", Target: "vda", Bus: "virtio", Export: strings.Repeat("e", limits.MaxString+1)},
		"negative delay":    {Socket: "/a", Target: "vda", Bus: "virtio", Reconnect: -1},
	} {
		if _, err := n.Element(); !errors.Is(err, qmp.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestFreeTargetIsTheFirst(t *testing.T) {
	with := func(targets ...string) *libvirtxml.Domain {
		x := &libvirtxml.Domain{Devices: &libvirtxml.DomainDeviceList{}}
		for _, target := range targets {
			x.Devices.Disks = append(x.Devices.Disks, libvirtxml.DomainDisk{Target: &libvirtxml.DomainDiskTarget{Dev: target}})
		}
		return x
	}
	var many []string
	for c := 'a'; c <= 'z'; c++ {
		many = append(many, "sd"+string(c))
	}
	for _, tt := range []struct {
		bus  string
		x    []*libvirtxml.Domain
		want string
	}{
		{"virtio", nil, "vda"},
		{"virtio", []*libvirtxml.Domain{{}, with("vda", "vdc")}, "vdb"},
		{"virtio", []*libvirtxml.Domain{with("vda"), with("vdb")}, "vdc"},
		{"scsi", []*libvirtxml.Domain{with(many...)}, "sdaa"},
		{"scsi", []*libvirtxml.Domain{with(append(many, "sdaa")...)}, "sdab"},
	} {
		if got, err := libvirtd.FreeTarget(tt.bus, tt.x...); err != nil || got != tt.want {
			t.Errorf("%s: %q, %v, want %q", tt.bus, got, err, tt.want)
		}
		if !libvirtd.IsTarget(tt.want) {
			t.Errorf("%q is no target", tt.want)
		}
	}
	for _, name := range []string{"", "sd", "sda1", "sdA", "disk", "/sda"} {
		if libvirtd.IsTarget(name) {
			t.Errorf("%q is a target", name)
		}
	}
	if _, err := libvirtd.FreeTarget("floppy"); !errors.Is(err, qmp.ErrInvalid) {
		t.Errorf("floppy: %v", err)
	}
}
