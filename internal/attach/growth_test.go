package attach_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/attach"
	"github.com/vmdiskd/vmdiskd/internal/qmp"
	vmguest "github.com/vmdiskd/vmdiskd/test/guest"
	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// TestGuestWritesOnWhileItsDiskChanges has a guest write to its disk, and read
// back, while the disk grows twice with a snapshot between.
func TestGuestWritesOnWhileItsDiskChanges(t *testing.T) {
	t.Parallel()
	guestWritesOn(t, qmp.VirtIOBlk, "-device", "pcie-root-port,id=rp1,chassis=1")
}

// TestGuestWritesOnThroughAThreadOfItsDisks is the same with a controller that
// has an iothread, to which QEMU moves the nodes of its disks.
func TestGuestWritesOnThroughAThreadOfItsDisks(t *testing.T) {
	t.Parallel()
	guestWritesOn(t, qmp.SCSIDisk, "-object", "iothread,id=io0", "-device", "virtio-scsi-pci,id=scsi0,iothread=io0")
}

func guestWritesOn(t *testing.T, model qmp.Model, machine ...string) {
	t.Helper()
	testenv.Require(t, "qemu-system-x86_64", "busybox", "depmod")
	l := &lab{dir: testenv.TempDir(t)}
	ctx := testenv.Context(t)
	must(t, vmguest.WriteWatcher(ctx, l.dir))
	l.startService(t)
	l.monitor = filepath.Join(l.dir, "qmp")
	console := filepath.Join(l.dir, "console")
	run(t, testenv.Path(t, "qemu-system-x86_64"), append(machine, "-machine", "q35", "-accel", "tcg", "-cpu", "max", "-m", "256", "-nodefaults", "-display", "none",
		"-no-reboot", "-serial", "file:"+console, "-kernel", l.dir+"/kernel", "-initrd", l.dir+"/initrd", "-append", "console=ttyS0 quiet panic=-1",
		"-qmp", "unix:"+l.monitor+",server=on,wait=off")...)
	said := func() string {
		b, _ := os.ReadFile(console) // it may not be there yet
		return string(b)
	}
	says := func(what ...string) {
		t.Helper()
		await(t, func() bool {
			text, ok := said(), true
			for _, w := range what {
				_, text, ok = strings.Cut(text, w)
				if !ok {
					return false
				}
			}
			return true
		})
	}
	says("ready")
	m := l.machine(t, l.monitor, nil)
	const mib = 1 << 20
	image := l.image(t, "disk", 8*mib)
	p, err := m.Attach(ctx, l.source(image), attach.Options{Model: model})
	do(t, p, err)
	id := p.Disk
	says("the disk has 8 MiB", "the last MiB of 8 too")
	p, err = m.Resize(ctx, id, "", attach.Size{Bytes: 8 * mib, More: true})
	do(t, p, err)
	says("the disk has 16 MiB", "the last MiB of 16 too")
	p, err = m.Snapshot(ctx, id, "", filepath.Join(l.dir, "overlay"), false)
	do(t, p, err)
	p, err = m.Resize(ctx, id, "", attach.Size{Bytes: 24 * mib})
	do(t, p, err)
	says("the disk has 24 MiB", "the last MiB of 24 too")
	p, err = m.Detach(ctx, id, false)
	do(t, p, err)
	says("the disk is gone")
	if strings.Contains(said(), "ERROR") || l.state(t, m.Monitor) != "" {
		t.Errorf("left %s, the guest said:\n%s", l.state(t, m.Monitor), said())
	}
}
