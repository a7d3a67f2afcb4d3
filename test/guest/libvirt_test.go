package guest

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"libvirt.org/go/libvirtxml"

	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// domainName is syntax for shells, XML and libvirt's own tools.
const domainName = `-v,"m'<&1`

// bootDomain starts a domain of a libvirt of the test's own, with an agent.
func (e *estate) bootDomain(t *testing.T, l *testenv.Libvirt) {
	t.Helper()
	port := func() libvirtxml.DomainController {
		return libvirtxml.DomainController{Type: "pci", Model: "pcie-root-port"}
	}
	x := libvirtxml.Domain{
		Type: "qemu", Name: domainName, Memory: &libvirtxml.DomainMemory{Value: 384, Unit: "MiB"},
		OS: &libvirtxml.DomainOS{Type: &libvirtxml.DomainOSType{Arch: "x86_64", Machine: "q35", Type: "hvm"},
			Kernel: e.dir + "/kernel", Initrd: e.dir + "/initrd", Cmdline: "console=ttyS0 quiet panic=-1"},
		Features: &libvirtxml.DomainFeatureList{ACPI: &libvirtxml.DomainFeature{}},
		CPU:      &libvirtxml.DomainCPU{Mode: "maximum"},
		Devices: &libvirtxml.DomainDeviceList{
			Emulator: "/usr/bin/qemu-system-x86_64", MemBalloon: &libvirtxml.DomainMemBalloon{Model: "none"},
			Controllers: []libvirtxml.DomainController{
				{Type: "pci", Model: "pcie-root"}, port(), port(), port(), port(), port(), port(),
				{Type: "scsi", Model: "virtio-scsi"}, {Type: "usb", Model: "none"},
			},
			Serials:  []libvirtxml.DomainSerial{{Source: &libvirtxml.DomainChardevSource{File: &libvirtxml.DomainChardevSourceFile{Path: l.Dir + "/console"}}}},
			Channels: []libvirtxml.DomainChannel{{Source: &libvirtxml.DomainChardevSource{UNIX: &libvirtxml.DomainChardevSourceUNIX{}}, Target: &libvirtxml.DomainChannelTarget{VirtIO: &libvirtxml.DomainChannelTargetVirtIO{Name: "org.qemu.guest_agent.0"}}}},
		},
	}
	text, err := x.Marshal()
	if err == nil {
		err = os.WriteFile(e.dir+"/domain", []byte(text), 0o600)
	}
	if err == nil {
		err = os.Symlink(l.Dir+"/console", e.dir+"/console")
	}
	if err != nil {
		t.Fatal(err)
	}
	l.Virsh(t, "define", e.dir+"/domain")
	l.Virsh(t, "start", "--domain="+domainName)
	t.Cleanup(func() { l.Virsh(t, "destroy", "--domain="+domainName) })
	driver, _, _ := strings.Cut(strings.Replace(l.URI, "+unix", "", 1), "?")
	e.vm, e.flags = domainName, []string{"--libvirt-socket=" + l.Socket, "--libvirt-uri=" + driver}
	e.expect(t, "ready")
	e.await(t, "the agent answers", func() bool {
		return exec.Command("virsh", "-c", l.URI, "qemu-agent-command", "--domain="+domainName, `{"execute": "guest-ping"}`).Run() == nil
	})
}

// inside runs a shell command in the guest, by its agent, and returns what it
// prints.
func inside(t *testing.T, l *testenv.Libvirt, command string) string {
	t.Helper()
	ask := func(execute string, arguments any, out any) {
		line, err := json.Marshal(map[string]any{"execute": execute, "arguments": arguments})
		if err != nil {
			t.Fatal(err)
		}
		text := l.Virsh(t, "qemu-agent-command", "--domain="+domainName, string(line))
		if err := json.Unmarshal([]byte(text), &struct{ Return any }{out}); err != nil {
			t.Fatalf("%s: %s: %v", execute, text, err)
		}
	}
	var begun struct{ PID int }
	ask("guest-exec", map[string]any{"path": "/bin/sh", "arg": []string{"-ec", command}, "capture-output": true}, &begun)
	var end struct {
		Exited   bool
		ExitCode int
		Out      string `json:"out-data"`
		Err      string `json:"err-data"`
	}
	if err := testenv.Await(testenv.Context(t), func() bool {
		ask("guest-exec-status", map[string]any{"pid": begun.PID}, &end)
		return end.Exited
	}); err != nil || end.ExitCode != 0 {
		why, _ := base64.StdEncoding.DecodeString(end.Err)
		t.Fatalf("%s: %d, %v: %s", command, end.ExitCode, err, why)
	}
	out, err := base64.StdEncoding.DecodeString(end.Out)
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

// TestGuestOfLibvirtUsesItsDisks gives disks to a running domain that libvirt
// 9.0 drops the reconnect delay of: the service stops and starts while the
// guest writes, the disks grow, one gets a snapshot with frozen file systems,
// and a mounted one stays.
func TestGuestOfLibvirtUsesItsDisks(t *testing.T) {
	t.Parallel()
	owner := fmt.Sprint(os.Getuid())
	if os.Getuid() == 0 {
		owner = fmt.Sprintf("%d:%d", testenv.Nobody, testenv.Nobody)
	}
	usesDisksOf(t, testenv.StartLibvirt(t), owner, "raw")
}

// TestGuestOfANewerLibvirtUsesItsDisks is the same with libvirt 11, which keeps
// the reconnect delay and has the device use the client itself.
func TestGuestOfANewerLibvirtUsesItsDisks(t *testing.T) {
	t.Parallel()
	usesDisksOf(t, testenv.StartNewerLibvirt(t), fmt.Sprint(testenv.SystemQEMU), "nbd")
}

// usesDisksOf gives sockets to the user that runs QEMU. driver is that of the
// node that devices use.
func usesDisksOf(t *testing.T, l *testenv.Libvirt, owner, driver string) {
	t.Helper()
	e := newEstate(t)
	e.bootDomain(t, l)
	serials := []string{"LV0", "LV1", "IDLE2"}
	var disks []string
	for i, bus := range []string{"virtio", "scsi", "virtio"} {
		states := [][]string{{"--persist"}, {"--live", "--config"}, {"--persist"}}[i]
		out := e.run(t, "attach", append(states, e.image(t, fmt.Sprintf("d%d.img", i), 16<<20), "--keep-reconnect", "--socket-owner="+owner, "--bus="+bus, "--serial="+serials[i])...)
		disks = append(disks, out.Disk)
		e.expect(t, serials[i]+" appears")
	}
	for _, s := range serials[:2] {
		e.load(t, s, 1)
	}
	e.shown(t, l, disks, driver)
	e.restart(t)
	for i, s := range serials[:2] {
		e.load(t, s, 2)
		e.run(t, "resize", disks[i], "24M")
		e.expect(t, s+" has 24 MiB")
		e.load(t, s, 1)
		if text := l.Virsh(t, "domblkinfo", "--domain="+domainName, "--device="+disks[i]); !strings.Contains(text, fmt.Sprint(24<<20)) {
			t.Errorf("domblkinfo: %s", text)
		}
	}
	e.restart(t) // the new clients wait for the server too
	e.load(t, serials[0], 2)
	mounted(t, e, l, disks[2])
	for i, d := range disks {
		e.run(t, "detach", d, "--config")
		if text := l.Virsh(t, "dumpxml", "--inactive", "--domain="+domainName); strings.Contains(text, "<target dev='"+d+"'") {
			t.Errorf("%s is in the configuration:\n%s", d, text)
		}
		e.run(t, "detach", d, "--live")
		e.expect(t, serials[i]+" gone")
	}
	for _, more := range [][]string{nil, {"--inactive"}} {
		if text := l.Virsh(t, append([]string{"dumpxml", "--domain=" + domainName}, more...)...); strings.Contains(text, "<disk") {
			t.Errorf("a disk is left:\n%s", text)
		}
	}
	if left, err := filepath.Glob(e.dir + "/*.sock"); err != nil || len(left) > 0 {
		t.Errorf("left behind: %q, %v", left, err)
	}
}

// shown checks what vmdiskctl tells of the domain against virsh.
func (e *estate) shown(t *testing.T, l *testenv.Libvirt, disks []string, driver string) {
	t.Helper()
	var rows []struct{ VM, UUID, State string }
	list := testenv.Run(t, append([]string{e.ctl, "vm", "list", "--json"}, e.flags...)...)
	uuid := strings.TrimSpace(l.Virsh(t, "domuuid", "--domain="+domainName))
	if err := json.Unmarshal([]byte(list), &rows); err != nil || len(rows) != 1 || rows[0] != struct{ VM, UUID, State string }{domainName, uuid, "running"} {
		t.Errorf("vm list: %s, %v", list, err)
	}
	var vm struct {
		UUID, State string
		Disks       []struct {
			Device, Driver string
			Size           int64
		}
	}
	show := testenv.Run(t, append(append([]string{e.ctl, "vm", "show", "--json", "--socket", e.dir + "/control"}, e.flags...), "--", domainName)...)
	if err := json.Unmarshal([]byte(show), &vm); err != nil || vm.UUID != uuid || vm.State != "running" || len(vm.Disks) != len(disks) {
		t.Errorf("vm show: %s, %v", show, err)
	}
	for _, d := range vm.Disks {
		if d.Size != 16<<20 || d.Driver != driver {
			t.Errorf("vm show: disk %+v", d)
		}
	}
}

// mounted has the guest mount a disk: it is not detached, and frozen for a
// snapshot, after which the guest goes on.
func mounted(t *testing.T, e *estate, l *testenv.Libvirt, disk string) {
	t.Helper()
	inside(t, l, "mke2fs -F /dev/vdb >/dev/null && mount -t ext4 /dev/vdb /mnt && echo before >/mnt/file")
	if text, err := e.try(t, "detach", disk); err == nil || !strings.Contains(err.Error(), `mounted at "/mnt"`) || !strings.Contains(err.Error(), "exit status 3") {
		t.Errorf("detach of a mounted disk: %v, %s", err, text)
	}
	out := e.run(t, "snapshot", disk, e.dir+"/overlay", "--freeze")
	if notes := strings.Join(out.Notes, "\n"); !strings.Contains(notes, "1 file systems were frozen") {
		t.Errorf("notes of the snapshot: %s", notes)
	}
	if got := inside(t, l, "echo after >>/mnt/file && sync && cat /mnt/file && umount /mnt"); got != "before\nafter\n" {
		t.Errorf("the guest reads %q", got)
	}
}
