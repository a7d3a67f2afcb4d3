package qmp_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/qmp"
	"github.com/vmdiskd/vmdiskd/test/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

const diskSize = 1 << 20

// machine starts a QEMU whose processor never runs and connects to it.
func machine(t *testing.T, args ...string) *qmp.Monitor {
	t.Helper()
	m, _ := machineAt(t, args...)
	return m
}

func machineAt(t *testing.T, args ...string) (m *qmp.Monitor, path string) {
	t.Helper()
	qemu := testenv.Path(t, "qemu-system-x86_64")
	path = filepath.Join(t.TempDir(), "m.sock")
	cmd := exec.Command(qemu, append([]string{"-accel", "tcg", "-S", "-m", "64", "-nodefaults", "-display", "none",
		"-qmp", "unix:" + path + ",server=on,wait=off"}, args...)...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if t.Failed() {
			t.Logf("QEMU: %s", stderr.String())
		}
	})
	ctx := testContext(t)
	var err error
	if testenv.Await(ctx, func() bool {
		m, err = qmp.Dial(ctx, path)
		return err == nil
	}) != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return m, path
}

// q35 has n ports and a SCSI controller.
func q35(n int) []string {
	args := []string{"-machine", "q35", "-device", "virtio-scsi-pci,id=scsi0"}
	for i := 1; i <= n; i++ {
		args = append(args, "-device", fmt.Sprintf("pcie-root-port,id=rp%d,chassis=%d,slot=%d", i, i, i))
	}
	return args
}

// add gives the machine a node of the server's disk.
func add(t *testing.T, m *qmp.Monitor, node, socket string) {
	t.Helper()
	addTo(t, m, node, qmp.NBD{
		Server: qmp.UnixAddress(socket), ReconnectDelay: 20 * time.Second, OpenTimeout: 5 * time.Second, Discard: true,
	})
}

// addTo gives the machine a raw node above the client n, which it names.
func addTo(t *testing.T, m *qmp.Monitor, node string, n qmp.NBD) {
	t.Helper()
	n.Node = node + "-nbd"
	if err := n.Add(testContext(t), m); err != nil {
		t.Fatal(err)
	}
	if err := (qmp.Raw{Node: node, Discard: n.Discard}).Add(testContext(t), m, n.Node); err != nil {
		t.Fatal(err)
	}
}

func nodeNames(t *testing.T, m *qmp.Monitor) (names []string) {
	t.Helper()
	nodes, err := qmp.QueryNamedBlockNodes(testContext(t), m)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range nodes {
		names = append(names, n.Name)
	}
	slices.Sort(names)
	return names
}

// TestDiskIsPluggedAndUnplugged goes through a disk's life in a machine with
// each model. A guest that does not run releases PCI devices at a reset.
func TestDiskIsPluggedAndUnplugged(t *testing.T) {
	m := machine(t, q35(2)...)
	s := testenv.Start(t, testenv.Options{Image: testenv.PatternImage(t, diskSize)})
	for _, model := range []qmp.Model{qmp.VirtIOBlk, qmp.SCSIDisk, qmp.NVMe} {
		t.Run(string(model), func(t *testing.T) {
			ctx := testContext(t)
			add(t, m, "n0", s.Socket)
			d := qmp.Device{Model: model, ID: "d0", Node: "n0", Serial: `a,"b'<\`}
			if model == qmp.SCSIDisk {
				targets, err := qmp.FreeSCSI(ctx, m)
				if err != nil || len(targets) != limits.SCSITargets {
					t.Fatalf("targets %v, %v", targets, err)
				}
				d.Bus, d.Target = targets[0].Bus, targets[0].Target
			} else {
				places, err := qmp.FreePCI(ctx, m)
				if err != nil || !slices.Equal(places, []qmp.Place{{Bus: "rp1"}, {Bus: "rp2"}}) {
					t.Fatalf("places %v, %v", places, err)
				}
				d.Bus = places[0].Bus
			}
			if err := qmp.DeviceAdd(ctx, m, d); err != nil {
				t.Fatal(err)
			}
			wantDisk(t, m, "d0", "n0")
			if err := qmp.BlockdevDel(ctx, m, "n0"); !qmp.HasClass(err, qmp.ClassGeneric) {
				t.Errorf("blockdev-del in use: %v", err)
			}
			unplug(t, m, model)
			if present, err := qmp.DevicePresent(ctx, m, "d0"); err != nil || present {
				t.Errorf("present %v, %v", present, err)
			}
			for _, node := range []string{"n0", "n0-nbd"} {
				if err := qmp.BlockdevDel(ctx, m, node); err != nil {
					t.Error(err)
				}
			}
			if names := nodeNames(t, m); len(names) != 0 {
				t.Errorf("nodes left: %v", names)
			}
			if err := m.Unplug(ctx, "d0"); !qmp.HasClass(err, qmp.ClassDeviceNotFound) {
				t.Errorf("second unplug: %v", err)
			}
		})
	}
}

// wantDisk checks that query-block has the device with the node.
func wantDisk(t *testing.T, m *qmp.Monitor, id, node string) {
	t.Helper()
	disks, err := qmp.QueryBlock(testContext(t), m)
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(disks, func(d qmp.BlockDevice) bool { return d.Is(id) })
	if i < 0 || disks[i].Inserted == nil || disks[i].Inserted.Name != node || disks[i].Inserted.Image.VirtualSize != diskSize {
		t.Errorf("query-block: %+v, want %s with %s", disks, id, node)
	}
}

// unplug takes d0 out of a machine whose guest does not run: a reset releases
// a PCI device.
func unplug(t *testing.T, m *qmp.Monitor, model qmp.Model) {
	t.Helper()
	if model == qmp.NVMe {
		unplugInVain(t, m)
		return
	}
	gone := make(chan error, 1)
	go func() { gone <- m.Unplug(testContext(t), "d0") }()
	for {
		select {
		case err := <-gone:
			if err != nil {
				t.Error(err)
			}
			return
		default:
		}
		if _, err := m.Execute(testContext(t), "system_reset", nil); err != nil {
			t.Fatal(err)
		}
	}
}

// unplugInVain gives up waiting before the reset.
func unplugInVain(t *testing.T, m *qmp.Monitor) {
	t.Helper()
	ctx, cancel := context.WithTimeout(testContext(t), 200*time.Millisecond)
	defer cancel()
	if err := m.Unplug(ctx, "d0"); !errors.Is(err, qmp.ErrNotReleased) {
		t.Errorf("unplug without a guest: %v", err)
	}
	if err := m.Unplug(testContext(t), "d0"); !qmp.HasClass(err, qmp.ClassGeneric) {
		t.Errorf("second request: %v", err)
	}
	gone := make(chan error, 1)
	go func() { gone <- m.AwaitUnplug(testContext(t), "d0") }()
	if _, err := m.Execute(testContext(t), "system_reset", nil); err != nil {
		t.Fatal(err)
	}
	if err := <-gone; err != nil {
		t.Error(err)
	}
	if err := m.AwaitUnplug(testContext(t), "d0"); err != nil {
		t.Errorf("gone already: %v", err)
	}
}

func TestMachinesWithoutAPlaceSaySo(t *testing.T) {
	ctx := testContext(t)
	m := machine(t, "-machine", "q35")
	if _, err := qmp.FreePCI(ctx, m); !errors.Is(err, qmp.ErrNoPCIPlace) {
		t.Errorf("PCI: %v", err)
	}
	if _, err := qmp.FreeSCSI(ctx, m); !errors.Is(err, qmp.ErrNoSCSIPlace) {
		t.Errorf("SCSI: %v", err)
	}
}

// TestPlacesAreTheFreeOnes uses each place that is found, on a machine with
// bridges and on one with slots, until there is none.
func TestPlacesAreTheFreeOnes(t *testing.T) {
	bridges := append(q35(11),
		"-device", "pcie-root-port,chassis=20,slot=20", // its bus is pcie.0, like the root
		"-device", "pcie-root-port,chassis=21,slot=21", // pcie.1
		"-device", "pcie-root-port,chassis=22,slot=22", // pcie.2, like the next one's
		"-device", "pcie-root-port,id=pcie.2,chassis=23,slot=23",
		"-device", "pcie-root-port,id=off,hotplug=off,chassis=24,slot=24",
		"-device", "pcie-pci-bridge,id=pb", "-device", "pci-bridge,id=pb2,bus=pb,addr=1,chassis_nr=4",
		"-device", "pci-bridge,id=pb3,bus=pb,addr=2,chassis_nr=5,shpc=off") // for ACPI alone
	for name, args := range map[string][]string{
		"q35":        bridges,
		"q35 native": append(bridges[:len(bridges):len(bridges)], "-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off"),
		"pc":         {"-machine", "pc", "-device", "virtio-scsi-pci,id=scsi0,addr=7"},
	} {
		t.Run(name, func(t *testing.T) {
			ctx := testContext(t)
			m := machine(t, args...)
			places, err := qmp.FreePCI(ctx, m)
			if err != nil {
				t.Fatal(err)
			}
			if name != "pc" && (!slices.Contains(places, qmp.Place{Bus: "pcie.1"}) || places[1] != qmp.Place{Bus: "rp2"} || places[10] != qmp.Place{Bus: "rp11"}) {
				t.Errorf("places %v", places)
			}
			if slices.Contains(places, qmp.Place{Bus: "pci.0", Slot: 7}) {
				t.Errorf("slot 7 is taken, places %v", places)
			}
			for i, p := range places {
				if _, err := m.Execute(ctx, "device_add", map[string]any{"driver": "virtio-rng-pci", "id": fmt.Sprint("d", i), "bus": p.Bus, "addr": fmt.Sprintf("%x", p.Slot)}); err != nil {
					t.Errorf("place %v: %v", p, err)
				}
			}
			if places, err := qmp.FreePCI(ctx, m); !errors.Is(err, qmp.ErrNoPCIPlace) {
				t.Errorf("then: %v, %v", places, err)
			}
			for want := range 3 {
				targets, err := qmp.FreeSCSI(ctx, m)
				if err != nil || !slices.Equal(targets[:2], []qmp.Target{{Bus: "scsi0.0", Target: want}, {Bus: "scsi0.0", Target: want + 1}}) {
					t.Fatalf("targets %v, %v", targets, err)
				}
				if _, err := m.Execute(ctx, "device_add", map[string]any{"driver": "scsi-cd", "bus": targets[0].Bus, "scsi-id": want}); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

// TestControllersTakeTurns: where two disks are plugged at once, the next place
// of the one that comes late is on another controller if there is one.
func TestControllersTakeTurns(t *testing.T) {
	m := machine(t, "-machine", "q35", "-device", "virtio-scsi-pci,id=a", "-device", "virtio-scsi-pci,id=b", "-device", "scsi-cd,bus=a.0,scsi-id=0")
	targets, err := qmp.FreeSCSI(testContext(t), m)
	want := []qmp.Target{{Bus: "a.0", Target: 1}, {Bus: "b.0", Target: 0}, {Bus: "a.0", Target: 2}, {Bus: "b.0", Target: 1}}
	if err != nil || len(targets) != 2*limits.SCSITargets-1 || !slices.Equal(targets[:4], want) {
		t.Errorf("%d targets, first %v, want %v: %v", len(targets), targets[:min(4, len(targets))], want, err)
	}
}

func TestQEMUWithAnotherClientIsNoGreeting(t *testing.T) {
	_, path := machineAt(t, "-machine", "q35")
	ctx, cancel := context.WithTimeout(testContext(t), 300*time.Millisecond)
	defer cancel()
	if _, err := qmp.Dial(ctx, path); !errors.Is(err, qmp.ErrNoGreeting) {
		t.Errorf("second client: %v", err)
	}
}

func TestFeaturesOfQEMUAreKnown(t *testing.T) {
	ctx := testContext(t)
	m := machine(t, "-machine", "q35")
	s, err := m.Schema(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for command, want := range map[string]bool{"blockdev-reopen": true, "blockdev-rename": false, "DEVICE_DELETED": false} {
		if got := s.HasCommand(command); got != want {
			t.Errorf("has %s: %v", command, got)
		}
	}
	for _, tt := range []struct {
		command, variant, option string
		want                     bool
	}{
		{"blockdev-add", "nbd", "open-timeout", true},
		{"blockdev-add", "nbd", "reconnect-delay", true},
		{"blockdev-add", "raw", "open-timeout", false},
		{"blockdev-add", "", "node-name", true},
		{"blockdev-add", "nothing", "node-name", false},
		{"block_resize", "", "size", true},
		{"no-command", "", "size", false},
	} {
		if got := s.HasOption(tt.command, tt.variant, tt.option); got != tt.want {
			t.Errorf("%+v: %v", tt, got)
		}
	}
	if !s.HasEvent("DEVICE_DELETED") || s.HasEvent("blockdev-add") {
		t.Error("events are wrong")
	}
	if st, err := qmp.QueryStatus(ctx, m); err != nil || st.Running || st.State != "prelaunch" {
		t.Errorf("status %+v, %v", st, err)
	}
}

// TestDiskOverAPassedSocket has QEMU take a connection that was made for it.
func TestDiskOverAPassedSocket(t *testing.T) {
	ctx := testContext(t)
	m := machine(t, "-machine", "q35")
	s := testenv.Start(t, testenv.Options{Image: testenv.PatternImage(t, diskSize)})
	conn, err := net.Dial("unix", s.Socket)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	f, err := conn.(*net.UnixConn).File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := m.GetFD(ctx, "disk-1", f); err != nil {
		t.Fatal(err)
	}
	addTo(t, m, "n0", qmp.NBD{Server: qmp.FDAddress("disk-1")})
	if names := nodeNames(t, m); !slices.Equal(names, []string{"n0", "n0-nbd"}) {
		t.Errorf("nodes %v", names)
	}
	if err := m.GetFD(ctx, "unused", f); err != nil {
		t.Fatal(err)
	}
	if err := m.CloseFD(ctx, "unused"); err != nil {
		t.Error(err)
	}
	if err := m.CloseFD(ctx, "unused"); !qmp.HasClass(err, qmp.ClassGeneric) {
		t.Errorf("second closefd: %v", err)
	}
}

// TestServerIsExchangedUnderARunningDisk grows a disk the way that needs no
// reconnection: a second client of the larger export below the raw node.
func TestServerIsExchangedUnderARunningDisk(t *testing.T) {
	ctx := testContext(t)
	m := machine(t, q35(1)...)
	small := testenv.Start(t, testenv.Options{Image: testenv.PatternImage(t, diskSize)})
	large := testenv.Start(t, testenv.Options{Image: testenv.PatternImage(t, 2*diskSize)})
	add(t, m, "n0", small.Socket)
	if err := qmp.DeviceAdd(ctx, m, qmp.Device{Model: qmp.VirtIOBlk, ID: "d0", Node: "n0", Bus: "rp1"}); err != nil {
		t.Fatal(err)
	}
	if err := qmp.BlockResize(ctx, m, "n0", 2*diskSize); !qmp.HasClass(err, qmp.ClassGeneric) {
		t.Errorf("resize beyond the server: %v", err)
	}
	if err := (qmp.NBD{Node: "n1-nbd", Server: qmp.UnixAddress(large.Socket), Discard: true}).Add(ctx, m); err != nil {
		t.Fatal(err)
	}
	if err := (qmp.Raw{Node: "n0", Discard: true}).Reopen(ctx, m, "n1-nbd"); err != nil {
		t.Fatal(err)
	}
	if err := qmp.BlockResize(ctx, m, "n0", 2*diskSize); err != nil {
		t.Error(err)
	}
	if err := qmp.BlockdevDel(ctx, m, "n0-nbd"); err != nil {
		t.Error(err)
	}
	nodes, err := qmp.QueryNamedBlockNodes(ctx, m)
	if err != nil || len(nodes) != 2 {
		t.Fatalf("nodes %+v, %v", nodes, err)
	}
	for _, n := range nodes {
		if n.Image.VirtualSize != 2*diskSize || n.Name == "n0-nbd" {
			t.Errorf("node %+v", n)
		}
	}
}

func TestServerThatIsNotThereLeavesNoNode(t *testing.T) {
	m := machine(t, "-machine", "q35")
	err := qmp.NBD{Node: "n0-nbd", Server: qmp.UnixAddress(filepath.Join(t.TempDir(), "none"))}.Add(testContext(t), m)
	if !qmp.HasClass(err, qmp.ClassGeneric) {
		t.Errorf("error %v", err)
	}
	if names := nodeNames(t, m); len(names) != 0 {
		t.Errorf("nodes %v", names)
	}
}

// TestNamesInPathsAreData serves on a socket whose name would be syntax.
func TestNamesInPathsAreData(t *testing.T) {
	m := machine(t, "-machine", "q35")
	s := testenv.Start(t, testenv.Options{Image: testenv.PatternImage(t, diskSize), Export: `-x,"y'<` + "\n"})
	odd := filepath.Join(filepath.Dir(s.Socket), `o,p="q'<`+"\n")
	if err := os.Symlink(s.Socket, odd); err != nil {
		t.Fatal(err)
	}
	addTo(t, m, "n0", qmp.NBD{Server: qmp.UnixAddress(odd), Export: `-x,"y'<` + "\n"})
}

// TestRealGuestAgentAnswers runs a guest agent on this machine. It is not
// asked to freeze anything, and would refuse.
func TestRealGuestAgentAnswers(t *testing.T) {
	program := testenv.Path(t, "qemu-ga")
	dir := t.TempDir()
	path := filepath.Join(dir, "ga.sock")
	cmd := exec.Command(program, "-m", "unix-listen", "-p", path, "-t", dir, "-f", filepath.Join(dir, "pid"), "-b", "guest-fsfreeze-freeze,guest-shutdown")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	ctx := testContext(t)
	var a *qmp.Agent
	var err error
	if testenv.Await(ctx, func() bool {
		a, err = qmp.DialAgent(ctx, path)
		return err == nil
	}) != nil {
		t.Fatal(err)
	}
	defer a.Close()
	info, err := qmp.GuestInfo(ctx, a)
	if err != nil || info.Version == "" || !info.Has("guest-get-fsinfo") || info.Has("guest-fsfreeze-freeze") {
		t.Errorf("info %+v, %v", info, err)
	}
	if _, err := qmp.FreezeGuest(ctx, a); err == nil {
		t.Error("the agent obeys a command that it may not")
	}
	if frozen, err := qmp.GuestFrozen(ctx, a); err != nil || frozen {
		t.Errorf("frozen %v, %v", frozen, err)
	}
	if _, err := qmp.GuestFilesystems(ctx, a); err != nil {
		t.Errorf("file systems: %v", err)
	}
}
