// Package qmptest plays the QEMU or the guest agent of a test by a script,
// a well-behaved one or a hostile one.
package qmptest

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// patience bounds what a script waits for.
const patience = 30 * time.Second

// Greeting is what QEMU 7.2 says first.
const Greeting = `{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian 1:7.2"}, "capabilities": ["oob"]}}`

// Command is what a client sent.
type Command struct {
	Execute   string          `json:"execute"`
	Arguments json.RawMessage `json:"arguments"`
	ID        json.RawMessage `json:"id"`
}

// Conn is one connection of a client, at the script's side.
type Conn struct {
	*net.UnixConn
	t     testing.TB
	r     *bufio.Reader
	files []*os.File
}

// Listen serves every connection to a new socket by script, in a goroutine of
// its own, until the test ends. It returns the socket's path. A connection is
// closed when its script returns.
func Listen(t testing.TB, script func(c *Conn)) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "qmp.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	var scripts sync.WaitGroup
	scripts.Go(func() {
		for {
			conn, err := l.AcceptUnix()
			if err != nil {
				return
			}
			scripts.Go(func() { run(t, conn, script) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		scripts.Wait()
	})
	return path
}

func run(t testing.TB, conn *net.UnixConn, script func(c *Conn)) {
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience))
	c := &Conn{UnixConn: conn, t: t}
	c.r = bufio.NewReader(c)
	defer func() {
		for _, f := range c.files {
			f.Close()
		}
	}()
	script(c)
}

// Read takes descriptors that come along.
func (c *Conn) Read(p []byte) (int, error) {
	oob := make([]byte, 4096)
	n, on, _, _, err := c.ReadMsgUnix(p, oob)
	if n <= 0 && (err == nil || errors.Is(err, io.EOF)) {
		err = io.EOF
	}
	messages, _ := unix.ParseSocketControlMessage(oob[:max(on, 0)])
	for _, m := range messages {
		fds, _ := unix.ParseUnixRights(&m)
		for _, fd := range fds {
			c.files = append(c.files, os.NewFile(uintptr(fd), "received"))
		}
	}
	return max(n, 0), err
}

// Files are the descriptors that came so far; they are closed with the
// connection.
func (c *Conn) Files() []*os.File { return c.files }

// Next is the client's next command; false when it has gone.
func (c *Conn) Next() (Command, bool) {
	var cmd Command
	line, err := c.r.ReadBytes('\n')
	if err != nil {
		return cmd, false
	}
	if err := json.Unmarshal(bytes.TrimLeft(line, "\xff"), &cmd); err != nil {
		c.t.Errorf("the client sent %q: %v", line, err)
		return cmd, false
	}
	return cmd, true
}

// Say sends bytes as they are, an end of line added. Whether the client still
// listens is not the script's to judge.
func (c *Conn) Say(text string) { io.WriteString(c, text+"\r\n") }

// Return replies to a command.
func (c *Conn) Return(cmd Command, value string) {
	c.Say(fmt.Sprintf(`{"return": %s, "id": %s}`, value, id(cmd)))
}

// Refuse replies with an error.
func (c *Conn) Refuse(cmd Command, class, desc string) {
	b, err := json.Marshal(map[string]string{"class": class, "desc": desc})
	if err != nil {
		c.t.Error(err)
	}
	c.Say(fmt.Sprintf(`{"error": %s, "id": %s}`, b, id(cmd)))
}

func id(cmd Command) string {
	if len(cmd.ID) == 0 {
		return "null"
	}
	return string(cmd.ID)
}

// Handshake greets and lets the client negotiate.
func (c *Conn) Handshake() {
	c.Say(Greeting)
	if cmd, ok := c.Next(); ok {
		c.Return(cmd, "{}")
	}
}

// Hold waits for the client to go.
func (c *Conn) Hold() {
	for {
		if _, err := c.r.ReadByte(); err != nil {
			return
		}
	}
}

// Table replies to commands by name until the client goes; others do not
// exist. After the reply to a command then, if there is one for it, is called.
func (c *Conn) Table(returns map[string]string, then map[string]func()) {
	for {
		cmd, ok := c.Next()
		if !ok {
			return
		}
		if value, known := returns[cmd.Execute]; known {
			c.Return(cmd, value)
		} else {
			c.Refuse(cmd, "CommandNotFound", "The command "+cmd.Execute+" has not been found")
		}
		if f := then[cmd.Execute]; f != nil {
			f()
		}
	}
}
