package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/attach"
	"github.com/vmdiskd/vmdiskd/internal/qmp/libvirtd"
)

// name writes a file of machines, which the commands read until the test ends.
func name(t *testing.T, text string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "machines")
	must(t, os.WriteFile(path, []byte(text), 0o600))
	t.Setenv(machinesVariable, path)
}

const oddMachine = `-w,"'<&`

// TestMachineHasAName attaches a disk to a machine by the name that a file
// gives it.
func TestMachineHasAName(t *testing.T) {
	d := startDaemon(t)
	vm := startQEMU(t, "-device", "virtio-scsi-pci,id=scsi0")
	name(t, "[machines.'"+strings.ReplaceAll(oddMachine, "'", "")+"']\nqmp = '"+vm+"'\n")
	odd := strings.ReplaceAll(oddMachine, "'", "")
	p := plannedBy(t, "attach", "--bus=scsi", "--", odd, d.image(t, "disk"))
	if !p.Changed || p.VM != odd {
		t.Errorf("attach: %+v", p)
	}
	if again := plannedBy(t, "attach", "--bus=scsi", vm, d.image(t, "disk")); again.Changed || again.Disk != p.Disk {
		t.Errorf("by its path: %+v", again)
	}
	if v := showVM(t, vm); len(v.Disks) != 1 {
		t.Errorf("disks %+v", v)
	}
	if gone := plannedBy(t, "detach", "--", odd, p.Disk); !gone.Changed {
		t.Errorf("detach: %+v", gone)
	}
}

// TestMachineIsOneByAllPathsOfItsSocket: its disks are found by a link too.
func TestMachineIsOneByAllPathsOfItsSocket(t *testing.T) {
	d := startDaemon(t)
	vm := startQEMU(t, "-device", "virtio-scsi-pci,id=scsi0")
	image := d.image(t, "disk")
	folder, socket := filepath.Join(t.TempDir(), "run"), filepath.Join(t.TempDir(), "qmp")
	must(t, os.Symlink(filepath.Dir(vm), folder))
	must(t, os.Symlink(filepath.Join(folder, "qmp"), socket))
	for _, link := range []string{socket, filepath.Join(folder, "qmp")} {
		p := plannedBy(t, "attach", "--bus=scsi", vm, image)
		if again := plannedBy(t, "attach", "--bus=scsi", link, image); again.Changed || again.Disk != p.Disk {
			t.Errorf("by %s: %+v", link, again)
		}
		plannedBy(t, "detach", link, image)
		if out := want(t, exitDone, "export", "list", "--json"); strings.TrimSpace(out) != "[]" {
			t.Errorf("exports left: %s", out)
		}
	}
	p := plannedBy(t, "attach", "--bus=scsi", "--reconnect=1s", vm, image)
	want(t, exitDone, "export", "remove", "--force", attach.ExportName(vm, p.Disk))
	if p = plannedBy(t, "detach", vm, image); !strings.Contains(strings.Join(p.Notes, " "), "there is no export") {
		t.Errorf("detach without an export to remove: %+v", p)
	}
}

// TestAgentThatIsGoneKeepsNobodyFromWork: it is noted where it would be asked,
// and refuses what needs it.
func TestAgentThatIsGoneKeepsNobodyFromWork(t *testing.T) {
	d := startDaemon(t)
	vm := startQEMU(t, "-device", "virtio-scsi-pci,id=scsi0")
	name(t, "[machines.m]\nqmp = \""+vm+"\"\nagent = \""+vm+".gone\"\n")
	image := d.image(t, "disk")
	for _, force := range []string{"--force=true", "--force=false"} {
		plannedBy(t, "attach", "--bus=scsi", "m", image)
		if v := showVM(t, "m"); len(v.Disks) != 1 {
			t.Errorf("disks %+v", v)
		}
		want(t, exitFailed, "snapshot", "--freeze", "m", image, image+".overlay")
		p := plannedBy(t, "detach", force, "m", image)
		if notes := strings.Join(p.Notes, " "); !p.Changed || strings.Contains(notes, "could not be checked") != (force == "--force=false") {
			t.Errorf("detach %s: %+v", force, p)
		}
	}
}

// TestNamesOfMachines are what the file says, unless a flag says otherwise.
func TestNamesOfMachines(t *testing.T) {
	name(t, `
[machines.web]
qmp = "/run/web.qmp"
agent = "/run/web.qga"
socket-owner = "vm-web"
[machines.db]
libvirt = "qemu:///session"
libvirt-socket = "/run/user/7/libvirt-sock"
domain = "prod db"
[machines.plain]
libvirt = "qemu:///system"
`)
	system := libvirtFlags{uri: libvirtd.System}
	var unsaid libvirtFlags
	for _, tt := range []struct {
		vm         string
		given      vmFlags
		want, via  string
		agent, own string
		libvirt    libvirtFlags
	}{
		{vm: "web", want: "/run/web.qmp", via: viaQMP, agent: "/run/web.qga", own: "vm-web", libvirt: unsaid},
		{vm: "web", given: vmFlags{agent: "/a"}, want: "/run/web.qmp", via: viaQMP, agent: "/a", own: "vm-web", libvirt: unsaid},
		{vm: "web", given: vmFlags{via: viaLibvirt}, want: "web", via: viaLibvirt, libvirt: unsaid},
		{vm: "./web", want: "./web", libvirt: unsaid},
		{vm: "other", want: "other", libvirt: unsaid},
		{vm: "db", want: "prod db", via: viaLibvirt, libvirt: libvirtFlags{socket: "/run/user/7/libvirt-sock", uri: libvirtd.Private}},
		{vm: "db", given: vmFlags{libvirt: system}, want: "prod db", via: viaLibvirt, libvirt: libvirtFlags{socket: "/run/user/7/libvirt-sock", uri: libvirtd.System}},
		{vm: "plain", want: "plain", via: viaLibvirt, libvirt: system},
	} {
		f := tt.given
		for range 2 { // a command asks more than once
			got, err := f.find(tt.vm)
			if err != nil || got != tt.want || f.via != tt.via || f.agent != tt.agent || f.owner != tt.own || f.libvirt != tt.libvirt {
				t.Errorf("%q: %q, %v, %+v", tt.vm, got, err, f)
			}
		}
	}
}

// TestFileOfMachinesIsStrict: a mistake has its place, and nothing is done.
func TestFileOfMachinesIsStrict(t *testing.T) {
	for text, want := range map[string]string{
		"[machines.a]\nqpm = '/x'\n": ":2:1:",
		"[machines.a\n":              ":1:",
		"[machines.a]\n":             "neither qmp nor libvirt",
		"[machines.a]\nqmp = '/x'\nlibvirt = 'qemu:///system'": "both qmp and libvirt",
		"[machines.a]\nqmp = 'x'\n":                            "absolute",
		"[machines.'a/b']\nqmp = '/x'\n":                       "no slash",
		"[machines.a]\nlibvirt = 'xen:///'\n":                  "neither qemu:///system nor",
		"[machines.a]\ndomain = 'a'\nagent = '/x'\n":           "agent goes with qmp",
	} {
		name(t, text)
		if _, err := (&vmFlags{}).find("a"); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
	t.Setenv(machinesVariable, filepath.Join(t.TempDir(), "none"))
	if _, err := (&vmFlags{}).find("a"); err == nil {
		t.Error("a file that was named and is not there")
	}
}

// TestExampleOfNamedMachines is what the example in packaging says.
func TestExampleOfNamedMachines(t *testing.T) {
	t.Setenv(machinesVariable, filepath.Join("..", "..", "packaging", "examples", "vmdiskctl.toml"))
	for vm, want := range map[string]string{"web": "/run/vms/web.qmp", "database": "prod-db-2"} {
		if got, err := (&vmFlags{}).find(vm); err != nil || got != want {
			t.Errorf("%s: %q, %v", vm, got, err)
		}
	}
}
