package guest

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// estate is a service with a guest that uses all its disks.
type estate struct {
	dir     string
	ctl     string   // vmdiskctl
	vm      string   // as vmdiskctl is told it
	flags   []string // that VM needs
	memory  int      // of the machine that boot starts, in MiB
	service *exec.Cmd
}

// newEstate starts a service and writes "kernel" and "initrd" into its folder,
// for all to read. The guest has the programs beside its own.
func newEstate(t *testing.T, programs ...string) *estate {
	t.Helper()
	requireGuest(t)
	if k := testenv.Under(t); k.Program != "" {
		t.Skipf("is about vmdiskd, not %s", k.Name)
	}
	programs = append(programs, "qemu-ga")
	testenv.Require(t, programs...)
	kernel := testenv.CloudKernel(t, stableKernel)
	e := &estate{dir: testenv.TempDir(t), ctl: testenv.Binary(t, "vmdiskctl"), memory: 384}
	ctx := testenv.Context(t)
	in, err := newInitramfs(ctx, kernel, fleet, "virtio_pci", "virtio_blk", "virtio_scsi", "sd_mod", "nvme", "virtio_console", "ext4")
	if err == nil {
		err = in.addPrograms(ctx, programs...)
	}
	text := fmt.Sprintf("[control]\nsocket = %q\nstate = %q\n[images]\nroots = [%q]\n", e.dir+"/control", e.dir+"/state", e.dir)
	err = errors.Join(err, in.writeFile(e.dir+"/initrd"), copyFor(e.dir+"/kernel", kernel.Image), os.Chmod(e.dir, 0o755),
		os.Chmod(e.dir+"/initrd", 0o644), os.Mkdir(e.dir+"/state", 0o700), os.WriteFile(e.dir+"/conf", []byte(text), 0o600))
	if err != nil {
		t.Fatal(err)
	}
	e.start(t)
	t.Cleanup(func() {
		e.service.Process.Kill()
		e.service.Wait()
		if t.Failed() {
			for _, name := range []string{"console", "service"} {
				text, _ := os.ReadFile(filepath.Join(e.dir, name))
				t.Logf("%s: %s", name, text[max(0, len(text)-8<<10):])
			}
		}
	})
	return e
}

// copyFor copies a file for everybody to read.
func copyFor(to, from string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

// start starts the service.
func (e *estate) start(t *testing.T) {
	t.Helper()
	log, err := os.OpenFile(e.dir+"/service", os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	e.service = exec.Command(testenv.Binary(t, "vmdiskd"), "--config", e.dir+"/conf")
	e.service.Stderr = log
	if err := e.service.Start(); err != nil {
		t.Fatal(err)
	}
	e.await(t, "the service answers", func() bool {
		return exec.Command(e.ctl, "status", "--socket", e.dir+"/control").Run() == nil
	})
}

// restart stops the service, which must end well, and starts it again.
func (e *estate) restart(t *testing.T) {
	t.Helper()
	if err := errors.Join(e.service.Process.Signal(syscall.SIGTERM), e.service.Wait()); err != nil {
		t.Errorf("the service ends with %v", err)
	}
	e.start(t)
}

// kill ends the service without a word and starts it again.
func (e *estate) kill(t *testing.T) {
	t.Helper()
	if err := e.service.Process.Kill(); err != nil {
		t.Errorf("the service had ended: %v", err)
	}
	_ = e.service.Wait() // it says that it was killed
	e.start(t)
}

// done is what vmdiskctl says that it has done.
type done struct {
	Disk    string
	Changed bool
	Notes   []string
}

// run has vmdiskctl change the machine; arguments with two dashes are flags.
func (e *estate) run(t *testing.T, command string, args ...string) (out done) {
	t.Helper()
	text, err := e.try(t, command, args...)
	if err != nil {
		t.Fatalf("%s %q: %v", command, args, err)
	}
	if err := json.Unmarshal([]byte(text), &out); err != nil || !out.Changed {
		t.Fatalf("%s %q: %v, %s", command, args, err, text)
	}
	return out
}

func (e *estate) try(t *testing.T, command string, args ...string) (string, error) {
	t.Helper()
	argv := append([]string{e.ctl, command, "--json", "--socket", e.dir + "/control"}, e.flags...)
	words := []string{"--", e.vm}
	for _, a := range args {
		if strings.HasPrefix(a, "--") {
			argv = append(argv, a)
		} else {
			words = append(words, a)
		}
	}
	return testenv.Try(t, append(argv, words...)...)
}

// image makes an image that is empty.
func (e *estate) image(t *testing.T, name string, size int64) string {
	t.Helper()
	path := filepath.Join(e.dir, name)
	if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, size)); err != nil {
		t.Fatal(err)
	}
	return path
}

// said is what the guest has said.
func (e *estate) said(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile(e.dir + "/console")
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	return strings.ReplaceAll(string(text), "\r", "")
}

func (e *estate) await(t *testing.T, what string, ready func() bool) {
	t.Helper()
	if err := testenv.Await(testenv.Context(t), ready); err != nil {
		t.Fatalf("never: %s", what)
	}
}

// expect waits until the guest says a line.
func (e *estate) expect(t *testing.T, line string) {
	t.Helper()
	e.await(t, "the guest says "+strconv.Quote(line), func() bool {
		said := e.said(t)
		if strings.Contains(said, "ERROR") {
			t.Fatalf("the guest reports an error")
		}
		return strings.Contains(said, "guest: "+line+"\n")
	})
}

// load waits until the guest has used a disk for some rounds more.
func (e *estate) load(t *testing.T, serial string, more int) {
	t.Helper()
	e.expect(t, fmt.Sprintf("%s round %d", serial, e.rounds(t, serial)+more))
}

// rounds is how often the guest has used a disk.
func (e *estate) rounds(t *testing.T, serial string) int {
	t.Helper()
	all := regexp.MustCompile(`(?m)^guest: `+regexp.QuoteMeta(serial)+` round (\d+)$`).FindAllStringSubmatch(e.said(t), -1)
	if len(all) == 0 {
		return 0
	}
	n, err := strconv.Atoi(all[len(all)-1][1])
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// boot starts a q35 with room for eight PCIe disks and for those of a SCSI
// controller.
func (e *estate) boot(t *testing.T) {
	t.Helper()
	args := []string{"-machine", "q35", "-accel", "tcg", "-cpu", CPU, "-smp", "1", "-m", strconv.Itoa(e.memory), "-nodefaults", "-display", "none",
		"-no-reboot", "-serial", "file:" + e.dir + "/console", "-kernel", e.dir + "/kernel", "-initrd", e.dir + "/initrd",
		"-append", "console=ttyS0 quiet panic=-1", "-device", "virtio-scsi-pci,id=scsi0", "-qmp", "unix:" + e.dir + "/qmp,server=on,wait=off"}
	for i := range 8 {
		args = append(args, "-device", fmt.Sprintf("pcie-root-port,id=port%d,chassis=%d", i, i+1))
	}
	qemu := exec.Command(testenv.Path(t, "qemu-system-x86_64"), args...)
	qemu.Stderr = os.Stderr
	if err := qemu.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		qemu.Process.Kill()
		qemu.Wait()
	})
	e.vm = e.dir + "/qmp"
	e.expect(t, "ready")
}

// TestTenDisksOfAGuestSurviveARestart gives a guest ten disks of all kinds,
// which it uses all the while: the service stops and starts, disks grow, and
// all are taken out, without an error in the guest.
func TestTenDisksOfAGuestSurviveARestart(t *testing.T) {
	t.Parallel()
	e := newEstate(t)
	e.boot(t)
	buses := []string{"virtio", "scsi", "nvme"}
	var disks, serials []string
	for i := range 10 {
		serials = append(serials, fmt.Sprintf("TEN%d", i))
		image := e.image(t, fmt.Sprintf("d%d.img", i), 8<<20)
		disks = append(disks, e.run(t, "attach", image, "--persist", "--bus="+buses[i%3], "--serial="+serials[i]).Disk)
	}
	for _, s := range serials {
		e.expect(t, s+" has 8 MiB")
		e.load(t, s, 1)
	}
	e.restart(t)
	for _, s := range serials {
		e.load(t, s, 2)
	}
	for i := range 2 {
		e.run(t, "resize", disks[i], "+8M")
		e.expect(t, serials[i]+" has 16 MiB")
		e.load(t, serials[i], 1)
	}
	for i, d := range disks {
		e.run(t, "detach", d)
		e.expect(t, serials[i]+" gone")
	}
	left, err := filepath.Glob(e.dir + "/*.sock")
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %q, %v", left, err)
	}
}
