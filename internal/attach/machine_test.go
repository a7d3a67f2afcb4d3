package attach_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/attach"
	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/internal/control/client"
	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/qmp"
	"github.com/vmdiskd/vmdiskd/test/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

const diskSize = 1 << 20

// lab is a service and a machine.
type lab struct {
	dir     string
	service *client.Client
	monitor string // path of the machine's

	endService func() // and wait for its end
}

// start starts both. The machine's processor never runs.
func start(t *testing.T, machine ...string) *lab {
	t.Helper()
	l := &lab{dir: testenv.TempDir(t)}
	l.startService(t)
	l.startMachine(t, machine...)
	return l
}

// startService starts a service with more in its configuration.
func (l *lab) startService(t *testing.T, more ...string) {
	t.Helper()
	socket := filepath.Join(l.dir, "control")
	file := filepath.Join(l.dir, "conf")
	state := filepath.Join(l.dir, "state")
	must(t, os.MkdirAll(state, 0o700))
	text := fmt.Sprintf("[control]\nsocket = %q\nstate = %q\n[images]\nroots = [%q]\n%s", socket, state, l.dir, strings.Join(more, "\n"))
	must(t, os.WriteFile(file, []byte(text), 0o600))
	l.service = client.Dial(socket)
	l.endService = run(t, testenv.Binary(t, "vmdiskd"), "--config", file)
	await(t, func() bool {
		_, err := l.service.Status(t.Context())
		return err == nil
	})
}

func (l *lab) startMachine(t *testing.T, args ...string) (end func()) {
	t.Helper()
	l.monitor = filepath.Join(l.dir, "qmp")
	end = run(t, testenv.Path(t, "qemu-system-x86_64"), append([]string{"-accel", "tcg", "-S", "-m", "64", "-nodefaults", "-display", "none",
		"-qmp", "unix:" + l.monitor + ",server=on,wait=off"}, args...)...)
	await(t, func() bool { return testenv.Listens(l.monitor) })
	return end
}

// run starts a program that lives as long as the test, or until end.
func run(t *testing.T, name string, args ...string) (end func()) {
	t.Helper()
	cmd := exec.Command(name, args...)
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	must(t, cmd.Start())
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if t.Failed() {
			t.Logf("%s: %s", name, said.String())
		}
	})
	return func() {
		t.Helper()
		must(t, cmd.Process.Signal(syscall.SIGTERM))
		must(t, cmd.Wait())
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func await(t *testing.T, ready func() bool) {
	t.Helper()
	must(t, testenv.Await(testenv.Context(t), ready))
}

var q35 = []string{"-machine", "q35", "-device", "virtio-scsi-pci,id=scsi0",
	"-device", "pcie-root-port,id=rp1,chassis=1,slot=1", "-device", "pcie-root-port,id=rp2,chassis=2,slot=2"}

// image makes a disk image in the lab.
func (l *lab) image(t *testing.T, name string, size int64) string {
	t.Helper()
	path := filepath.Join(l.dir, name)
	must(t, testenv.CreatePattern(path, size))
	return path
}

// machine connects to the machine at a path, until the test ends.
func (l *lab) machine(t *testing.T, path string, notes *[]string) *attach.Machine {
	t.Helper()
	var m *qmp.Monitor
	await(t, func() (ok bool) {
		var err error
		m, err = qmp.Dial(t.Context(), path)
		return err == nil
	})
	t.Cleanup(func() { m.Close() })
	return &attach.Machine{Name: l.monitor, Monitor: m, Server: l.service, Note: func(s string) {
		if notes != nil {
			*notes = append(*notes, s)
		}
	}}
}

func (l *lab) source(image string) attach.Source {
	s := attach.Source{Image: image, Socket: l.dir}
	s.Add.Image = image
	return s
}

// state is all that plans change, as text.
func (l *lab) state(t *testing.T, m *qmp.Monitor) string {
	t.Helper()
	ctx := testenv.Context(t)
	var b strings.Builder
	nodes, err := qmp.QueryNamedBlockNodes(ctx, m)
	must(t, err)
	for _, n := range nodes {
		fmt.Fprintf(&b, "node %s %d %v\n", n.Name, n.Image.VirtualSize, n.ReadOnly)
	}
	disks, err := qmp.QueryBlock(ctx, m)
	must(t, err)
	for _, d := range disks {
		fmt.Fprintf(&b, "disk %s %s\n", d.QDev, d.Inserted.Name)
	}
	exports, err := l.service.Exports(ctx)
	must(t, err)
	for _, x := range exports {
		fmt.Fprintf(&b, "export %s %s %d\n", x.Name, x.Image, x.Size)
	}
	sockets, err := filepath.Glob(l.dir + "/*.sock")
	must(t, err)
	for _, s := range sockets {
		fmt.Fprintf(&b, "socket %s\n", s)
	}
	return b.String()
}

// do runs a plan that must succeed and reports whether it changed anything.
func do(t *testing.T, p *attach.Plan, err error) bool {
	t.Helper()
	must(t, err)
	changed, err := p.Run(testenv.Context(t))
	must(t, err)
	return changed
}

// oddName is syntax in QMP, in XML, in URIs and on command lines.
const oddName = `-a,"b'<&>%41?#\.img`

// TestDiskIsAttachedGrownAndDetached takes a disk of each model through its
// life in a real machine, twice at each step: the second time nothing is left
// to do.
func TestDiskIsAttachedGrownAndDetached(t *testing.T) {
	t.Parallel()
	l := start(t, q35...)
	var notes []string
	m := l.machine(t, l.monitor, &notes)
	empty := l.state(t, m.Monitor)
	for i, model := range []qmp.Model{qmp.SCSIDisk, qmp.VirtIOBlk, qmp.NVMe} {
		t.Run(string(model), func(t *testing.T) {
			ctx := testenv.Context(t)
			image := l.image(t, fmt.Sprint(i)+oddName, diskSize)
			attached := func() bool {
				p, err := m.Attach(ctx, l.source(image), attach.Options{Model: model})
				return do(t, p, err)
			}
			if !attached() || attached() {
				t.Error("the first attach must change something, the second nothing")
			}
			id, err := m.Resolve(ctx, image)
			must(t, err)
			if id != attach.DiskID(image) {
				t.Errorf("resolved as %q", id)
			}
			l.wantSize(t, m, id, diskSize)
			sizes := []int64{2 * diskSize, 3 * diskSize}
			if model == qmp.NVMe {
				sizes = nil
				if _, err := m.Resize(ctx, id, "", attach.Size{Bytes: 2 * diskSize}); !errors.Is(err, attach.ErrRigid) {
					t.Errorf("resize: %v", err)
				}
			}
			for _, want := range sizes {
				p, err := m.Resize(ctx, id, "", attach.Size{Bytes: diskSize, More: true})
				if !do(t, p, err) {
					t.Error("nothing was grown")
				}
				l.wantSize(t, m, id, want)
				p, err = m.Resize(ctx, id, "", attach.Size{Bytes: want})
				if do(t, p, err) {
					t.Error("the second resize changed something")
				}
			}
			if attached() {
				t.Error("attach of a disk that has grown changed something")
			}
			p, err := m.Detach(ctx, id, false)
			must(t, err)
			if model != qmp.SCSIDisk {
				reset(t, m.Monitor, id, p)
			}
			do(t, p, nil)
			if got := l.state(t, m.Monitor); got != empty {
				t.Errorf("left: %s", got)
			}
			if _, err := m.Resolve(ctx, image); !errors.Is(err, attach.ErrNoDisk) {
				t.Errorf("then: %v", err)
			}
			p, err = m.Detach(ctx, id, false)
			if do(t, p, err) {
				t.Error("the second detach changed something")
			}
		})
	}
	if !strings.Contains(strings.Join(notes, "\n"), "could not be checked") {
		t.Errorf("detach without an agent does not say so: %q", notes)
	}
}

// reset releases a PCI device in a machine whose guest does not run: it is
// asked for once in vain, and goes with a reset of the machine.
func reset(t *testing.T, m *qmp.Monitor, id string, p *attach.Plan) {
	t.Helper()
	ctx, cancel := context.WithTimeout(testenv.Context(t), 300*time.Millisecond)
	defer cancel()
	changed, err := p.Run(ctx)
	if changed || !errors.Is(err, qmp.ErrNotReleased) || errors.Is(err, attach.ErrIncomplete) || !strings.Contains(err.Error(), "a reset included") {
		t.Errorf("detach without a guest: changed %v, %v, want that the request stays", changed, err)
	}
	_, err = m.Execute(testenv.Context(t), "system_reset", nil)
	must(t, err)
	await(t, func() bool {
		there, err := qmp.DevicePresent(testenv.Context(t), m, id)
		return err == nil && !there
	})
}

// wantSize checks the size in the machine and that one client is left.
func (l *lab) wantSize(t *testing.T, m *attach.Machine, id string, want int64) {
	t.Helper()
	ctx := testenv.Context(t)
	nodes, err := qmp.QueryNamedBlockNodes(ctx, m.Monitor)
	must(t, err)
	if len(nodes) != 2 {
		t.Errorf("%d nodes: %+v", len(nodes), nodes)
	}
	for _, n := range nodes {
		if n.Image.VirtualSize != (want+511)/512*512 {
			t.Errorf("node %+v, want %d bytes and the rest of a sector", n, want)
		}
	}
	for { // the machine ends a connection before the server sees its end
		x, err := l.service.Export(ctx, attach.ExportName(m.Name, id))
		must(t, err)
		if x.Size != want {
			t.Fatalf("export of %d bytes, want %d", x.Size, want)
		}
		if x.Clients == 1 {
			return
		}
	}
}

// TestDiskThatGrowsWaitsForItsServerAsBefore reads the delay of each client that
// the machine is given.
func TestDiskThatGrowsWaitsForItsServerAsBefore(t *testing.T) {
	t.Parallel()
	l := start(t, q35...)
	proxy := newProxy(t, l.monitor)
	m := l.machine(t, proxy.path, nil)
	ctx := testenv.Context(t)
	for i, tt := range []struct {
		said time.Duration
		want int64
	}{{0, 60}, {time.Second, 1}, {61500 * time.Millisecond, 62}, {time.Hour, 3600}, {limits.NBDReconnect, 86400}} {
		t.Run(tt.said.String(), func(t *testing.T) {
			proxy.clients() // of the time before
			id := fmt.Sprint("d", i)
			o := attach.Options{Model: qmp.SCSIDisk, ID: id, Reconnect: tt.said}
			image := l.image(t, id, diskSize)
			p, err := m.Attach(ctx, l.source(image), o)
			do(t, p, err)
			for range 2 {
				p, err = m.Resize(ctx, id, "", attach.Size{Bytes: diskSize, More: true})
				do(t, p, err)
			}
			if got, want := proxy.clients(), []int64{tt.want, tt.want, tt.want}; !slices.Equal(got, want) {
				t.Errorf("reconnect delays %v, want %v", got, want)
			}
			p, err = m.Attach(ctx, l.source(image), o)
			if do(t, p, err) {
				t.Error("the second attach changed something")
			}
			p, err = m.Detach(ctx, id, true)
			do(t, p, err)
		})
	}
}

// TestDiskGrowsInAnOldMachine that has blockdev-reopen, from 6.1 on, and no
// open-timeout, from 7.0 on.
func TestDiskGrowsInAnOldMachine(t *testing.T) {
	t.Parallel()
	l := start(t, q35...)
	proxy := newProxy(t, l.monitor)
	proxy.hide("open-timeout")
	m := l.machine(t, proxy.path, nil)
	ctx := testenv.Context(t)
	p, err := m.Attach(ctx, l.source(l.image(t, "disk", diskSize)), attach.Options{Model: qmp.SCSIDisk, ID: "d0"})
	do(t, p, err)
	for _, want := range []int64{2 * diskSize, 3 * diskSize} {
		p, err = m.Resize(ctx, "d0", "", attach.Size{Bytes: diskSize, More: true})
		do(t, p, err)
		l.wantSize(t, m, "d0", want)
	}
	p, err = m.Detach(ctx, "d0", true)
	do(t, p, err)
}

// TestDiskMayEndWithinASector: QEMU shows the rest of the sector too.
func TestDiskMayEndWithinASector(t *testing.T) {
	t.Parallel()
	l := start(t, q35...)
	m := l.machine(t, l.monitor, nil)
	ctx := testenv.Context(t)
	image := l.image(t, "disk", diskSize)
	must(t, os.Truncate(image, 1_000_001))
	for _, want := range []bool{true, false} {
		p, err := m.Attach(ctx, l.source(image), attach.Options{Model: qmp.SCSIDisk, ID: "d0"})
		if do(t, p, err) != want {
			t.Errorf("attach: changed is not %v", want)
		}
	}
	l.wantSize(t, m, "d0", 1_000_001)
	for _, want := range []int64{1_001_001, 1_001_024} {
		p, err := m.Resize(ctx, "d0", "", attach.Size{Bytes: want})
		if !do(t, p, err) {
			t.Error("nothing was grown")
		}
		l.wantSize(t, m, "d0", want)
		p, err = m.Resize(ctx, "d0", "", attach.Size{Bytes: want})
		if do(t, p, err) {
			t.Error("the second resize changed something")
		}
	}
	p, err := m.Detach(ctx, "d0", true)
	do(t, p, err)
}

// proxy passes commands on to the machine but for one, which it refuses.
type proxy struct {
	path string

	mu      sync.Mutex
	refuse  int      // guarded by mu; number of the command, from 1
	seen    []string // guarded by mu
	refused string   // guarded by mu
	hit     func()   // guarded by mu; called in place of a refusal, the command goes through
	delays  []int64  // guarded by mu; of NBD clients, in seconds
	first   func()   // guarded by mu; called before a command of the name is passed on
	name    string   // guarded by mu
	hidden  string   // guarded by mu; an option that the machine does not know
}

// hide makes the machine one that does not know an option of its commands.
func (p *proxy) hide(option string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.hidden = option
}

// veiled is a line of which either side sees another option in place of the hidden
// one: the machine refuses it, and whoever asks for the schema does not find it.
func (p *proxy) veiled(line []byte) []byte {
	p.mu.Lock()
	defer p.mu.Unlock()
	return veil(line, p.hidden)
}

// veil keeps the length.
func veil(b []byte, option string) []byte {
	if option == "" {
		return b
	}
	return bytes.ReplaceAll(b, []byte(strconv.Quote(option)), []byte(strconv.Quote(strings.Repeat("?", len(option)))))
}

// before has f called before each command of the name.
func (p *proxy) before(name string, f func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.name, p.first = name, f
}

// clients are the reconnect delays of the clients that were added since the last
// call.
func (p *proxy) clients() (delays []int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delays, p.delays = p.delays, nil
	return delays
}

func newProxy(t *testing.T, to string) *proxy {
	t.Helper()
	p := &proxy{path: filepath.Join(testenv.TempDir(t), "proxy")}
	l, err := net.Listen("unix", p.path)
	must(t, err)
	var all sync.WaitGroup
	t.Cleanup(func() { l.Close(); all.Wait() })
	all.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			all.Go(func() { p.serve(c, to) })
		}
	})
	return p
}

func (p *proxy) serve(c net.Conn, to string) {
	defer c.Close()
	q, err := net.Dial("unix", to)
	if err != nil {
		return
	}
	defer q.Close()
	var writing sync.Mutex
	say := func(to net.Conn, line []byte) {
		writing.Lock()
		defer writing.Unlock()
		to.Write(append(line, '\n'))
	}
	lines := func(from net.Conn, f func([]byte)) {
		s := bufio.NewScanner(from)
		s.Buffer(nil, 16<<20)
		for s.Scan() {
			f(bytes.Clone(s.Bytes()))
		}
	}
	var back sync.WaitGroup
	back.Go(func() {
		lines(q, func(line []byte) { say(c, p.veiled(line)) })
		c.Close()
	})
	lines(c, func(line []byte) {
		var cmd struct {
			Execute   string
			ID        json.RawMessage
			Arguments struct {
				Driver string
				Delay  int64 `json:"reconnect-delay"`
			}
		}
		json.Unmarshal(line, &cmd)
		if cmd.Execute == "blockdev-add" && cmd.Arguments.Driver == "nbd" {
			p.mu.Lock()
			p.delays = append(p.delays, cmd.Arguments.Delay)
			p.mu.Unlock()
		}
		if p.refuses(cmd.Execute) {
			say(c, fmt.Appendf(nil, `{"error": {"class": "GenericError", "desc": "no"}, "id": %s}`, cmd.ID))
			return
		}
		say(q, p.veiled(line))
	})
	q.Close()
	back.Wait()
}

func (p *proxy) refuses(command string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if command == "qmp_capabilities" {
		return false
	}
	if command == p.name {
		p.first()
	}
	p.seen = append(p.seen, command)
	if len(p.seen) != p.refuse {
		return false
	}
	p.refused = command
	if p.hit != nil {
		p.hit()
		return false
	}
	return true
}

// set makes the n-th command from now the one.
func (p *proxy) set(n int, hit func()) (before []string, refused string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	before, refused = p.seen, p.refused
	p.seen, p.refused, p.refuse, p.hit = nil, "", n, hit
	return before, refused
}

// before has a plan call do before a step.
func before(p *attach.Plan, at int, do func()) {
	step := p.Steps[at].Do
	p.Steps[at].Do = func(ctx context.Context) (bool, error) {
		do()
		return step(ctx)
	}
}

// dead has machines die before each step in turn of what plan is to do with them, and
// check told of the step and its outcome. The service outlives them.
func (l *lab) dead(t *testing.T, plan func(ctx context.Context, m *attach.Machine, s attach.Source) *attach.Plan, check func(ctx context.Context, step string, changed bool, err error)) {
	t.Helper()
	l.startService(t)
	ctx := testenv.Context(t)
	s := l.source(l.image(t, "disk", diskSize))
	for at, last := 0, 0; at <= last; at++ {
		end := l.startMachine(t, q35...)
		p := plan(ctx, l.machine(t, l.monitor, nil), s)
		last = len(p.Steps) - 1
		before(p, at, end)
		changed, err := p.Run(ctx)
		check(ctx, p.Steps[at].Name, changed, err)
	}
}

// TestMachineThatDiesLeavesNothing: it dies before each step of an attach, and what
// is taken back is what it has not taken along.
func TestMachineThatDiesLeavesNothing(t *testing.T) {
	t.Parallel()
	l := &lab{dir: testenv.TempDir(t)}
	l.dead(t, func(ctx context.Context, m *attach.Machine, s attach.Source) *attach.Plan {
		p, err := m.Attach(ctx, s, attach.Options{Model: qmp.SCSIDisk, ID: "d0"})
		must(t, err)
		return p
	}, func(ctx context.Context, step string, _ bool, err error) {
		if err == nil || errors.Is(err, attach.ErrIncomplete) {
			t.Errorf("dead before %q: %v", step, err)
		}
		if list, err := l.service.Exports(ctx); err != nil || len(list) > 0 {
			t.Errorf("dead before %q: exports left: %+v, %v", step, list, err)
		}
	})
}

// TestDiskOfAMachineThatDiesIsDetached: it dies before each step of a detach, after
// which nobody could ask for the rest of it.
func TestDiskOfAMachineThatDiesIsDetached(t *testing.T) {
	t.Parallel()
	l := &lab{dir: testenv.TempDir(t)}
	l.dead(t, func(ctx context.Context, m *attach.Machine, s attach.Source) *attach.Plan {
		m.Agent = startGuest(t, nil).Agent
		p, err := m.Attach(ctx, s, attach.Options{Model: qmp.SCSIDisk, ID: "d0"})
		do(t, p, err)
		p, err = m.Detach(ctx, "d0", false)
		must(t, err)
		return p
	}, func(ctx context.Context, step string, changed bool, err error) {
		if err != nil || !changed {
			t.Errorf("dead before %q: changed %v, %v", step, changed, err)
		}
		if list, err := l.service.Exports(ctx); err != nil || len(list) > 0 {
			t.Fatalf("dead before %q: exports left: %+v, %v", step, list, err)
		}
	})
}

// TestMachineThatDiesWhileItsDiskGrowsLeavesTheExport longer, if it was grown, and
// nothing else: it dies before each step of a resize.
func TestMachineThatDiesWhileItsDiskGrowsLeavesTheExport(t *testing.T) {
	t.Parallel()
	l := &lab{dir: testenv.TempDir(t)}
	var name string
	var size int64
	l.dead(t, func(ctx context.Context, m *attach.Machine, s attach.Source) *attach.Plan {
		p, err := m.Attach(ctx, s, attach.Options{Model: qmp.SCSIDisk, ID: "d0"})
		do(t, p, err)
		name = attach.ExportName(m.Name, "d0")
		x, err := l.service.Export(ctx, name)
		must(t, err)
		size = x.Size
		p, err = m.Resize(ctx, "d0", "", attach.Size{Bytes: size + diskSize})
		must(t, err)
		return p
	}, func(ctx context.Context, step string, _ bool, err error) {
		wantGrown(t, step, err)
		if after, err := l.service.Export(ctx, name); err != nil || after.Size != size+diskSize {
			t.Errorf("dead before %q: the export has %d bytes, had %d, %v", step, after.Size, size, err)
		}
	})
}

// wantGrown holds that a machine which is gone at a step of a resize leaves that
// nothing but the growth of the export is not taken back.
func wantGrown(t *testing.T, step string, err error) {
	t.Helper()
	if err == nil || strings.Contains(err.Error(), "undo ") || strings.Contains(err.Error(), "so it stays") || strings.Count(err.Error(), "cannot be undone") != 1 {
		t.Errorf("gone before %q: %v", step, err)
	}
}

// TestAttachThatFailsAtAnyCommandLeavesNothing has QEMU refuse each command of
// an attach in turn, then has the user interrupt at each.
func TestAttachThatFailsAtAnyCommandLeavesNothing(t *testing.T) {
	t.Parallel()
	l := start(t, q35...)
	p := newProxy(t, l.monitor)
	m := l.machine(t, p.path, nil)
	image := l.image(t, "disk", diskSize)
	empty := l.state(t, m.Monitor)
	attempt := func(ctx context.Context) error {
		plan, err := m.Attach(ctx, l.source(image), attach.Options{Model: qmp.SCSIDisk, ID: "d0"})
		if err == nil {
			_, err = plan.Run(ctx)
		}
		return err
	}
	p.set(0, nil)
	must(t, attempt(testenv.Context(t)))
	commands, _ := p.set(0, nil)
	plan, err := m.Detach(testenv.Context(t), "d0", true)
	do(t, plan, err)
	if len(commands) < 8 {
		t.Fatalf("an attach took %q only", commands)
	}
	for n := range len(commands) {
		for _, interrupt := range []bool{false, true} {
			ctx, cancel := context.WithCancel(testenv.Context(t))
			var hit func()
			if interrupt {
				hit = cancel
			}
			p.set(n+1, hit)
			err := attempt(ctx)
			cancel()
			_, refused := p.set(0, nil)
			mustFail := strings.HasPrefix(refused, "blockdev-")
			switch {
			case err == nil && !mustFail:
				// A question that can do without an answer, a place for which
				// there is another, or the last one.
				plan, err := m.Detach(testenv.Context(t), "d0", true)
				do(t, plan, err)
			case err == nil || errors.Is(err, attach.ErrIncomplete) || refused == "":
				t.Errorf("command %d, %s, interrupted %v: %v", n+1, commands[n], interrupt, err)
			}
			if got := l.state(t, m.Monitor); got != empty {
				t.Fatalf("command %d, %s, interrupted %v: left\n%s", n+1, commands[n], interrupt, got)
			}
		}
	}
}

// TestPlaceThatAnotherTakesIsNotTheLast has somebody else plug a device, by
// another monitor, at the place that an attach is about to use.
func TestPlaceThatAnotherTakesIsNotTheLast(t *testing.T) {
	t.Parallel()
	other := filepath.Join(testenv.TempDir(t), "other")
	l := start(t, append(q35, "-qmp", "unix:"+other+",server=on,wait=off")...)
	p := newProxy(t, l.monitor)
	m, second := l.machine(t, p.path, nil), l.machine(t, other, nil)
	ctx := testenv.Context(t)
	for device, o := range map[string]attach.Options{
		`{"driver": "scsi-cd", "id": "other", "bus": "scsi0.0", "scsi-id": 0, "lun": 0}`: {Model: qmp.SCSIDisk, ID: "d0"},
		`{"driver": "virtio-rng-pci", "id": "other2", "bus": "rp1"}`:                     {Model: qmp.VirtIOBlk, ID: "d1"},
	} {
		plan, err := m.Attach(ctx, l.source(l.image(t, o.ID, diskSize)), o)
		must(t, err)
		taken := false
		p.before("device_add", func() {
			if taken {
				return
			}
			taken = true
			_, err := second.Monitor.Execute(ctx, "device_add", json.RawMessage(device))
			if err != nil {
				t.Errorf("%s: %v", device, err)
			}
		})
		do(t, plan, nil)
	}
}

// TestResizeThatFailsKeepsTheDiskAsItWas refuses each command of a resize in
// turn. Before the guest is told, the machine goes back to the client that it
// had; a later attempt ends what the first has begun.
func TestResizeThatFailsKeepsTheDiskAsItWas(t *testing.T) {
	t.Parallel()
	l := start(t, q35...)
	p := newProxy(t, l.monitor)
	m := l.machine(t, p.path, nil)
	image := l.image(t, "disk", diskSize)
	ctx := testenv.Context(t)
	plan, err := m.Attach(ctx, l.source(image), attach.Options{Model: qmp.SCSIDisk, ID: "d0"})
	do(t, plan, err)
	size := int64(diskSize)
	for n := 1; ; n++ {
		before, err := qmp.QueryNamedBlockNodes(ctx, m.Monitor)
		must(t, err)
		size += diskSize
		p.set(n, nil)
		plan, err := m.Resize(ctx, "d0", "", attach.Size{Bytes: size})
		if err == nil {
			_, err = plan.Run(ctx)
		}
		_, refused := p.set(0, nil)
		if refused == "" {
			must(t, err)
			break
		}
		if err == nil && refused != "blockdev-del" && refused != "qom-get" { // asked again, and can do without
			t.Errorf("%s was refused and nobody noticed", refused)
		}
		told := false
		after, qerr := qmp.QueryNamedBlockNodes(ctx, m.Monitor)
		must(t, qerr)
		for _, x := range after {
			told = told || x.Image.VirtualSize == size
		}
		if err != nil && len(after) != len(before) && !told {
			t.Errorf("%s refused: nodes %+v, before %+v; %v", refused, after, before, err)
		}
		plan, err = m.Resize(ctx, "d0", "", attach.Size{Bytes: size})
		do(t, plan, err)
		if seen, _ := p.set(0, nil); !slices.Contains(seen, "block_resize") {
			t.Errorf("the guest was not told: %q", seen)
		}
		l.wantSize(t, m, "d0", size)
	}
}

// TestResizeByMoreThatFailsNamesTheSize refuses each command of a resize by a number
// of bytes in turn: what the error names does the rest, and no more. Before the image
// has grown, and where a size was named, it says nothing of that.
func TestResizeByMoreThatFailsNamesTheSize(t *testing.T) {
	t.Parallel()
	l := start(t, q35...)
	p := newProxy(t, l.monitor)
	m := l.machine(t, p.path, nil)
	ctx := testenv.Context(t)
	plan, err := m.Attach(ctx, l.source(l.image(t, "disk", diskSize)), attach.Options{Model: qmp.SCSIDisk, ID: "d0"})
	do(t, plan, err)
	size := func() int64 {
		t.Helper()
		x, err := l.service.Export(ctx, attach.ExportName(m.Name, "d0"))
		must(t, err)
		return x.Size
	}
	advised := 0
	for n := 1; ; n++ {
		before := size()
		more := attach.Size{Bytes: diskSize, More: n%2 == 1}
		if !more.More {
			more.Bytes += before
		}
		p.set((n+1)/2, nil)
		plan, err := m.Resize(ctx, "d0", "", more)
		if err == nil {
			_, err = plan.Run(ctx)
		}
		if _, refused := p.set(0, nil); refused == "" {
			must(t, err)
			break
		}
		want := err != nil && more.More && size() != before
		advice := fmt.Sprintf("repeat it with the size %d and no plus sign", before+diskSize)
		if got := err != nil && strings.Contains(err.Error(), advice); got != want {
			t.Errorf("from %d bytes to %d: %v, which names the size: %t", before, size(), err, got)
		}
		if want {
			advised++
		}
		plan, err = m.Resize(ctx, "d0", "", attach.Size{Bytes: before + diskSize})
		do(t, plan, err)
		l.wantSize(t, m, "d0", before+diskSize)
	}
	if advised == 0 {
		t.Error("no resize failed after the image had grown")
	}
}

func TestSomethingElseOfTheNameIsRefused(t *testing.T) {
	t.Parallel()
	l := start(t, q35...)
	m := l.machine(t, l.monitor, nil)
	ctx := testenv.Context(t)
	one, two := l.image(t, "one", diskSize), l.image(t, "two", diskSize)
	o := attach.Options{Model: qmp.SCSIDisk, ID: "d0"}
	p, err := m.Attach(ctx, l.source(one), o)
	do(t, p, err)
	before := l.state(t, m.Monitor)
	p, err = m.Attach(ctx, l.source(two), o)
	if err == nil {
		_, err = p.Run(ctx)
	}
	if !errors.Is(err, attach.ErrDiffers) || l.state(t, m.Monitor) != before {
		t.Errorf("another image: %v", err)
	}
	ro := l.source(one)
	ro.Add.ReadOnly = true
	if _, err := m.Attach(ctx, ro, o); !errors.Is(err, attach.ErrDiffers) {
		t.Errorf("the same image read-only: %v", err)
	}
	if _, err := m.Attach(ctx, l.source(two), attach.Options{Model: qmp.SCSIDisk, ID: "scsi0"}); !errors.Is(err, attach.ErrDiffers) {
		t.Errorf("the id of a controller: %v", err)
	}
	if _, err := m.Resize(ctx, "d0", "", attach.Size{Bytes: 1}); !errors.Is(err, attach.ErrSmaller) {
		t.Errorf("shrink: %v", err)
	}
	for model, serial := range map[qmp.Model]string{qmp.SCSIDisk: strings.Repeat("s", 37), qmp.VirtIOBlk: strings.Repeat("s", 21), qmp.NVMe: "\n"} {
		if _, err := m.Attach(ctx, l.source(two), attach.Options{Model: model, ID: "d1", Serial: serial}); !errors.Is(err, qmp.ErrInvalid) {
			t.Errorf("%s with serial number %q: %v", model, serial, err)
		}
	}
	if _, err := m.Attach(ctx, l.source(two), attach.Options{Model: qmp.SCSIDisk, ID: `d,0"`}); err == nil {
		t.Error("an id that QEMU does not take was planned")
	}
}

// TestAnotherDiskIsNotTakenForTheOneThatIsThere says something else of the same
// image: before anything is plugged, as after a restart of the machine, and of a
// disk that the machine has.
func TestAnotherDiskIsNotTakenForTheOneThatIsThere(t *testing.T) {
	t.Parallel()
	l := start(t, q35...)
	m := l.machine(t, l.monitor, nil)
	ctx := testenv.Context(t)
	image := l.image(t, "disk", diskSize)
	source := l.source(image)
	source.Owner, source.Mode = fmt.Sprint(os.Getuid()), "0600"
	attached := func(s attach.Source, o attach.Options, steps int) (bool, error) {
		o.ID = "d0"
		p, err := m.Attach(ctx, s, o)
		if err != nil {
			return false, err
		}
		p.Steps = p.Steps[:min(steps, len(p.Steps))]
		return p.Run(ctx)
	}
	scsi := attach.Options{Model: qmp.SCSIDisk, Serial: "S1"}
	for _, steps := range []int{1, 9} {
		if changed, err := attached(source, scsi, steps); err != nil || !changed {
			t.Fatalf("%d steps: changed %v, %v", steps, changed, err)
		}
		for want, other := range map[string]func(s *attach.Source){
			`format is "raw", not "qcow2"`:              func(s *attach.Source) { s.Add.Format = "qcow2" },
			`cache is "writeback", not "none"`:          func(s *attach.Source) { s.Add.Cache = "none" },
			`overlay is none, not {"quota":1048576}`:    func(s *attach.Source) { s.Add.Overlay = &config.Overlay{Quota: 1 << 20} },
			`window is none, not {"length":4096}`:       func(s *attach.Source) { s.Add.Window = &config.Window{Length: 4096} },
			`protect is none, not [`:                    func(s *attach.Source) { s.Add.Protect = []config.Range{{Length: 4096}} },
			`block-size is none, not {"minimum":4096}`:  func(s *attach.Source) { s.Add.BlockSize = &config.BlockSize{Minimum: 4096} },
			`it is not kept when the daemon ends`:       func(s *attach.Source) { s.Add.Persist = true },
			`mode is "0600", not "0660"`:                func(s *attach.Source) { s.Mode = "0660" },
			fmt.Sprintf("owner is \"%d\"", os.Getuid()): func(s *attach.Source) { s.Owner = "1" },
		} {
			s := source
			other(&s)
			if changed, err := attached(s, scsi, 9); changed || !errors.Is(err, attach.ErrDiffers) || !strings.Contains(err.Error(), want) {
				t.Errorf("%d steps were done, want %s: changed %v, %v", steps, want, changed, err)
			}
		}
	}
	for want, o := range map[string]attach.Options{
		`type of device "d0" is "scsi-hd", not "virtio-blk-pci"`: {Model: qmp.VirtIOBlk},
		`serial of device "d0" is "S1", not "S2"`:                {Serial: "S2"},
		`waits 1m0s for a server that is lost, not 1h0m0s`:       {Reconnect: time.Hour},
	} {
		if changed, err := attached(source, o, 9); changed || !errors.Is(err, attach.ErrDiffers) || !strings.Contains(err.Error(), want) {
			t.Errorf("want %s: changed %v, %v", want, changed, err)
		}
	}
	same := func(when string, s attach.Source) {
		t.Helper()
		if changed, err := attached(s, attach.Options{}, 9); changed || err != nil {
			t.Errorf("the same disk %s: changed %v, %v", when, changed, err)
		}
	}
	same("of which nobody says whose the socket is", l.source(image))
	p, err := m.Snapshot(ctx, "d0", "", filepath.Join(l.dir, "overlay"), false)
	do(t, p, err)
	same("after a snapshot", source)
}

// TestGuestComesToNoOtherContentsByARestart: its disk waits for a service that
// was started again, and that has none of its exports. Whoever attaches something
// else in the place of the disk is refused before it is served; the same, served
// otherwise, gets what the guest writes meanwhile.
func TestGuestComesToNoOtherContentsByARestart(t *testing.T) {
	t.Parallel()
	l := start(t, q35...)
	m := l.machine(t, l.monitor, nil)
	ctx := testenv.Context(t)
	image, other := l.image(t, "disk", diskSize), l.image(t, "other", diskSize)
	options := attach.Options{Model: qmp.SCSIDisk, ID: "d0"}
	p, err := m.Attach(ctx, l.source(image), options)
	do(t, p, err)
	l.endService()
	l.startService(t)
	guestIO(t, m, "d0", "aio_write -P 0xaa 0 4096")
	for name, change := range map[string]func(s *attach.Source){
		"another image":     func(s *attach.Source) { s.Image, s.Add.Image = other, other },
		"another format":    func(s *attach.Source) { s.Add.Format = "qcow2" },
		"a backing file":    func(s *attach.Source) { s.Add.BackingFiles = []string{other} },
		"a data file":       func(s *attach.Source) { s.Add.DataFiles = []string{other} },
		"a snapshot in it":  func(s *attach.Source) { s.Add.Snapshot = "1" },
		"an overlay":        func(s *attach.Source) { s.Add.Overlay = &config.Overlay{Quota: 1 << 20} },
		"a part":            func(s *attach.Source) { s.Add.Window = &config.Window{Length: 4096} },
		"protected ranges":  func(s *attach.Source) { s.Add.Protect = []config.Range{{Length: 4096}} },
		"other block sizes": func(s *attach.Source) { s.Add.BlockSize = &config.BlockSize{Minimum: 4096} },
		"lenient":           func(s *attach.Source) { s.Add.Lenient = true },
		"read-only":         func(s *attach.Source) { s.Add.ReadOnly = true },
	} {
		s := l.source(image)
		change(&s)
		p, err := m.Attach(ctx, s, options)
		if err == nil {
			_, err = p.Run(ctx)
		}
		if !errors.Is(err, attach.ErrDiffers) {
			t.Errorf("%s: got %v, want ErrDiffers", name, err)
		}
		if list, err := l.service.Exports(ctx); err != nil || len(list) != 0 {
			t.Fatalf("%s: exports %+v, %v", name, list, err)
		}
	}
	s := l.source(image)
	s.Add.Format, s.Add.Cache, s.Add.Rate = "raw", "none", &config.Rate{Bytes: 1 << 30}
	p, err = m.Attach(ctx, s, options)
	do(t, p, err)
	await(t, func() bool {
		b, err := os.ReadFile(image)
		return err == nil && bytes.Equal(b[:4096], bytes.Repeat([]byte{0xaa}, 4096))
	})
	l.wantSize(t, m, "d0", diskSize)
	id, err := m.Resolve(ctx, image)
	must(t, err)
	p, err = m.Detach(ctx, id, false)
	if do(t, p, err); l.state(t, m.Monitor) != "" {
		t.Errorf("left %s", l.state(t, m.Monitor))
	}
}

// TestGuestOfADiskThatForgetsComesToNoOtherOpening: what the guest wrote ends with
// the export, and nothing is served later at the address that its client waits
// at. While the export is there the disk is attached already.
func TestGuestOfADiskThatForgetsComesToNoOtherOpening(t *testing.T) {
	t.Parallel()
	l := start(t, q35...)
	m := l.machine(t, l.monitor, nil)
	ctx := testenv.Context(t)
	overlay := l.source(l.image(t, "disk", diskSize))
	overlay.Add.Overlay = &config.Overlay{Quota: 1 << 20}
	memory := l.source("1M")
	memory.Add.Format = "mem"
	ends := map[string]func(){
		"restart": func() {
			l.endService()
			l.startService(t)
		},
		"removal": func() {
			list, err := l.service.Exports(ctx)
			must(t, err)
			must(t, l.service.Remove(ctx, list[0].Name, true, 0))
		},
	}
	sockets := map[string]bool{}
	for name, s := range map[string]attach.Source{"overlay": overlay, "memory": memory} {
		o := attach.Options{Model: qmp.SCSIDisk, ID: name, Reconnect: time.Second} // detach waits for it
		for how, end := range ends {
			for want := range 2 {
				p, err := m.Attach(ctx, s, o)
				if changed := do(t, p, err); changed != (want == 0) {
					t.Errorf("%s: attach %d changed something: %t", name, want, changed)
				}
			}
			guestIO(t, m, name, "write -P 0x41 0 4096")
			list, err := filepath.Glob(l.dir + "/*.sock")
			if must(t, err); len(list) != 1 || sockets[list[0]] {
				t.Errorf("%s: served at %q, before at %v", name, list, sockets)
			}
			sockets[list[0]] = true
			end()
			p, err := m.Attach(ctx, s, o)
			if err == nil {
				_, err = p.Run(ctx)
			}
			if list, bad := l.service.Exports(ctx); !errors.Is(err, attach.ErrDiffers) || !strings.Contains(err.Error(), "an export that ended") || bad != nil || len(list) != 0 {
				t.Errorf("%s, %s: got %v, want ErrDiffers, and exports %+v, %v", name, how, err, list, bad)
			}
			p, err = m.Detach(ctx, name, false)
			do(t, p, err)
		}
		s.Add.Persist = true
		if _, err := m.Attach(ctx, s, o); !errors.Is(err, qmp.ErrInvalid) {
			t.Errorf("%s, kept: got %v, want ErrInvalid", name, err)
		}
	}
}

// TestGuestDoesNotGoBackBeforeItsSnapshotByARestart of the service.
func TestGuestDoesNotGoBackBeforeItsSnapshotByARestart(t *testing.T) {
	t.Parallel()
	l := start(t, q35...)
	m := l.machine(t, l.monitor, nil)
	ctx := testenv.Context(t)
	image, overlay := l.image(t, "disk", diskSize), filepath.Join(l.dir, "overlay")
	before, err := os.ReadFile(image)
	must(t, err)
	attached := func() bool {
		p, err := m.Attach(ctx, l.source(image), attach.Options{Model: qmp.SCSIDisk, ID: "d0"})
		return do(t, p, err)
	}
	attached()
	p, err := m.Snapshot(ctx, "d0", "", overlay, false)
	do(t, p, err)
	l.endService()
	l.startService(t)
	if attached() {
		t.Fatal("the disk was served anew, from its image")
	}
	guestIO(t, m, "d0", "aio_write -P 0xbb 4096 4096")
	await(t, func() bool {
		b, err := os.ReadFile(overlay)
		return err == nil && bytes.Contains(b, bytes.Repeat([]byte{0xbb}, 4096))
	})
	if after, err := os.ReadFile(image); err != nil || !bytes.Equal(after, before) {
		t.Errorf("the image below the overlay was written to, %v", err)
	}
	p, err = m.Detach(ctx, "d0", false)
	if do(t, p, err); l.state(t, m.Monitor) != "" {
		t.Errorf("left %s", l.state(t, m.Monitor))
	}
}

// TestDetachTellsOfTheOverlay that a snapshot has put above the image, as does what
// leads to a detach: the same attach would have the guest write to the image below.
func TestDetachTellsOfTheOverlay(t *testing.T) {
	t.Parallel()
	l := start(t, q35...)
	var notes []string
	m := l.machine(t, l.monitor, &notes)
	ctx := testenv.Context(t)
	image, overlay := l.image(t, "disk", diskSize), filepath.Join(l.dir, "overlay")
	told := func(text string, want bool) {
		t.Helper()
		if got := strings.Contains(text, fmt.Sprintf("%q", overlay)); got != want {
			t.Errorf("the overlay is named: %t, in %q", got, text)
		}
	}
	for _, snapshot := range []bool{false, true} {
		p, err := m.Attach(ctx, l.source(image), attach.Options{Model: qmp.SCSIDisk, ID: "d0", Serial: "S1"})
		do(t, p, err)
		if snapshot {
			p, err = m.Snapshot(ctx, "d0", "", overlay, false)
			do(t, p, err)
		}
		uncached := l.source(image)
		uncached.Add.Cache = "none"
		for name, again := range map[string]func() (*attach.Plan, error){
			"another delay": func() (*attach.Plan, error) {
				return m.Attach(ctx, l.source(image), attach.Options{ID: "d0", Reconnect: time.Hour})
			},
			"another serial": func() (*attach.Plan, error) {
				return m.Attach(ctx, l.source(image), attach.Options{ID: "d0", Serial: "S2"})
			},
			"another cache": func() (*attach.Plan, error) { return m.Attach(ctx, uncached, attach.Options{ID: "d0"}) },
		} {
			p, err := again()
			if err == nil {
				_, err = p.Run(ctx)
			}
			if !errors.Is(err, attach.ErrDiffers) {
				t.Fatalf("%s: got %v, want ErrDiffers", name, err)
			}
			told(err.Error(), snapshot)
		}
		notes = nil
		p, err = m.Detach(ctx, "d0", false)
		do(t, p, err)
		told(strings.Join(notes, "\n"), snapshot)
	}
}

// TestDiskThatGrewUnseenIsServedAgain after a restart of the service: its guest
// goes on with the size that it knows until it is told. One that has shrunk is
// refused.
func TestDiskThatGrewUnseenIsServedAgain(t *testing.T) {
	t.Parallel()
	l := start(t, q35...)
	var notes []string
	m := l.machine(t, l.monitor, &notes)
	ctx := testenv.Context(t)
	image := l.image(t, "disk", diskSize)
	attached := func() (bool, error) {
		p, err := m.Attach(ctx, l.source(image), attach.Options{Model: qmp.SCSIDisk, ID: "d0"})
		must(t, err)
		return p.Run(ctx)
	}
	if _, err := attached(); err != nil {
		t.Fatal(err)
	}
	restart := func(size int64) {
		t.Helper()
		l.endService()
		must(t, os.Truncate(image, size))
		l.startService(t)
	}
	restart(diskSize / 2)
	if _, err := attached(); !errors.Is(err, attach.ErrDiffers) || strings.Contains(l.state(t, m.Monitor), "export") {
		t.Errorf("smaller: got %v, want ErrDiffers and no export", err)
	}
	restart(3 * diskSize)
	for _, want := range []bool{true, false} {
		notes = nil
		if changed, err := attached(); changed != want || err != nil || !strings.Contains(strings.Join(notes, "\n"), fmt.Sprintf("%d bytes of the %d", diskSize, 3*diskSize)) {
			t.Errorf("attach: changed %v, %v, notes %q", changed, err, notes)
		}
	}
	guestIO(t, m, "d0", "aio_write -P 0xcc 4096 4096")
	await(t, func() bool {
		b, err := os.ReadFile(image)
		return err == nil && bytes.Equal(b[4096:8192], bytes.Repeat([]byte{0xcc}, 4096))
	})
	p, err := m.Resize(ctx, "d0", "", attach.Size{Bytes: 3 * diskSize})
	if !do(t, p, err) {
		t.Error("the machine was not told")
	}
	l.wantSize(t, m, "d0", 3*diskSize)
}

// guestIO has the device of a disk do what qemu-io(1) is told, as its guest would. The
// machine does not say what came of it.
func guestIO(t *testing.T, m *attach.Machine, id, command string) {
	t.Helper()
	out, err := m.Monitor.Execute(testenv.Context(t), "human-monitor-command", map[string]any{"command-line": fmt.Sprintf("qemu-io -d %s %q", id, command)})
	if err != nil || string(out) != `""` {
		t.Errorf("%s: %s, %v", command, out, err)
	}
}

// TestDiskIsNoOtherExportThanItsOwn names exports for a disk that attach has
// served, and for one of an export that was there.
func TestDiskIsNoOtherExportThanItsOwn(t *testing.T) {
	t.Parallel()
	l := &lab{dir: testenv.TempDir(t)}
	m, image := l.startWeb(t, fmt.Sprintf("[[listener]]\nuri = \"nbd+unix:///?socket=%s/shared\"", l.dir))
	ctx := testenv.Context(t)
	_, err := l.service.Add(ctx, addExport("other", l.image(t, "other.img", 2*diskSize)))
	must(t, err)
	p, err := m.Attach(ctx, l.source(l.image(t, "own.img", diskSize)), attach.Options{Model: qmp.SCSIDisk, ID: "own"})
	do(t, p, err)
	p, err = m.Attach(ctx, attach.Source{Export: "web"}, attach.Options{Model: qmp.SCSIDisk, ID: "web"})
	do(t, p, err)
	own := attach.ExportName(m.Name, "own")
	before := l.state(t, m.Monitor)
	for id, named := range map[string][]string{"own": {"other", "web"}, "web": {"other", own}} {
		for _, export := range named {
			if _, err := m.Resize(ctx, id, export, attach.Size{Bytes: 3 * diskSize}); !errors.Is(err, attach.ErrDiffers) {
				t.Errorf("resize %s with export %s: %v", id, export, err)
			}
			if _, err := m.Snapshot(ctx, id, export, filepath.Join(l.dir, "overlay"), false); !errors.Is(err, attach.ErrDiffers) {
				t.Errorf("snapshot %s with export %s: %v", id, export, err)
			}
		}
	}
	if got := l.state(t, m.Monitor); got != before {
		t.Errorf("changed to %s", got)
	}
	for id, export := range map[string]string{"own": own, "web": "web"} {
		p, err := m.Resize(ctx, id, export, attach.Size{Bytes: 3 * diskSize})
		if !do(t, p, err) {
			t.Errorf("%s was not grown", id)
		}
	}
	if info, err := os.Stat(image); err != nil || info.Size() != 3*diskSize {
		t.Errorf("the image of web: %v, %v", info, err)
	}
}

// TestExportOfAnEarlierDiskIsNoDisk: a machine that has been started again has another
// disk under the name by now.
func TestExportOfAnEarlierDiskIsNoDisk(t *testing.T) {
	t.Parallel()
	l := &lab{dir: testenv.TempDir(t)}
	m, _ := l.startWeb(t, fmt.Sprintf("[[listener]]\nuri = \"nbd+unix:///?socket=%s/shared\"", l.dir))
	ctx := testenv.Context(t)
	earlier := addExport(attach.ExportName(m.Name, "data"), l.image(t, "earlier", diskSize))
	_, err := l.service.Add(ctx, earlier)
	must(t, err)
	p, err := m.Attach(ctx, attach.Source{Export: "web"}, attach.Options{Model: qmp.SCSIDisk, ID: "data"})
	do(t, p, err)
	if _, err := m.Snapshot(ctx, "data", "", filepath.Join(l.dir, "overlay"), false); !errors.Is(err, attach.ErrDiffers) {
		t.Errorf("snapshot: %v, want it refused", err)
	}
	p, err = m.Detach(ctx, "data", false)
	do(t, p, err)
	if _, err := l.service.Export(ctx, earlier.Name); err != nil {
		t.Errorf("the export of the earlier disk: %v", err)
	}
}

// TestExportBelowAnOverlayIsInTheMachine: QEMU's snapshots put a node above that of a
// disk, which the guest has all the same.
func TestExportBelowAnOverlayIsInTheMachine(t *testing.T) {
	t.Parallel()
	l := &lab{dir: testenv.TempDir(t)}
	m, _ := l.startWeb(t, fmt.Sprintf("[[listener]]\nuri = \"nbd+unix:///?socket=%s/shared\"", l.dir))
	ctx := testenv.Context(t)
	p, err := m.Attach(ctx, attach.Source{Export: "web"}, attach.Options{Model: qmp.SCSIDisk, ID: "data"})
	do(t, p, err)
	disks, err := qmp.QueryBlock(ctx, m.Monitor)
	must(t, err)
	for _, d := range disks {
		if !d.Is("data") {
			continue
		}
		_, err := m.Monitor.Execute(ctx, "blockdev-snapshot-sync", map[string]any{"node-name": d.Inserted.Name, "snapshot-file": filepath.Join(l.dir, "snap"), "snapshot-node-name": "snap"})
		must(t, err)
	}
	for _, id := range []string{"", "data", "second"} {
		if _, err := m.Attach(ctx, attach.Source{Export: "web"}, attach.Options{Model: qmp.SCSIDisk, ID: id}); !errors.Is(err, attach.ErrDiffers) {
			t.Errorf("attach as %q: %v, want it refused", id, err)
		}
	}
}

// TestDiskGrowsByTheAddressThatItCameBy has an export at several: the client with
// the new size comes by that of the first, with the same TLS. So does that of a disk
// whose image attach has served beside them.
func TestDiskGrowsByTheAddressThatItCameBy(t *testing.T) {
	t.Parallel()
	l := &lab{dir: testenv.TempDir(t)}
	dir := testenv.Certificates(t)
	port, plain := testenv.FreePort(t), testenv.FreePort(t)
	m, _ := l.startWeb(t, fmt.Sprintf(`[tls]
certificates = %q
[[listener]]
uri = "nbd+unix:///?socket=%s/shared"
[[listener]]
uri = "nbd://127.0.0.1:%d"
[[listener]]
uri = "nbds://127.0.0.1:%d"`, dir, l.dir, plain, port))
	ctx := testenv.Context(t)
	client := func() (c api.Client) {
		t.Helper()
		await(t, func() bool { // the machine ends a connection before the server sees its end
			list, err := l.service.Clients(ctx, nil)
			must(t, err)
			if len(list) == 1 {
				c = list[0]
			}
			return len(list) == 1
		})
		return c
	}
	tls := attach.Source{URI: fmt.Sprintf("nbds://127.0.0.1:%d/web?tls-hostname=localhost", port), Certificates: dir}
	for name, s := range map[string]attach.Source{
		"TLS":                    tls,
		"TCP":                    {URI: fmt.Sprintf("nbd://127.0.0.1:%d/web", plain)},
		"a Unix socket":          {URI: fmt.Sprintf("nbd+unix:///web?socket=%s/shared", l.dir)},
		"a socket of its own":    l.source(l.image(t, "own.img", diskSize)),
		"what attach has chosen": {Export: "web"},
	} {
		t.Run(name, func(t *testing.T) {
			p, err := m.Attach(ctx, s, attach.Options{Model: qmp.SCSIDisk, ID: "d0"})
			do(t, p, err)
			export := "web"
			if s.Image != "" {
				export = ""
			}
			before := client()
			p, err = m.Resize(ctx, "d0", export, attach.Size{Bytes: diskSize, More: true})
			do(t, p, err)
			if after := client(); after.ID == before.ID || after.Via != before.Via || after.TLS != before.TLS || after.Cert != before.Cert {
				t.Errorf("grown, the client came by %s with %q, before by %s with %q", after.Via, after.TLS, before.Via, before.TLS)
			}
			p, err = m.Detach(ctx, "d0", true)
			do(t, p, err)
		})
	}
}

// TestDiskUnderNoNameIsNoExport: the default export may be another by now, whose bytes
// a running guest would get.
func TestDiskUnderNoNameIsNoExport(t *testing.T) {
	t.Parallel()
	l := &lab{dir: testenv.TempDir(t)}
	m, _ := l.startWeb(t, fmt.Sprintf("[[listener]]\nuri = \"nbd+unix:///?socket=%s/shared\"", l.dir))
	ctx := testenv.Context(t)
	unnamed := attach.Source{URI: fmt.Sprintf("nbd+unix:///?socket=%s/shared", l.dir)}
	p, err := m.Attach(ctx, unnamed, attach.Options{Model: qmp.SCSIDisk, ID: "d"})
	do(t, p, err)
	other := addExport("other", l.image(t, "other", diskSize))
	other.Default = true
	_, err = l.service.Add(ctx, other)
	must(t, err)
	for _, export := range []string{"web", "other"} {
		if _, err := m.Attach(ctx, attach.Source{Export: export}, attach.Options{Model: qmp.SCSIDisk}); !errors.Is(err, attach.ErrDiffers) {
			t.Errorf("attach of %s: %v", export, err)
		}
		if _, err := m.Resize(ctx, "d", export, attach.Size{Bytes: 2 * diskSize}); !errors.Is(err, attach.ErrDiffers) {
			t.Errorf("resize with export %s: %v", export, err)
		}
	}
	p, err = m.Attach(ctx, unnamed, attach.Options{Model: qmp.SCSIDisk, ID: "d"})
	if changed := do(t, p, err); changed {
		t.Error("attached again as it is: changed")
	}
}

// TestExportIsOneDiskOfAMachine by whichever of its addresses the machine has it. Its daemon is started again with an address that is
// taken before the one that the disk was attached by.
func TestExportIsOneDiskOfAMachine(t *testing.T) {
	t.Parallel()
	l := &lab{dir: testenv.TempDir(t)}
	dir := testenv.Certificates(t)
	plain, port := testenv.FreePort(t), testenv.FreePort(t)
	tcp := fmt.Sprintf("[tls]\ncertificates = %q\n[[listener]]\nuri = \"nbds://127.0.0.1:%d\"\n", dir, port)
	both := tcp + fmt.Sprintf("[[listener]]\nuri = \"nbd://127.0.0.1:%d\"\n", plain)
	l.startMachine(t, q35...)
	l.startService(t, tcp)
	m := l.machine(t, l.monitor, nil)
	ctx := testenv.Context(t)
	web := addExport("web", l.image(t, "web.img", diskSize))
	web.Persist = true
	_, err := l.service.Add(ctx, web)
	must(t, err)
	named := attach.Source{Export: "web"}
	overTLS := attach.Source{Export: "web", Certificates: dir}
	for name, tt := range map[string]struct {
		before string // configuration when the disk is attached
		s      attach.Source
		id     string
	}{
		"TCP":               {both, named, ""},
		"TLS":               {tcp, overTLS, ""},
		"a name of its own": {both, named, "first"},
		"TLS, a name":       {tcp, overTLS, "first"},
		"a URI":             {both, attach.Source{URI: fmt.Sprintf("nbd://127.0.0.1:%d/web", plain)}, ""},
		"an image":          {both, l.source(l.image(t, "own.img", diskSize)), ""},
	} {
		l.endService()
		l.startService(t, tt.before)
		p, err := m.Attach(ctx, tt.s, attach.Options{Model: qmp.SCSIDisk, ID: tt.id})
		if !do(t, p, err) {
			t.Errorf("%s: nothing was attached", name)
		}
		again, id := named, p.Disk
		if tt.s.Image != "" {
			again.Export = attach.ExportName(m.Name, id)
		} else {
			l.endService()
			l.startService(t, both, fmt.Sprintf("[[listener]]\nuri = \"nbd+unix:///?socket=%s/shared\"", l.dir))
		}
		before := l.state(t, m.Monitor)
		for _, said := range []string{"", id} {
			p, err := m.Attach(ctx, again, attach.Options{ID: said})
			if changed := do(t, p, err); changed || p.Disk != id {
				t.Errorf("%s, attached again as %q: changed %v, disk %q, want %q as it is", name, said, changed, p.Disk, id)
			}
		}
		readOnly := again
		readOnly.ReadOnly = true
		for _, tt := range []struct {
			s attach.Source
			o attach.Options
		}{
			{again, attach.Options{ID: "second"}}, {readOnly, attach.Options{}}, {again, attach.Options{Serial: "OTHER"}},
		} {
			if _, err := m.Attach(ctx, tt.s, tt.o); !errors.Is(err, attach.ErrDiffers) {
				t.Errorf("%s, then %+v: got %v, want it refused", name, tt.o, err)
			}
		}
		if got := l.state(t, m.Monitor); got != before {
			t.Errorf("%s: changed to %s, from %s", name, got, before)
		}
		p, err = m.Detach(ctx, id, true)
		do(t, p, err)
	}
}

// TestDiskGetsWhatEachAdds: two plans are made of a disk before either is run.
func TestDiskGetsWhatEachAdds(t *testing.T) {
	t.Parallel()
	l := start(t, q35...)
	m := l.machine(t, l.monitor, nil)
	ctx := testenv.Context(t)
	p, err := m.Attach(ctx, l.source(l.image(t, "disk", diskSize)), attach.Options{Model: qmp.SCSIDisk, ID: "d0"})
	do(t, p, err)
	eachAdds(t, func() (*attach.Plan, error) { return m.Resize(ctx, "d0", "", attach.Size{Bytes: diskSize, More: true}) })
	l.wantSize(t, m, "d0", 3*diskSize)
}

// eachAdds makes two plans of a disk, then runs both.
func eachAdds(t *testing.T, resize func() (*attach.Plan, error)) {
	t.Helper()
	first, err := resize()
	must(t, err)
	second, err := resize()
	must(t, err)
	for _, p := range []*attach.Plan{first, second} {
		if !do(t, p, nil) {
			t.Errorf("%s: nothing was grown", p.Aim)
		}
	}
}

// TestResizeNeedsAPlaceForASecondClient: an export that is full is not grown, and
// one that has the size already needs none.
func TestResizeNeedsAPlaceForASecondClient(t *testing.T) {
	t.Parallel()
	l := &lab{dir: testenv.TempDir(t)}
	m, image := l.startWeb(t, fmt.Sprintf("[[listener]]\nuri = \"nbd+unix:///?socket=%s/shared\"", l.dir))
	ctx := testenv.Context(t)
	p, err := m.Attach(ctx, attach.Source{Export: "web"}, attach.Options{Model: qmp.SCSIDisk, ID: "d0"})
	do(t, p, err)
	needsAPlace(t, l.service, "web", image, func(size int64) (*attach.Plan, error) {
		return m.Resize(ctx, "d0", "web", attach.Size{Bytes: size})
	})
}

// TestAttachNeedsAPlaceForItsClient: QEMU would try for seconds in its main loop, and
// say that there is no such export. A disk that is there needs none.
func TestAttachNeedsAPlaceForItsClient(t *testing.T) {
	t.Parallel()
	l := &lab{dir: testenv.TempDir(t)}
	first, _ := l.startWeb(t, fmt.Sprintf("[[listener]]\nuri = \"nbd+unix:///?socket=%s/shared\"", l.dir))
	other := &lab{dir: testenv.TempDir(t), service: l.service}
	other.startMachine(t, q35...)
	second := other.machine(t, other.monitor, nil)
	ctx := testenv.Context(t)
	web, o := attach.Source{Export: "web"}, attach.Options{Model: qmp.SCSIDisk, ID: "d0"}
	p, err := first.Attach(ctx, web, o)
	do(t, p, err)
	bound(t, l.service, "web", 1)
	if p, err = first.Attach(ctx, web, o); do(t, p, err) {
		t.Error("the second attach to a machine changed something")
	}
	empty := other.state(t, second.Monitor)
	p, err = second.Attach(ctx, web, o)
	must(t, err)
	if _, err := p.Run(ctx); !errors.Is(err, attach.ErrFull) || errors.Is(err, attach.ErrIncomplete) || !strings.Contains(err.Error(), "max-connections") || other.state(t, second.Monitor) != empty {
		t.Errorf("full: %v, left %s; want ErrFull and nothing", err, other.state(t, second.Monitor))
	}
	gone, err := first.Detach(ctx, "d0", true)
	do(t, gone, err)
	p, err = second.Attach(ctx, web, o)
	do(t, p, err)
}

// bound sets the number of clients that an export takes.
func bound(t *testing.T, c *client.Client, export string, n int) {
	t.Helper()
	_, err := c.Patch(testenv.Context(t), export, api.Patch{Connections: &n})
	must(t, err)
}

// needsAPlace grows a disk whose export has a client.
func needsAPlace(t *testing.T, c *client.Client, export, image string, resize func(int64) (*attach.Plan, error)) {
	t.Helper()
	ctx := testenv.Context(t)
	bound(t, c, export, 1)
	p, err := resize(2 * diskSize)
	if err == nil {
		_, err = p.Run(ctx)
	}
	info, statErr := os.Stat(image)
	must(t, statErr)
	if !errors.Is(err, attach.ErrFull) || errors.Is(err, attach.ErrIncomplete) || !strings.Contains(err.Error(), "max-connections") || info.Size() != diskSize {
		t.Errorf("full: %v, the image has %d bytes; want ErrFull and %d", err, info.Size(), diskSize)
	}
	bound(t, c, export, 2)
	p, err = resize(2 * diskSize)
	if !do(t, p, err) {
		t.Error("nothing was grown")
	}
	await(t, func() bool { // the machine ends a connection before the server sees its end
		x, err := c.Export(ctx, export)
		return err == nil && x.Clients == 1
	})
	bound(t, c, export, 1)
	p, err = resize(2 * diskSize)
	if do(t, p, err) {
		t.Error("growing to the size that is there changed something")
	}
}

// TestDiskIsFoundByAPathWithALink as the kernel follows that, and Attach got it.
func TestDiskIsFoundByAPathWithALink(t *testing.T) {
	t.Parallel()
	l := start(t, q35...)
	m := l.machine(t, l.monitor, nil)
	ctx := testenv.Context(t)
	image := l.image(t, "disk", diskSize)
	link := filepath.Join(t.TempDir(), "link")
	must(t, os.Mkdir(filepath.Join(l.dir, "sub"), 0o700))
	must(t, os.Symlink(filepath.Join(l.dir, "sub"), link))
	p, err := m.Attach(ctx, l.source(image), attach.Options{Model: qmp.SCSIDisk})
	do(t, p, err)
	if id, err := m.Resolve(ctx, link+"/../disk"); err != nil || id != attach.DiskID(image) {
		t.Errorf("resolved as %q, %v, want %s", id, err, attach.DiskID(image))
	}
	if id, err := m.Resolve(ctx, "none/../disk"); !errors.Is(err, attach.ErrNoDisk) {
		t.Errorf("a folder that is not there: resolved as %q, %v", id, err)
	}
}

// TestFileThatWasReplacedIsNotServed: the export of a machine that ended without a
// detach has the file that was at the path then, and another is there now.
func TestFileThatWasReplacedIsNotServed(t *testing.T) {
	t.Parallel()
	l := &lab{dir: testenv.TempDir(t)}
	l.startService(t)
	end := l.startMachine(t, q35...)
	ctx := testenv.Context(t)
	s, o := l.source(l.image(t, "disk", diskSize)), attach.Options{Model: qmp.SCSIDisk, ID: "d0"}
	p, err := l.machine(t, l.monitor, nil).Attach(ctx, s, o)
	do(t, p, err)
	end()
	must(t, os.Rename(l.image(t, "restored", 3*diskSize), s.Image))
	l.startMachine(t, q35...)
	m := l.machine(t, l.monitor, nil)
	p, err = m.Attach(ctx, s, o)
	if err == nil {
		_, err = p.Run(ctx)
	}
	if !errors.Is(err, attach.ErrDiffers) || !strings.Contains(err.Error(), "not the one") {
		t.Fatalf("got %v, want ErrDiffers", err)
	}
	p, err = m.Detach(ctx, "d0", false)
	do(t, p, err)
	p, err = m.Attach(ctx, s, o)
	do(t, p, err)
	if x, err := l.service.Exports(ctx); err != nil || len(x) != 1 || x[0].Size != 3*diskSize {
		t.Errorf("exports %+v, %v, want one of %d bytes", x, err, 3*diskSize)
	}
}

// TestDiskWithANameIsFoundByWhatItIs gives disks names, and looks for them by
// their image, the image below a snapshot, their export and their URI.
func TestDiskWithANameIsFoundByWhatItIs(t *testing.T) {
	t.Parallel()
	l := &lab{dir: testenv.TempDir(t)}
	m, _ := l.startWeb(t, fmt.Sprintf("[[listener]]\nuri = \"nbd+unix:///?socket=%s/shared\"", l.dir))
	ctx := testenv.Context(t)
	s := testenv.Start(t, testenv.Options{Image: testenv.PatternImage(t, diskSize), ReadOnly: true})
	own := l.image(t, "own.img", diskSize)
	uri := "nbd+unix:///?socket=" + s.Socket
	words := map[string]string{"own": own, "foreign": "web", "remote": uri}
	for id, source := range map[string]attach.Source{
		"own": l.source(own), "foreign": {Export: "web"}, "remote": {URI: uri, ReadOnly: true},
	} {
		p, err := m.Attach(ctx, source, attach.Options{Model: qmp.SCSIDisk, ID: id})
		do(t, p, err)
	}
	for range 2 {
		for id, word := range words {
			if got, err := m.Resolve(ctx, word); err != nil || got != id {
				t.Errorf("%s: resolved as %q, %v, want %s", word, got, err, id)
			}
		}
		p, err := m.Snapshot(ctx, "own", "", filepath.Join(l.dir, "overlay"), false)
		must(t, err)
		_, _ = p.Run(ctx) // the second time it is there
	}
	if _, err := m.Resolve(ctx, "other"); !errors.Is(err, attach.ErrNoDisk) || !strings.Contains(err.Error(), "foreign, own, remote") {
		t.Errorf("a disk that is not there: %v", err)
	}
}

// TestDetachEndsWhatAnEarlierOneHasBegun stops after each of its steps.
func TestDetachEndsWhatAnEarlierOneHasBegun(t *testing.T) {
	t.Parallel()
	l := start(t, q35...)
	m := l.machine(t, l.monitor, nil)
	ctx := testenv.Context(t)
	image := l.image(t, "disk", diskSize)
	empty := l.state(t, m.Monitor)
	for stop := range 4 {
		p, err := m.Attach(ctx, l.source(image), attach.Options{Model: qmp.SCSIDisk})
		do(t, p, err)
		p, err = m.Detach(ctx, p.Disk, false)
		must(t, err)
		p.Steps = p.Steps[:stop]
		do(t, p, nil)
		id, err := m.Resolve(ctx, image)
		must(t, err)
		p, err = m.Detach(ctx, id, false)
		if do(t, p, err); l.state(t, m.Monitor) != empty {
			t.Errorf("stopped after %d steps: left %s", stop, l.state(t, m.Monitor))
		}
	}
}

// TestTokenIsInNoPlan: plans and their errors go to terminals and logs.
func TestTokenIsInNoPlan(t *testing.T) {
	t.Parallel()
	l := &lab{dir: testenv.TempDir(t)}
	m, _ := l.startWeb(t, fmt.Sprintf("[[listener]]\nuri = \"nbd+unix:///?socket=%s/shared\"", l.dir))
	ctx := testenv.Context(t)
	token := strings.Repeat("a1", limits.TokenDigits/2)
	for name, there := range map[string]bool{"web": true, "other": false} {
		p, err := m.Attach(ctx, attach.Source{URI: fmt.Sprintf("nbd+unix:///%s%%3F%s?socket=%s/shared", name, token, l.dir)}, attach.Options{Model: qmp.SCSIDisk})
		must(t, err)
		_, err = p.Run(ctx)
		if text := fmt.Sprintf("%+v: %v", *p, err); (err == nil) != there || strings.Contains(text, token) {
			t.Errorf("attach of %s: %s", name, text)
		}
	}
}

// TestDiskThatCameWithATokenIsItsExport to the commands that name the export.
func TestDiskThatCameWithATokenIsItsExport(t *testing.T) {
	t.Parallel()
	l := &lab{dir: testenv.TempDir(t)}
	m, _ := l.startWeb(t, fmt.Sprintf("[[listener]]\nuri = \"nbd+unix:///?socket=%s/shared\"", l.dir))
	ctx := testenv.Context(t)
	token := strings.Repeat("a1", limits.TokenDigits/2)
	with := attach.Source{URI: fmt.Sprintf("nbd+unix:///web%%3F%s?socket=%s/shared", token, l.dir)}
	o := attach.Options{Model: qmp.SCSIDisk, ID: "d"}
	p, err := m.Attach(ctx, with, o)
	do(t, p, err)
	for _, s := range []attach.Source{with, {Export: "web"}} {
		p, err := m.Attach(ctx, s, o)
		must(t, err)
		if do(t, p, nil) {
			t.Error("the second attach changed something")
		}
	}
	x, err := m.Server.Export(ctx, "web")
	must(t, err)
	p, err = m.Resize(ctx, "d", "web", attach.Size{Bytes: diskSize, More: true})
	do(t, p, err)
	list, err := qmp.QueryNamedBlockNodes(ctx, m.Monitor)
	must(t, err)
	if !slices.ContainsFunc(list, func(n qmp.Node) bool { return n.Driver == "nbd" && n.Image.VirtualSize == x.Size+diskSize }) {
		t.Errorf("the machine has %+v, want a client of %d bytes", list, x.Size+diskSize)
	}
}

// TestSecondDetachWaitsForTheGuestToo has been asked by the first.
func TestSecondDetachWaitsForTheGuestToo(t *testing.T) {
	t.Parallel()
	l := start(t, q35...)
	m := l.machine(t, l.monitor, nil)
	ctx := testenv.Context(t)
	empty := l.state(t, m.Monitor)
	p, err := m.Attach(ctx, l.source(l.image(t, "disk", diskSize)), attach.Options{Model: qmp.VirtIOBlk, ID: "d"})
	do(t, p, err)
	for range 2 {
		impatient, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		p, err = m.Detach(ctx, "d", false)
		must(t, err)
		if _, err := p.Run(impatient); !errors.Is(err, qmp.ErrNotReleased) {
			t.Errorf("detach of a guest that does nothing: %v, want %v", err, qmp.ErrNotReleased)
		}
	}
	released := make(chan error)
	p, err = m.Detach(ctx, "d", false)
	must(t, err)
	go func() {
		_, err := p.Run(ctx)
		released <- err
	}()
	_, err = m.Monitor.Execute(ctx, "system_reset", nil)
	must(t, err)
	must(t, <-released)
	if got := l.state(t, m.Monitor); got != empty {
		t.Errorf("left %s", got)
	}
}

// TestDetachAsksAgainWhileTheGuestIsBusy taking the device in: its power indicator blinks.
func TestDetachAsksAgainWhileTheGuestIsBusy(t *testing.T) {
	t.Parallel()
	l := start(t, "-machine", "q35", "-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off",
		"-device", "pcie-root-port,id=rp1,chassis=1,slot=1,addr=2.0")
	m := l.machine(t, l.monitor, nil)
	ctx := testenv.Context(t)
	empty := l.state(t, m.Monitor)
	p, err := m.Attach(ctx, l.source(l.image(t, "disk", diskSize)), attach.Options{Model: qmp.VirtIOBlk, ID: "d"})
	do(t, p, err)
	slotControl := func(value int) {
		for _, line := range []string{"o/w 0xcf8 0x8000106c", fmt.Sprintf("o/h 0xcfc %#x", value)} {
			if _, err := m.Monitor.Execute(ctx, "human-monitor-command", map[string]any{"command-line": line}); err != nil {
				t.Errorf("%s: %v", line, err)
			}
		}
	}
	const blinks, on, off = 0x200, 0x100, 0x700 // off: power too
	slotControl(blinks)
	impatient, cancel := context.WithTimeout(ctx, 2*limits.AttachPoll)
	defer cancel()
	p, err = m.Detach(ctx, "d", false)
	must(t, err)
	if _, err := p.Run(impatient); !qmp.HasClass(err, qmp.ClassGeneric) || !strings.Contains(err.Error(), "guest is busy") {
		t.Errorf("detach while the power indicator blinks: %v, want what QEMU says", err)
	}
	released := make(chan error)
	go func() {
		_, err := p.Run(ctx)
		released <- err
	}()
	for _, value := range []int{on, off} {
		<-time.After(5 * limits.AttachPoll)
		slotControl(value)
	}
	must(t, <-released)
	if got := l.state(t, m.Monitor); got != empty {
		t.Errorf("left %s", got)
	}
}

// TestPoisonedDiskIsDetached as any other: that its last writes are lost is known.
func TestPoisonedDiskIsDetached(t *testing.T) {
	t.Parallel()
	l := start(t, q35...)
	m := l.machine(t, l.monitor, nil)
	ctx := testenv.Context(t)
	empty := l.state(t, m.Monitor)
	image := filepath.Join(l.dir, "q.qcow2")
	testenv.SparseQcow2(t, image)
	source := l.source(image)
	source.Add.Format = "qcow2"
	p, err := m.Attach(ctx, source, attach.Options{Model: qmp.SCSIDisk, ID: "q"})
	do(t, p, err)
	testenv.SpoilQcow2(t, image)
	guestIO(t, m, "q", "write 2G 64k")
	await(t, func() bool {
		x, err := l.service.Export(ctx, attach.ExportName(m.Name, "q"))
		return err == nil && x.State == api.StatePoisoned
	})
	p, err = m.Detach(ctx, "q", false)
	if do(t, p, err); l.state(t, m.Monitor) != empty {
		t.Errorf("left %s", l.state(t, m.Monitor))
	}
}

// TestPausedDiskStaysAsItIs: QEMU reads from a new disk and flushes an old one in its
// main loop, and the whole guest would stand still until the end of the pause. A disk
// that is paused while it is being detached is left to a second detach.
func TestPausedDiskStaysAsItIs(t *testing.T) {
	t.Parallel()
	l := &lab{dir: testenv.TempDir(t)}
	m, _ := l.startWeb(t, fmt.Sprintf("[[listener]]\nuri = \"nbd+unix:///?socket=%s/shared\"", l.dir))
	ctx := testenv.Context(t)
	o := attach.Options{Model: qmp.SCSIDisk, ID: "d"}
	empty := l.state(t, m.Monitor)
	for export, s := range map[string]attach.Source{
		"web": {Export: "web"}, attach.ExportName(m.Name, "d"): l.source(l.image(t, "own", diskSize)),
	} {
		p, err := m.Attach(ctx, s, o)
		do(t, p, err)
		there := l.state(t, m.Monitor)
		must(t, l.service.Pause(ctx, export, 0))
		for what, plan := range map[string]func() (*attach.Plan, error){
			"attach":   func() (*attach.Plan, error) { return m.Attach(ctx, s, o) },
			"detach":   func() (*attach.Plan, error) { return m.Detach(ctx, "d", true) },
			"resize":   func() (*attach.Plan, error) { return m.Resize(ctx, "d", export, attach.Size{Bytes: diskSize}) },
			"snapshot": func() (*attach.Plan, error) { return m.Snapshot(ctx, "d", export, l.dir+"/overlay", false) },
		} {
			p, err := plan()
			if err == nil {
				_, err = p.Run(ctx)
			}
			if !errors.Is(err, attach.ErrPaused) || errors.Is(err, attach.ErrIncomplete) || l.state(t, m.Monitor) != there {
				t.Errorf("%s of %s: %v, left %s", what, export, err, l.state(t, m.Monitor))
			}
		}
		must(t, l.service.Resume(ctx, export))
		p, err = m.Detach(ctx, "d", true)
		must(t, err)
		before(p, 1, func() { must(t, l.service.Pause(ctx, export, 0)) }) // the device is gone
		if _, err := p.Run(ctx); !errors.Is(err, attach.ErrPaused) || !errors.Is(err, attach.ErrIncomplete) {
			t.Errorf("detach of %s, which was paused meanwhile: %v", export, err)
		}
		must(t, l.service.Resume(ctx, export))
		p, err = m.Detach(ctx, "d", true)
		if do(t, p, err); l.state(t, m.Monitor) != empty {
			t.Errorf("left %s", l.state(t, m.Monitor))
		}
	}
	must(t, l.service.Pause(ctx, "web", 0))
	if _, err := m.Attach(ctx, attach.Source{Export: "web"}, o); !errors.Is(err, attach.ErrPaused) {
		t.Errorf("attach of an export that is paused: %v", err)
	}
}

func TestMachineWithoutAPlaceIsToldBeforeAnythingIsDone(t *testing.T) {
	t.Parallel()
	l := start(t, "-machine", "q35")
	m := l.machine(t, l.monitor, nil)
	image := l.image(t, "disk", diskSize)
	for model, want := range map[qmp.Model]error{qmp.VirtIOBlk: qmp.ErrNoPCIPlace, qmp.NVMe: qmp.ErrNoPCIPlace, qmp.SCSIDisk: qmp.ErrNoSCSIPlace} {
		if _, err := m.Attach(testenv.Context(t), l.source(image), attach.Options{Model: model}); !errors.Is(err, want) {
			t.Errorf("%s: %v", model, err)
		}
	}
}

// TestImageIsPassedAsADescriptor serves an image that lies outside of the
// service's folders.
func TestImageIsPassedAsADescriptor(t *testing.T) {
	t.Parallel()
	l := start(t, q35...)
	m := l.machine(t, l.monitor, nil)
	ctx := testenv.Context(t)
	// The configuration takes no name with such characters; with a descriptor
	// none is needed.
	s := l.source(filepath.Join(testenv.TempDir(t), oddName+"\n\x1b[2J"))
	must(t, testenv.CreatePattern(s.Image, diskSize))
	p, err := m.Attach(ctx, s, attach.Options{Model: qmp.SCSIDisk})
	must(t, err)
	if _, err := p.Run(ctx); err == nil || errors.Is(err, attach.ErrIncomplete) {
		t.Errorf("by its path: %v", err)
	}
	f, err := os.OpenFile(s.Image, os.O_RDWR, 0)
	must(t, err)
	defer f.Close()
	s.Add.Image, s.Files = "fd:0", []*os.File{f}
	for _, want := range []bool{true, false} {
		p, err := m.Attach(ctx, s, attach.Options{Model: qmp.SCSIDisk})
		if do(t, p, err) != want {
			t.Errorf("changed is not %v", want)
		}
	}
}

// TestDiskOfAnotherServerIsPluggedByItsURI needs no control socket.
func TestDiskOfAnotherServerIsPluggedByItsURI(t *testing.T) {
	t.Parallel()
	l := start(t, q35...)
	m := l.machine(t, l.monitor, nil)
	m.Server = nil
	ctx := testenv.Context(t)
	s := testenv.Start(t, testenv.Options{Image: testenv.PatternImage(t, diskSize), ReadOnly: true})
	source := attach.Source{URI: "nbd+unix:///?socket=" + s.Socket, ReadOnly: true}
	p, err := m.Attach(ctx, source, attach.Options{Model: qmp.SCSIDisk})
	do(t, p, err)
	id, err := m.Resolve(ctx, source.URI)
	must(t, err)
	if _, err := m.Resize(ctx, id, "", attach.Size{Bytes: 1, More: true}); !errors.Is(err, attach.ErrNoServer) {
		t.Errorf("resize: %v", err)
	}
	p, err = m.Detach(ctx, id, false)
	if !do(t, p, err) || l.state(t, m.Monitor) != "" {
		t.Errorf("left %s", l.state(t, m.Monitor))
	}
	for _, uri := range []string{"nbds://localhost/", "nbd+unix:///?socket=/x&tls-hostname=a", "http://x/", "nbd+unix:///"} {
		if _, err := m.Attach(ctx, attach.Source{URI: uri}, attach.Options{Model: qmp.SCSIDisk}); !errors.Is(err, qmp.ErrInvalid) {
			t.Errorf("%s: %v", uri, err)
		}
	}
}
