package testenv

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// fetchPatience bounds a download with its unpacking, on a machine that has
// much else to do.
const fetchPatience = 15 * time.Minute

// Cached returns .cache/name of the module, made by fill if it is not there.
// fill gets a folder of its own, which takes the name only when fill has
// succeeded; processes that want the same thing wait for each other. Whoever
// changes what fill makes changes the name.
func Cached(name string, fill func(ctx context.Context, dir string) error) (string, error) {
	cache := filepath.Join(Root(), ".cache")
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return "", err
	}
	lock, err := os.OpenFile(filepath.Join(cache, name+".lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return "", err
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		return "", err
	}
	final := filepath.Join(cache, name)
	if _, err := os.Stat(final); err == nil {
		return final, nil
	}
	tmp, err := os.MkdirTemp(cache, name+".new")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	ctx, cancel := context.WithTimeout(context.Background(), fetchPatience)
	defer cancel()
	if err := fill(ctx, tmp); err != nil {
		return "", fmt.Errorf("make %s: %w", name, err)
	}
	if err := os.Chmod(tmp, 0o755); err != nil {
		return "", err
	}
	return final, os.Rename(tmp, final)
}

// Command runs a program of the host in a folder and returns its standard
// output; the error holds its standard error.
func Command(ctx context.Context, dir, name string, args ...string) (string, error) {
	path, err := Tool(name)
	if err != nil {
		return "", err
	}
	return output(ctx, func(ctx context.Context, path string, args ...string) *exec.Cmd {
		cmd := exec.CommandContext(ctx, path, args...)
		cmd.Dir = dir
		// Whoever has children or mounts gets the time to end them.
		cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
		return cmd
	}, path, args)
}

// DebianTree is an unpacked set of Debian packages with the libraries that
// they need: newer tools beside those of the system, never installed.
type DebianTree struct {
	root string
}

// Trixie skips the test unless the named packages of Debian 13 are cached or
// can be fetched. They are of QEMU 10.0 and libnbd 1.22, which know extended
// headers.
func Trixie(t testing.TB) *DebianTree {
	t.Helper()
	return trixie(t, "trixie-1", "libnbd-bin,python3-libnbd,python3-minimal,qemu-utils")
}

// trixie is packages of Debian 13 with all that they need, cached under a name.
func trixie(t testing.TB, name, packages string) *DebianTree {
	t.Helper()
	Require(t, "mmdebstrap")
	root, err := Cached(name, func(ctx context.Context, dir string) error {
		_, err := Command(ctx, dir, "mmdebstrap", "--variant=extract", "--quiet",
			"--aptopt=Acquire::Languages \"none\"", "--dpkgopt=path-exclude=/usr/share/doc/*",
			"--include="+packages, "trixie", filepath.Join(dir, "root"))
		return err
	})
	if err != nil {
		t.Skipf("needs packages of Debian trixie (mmdebstrap and its mirror): %v", err)
	}
	return &DebianTree{filepath.Join(root, "root")}
}

// Argv returns the command line that runs one of the tree's programs with the
// tree's own loader and libraries.
func (d *DebianTree) Argv(program string, args ...string) []string {
	argv := []string{
		filepath.Join(d.root, "usr/lib64/ld-linux-x86-64.so.2"),
		"--library-path", filepath.Join(d.root, "usr/lib/x86_64-linux-gnu"),
		filepath.Join(d.root, "usr/bin", program),
	}
	return append(argv, args...)
}

// PythonArgv is Argv for the tree's Python, which has to be told where its
// modules are.
func (d *DebianTree) PythonArgv(args ...string) ([]string, error) {
	found, err := filepath.Glob(filepath.Join(d.root, "usr/bin/python3.[0-9]*"))
	if err != nil || len(found) == 0 {
		return nil, errors.Join(err, errors.New("the tree has no Python"))
	}
	env := []string{"/usr/bin/env", "PYTHONHOME=" + filepath.Join(d.root, "usr"),
		"PYTHONPATH=" + filepath.Join(d.root, "usr/lib/python3/dist-packages")}
	return append(env, d.Argv(filepath.Base(found[0]), args...)...), nil
}

// Kernel is an unpacked kernel package.
type Kernel struct {
	// Image is the bzImage; Modules the folder with modules.dep.
	Image, Modules string
}

// CloudKernel returns the kernel that a Debian meta package like
// linux-image-cloud-amd64 stands for now, fetched and unpacked without being
// installed. It skips the test when that cannot be done.
func CloudKernel(t testing.TB, meta string) Kernel {
	t.Helper()
	Require(t, "apt-get", "dpkg", "depmod")
	k, err := FetchKernel(meta)
	if err != nil {
		t.Skipf("needs the package that %s depends on: %v", meta, err)
	}
	return k
}

// FetchKernel is CloudKernel for those that are no test.
func FetchKernel(meta string) (Kernel, error) {
	dir, err := Cached(meta, func(ctx context.Context, dir string) error {
		return unpackKernel(ctx, dir, meta)
	})
	if err != nil {
		return Kernel{}, err
	}
	return findKernel(dir)
}

func unpackKernel(ctx context.Context, dir, meta string) error {
	pkg, err := kernelPackage(ctx, dir, meta)
	if err != nil {
		return err
	}
	download, err := os.MkdirTemp("", "vmdk")
	if err != nil {
		return err
	}
	defer os.RemoveAll(download)
	// apt's own sandbox user could not write into the folder.
	if _, err := Command(ctx, download, "apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", pkg); err != nil {
		return err
	}
	debs, err := filepath.Glob(filepath.Join(download, "*.deb"))
	if err != nil || len(debs) != 1 {
		return errors.Join(err, fmt.Errorf("%d packages instead of one", len(debs)))
	}
	if _, err := Command(ctx, dir, "dpkg", "-x", debs[0], dir); err != nil {
		return err
	}
	k, err := findKernel(dir)
	if err != nil {
		return err
	}
	_, err = Command(ctx, dir, "depmod", "-b", dir, filepath.Base(k.Modules))
	return err
}

// kernelPackage returns the package with the current ABI's name.
func kernelPackage(ctx context.Context, dir, meta string) (string, error) {
	out, err := Command(ctx, dir, "apt-cache", "depends", meta)
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(out) {
		if name, ok := strings.CutPrefix(strings.TrimSpace(line), "Depends: "); ok && strings.HasPrefix(name, "linux-image-") {
			return name, nil
		}
	}
	return "", fmt.Errorf("%s depends on no kernel", meta)
}

func findKernel(dir string) (Kernel, error) {
	images, err := filepath.Glob(filepath.Join(dir, "boot/vmlinuz-*"))
	if err != nil || len(images) != 1 {
		return Kernel{}, errors.Join(err, fmt.Errorf("%d kernels in %q", len(images), dir))
	}
	version := strings.TrimPrefix(filepath.Base(images[0]), "vmlinuz-")
	return Kernel{images[0], filepath.Join(dir, "lib/modules", version)}, nil
}
