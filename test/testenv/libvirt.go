package testenv

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
)

// Nobody is the user, and the group, that tests of root lend what must not be
// root's.
const Nobody = 65534

// Libvirt is a libvirtd of a test's own, without privileges.
type Libvirt struct {
	Dir    string // of its files, with a short name; its QEMU can write there
	Socket string
	URI    string // for virsh
}

// StartLibvirt runs a libvirtd of an ordinary user until the test ends, with
// its files in a folder of its own. Root lends it to Nobody: a libvirtd of root
// would be the system's.
func StartLibvirt(t testing.TB) *Libvirt {
	t.Helper()
	Require(t, "qemu-system-x86_64", "virsh")
	program := Path(t, "libvirtd")
	dir := filepath.Join(TempDir(t), "l")
	l := &Libvirt{Dir: dir, Socket: filepath.Join(dir, "run/libvirt/libvirt-sock")}
	l.URI = "qemu+unix:///session?socket=" + l.Socket
	cmd := exec.Command(program)
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=" + dir, "XDG_RUNTIME_DIR=" + dir + "/run", "XDG_CONFIG_HOME=" + dir + "/c", "XDG_CACHE_HOME=" + dir + "/k"}
	err := errors.Join(os.Chmod(filepath.Dir(dir), 0o755), os.Mkdir(dir, 0o755), os.Mkdir(dir+"/run", 0o700))
	if os.Getuid() == 0 {
		err = errors.Join(err, os.Chown(dir, Nobody, Nobody), os.Chown(dir+"/run", Nobody, Nobody))
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: Nobody, Gid: Nobody}}
	}
	var said bytes.Buffer
	cmd.Stderr = &said
	if err := errors.Join(err, cmd.Start()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if t.Failed() {
			t.Logf("libvirtd: %s", said.String())
		}
	})
	if err := Await(Context(t), func() bool { _, err := os.Stat(l.Socket); return err == nil }); err != nil {
		t.Fatal(err)
	}
	return l
}

// Virsh runs virsh, the witness that is not ours.
func (l *Libvirt) Virsh(t testing.TB, args ...string) string {
	t.Helper()
	return Run(t, append([]string{"virsh", "-c", l.URI}, args...)...)
}
