package confine_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/confine"
)

// attackEnv makes the test binary be stage 0 of a worker that attacks.
const attackEnv = "CONFINE_TEST_ATTACK"

// attack is what the worker is told.
type attack struct {
	Name    string
	Service bool
	Parent  int
	TCP     string // address that somebody listens to
	Socket  string // abstract socket of somebody else
	Dir     string // folder that is not the worker's
}

// attackStage0 becomes the worker.
func attackStage0(word string) error {
	var a attack
	if err := json.Unmarshal([]byte(word), &a); err != nil {
		return err
	}
	p := &confine.Plan{Mode: confine.Auto, State: a, User: os.Getenv("CONFINE_TEST_USER")}
	return p.Exec()
}

// attackWorker closes the cage and attacks; it prints the error.
func attackWorker() error {
	h, err := confine.Inherit()
	if err != nil {
		return err
	}
	var a attack
	if err := json.Unmarshal(h.State, &a); err != nil {
		return err
	}
	for _, c := range h.Controls {
		if c.State == confine.Off && c.Name == confine.ControlLandlock {
			return errors.New("the kernel has no Landlock")
		}
	}
	if err := (confine.Filter{Service: a.Service}).Load(); err != nil {
		return err
	}
	if err := confine.SelfTest([]string{"/", "/proc"}); err != nil {
		return err
	}
	err = attacks[a.Name].do(&a)
	var e unix.Errno
	if errors.As(err, &e) {
		fmt.Print(unix.ErrnoName(e))
		return nil
	}
	fmt.Print(err)
	return nil
}

func open(path string, flags int) error {
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0o600)
	if err == nil {
		unix.Close(fd)
	}
	return err
}

// call makes a system call without arguments that matter.
func call(nr uintptr, args ...uintptr) error {
	args = append(args, 0, 0, 0, 0, 0, 0)
	_, _, e := unix.Syscall6(nr, args[0], args[1], args[2], args[3], args[4], args[5])
	if e != 0 {
		return e
	}
	return nil
}

func connect(family int, sa unix.Sockaddr) error {
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Connect(fd, sa)
}

func loopback(addr string) *unix.SockaddrInet4 {
	a, _ := net.ResolveTCPAddr("tcp4", addr)
	return &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}, Port: a.Port}
}

const killedBySeccomp = "killed"

// attacks are what an intruder would try, and how it ends.
var attacks = map[string]struct {
	service bool
	want    string
	do      func(*attack) error
}{
	"read /etc/shadow":         {false, "EACCES", func(*attack) error { return open("/etc/shadow", unix.O_RDONLY) }},
	"read /etc/passwd":         {false, "EACCES", func(*attack) error { return open("/etc/passwd", unix.O_RDONLY) }},
	"make a file":              {false, "EACCES", func(a *attack) error { return open(a.Dir+"/new", unix.O_WRONLY|unix.O_CREAT) }},
	"memory of itself":         {false, "EACCES", func(*attack) error { return open("/proc/self/mem", unix.O_RDWR) }},
	"remove a file":            {false, "EACCES", func(a *attack) error { return unix.Unlink(a.Dir + "/there") }},
	"execute a shell":          {false, killedBySeccomp, func(*attack) error { return syscall.Exec("/bin/sh", []string{"sh"}, nil) }},
	"execute itself":           {false, killedBySeccomp, func(*attack) error { return syscall.Exec(os.Args[0], os.Args, nil) }},
	"start a process":          {true, "EPERM", func(*attack) error { _, err := syscall.ForkExec("/bin/sh", []string{"sh"}, nil); return err }},
	"trace the parent":         {false, killedBySeccomp, func(a *attack) error { return syscall.PtraceAttach(a.Parent) }},
	"read the parent's memory": {false, killedBySeccomp, func(a *attack) error { return call(unix.SYS_PROCESS_VM_READV, uintptr(a.Parent)) }},
	"netlink":                  {true, "EPERM", func(*attack) error { _, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW, 0); return err }},
	"packets":                  {true, "EPERM", func(*attack) error { _, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0); return err }},
	"tcp socket of one disk":   {false, "EPERM", func(a *attack) error { return connect(unix.AF_INET, loopback(a.TCP)) }},
	"connect tcp":              {true, "EACCES", func(a *attack) error { return connect(unix.AF_INET, loopback(a.TCP)) }},
	"abstract socket":          {false, "EPERM", func(a *attack) error { return connect(unix.AF_UNIX, &unix.SockaddrUnix{Name: a.Socket}) }},
	"mount":                    {false, killedBySeccomp, func(a *attack) error { return unix.Mount("none", a.Dir, "tmpfs", 0, "") }},
	"another ring":             {false, killedBySeccomp, func(*attack) error { return call(unix.SYS_IO_URING_SETUP, 8) }},
	"kill the parent":          {false, "EPERM", func(a *attack) error { return unix.Kill(a.Parent, unix.SIGTERM) }},
	"kill all":                 {false, "EPERM", func(*attack) error { return unix.Kill(-1, unix.SIGTERM) }},
	"namespaces":               {false, killedBySeccomp, func(*attack) error { return unix.Unshare(unix.CLONE_NEWUSER) }},
	"root again":               {false, killedBySeccomp, func(*attack) error { return call(unix.SYS_SETUID, 0) }},
	"be traceable":             {false, "EPERM", func(*attack) error { return unix.Prctl(unix.PR_SET_DUMPABLE, 1, 0, 0, 0) }},
	"a filter of its own":      {false, "ENOSYS", func(*attack) error { return call(unix.SYS_SECCOMP, 1) }},
	"write to a terminal": {false, "EPERM", func(*attack) error {
		c := byte('x')
		return call(unix.SYS_IOCTL, 0, unix.TIOCSTI, uintptr(unsafe.Pointer(&c)))
	}},
	"open by handle": {false, killedBySeccomp, func(*attack) error { return call(unix.SYS_OPEN_BY_HANDLE_AT) }},
	"bpf":            {false, killedBySeccomp, func(*attack) error { return call(unix.SYS_BPF) }},
	"keys":           {false, killedBySeccomp, func(*attack) error { return call(unix.SYS_KEYCTL) }},
	"load a module":  {false, killedBySeccomp, func(*attack) error { return call(unix.SYS_FINIT_MODULE) }},
}

// TestAttacksOfTheWorkerFail has a worker do each of them.
func TestAttacksOfTheWorkerFail(t *testing.T) {
	tcp, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer tcp.Close()
	name := fmt.Sprintf("@vmdiskd-attack-%d", os.Getpid())
	abstract, err := net.Listen("unix", name)
	if err != nil {
		t.Fatal(err)
	}
	defer abstract.Close()
	dir := t.TempDir()
	there := filepath.Join(dir, "there")
	if err := os.WriteFile(there, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for what, x := range attacks {
		t.Run(what, func(t *testing.T) {
			a := attack{Name: what, Service: x.service, Parent: os.Getpid(), TCP: tcp.Addr().String(), Socket: name, Dir: dir}
			if got := runAttack(t, a); got != x.want {
				t.Errorf("got %q, want %q", got, x.want)
			}
		})
	}
	if _, err := os.Stat(there); err != nil {
		t.Error("a file was removed")
	}
}

// runAttack returns the error that the worker saw, or that it was killed.
func runAttack(t *testing.T, a attack) string {
	t.Helper()
	word, err := json.Marshal(a)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), attackEnv+"="+string(word))
	var out, msg strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &msg
	err = cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == unix.SIGSYS {
		return killedBySeccomp
	}
	if err != nil {
		t.Fatalf("%v: %s", err, msg.String())
	}
	return out.String()
}

// TestHandoverIsReadFromSealedMemoryOnly passes descriptors that are not it.
func TestHandoverIsReadFromSealedMemoryOnly(t *testing.T) {
	f, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fd, err := unix.MemfdCreate("open", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	for word, want := range map[string]string{
		"":                     "",
		"x":                    "is no descriptor",
		"2":                    "is no descriptor",
		"-1":                   "is no descriptor",
		"1048575":              "bad file descriptor",
		fmt.Sprint(f.Fd()):     "is no file in memory",
		fmt.Sprint(fd):         "is not sealed",
		"99999999999999999999": "is no descriptor",
	} {
		t.Setenv("VMDISKD_HANDOVER", word)
		h, err := confine.Inherit()
		if h != nil || (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, %v, want %q", word, h, err, want)
		}
		if os.Getenv("VMDISKD_HANDOVER") != "" {
			t.Errorf("%q: the variable stays", word)
		}
	}
}
