package guest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// initramfs collects the first root file system of a guest: a static busybox,
// kernel modules in the order of their dependencies, programs of the host with
// their libraries, and a script that the first process runs.
type initramfs struct {
	kernel  testenv.Kernel
	dirs    []string            // in the order that the archive needs
	files   map[string]contents // by the path in the guest, without a leading slash
	modules []string            // below kernel.Modules, dependencies first
}

type contents struct {
	perm os.FileMode
	data []byte
}

// prelude begins the first process: it mounts the kernel's file systems and
// loads the modules.
const prelude = `#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs run /run
ip link set lo up
for m in /mods/*; do [ ! -e "$m" ] || insmod "$m" || echo "insmod $m fails"; done
`

// runScenario goes on after prelude: it reports the scenario's exit status on
// the console, on a line of its own, and powers the guest off.
const runScenario = `
sh -e /scenario.sh
printf '\nLAB-RC=%s\n' $?
poweroff -f
`

// newInitramfs returns one with busybox, the modules and the scenario, which
// becomes scenario.sh.
func newInitramfs(ctx context.Context, kernel testenv.Kernel, scenario string, modules ...string) (*initramfs, error) {
	in := &initramfs{kernel: kernel, files: map[string]contents{}}
	for _, dir := range []string{"dev", "proc", "sys", "run", "mnt", "tmp"} {
		in.addDir(dir)
	}
	if err := in.addModules(ctx, modules); err != nil {
		return nil, err
	}
	busybox, err := testenv.Tool("busybox")
	if err != nil {
		return nil, err
	}
	if err := in.copyFile(busybox, "bin/busybox"); err != nil {
		return nil, err
	}
	in.addFile("init", 0o755, []byte(prelude+runScenario))
	in.addFile("scenario.sh", 0o644, []byte(scenario))
	return in, nil
}

// addDir adds a folder with its parents.
func (in *initramfs) addDir(name string) {
	name = strings.Trim(name, "/")
	if name == "" || name == "." || slices.Contains(in.dirs, name) {
		return
	}
	in.addDir(path.Dir(name))
	in.dirs = append(in.dirs, name)
}

func (in *initramfs) addFile(name string, perm os.FileMode, data []byte) {
	name = strings.Trim(name, "/")
	in.addDir(path.Dir(name))
	in.files[name] = contents{perm, data}
}

// copyFile puts a file of the host under the given name.
func (in *initramfs) copyFile(from, to string) error {
	st, err := os.Stat(from)
	if err != nil {
		return err
	}
	data, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	in.addFile(to, st.Mode().Perm(), data)
	return nil
}

// library matches the path that ldd prints for each library.
var library = regexp.MustCompile(`(?m)(?:=> |^\s+)(/\S+) \(0x`)

// addPrograms copies programs of the host to the same paths in the guest, with
// the libraries that ldd names. Names without a slash are tools.
func (in *initramfs) addPrograms(ctx context.Context, names ...string) error {
	for _, name := range names {
		from, err := testenv.Tool(name)
		if err != nil {
			return err
		}
		if err := in.copyFile(from, from); err != nil {
			return err
		}
		// ldd fails for static programs, which need nothing.
		libs, _ := testenv.Command(ctx, "/", "ldd", from)
		for _, m := range library.FindAllStringSubmatch(libs, -1) {
			if err := in.copyFile(m[1], m[1]); err != nil {
				return err
			}
		}
	}
	return nil
}

// addModules puts the modules with all that they depend on into /mods, named
// so that their alphabetical order is the order of loading.
func (in *initramfs) addModules(ctx context.Context, names []string) error {
	files, err := ModuleFiles(in.kernel, names...)
	if err != nil {
		return err
	}
	for _, file := range files {
		if err := in.addModule(ctx, file); err != nil {
			return err
		}
	}
	return nil
}

// moduleLists are the texts of what depends on what, and of what the kernel
// contains.
func moduleLists(kernel testenv.Kernel) (deps, builtin string, err error) {
	d, err := os.ReadFile(filepath.Join(kernel.Modules, "modules.dep"))
	if err != nil {
		return "", "", err
	}
	b, err := os.ReadFile(filepath.Join(kernel.Modules, "modules.builtin"))
	return string(d), string(b), err
}

func (in *initramfs) addModule(ctx context.Context, file string) error {
	if slices.Contains(in.modules, file) {
		return nil
	}
	from := filepath.Join(in.kernel.Modules, file)
	data, err := os.ReadFile(from)
	if strings.HasSuffix(file, ".xz") && err == nil {
		var text string
		text, err = testenv.Command(ctx, "/", "xz", "-dc", from)
		data = []byte(text)
	}
	if err != nil {
		return err
	}
	name := strings.TrimSuffix(path.Base(file), ".xz")
	in.addFile(fmt.Sprintf("mods/%03d-%s", len(in.modules), name), 0o644, data)
	in.modules = append(in.modules, file)
	return nil
}

// loadOrder returns the files of a module and of its dependencies, to be
// loaded from first to last; nothing for a module that the kernel contains.
// modules.dep lists the dependencies of a module the other way round.
func loadOrder(deps, builtin, name string) ([]string, error) {
	for line := range strings.Lines(deps) {
		file, rest, ok := strings.Cut(strings.TrimSpace(line), ":")
		if !ok || moduleName(file) != name {
			continue
		}
		order := strings.Fields(rest)
		slices.Reverse(order)
		return append(order, file), nil
	}
	for line := range strings.Lines(builtin) {
		if moduleName(strings.TrimSpace(line)) == name {
			return nil, nil
		}
	}
	return nil, fmt.Errorf("the kernel has no module %q", name)
}

// moduleName is the name that lsmod shows for a file.
func moduleName(file string) string {
	name, _, _ := strings.Cut(path.Base(file), ".ko")
	return strings.ReplaceAll(name, "-", "_")
}

// writeTo writes the archive.
func (in *initramfs) writeTo(w io.Writer) error {
	c := &cpioWriter{w: w}
	for _, dir := range in.dirs {
		c.dir(dir)
	}
	// The kernel opens the console before the first process mounts /dev.
	c.char("dev/console", 5, 1)
	var names []string
	for name := range in.files {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		c.file(name, in.files[name].perm, in.files[name].data)
	}
	return c.Close()
}

// writeFile writes the archive into a file.
func (in *initramfs) writeFile(name string) error {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	return errors.Join(in.writeTo(f), f.Close())
}
