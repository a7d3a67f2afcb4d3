package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/confine"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
	"github.com/vmdiskd/vmdiskd/internal/transport/transporttest"
)

// asProgram makes the test binary be vmdiskd.
const asProgram = "VMDISKD_TEST_IS_PROGRAM"

func TestMain(m *testing.M) {
	// The program executes itself anew.
	if os.Getenv(asProgram) != "" || os.Getenv("VMDISKD_SWAP_STAGE") != "" || os.Getenv("VMDISKD_SILENT") != "" || confine.IsWorker() {
		if names := os.Getenv(forbid); names != "" {
			if err := forbidCalls(names); err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
		}
		if slices.ContainsFunc(os.Args, func(arg string) bool { return strings.HasPrefix(arg, "--swap") }) {
			go answerWithMallocs()
		}
		os.Unsetenv(asProgram)
		os.Exit(run(os.Args[1:]))
	}
	os.Exit(m.Run())
}

// hangLimit ends a test that would wait for ever; nothing is measured by it.
const hangLimit = 60 * time.Second

// daemonProcess is a running vmdiskd.
type daemonProcess struct {
	t      *testing.T
	cmd    *exec.Cmd
	socket string
	stderr bytes.Buffer
	ended  chan error
}

func program(args ...string) *exec.Cmd {
	cmd := exec.Command(os.Args[0], args...)
	cmd.Env = append(os.Environ(), asProgram+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd
}

// serve starts vmdiskd on a socket of its own and waits until it is ready.
func serve(t *testing.T, args ...string) *daemonProcess {
	t.Helper()
	d := &daemonProcess{t: t, socket: filepath.Join(shortDir(t), "s"), ended: make(chan error, 1)}
	d.cmd = program(append([]string{"--print-uri", "-U", d.socket}, args...)...)
	d.cmd.Stderr = &d.stderr
	out, err := d.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := d.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		d.cmd.Wait()
		t.Fatalf("server did not start: %s", d.stderr.String())
	}
	go func() { d.ended <- d.cmd.Wait() }()
	t.Cleanup(func() {
		if d.cmd.ProcessState == nil {
			d.cmd.Process.Kill()
			<-d.ended
		}
	})
	return d
}

func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "vmdiskd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func image(t *testing.T, size int64) string {
	t.Helper()
	path := filepath.Join(shortDir(t), "disk.img")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	return path
}

func (d *daemonProcess) signal(s os.Signal) {
	d.t.Helper()
	if err := d.cmd.Process.Signal(s); err != nil {
		d.t.Fatalf("signal %v: %v", s, err)
	}
}

// wait returns the exit status.
func (d *daemonProcess) wait() int {
	d.t.Helper()
	select {
	case err := <-d.ended:
		d.ended <- err
		return d.cmd.ProcessState.ExitCode()
	case <-time.After(hangLimit):
		d.signal(syscall.SIGQUIT)
		d.t.Fatalf("server did not end: %s", d.stderr.String())
		return -1
	}
}

// client is a session with simple replies, each of which has hangLimit.
type client struct {
	net.Conn
	t    *testing.T
	size uint64
}

func (d *daemonProcess) dial() *client {
	d.t.Helper()
	c, err := net.Dial("unix", d.socket)
	if err != nil {
		d.t.Fatal(err)
	}
	d.t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(hangLimit))
	k := &client{Conn: c, t: d.t}
	k.read(18)
	b := binary.BigEndian.AppendUint32(nil, wire.FlagFixedNewstyle|wire.FlagNoZeroes)
	k.send(wire.AppendOption(b, wire.OptExportName, nil))
	k.size = binary.BigEndian.Uint64(k.read(10))
	return k
}

func (c *client) read(n int) []byte {
	c.t.Helper()
	b := make([]byte, n)
	_ = c.SetReadDeadline(time.Now().Add(hangLimit))
	if _, err := io.ReadFull(c, b); err != nil {
		c.t.Fatalf("read of %d bytes: %v", n, err)
	}
	return b
}

func (c *client) send(b []byte) {
	c.t.Helper()
	_ = c.SetWriteDeadline(time.Now().Add(hangLimit))
	if _, err := c.Write(b); err != nil {
		c.t.Fatalf("send: %v", err)
	}
}

func (c *client) request(cmd wire.Cmd, cookie, off, n uint64, payload []byte) {
	c.t.Helper()
	c.send(append(wire.AppendRequest(nil, wire.Request{Cmd: cmd, Cookie: cookie, Off: off, Len: n}), payload...))
}

func (c *client) reply() (wire.Errno, uint64) {
	c.t.Helper()
	e, cookie, err := wire.DecodeSimpleReply(c.read(wire.SimpleReplySize))
	if err != nil {
		c.t.Fatal(err)
	}
	return e, cookie
}

// works shows that the session answers.
func (c *client) works() {
	c.t.Helper()
	c.request(wire.CmdFlush, 42, 0, 0, nil)
	if e, cookie := c.reply(); e != wire.OK || cookie != 42 {
		c.t.Errorf("flush: got %v for %d, want OK for 42", e, cookie)
	}
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

func TestSIGTERMEndsAnIdleServerInGoodOrder(t *testing.T) {
	t.Parallel()
	pid := filepath.Join(shortDir(t), "pid")
	d := serve(t, "-P", pid, image(t, 1<<20))
	b, err := os.ReadFile(pid)
	if err != nil || strings.TrimSpace(string(b)) != strconv.Itoa(d.cmd.Process.Pid) {
		t.Errorf("pid file holds %q, %v; want %d", b, err, d.cmd.Process.Pid)
	}
	idle := d.dial()
	idle.works()
	d.signal(syscall.SIGTERM)
	if got := d.wait(); got != 0 {
		t.Errorf("exit status: got %d, want 0: %s", got, d.stderr.String())
	}
	if exists(d.socket) || exists(pid) {
		t.Error("socket or pid file is still there")
	}
	if _, err := idle.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("idle client got %v, want EOF", err)
	}
}

// TestStopOfAStartGivesUpTheImages: what is still to be opened, or waits for a
// lock, is no reason to go on.
func TestStopOfAStartGivesUpTheImages(t *testing.T) {
	t.Parallel()
	const exports = 100
	path := image(t, 1<<20)
	holder := serve(t, path)
	dir := shortDir(t)
	conf := fmt.Sprintf("[[listener]]\nuri = \"nbd+unix:///?socket=%s/s\"\n", dir)
	for i := range exports {
		name := filepath.Join(dir, fmt.Sprint(i, ".img"))
		if err := os.Link(path, name); err != nil {
			t.Fatal(err)
		}
		conf += fmt.Sprintf("[[export]]\nname = \"%d\"\nimage = %q\n", i, name)
	}
	file := filepath.Join(dir, "conf")
	if err := os.WriteFile(file, []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := program("--config", file)
	log, err := cmd.StderrPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	lines, failed := bufio.NewScanner(log), 0
	for lines.Scan() {
		if !strings.Contains(lines.Text(), "export cannot be opened") {
			continue
		}
		if failed++; failed == 1 {
			if err := cmd.Process.Signal(unix.SIGTERM); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := cmd.Wait(); err != nil || failed == 0 || failed == exports || exists(filepath.Join(dir, "s")) {
		t.Errorf("stopped at the first of %d locked images: got %v after %d; its socket is there: %v", exports, err, failed, exists(filepath.Join(dir, "s")))
	}
	holder.dial().works()
}

func TestSIGTERMUnderLoadLosesNoAcknowledgedWrite(t *testing.T) {
	t.Parallel()
	path := image(t, 64<<20)
	d := serve(t, path)
	c := d.dial()
	const size, blocks = 4096, 256
	many, acked := make(chan struct{}, 2), make(chan []int, 1)
	go func() {
		list, err := writeUntilTheEnd(c, size, blocks, many)
		if err != nil {
			t.Error(err)
		}
		many <- struct{}{}
		acked <- list
	}()
	<-many
	d.signal(syscall.SIGTERM)
	if got := d.wait(); got != 0 {
		t.Errorf("exit status: got %d, want 0: %s", got, d.stderr.String())
	}
	wantWritten(t, path, size, blocks, <-acked)
}

// drainTimeout is that of a drain which ends with untaken replies: the storage of a busy
// host has answered all requests by then.
const drainTimeout = "--drain-timeout=5s"

// stuck is a client that asks for more than sockets hold and reads nothing,
// so that a drain has something to wait for.
func (d *daemonProcess) stuck() {
	c := d.dial()
	for i := range 4 {
		c.request(wire.CmdRead, uint64(i), 0, 32<<20, nil)
	}
	// The first reply's header shows that the server is at it.
	c.read(wire.SimpleReplySize)
}

// TestDrainHasABound: who does not take what was answered loses nothing by it.
// TestStuckGuestLosesNobodysData is for what has no answer.
func TestDrainHasABound(t *testing.T) {
	t.Parallel()
	d := serve(t, drainTimeout, image(t, 64<<20))
	d.stuck()
	d.signal(syscall.SIGTERM)
	if got := d.wait(); got != 0 {
		t.Errorf("exit status: got %d, want 0", got)
	}
	if !strings.Contains(d.stderr.String(), "did not take their replies") {
		t.Errorf("log does not say that clients were cut off: %s", d.stderr.String())
	}
}

func TestSecondSignalEndsAtOnce(t *testing.T) {
	t.Parallel()
	d := serve(t, "--drain-timeout=10m", image(t, 64<<20))
	d.stuck()
	d.signal(syscall.SIGTERM)
	for exists(d.socket) { // gone when the drain has begun
		if d.cmd.ProcessState != nil {
			t.Fatal("server ended after one signal")
		}
	}
	d.signal(syscall.SIGINT)
	if got := d.wait(); got != 1 {
		t.Errorf("exit status: got %d, want 1", got)
	}
}

func TestOtherSignalsAreNoReasonToStop(t *testing.T) {
	t.Parallel()
	d := serve(t, image(t, 1<<20))
	c := d.dial()
	for range 500 {
		for _, s := range []syscall.Signal{syscall.SIGHUP, syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGPIPE, syscall.SIGXFSZ, syscall.SIGCHLD} {
			d.signal(s)
		}
	}
	c.works()
	d.dial().works()
}

func TestHalfOpenConnectionsDoNotHoldUpTheEnd(t *testing.T) {
	t.Parallel()
	d := serve(t, image(t, 1<<20))
	for range 500 {
		c, err := net.Dial("unix", d.socket)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	d.signal(syscall.SIGTERM)
	if got := d.wait(); got != 0 {
		t.Errorf("exit status: got %d, want 0: %s", got, d.stderr.String())
	}
}

func TestLogThatNobodyReadsStopsNothing(t *testing.T) {
	t.Parallel()
	socket := filepath.Join(shortDir(t), "s")
	cmd := program("-v", "--print-uri", "-U", socket, image(t, 1<<20))
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	cmd.Stderr = w // a pipe that stays full
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	w.Close()
	defer cmd.Wait()
	defer cmd.Process.Kill()
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		t.Fatal("server did not start")
	}
	d := &daemonProcess{t: t, cmd: cmd, socket: socket}
	c := d.dial()
	for range 5000 {
		c.works()
	}
}

// TestLogThatCannotBeWrittenStopsNothing: the partition of the log is full, or
// whoever read it is gone (LI-14, LI-15).
func TestLogThatCannotBeWrittenStopsNothing(t *testing.T) {
	t.Parallel()
	full := serve(t, "-v", "--log=/dev/full", image(t, 1<<20))
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	defer w.Close()
	closed := &daemonProcess{t: t, socket: filepath.Join(shortDir(t), "s"), ended: make(chan error, 1)}
	closed.cmd = program("-v", "--print-uri", "-U", closed.socket, image(t, 1<<20))
	closed.cmd.Stderr = w
	out, err := closed.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := closed.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		t.Fatal("a server whose log nobody reads any more did not start")
	}
	go func() { closed.ended <- closed.cmd.Wait() }()
	for _, d := range []*daemonProcess{full, closed} {
		c := d.dial()
		for range 500 {
			c.works()
		}
		c.Close()
		d.signal(syscall.SIGTERM)
		if got := d.wait(); got != 0 {
			t.Errorf("exit status: got %d, want 0", got)
		}
	}
}

func TestImageInUseIsRefused(t *testing.T) {
	t.Parallel()
	path := image(t, 1<<20)
	serve(t, path)
	out, err := program("-U", "-", path).CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 1 || !strings.Contains(string(out), path) {
		t.Errorf("second server: %v, %q; want status 1 and the name of the image", err, out)
	}
}

// TestPIDFileIsOfAServerThatServes: one that does not start leaves none, and not
// another's changed.
func TestPIDFileIsOfAServerThatServes(t *testing.T) {
	t.Parallel()
	disk, dir := image(t, 1<<20), shortDir(t)
	first := filepath.Join(dir, "first")
	d := serve(t, "-P", first, disk)
	for _, confined := range []string{"auto", "off"} {
		second := filepath.Join(dir, "second")
		fails(t, program("--confine="+confined, "-P", first, "-U", "-", disk), "another vmdiskd")
		fails(t, program("--confine="+confined, "-P", second, "-U", "-", disk), disk)
		if exists(second) {
			t.Errorf("confine %s: the PID file of a server that did not start is still there", confined)
		}
		b, err := os.ReadFile(first)
		if want := fmt.Sprintln(d.cmd.Process.Pid); err != nil || string(b) != want {
			t.Errorf("confine %s: the PID file of the first server holds %q, %v; want %q", confined, b, err, want)
		}
	}
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	r, err := os.OpenFile(fifo, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	fails(t, program("-P", fifo, "-U", "-", image(t, 1<<20)), "no regular file")
}

// TestFilesThatTheWorkerCannotRemove: the PID file is left empty, and the log says
// what stays.
func TestFilesThatTheWorkerCannotRemove(t *testing.T) {
	t.Parallel()
	disk, pid := userImage(t), filepath.Join(shortDir(t), "pid")
	d := serve(t, "-u", "65534", "-g", "65534", "-P", pid, disk)
	b, err := os.ReadFile(pid)
	if want := fmt.Sprintln(d.cmd.Process.Pid); err != nil || string(b) != want {
		t.Errorf("the PID file holds %q, %v; want %q", b, err, want)
	}
	d.signal(syscall.SIGTERM)
	if got := d.wait(); got != 0 {
		t.Errorf("exit status: got %d, want 0", got)
	}
	if b, err := os.ReadFile(pid); err != nil || len(b) > 0 {
		t.Errorf("the PID file of a server that has ended holds %q, %v", b, err)
	}
	for _, path := range []string{pid, d.socket} {
		if !strings.Contains(d.stderr.String(), path) {
			t.Errorf("the log does not tell that %q stays:\n%s", path, d.stderr.String())
		}
	}
}

func TestWhatIsNoDiskIsRefused(t *testing.T) {
	t.Parallel()
	dir := shortDir(t)
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{dir, fifo, "/dev/null", filepath.Join(dir, "missing")} {
		out, err := program("-U", "-", path).CombinedOutput()
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != 1 || !strings.Contains(string(out), path) {
			t.Errorf("%s: %v, %q; want status 1 and the name", path, err, out)
		}
	}
}

func TestReadOnlyImageIsOpenedReadOnly(t *testing.T) {
	t.Parallel()
	path := image(t, 1<<20)
	d := serve(t, "-r", path)
	c := d.dial()
	c.request(wire.CmdWrite, 1, 0, 512, make([]byte, 512))
	if e, _ := c.reply(); e != wire.EPERM {
		t.Errorf("write: got %v, want EPERM", e)
	}
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", d.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	found := false
	for _, fd := range fds {
		if target, _ := os.Readlink(fd); target == path {
			found = true
			info, err := os.ReadFile(strings.Replace(fd, "/fd/", "/fdinfo/", 1))
			if err != nil || !bytes.Contains(info, []byte("flags:\t0")) || accessMode(t, info) != unix.O_RDONLY {
				t.Errorf("image is open with %q, %v", info, err)
			}
		}
	}
	if !found {
		t.Error("image is not open")
	}
}

func accessMode(t *testing.T, fdinfo []byte) int {
	t.Helper()
	for _, line := range strings.Split(string(fdinfo), "\n") {
		if v, ok := strings.CutPrefix(line, "flags:\t"); ok {
			n, err := strconv.ParseInt(v, 8, 64)
			if err != nil {
				t.Fatal(err)
			}
			return int(n) & unix.O_ACCMODE
		}
	}
	return -1
}

func TestServerEndsWithItsParent(t *testing.T) {
	t.Parallel()
	for name, flags := range map[string]string{"confined": "", "unconfined": "--confine=off", "another user": "--confine=off -u 65534 -g 65534"} {
		t.Run(name, func(t *testing.T) { endsWithItsParent(t, flags) })
	}
}

// endsWithItsParent starts a server with flags under a shell, and kills that.
func endsWithItsParent(t *testing.T, flags string) {
	socket := filepath.Join(shortDir(t), "s")
	ctx, cancel := context.WithTimeout(t.Context(), hangLimit)
	defer cancel()
	sh := exec.CommandContext(ctx, "/bin/sh", "-c", `"$0" --exit-with-parent --print-uri `+flags+` -U "$1" "$2" & wait`,
		os.Args[0], socket, image(t, 1<<20))
	sh.Env = append(os.Environ(), asProgram+"=1")
	out, err := sh.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := sh.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		t.Fatal("server did not start")
	}
	d := &daemonProcess{t: t, socket: socket}
	c := d.dial()
	c.works()
	sh.Process.Kill()
	sh.Wait()
	if _, err := c.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("client got %v, want EOF", err)
	}
}

func TestServerGivesUpItsRights(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	d := serve(t, "-u", "65534", "-g", "65534", image(t, 1<<20))
	d.dial().works()
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", d.cmd.Process.Pid))
	if err != nil || len(tasks) == 0 {
		t.Fatal("no threads found")
	}
	for _, task := range tasks {
		b, err := os.ReadFile(task)
		if err == nil && (!bytes.Contains(b, []byte("Uid:\t65534\t65534\t65534")) || !bytes.Contains(b, []byte("Gid:\t65534\t65534\t65534"))) {
			t.Errorf("%s: thread kept rights", task)
		}
	}
}

func TestKeyThatOthersCanReadIsRefused(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	ca := transporttest.NewCA(t, "test")
	transporttest.WriteServer(t, dir, ca, ca.IssueServer("localhost"))
	if err := os.Chmod(filepath.Join(dir, "server-key.pem"), 0o644); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(shortDir(t), "s")
	out, err := program("--tls=require", "--tls-certificates", dir, "-U", socket, image(t, 1<<20)).CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 1 || !strings.Contains(string(out), "server-key.pem") {
		t.Errorf("got %v, %q; want status 1 and the name of the key", err, out)
	}
	if exists(socket) {
		t.Error("a socket was made")
	}
}

func TestCommandGetsTheDiskAndGivesItsStatus(t *testing.T) {
	t.Parallel()
	path := image(t, 1<<20)
	out, err := program("-e", "it's", "--run", `echo "$uri|$unixsocket|$port|$exportname|$nbd"; exit 7`, path).Output()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 7 {
		t.Errorf("exit status: %v, want 7", err)
	}
	f := strings.Split(strings.TrimSpace(string(out)), "|")
	if len(f) != 5 || f[0] != "nbd+unix:///it%27s?socket="+f[1] || f[2] != "" || f[3] != "it's" ||
		f[4] != "nbd:unix:"+f[1]+":exportname=it's" || exists(f[1]) {
		t.Errorf("variables: %q", f)
	}
}

// TestCommandOfAnotherUserGetsTheDisk: it can enter the private folder, which is gone
// afterwards.
func TestCommandOfAnotherUserGetsTheDisk(t *testing.T) {
	path := userImage(t)
	dir, err := os.MkdirTemp("", "vmdiskd-test-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o777|os.ModeSticky); err != nil {
		t.Fatal(err)
	}
	t.Setenv("TMPDIR", dir)
	for _, args := range [][]string{{"-u", "nobody", "-g", "nogroup"}, {"-u", "nobody", "-U", "-"}, {"-u", "65534", "--confine=off"}} {
		out, err := program(append(args, "--run", "id -u; nbdinfo --size $uri", path)...).Output()
		if err != nil || string(out) != "65534\n1048576\n" {
			t.Errorf("%s: got %v, %q, want the user 65534 and the size 1048576", args, err, out)
		}
		if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
			t.Errorf("%s: left behind: %v, %v", args, left, err)
		}
	}
}

func TestCommandGetsTheAddressOfItsDisk(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name, want string
		args       []string
	}{
		{"everywhere", "nbd:localhost:", []string{"--insecure-plaintext"}},
		{"IPv4", "nbd:127.0.0.2:", []string{"-i", "127.0.0.2"}},
		{"IPv6", "nbd:[::1]:", []string{"-i", "::1"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if l, err := net.Listen("tcp", "[::1]:0"); err == nil {
				l.Close()
			} else if tt.name == "IPv6" {
				t.Skip("this machine has no IPv6")
			}
			args := append(tt.args, "-p", "0", "--print-uri", "--run", `echo "$nbd|$port"`, image(t, 1<<20))
			out, err := program(args...).Output()
			lines := strings.Split(strings.TrimSpace(string(out)), "\n")
			if err != nil || len(lines) != 2 {
				t.Fatalf("%v, %q; want one URI and a line of the command", err, out)
			}
			nbd, port, _ := strings.Cut(lines[1], "|")
			if nbd != tt.want+port || port == "" {
				t.Errorf("$nbd is %q, want %q and port %q", nbd, tt.want, port)
			}
		})
	}
}

func TestCommandEndedByASignalGivesTheStatusOfShells(t *testing.T) {
	t.Parallel()
	for _, confine := range []string{"auto", "off"} {
		out, err := program("--confine="+confine, "--run", "kill -KILL $$", image(t, 1<<20)).CombinedOutput()
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != 128+9 {
			t.Errorf("--confine=%s: %v, want status 137: %s", confine, err, out)
		}
	}
}

func TestLiveSocketIsNotTakenAway(t *testing.T) {
	t.Parallel()
	d := serve(t, image(t, 1<<20))
	out, err := program("-U", d.socket, image(t, 1<<20)).CombinedOutput()
	if err == nil || !strings.Contains(string(out), d.socket) {
		t.Errorf("second server: %v, %q; want an error that names the socket", err, out)
	}
	d.dial().works()
}

func TestSocketOfAKilledServerIsReplaced(t *testing.T) {
	t.Parallel()
	path := image(t, 1<<20)
	d := serve(t, path)
	d.signal(syscall.SIGKILL)
	d.wait()
	if !exists(d.socket) {
		t.Fatal("socket is gone already")
	}
	next := program("--print-uri", "-U", d.socket, path)
	out, err := next.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := next.Start(); err != nil {
		t.Fatal(err)
	}
	defer next.Wait()
	defer next.Process.Signal(syscall.SIGTERM)
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		t.Fatal("server did not start on the stale socket")
	}
	d.dial().works()
}
