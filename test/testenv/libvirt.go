package testenv

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// Nobody is the user, and the group, that tests of root lend what must not be
// root's.
const Nobody = 65534

// Libvirt is a libvirtd of a test's own.
type Libvirt struct {
	Dir    string // with a short name; its QEMU can write there
	Socket string
	URI    string // for virsh
}

// StartLibvirt runs a libvirtd of an ordinary user until the test ends, with
// its files in a folder of its own, and the lines in its qemu.conf. Root lends it
// to Nobody: a libvirtd of root would be the system's.
func StartLibvirt(t testing.TB, conf ...string) *Libvirt {
	t.Helper()
	Require(t, "qemu-system-x86_64", "virsh")
	program := Path(t, "libvirtd")
	dir := filepath.Join(TempDir(t), "l")
	l := &Libvirt{Dir: dir, Socket: filepath.Join(dir, "run/libvirt/libvirt-sock")}
	l.URI = "qemu+unix:///session?socket=" + l.Socket
	cmd := exec.Command(program)
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=" + dir, "XDG_RUNTIME_DIR=" + dir + "/run", "XDG_CONFIG_HOME=" + dir + "/c", "XDG_CACHE_HOME=" + dir + "/k"}
	err := errors.Join(os.Chmod(filepath.Dir(dir), 0o755), os.Mkdir(dir, 0o755), os.Mkdir(dir+"/run", 0o700),
		os.MkdirAll(dir+"/c/libvirt", 0o755))
	if len(conf) > 0 { // libvirt takes no empty file
		err = errors.Join(err, os.WriteFile(dir+"/c/libvirt/qemu.conf", []byte(strings.Join(conf, "\n")+"\n"), 0o644))
	}
	if os.Getuid() == 0 {
		for _, name := range []string{"", "/run", "/c", "/c/libvirt"} {
			err = errors.Join(err, os.Chown(dir+name, Nobody, Nobody))
		}
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: Nobody, Gid: Nobody}}
	}
	if err != nil {
		t.Fatal(err)
	}
	startLibvirtd(t, cmd)
	if err := Await(Context(t), func() bool { _, err := os.Stat(l.Socket); return err == nil }); err != nil {
		t.Fatal(err)
	}
	return l
}

// startLibvirtd runs cmd until the test ends, and logs what it said if that
// failed.
func startLibvirtd(t testing.TB, cmd *exec.Cmd) {
	t.Helper()
	var said bytes.Buffer
	cmd.Stderr = &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if t.Failed() {
			t.Logf("libvirtd: %s", said.String())
		}
	})
}

// Virsh runs virsh, the witness that is not ours.
func (l *Libvirt) Virsh(t testing.TB, args ...string) string {
	t.Helper()
	return Run(t, append([]string{"virsh", "-c", l.URI}, args...)...)
}

// SystemQEMU is the user, and the group, that Debian's libvirt runs QEMU as.
const SystemQEMU = 64055

// systemLibvirt runs a libvirtd of root that sees nothing of the host's: its
// state and configuration are in memory, its users are Debian's, and there is
// no /dev/kvm, which libvirt would ask at every call where it is of no use.
const systemLibvirt = `
mount -t tmpfs tmpfs /run
{ cat /etc/passwd; echo 'libvirt-qemu:x:64055:64055::/:/usr/sbin/nologin'; } >/run/passwd
{ cat /etc/group; echo 'libvirt-qemu:x:64055:'; echo 'kvm:x:64056:libvirt-qemu'; } >/run/group
mount --bind /run/passwd /etc/passwd
mount --bind /run/group /etc/group
for d in /etc/libvirt /var/lib/libvirt /var/log/libvirt /var/cache/libvirt; do
	mkdir -p $d
	mount -t tmpfs tmpfs $d
done
[ ! -e /dev/kvm ] || mount --bind /dev/null /dev/kvm
printf '%s\n' 'namespaces = []' 'cgroup_controllers = []' 'security_driver = "none"' \
	'stdio_handler = "file"' 'remember_owner = 0' "$3" >/etc/libvirt/qemu.conf
[ -z "$2" ] || mount --bind "$2" /usr
"$1" &
wait $! # as the first process it takes in what QEMU leaves behind
`

// StartSystemLibvirt runs a libvirtd of the system's kind, which runs QEMU as
// another user, SystemQEMU. It takes root, and skips the test without.
func StartSystemLibvirt(t testing.TB) *Libvirt {
	t.Helper()
	return startSystemLibvirt(t, "", nil)
}

// StartNewerLibvirt is StartSystemLibvirt with libvirt 11 and QEMU 10 of Debian
// 13 in place of all of the host's /usr, and the lines in its qemu.conf.
func StartNewerLibvirt(t testing.TB, conf ...string) *Libvirt {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	d := trixie(t, "trixie-libvirt-1", "libvirt-daemon,libvirt-daemon-driver-qemu,qemu-system-x86")
	return startSystemLibvirt(t, filepath.Join(d.root, "usr"), conf)
}

// startSystemLibvirt takes the folder that stands for /usr, if not the host's.
func startSystemLibvirt(t testing.TB, usr string, conf []string) *Libvirt {
	t.Helper()
	Require(t, "qemu-system-x86_64", "virsh", "unshare")
	program := Path(t, "libvirtd")
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	cmd := exec.Command(Path(t, "unshare"), "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-euc", systemLibvirt, "sh", program, usr, strings.Join(conf, "\n"))
	startLibvirtd(t, cmd)
	l := &Libvirt{Dir: TempDir(t)}
	if err := os.Chown(l.Dir, SystemQEMU, SystemQEMU); err != nil {
		t.Fatal(err)
	}
	if err := Await(Context(t), func() bool {
		pid := cmd.Process.Pid
		children, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
		child := strings.TrimSpace(string(children))
		l.Socket = "/proc/" + child + "/root/run/libvirt/libvirt-sock"
		_, err := os.Stat(l.Socket)
		return err == nil && child != ""
	}); err != nil {
		t.Fatal(err)
	}
	l.URI = "qemu+unix:///system?socket=" + l.Socket
	return l
}
