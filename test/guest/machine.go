package guest

import (
	"context"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// Archive says what an initramfs holds, for those who boot guests of another
// kind than this package's.
type Archive struct {
	Kernel testenv.Kernel
	// Init goes on in busybox's shell after the kernel's file systems are
	// mounted and the modules are loaded. Without it, Scenario is run, its exit
	// status is told on the console as LAB-RC=n, and the guest is powered off.
	Init     string
	Scenario string
	Modules  []string          // names, loaded with all that they need
	Programs []string          // of the host, with their libraries, to the same paths
	Files    map[string]string // path in the guest to file of the host
}

// Write writes the archive into a file.
func (a Archive) Write(ctx context.Context, name string) error {
	in, err := newInitramfs(ctx, a.Kernel, a.Scenario, a.Modules...)
	if err != nil {
		return err
	}
	if a.Init != "" {
		in.addFile("init", 0o755, []byte(prelude+a.Init))
	}
	if err := in.addPrograms(ctx, a.Programs...); err != nil {
		return err
	}
	for to, from := range a.Files {
		if err := in.copyFile(from, to); err != nil {
			return err
		}
	}
	return in.writeFile(name)
}

// ModuleFiles returns the files of the modules and of all that they need,
// below kernel.Modules, each once and after what it needs. What the kernel
// contains has none.
func ModuleFiles(kernel testenv.Kernel, names ...string) ([]string, error) {
	deps, builtin, err := moduleLists(kernel)
	if err != nil {
		return nil, err
	}
	var files []string
	for _, name := range names {
		order, err := loadOrder(deps, builtin, name)
		if err != nil {
			return nil, err
		}
		for _, file := range order {
			if !slices.Contains(files, file) {
				files = append(files, file)
			}
		}
	}
	return files, nil
}

// Machine is an emulated computer.
type Machine struct {
	Kernel    testenv.Kernel
	Initrd    string // file
	MemoryMiB int
	Append    string // to the kernel's command line
	Serial    string // QEMU's first -serial; "stdio" if it is empty
	Devices   []string
}

// CPU is QEMU's -cpu for its own emulation: all that it has, but for what makes it slower. What glibc
// and the kernel do with AVX and with fast strings is emulated byte for byte, and a fifth level of
// page tables is walked at each miss.
const CPU = "max,-avx,-avx2,-erms,-fsrm,-la57"

// Command is QEMU with the machine. There is a single processor: QEMU's emulation of code that one
// processor patches while another runs it makes 6.12 die of stray breakpoints.
func (m Machine) Command(ctx context.Context) (*exec.Cmd, error) {
	qemu, err := testenv.Tool("qemu-system-x86_64")
	if err != nil {
		return nil, err
	}
	// The kernel's check that the timer ticks counts the host's time: on a busy
	// host the guest runs too little of it, and panics. What the kernel does against
	// leaks of processors has none here, and makes emulated jumps slow.
	line := "console=ttyS0 quiet panic=-1 no_timer_check mitigations=off"
	if m.Append != "" {
		line += " " + m.Append
	}
	serial := m.Serial
	if serial == "" {
		serial = "stdio"
	}
	args := []string{
		"-accel", "tcg", "-cpu", CPU, "-smp", "1", "-m", strconv.Itoa(m.MemoryMiB),
		"-nodefaults", "-display", "none", "-serial", serial, "-no-reboot",
		"-kernel", m.Kernel.Image, "-initrd", m.Initrd, "-append", line,
	}
	return exec.CommandContext(ctx, qemu, append(args, m.Devices...)...), nil
}

// command is Machine.Command for an initramfs, which it writes into dir.
func command(ctx context.Context, in *initramfs, dir string, memoryMiB int, devices ...string) (*exec.Cmd, error) {
	archive := filepath.Join(dir, "initramfs")
	if err := in.writeFile(archive); err != nil {
		return nil, err
	}
	return Machine{Kernel: in.kernel, Initrd: archive, MemoryMiB: memoryMiB, Devices: devices}.Command(ctx)
}
