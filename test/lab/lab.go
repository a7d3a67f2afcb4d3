// Package lab boots a small Debian with systemd and SELinux in QEMU's own
// emulation and runs scripts in it, for what needs a real init, a real policy
// or the kernel's vsock: the machines that the tests run on have none of them.
//
// A test gives Run a Scenario: files, units and policy modules that are in the
// guest before its systemd starts, and steps, each of which becomes a subtest:
//
//	func TestUnitServes(t *testing.T) {
//		lab.Run(t, lab.Scenario{
//			Enforcing: true,
//			Files:     map[string]string{"/etc/systemd/system/x.service": testenv.Root() + "/systemd/x.service"},
//			Text:      map[string]string{"/etc/vmdiskd/vmdiskd.toml": config},
//			Links:     map[string]string{"/etc/systemd/system/multi-user.target.wants/x.service": "../x.service"},
//			Steps: []lab.Step{
//				{Name: "unit is active", Script: "systemctl is-active --wait x.service"},
//				{Name: "disk is served", Script: "nbdinfo --size nbd+unix:///?socket=/run/x.sock"},
//			},
//		})
//	}
//
// vmdiskd and vmdiskctl are always there, in /usr/sbin and /usr/bin. A step is
// a script of sh -ex, run as an unconfined root by a service of its own, and
// fails by its exit status, or after StepSeconds. It may say `fails COMMAND`,
// since `! COMMAND` does not end a script of sh -e, and `await COMMAND`, which
// is bounded by the time of the step. All steps are run, one after
// the other, in the same guest; what one leaves behind the next ones find. A
// boot costs about 10 s: put what can share a guest into one scenario. Files
// that a step puts into /lab/out come back as Result.Outputs; the journal
// does always.
//
// The image is made by mmdebstrap, which needs root and about 40 s, and cached
// in .cache; a set of policy modules makes an image of its own in about 8 s, one of
// packages in about a minute.
// Everything else needs no root. When a scenario fails, what the guest said is
// in .cache/lab-logs/ under the name of the test.
//
// `make lab-shell` boots the same guest with a root shell on the terminal.
package lab

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/test/guest"
	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// DefaultKernel is the meta package whose kernel boots when a scenario names
// none: the stable one. NewKernel is the newest of the release.
const (
	DefaultKernel = "linux-image-cloud-amd64"
	NewKernel     = "linux-image-6.12-cloud-amd64"
)

// StepSeconds bounds a step that names no bound.
const StepSeconds = 240

const (
	defaultMemoryMiB = 512
	// bootPatience bounds a guest beside the time of its steps. A boot takes
	// some seconds on an idle machine.
	bootPatience = 5 * time.Minute
	// outputBytes bounds what a guest gives back.
	outputBytes = 64 << 20
)

// Scenario is one boot of the guest. The zero value boots it, permissive, and
// powers it off.
type Scenario struct {
	// Name is the subtest of Script; "script" if it is empty.
	Name string

	// Files, Text and Links are in the guest before its first process runs, with
	// the labels that the policy gives their paths. The keys are absolute paths.
	Files map[string]string // file of the host; keeps its permission bits
	Text  map[string]string // contents; executable if they begin with "#!"
	Links map[string]string // target of a symbolic link, such as a unit's enablement

	// Packages are Debian's, installed beside those of every guest. Each set of
	// them makes an image of its own.
	Packages []string
	// Policy are policy modules of the host (.pp, .cil), installed in order.
	Policy []string
	// Modules are kernel modules that can be loaded, beside those of Modules.
	Modules []string

	Script string // a step by the name of the scenario, after Steps
	Steps  []Step

	Enforcing bool     // SELinux refuses, instead of only telling
	MemoryMiB int      // 512 if it is 0
	Kernel    string   // DefaultKernel if it is empty
	Append    string   // to the kernel's command line
	Root      []string // QEMU's arguments for the first disk; if empty, the image, which keeps nothing
	Devices   []string // more arguments of QEMU
}

// Step is a script and the name of its subtest.
type Step struct {
	Name    string
	Script  string
	Seconds int // bound of its time; StepSeconds if it is 0
}

// Result is what the guest said.
type Result struct {
	Console string            // of the kernel and of systemd
	Log     string            // of the steps, with what they ran
	Outputs map[string]string // the files of /lab/out, by their paths below it
	codes   map[string]int
}

// Modules are the kernel modules of every guest. They are not loaded.
var Modules = []string{
	"nbd", "vsock", "vsock_loopback", "vmw_vsock_virtio_transport", "vhost_vsock", "vsock_diag",
	"loop", "fuse", "tun", "kvm", "kvm_amd",
}

// Code returns the exit status of a step, -1 if it did not end.
func (r Result) Code(step string) int {
	if code, ok := r.codes[step]; ok {
		return code
	}
	return -1
}

// denial is SELinux's message in the journal.
var denial = regexp.MustCompile(`(?m)^.*avc:  denied .*$`)

// Denials are SELinux's messages of what it refused, or would have refused.
func (r Result) Denials() []string {
	return denial.FindAllString(r.Outputs["journal"], -1)
}

// Run boots the guest and reports each step as a subtest; the test fails as
// well when the guest does not come to its end. It returns what the guest
// said, so that a test can look further.
func Run(t *testing.T, s Scenario) Result {
	t.Helper()
	Require(t)
	image := s.image(t)
	if err := s.prepare(t.Context()); err != nil {
		t.Fatal(err)
	}
	steps, err := s.steps()
	if err != nil {
		t.Fatal(err)
	}
	patience := bootPatience
	for _, step := range steps {
		patience += time.Duration(step.Seconds) * time.Second
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	r, err := boot(ctx, testenv.TempDir(t), image, s, steps)
	for _, step := range steps {
		t.Run(step.Name, func(t *testing.T) {
			if code := r.Code(step.Name); code != 0 {
				t.Errorf("exit status %d%s:\n%s", code, meaning(code), tail(r.stepLog(step.Name)))
			}
		})
	}
	if err != nil {
		t.Errorf("%v; console:\n%s", err, tail(r.Console))
	}
	if t.Failed() {
		r.keep(t)
	}
	return r
}

// meaning explains the statuses that timeout(1) and Code have.
func meaning(code int) string {
	switch code {
	case -1:
		return ", it did not end"
	case 124, 137:
		return ", which may be that of its time being over"
	}
	return ""
}

// Require ends the test unless a guest can be booted: it fails in CI, and is
// skipped elsewhere, with the name of what is missing.
func Require(t testing.TB) {
	t.Helper()
	if testing.Short() {
		t.Skip("boots a guest: not with -short")
	}
	if k := testenv.Under(t); k.Program != "" {
		t.Skipf("is about vmdiskd, not %s", k.Name)
	}
	for _, tool := range []string{"qemu-system-x86_64", "busybox", "xz", "apt-get", "dpkg", "depmod"} {
		if _, err := testenv.Tool(tool); err != nil {
			lacks(t, err)
		}
	}
}

// prepare puts in what every guest has.
func (s *Scenario) prepare(ctx context.Context) error {
	files := map[string]string{}
	for command, to := range map[string]string{"vmdiskd": "/usr/sbin/vmdiskd", "vmdiskctl": "/usr/bin/vmdiskctl"} {
		from, err := testenv.Build(ctx, command)
		if err != nil {
			return err
		}
		files[to] = from
	}
	maps.Copy(files, s.Files)
	s.Files = files
	return nil
}

// stepName is what a step may be called: it is a part of the name of a file.
var stepName = regexp.MustCompile(`^[A-Za-z0-9][-A-Za-z0-9_.,:() ]*$`)

// steps are all the steps with their bounds.
func (s *Scenario) steps() ([]Step, error) {
	steps := slices.Clone(s.Steps)
	if s.Script != "" {
		name := s.Name
		if name == "" {
			name = "script"
		}
		steps = append(steps, Step{Name: name, Script: s.Script})
	}
	seen := map[string]bool{}
	for i := range steps {
		if steps[i].Seconds == 0 {
			steps[i].Seconds = StepSeconds
		}
		name := steps[i].Name
		if !stepName.MatchString(name) || seen[name] {
			return nil, fmt.Errorf("step %d cannot be called %q", i+1, name)
		}
		seen[name] = true
	}
	return steps, nil
}

// boot runs the guest to its end in a folder of the host.
func boot(ctx context.Context, dir, image string, s Scenario, steps []Step) (Result, error) {
	m, err := s.machine(ctx, dir, image, steps)
	if err != nil {
		return Result{}, err
	}
	log, out := filepath.Join(dir, "steps"), filepath.Join(dir, "out")
	if err := makeHole(out, outputBytes); err != nil {
		return Result{}, err
	}
	m.Append += " systemd.mask=serial-getty@ttyS0.service"
	m.Devices = append(m.Devices, "-drive", disk(out), "-serial", "file:"+log)
	m.Devices = append(m.Devices, s.Devices...)
	cmd, err := m.Command(ctx)
	if err != nil {
		return Result{}, err
	}
	cmd.WaitDelay = time.Second
	console, err := cmd.CombinedOutput()
	r := Result{Console: clean(console)}
	if err != nil {
		err = fmt.Errorf("qemu: %w", errors.Join(err, ctx.Err()))
	}
	text, lerr := os.ReadFile(log)
	r.Log = clean(text)
	r.codes = codes(r.Log)
	if err := errors.Join(err, lerr); err != nil {
		return r, err
	}
	r.Outputs, err = outputs(out)
	if err == nil && !strings.Contains(r.Log, "\nLAB-RC=0\n") {
		err = errors.New("the guest did not come to its end")
	}
	return r, err
}

// clean takes out what serial lines add.
func clean(text []byte) string { return strings.ReplaceAll(string(text), "\r", "") }

// disk is the value of QEMU's -drive for a file that is a virtio disk.
func disk(file string, options ...string) string {
	return strings.Join(append([]string{"file=" + strings.ReplaceAll(file, ",", ",,"), "if=virtio", "format=raw"}, options...), ",")
}

func makeHole(name string, size int64) error {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	return errors.Join(f.Truncate(size), f.Close())
}

// end is the line that the guest writes after each step.
var end = regexp.MustCompile(`(?m)^LAB-STEP=(\d+) (.+)$`)

func codes(log string) map[string]int {
	codes := map[string]int{}
	for _, m := range end.FindAllStringSubmatch(log, -1) {
		code, err := strconv.Atoi(m[1])
		if err == nil {
			codes[m[2]] = code
		}
	}
	return codes
}

// stepLog is the part of the log that a step wrote.
func (r Result) stepLog(step string) string {
	_, log, _ := strings.Cut(r.Log, "\nLAB-BEGIN "+step+"\n")
	log, _, _ = strings.Cut(log, "\nLAB-STEP=")
	return log
}

// tail is the end of a text, as much as one reads.
func tail(text string) string {
	const bytes = 6000
	if len(text) <= bytes {
		return text
	}
	return "[...]" + text[len(text)-bytes:]
}

// unfit are the characters of a test's name that a folder's should not have.
var unfit = regexp.MustCompile(`[^-A-Za-z0-9_.]+`)

// keep writes down what the guest said, where the next run of the same test
// replaces it.
func (r Result) keep(t testing.TB) {
	t.Helper()
	dir := filepath.Join(testenv.Root(), ".cache/lab-logs", unfit.ReplaceAllString(t.Name(), "_"))
	err := errors.Join(os.RemoveAll(dir), os.MkdirAll(dir, 0o755),
		os.WriteFile(filepath.Join(dir, "console"), []byte(r.Console), 0o644),
		os.WriteFile(filepath.Join(dir, "steps"), []byte(r.Log), 0o644),
		os.WriteFile(filepath.Join(dir, "journal"), []byte(r.Outputs["journal"]), 0o644))
	if err != nil {
		t.Error(err)
	}
	t.Logf("what the guest said is in %s", dir)
}

// Shell boots the guest of a scenario with a root shell on the terminal and
// returns when it is powered off. Steps are not run. The key sequence Ctrl-A X
// ends QEMU.
func Shell(ctx context.Context, s Scenario) error {
	image, err := s.build()
	if err != nil {
		return err
	}
	if err := s.prepare(ctx); err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "vmdl")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	m, err := s.machine(ctx, dir, image, nil)
	if err != nil {
		return err
	}
	m.Serial = "mon:stdio"
	m.Devices = append(m.Devices, s.Devices...)
	cmd, err := m.Command(ctx)
	if err != nil {
		return err
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("qemu: %w", err)
	}
	return nil
}

// machine writes the initramfs and the disk of files into dir.
func (s *Scenario) machine(ctx context.Context, dir, image string, steps []Step) (guest.Machine, error) {
	meta := s.Kernel
	if meta == "" {
		meta = DefaultKernel
	}
	kernel, err := testenv.FetchKernel(meta)
	if err != nil {
		return guest.Machine{}, fmt.Errorf("kernel of %s: %w", meta, err)
	}
	initrd, files := filepath.Join(dir, "initrd"), filepath.Join(dir, "files.tar")
	err = guest.Archive{Kernel: kernel, Init: enter, Modules: []string{"virtio_pci", "virtio_blk", "ext4"}}.Write(ctx, initrd)
	if err != nil {
		return guest.Machine{}, err
	}
	if err := s.writeFiles(files, kernel, steps); err != nil {
		return guest.Machine{}, err
	}
	memory := s.MemoryMiB
	if memory == 0 {
		memory = defaultMemoryMiB
	}
	enforcing := 0
	if s.Enforcing {
		enforcing = 1
	}
	root := s.Root
	if len(root) == 0 {
		root = []string{"-drive", disk(image, "snapshot=on")}
	}
	return guest.Machine{
		Kernel: kernel, Initrd: initrd, MemoryMiB: memory,
		Append:  fmt.Sprintf("security=selinux selinux=1 enforcing=%d %s", enforcing, s.Append),
		Devices: append(slices.Clone(root), "-drive", disk(files, "readonly=on")),
	}, nil
}
