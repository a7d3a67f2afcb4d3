package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	seccomp "github.com/elastic/go-seccomp-bpf"
	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
	control "github.com/vmdiskd/vmdiskd/internal/control/client"
	nbdclient "github.com/vmdiskd/vmdiskd/internal/nbd/client"
	"github.com/vmdiskd/vmdiskd/internal/transport"
	"github.com/vmdiskd/vmdiskd/internal/transport/transporttest"
)

// forbid names system calls, separated by commas, that the test binary forbids
// before it is vmdiskd, as the filters of containers do. NAME:N is a call whose
// first argument is N, and stands alone.
const forbid = "VMDISKD_TEST_FORBID"

func forbidCalls(names string) error {
	g := seccomp.SyscallGroup{Action: seccomp.ActionErrno, Names: strings.Split(names, ",")}
	if name, arg, ok := strings.Cut(names, ":"); ok {
		n, err := strconv.ParseUint(arg, 10, 64)
		if err != nil {
			return err
		}
		g.Names, g.NamesWithCondtions = nil, []seccomp.NameWithConditions{{Name: name, Conditions: seccomp.ArgumentConditions{
			{Argument: 0, Operation: seccomp.Equal, Value: n}}}}
	}
	return seccomp.LoadFilter(seccomp.Filter{NoNewPrivs: true, Flag: seccomp.FilterFlagTSync,
		Policy: seccomp.Policy{DefaultAction: seccomp.ActionAllow, Syscalls: []seccomp.SyscallGroup{g}}})
}

// fails runs the program, which must end with status 1 and say what.
func fails(t *testing.T, cmd *exec.Cmd, what string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), hangLimit)
	defer cancel()
	again := exec.CommandContext(ctx, cmd.Path, cmd.Args[1:]...)
	again.Env, again.SysProcAttr, again.ExtraFiles = cmd.Env, cmd.SysProcAttr, cmd.ExtraFiles
	out, err := again.CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 1 || !strings.Contains(string(out), what) {
		t.Errorf("%q: %v, %q; want status 1 and %q", cmd.Args[1:], err, out, what)
	}
}

// statusOf are fields of each thread of a process.
func (d *daemonProcess) statusOf() []map[string]string {
	d.t.Helper()
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", d.cmd.Process.Pid))
	if err != nil || len(tasks) == 0 {
		d.t.Fatalf("no threads: %v", err)
	}
	var all []map[string]string
	for _, path := range tasks {
		b, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended
		}
		m := map[string]string{}
		for line := range strings.Lines(string(b)) {
			k, v, _ := strings.Cut(line, ":")
			m[k] = strings.Join(strings.Fields(v), " ")
		}
		all = append(all, m)
	}
	return all
}

// userImage is an image that only root can read, in a folder that only root
// can enter.
func userImage(t *testing.T) string {
	t.Helper()
	needRoot(t)
	return image(t, 1<<20)
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
}

// TestEveryThreadOfTheWorkerIsConfined, under load that starts some.
func TestEveryThreadOfTheWorkerIsConfined(t *testing.T) {
	for _, engine := range []string{"uring", "pool"} {
		d := serve(t, "--confine=strict", "-u", "nobody", "--engine="+engine, userImage(t))
		for range 8 {
			d.dial().works()
		}
		for _, m := range d.statusOf() {
			for k, want := range map[string]string{
				"Uid": "65534 65534 65534 65534", "Gid": "65534 65534 65534 65534", "Groups": "",
				"CapInh": "0000000000000000", "CapPrm": "0000000000000000", "CapEff": "0000000000000000",
				"CapBnd": "0000000000000000", "CapAmb": "0000000000000000", "NoNewPrivs": "1", "Seccomp": "2",
			} {
				if m[k] != want {
					t.Errorf("%s: thread %s has %s %q, want %q", engine, m["Pid"], k, m[k], want)
				}
			}
		}
		d.signal(unix.SIGTERM)
		if status := d.wait(); status != 0 {
			t.Errorf("status %d: %s", status, d.stderr.String())
		}
	}
}

func TestStrictRefusesRootAndAutoWarns(t *testing.T) {
	disk := userImage(t)
	fails(t, program("--confine=strict", "-U", filepath.Join(shortDir(t), "s"), disk), "user is off: it runs as root")
	d := serve(t, "--confine=auto", disk)
	d.dial().works()
	d.signal(unix.SIGTERM)
	d.wait()
	if said := d.stderr.String(); !strings.Contains(said, "control=user state=off") {
		t.Errorf("log %q", said)
	}
}

// TestConfineOffChangesNothing: the process has what its caller has.
func TestConfineOffChangesNothing(t *testing.T) {
	d := serve(t, "--confine=off", image(t, 1<<20))
	d.dial().works()
	for _, m := range d.statusOf() {
		if m["Seccomp"] != "0" || m["NoNewPrivs"] != "0" {
			t.Errorf("thread %s: seccomp %s, no_new_privs %s", m["Pid"], m["Seccomp"], m["NoNewPrivs"])
		}
	}
}

// TestWorkerHasNothingOpenThatItDoesNotUse looks at all descriptors, of which
// the caller has left some.
func TestWorkerHasNothingOpenThatItDoesNotUse(t *testing.T) {
	dir, err := os.Open("/")
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	disk := image(t, 1<<20)
	socket := filepath.Join(shortDir(t), "s")
	cmd := program("--print-uri", "-U", socket, "--cache=none", "-r", disk)
	cmd.ExtraFiles = []*os.File{dir}
	d := start(t, cmd, socket)
	d.dial().works()
	known := regexp.MustCompile(`^(socket:.*|pipe:.*|anon_inode:\[(eventpoll|eventfd|io_uring)\]|/dev/null|` +
		regexp.QuoteMeta(disk) + `|` + regexp.QuoteMeta(socket) + `)$`)
	links, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", cmd.Process.Pid))
	if err != nil || len(links) < 5 {
		t.Fatalf("descriptors: %v, %v", links, err)
	}
	for _, link := range links {
		to, err := os.Readlink(link)
		if err == nil && !known.MatchString(to) {
			t.Errorf("%s is %s", link, to)
		}
		info, err := os.ReadFile(strings.Replace(link, "/fd/", "/fdinfo/", 1))
		if err == nil && to == disk {
			if m := accessMode(t, info); m != unix.O_RDONLY {
				t.Errorf("the image is open with mode %#o", m)
			}
		}
	}
}

// start is serve for a command that was made elsewhere.
func start(t *testing.T, cmd *exec.Cmd, socket string) *daemonProcess {
	t.Helper()
	d := &daemonProcess{t: t, cmd: cmd, socket: socket, ended: make(chan error, 1)}
	cmd.Stderr = &d.stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { d.ended <- cmd.Wait() }()
	t.Cleanup(func() {
		cmd.Process.Kill()
		<-d.ended
	})
	for until := time.Now().Add(hangLimit); ; {
		c, err := net.Dial("unix", socket)
		if err == nil {
			defer c.Close()
			// The greeting comes from the worker.
			if _, err := c.Read(make([]byte, 1)); err == nil {
				return d
			}
		}
		if time.Now().After(until) {
			t.Fatalf("server does not answer: %s", d.stderr.String())
		}
	}
}

// TestWorkerHasThePathsOfStage0, whatever bytes are in them: it has the image of one that
// it may not open itself, and removes the socket at the end.
func TestWorkerHasThePathsOfStage0(t *testing.T) {
	disk := userImage(t)
	odd := filepath.Join(filepath.Dir(disk), "z\xff.img")
	dir := shortDir(t)
	socket := filepath.Join(dir, "u\xfe.sock")
	if err := errors.Join(os.Rename(disk, odd), os.Chown(dir, 65534, 65534)); err != nil {
		t.Fatal(err)
	}
	d := start(t, program("-u", "nobody", "-U", socket, odd), socket)
	d.dial().works()
	d.signal(unix.SIGTERM)
	if status := d.wait(); status != 0 {
		t.Errorf("status %d: %s", status, d.stderr.String())
	}
	if exists(socket) {
		t.Error("the socket is still there")
	}
}

// TestSwappedPathsLeadNowhere exchanges image and socket for links meanwhile.
func TestSwappedPathsLeadNowhere(t *testing.T) {
	outside := filepath.Join(shortDir(t), "outside")
	secret := bytes.Repeat([]byte("secret"), 1<<17)
	if err := os.WriteFile(outside, secret, 0o600); err != nil {
		t.Fatal(err)
	}
	s := newService(t, "")
	path, link := filepath.Join(s.dir, "c.img"), filepath.Join(s.dir, "link")
	if err := os.Symlink(outside, link); err != nil {
		t.Fatal(err)
	}
	stop, done := make(chan bool), make(chan bool)
	go func() {
		defer close(done)
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			next := filepath.Join(s.dir, "next")
			_ = os.Remove(next)
			if i%2 == 0 {
				_ = os.Symlink(outside, next)
			} else {
				_ = os.WriteFile(next, make([]byte, 4096), 0o600)
			}
			_ = os.Rename(next, path)
		}
	}()
	opened := 0
	for i := range 50 {
		x := api.AddExport{}
		x.Name, x.Image, x.Format = fmt.Sprint("race", i), path, "raw"
		got, err := s.ctl.Add(t.Context(), x)
		if err == nil {
			opened++
			if got.Size == int64(len(secret)) {
				t.Fatal("a file outside of the roots is served")
			}
		}
	}
	close(stop)
	<-done
	if b, err := os.ReadFile(outside); err != nil || !bytes.Equal(b, secret) {
		t.Errorf("the file outside was touched: %v", err)
	}
	t.Logf("%d of 50 opens met the file", opened)
	fails(t, program("-U", link, image(t, 1<<20)), "a symbolic link is in the way")
}

// TestKindsOfFilesThatAreNoImages is quick to refuse each.
func TestKindsOfFilesThatAreNoImages(t *testing.T) {
	dir := shortDir(t)
	dangling, socket := filepath.Join(dir, "dangling"), filepath.Join(dir, "socket")
	if err := os.Symlink(filepath.Join(dir, "nothing"), dangling); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for _, path := range []string{"/dev/zero", "/dev/full", "/proc/self/mem", "/proc/self/environ", dangling, socket} {
		fails(t, program("-U", "-", path), path)
	}
}

// TestFilterThatForbidsRingsIsNoObstacle is how containers are.
func TestFilterThatForbidsRingsIsNoObstacle(t *testing.T) {
	t.Setenv(forbid, "io_uring_setup")
	disk := userImage(t)
	d := serve(t, "--confine=strict", "-u", "nobody", disk)
	d.dial().works()
	d.signal(unix.SIGTERM)
	if status := d.wait(); status != 0 {
		t.Errorf("status %d", status)
	}
	if said := d.stderr.String(); !strings.Contains(said, "engine is pool") || !strings.Contains(said, "operation not permitted") {
		t.Errorf("log %q", said)
	}
	fails(t, program("--engine=uring", "-U", "-", disk), "operation not permitted")
}

// TestMissingControlsAreRefusedOrTold is a kernel, or a container, that lacks
// one.
func TestMissingControlsAreRefusedOrTold(t *testing.T) {
	disk := userImage(t)
	for _, x := range []struct{ call, strict, auto string }{
		{"landlock_create_ruleset", "landlock is off", "control=landlock state=off"},
		{"seccomp", "seccomp is off", "control=seccomp state=off"},
		{"memfd_create", "memfd_create: operation not permitted", `msg="not confined"`},
	} {
		t.Setenv(forbid, x.call)
		fails(t, program("--confine=strict", "-u", "nobody", "-U", "-", disk), x.strict)
		d := serve(t, "--confine=auto", "-u", "nobody", disk)
		d.dial().works()
		d.signal(unix.SIGTERM)
		if status := d.wait(); status != 0 {
			t.Errorf("status %d", status)
		}
		if said := d.stderr.String(); !strings.Contains(said, x.auto) {
			t.Errorf("log %q", said)
		}
	}
}

// TestServiceIsNotReadyWhenItsSelfTestFails: a filter that hides whether
// no_new_privs is set takes nothing away but what the self-test looks at.
func TestServiceIsNotReadyWhenItsSelfTestFails(t *testing.T) {
	dir := shortDir(t)
	notify, socket := filepath.Join(dir, "notify"), filepath.Join(dir, "s")
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: notify, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	t.Setenv("NOTIFY_SOCKET", notify)
	disk := image(t, 1<<20)
	t.Setenv(forbid, fmt.Sprintf("prctl:%d", unix.PR_GET_NO_NEW_PRIVS))
	fails(t, program("-U", socket, disk), "self-test: no_new_privs is 0, operation not permitted")
	if exists(socket) {
		t.Error("its socket is still there")
	}
	// What the daemon has sent is read before what is sent after its end.
	if to, err := net.Dial("unixgram", notify); err != nil {
		t.Fatal(err)
	} else if _, err := to.Write([]byte("over")); err != nil {
		t.Fatal(err)
	} else if err := to.Close(); err != nil {
		t.Fatal(err)
	}
	for b, told := make([]byte, 4096), ""; told != "over"; {
		n, err := c.Read(b)
		if err != nil {
			t.Fatal(err)
		}
		if told = string(b[:n]); strings.Contains(told, "READY=1") {
			t.Errorf("the service manager was told %q", told)
		}
	}
}

// TestNothingOfAFailedExportStaysOpen: its image was opened before its listener
// could not be.
func TestNothingOfAFailedExportStaysOpen(t *testing.T) {
	taken := filepath.Join(t.TempDir(), "taken")
	l, err := net.Listen("unix", taken)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	s := newService(t, `
[[export]]
name = "a"
image = "DIR/a.img"
[[export.listener]]
uri = "nbd+unix:///?socket=DIR/own"
[[export.listener]]
uri = "nbd+unix:///?socket=`+taken+`"
`)
	if got := s.states(); len(got) != 1 || !strings.Contains(got[0], "failed") {
		t.Fatalf("states %q", got)
	}
	links, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", s.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, link := range links {
		if to, err := os.Readlink(link); err == nil && (strings.HasSuffix(to, "a.img") || strings.HasSuffix(to, "own")) {
			t.Errorf("%s is open", to)
		}
	}
	if exists(filepath.Join(s.dir, "own")) {
		t.Error("its socket is still there")
	}
}

// TestStopIsNeverLost sends SIGTERM at moments around the exec.
func TestStopIsNeverLost(t *testing.T) {
	disk := image(t, 1<<20)
	for i := range 24 {
		socket := filepath.Join(shortDir(t), "s")
		cmd := program("-U", socket, disk)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() { ended <- cmd.Wait() }()
		timer := time.NewTimer(time.Duration(i) * time.Millisecond)
		<-timer.C
		if err := cmd.Process.Signal(unix.SIGTERM); err != nil {
			t.Fatal(err)
		}
		select {
		case <-ended:
		case <-time.After(hangLimit):
			cmd.Process.Kill()
			t.Fatalf("a signal after %d ms was lost", i)
		}
		ws := cmd.ProcessState.Sys().(syscall.WaitStatus)
		if ws.ExitStatus() != 0 && ws.Signal() != unix.SIGTERM {
			t.Errorf("after %d ms: %v", i, cmd.ProcessState)
		}
	}
}

// tracer attaches to a process by number and prints the errno.
const tracer = `import ctypes, sys
libc = ctypes.CDLL(None, use_errno=True)
print(libc.ptrace(16, int(sys.argv[1]), 0, 0), ctypes.get_errno())
try:
    open("/proc/%s/mem" % sys.argv[1], "rb")
    print("opened")
except OSError as e:
    print(e.errno)`

// TestItsOwnUserCannotLookInside dumps a core, and attaches as the same user.
func TestItsOwnUserCannotLookInside(t *testing.T) {
	d := serve(t, "-u", "nobody", userImage(t))
	cmd := exec.Command("/usr/bin/python3", "-c", tracer, fmt.Sprint(d.cmd.Process.Pid))
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := cmd.CombinedOutput()
	if want := fmt.Sprintf("-1 %d\n%d\n", unix.EPERM, unix.EACCES); err != nil || string(out) != want {
		t.Errorf("attach: %v, %q, want %q", err, out, want)
	}
	limits, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", d.cmd.Process.Pid))
	if err != nil || !regexp.MustCompile(`(?m)^Max core file size +0 +0 `).Match(limits) {
		t.Errorf("limits: %v\n%s", err, limits)
	}
	d.signal(unix.SIGSEGV)
	d.wait()
	if d.cmd.ProcessState.Sys().(syscall.WaitStatus).CoreDump() {
		t.Error("a core was dumped")
	}
}

// asker sends a request for the status over a control socket.
const asker = `import socket, sys
s = socket.socket(socket.AF_UNIX)
s.connect(sys.argv[1])
s.sendall(b"GET /v1/status HTTP/1.0\r\nHost: localhost\r\n\r\n")
print(s.recv(12).decode())`

// TestItsOwnUserMayUseTheControlSocket, confined or not.
func TestItsOwnUserMayUseTheControlSocket(t *testing.T) {
	for _, confine := range []string{"auto", "off"} {
		disk, dir := userImage(t), shortDir(t)
		conf, socket := filepath.Join(dir, "conf"), filepath.Join(dir, "control")
		text := fmt.Sprintf("[control]\nsocket = %q\nmode = \"0666\"\n[[listener]]\nuri = \"nbd+unix:///?socket=%s/s\"\n[[export]]\nname = \"x\"\nimage = %q\n", socket, dir, disk)
		if err := errors.Join(os.Chmod(dir, 0o755), os.WriteFile(conf, []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
		cmd := program("--config", conf, "--confine="+confine, "--user=1")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		ctl := control.Dial(socket)
		for start := time.Now(); ; time.Sleep(10 * time.Millisecond) {
			if _, err := ctl.Status(t.Context()); err == nil {
				break
			} else if time.Since(start) > hangLimit {
				t.Fatal(err)
			}
		}
		for uid, answered := range map[uint32]bool{1: true, 2: false} {
			ask := exec.Command("/usr/bin/python3", "-c", asker, socket)
			ask.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: 2}}
			if out, err := ask.CombinedOutput(); strings.Contains(string(out), " 200") != answered {
				t.Errorf("confine=%s, user %d: %v\n%s", confine, uid, err, out)
			}
		}
		if err := errors.Join(cmd.Process.Signal(unix.SIGTERM), cmd.Wait()); err != nil {
			t.Error(err)
		}
	}
}

// TestSocketsThatNobodyCanConnectTo are passed as systemd would.
func TestSocketsThatNobodyCanConnectTo(t *testing.T) {
	disk := image(t, 1<<20)
	for name, x := range map[string]struct {
		typ  int
		bind bool
		want string
	}{
		"datagrams":     {unix.SOCK_DGRAM, true, "not a stream socket"},
		"not listening": {unix.SOCK_STREAM, true, "not a listening socket"},
		"pair":          {unix.SOCK_STREAM, false, "not a listening socket"},
	} {
		var f *os.File
		if x.bind {
			fd, err := unix.Socket(unix.AF_UNIX, x.typ|unix.SOCK_CLOEXEC, 0)
			if err == nil {
				err = unix.Bind(fd, &unix.SockaddrUnix{Name: filepath.Join(shortDir(t), "s")})
			}
			if err != nil {
				t.Fatal(err)
			}
			f = os.NewFile(uintptr(fd), name)
		} else {
			pair, err := unix.Socketpair(unix.AF_UNIX, x.typ|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			f = os.NewFile(uintptr(pair[0]), name)
			defer unix.Close(pair[1])
		}
		defer f.Close()
		// The shell becomes the program, under the number that it tells.
		sh := exec.Command("/bin/sh", "-c", `LISTEN_PID=$$ exec "$0" "$@"`, os.Args[0], disk)
		sh.Env = append(os.Environ(), asProgram+"=1", "LISTEN_FDS=1")
		sh.ExtraFiles = []*os.File{f}
		fails(t, sh, x.want)
	}
}

// TestStatusShowsWhatConfines asks a service.
func TestStatusShowsWhatConfines(t *testing.T) {
	s := newService(t, "")
	got, err := s.ctl.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	states := map[string]string{}
	for _, c := range got.Security {
		states[c.Name] = c.State
		if c.State != "enforced" && c.Reason == "" {
			t.Errorf("%+v: there is no reason", c)
		}
	}
	for _, name := range []string{"stages", "landlock", "no-new-privileges", "seccomp", "no-core-dumps"} {
		if states[name] != "enforced" {
			t.Errorf("%s is %q", name, states[name])
		}
	}
}

// rewrite changes the configuration file.
func (s *testService) rewrite(from, to string) {
	s.Helper()
	path := filepath.Join(s.dir, "conf")
	b, err := os.ReadFile(path)
	if err == nil {
		err = os.WriteFile(path, bytes.ReplaceAll(b, []byte(from), []byte(to)), 0o600)
	}
	if err != nil {
		s.Fatal(err)
	}
}

func (s *testService) logged(what string) bool {
	b, err := os.ReadFile(filepath.Join(s.dir, "log"))
	return err == nil && bytes.Contains(b, []byte(what))
}

// wantLogged waits until the log has what: lines are written behind what they tell of.
func (s *testService) wantLogged(what string) {
	s.Helper()
	s.await(fmt.Sprintf("the log has %q", what), func() bool { return s.logged(what) })
}

// TestCertificatesBehindLinksAreRenewed: they are laid out as by certbot, where a
// renewal is a new file elsewhere and a new link.
func TestCertificatesBehindLinksAreRenewed(t *testing.T) {
	pki := t.TempDir()
	live, archive := filepath.Join(pki, "live"), filepath.Join(pki, "archive")
	ca := transporttest.NewCA(t, "test")
	issue := func(version string) {
		dir := filepath.Join(archive, version)
		if err := errors.Join(os.MkdirAll(dir, 0o700), os.MkdirAll(live, 0o700)); err != nil {
			t.Fatal(err)
		}
		transporttest.WriteServer(t, dir, ca, ca.IssueServer("localhost"))
		files, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			to, next, link := filepath.Join(archive, version+"-"+f.Name()), filepath.Join(live, "next"), filepath.Join(live, f.Name())
			if err := errors.Join(os.Rename(filepath.Join(dir, f.Name()), to), os.Symlink(to, next), os.Rename(next, link)); err != nil {
				t.Fatal(err)
			}
		}
	}
	issue("1")
	s := newService(t, "[[listener]]\nuri = \"nbds+unix:///?socket=DIR/tls\"\ntls = \"require\"\n[tls]\ncertificates = \""+live+"\"\n")
	issue("2")
	if err := s.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	s.await("the certificates are read again", func() bool {
		return s.logged("tls credentials reloaded") || s.logged("stay as they were")
	})
	if s.logged("stay as they were") {
		t.Error("the certificates that have come are not served")
	}
	s.stop()
}

// TestRevocationNeedsNoKey: the worker cannot read the key of its certificate, which
// was opened before it became another user. Whether that key changes or not, who is
// revoked is let in no more.
func TestRevocationNeedsNoKey(t *testing.T) {
	disk := userImage(t)
	dir := shortDir(t)
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	ca, day := transporttest.NewCA(t, "test"), time.Now().Add(24*time.Hour)
	alice, bob := ca.IssueClient("alice"), ca.IssueClient("bob")
	revoke := func(list ...*transporttest.Issued) {
		transporttest.WriteFile(t, filepath.Join(dir, "ca-crl.pem"), ca.CRL(day, list...), 0o644)
	}
	transporttest.WriteServer(t, dir, ca, ca.IssueServer("localhost"))
	revoke()
	d := serve(t, "-u", "nobody", "--tls=require", "--tls-certificates", dir, disk)
	enters := func(when, name string, is *transporttest.Issued, want bool) {
		t.Helper()
		own := t.TempDir()
		transporttest.WriteClient(t, own, ca, is)
		cfg, err := transport.ClientConfig(own, "localhost")
		if err != nil {
			t.Fatal(err)
		}
		c, err := net.Dial("unix", d.socket)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := nbdclient.New(t.Context(), c, nbdclient.Options{TLS: cfg}); (err == nil) != want {
			t.Errorf("%s, %s: got %v, want entry: %v", when, name, err, want)
		}
	}
	enters("before", "bob", bob, true)
	revoke(bob)
	enters("bob revoked", "bob", bob, false)
	enters("bob revoked", "alice", alice, true)
	transporttest.WriteServer(t, dir, nil, ca.IssueServer("localhost"))
	revoke(alice)
	enters("alice revoked, another key", "alice", alice, false)
	enters("alice revoked, another key", "bob", bob, true)
	d.signal(unix.SIGTERM)
	if status := d.wait(); status != 0 {
		t.Errorf("status %d", status)
	}
	if said := d.stderr.String(); strings.Count(said, "server-key.pem: permission denied") != 1 {
		t.Errorf("log %q, want one line of the other key", said)
	}
}

// TestConfigurationBehindALinkIsReloaded from the folder of the file.
func TestConfigurationBehindALinkIsReloaded(t *testing.T) {
	link := filepath.Join(t.TempDir(), "link")
	s := &testService{T: t, dir: t.TempDir()}
	s.configure("")
	images := filepath.Join(s.dir, "images")
	if err := errors.Join(os.Mkdir(images, 0o700), os.Symlink(filepath.Join(s.dir, "conf"), link)); err != nil {
		t.Fatal(err)
	}
	s.rewrite(`roots = ["`+s.dir, `roots = ["`+images)
	s.prepare = func(cmd *exec.Cmd) {
		for i := range cmd.Args {
			if cmd.Args[i] == filepath.Join(s.dir, "conf") {
				cmd.Args[i] = link
			}
		}
	}
	s.start()
	s.rewrite("[images]", "[[export]]\nname = \"m\"\nformat = \"mem\"\nimage = \"1M\"\n[images]")
	if _, err := s.ctl.Reload(t.Context(), false); err != nil {
		t.Errorf("reload: %v", err)
	}
	if got := s.states(); len(got) != 1 || got[0] != "m ready" {
		t.Errorf("states %q", got)
	}
	s.stop()
}

// TestRootThatComesLaterIsExplained: Landlock knows folders, not paths.
func TestRootThatComesLaterIsExplained(t *testing.T) {
	s := &testService{T: t, dir: t.TempDir()}
	s.configure("")
	late, replaced := filepath.Join(s.dir, "late"), filepath.Join(s.dir, "replaced")
	if err := os.Mkdir(replaced, 0o700); err != nil {
		t.Fatal(err)
	}
	s.rewrite(`roots = ["`+s.dir, `roots = ["`+late+`", "`+replaced)
	scratch := t.TempDir() // the worker may write there, wherever those of the tests are
	s.prepare = func(cmd *exec.Cmd) { cmd.Env = append(cmd.Env, "TMPDIR="+scratch) }
	s.start()
	s.wantLogged("root=" + late)
	if s.logged("root=" + replaced) {
		t.Error("the log names a root that is there")
	}
	if err := errors.Join(os.Mkdir(late, 0o700), os.Rename(replaced, replaced+".old"), os.Mkdir(replaced, 0o700)); err != nil {
		t.Fatal(err)
	}
	for _, root := range []string{late, replaced} {
		x := api.AddExport{}
		x.Name, x.Image = "a", filepath.Join(root, "a.img")
		if err := os.WriteFile(x.Image, make([]byte, 1<<20), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := s.ctl.Add(t.Context(), x)
		wantCode(t, "an image in a root that came later", err, api.CodeForbidden)
		if err == nil || !strings.Contains(err.Error(), "start it again") {
			t.Errorf("image in %s: got %v, want what to do", root, err)
		}
	}
	s.stop()
}

// forge writes files of kept exports, as a worker can that somebody has taken over.
func (s *testService) forge(list ...config.Export) {
	s.Helper()
	for i, x := range list {
		if err := config.WriteExport(filepath.Join(s.dir, "state"), x, nil, i+1); err != nil {
			s.Fatal(err)
		}
	}
}

// TestKeptExportsWidenNoCage: the worker may write their files.
func TestKeptExportsWidenNoCage(t *testing.T) {
	other := shortDir(t)
	at := func(dir, name string) []config.Listener {
		return []config.Listener{{URI: "nbd+unix:///?socket=" + filepath.Join(dir, name)}}
	}
	s := &testService{T: t, dir: t.TempDir()}
	s.configure("")
	s.forge(config.Export{Name: "far", Image: "1M", Format: "mem", Listeners: at(other, "far")},
		config.Export{Name: "near", Image: "1M", Format: "mem", Listeners: at(s.dir, "near")})
	s.start()
	if got := s.states(); len(got) != 2 || !strings.Contains(got[0], "failed") || got[1] != "near ready" {
		t.Errorf("states %q", got)
	}
	x := api.AddExport{}
	x.Name, x.Image, x.Format, x.Listeners = "later", "1M", "mem", at(other, "later")
	_, later := s.ctl.Add(t.Context(), x)
	far, err := s.ctl.Export(t.Context(), "far")
	if err != nil {
		t.Fatal(err)
	}
	for what, said := range map[string]string{"the kept one": far.Error, "the one that comes later": fmt.Sprint(later)} {
		if !strings.Contains(said, "permission denied") || !strings.Contains(said, "[[listener]]") {
			t.Errorf("%s: %q, want what to do", what, said)
		}
	}
	if list, err := os.ReadDir(other); err != nil || len(list) > 0 {
		t.Errorf("the folder of somebody else has %v, %v", list, err)
	}
	s.stop()
}
