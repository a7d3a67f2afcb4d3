package lab

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// suite is the release of Debian in the image.
const suite = "bookworm"

// imagePackages are in the image, beside those that every Debian has.
var imagePackages = []string{
	"attr", "dbus", "iproute2", "kmod", "libnbd-bin", "nbd-client", "policycoreutils",
	"selinux-policy-default", "selinux-utils", "systemd-sysv", "udev",
}

// imageSize is what the file system can hold; the file has holes.
const imageSize = "1G"

// masked are units that only cost time in a guest that lives for seconds.
var masked = []string{
	"apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer",
	"e2scrub_reap.service", "fstrim.timer", "getty@.service", "kmod-static-nodes.service",
	"modprobe@configfs.service", "modprobe@dm_mod.service", "modprobe@drm.service",
	"modprobe@efi_pstore.service", "modprobe@fuse.service", "modprobe@loop.service",
	"proc-sys-fs-binfmt_misc.automount", "selinux-autorelabel.service", "systemd-logind.service",
	"systemd-pcrphase-sysinit.service", "systemd-pcrphase.service", "systemd-random-seed.service",
	"systemd-tmpfiles-clean.timer", "systemd-update-utmp.service", "systemd-update-utmp-runlevel.service",
	"systemd-user-sessions.service",
}

// imageFiles are written into the image. Root has no password and gets a shell
// on the first serial port.
var imageFiles = map[string]string{
	"etc/hostname":       "lab\n",
	"etc/fstab":          "/dev/vda / ext4 defaults 0 0\n",
	"etc/selinux/config": "SELINUX=enforcing\nSELINUXTYPE=default\n",
	"etc/systemd/system/serial-getty@ttyS0.service.d/lab.conf": "[Service]\nExecStart=\n" +
		"ExecStart=-/sbin/agetty --autologin root --noclear --keep-baud %I 115200 linux\n",
}

// tools are what an image is made with. All but mmdebstrap run for a second.
var tools = []string{"mmdebstrap", "mke2fs", "unshare", "tar"}

// unpacked is the archive of the installed packages, before anything of ours.
func unpacked(packages []string) (string, error) {
	dir, err := testenv.Cached("lab-debian-"+digest(suite, packages), func(ctx context.Context, dir string) error {
		if os.Getuid() != 0 {
			return errors.New("needs root: mmdebstrap installs packages in a folder of its own")
		}
		_, err := testenv.Command(ctx, dir, "mmdebstrap", "--variant=minbase", "--mode=root", "--quiet",
			`--aptopt=Acquire::Languages "none"`, "--dpkgopt=path-exclude=/usr/share/doc/*",
			"--dpkgopt=path-exclude=/usr/share/man/*", "--dpkgopt=path-exclude=/usr/share/locale/*",
			`--customize-hook=rm -rf "$1"/var/lib/apt/lists/* "$1"/var/cache/apt/*.bin`,
			"--include="+strings.Join(packages, ","), suite, "root.tar")
		return err
	})
	return filepath.Join(dir, "root.tar"), err
}

// build returns the path of the scenario's image: an ext4 file system with
// systemd and SELinux's default policy, every file labelled, and its packages
// and policy modules installed. It is made once for each set of them and
// cached; only making it needs root. Nobody writes to it: guests get it with
// QEMU's snapshot=on.
func (s *Scenario) build() (string, error) {
	modules, sum, err := readPolicy(s.Policy)
	if err != nil {
		return "", err
	}
	packages := slices.Concat(imagePackages, s.Packages)
	name := "lab-image-" + digest(recipe, suite, packages, masked, imageFiles, imageSize, sum)
	dir, err := testenv.Cached(name, func(ctx context.Context, dir string) error {
		for _, tool := range tools {
			if _, err := testenv.Tool(tool); err != nil {
				return err
			}
		}
		if os.Getuid() != 0 {
			return errors.New("needs root: the files of the image belong to root and have labels")
		}
		archive, err := unpacked(packages)
		if err != nil {
			return err
		}
		return makeImage(ctx, archive, dir, modules)
	})
	if err != nil {
		return "", err
	}
	forget(dir)
	return filepath.Join(dir, "root.ext4"), nil
}

// module is a policy module by the name that it has in the image.
type module struct {
	name string
	data []byte
}

// readPolicy reads the modules, in the order in which they are installed.
func readPolicy(files []string) (modules []module, sum string, err error) {
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			return nil, "", err
		}
		modules = append(modules, module{filepath.Base(file), data})
	}
	return modules, digest(modules), nil
}

// recipe is what makes an image of a tree, as root of namespaces of its own.
// Policy modules lie in /lab-policy.
const recipe = `
mount -t proc proc proc
if [ -d lab-policy ]; then
	chroot . sh -ec 'cd lab-policy; semodule -n -s default -i *'
	rm -r lab-policy
fi
chroot . /sbin/setfiles -F /etc/selinux/default/contexts/files/file_contexts /
umount proc
`

// unpack makes dir/tree, the root file system of a Debian.
func unpack(ctx context.Context, archive, dir string) (tree string, err error) {
	tree = filepath.Join(dir, "tree")
	if err := os.Mkdir(tree, 0o755); err != nil {
		return "", err
	}
	_, err = testenv.Command(ctx, tree, "tar", "--numeric-owner", "--exclude=./dev/*", "-xf", archive)
	return tree, err
}

// makeImage makes dir/root.ext4.
func makeImage(ctx context.Context, archive, dir string, modules []module) error {
	tree, err := unpack(ctx, archive, dir)
	if err != nil {
		return err
	}
	defer os.RemoveAll(tree)
	if err := finish(tree); err != nil {
		return err
	}
	for i, m := range modules {
		if err := put(tree, fmt.Sprintf("lab-policy/p%02d-%s", i, m.name), m.data); err != nil {
			return err
		}
	}
	if _, err := testenv.Command(ctx, tree, "unshare", "--mount", "sh", "-ec", recipe); err != nil {
		return err
	}
	_, err = testenv.Command(ctx, dir, "mke2fs", "-q", "-t", "ext4", "-L", "root", "-d", tree,
		"-E", "root_owner=0:0", "root.ext4", imageSize)
	return err
}

// finish writes into the tree what the packages leave open.
func finish(tree string) error {
	for name, text := range imageFiles {
		if err := put(tree, name, []byte(text)); err != nil {
			return err
		}
	}
	for _, unit := range masked {
		name := filepath.Join(tree, "etc/systemd/system", unit)
		if err := errors.Join(os.RemoveAll(name), os.Symlink("/dev/null", name)); err != nil {
			return err
		}
	}
	shadow := filepath.Join(tree, "etc/shadow")
	text, err := os.ReadFile(shadow)
	if err != nil {
		return err
	}
	open := bytes.Replace(text, []byte("\nroot:*:"), []byte("\nroot::"), 1)
	if bytes.Equal(open, text) {
		return errors.New("/etc/shadow has no root without a password")
	}
	return os.WriteFile(shadow, open, 0o640)
}

// put writes a file with its folders.
func put(tree, name string, data []byte) error {
	name = filepath.Join(tree, name)
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return err
	}
	return os.WriteFile(name, data, 0o644)
}

// digest is short and differs for what differs.
func digest(parts ...any) string {
	return fmt.Sprintf("%x", sha256.Sum256(fmt.Appendf(nil, "%q", parts)))[:16]
}

// forgetAfter is how long an image that nobody uses stays in the cache.
const forgetAfter = 7 * 24 * time.Hour

// forget marks the image as used and removes others that nobody has used for
// long: each change of a policy leaves one.
func forget(dir string) {
	now := time.Now()
	_ = os.Chtimes(dir, now, now)
	all, _ := filepath.Glob(filepath.Join(filepath.Dir(dir), "lab-image-*"))
	for _, old := range all {
		if st, err := os.Stat(old); err == nil && now.Sub(st.ModTime()) > forgetAfter {
			os.RemoveAll(old)
		}
	}
}

// image is build for a test. Without what making it needs, the test fails in
// CI; elsewhere it is skipped, and the missing thing named.
func (s *Scenario) image(t testing.TB) string {
	t.Helper()
	image, err := s.build()
	if err != nil {
		lacks(t, fmt.Errorf("image of the lab guest: %w", err))
	}
	return image
}

// lacks ends a test whose needs are not met.
func lacks(t testing.TB, err error) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatal(err)
	}
	t.Skip(err)
}
