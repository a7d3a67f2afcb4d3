package main

import (
	"bytes"
	"context"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/spf13/cobra"

	"github.com/vmdiskd/vmdiskd/internal/attach"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/internal/qmp"
	"github.com/vmdiskd/vmdiskd/internal/qmp/libvirtd"
	"github.com/vmdiskd/vmdiskd/internal/qmp/qmptest"
	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// startQEMU runs a machine whose guest never runs, with a monitor, and returns
// the monitor's path.
func startQEMU(t *testing.T, more ...string) string {
	t.Helper()
	path := filepath.Join(testenv.TempDir(t), "qmp")
	runQEMU(t, path, append(more, "-qmp", "unix:"+path+",server=on,wait=off")...)
	return path
}

// runQEMU runs a machine that has a monitor at the path.
func runQEMU(t *testing.T, path string, args ...string) {
	t.Helper()
	cmd := exec.Command(testenv.Path(t, "qemu-system-x86_64"), append([]string{"-accel", "tcg", "-S", "-m", "64", "-nodefaults",
		"-display", "none", "-machine", "q35"}, args...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var said bytes.Buffer
	cmd.Stderr = &said
	must(t, cmd.Start())
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if t.Failed() {
			t.Logf("QEMU: %s", said.String())
		}
	})
	must(t, testenv.Await(testenv.Context(t), func() bool {
		m, err := qmp.Dial(t.Context(), path)
		if err == nil {
			m.Close()
		}
		return err == nil
	}))
}

// TestExampleOfAMachineHasRoom runs a machine as the example says. Each of its disks
// is shown by the name that attach has told, which the other commands take.
func TestExampleOfAMachineHasRoom(t *testing.T) {
	text, err := os.ReadFile(filepath.Join("..", "..", "packaging", "examples", "qemu-hotplug.cfg"))
	must(t, err)
	dir := testenv.TempDir(t)
	file, vm, agent := filepath.Join(dir, "cfg"), filepath.Join(dir, "qmp"), filepath.Join(dir, "agent")
	must(t, os.WriteFile(file, bytes.ReplaceAll(text, []byte("/run/vm1"), []byte(dir)), 0o600))
	d := startDaemon(t)
	runQEMU(t, vm, "-readconfig", file)
	if v := showVM(t, vm); v.PCI != 4 || v.SCSI != 1 {
		t.Errorf("machine %+v", v)
	}
	var names []string
	for i, bus := range []string{"virtio", "scsi", "nvme"} {
		names = append(names, plannedBy(t, "attach", "--bus="+bus, "--agent="+agent, vm, d.image(t, fmt.Sprint(i))).Disk)
	}
	v := showVM(t, vm)
	if v.PCI != 2 || len(v.Disks) != 3 {
		t.Errorf("then: %+v", v)
	}
	for _, disk := range v.Disks {
		if !slices.Contains(names, disk.Device) {
			t.Errorf("%+v is shown of disks %q", disk, names)
		}
	}
}

// plannedBy runs a command on a machine with --json.
func plannedBy(t *testing.T, args ...string) (p planned) {
	t.Helper()
	out := want(t, exitDone, append([]string{args[0], "--json"}, args[1:]...)...)
	if err := json.Unmarshal([]byte(out), &p); err != nil {
		t.Fatalf("%q: %v", out, err)
	}
	return p
}

func showVM(t *testing.T, vm string) (v vmShown) {
	t.Helper()
	must(t, json.Unmarshal([]byte(want(t, exitDone, "vm", "show", "--json", vm)), &v))
	return v
}

// TestQcow2IsNotAttachedAsRawByDefault: the guest of a disk that was created as
// qcow2 would write over its tables.
func TestQcow2IsNotAttachedAsRawByDefault(t *testing.T) {
	d := startDaemon(t)
	vm := startQEMU(t, "-device", "virtio-scsi-pci,id=scsi0")
	image := d.image(t, "vm.qcow2")
	want(t, exitDone, "image", "create", "--force", image, "1M")
	before, err := os.ReadFile(image)
	must(t, err)
	if code, _, stderr := ctl(t, "attach", "--bus=scsi", vm, image); code == exitDone || !strings.Contains(stderr, "--format=qcow2") {
		t.Errorf("attach: exit code %d, %s, want a refusal that says what to write", code, stderr)
	}
	if after, err := os.ReadFile(image); err != nil || !bytes.Equal(before, after) {
		t.Errorf("the refused image: %v, or it has changed", err)
	}
	plannedBy(t, "attach", "--bus=scsi", "--format=qcow2", vm, image)
	plannedBy(t, "detach", vm, image)
	plannedBy(t, "attach", "--bus=scsi", "--format=raw", vm, image)
}

// TestDiskOfARunningMachine goes through the commands on a real machine.
func TestDiskOfARunningMachine(t *testing.T) {
	d := startDaemon(t)
	vm := startQEMU(t, "-device", "virtio-scsi-pci,id=scsi0")
	image := d.image(t, `-odd,name"'<&>.img`)
	if v := showVM(t, vm); v.State != "prelaunch" || len(v.Disks) != 0 || v.PCI != 0 || v.SCSI != 1 {
		t.Fatalf("at the start: %+v", v)
	}
	dry := plannedBy(t, "attach", "--bus=scsi", "--dry-run", vm, image)
	if dry.Changed || len(dry.Plan) != 5 || len(showVM(t, vm).Disks) != 0 {
		t.Errorf("dry run: %+v", dry)
	}
	first := plannedBy(t, "attach", "--bus=scsi", "--rate=100M", vm, image)
	if !first.Changed || first.Disk != attach.DiskID(image) || first.Disk != dry.Disk {
		t.Errorf("attach: %+v", first)
	}
	if again := plannedBy(t, "attach", "--bus=scsi", vm, image); again.Changed {
		t.Errorf("second attach: %+v", again)
	}
	export := attach.ExportName(vm, first.Disk)
	if x := shownAs(t, export); x.Image != image || x.Clients != 1 || x.Rate == nil || x.Rate.Bytes != 100<<20 {
		t.Errorf("export %+v", x)
	}
	for _, changed := range []bool{true, false} {
		p := plannedBy(t, "attach", "--bus=scsi", "--rate=50M,ops=100", vm, image)
		if x := shownAs(t, export); p.Changed != changed || x.Rate == nil || x.Rate.Bytes != 50<<20 || x.Rate.Ops != 100 {
			t.Errorf("another rate: %+v, export %+v", p, x)
		}
	}
	if out := want(t, exitDone, "resize", vm, image, "+1M"); !strings.Contains(out, "grown") {
		t.Errorf("resize: %q", out)
	}
	if v := showVM(t, vm); len(v.Disks) != 1 || v.Disks[0].Size != 2<<20 {
		t.Errorf("after resize: %+v", v)
	}
	want(t, exitRefused, "resize", vm, first.Disk, "1M")
	overlay := filepath.Join(d.dir, "overlay.qcow2")
	snap := plannedBy(t, "snapshot", vm, first.Disk, overlay)
	if x := shownAs(t, export); !snap.Changed || x.Image != overlay || x.Clients != 1 {
		t.Errorf("snapshot: %+v, export %+v", snap, x)
	}
	if gone := plannedBy(t, "detach", vm, image); !gone.Changed || len(gone.Notes) != 2 || !strings.Contains(gone.Notes[1], overlay) {
		t.Errorf("detach: %+v", gone)
	}
	want(t, exitFailed, "export", "show", "--", export)
	if v := showVM(t, vm); len(v.Disks) != 0 {
		t.Errorf("after detach: %+v", v)
	}
	want(t, exitFailed, "detach", vm, image)
}

func TestExportsAndURIsAreAttached(t *testing.T) {
	d := startDaemon(t)
	vm := startQEMU(t, "-device", "virtio-scsi-pci,id=scsi0")
	want(t, exitDone, "export", "add", "web", d.image(t, "web.img"))
	plannedBy(t, "attach", "--bus=scsi", "--export", vm, "web")
	uri := "nbd+unix:///web?socket=" + filepath.Join(d.dir, "nbd")
	plannedBy(t, "attach", "--bus=scsi", "--readonly", "--target=d1", vm, uri)
	want(t, exitUsage, "attach", "--export", "--format=qcow2", vm, "web")
	if code, _, stderr := ctl(t, "resize", vm, "web", "+1M"); code != exitFailed || !strings.Contains(stderr, "--export names another") {
		t.Errorf("resize without --export: exit code %d, %s", code, stderr)
	}
	plannedBy(t, "resize", "--export=web", vm, "web", "+1M")
	if v := showVM(t, vm); len(v.Disks) != 2 || !slices.ContainsFunc(v.Disks, func(d vmDisk) bool { return d.ReadOnly }) {
		t.Errorf("machine %+v", v)
	}
	plannedBy(t, "detach", vm, "web")
	plannedBy(t, "detach", vm, "d1")
	if x := shownAs(t, "web"); x.Size != 2<<20 {
		t.Errorf("export %+v", x)
	}
	must(t, testenv.Await(testenv.Context(t), func() bool { return shownAs(t, "web").Clients == 0 }))
}

// TestNoFlagOfAttachIsIgnored: what has no meaning for a disk is refused before
// anybody is asked.
func TestNoFlagOfAttachIsIgnored(t *testing.T) {
	for _, flag := range []string{"--cache=none", "--discard=keep", "--image-lock=off", "--lenient", "--l2-cache-size=4M", "--format=raw", "--rate=1M", "--overlay=1M",
		"--fd", "--socket-mode=0660", "--persist", "--keep-reconnect"} {
		want(t, exitUsage, "attach", flag, "/none/qmp", "nbd://localhost/x")
		want(t, exitUsage, "attach", flag, "--export", "/none/qmp", "x")
	}
	want(t, exitUsage, "attach", "--keep-reconnect", "/none/qmp", "/image")
	want(t, exitUsage, "domain-xml", "--cache=none", "--target=vda", "none", "nbd://localhost/x")
	for _, flag := range []string{"--persist", "--keep-reconnect"} {
		want(t, exitFailed, "attach", "--libvirt-socket=/none/libvirt", flag, "domain", "nbd://localhost/x")
	}
}

// TestStatesOfADomainAreTakenAtTheirWord: which of them a disk is for is not
// guessed from flags that contradict each other, nor ignored where there is none.
func TestStatesOfADomainAreTakenAtTheirWord(t *testing.T) {
	for _, tt := range []struct {
		line, says string
	}{
		{"attach --persist --live domain /image", "give it alone"},
		{"attach --persist --config domain /image", "give it alone"},
		{"attach --config --keep-reconnect domain /image", "--keep-reconnect is for the running domain"},
		{"attach --config --fd domain /image", "excludes --fd"},
		{"attach --config /none/qmp /image", "a machine over QMP has no configuration"},
		{"attach --config --via=qmp none /image", "a machine over QMP has no configuration"},
		{"detach --config /none/qmp vda", "a machine over QMP has no configuration"},
		{"resize --config domain vda 1G", "there is no option --config"},
	} {
		if code, _, stderr := ctl(t, strings.Fields(tt.line)...); code != exitUsage || !strings.Contains(stderr, tt.says) {
			t.Errorf("%s: exit code %d, want %d with %q: %s", tt.line, code, exitUsage, tt.says, stderr)
		}
	}
	for _, line := range []string{"attach --live --config --keep-reconnect domain nbd://localhost/x", "attach --config domain nbd://localhost/x", "detach --live --config domain vda"} {
		want(t, exitFailed, append(strings.Fields(line), "--libvirt-socket=/none/libvirt")...)
	}
	for flags, in := range map[string]libvirtd.Scope{"": 0, "--live": libvirtd.Live, "--config": libvirtd.Config, "--live --config": libvirtd.Live | libvirtd.Config} {
		f := &vmFlags{}
		c := &cobra.Command{}
		f.addScope(c, "", "")
		must(t, c.ParseFlags(strings.Fields(flags)))
		if got := f.scope(); got != in {
			t.Errorf("%q: scope %b, want %b", flags, got, in)
		}
	}
}

// TestAttachThatFailsSaysHow looks at exit codes, and that nothing is left.
func TestAttachThatFailsSaysHow(t *testing.T) {
	d := startDaemon(t)
	vm := startQEMU(t)
	image := d.image(t, "a.img")
	code, _, stderr := ctl(t, "attach", vm, image)
	if code != exitFailed || !strings.Contains(stderr, "pcie-root-port") {
		t.Errorf("no place: %d, %s", code, stderr)
	}
	for _, args := range [][]string{
		{"attach", "--bus=ide", vm, image},
		{"attach", "--via=telepathy", vm, image},
		{"attach", "--target=1,x", vm, image},
		{"attach", "--reconnect=0s", vm, image},
		{"attach", "--socket-dir=/" + strings.Repeat("a", 200), vm, image},
		{"attach", vm, "nbds://localhost/x"},
		{"attach", "--agent=/x", "domain", image},
		{"resize", vm, image, "much"},
		{"attach", vm},
	} {
		want(t, exitUsage, args...)
	}
	code, _, stderr = ctl(t, "attach", "--libvirt-socket="+d.dir+"/none", "a domain\n", image)
	if code != exitFailed || strings.Count(stderr, "\n") != 1 {
		t.Errorf("no libvirt: %d, %q", code, stderr)
	}
	if out := want(t, exitDone, "export", "list", "--json"); strings.TrimSpace(out) != "[]" {
		t.Errorf("exports left: %s", out)
	}
}

// TestFileNamedAsADomainOwnsNoSocket: whoever can write to the working directory
// has no say in whose the socket of a domain's disk is. That of a machine over
// QMP belongs to the owner of its monitor.
func TestFileNamedAsADomainOwnsNoSocket(t *testing.T) {
	t.Chdir(t.TempDir())
	must(t, os.WriteFile("web", nil, 0o600))
	owner := fmt.Sprintf("%d:%d", os.Getuid(), os.Getgid())
	if os.Getuid() == 0 {
		must(t, os.Chown("web", testenv.Nobody, testenv.Nobody))
		owner = fmt.Sprintf("%d:%d", testenv.Nobody, testenv.Nobody)
	}
	for _, tt := range []struct{ vm, via, want string }{
		{vm: "web"},
		{vm: "./web", via: viaLibvirt},
		{vm: "./web", want: owner},
		{vm: "web", via: viaQMP, want: owner},
	} {
		f := &attachFlags{}
		f.via = tt.via
		s, err := f.source(newAttach(), tt.vm, "/disk.img")
		if err != nil || s.Owner != tt.want {
			t.Errorf("VM %q, --via=%s: owner %q, %v, want %q", tt.vm, tt.via, s.Owner, err, tt.want)
		}
	}
}

func TestMachinesAreListed(t *testing.T) {
	vm := startQEMU(t)
	dir := filepath.Dir(vm)
	dead := filepath.Join(dir, "dead\n")
	must(t, syscall.Mknod(dead, syscall.S_IFSOCK|0o600, 0))
	var rows []vmRow
	must(t, json.Unmarshal([]byte(want(t, exitDone, "vm", "list", "--json", dir)), &rows))
	if len(rows) != 2 || rows[0].VM != dead || rows[0].Error == "" || rows[1].VM != vm || rows[1].State != "prelaunch" || rows[1].QEMU == "" {
		t.Errorf("machines %+v", rows)
	}
	if out := want(t, exitDone, "vm", "list", dir); strings.Count(out, "\n") != 3 {
		t.Errorf("lines of a list of two: %q", out)
	}
}

// TestPlaceWithoutMachinesHidesNone: it is listed among the others, and the command
// has failed.
func TestPlaceWithoutMachinesHidesNone(t *testing.T) {
	dir := t.TempDir()
	first, last, gone := filepath.Join(dir, "a"), filepath.Join(dir, "d", "b"), filepath.Join(dir, "gone")
	must(t, os.Mkdir(filepath.Dir(last), 0o700))
	for _, socket := range []string{first, last} {
		must(t, syscall.Mknod(socket, syscall.S_IFSOCK|0o600, 0))
	}
	list := []string{"vm", "list", first, gone, filepath.Dir(last), gone + "2"}
	var got []string
	var rows []vmRow
	must(t, json.Unmarshal([]byte(want(t, exitFailed, append(list, "--json")...)), &rows))
	for _, r := range rows {
		if got = append(got, r.VM); r.Error == "" {
			t.Errorf("%s has no error", r.VM)
		}
	}
	if expect := []string{first, gone, last, gone + "2"}; !slices.Equal(got, expect) {
		t.Errorf("got %q, want %q", got, expect)
	}
	code, out, stderr := ctl(t, list...)
	if code != exitFailed || strings.Count(out, "\n") != 5 || stderr != "vmdiskctl: stat "+gone+": no such file or directory\n" {
		t.Errorf("exit code %d, %q, %q", code, out, stderr)
	}
	want(t, exitFailed, "vm", "list", gone)
}

// TestElementHoldsNamesAsData reads back what domain-xml prints.
func TestElementHoldsNamesAsData(t *testing.T) {
	name := `a"b'<&>,-- x`
	uri := fmt.Sprintf("nbd+unix:///%s?socket=/run/%s", "a%22b%27%3C%26%3E%2C--%20x", "s%3C.sock")
	out := want(t, exitDone, "domain-xml", "--target=vdb", "--serial=1<2", "--readonly", "vm1", uri)
	var disk struct {
		Source struct {
			Protocol string `xml:"protocol,attr"`
			Name     string `xml:"name,attr"`
			Host     struct {
				Socket string `xml:"socket,attr"`
			} `xml:"host"`
			Reconnect struct {
				Delay int `xml:"delay,attr"`
			} `xml:"reconnect"`
		} `xml:"source"`
		Target struct {
			Dev string `xml:"dev,attr"`
			Bus string `xml:"bus,attr"`
		} `xml:"target"`
		Serial   string    `xml:"serial"`
		ReadOnly *struct{} `xml:"readonly"`
	}
	must(t, xml.Unmarshal([]byte(out), &disk))
	s := disk.Source
	if s.Protocol != "nbd" || s.Name != name || s.Host.Socket != "/run/s<.sock" || s.Reconnect.Delay != 60 ||
		disk.Target.Dev != "vdb" || disk.Target.Bus != "virtio" || disk.Serial != "1<2" || disk.ReadOnly == nil {
		t.Errorf("element %+v of\n%s", disk, out)
	}
	if out := want(t, exitDone, "domain-xml", "--target=vdb", "vm1", "nbds://localhost/"); !strings.Contains(out, `tls="yes"`) {
		t.Errorf("element of a server with TLS:\n%s", out)
	}
	want(t, exitFailed, "domain-xml", "--target=vdb", "--bus=nvme", "vm1", uri)
}

func TestExitCodesOfPlans(t *testing.T) {
	for _, tt := range []struct {
		err  error
		want int
	}{
		{errors.Join(qmp.ErrNotReleased, attach.ErrIncomplete), exitHalf},
		{errors.Join(attach.ErrDiffers, attach.ErrIncomplete), exitHalf},
		{fmt.Errorf("step: %w", attach.ErrMounted), exitRefused},
		{attach.ErrSaved, exitRefused},
		{attach.ErrDiffers, exitRefused},
		{attach.ErrSmaller, exitRefused},
		{attach.ErrFull, exitRefused},
		{attach.ErrPaused, exitRefused},
		{qmp.ErrUnplugRefused, exitRefused},
		{&api.Error{Code: api.CodeForbidden}, exitRefused},
		{&api.Error{Code: api.CodeExists}, exitRefused},
		{&api.Error{Code: api.CodeInUse}, exitFailed},
		{qmp.ErrInvalid, exitUsage},
		{qmp.ErrNoPCIPlace, exitFailed},
		{attach.ErrNoDisk, exitFailed},
		{context.Canceled, exitFailed},
	} {
		if got := exitCode(plugError(tt.err), true); got != tt.want {
			t.Errorf("%v: exit code %d, want %d", tt.err, got, tt.want)
		}
	}
	if got := plugError(errors.Join(errors.New("a\x1b[2J"), attach.ErrIncomplete)).Error(); strings.ContainsAny(got, "\n\x1b") {
		t.Errorf("a terminal would obey %q", got)
	}
}

// TestInterruptedAttachIsTakenBack ends the program, as the user or a lost
// terminal does, while the guest is asked for the disk that it has been given.
// nohup(1) keeps the latter from it: then the guest shows the disk.
func TestInterruptedAttachIsTakenBack(t *testing.T) {
	d := startDaemon(t)
	vm := startQEMU(t, "-device", "virtio-scsi-pci,id=scsi0")
	m, err := qmp.Dial(t.Context(), vm)
	must(t, err)
	_, err = m.Execute(t.Context(), "cont", nil)
	must(t, errors.Join(err, m.Close()))
	image := d.image(t, "a.img")
	for _, tt := range []struct {
		name   string
		signal os.Signal
		ignore bool
	}{
		{"the user", os.Interrupt, false},
		{"a terminal that is gone", syscall.SIGHUP, false},
		{"a terminal that is gone, under nohup", syscall.SIGHUP, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			asked, shown := make(chan struct{}, 1), make(chan struct{})
			agent := agentWithDisk(t, asked, shown)
			hup := "--default-signal=HUP" // the test may have it ignored
			if tt.ignore {
				hup = "--ignore-signal=HUP"
			}
			cmd := exec.Command("env", hup, os.Args[0], "attach", "--bus=scsi", "--serial=S1", "--agent="+agent, vm, image)
			cmd.Env = append(os.Environ(), asMain+"=1")
			var said bytes.Buffer
			cmd.Stderr = &said
			must(t, cmd.Start())
			<-asked
			must(t, cmd.Process.Signal(tt.signal))
			if tt.ignore {
				close(shown)
				must(t, cmd.Wait())
				want(t, exitDone, "detach", "--force", vm, image)
			} else if err = cmd.Wait(); cmd.ProcessState.ExitCode() != exitFailed || !strings.Contains(said.String(), "canceled") {
				t.Errorf("%v: %s", err, said.String())
			}
			if out := want(t, exitDone, "export", "list", "--json"); strings.TrimSpace(out) != "[]" {
				t.Errorf("exports left: %s", out)
			}
			if v := showVM(t, vm); len(v.Disks) != 0 || v.SCSI != 1 {
				t.Errorf("machine %+v", v)
			}
		})
	}
}

// agentWithDisk is a guest agent that tells when it is asked for disks, and shows
// one from a moment on.
func agentWithDisk(t *testing.T, asked chan<- struct{}, shown <-chan struct{}) (path string) {
	t.Helper()
	return qmptest.Listen(t, func(c *qmptest.Conn) {
		for {
			cmd, ok := c.Next()
			if !ok {
				return
			}
			if cmd.Execute == "guest-sync-delimited" {
				var a struct{ ID int64 }
				must(t, json.Unmarshal(cmd.Arguments, &a))
				c.Say(fmt.Sprintf("\xff{\"return\": %d}", a.ID))
				continue
			}
			select {
			case <-shown:
				c.Say(`{"return": [{"address": {"serial": "S1"}}]}`)
				continue
			default:
				c.Say(`{"return": []}`)
			}
			select {
			case asked <- struct{}{}:
			default:
			}
		}
	})
}
