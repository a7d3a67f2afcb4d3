package qmp_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/qmp"
	"github.com/vmdiskd/vmdiskd/internal/qmp/qmptest"
)

// synced reads a synchronisation and answers it.
func synced(c *qmptest.Conn) bool {
	cmd, ok := c.Next()
	if !ok || cmd.Execute != "guest-sync-delimited" {
		return false
	}
	c.Say("\xff" + fmt.Sprintf(`{"return": %d}`, syncID(cmd)))
	return true
}

func syncID(cmd qmptest.Command) int64 {
	var a struct{ ID int64 }
	if json.Unmarshal(cmd.Arguments, &a) != nil {
		return -1
	}
	return a.ID
}

// agent connects to a scripted guest agent.
func agent(t *testing.T, script func(c *qmptest.Conn)) *qmp.Agent {
	t.Helper()
	a, err := qmp.DialAgent(testContext(t), qmptest.Listen(t, script))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close() })
	return a
}

// answers is an agent with a table of replies.
func answers(t *testing.T, returns map[string]string) *qmp.Agent {
	return agent(t, func(c *qmptest.Conn) {
		for synced(c) {
			cmd, ok := c.Next()
			if !ok {
				return
			}
			if value, known := returns[cmd.Execute]; known {
				c.Say(`{"return": ` + value + `}`)
			} else {
				c.Say(`{"error": {"class": "CommandNotFound", "desc": "The command has not been found"}}`)
			}
		}
	})
}

func TestAgentCommands(t *testing.T) {
	a := answers(t, map[string]string{
		"guest-info": `{"version":"7.2.22\n","supported_commands":[{"name":"guest-ping","enabled":true,"success-response":true},{"name":"guest-exec","enabled":false}]}`,
		"guest-get-fsinfo": `[{"name":"vda1","mountpoint":"/mnt/a\u001b[31m","type":"ext4","disk":[{"bus-type":"virtio","bus":0,"unit":0,` +
			`"pci-controller":{"bus":1,"slot":0,"domain":0,"function":0},"dev":"/dev/vda1","target":0,"serial":"QEMU_DISK_S1"}]},{"name":"tmp","mountpoint":"/tmp","type":"tmpfs","disk":[]}]`,
		"guest-fsfreeze-status": `"frozen"`, "guest-fsfreeze-freeze": "2", "guest-fsfreeze-thaw": "3",
	})
	ctx := testContext(t)
	info, err := qmp.GuestInfo(ctx, a)
	if err != nil || info.Version != `7.2.22\n` || !info.Has("guest-ping") || info.Has("guest-exec") {
		t.Errorf("info %+v, %v", info, err)
	}
	fs, err := qmp.GuestFilesystems(ctx, a)
	if err != nil || len(fs) != 2 || fs[0].Mountpoint != `/mnt/a\x1b[31m` || fs[0].Disks[0].Device != "/dev/vda1" {
		t.Fatalf("file systems %+v, %v", fs, err)
	}
	if !fs[0].UsesSerial("S1") || fs[0].UsesSerial("1") || fs[0].UsesSerial("") || fs[1].UsesSerial("S1") {
		t.Errorf("serials of %+v", fs)
	}
	if frozen, err := qmp.GuestFrozen(ctx, a); !frozen || err != nil {
		t.Errorf("frozen %v, %v", frozen, err)
	}
	if n, err := qmp.FreezeGuest(ctx, a); n != 2 || err != nil {
		t.Errorf("freeze %d, %v", n, err)
	}
	if n, err := qmp.ThawGuest(ctx, a); n != 3 || err != nil {
		t.Errorf("thaw %d, %v", n, err)
	}
	if _, err := a.Execute(ctx, "guest-none", nil); !qmp.HasClass(err, qmp.ClassCommandNotFound) {
		t.Errorf("unknown command: %v", err)
	}
}

func TestAgentIsUsedByOneCommandAtATime(t *testing.T) {
	a := answers(t, map[string]string{"guest-fsfreeze-thaw": "7"})
	var all sync.WaitGroup
	for range 10 {
		all.Go(func() {
			if n, err := qmp.ThawGuest(testContext(t), a); n != 7 || err != nil {
				t.Errorf("thaw %d, %v", n, err)
			}
		})
	}
	all.Wait()
}

// TestAgentReadsPastOldReplies: of another client's commands, with its
// synchronisations, and of its own command that nobody waits for any more.
func TestAgentReadsPastOldReplies(t *testing.T) {
	expired := make(chan struct{})
	a := agent(t, func(c *qmptest.Conn) {
		cmd, _ := c.Next()
		c.Say(`{"return": "for another"}` + "\r\n" + "half a li\xff" + `{"return": 1}` + "\r\n\xffgarbage\r\n\xff" + fmt.Sprintf(`{"return": %d}`, syncID(cmd)))
		c.Next() // the command, which gets no reply in time
		<-expired
		cmd, _ = c.Next()
		c.Say(`{"return": 4}`)
		c.Say("\xff" + fmt.Sprintf(`{"return": %d}`, syncID(cmd)))
		c.Next()
		c.Say(`{"return": 5}`)
		c.Hold()
	})
	ctx, cancel := context.WithTimeout(testContext(t), 100*time.Millisecond)
	defer cancel()
	if _, err := qmp.FreezeGuest(ctx, a); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("freeze: %v, want the deadline", err)
	}
	close(expired)
	if n, err := qmp.ThawGuest(testContext(t), a); n != 5 || err != nil {
		t.Errorf("thaw %d, %v", n, err)
	}
}

func TestAgentThatIsNotThere(t *testing.T) {
	a := agent(t, func(c *qmptest.Conn) { c.Hold() })
	ctx, cancel := context.WithTimeout(testContext(t), 30*time.Millisecond)
	defer cancel()
	if _, err := qmp.GuestInfo(ctx, a); !errors.Is(err, qmp.ErrNoAgent) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("silent: %v, want ErrNoAgent", err)
	}
	if _, err := qmp.DialAgent(ctx, filepath.Join(t.TempDir(), "none")); err == nil {
		t.Error("dialled nothing")
	}
}

func TestHostileAgentEndsInAnError(t *testing.T) {
	flood := func(c *qmptest.Conn, piece string, n int) {
		for sent := 0; sent < n; sent += len(piece) {
			if _, err := io.WriteString(c, piece); err != nil {
				return
			}
		}
	}
	kilo := strings.Repeat("x", 1<<10)
	for _, tt := range []struct {
		name   string
		script func(c *qmptest.Conn)
		want   error
	}{
		{"closes", func(c *qmptest.Conn) {}, qmp.ErrNoAgent},
		{"noise for ever", func(c *qmptest.Conn) { c.Next(); flood(c, kilo, 2*limits.AgentNoise); c.Hold() }, qmp.ErrProtocol},
		{"delimiters for ever", func(c *qmptest.Conn) {
			c.Next()
			flood(c, strings.Repeat("\xff{\"return\":0}\n", 1<<10), 32*limits.AgentStale)
			c.Hold()
		}, qmp.ErrProtocol},
		{"delimited line without end", func(c *qmptest.Conn) { c.Next(); c.Write([]byte{0xff}); flood(c, kilo, 2*limits.AgentLine); c.Hold() }, qmp.ErrProtocol},
		{"garbage as reply", func(c *qmptest.Conn) { synced(c); c.Next(); c.Say("\xff\x00garbage") }, qmp.ErrProtocol},
		{"an event", func(c *qmptest.Conn) { synced(c); c.Next(); c.Say(`{"event":"STOP"}`) }, qmp.ErrProtocol},
		{"huge reply", func(c *qmptest.Conn) {
			synced(c)
			c.Next()
			c.Write([]byte(`{"return":"`))
			flood(c, kilo, 2*limits.AgentLine)
		}, qmp.ErrProtocol},
		{"half a reply", func(c *qmptest.Conn) { synced(c); c.Next(); io.WriteString(c, `{"retu`) }, qmp.ErrLost},
		{"another type", func(c *qmptest.Conn) { synced(c); c.Next(); c.Say(`{"return": "two"}`) }, qmp.ErrProtocol},
		{"negative", func(c *qmptest.Conn) { synced(c); c.Next(); c.Say(`{"return": -2}`) }, qmp.ErrProtocol},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a := agent(t, tt.script)
			if _, err := qmp.FreezeGuest(testContext(t), a); !errors.Is(err, tt.want) {
				t.Errorf("freeze: %v, want %v", err, tt.want)
			}
		})
	}
}

func TestLyingAgentIsAnError(t *testing.T) {
	many := "[" + strings.Repeat("{},", limits.QMPItems) + "{}]"
	for _, lie := range []string{`{}`, `[1]`, many, `[{"disk":` + many + `}]`, `[{"mountpoint":[]}]`} {
		a := answers(t, map[string]string{"guest-get-fsinfo": lie})
		if _, err := qmp.GuestFilesystems(testContext(t), a); !errors.Is(err, qmp.ErrProtocol) {
			t.Errorf("file systems %.40s: %v", lie, err)
		}
	}
	for _, lie := range []string{`[]`, `{"version":1}`, `{"supported_commands":` + many + `}`} {
		a := answers(t, map[string]string{"guest-info": lie})
		if _, err := qmp.GuestInfo(testContext(t), a); !errors.Is(err, qmp.ErrProtocol) {
			t.Errorf("info %.40s: %v", lie, err)
		}
	}
}

func TestCloseEndsTheCommandOfAnAgent(t *testing.T) {
	asked := make(chan struct{})
	a := agent(t, func(c *qmptest.Conn) { c.Next(); close(asked); c.Hold() })
	go func() {
		<-asked
		a.Close()
	}()
	if _, err := qmp.GuestInfo(testContext(t), a); !errors.Is(err, qmp.ErrClosed) {
		t.Errorf("waiting: %v", err)
	}
	if _, err := qmp.GuestInfo(testContext(t), a); !errors.Is(err, qmp.ErrClosed) {
		t.Errorf("later: %v", err)
	}
	if err := a.Close(); err != nil {
		t.Error(err)
	}
}

// lateTimer is a context that is done some time after its deadline, as one is on
// a busy machine.
type lateTimer struct {
	context.Context
	deadline time.Time
}

func (c lateTimer) Deadline() (time.Time, bool) { return c.deadline, true }

// TestDeadlineIsNotToldBeforeTheContextIsDone, as callers ask the context whether
// it was their own patience that ended.
func TestDeadlineIsNotToldBeforeTheContextIsDone(t *testing.T) {
	silent := func(c *qmptest.Conn) { c.Hold() }
	deaf := func(c *qmptest.Conn) { synced(c); c.Hold() }
	for name, use := range map[string]func(ctx context.Context) error{
		"agent that is not there": func(ctx context.Context) error {
			_, err := agent(t, silent).Execute(ctx, "guest-info", nil)
			return err
		},
		"agent that does not answer": func(ctx context.Context) error {
			_, err := agent(t, deaf).Execute(ctx, "guest-info", nil)
			return err
		},
		"monitor without a greeting": func(ctx context.Context) error {
			_, err := qmp.Dial(ctx, qmptest.Listen(t, silent))
			return err
		},
	} {
		done, cancel := context.WithTimeout(testContext(t), 300*time.Millisecond)
		defer cancel()
		ctx := lateTimer{done, time.Now().Add(50 * time.Millisecond)}
		if err := use(ctx); !errors.Is(err, context.DeadlineExceeded) || ctx.Err() == nil {
			t.Errorf("%s: %v, and the context says %v", name, err, ctx.Err())
		}
	}
	ctx, cancel := context.WithCancel(testContext(t))
	time.AfterFunc(50*time.Millisecond, cancel)
	_, err := qmp.Dial(ctx, qmptest.Listen(t, silent))
	if !errors.Is(err, qmp.ErrNoGreeting) || !errors.Is(err, context.Canceled) {
		t.Errorf("a dial that was called off: %v", err)
	}
}
