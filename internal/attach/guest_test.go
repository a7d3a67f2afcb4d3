package attach_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/attach"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/qmp"
	"github.com/vmdiskd/vmdiskd/internal/qmp/qmptest"
	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// guest is a scripted agent.
type guest struct {
	*qmp.Agent

	mu    sync.Mutex
	calls []string          // guarded by mu
	says  map[string]string // guarded by mu; by command, whole replies
}

func startGuest(t *testing.T, says map[string]string) *guest {
	t.Helper()
	g := &guest{says: says}
	path := qmptest.Listen(t, func(c *qmptest.Conn) {
		for {
			cmd, ok := c.Next()
			if !ok {
				return
			}
			if cmd.Execute == "guest-sync-delimited" {
				var a struct{ ID int64 }
				json.Unmarshal(cmd.Arguments, &a)
				c.Say("\xff" + fmt.Sprintf(`{"return": %d}`, a.ID))
				continue
			}
			c.Say(g.answer(cmd.Execute))
		}
	})
	var err error
	g.Agent, err = qmp.DialAgent(testenv.Context(t), path)
	must(t, err)
	t.Cleanup(func() { g.Agent.Close() })
	return g
}

func (g *guest) answer(command string) string {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.calls = append(g.calls, command)
	if s, ok := g.says[command]; ok {
		return s
	}
	return `{"error": {"class": "CommandNotFound", "desc": "no"}}`
}

func (g *guest) count(command string) (n int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, c := range g.calls {
		if c == command {
			n++
		}
	}
	return n
}

// mountedAs is a guest's answer with a file system on a disk.
func mountedAs(serial string) string {
	return fmt.Sprintf(`{"return": [{"name": "sda", "mountpoint": "/mnt\n", "type": "ext4", "disk": [{"serial": %q, "bus-type": "scsi"}]}]}`, serial)
}

func TestMountedDiskIsNotDetached(t *testing.T) {
	t.Parallel()
	l := start(t, q35...)
	var notes []string
	m := l.machine(t, l.monitor, &notes)
	ctx := testenv.Context(t)
	p, err := m.Attach(ctx, l.source(l.image(t, "disk", diskSize)), attach.Options{Model: qmp.SCSIDisk, ID: "d0", Serial: "S1"})
	do(t, p, err)
	for serial, mounted := range map[string]bool{"S1": true, "QEMU_QEMU_HARDDISK_S1": true, "QEMU_NVMe_Ctrl_S1_1": true, "S12": false, "S1_1": false, "QEMU_NVMe_Ctrl_S1_2": false, "": false} {
		m.Agent = startGuest(t, map[string]string{"guest-get-fsinfo": mountedAs(serial)}).Agent
		p, err := m.Detach(ctx, "d0", false)
		must(t, err)
		look := &attach.Plan{Steps: p.Steps[:1]}
		if _, err := look.Run(ctx); errors.Is(err, attach.ErrMounted) != mounted || (err != nil) != mounted {
			t.Errorf("mounted with serial number %q: %v", serial, err)
		}
	}
	m.Agent = startGuest(t, map[string]string{"guest-get-fsinfo": mountedAs("S1")}).Agent
	before := l.state(t, m.Monitor)
	p, err = m.Detach(ctx, "d0", false)
	must(t, err)
	if _, err := p.Run(ctx); !errors.Is(err, attach.ErrMounted) || l.state(t, m.Monitor) != before {
		t.Errorf("detach of a mounted disk: %v", err)
	}
	m.Agent = startGuest(t, nil).Agent
	notes = nil
	p, err = m.Detach(ctx, "d0", false)
	do(t, p, err)
	if len(notes) != 1 || !strings.Contains(notes[0], "could not be checked") {
		t.Errorf("notes %q", notes)
	}
}

// TestMountedDiskWithALongSerialNumberIsNotDetached: guests know a SCSI disk by
// an identifier that QEMU makes of 20 characters of its serial number. Attach
// gives it the whole, and a disk that has less is found too.
func TestMountedDiskWithALongSerialNumberIsNotDetached(t *testing.T) {
	t.Parallel()
	const serial, cut = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789", "ABCDEFGHIJKLMNOPQRST"
	l := start(t, q35...)
	m := l.machine(t, l.monitor, nil)
	ctx := testenv.Context(t)
	for id, identifier := range map[string]string{"d0": serial, "d1": cut} {
		p, err := m.Attach(ctx, l.source(l.image(t, id, diskSize)), attach.Options{Model: qmp.SCSIDisk, ID: id, Serial: serial})
		must(t, err)
		if identifier == cut { // as with versions that did not say it
			p.Steps = p.Steps[:3]
			do(t, p, nil)
			nodes, err := qmp.QueryNamedBlockNodes(ctx, m.Monitor)
			must(t, err)
			used := slices.IndexFunc(nodes, func(n qmp.Node) bool {
				return n.Driver == "raw" && !strings.Contains(l.state(t, m.Monitor), "disk d0 "+n.Name+"\n")
			})
			_, err = m.Monitor.Execute(ctx, "device_add", map[string]any{"driver": "scsi-hd", "id": id, "drive": nodes[used].Name, "bus": "scsi0.0", "scsi-id": 5, "serial": serial})
			must(t, err)
		} else {
			do(t, p, nil)
		}
		out, err := m.Monitor.Execute(ctx, "qom-get", map[string]any{"path": "/machine/peripheral/" + id, "property": "device_id"})
		if err != nil || string(out) != `"`+identifier+`"` {
			t.Fatalf("identifier of %s: %s, %v", id, out, err)
		}
		m.Agent = startGuest(t, map[string]string{"guest-get-fsinfo": mountedAs("0QEMU_QEMU_HARDDISK_" + identifier)}).Agent
		p, err = m.Detach(ctx, id, false)
		must(t, err)
		if _, err := p.Run(ctx); !errors.Is(err, attach.ErrMounted) {
			t.Errorf("%s: %v", id, err)
		}
	}
}

// TestFrozenGuestIsThawedWhateverHappens makes snapshots that work, that fail,
// and that are interrupted.
func TestFrozenGuestIsThawedWhateverHappens(t *testing.T) {
	t.Parallel()
	l := start(t, q35...)
	m := l.machine(t, l.monitor, nil)
	ctx := testenv.Context(t)
	image := l.image(t, "disk", diskSize)
	p, err := m.Attach(ctx, l.source(image), attach.Options{Model: qmp.SCSIDisk, ID: "d0"})
	do(t, p, err)
	frozen := map[string]string{"guest-fsfreeze-freeze": `{"return": 2}`, "guest-fsfreeze-thaw": `{"return": 2}`}
	for _, tt := range []struct {
		name      string
		says      map[string]string
		must      bool
		overlay   string
		interrupt bool
		fails     bool
		thaws     int
	}{
		{name: "works", says: frozen, overlay: "o1", thaws: 1},
		{name: "is there already", says: frozen, overlay: "o1", fails: true, thaws: 1},
		{name: "interrupted", says: frozen, overlay: "o2", interrupt: true, fails: true, thaws: 1},
		{name: "cannot freeze", says: nil, overlay: "o3"},
		{name: "cannot freeze and must", says: nil, overlay: "o4", must: true, fails: true},
		{name: "freezes a part", says: map[string]string{"guest-fsfreeze-freeze": `{"error": {"class": "GenericError", "desc": "no"}}`, "guest-fsfreeze-thaw": `{"return": 1}`}, overlay: "o4", must: true, fails: true, thaws: 1},
		{name: "does not thaw", says: map[string]string{"guest-fsfreeze-freeze": `{"return": 2}`, "guest-fsfreeze-thaw": `{"error": {"class": "GenericError", "desc": "no"}}`}, overlay: "o5", fails: true, thaws: 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := startGuest(t, tt.says)
			m.Agent = g.Agent
			ctx, cancel := context.WithCancel(ctx)
			defer cancel()
			p, err := m.Snapshot(ctx, "d0", "", filepath.Join(l.dir, tt.overlay), tt.must)
			must(t, err)
			if freeze := p.Steps[0].Do; tt.interrupt {
				p.Steps[0].Do = func(ctx context.Context) (bool, error) {
					defer cancel()
					return freeze(ctx)
				}
			}
			if _, err = p.Run(ctx); (err != nil) != tt.fails {
				t.Errorf("snapshot: %v", err)
			}
			if n := g.count("guest-fsfreeze-thaw"); n != tt.thaws {
				t.Errorf("thawed %d times", n)
			}
		})
	}
	x, err := l.service.Export(ctx, attach.ExportName(m.Name, "d0"))
	if err != nil || x.Image != filepath.Join(l.dir, "o5") || x.Clients != 1 {
		t.Errorf("export %+v, %v", x, err)
	}
	for name, want := range map[string]bool{"o1": true, "o2": false, "o3": true, "o4": false, "o5": true} {
		if _, err := os.Stat(filepath.Join(l.dir, name)); (err == nil) != want {
			t.Errorf("overlay %s: %v", name, err)
		}
	}
	m.Agent = nil
	if _, err := m.Snapshot(ctx, "d0", "", filepath.Join(l.dir, "o6"), true); !errors.Is(err, qmp.ErrNoAgent) {
		t.Errorf("freeze without an agent: %v", err)
	}
}

// TestGuestThatOthersHaveFrozenStaysSo, also where its agent does not say it.
// What an agent of a frozen guest refuses is QEMU's own (qga/main.c).
func TestGuestThatOthersHaveFrozenStaysSo(t *testing.T) {
	t.Parallel()
	l := start(t, q35...)
	var notes []string
	m := l.machine(t, l.monitor, &notes)
	ctx := testenv.Context(t)
	p, err := m.Attach(ctx, l.source(l.image(t, "disk", diskSize)), attach.Options{Model: qmp.SCSIDisk, ID: "d0"})
	do(t, p, err)
	const disabled = `{"error": {"class": "CommandNotFound", "desc": "Command guest-fsfreeze-freeze has been disabled: the agent is in frozen state"}}`
	theirs := map[string]string{"guest-fsfreeze-status": `{"return": "frozen"}`, "guest-fsfreeze-freeze": disabled, "guest-fsfreeze-thaw": `{"return": 2}`}
	silent := map[string]string{"guest-fsfreeze-freeze": disabled, "guest-fsfreeze-thaw": `{"return": 2}`}
	nothing := map[string]string{"guest-fsfreeze-status": `{"return": "thawed"}`, "guest-fsfreeze-freeze": `{"return": 0}`, "guest-fsfreeze-thaw": `{"return": 0}`}
	odd := map[string]string{"guest-fsfreeze-status": `{"return": "\u001b[2J"}`, "guest-fsfreeze-thaw": `{"return": 2}`}
	errRefused := errors.New("a refusal of class CommandNotFound")
	for i, tt := range []struct {
		name  string
		says  map[string]string
		must  bool
		want  error
		note  string
		thaws int
	}{
		{"theirs", theirs, false, nil, "by somebody else", 0},
		{"theirs, and must", theirs, true, nil, "by somebody else", 0},
		{"theirs, unsaid", silent, false, nil, "a crash would leave", 0},
		{"theirs, unsaid, and must", silent, true, errRefused, "", 0},
		{"nothing", nothing, false, nil, "a crash would leave", 1},
		{"nothing, and must", nothing, true, attach.ErrNotFrozen, "", 1},
		{"neither frozen nor thawed", odd, false, nil, `\\x1b`, 0},
		{"neither frozen nor thawed, and must", odd, true, qmp.ErrProtocol, "", 0},
	} {
		g := startGuest(t, tt.says)
		m.Agent, notes = g.Agent, nil
		p, err := m.Snapshot(ctx, "d0", "", filepath.Join(l.dir, fmt.Sprint("o", i)), tt.must)
		must(t, err)
		_, err = p.Run(ctx)
		if tt.want == errRefused && qmp.HasClass(err, qmp.ClassCommandNotFound) {
			err = errRefused
		}
		if !errors.Is(err, tt.want) || errors.Is(err, attach.ErrIncomplete) {
			t.Errorf("%s: got %v, want %v", tt.name, err, tt.want)
		}
		if said := strings.Join(notes, "\n"); !strings.Contains(said, tt.note) || tt.note == "" && said != "" {
			t.Errorf("%s: notes %q, want %q", tt.name, said, tt.note)
		}
		if n := g.count("guest-fsfreeze-thaw"); n != tt.thaws {
			t.Errorf("%s: thawed %d times, want %d", tt.name, n, tt.thaws)
		}
	}
}

// busyAgent freezes without a reply, and does not answer the next times.
type busyAgent struct{ busy, thawed int }

func (a *busyAgent) Execute(_ context.Context, command string, _ any, _ ...*os.File) (json.RawMessage, error) {
	switch {
	case command == "guest-fsfreeze-status":
		return json.RawMessage(`"thawed"`), nil
	case command == "guest-fsfreeze-freeze":
		return nil, fmt.Errorf("%s: %w", command, qmp.ErrUnanswered)
	case a.busy > 0:
		a.busy--
		return nil, []error{qmp.ErrNoAgent, qmp.ErrUnanswered}[a.busy%2]
	}
	a.thawed++
	return json.RawMessage("2"), nil
}

// TestGuestIsThawedOnceItsAgentAnswers: an agent that still freezes when the
// user has enough does not answer.
func TestGuestIsThawedOnceItsAgentAnswers(t *testing.T) {
	t.Parallel()
	l := start(t, q35...)
	m := l.machine(t, l.monitor, nil)
	ctx := testenv.Context(t)
	p, err := m.Attach(ctx, l.source(l.image(t, "disk", diskSize)), attach.Options{Model: qmp.SCSIDisk, ID: "d0"})
	do(t, p, err)
	a := &busyAgent{busy: 4}
	m.Agent = a
	p, err = m.Snapshot(ctx, "d0", "", filepath.Join(l.dir, "overlay"), false)
	must(t, err)
	if _, err := p.Run(ctx); !errors.Is(err, qmp.ErrUnanswered) || errors.Is(err, attach.ErrIncomplete) || a.thawed != 1 {
		t.Errorf("thawed %d times: %v", a.thawed, err)
	}
}

// running is a scripted machine that runs and has the disk d0 with the node.
func running(node string) map[string]string {
	return map[string]string{
		"query-block":             fmt.Sprintf(`[{"device": "", "qdev": "d0", "inserted": {"node-name": %q, "drv": "raw", "ro": false, "image": {"virtual-size": 4096}}}]`, node),
		"query-named-block-nodes": fmt.Sprintf(`[{"node-name": %q, "drv": "raw", "ro": false, "image": {"virtual-size": 4096}}]`, node),
		"query-status":            `{"running": true, "status": "running"}`,
	}
}

// scripted connects to a machine of a script.
func scripted(t *testing.T, script func(c *qmptest.Conn), notes *[]string) *attach.Machine {
	t.Helper()
	m, err := qmp.Dial(testenv.Context(t), qmptest.Listen(t, script))
	must(t, err)
	t.Cleanup(func() { m.Close() })
	return &attach.Machine{Name: "vm", Monitor: m, Note: func(s string) { *notes = append(*notes, s) }}
}

// TestGuestIsAskedForTheDisk has guests that show it, late or never.
func TestGuestIsAskedForTheDisk(t *testing.T) {
	t.Parallel()
	l := start(t, q35...)
	var notes []string
	m := l.machine(t, l.monitor, &notes)
	ctx := testenv.Context(t)
	source := l.source(l.image(t, "disk", diskSize))
	o := attach.Options{Model: qmp.SCSIDisk, ID: "d0", Serial: "S1"}
	p, err := m.Attach(ctx, source, o)
	do(t, p, err)
	if !strings.Contains(strings.Join(notes, "\n"), "does not run (prelaunch)") {
		t.Errorf("notes of a machine that does not run: %q", notes)
	}
	_, err = m.Monitor.Execute(ctx, "cont", nil)
	must(t, err)
	for answer, want := range map[string]string{
		`{"return": [{"name": "/dev/sda", "address": {"serial": "S1"}}]}`:                "the guest has the disk",
		`{"return": [{"name": "/dev/sda", "address": {"serial": "0QEMU_HARDDISK_S1"}}]}`: "the guest has the disk",
		`{"return": {"name": 1}}`: "could not be asked",
		`{"error": {"class": "CommandNotFound", "desc": "\u001b[2J no"}}`:               "could not be asked",
		`{"return": [{"name": "` + strings.Repeat("x", 5<<20) + `", "address": null}]}`: "could not be asked",
	} {
		notes = nil
		m.Agent = startGuest(t, map[string]string{"guest-get-disks": answer}).Agent
		p, err := m.Attach(ctx, source, o)
		if do(t, p, err) || len(notes) != 1 || !strings.Contains(notes[0], want) {
			t.Errorf("%.80s: notes %.200q", answer, notes)
		}
	}
	// A guest that never shows it is waited for no longer than the user does.
	m.Agent = startGuest(t, map[string]string{"guest-get-disks": `{"return": []}`}).Agent
	short, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
	defer cancel()
	p, err = m.Attach(ctx, source, o)
	must(t, err)
	if _, err := p.Run(short); !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, attach.ErrIncomplete) {
		t.Errorf("interrupted: %v", err)
	}
}

// TestGuestIsAskedForTheDiskThatIsThere by what that is, not by what it would be if
// it were plugged now.
func TestGuestIsAskedForTheDiskThatIsThere(t *testing.T) {
	t.Parallel()
	l := start(t, q35...)
	var notes []string
	m := l.machine(t, l.monitor, &notes)
	ctx := testenv.Context(t)
	source := l.source(l.image(t, "disk", diskSize))
	p, err := m.Attach(ctx, source, attach.Options{Model: qmp.SCSIDisk, ID: "d0", Serial: "S1"})
	do(t, p, err)
	_, err = m.Monitor.Execute(ctx, "cont", nil)
	must(t, err)
	notes = nil
	m.Agent = startGuest(t, map[string]string{"guest-get-disks": `{"return": [{"name": "/dev/sda", "address": {"serial": "S1"}}]}`}).Agent
	p, err = m.Attach(ctx, source, attach.Options{ID: "d0"})
	must(t, err)
	var plan strings.Builder
	must(t, p.Print(&plan))
	if want := `device d0, scsi-hd with serial number "S1"`; !strings.Contains(plan.String(), want) {
		t.Errorf("plan %s, want %s", plan.String(), want)
	}
	if do(t, p, nil) || len(notes) != 1 || notes[0] != "the guest has the disk" {
		t.Errorf("notes %q", notes)
	}
}

// TestHostileMachinesAreNoHarm talks to monitors that lie or fall silent.
func TestHostileMachinesAreNoHarm(t *testing.T) {
	t.Parallel()
	source := attach.Source{URI: "nbd+unix:///?socket=/none"}
	o := attach.Options{ID: "d0", Model: qmp.VirtIOBlk}
	for name, tt := range map[string]struct {
		script func(c *qmptest.Conn)
		want   error
	}{
		"another disk": {func(c *qmptest.Conn) { c.Handshake(); c.Table(running("other"), nil) }, attach.ErrDiffers},
		"no JSON":      {func(c *qmptest.Conn) { c.Handshake(); c.Next(); c.Say("{]") }, qmp.ErrProtocol},
		"leaves":       {func(c *qmptest.Conn) { c.Handshake(); c.Next() }, qmp.ErrLost},
		"lists too much": {func(c *qmptest.Conn) {
			c.Handshake()
			c.Table(map[string]string{"query-block": "[" + strings.Repeat(`{"qdev":"x"},`, 20000) + "{}]"}, nil)
		}, qmp.ErrProtocol},
		"wrong types": {func(c *qmptest.Conn) {
			c.Handshake()
			c.Table(map[string]string{"query-block": `{"qdev": [1]}`}, nil)
		}, qmp.ErrProtocol},
		"answers somebody else": {func(c *qmptest.Conn) {
			c.Handshake()
			cmd, _ := c.Next()
			cmd.ID = json.RawMessage("12345")
			c.Return(cmd, "[]")
			c.Hold()
		}, qmp.ErrProtocol},
		"never ends a line": {func(c *qmptest.Conn) {
			c.Handshake()
			c.Next()
			flood(c, strings.Repeat("x", 64<<10))
		}, qmp.ErrProtocol},
	} {
		t.Run(name, func(t *testing.T) {
			var notes []string
			m := scripted(t, tt.script, &notes)
			ctx := testenv.Context(t)
			p, err := m.Attach(ctx, source, o)
			if err == nil {
				_, err = p.Run(ctx)
			}
			if !errors.Is(err, tt.want) {
				t.Errorf("attach: %v, want %v", err, tt.want)
			}
			if _, err := m.Resolve(ctx, "d0"); name != "another disk" && err == nil {
				t.Error("a disk was found")
			}
		})
	}
}

// flood sends the text again and again until the client goes.
func flood(c *qmptest.Conn, text string) {
	for {
		if _, err := io.WriteString(c, text); err != nil {
			return
		}
	}
}

// TestMachineThatAnswersNoQuestionIsGivenUp within the time of a question: a
// command that changes something would have longer.
func TestMachineThatAnswersNoQuestionIsGivenUp(t *testing.T) {
	t.Parallel()
	for name, script := range map[string]func(c *qmptest.Conn){
		"falls silent":        func(c *qmptest.Conn) { c.Handshake(); c.Hold() },
		"has events for all":  func(c *qmptest.Conn) { c.Handshake(); flood(c, `{"event": "NOISE", "data": {}}`+"\n") },
		"stops within a line": func(c *qmptest.Conn) { c.Handshake(); c.Next(); io.WriteString(c, `{"return": [`); c.Hold() },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := scripted(t, script, new([]string))
			ctx, cancel := context.WithTimeout(t.Context(), limits.QMPChange-limits.QMPQuery)
			defer cancel()
			_, err := m.Attach(ctx, attach.Source{URI: "nbd+unix:///?socket=/none"}, attach.Options{ID: "d0", Model: qmp.VirtIOBlk})
			if !errors.Is(err, qmp.ErrUnanswered) || ctx.Err() != nil {
				t.Errorf("attach: got %v, and the test's patience: %v; want ErrUnanswered after %v", err, ctx.Err(), limits.QMPQuery)
			}
		})
	}
}

// TestNoMachineNamesTheExportsOfOthers has a machine claim that its disk is
// another's: what is removed follows from its own name.
func TestNoMachineNamesTheExportsOfOthers(t *testing.T) {
	t.Parallel()
	l := &lab{dir: testenv.TempDir(t)}
	l.startService(t)
	ctx := testenv.Context(t)
	victim := attach.ExportName("victim", "d0")
	source := l.source(l.image(t, "disk", diskSize))
	source.Add.Name = victim
	_, err := l.service.Add(ctx, source.Add)
	must(t, err)
	var notes []string
	node := "vmd-" + strings.TrimPrefix(attach.DiskID("d0"), "disk-") + "-00000000"
	m := scripted(t, func(c *qmptest.Conn) {
		c.Handshake()
		c.Table(map[string]string{"query-block": "[]", "blockdev-del": "{}", "query-named-block-nodes": fmt.Sprintf(`[{"node-name": %q, "file": "nbd+unix:///%s"}]`, node, victim)}, nil)
	}, &notes)
	m.Server = l.service
	p, err := m.Detach(ctx, "d0", true)
	must(t, err)
	if len(p.Steps) != 3 {
		t.Errorf("plan %+v", p)
	}
	do(t, p, nil)
	list, err := l.service.Exports(ctx)
	if err != nil || !slices.ContainsFunc(list, func(x api.Export) bool { return x.Name == victim }) {
		t.Errorf("exports %+v, %v", list, err)
	}
	for _, s := range p.Steps {
		if strings.Contains(s.Name, victim) {
			t.Errorf("step %q", s.Name)
		}
	}
}
