package qmp_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/digitalocean/go-qemu/qemu"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/qmp"
	"github.com/vmdiskd/vmdiskd/internal/qmp/qmptest"
)

// testContext bounds what must not hang.
func testContext(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// dial connects to a scripted QEMU.
func dial(t *testing.T, script func(c *qmptest.Conn)) *qmp.Monitor {
	t.Helper()
	m, err := qmp.Dial(testContext(t), qmptest.Listen(t, script))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return m
}

func TestDialReadsTheVersion(t *testing.T) {
	m := dial(t, func(c *qmptest.Conn) { c.Handshake(); c.Hold() })
	if got := m.Version().String(); got != "7.2.22" {
		t.Errorf("version %s, want 7.2.22", got)
	}
}

// TestMachineHasEnded where it has closed the connection and nobody listens: each
// alone may be a machine that lives.
func TestMachineHasEnded(t *testing.T) {
	for _, tt := range []struct {
		name   string
		leaves bool
		socket func(path string) error // makes it what the machine leaves
		want   bool
	}{
		{"lives", false, nil, false},
		{"ended", true, os.Remove, true},
		{"was killed", true, deaf, true},
		{"has ended the connection alone", true, nil, false},
		{"has a socket that was removed", false, os.Remove, false},
		{"listens no more", false, deaf, false},
		{"has left a file", true, func(path string) error { return errors.Join(os.Remove(path), os.WriteFile(path, nil, 0o600)) }, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			leave := make(chan struct{})
			defer close(leave)
			path := qmptest.Listen(t, func(c *qmptest.Conn) { c.Handshake(); <-leave })
			m, err := qmp.Dial(testContext(t), path)
			if err != nil {
				t.Fatal(err)
			}
			defer m.Close()
			if tt.socket != nil {
				if err := tt.socket(path); err != nil {
					t.Fatal(err)
				}
			}
			if tt.leaves {
				leave <- struct{}{}
				<-m.Done()
			}
			ctx := testContext(t)
			if !tt.want { // it may be ending as long as it is asked
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, time.Second)
				defer cancel()
			}
			if got := m.Ended(ctx); got != tt.want {
				t.Errorf("ended: got %v, want %v", got, tt.want)
			}
		})
	}
}

// deaf leaves a socket at the path at which nobody listens.
func deaf(path string) error {
	if err := os.Remove(path); err != nil {
		return err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return err
	}
	l.SetUnlinkOnClose(false)
	return l.Close()
}

func TestEventsDuringGreetingAreNoReplies(t *testing.T) {
	const event = `{"event": "RESUME", "data": {}, "timestamp": {"seconds": 5, "microseconds": 7}}`
	m := qmp.New(qmptest.Listen(t, func(c *qmptest.Conn) {
		c.Say(event)
		c.Say(qmptest.Greeting)
		cmd, _ := c.Next()
		c.Say(event)
		c.Return(cmd, "{}")
		c.Table(map[string]string{"query-status": `{"status":"running"}`}, nil)
	}))
	defer m.Close()
	s, err := m.Subscribe()
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Connect(); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		e, err := s.Next(testContext(t))
		if err != nil || e.Name != "RESUME" || !e.Time.Equal(time.Unix(5, 7000)) {
			t.Errorf("event %+v, %v", e, err)
		}
	}
	if out, err := m.Execute(testContext(t), "query-status", nil); err != nil || string(out) != `{"status":"running"}` {
		t.Errorf("query-status: %s, %v", out, err)
	}
}

// TestRepliesToTheClientBeforeAreForNobody: QEMU hands the replies of commands in
// flight to whoever connects next. Their numbers are not those of another client,
// and after the first answer there are none.
func TestRepliesToTheClientBeforeAreForNobody(t *testing.T) {
	var first []string
	for range 2 {
		m := dial(t, func(c *qmptest.Conn) {
			c.Say(qmptest.Greeting)
			cmd, _ := c.Next()
			first = append(first, string(cmd.ID))
			for _, id := range first[:len(first)-1] {
				c.Say(`{"return": "of another", "id": ` + id + `}`)
				c.Say(`{"error": {"class": "GenericError", "desc": "x"}, "id": ` + id + `1}`)
			}
			c.Return(cmd, "{}")
			cmd, _ = c.Next()
			c.Return(cmd, `"mine"`)
			c.Next()
			c.Say(`{"return": "of another", "id": 1}`)
			c.Hold()
		})
		if out, err := m.Execute(testContext(t), "query-status", nil); err != nil || string(out) != `"mine"` {
			t.Errorf("after replies to the client before: %s, %v", out, err)
		}
		if _, err := m.Execute(testContext(t), "query-status", nil); !errors.Is(err, qmp.ErrProtocol) {
			t.Errorf("a reply to no command amid the conversation: %v", err)
		}
	}
}

// TestRepliesInAnyOrderReachTheirCommands also keeps replies apart from events
// that follow at once: no buffer is shared.
func TestRepliesInAnyOrderReachTheirCommands(t *testing.T) {
	const n = 20
	m := dial(t, func(c *qmptest.Conn) {
		c.Handshake()
		var got []qmptest.Command
		for range n {
			cmd, ok := c.Next()
			if !ok {
				return
			}
			got = append(got, cmd)
		}
		for i := n - 1; i >= 0; i-- {
			c.Say(fmt.Sprintf(`{"return": {"of": %q, "pad": %q}, "id": %s}`, got[i].Execute, strings.Repeat("r", 3000), got[i].ID) + "\r\n" +
				fmt.Sprintf(`{"event": "NOISE", "data": {"pad": %q}}`, strings.Repeat("e", 3000)))
		}
		c.Hold()
	})
	var all sync.WaitGroup
	for i := range n {
		all.Go(func() {
			name := fmt.Sprint("command-", i)
			out, err := m.Execute(testContext(t), name, nil)
			var v struct{ Of, Pad string }
			if err != nil || json.Unmarshal(out, &v) != nil || v.Of != name || v.Pad != strings.Repeat("r", 3000) {
				t.Errorf("%s: got %.80s, %v", name, out, err)
			}
		})
	}
	all.Wait()
}

func TestErrorKeepsItsClass(t *testing.T) {
	m := dial(t, func(c *qmptest.Conn) {
		c.Handshake()
		cmd, _ := c.Next()
		c.Refuse(cmd, "DeviceNotFound", "Device 'a\x1b[31m\n\"' not found"+strings.Repeat("x", 1<<20))
		c.Hold()
	})
	_, err := m.Execute(testContext(t), "device_del", map[string]string{"id": "a"})
	var e *qmp.Error
	if !errors.As(err, &e) || !qmp.HasClass(err, qmp.ClassDeviceNotFound) || e.Command != "device_del" {
		t.Fatalf("error %v, want class DeviceNotFound", err)
	}
	if !strings.HasPrefix(e.Desc, `Device 'a\x1b[31m\n"' not found`) || len(e.Desc) > limits.QMPErrorText {
		t.Errorf("text %.100q of %d bytes", e.Desc, len(e.Desc))
	}
}

func TestBusyMonitorIsAClearError(t *testing.T) {
	path := qmptest.Listen(t, func(c *qmptest.Conn) { c.Hold() })
	ctx, cancel := context.WithTimeout(testContext(t), 50*time.Millisecond)
	defer cancel()
	_, err := qmp.Dial(ctx, path)
	if !errors.Is(err, qmp.ErrNoGreeting) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("dial: %v, want ErrNoGreeting", err)
	}
}

func TestDialOfNothing(t *testing.T) {
	for _, path := range []string{filepath.Join(t.TempDir(), "none"), strings.Repeat("p", 300), "", "/a\x00b", "@none"} {
		if m, err := qmp.Dial(testContext(t), path); err == nil {
			m.Close()
			t.Errorf("dial of %q worked", path)
		}
	}
}

func TestSilentQEMUCostsTheDeadline(t *testing.T) {
	answer := make(chan struct{})
	m := dial(t, func(c *qmptest.Conn) {
		c.Handshake()
		first, _ := c.Next()
		<-answer
		c.Return(first, `"late"`)
		c.Table(map[string]string{"second": `"second"`}, nil)
	})
	ctx, cancel := context.WithTimeout(testContext(t), 30*time.Millisecond)
	defer cancel()
	_, err := m.Execute(ctx, "first", nil)
	if !errors.Is(err, qmp.ErrUnanswered) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("first: %v, want ErrUnanswered and the deadline", err)
	}
	close(answer)
	if out, err := m.Execute(testContext(t), "second", nil); err != nil || string(out) != `"second"` {
		t.Errorf("second: %s, %v: the late reply was taken for another's", out, err)
	}
}

func TestUnansweredCommandsAreBounded(t *testing.T) {
	m := dial(t, func(c *qmptest.Conn) { c.Handshake(); c.Hold() })
	gone, cancel := context.WithCancel(testContext(t))
	var all sync.WaitGroup
	for range limits.QMPPending {
		all.Go(func() { m.Execute(gone, "x", nil) })
	}
	for { // until all of them have been sent
		_, err := m.Execute(shortly(t), "x", nil)
		if errors.Is(err, qmp.ErrTooMany) {
			break
		}
		if !errors.Is(err, qmp.ErrUnanswered) && !errors.Is(err, context.DeadlineExceeded) {
			t.Fatal(err)
		}
	}
	cancel()
	all.Wait()
}

func shortly(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), time.Millisecond)
	t.Cleanup(cancel)
	return ctx
}

// TestHostilePeerEndsInAnError plays one lie at a time, during the greeting
// and in the place of a reply.
func TestHostilePeerEndsInAnError(t *testing.T) {
	lies := []struct {
		name string
		lie  func(c *qmptest.Conn, id string)
		want error
	}{
		{"closes", func(*qmptest.Conn, string) {}, qmp.ErrLost},
		{"half a line, then closes", func(c *qmptest.Conn, _ string) { io.WriteString(c, `{"return": {`) }, qmp.ErrLost},
		{"garbage", func(c *qmptest.Conn, _ string) { c.Say("\x00\xff\xfe}{ garbage") }, qmp.ErrProtocol},
		{"no object", func(c *qmptest.Conn, _ string) { c.Say(`[1,2,3]`) }, qmp.ErrProtocol},
		{"empty object", func(c *qmptest.Conn, _ string) { c.Say(`{}`) }, qmp.ErrProtocol},
		{"null", func(c *qmptest.Conn, _ string) { c.Say(`null`) }, qmp.ErrProtocol},
		{"deep nesting", func(c *qmptest.Conn, _ string) { c.Say(`{"return":` + strings.Repeat("[", 1<<20)) }, qmp.ErrProtocol},
		{"event and reply in one", func(c *qmptest.Conn, id string) { c.Say(`{"event":"X","return":{},"id":` + id + `}`) }, qmp.ErrProtocol},
		{"return and error in one", func(c *qmptest.Conn, id string) {
			c.Say(`{"error":{"class":"a","desc":"b"},"return":{},"id":` + id + `}`)
		}, qmp.ErrProtocol},
		{"error of another type", func(c *qmptest.Conn, id string) { c.Say(`{"error":"no","id":` + id + `}`) }, qmp.ErrProtocol},
		{"huge event name", func(c *qmptest.Conn, _ string) { c.Say(`{"event":"` + strings.Repeat("E", 1000) + `"}`) }, qmp.ErrProtocol},
		{"ids never used", func(c *qmptest.Conn, _ string) {
			for range limits.QMPForeign + 1 {
				c.Say(`{"return":{},"id":99999}`)
			}
		}, qmp.ErrProtocol},
		{"id of another type", func(c *qmptest.Conn, _ string) { c.Say(`{"return":{},"id":{"a":[1]}}`) }, qmp.ErrProtocol},
		{"no id", func(c *qmptest.Conn, _ string) { c.Say(`{"return":{}}`) }, qmp.ErrProtocol},
		{"error without id", func(c *qmptest.Conn, _ string) { c.Say(`{"error":{"class":"GenericError","desc":"x"}}`) }, qmp.ErrProtocol},
		{"huge line", func(c *qmptest.Conn, _ string) {
			c.Write([]byte(`{"return":"`))
			for range limits.QMPLine >> 16 {
				if _, err := c.Write(bytes.Repeat([]byte("x"), 1<<16)); err != nil {
					return
				}
			}
		}, qmp.ErrProtocol},
	}
	for _, l := range lies {
		t.Run(l.name, func(t *testing.T) {
			path := qmptest.Listen(t, func(c *qmptest.Conn) { l.lie(c, "1") })
			if _, err := qmp.Dial(testContext(t), path); !errors.Is(err, l.want) {
				t.Errorf("in the place of a greeting: %v, want %v", err, l.want)
			}
			m := dial(t, func(c *qmptest.Conn) {
				c.Handshake()
				if cmd, ok := c.Next(); ok {
					l.lie(c, string(cmd.ID))
				}
			})
			_, err := m.Execute(testContext(t), "x", nil)
			if !errors.Is(err, l.want) || !errors.Is(err, qmp.ErrUnanswered) {
				t.Errorf("in the place of a reply: %v, want %v", err, l.want)
			}
			if _, err := m.Execute(testContext(t), "y", nil); !errors.Is(err, l.want) {
				t.Errorf("afterwards: %v, want %v", err, l.want)
			}
		})
	}
}

func TestGreetingIsShort(t *testing.T) {
	for _, tt := range []struct {
		pad  int
		want error
	}{{limits.QMPGreeting / 2, nil}, {limits.QMPGreeting, qmp.ErrProtocol}} {
		path := qmptest.Listen(t, func(c *qmptest.Conn) {
			c.Say(`{"QMP":{"version":{"qemu":{"major":7,"minor":2,"micro":0},"package":"` + strings.Repeat("x", tt.pad) + `"},"capabilities":[]}}`)
			if cmd, ok := c.Next(); ok {
				c.Return(cmd, "{}")
			}
			c.Hold()
		})
		m, err := qmp.Dial(testContext(t), path)
		if !errors.Is(err, tt.want) {
			t.Errorf("greeting of %d bytes: %v, want %v", tt.pad, err, tt.want)
		}
		if err == nil {
			m.Close()
		}
	}
}

func TestSecondReplyToOneCommandEndsTheMonitor(t *testing.T) {
	m := dial(t, func(c *qmptest.Conn) {
		c.Handshake()
		cmd, _ := c.Next()
		c.Return(cmd, "1")
		c.Return(cmd, "2")
		c.Hold()
	})
	if out, err := m.Execute(testContext(t), "x", nil); err != nil || string(out) != "1" {
		t.Errorf("first reply: %s, %v", out, err)
	}
	<-m.Done()
	if err := m.Err(); !errors.Is(err, qmp.ErrProtocol) {
		t.Errorf("monitor ended by %v", err)
	}
}

func TestLargeReplyIsWhole(t *testing.T) {
	big := `"` + strings.Repeat("0123456789abcdef", 1<<18) + `"` // 4 MiB
	m := dial(t, func(c *qmptest.Conn) {
		c.Handshake()
		c.Table(map[string]string{"big": big, "small": "1"}, nil)
	})
	if out, err := m.Execute(testContext(t), "big", nil); err != nil || string(out) != big {
		t.Errorf("big: %d bytes, %v", len(out), err)
	}
	if out, err := m.Execute(testContext(t), "small", nil); err != nil || string(out) != "1" {
		t.Errorf("small: %s, %v", out, err)
	}
}

// TestEventFloodCostsTheOldest has two subscribers that do not read and one
// event that is too long to keep.
func TestEventFloodCostsTheOldest(t *testing.T) {
	const flood = 3 * limits.QMPEventQueue
	m := dial(t, func(c *qmptest.Conn) {
		c.Handshake()
		cmd, _ := c.Next()
		c.Say(`{"event":"LONG","data":{"x":"` + strings.Repeat("x", limits.QMPEvent) + `"}}`)
		for i := range flood {
			c.Say(fmt.Sprintf(`{"event":"E%d","data":{}}`, i))
		}
		c.Return(cmd, "{}")
		c.Hold()
	})
	a, err := m.Subscribe()
	if err != nil {
		t.Fatal(err)
	}
	stream, err := m.Events(testContext(t)) // never read
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.Execute(testContext(t), "x", nil); err != nil {
		t.Fatal(err)
	}
	if got, want := a.Dropped(), uint64(flood-limits.QMPEventQueue+1); got != want {
		t.Errorf("dropped %d, want %d", got, want)
	}
	for i := flood - limits.QMPEventQueue; i < flood; i++ {
		if e, err := a.Next(testContext(t)); err != nil || e.Name != fmt.Sprint("E", i) {
			t.Fatalf("event %q, %v; want E%d", e.Name, err, i)
		}
	}
	m.Close()
	for range stream { // it is closed
	}
	if _, err := a.Next(testContext(t)); !errors.Is(err, qmp.ErrClosed) {
		t.Errorf("next after Close: %v", err)
	}
}

func TestEventThatIsTooLongIsLostAlone(t *testing.T) {
	m := dial(t, func(c *qmptest.Conn) {
		c.Handshake()
		c.Table(map[string]string{"x": "1"}, map[string]func(){"x": func() {
			c.Say(`{"event":"LONG","data":{"x":"` + strings.Repeat("x", limits.QMPEvent) + `"}}`)
			c.Say(`{"event":"SHORT","data":{}}`)
		}})
	})
	s, err := m.Subscribe()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, err := m.Execute(testContext(t), "x", nil); err != nil {
		t.Fatal(err)
	}
	if e, err := s.Next(testContext(t)); err != nil || e.Name != "SHORT" || s.Dropped() != 1 {
		t.Errorf("event %.40q, %v, %d dropped", e.Name, err, s.Dropped())
	}
}

func TestSubscribersAreBounded(t *testing.T) {
	m := qmp.New("/nowhere")
	for range limits.QMPSubscribers {
		if _, err := m.Subscribe(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := m.Subscribe(); !errors.Is(err, qmp.ErrTooMany) {
		t.Errorf("one more: %v", err)
	}
}

func TestCloseWakesEveryCommand(t *testing.T) {
	asked := make(chan struct{})
	m := dial(t, func(c *qmptest.Conn) {
		c.Handshake()
		c.Next()
		close(asked)
		c.Hold()
	})
	go func() {
		<-asked
		m.Close()
	}()
	if _, err := m.Execute(testContext(t), "x", nil); !errors.Is(err, qmp.ErrClosed) {
		t.Errorf("waiting command: %v", err)
	}
	if _, err := m.Execute(testContext(t), "x", nil); !errors.Is(err, qmp.ErrClosed) {
		t.Errorf("later command: %v", err)
	}
	if err := m.Connect(); !errors.Is(err, qmp.ErrClosed) {
		t.Errorf("connect after close: %v", err)
	}
}

// TestPeerThatDoesNotReadCostsTheDeadline fills the socket; a command that is
// cut leaves no monitor on which another could be misread.
func TestPeerThatDoesNotReadCostsTheDeadline(t *testing.T) {
	release := make(chan struct{})
	defer close(release)
	ctx, cancel := context.WithCancel(testContext(t))
	m := dial(t, func(c *qmptest.Conn) {
		c.Handshake()
		c.Read(make([]byte, 1))
		cancel()
		<-release
	})
	big := map[string]string{"x": strings.Repeat("x", limits.QMPCommand-100)}
	if _, err := m.Execute(ctx, "x", big); !errors.Is(err, qmp.ErrUnanswered) {
		t.Errorf("cut command: %v", err)
	}
	if err := m.Err(); !errors.Is(err, qmp.ErrLost) {
		t.Errorf("monitor after it: %v", err)
	}
}

func TestDescriptorsGoAlong(t *testing.T) {
	read := make(chan string, 1)
	m := dial(t, func(c *qmptest.Conn) {
		c.Handshake()
		cmd, _ := c.Next()
		text := string(cmd.Arguments)
		for _, f := range c.Files() {
			b, err := io.ReadAll(f)
			text += fmt.Sprintf(" %s %v", b, err)
		}
		read <- text
		c.Return(cmd, "{}")
		c.Hold()
	})
	path := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(path, []byte("contents"), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := m.GetFD(testContext(t), "n-0", f); err != nil {
		t.Fatal(err)
	}
	if got, want := <-read, `{"fdname":"n-0"} contents <nil>`; got != want {
		t.Errorf("QEMU got %s, want %s", got, want)
	}
	files := make([]*os.File, limits.QMPFiles+1)
	for i := range files {
		files[i] = f
	}
	if _, err := m.Execute(testContext(t), "x", nil, files...); !errors.Is(err, qmp.ErrInvalid) {
		t.Errorf("%d descriptors: %v", len(files), err)
	}
}

func TestArgumentsThatAreNotSent(t *testing.T) {
	m := dial(t, func(c *qmptest.Conn) {
		c.Handshake()
		if cmd, ok := c.Next(); ok {
			t.Errorf("QEMU got %s", cmd.Execute)
		}
	})
	for name, arguments := range map[string]any{
		"too long":      map[string]string{"x": strings.Repeat("x", limits.QMPCommand)},
		"cannot encode": make(chan int),
	} {
		if _, err := m.Execute(testContext(t), "x", arguments); !errors.Is(err, qmp.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, command := range []string{``, `x`, `{}`, `{"execute":"a","id":1}`, `{"execute":"a"} {"execute":"b"}`, `[]`} {
		if _, err := m.Run([]byte(command)); !errors.Is(err, qmp.ErrInvalid) {
			t.Errorf("run %q: %v", command, err)
		}
	}
	if err := m.Err(); err != nil {
		t.Errorf("the monitor has ended: %v", err)
	}
}

// TestUpstreamDomainWorksOverTheMonitor is go-qemu's own read side.
func TestUpstreamDomainWorksOverTheMonitor(t *testing.T) {
	m := dial(t, func(c *qmptest.Conn) {
		c.Handshake()
		c.Table(map[string]string{
			"query-version":  `{"qemu":{"major":7,"minor":2,"micro":22},"package":""}`,
			"query-commands": `[{"name":"query-block"},{"name":"query-version"}]`,
			"query-status":   `{"running":true,"singlestep":false,"status":"running"}`,
			"query-block":    `[{"device":"d0","type":"unknown","locked":false,"removable":false}]`,
		}, nil)
	})
	d, err := qemu.NewDomain(m, "vm")
	if err != nil {
		t.Fatal(err)
	}
	if s, err := d.Status(); err != nil || s != qemu.StatusRunning {
		t.Errorf("status %v, %v", s, err)
	}
	if b, err := d.BlockDevices(); err != nil || len(b) != 1 || b[0].Device != "d0" {
		t.Errorf("block devices %+v, %v", b, err)
	}
	d.Close()
	if err := m.Err(); !errors.Is(err, qmp.ErrClosed) {
		t.Errorf("after the domain's Close: %v", err)
	}
}

func TestUpstreamEventsEndWithTheirContext(t *testing.T) {
	m := dial(t, func(c *qmptest.Conn) {
		c.Handshake()
		c.Table(map[string]string{"x": "{}"}, map[string]func(){"x": func() {
			c.Say(`{"event":"ODD","data":[1]}`)
			c.Say(`{"event":"STOP","data":{"a":"b"},"timestamp":{"seconds":1,"microseconds":2}}`)
		}})
	})
	ctx, cancel := context.WithCancel(testContext(t))
	events, err := m.Events(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.Execute(ctx, "x", nil); err != nil {
		t.Fatal(err)
	}
	if e := <-events; e.Event != "STOP" || e.Data["a"] != "b" || e.Timestamp.Microseconds != 2 {
		t.Errorf("event %+v", e)
	}
	cancel()
	if e, ok := <-events; ok {
		t.Errorf("event %+v after the context", e)
	}
	if _, err := m.Execute(testContext(t), "x", nil); err != nil {
		t.Errorf("the monitor after it: %v", err)
	}
}

// TestMonitorLeavesTheSocketAfterAFailedGreeting: the connection is closed, so
// that the monitor is free for others.
func TestMonitorLeavesTheSocketAfterAFailedGreeting(t *testing.T) {
	gone := make(chan error, 1)
	path := qmptest.Listen(t, func(c *qmptest.Conn) {
		c.Say("hello")
		_, err := io.Copy(io.Discard, c)
		gone <- err
	})
	if _, err := qmp.Dial(testContext(t), path); !errors.Is(err, qmp.ErrProtocol) {
		t.Errorf("dial: %v", err)
	}
	if err := <-gone; err != nil && !errors.Is(err, net.ErrClosed) {
		t.Errorf("the peer saw %v", err)
	}
}

// TestPathIsNoAbstractName has a monitor in each place.
func TestPathIsNoAbstractName(t *testing.T) {
	t.Chdir(t.TempDir())
	name := fmt.Sprintf("@vmdiskd-test-%d", os.Getpid())
	abstract, err := net.Listen("unix", name)
	if err != nil {
		t.Fatal(err)
	}
	defer abstract.Close()
	if err := os.Symlink(qmptest.Listen(t, func(c *qmptest.Conn) { c.Handshake(); c.Hold() }), name); err != nil {
		t.Fatal(err)
	}
	m, err := qmp.Dial(testContext(t), name)
	if err != nil {
		t.Fatal(err)
	}
	m.Close()
}

// TestMonitorIsUsedByManyUntilItIsClosed ends in the middle of commands,
// events and subscriptions.
func TestMonitorIsUsedByManyUntilItIsClosed(t *testing.T) {
	m := dial(t, func(c *qmptest.Conn) {
		c.Handshake()
		c.Table(map[string]string{"x": "1"}, map[string]func(){"x": func() { c.Say(`{"event":"E","data":{}}`) }})
	})
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			for {
				out, err := m.Execute(testContext(t), "x", nil)
				if err != nil {
					if !errors.Is(err, qmp.ErrClosed) {
						t.Error(err)
					}
					return
				}
				if string(out) != "1" {
					t.Errorf("reply %s", out)
				}
			}
		})
		all.Go(func() {
			s, err := m.Subscribe()
			if err != nil {
				t.Error(err)
				return
			}
			defer s.Close()
			for n := 0; ; n++ {
				if _, err := s.Next(testContext(t)); err != nil {
					return
				}
				if n == 50 {
					m.Close()
				}
			}
		})
		all.Go(func() {
			events, err := m.Events(testContext(t))
			if err != nil {
				return
			}
			for range events {
			}
		})
	}
	all.Wait()
}
