package confine_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/confine"
	"github.com/vmdiskd/vmdiskd/internal/transport"
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
	Peer    string // in it, a Unix socket that somebody listens at
	Log     string // in it, a Unix socket that takes datagrams
	UDP     string // address that takes datagrams
	Probe   int    // descriptor that connect is allowed for
	Alone   bool   // the filter is all there is, as on a kernel without Landlock
	Collect bool   // stage 0 collects garbage all the time
}

// attackStage0 becomes the worker, or attacks by itself.
func attackStage0(word string) error {
	var a attack
	if err := json.Unmarshal([]byte(word), &a); err != nil {
		return err
	}
	if a.Alone {
		runtime.LockOSThread()
		if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
			return err
		}
		return a.run()
	}
	if a.Collect {
		go func() {
			for {
				runtime.GC()
			}
		}()
	}
	p := &confine.Plan{Mode: confine.Auto, State: a, User: os.Getenv("CONFINE_TEST_USER")}
	return p.Exec()
}

// attackWorker closes the cage and attacks.
func attackWorker() error {
	h, err := confine.Inherit()
	if err != nil {
		return err
	}
	var a attack
	if err := h.Take(&a); err != nil {
		return err
	}
	for _, c := range h.Controls {
		if c.State == confine.Off && c.Name == confine.ControlLandlock {
			return errors.New("the kernel has no Landlock")
		}
	}
	return a.run()
}

// run loads the filter and attacks; it prints the error.
func (a *attack) run() error {
	if a.Service {
		p, err := transport.NewProbe()
		if err != nil {
			return err
		}
		a.Probe = p.FD()
	}
	if err := (confine.Filter{Service: a.Service, Probe: a.Probe}).Load(); err != nil {
		return err
	}
	if !a.Alone {
		if err := confine.SelfTest([]string{"/", "/proc"}); err != nil {
			return err
		}
	}
	err := attacks[a.Name].do(a)
	var e unix.Errno
	if errors.As(err, &e) {
		fmt.Print(unix.ErrnoName(e))
		return nil
	}
	fmt.Print(err)
	return nil
}

// signalBy has the kernel send a signal to a process as soon as a pipe has data
// (fcntl(2), F_SETOWN): one that does nothing by default.
func signalBy(pid int) error {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		return err
	}
	for _, step := range [][2]int{{unix.F_SETOWN, pid}, {unix.F_SETSIG, int(unix.SIGWINCH)}, {unix.F_SETFL, unix.O_ASYNC}} {
		if _, err := unix.FcntlInt(uintptr(p[0]), step[0], step[1]); err != nil {
			return err
		}
	}
	_, err := unix.Write(p[1], []byte("x"))
	return err
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

func connect(family int, sa unix.Sockaddr) error { return connectBy(family, 0, sa) }

func connectBy(family, protocol int, sa unix.Sockaddr) error {
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, protocol)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Connect(fd, sa)
}

// send makes a socket and sends to an address without connecting.
func send(family, typ, flags int, sa unix.Sockaddr) error {
	fd, err := unix.Socket(family, typ|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Sendto(fd, []byte("leak"), flags, sa)
}

// sendMessage is send by sendmsg(2).
func sendMessage(family, typ, flags int, sa unix.Sockaddr) error {
	fd, err := unix.Socket(family, typ|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Sendmsg(fd, []byte("leak"), nil, sa, flags)
}

func loopback(addr string) *unix.SockaddrInet4 {
	a, _ := net.ResolveTCPAddr("tcp4", addr)
	return &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}, Port: a.Port}
}

func at(path string) *unix.SockaddrUnix { return &unix.SockaddrUnix{Name: path} }

const killedBySeccomp = "killed"

// attacks are what an intruder would try, and how it ends.
var attacks = map[string]struct {
	service bool
	want    string
	do      func(*attack) error
}{
	"read /etc/shadow":          {false, "EACCES", func(*attack) error { return open("/etc/shadow", unix.O_RDONLY) }},
	"read /etc/passwd":          {false, "EACCES", func(*attack) error { return open("/etc/passwd", unix.O_RDONLY) }},
	"make a file":               {false, "EACCES", func(a *attack) error { return open(a.Dir+"/new", unix.O_WRONLY|unix.O_CREAT) }},
	"memory of itself":          {false, "EACCES", func(*attack) error { return open("/proc/self/mem", unix.O_RDWR) }},
	"remove a file":             {false, "EACCES", func(a *attack) error { return unix.Unlink(a.Dir + "/there") }},
	"change the mode of a file": {true, "ENOSYS", func(a *attack) error { return unix.Fchmodat(unix.AT_FDCWD, a.Dir+"/there", 0o666, 0) }},
	"change it by chmod":        {true, "ENOSYS", func(a *attack) error { return unix.Chmod(a.Dir+"/there", 0o666) }},
	"execute a shell":           {false, killedBySeccomp, func(*attack) error { return syscall.Exec("/bin/sh", []string{"sh"}, nil) }},
	"execute itself":            {false, killedBySeccomp, func(*attack) error { return syscall.Exec(os.Args[0], os.Args, nil) }},
	"start a process":           {true, "EPERM", func(*attack) error { _, err := syscall.ForkExec("/bin/sh", []string{"sh"}, nil); return err }},
	"trace the parent":          {false, killedBySeccomp, func(a *attack) error { return syscall.PtraceAttach(a.Parent) }},
	"read the parent's memory":  {false, killedBySeccomp, func(a *attack) error { return call(unix.SYS_PROCESS_VM_READV, uintptr(a.Parent)) }},
	"netlink":                   {true, "EPERM", func(*attack) error { _, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW, 0); return err }},
	"packets":                   {true, "EPERM", func(*attack) error { _, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0); return err }},
	"tcp socket of one disk":    {false, "EPERM", func(a *attack) error { return connect(unix.AF_INET, loopback(a.TCP)) }},
	"connect tcp":               {true, "EPERM", func(a *attack) error { return connect(unix.AF_INET, loopback(a.TCP)) }},
	"connect mptcp":             {true, "EPERM", func(a *attack) error { return connectBy(unix.AF_INET, unix.IPPROTO_MPTCP, loopback(a.TCP)) }},
	"tcp fast open": {true, "EPERM", func(a *attack) error {
		return send(unix.AF_INET, unix.SOCK_STREAM, unix.MSG_FASTOPEN, loopback(a.TCP))
	}},
	"tcp fast open by sendmsg": {true, "EPERM", func(a *attack) error {
		return sendMessage(unix.AF_INET, unix.SOCK_STREAM, unix.MSG_FASTOPEN, loopback(a.TCP))
	}},
	"udp": {true, "EPERM", func(a *attack) error { return send(unix.AF_INET, unix.SOCK_DGRAM, 0, loopback(a.UDP)) }},
	"vsock": {true, "EPERM", func(*attack) error {
		return connect(unix.AF_VSOCK, &unix.SockaddrVM{CID: unix.VMADDR_CID_HOST, Port: 22})
	}},
	"vsock datagram":        {true, "EPERM", func(*attack) error { _, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_DGRAM, 0); return err }},
	"abstract socket":       {true, "EPERM", func(a *attack) error { return connect(unix.AF_UNIX, at(a.Socket)) }},
	"socket of another":     {true, "EPERM", func(a *attack) error { return connect(unix.AF_UNIX, at(a.Peer)) }},
	"the same for one disk": {false, "EPERM", func(a *attack) error { return connect(unix.AF_UNIX, at(a.Peer)) }},
	"datagram to a path":    {true, "EPERM", func(a *attack) error { return send(unix.AF_UNIX, unix.SOCK_DGRAM, 0, at(a.Log)) }},
	"message to a path":     {true, "EPERM", func(a *attack) error { return sendMessage(unix.AF_UNIX, unix.SOCK_DGRAM, 0, at(a.Log)) }},
	"connect the probe":     {true, "EISCONN", func(a *attack) error { return unix.Connect(a.Probe, at(a.Peer)) }},
	"disconnect the probe": {true, "EINVAL", func(a *attack) error {
		unspec := [16]byte{unix.AF_UNSPEC}
		return call(unix.SYS_CONNECT, uintptr(a.Probe), uintptr(unsafe.Pointer(&unspec)), 16)
	}},
	"close the probe":            {true, "EPERM", func(a *attack) error { return unix.Close(a.Probe) }},
	"close it by another number": {true, "EPERM", func(a *attack) error { return call(unix.SYS_CLOSE, uintptr(a.Probe)|1<<32) }},
	"put a socket in its place":  {true, "EPERM", func(a *attack) error { return unix.Dup3(0, a.Probe, 0) }},
	"put it by another number":   {true, "EPERM", func(a *attack) error { return call(unix.SYS_DUP3, 0, uintptr(a.Probe)|1<<32) }},
	"connect a duplicate": {true, "EPERM", func(a *attack) error {
		fd, err := unix.Dup(a.Probe)
		if err != nil {
			return err
		}
		return unix.Connect(fd, at(a.Peer))
	}},
	"mount":            {false, killedBySeccomp, func(a *attack) error { return unix.Mount("none", a.Dir, "tmpfs", 0, "") }},
	"another ring":     {false, killedBySeccomp, func(*attack) error { return call(unix.SYS_IO_URING_SETUP, 8) }},
	"kill the parent":  {false, "EPERM", func(a *attack) error { return unix.Kill(a.Parent, unix.SIGTERM) }},
	"kill all":         {false, "EPERM", func(*attack) error { return unix.Kill(-1, unix.SIGTERM) }},
	"signal by a pipe": {false, "EPERM", func(a *attack) error { return signalBy(a.Parent) }},
	"signal by a socket": {true, "EPERM", func(a *attack) error {
		return call(unix.SYS_IOCTL, uintptr(a.Probe), unix.SIOCSPGRP, uintptr(unsafe.Pointer(&a.Parent)))
	}},
	"namespaces":          {false, killedBySeccomp, func(*attack) error { return unix.Unshare(unix.CLONE_NEWUSER) }},
	"root again":          {false, killedBySeccomp, func(*attack) error { return call(unix.SYS_SETUID, 0) }},
	"be traceable":        {false, "EPERM", func(*attack) error { return unix.Prctl(unix.PR_SET_DUMPABLE, 1, 0, 0, 0) }},
	"a filter of its own": {false, "ENOSYS", func(*attack) error { return call(unix.SYS_SECCOMP, 1) }},
	"write to a terminal": {false, "EPERM", func(*attack) error {
		c := byte('x')
		return call(unix.SYS_IOCTL, 0, unix.TIOCSTI, uintptr(unsafe.Pointer(&c)))
	}},
	"open by handle": {false, killedBySeccomp, func(*attack) error { return call(unix.SYS_OPEN_BY_HANDLE_AT) }},
	"bpf":            {false, killedBySeccomp, func(*attack) error { return call(unix.SYS_BPF) }},
	"keys":           {false, killedBySeccomp, func(*attack) error { return call(unix.SYS_KEYCTL) }},
	"load a module":  {false, killedBySeccomp, func(*attack) error { return call(unix.SYS_FINIT_MODULE) }},
}

// TestAttacksOfTheWorkerFail has a worker do each of them, and by the filter
// alone those that are not about files: a kernel may have less of Landlock.
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
	dir, err := os.MkdirTemp("", "attack")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	peer, log := filepath.Join(dir, "peer"), filepath.Join(dir, "log")
	stream, err := net.Listen("unix", peer)
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	datagrams, err := net.ListenPacket("unixgram", log)
	if err != nil {
		t.Fatal(err)
	}
	defer datagrams.Close()
	udp, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer udp.Close()
	there := filepath.Join(dir, "there")
	if err := os.WriteFile(there, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for what, x := range attacks {
		t.Run(what, func(t *testing.T) {
			a := attack{Name: what, Service: x.service, Parent: os.Getpid(), TCP: tcp.Addr().String(), Socket: name, Dir: dir,
				Peer: peer, Log: log, UDP: udp.LocalAddr().String()}
			if got := runAttack(t, a); got != x.want {
				t.Errorf("got %q, want %q", got, x.want)
			}
			if x.want == "EACCES" { // Landlock's
				return
			}
			a.Alone = true
			if got := runAttack(t, a); got != x.want {
				t.Errorf("with the filter alone: got %q, want %q", got, x.want)
			}
		})
	}
	if fi, err := os.Stat(there); err != nil || fi.Mode() != 0o600 {
		t.Errorf("the file of somebody else: %v, %v", fi, err)
	}
}

// TestCollectorTakesNothingFromTheWorker: what stage 0 hands over stays open until the
// exec, also if that takes long, for many arguments.
func TestCollectorTakesNothingFromTheWorker(t *testing.T) {
	a := attack{Name: "be traceable", Collect: true}
	for range 3 {
		if got, want := runAttack(t, a, slices.Repeat([]string{"x"}, 120_000)...), attacks[a.Name].want; got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

// runAttack returns the error that the worker saw, or that it was killed.
func runAttack(t *testing.T, a attack, args ...string) string {
	t.Helper()
	word, err := json.Marshal(a)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0], args...)
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
