package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/backing/backingtest"
	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// realDaemon is a vmdiskd whose control socket all commands of the test use.
type realDaemon struct {
	dir  string // the root of its images
	conf string
	cmd  *exec.Cmd
}

// daemonText is its configuration; DIR is its folder.
const daemonText = `
[control]
socket = "DIR/control"
state = "DIR/state"
[images]
roots = ["DIR"]
[[listener]]
uri = "nbd+unix:///?socket=DIR/nbd"
`

func startDaemon(t *testing.T) *realDaemon {
	t.Helper()
	d := &realDaemon{dir: t.TempDir()}
	d.conf = filepath.Join(d.dir, "conf")
	must(t, os.Mkdir(filepath.Join(d.dir, "state"), 0o700))
	d.configure(t, "")
	notify, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(d.dir, "notify"), Net: "unixgram"})
	must(t, err)
	defer notify.Close()
	d.cmd = exec.Command(testenv.Binary(t, "vmdiskd"), "--config", d.conf)
	d.cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+filepath.Join(d.dir, "notify"))
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var log bytes.Buffer
	d.cmd.Stderr = &log
	must(t, d.cmd.Start())
	t.Cleanup(func() {
		d.cmd.Process.Signal(syscall.SIGTERM)
		if err := d.cmd.Wait(); err != nil {
			t.Errorf("vmdiskd: %v", err)
		}
		if t.Failed() {
			t.Logf("vmdiskd: %s", log.String())
		}
	})
	must(t, notify.SetReadDeadline(time.Now().Add(time.Minute)))
	for b, said := make([]byte, 4096), ""; !strings.Contains(said, "READY=1"); {
		n, err := notify.Read(b)
		must(t, err)
		said = string(b[:n])
	}
	t.Setenv(socketVariable, filepath.Join(d.dir, "control"))
	return d
}

// configure writes the configuration, with more.
func (d *realDaemon) configure(t *testing.T, more string) {
	t.Helper()
	must(t, os.WriteFile(d.conf, []byte(strings.ReplaceAll(daemonText+more, "DIR", d.dir)), 0o600))
}

// image makes a raw image of 1 MiB.
func (d *realDaemon) image(t *testing.T, name string) string {
	t.Helper()
	path := filepath.Join(d.dir, name)
	must(t, os.WriteFile(path, make([]byte, 1<<20), 0o600))
	return path
}

// shownAs is what export show says of an export.
func shownAs(t *testing.T, name string) (e api.Export) {
	t.Helper()
	must(t, json.Unmarshal([]byte(want(t, exitDone, "export", "show", "--json", "--", name)), &e))
	return e
}

// io runs commands of qemu-io on an export.
func (d *realDaemon) io(t *testing.T, name string, commands ...string) {
	t.Helper()
	args := []string{"-f", "raw"}
	for _, c := range commands {
		args = append(args, "-c", c)
	}
	out, err := exec.Command("qemu-io", append(args, shownAs(t, name).URIs[0])...).CombinedOutput()
	if err != nil || bytes.Contains(out, []byte("failed")) {
		t.Fatalf("qemu-io %q: %v: %s", commands, err, out)
	}
}

// connect opens an export, which answers a request, and leaves it open until the
// end of the test, or until the client is cut off.
func (d *realDaemon) connect(t *testing.T, name string) {
	t.Helper()
	cmd := exec.Command("qemu-io", "-f", "raw", "-r", shownAs(t, name).URIs[0])
	in, out := backingtest.Converse(t, cmd)
	t.Cleanup(func() {
		in.Close()
		_ = cmd.Wait() // it may have been cut off
	})
	_, err := io.WriteString(in, "read 0 512\n")
	must(t, err)
	if line, err := out.ReadString('\n'); err != nil || !strings.Contains(line, "read 512/512 bytes") {
		t.Fatalf("qemu-io: %q, %v", line, err)
	}
}

// clientsOf are the clients of an export.
func clientsOf(t *testing.T, name string) (list []api.Client) {
	t.Helper()
	must(t, json.Unmarshal([]byte(want(t, exitDone, "clients", "--json", "--", name)), &list))
	return list
}

func TestDaemonDoesWhatItIsTold(t *testing.T) {
	d := startDaemon(t)
	path := d.image(t, "a.img")
	if got := want(t, exitDone, "export", "list"); got != "NAME  STATE  SIZE  ACCESS  CLIENTS  FORMAT  ORIGIN  IMAGE\n" {
		t.Errorf("at the start: got %q", got)
	}
	want(t, exitDone, "export", "add", "--persist", "--rate=1G,burst=1s", "--grant=rw,uid="+fmt.Sprint(os.Getuid()), "web", path)
	want(t, exitRefused, "export", "add", "web", path)
	want(t, exitRefused, "export", "add", "--dry-run", "web", path)
	d.io(t, "web", "write -P 7 0 64k", "flush")
	if b, err := os.ReadFile(path); err != nil || b[65535] != 7 || b[65536] != 0 {
		t.Errorf("the image is not what was written: %v", err)
	}
	want(t, exitDone, "export", "resize", "web", "+1M")
	want(t, exitRefused, "export", "resize", "web", "1M")
	if e := shownAs(t, "web"); e.Size != 2<<20 || e.Origin != "state" || e.State != "ready" {
		t.Errorf("resized: got %+v", e)
	}
	want(t, exitDone, "export", "set", "web", "readonly=true", "description=a disk", "rate.ops=1000")
	if e := shownAs(t, "web"); e.Writable || e.Description != "a disk" || e.Rate == nil || e.Rate.Ops != 1000 || e.Rate.Bytes != 1<<30 {
		t.Errorf("set: got %+v", e)
	}
	want(t, exitDone, "export", "set", "web", "grant=none")
	if code, _, _ := ctl(t, "info", shownAs(t, "web").URIs[0]); code == exitDone {
		t.Error("whom the grants refuse, the export is there for")
	}
	want(t, exitDone, "export", "set", "web", "grants=[]", "readonly=false")
	want(t, exitDone, "export", "snapshot", "web", filepath.Join(d.dir, "top.qcow2"))
	d.io(t, "web", "read -P 7 0 64k", "write -P 8 64k 64k", "flush")
	if b, err := os.ReadFile(path); err != nil || b[65535] != 7 || b[65536] != 0 {
		t.Errorf("the image below the overlay has changed: %v", err)
	}
	want(t, exitDone, "export", "remove", "web")
	want(t, exitFailed, "export", "show", "web")
}

// TestChangesAtOnceAreAllMade: two programs that each change one rate, or add
// to the size, both have their way.
func TestChangesAtOnceAreAllMade(t *testing.T) {
	d := startDaemon(t)
	path := d.image(t, "a.img")
	want(t, exitDone, "export", "add", "web", path)
	size := shownAs(t, "web").Size
	const rounds = 10
	for i := range rounds {
		var both sync.WaitGroup
		for _, key := range []string{"ops", "read-ops", "bytes"} {
			both.Go(func() {
				ctl(t, "export", "set", "web", fmt.Sprintf("rate.%s=%d", key, 5000+i))
				ctl(t, "export", "resize", "web", "+1M")
			})
		}
		both.Wait()
		e, n := shownAs(t, "web"), 5000+i
		if e.Rate == nil || *e.Rate != (config.Rate{Bytes: config.Size(n), Ops: int64(n), ReadOps: int64(n)}) {
			t.Fatalf("round %d: got %+v", i, e.Rate)
		}
		if size += 3 << 20; e.Size != size {
			t.Fatalf("round %d: got %d bytes, want %d", i, e.Size, size)
		}
	}
	for _, much := range []string{"+9223372036854775807", "+8E"} {
		if code, _, said := ctl(t, "export", "resize", "web", much); code != exitUsage {
			t.Errorf("%s: got %d and %q", much, code, said)
		}
	}
}

// TestDaemonWantsProofOfVsockPeers: a grant by CID does not write, and the
// daemon says what it lacks, however it is told.
func TestDaemonWantsProofOfVsockPeers(t *testing.T) {
	d := startDaemon(t)
	path := d.image(t, "a.img")
	const lack = "grant 1: writing over vsock needs vm, and psk or token-sha256"
	code, _, said := ctl(t, "export", "add", "--grant=rw,cid=5", "web", path)
	if code == exitDone || !strings.Contains(said, lack) {
		t.Errorf("added: %d %q", code, said)
	}
	want(t, exitDone, "export", "add", "--grant=rw,vm=a,psk=a", "web", path)
	code, _, said = ctl(t, "export", "set", "web", "grant=rw,vm=a")
	if code == exitDone || !strings.Contains(said, "needs psk or token-sha256") {
		t.Errorf("changed: %d %q", code, said)
	}
	want(t, exitDone, "export", "set", "web", "grant=rw,vm=a", "vsock-trust-cid=true")
	if code, _, said = ctl(t, "export", "set", "web", "vsock-trust-cid=false"); code == exitDone {
		t.Errorf("no trust any more: %q", said)
	}
	if e := shownAs(t, "web"); !e.TrustCID || len(e.Grants) != 1 {
		t.Errorf("got %+v", e)
	}
	want(t, exitDone, "export", "add", "--vsock-trust-cid", "--grant=rw,cid=5", "trusts", d.image(t, "b.img"))
	d.configure(t, "[[export]]\nname = \"conf\"\nimage = \"DIR/c.img\"\ngrant = [{ access = \"rw\", cid = [5] }]\n")
	if code, _, said = ctl(t, "reload"); code == exitDone || !strings.Contains(said, lack) {
		t.Errorf("reloaded: %d %q", code, said)
	}
}

// TestDaemonMakesTheSocketThatIsAskedFor with its mode; a label that cannot be
// had is an error, and nothing is left of the export.
func TestDaemonMakesTheSocketThatIsAskedFor(t *testing.T) {
	d := startDaemon(t)
	path, socket := d.image(t, "a.img"), filepath.Join(d.dir, "own")
	listen := "--listen=nbd+unix:///?socket=" + socket
	for _, label := range []string{"no context", "system_u:object_r:no_such_t:s0"} {
		for _, flag := range []string{"--selinux-label=", "--selinux-path-label="} {
			if code, _, said := ctl(t, "export", "add", listen, flag+label, "x", path); code == exitDone || !strings.Contains(said, "SELinux") {
				t.Errorf("%s%s: %d %q", flag, label, code, said)
			}
			if _, err := os.Lstat(socket); err == nil {
				t.Error("the socket is there")
			}
		}
	}
	want(t, exitDone, "export", "add", listen, "--socket-mode=0640", "x", path)
	if i, err := os.Lstat(socket); err != nil || i.Mode() != os.ModeSocket|0o640 {
		t.Errorf("the socket: %v, %v", i, err)
	}
}

func TestDaemonTakesDescriptors(t *testing.T) {
	d := startDaemon(t)
	away := t.TempDir()
	base, top := filepath.Join(away, "base"), filepath.Join(away, "top")
	must(t, os.WriteFile(base, bytes.Repeat([]byte{9}, 1<<20), 0o400))
	tool(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", top)
	want(t, exitRefused, "export", "add", "-f", "qcow2", "--backing-file="+base, "x", top) // not in the roots
	want(t, exitDone, "export", "add", "--fd", "-f", "qcow2", "--backing-file="+base, "x", top)
	d.io(t, "x", "write -P 1 0 64k", "read -P 1 0 64k", "read -P 9 64k 64k", "flush")
	must(t, testenv.Await(testenv.Context(t), func() bool { return shownAs(t, "x").Clients == 0 }))
	want(t, exitDone, "export", "remove", "x")
	judge(t, top)
}

func TestDaemonTellsOfClients(t *testing.T) {
	d := startDaemon(t)
	want(t, exitDone, "export", "add", "web", d.image(t, "a.img"))
	d.connect(t, "web")
	list := clientsOf(t, "web")
	if len(list) != 1 || list[0].Export != "web" || len(list[0].Features) == 0 {
		t.Fatalf("got %+v", list)
	}
	if got := want(t, exitDone, "clients"); !strings.Contains(got, "  web ") {
		t.Errorf("got %q", got)
	}
	if code, _, said := ctl(t, "export", "remove", "--timeout=1ms", "web"); code != exitFailed || !strings.Contains(said, "vmdiskctl clients web lists who has it open, --force") {
		t.Errorf("removed while it is open: %d %q", code, said)
	}
	id := fmt.Sprint(list[0].ID)
	want(t, exitDone, "clients", "kick", "--dry-run", id)
	want(t, exitDone, "clients", "kick", id)
	want(t, exitFailed, "clients", "kick", "12345")
}

func TestDaemonRemovesByForce(t *testing.T) {
	d := startDaemon(t)
	want(t, exitDone, "export", "add", "web", d.image(t, "a.img"))
	d.connect(t, "web")
	want(t, exitDone, "export", "remove", "--force", "web")
	must(t, testenv.Await(testenv.Context(t), func() bool { return !strings.Contains(want(t, exitDone, "clients"), " web ") }))
}

func TestDaemonPausesAndResumes(t *testing.T) {
	d := startDaemon(t)
	want(t, exitDone, "export", "add", "web", d.image(t, "a.img"))
	if got := want(t, exitDone, "export", "pause", "web"); got != "export web is paused\n" {
		t.Errorf("got %q", got)
	}
	want(t, exitFailed, "export", "resize", "web", "+1M") // may be done later: see EXIT STATUS
	want(t, exitFailed, "export", "snapshot", "web", filepath.Join(d.dir, "overlay"))
	cmd := exec.Command("qemu-io", "-f", "raw", "-c", "read 0 64k", shownAs(t, "web").URIs[0])
	must(t, cmd.Start())
	if got := want(t, exitDone, "export", "resume", "web"); got != "export web is ready\n" {
		t.Errorf("got %q", got)
	}
	must(t, cmd.Wait())
	want(t, exitFailed, "export", "resume", "web")
}

func TestDaemonReloads(t *testing.T) {
	d := startDaemon(t)
	d.image(t, "a.img")
	if got := want(t, exitDone, "reload"); got != "no changes\n" {
		t.Errorf("got %q", got)
	}
	d.configure(t, "[[export]]\nname = \"conf\"\nimage = \"DIR/a.img\"\n")
	if got := want(t, exitDone, "reload", "--dry-run"); !strings.Contains(got, "conf") {
		t.Errorf("got %q", got)
	}
	want(t, exitFailed, "export", "show", "conf")
	want(t, exitDone, "reload")
	if e := shownAs(t, "conf"); e.Origin != "config" {
		t.Errorf("got %+v", e)
	}
	d.configure(t, "nonsense")
	want(t, exitFailed, "reload")
}

// TestDaemonIsWatched follows events in a process of its own, which it
// interrupts.
func TestDaemonIsWatched(t *testing.T) {
	d := startDaemon(t)
	want(t, exitDone, "export", "add", "web", d.image(t, "a.img"))
	cmd := exec.Command(os.Args[0], "events", "--export=web")
	cmd.Env = append(os.Environ(), asMain+"=1")
	in, out := backingtest.Converse(t, cmd)
	defer in.Close()
	lines := make(chan string, 1000)
	go func() {
		defer close(lines)
		for s := bufio.NewScanner(out); s.Scan(); {
			lines <- s.Text()
		}
	}()
	for heard := ""; !strings.Contains(heard, " client-connected export=web client="); {
		d.io(t, "web", "read 0 64k") // until somebody listens
		select {
		case heard = <-lines:
		default:
		}
	}
	must(t, cmd.Process.Signal(os.Interrupt))
	for range lines {
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("events: %v", err)
	}
	if got := want(t, exitDone, "top", "--once", "--interval=100ms"); !strings.Contains(got, "\nweb ") {
		t.Errorf("got %q", got)
	}
	var s api.Status
	must(t, json.Unmarshal([]byte(want(t, exitDone, "status", "--json")), &s))
	if s.PID != d.cmd.Process.Pid || s.Exports != 1 || s.Config != d.conf {
		t.Errorf("got %+v", s)
	}
	if got := want(t, exitDone, "status"); !strings.Contains(got, "config: "+d.conf+"\n") {
		t.Errorf("got %q", got)
	}
}

// TestDaemonTellsThatAnImageFills: once for each time that the threshold is set,
// to who listens, and export show has it.
func TestDaemonTellsThatAnImageFills(t *testing.T) {
	d := startDaemon(t)
	image := filepath.Join(d.dir, "disk.qcow2")
	want(t, exitDone, "image", "create", image, "16M")
	want(t, exitDone, "export", "add", "-f", "qcow2", "--write-threshold=1G", "web", image)
	cmd := exec.Command(os.Args[0], "events", "--export=web", "--json")
	cmd.Env = append(os.Environ(), asMain+"=1")
	in, out := backingtest.Converse(t, cmd)
	defer in.Close()
	events := make(chan api.Event, 1000)
	go func() {
		defer close(events)
		for j := json.NewDecoder(out); ; {
			var e api.Event
			if j.Decode(&e) != nil {
				return
			}
			events <- e
		}
	}()
	for heard := (api.Event{}); heard.Kind != "client-connected"; {
		d.io(t, "web", "read 0 64k") // until somebody listens
		select {
		case heard = <-events:
		default:
		}
	}
	wantThreshold := func(when string, want config.Size) {
		t.Helper()
		if got := shownAs(t, "web").WriteThreshold; got == nil || *got != want {
			t.Errorf("%s: got %v, want %v", when, got, want)
		}
	}
	wantThreshold("as it was added", 1<<30)
	for _, commands := range [][]string{{"write 0 8M", "write 8M 8M", "flush"}, {"write 4M 64k", "write 15M 1M", "write 12M 1M"}} {
		want(t, exitDone, "export", "set", "web", "write-threshold=4M")
		wantThreshold("as it was set", 4<<20)
		d.io(t, "web", commands...)
		wantThreshold("when it was reached", 0)
	}
	if got := want(t, exitDone, "export", "show", "web"); !strings.Contains(got, "\nwrite-threshold: 0\n") {
		t.Errorf("got %q", got)
	}
	want(t, exitDone, "export", "remove", "web")
	told := 0
	for e := range events {
		if e.Kind == "threshold" {
			if told++; e.Export != "web" || e.Threshold != 4<<20 || e.Exceeded <= 0 || e.Exceeded > 16<<20 {
				t.Errorf("got %+v", e)
			}
		}
		if e.State == "closed" {
			break
		}
	}
	if told != 2 {
		t.Errorf("it was set twice and told %d times", told)
	}
	must(t, cmd.Process.Signal(os.Interrupt))
	for range events {
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("events: %v", err)
	}
}

// TestPartOfADiskIsAnExport: a window and block sizes of the command line are
// what clients get.
func TestPartOfADiskIsAnExport(t *testing.T) {
	d := startDaemon(t)
	image := d.image(t, "disk")
	want(t, exitDone, "export", "add", "--window=512K+256K", "--block-size=4K", "part", image)
	if x := shownAs(t, "part"); x.Size != 256<<10 {
		t.Errorf("export %+v", x)
	}
	d.io(t, "part", "write -P 7 0 4k", "flush")
	b, err := os.ReadFile(image)
	must(t, err)
	if b[512<<10-1] != 0 || b[512<<10] != 7 || b[516<<10] != 0 {
		t.Error("the write is not where the window begins")
	}
	if out, err := exec.Command("nbdinfo", "--json", shownAs(t, "part").URIs[0]).Output(); err != nil || !strings.Contains(string(out), `"block_size_minimum": 4096`) {
		t.Errorf("nbdinfo: %v: %s", err, out)
	}
	want(t, exitFailed, "export", "add", "--faults="+`[{"error":"EIO"}]`, "faulty", d.image(t, "other"))
}
