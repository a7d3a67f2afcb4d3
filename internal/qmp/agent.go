package qmp

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"strings"
	"sync"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

var _ Executor = (*Agent)(nil)

// ErrNoAgent is for a guest agent that does not answer: none is installed or
// running, the guest is paused or still boots.
var ErrNoAgent = errors.New("the guest agent does not answer")

// Agent is a connection to a guest agent over its socket on the host. The
// guest is a hostile peer: nothing that it says is more than a claim. Safe
// for concurrent use; one command is in flight at a time.
type Agent struct {
	path  string
	turn  chan struct{} // holds a token while a command is in flight
	conn  *net.UnixConn // written to and read from by the holder of turn
	lines *lineReader   // used by the holder of turn
	sync  int64         // the holder's; number of the last synchronisation
	left  chan struct{} // closed by Close
	close func() error  // does so once
}

// DialAgent connects to the socket at path. That it works says nothing of an
// agent in the guest; the first command does. The caller calls Close.
func DialAgent(ctx context.Context, path string) (*Agent, error) {
	ctx, cancel := context.WithTimeout(ctx, limits.QMPDial)
	defer cancel()
	conn, err := DialSocket(ctx, path)
	if err != nil {
		return nil, fmt.Errorf("guest agent %q: %w", path, err)
	}
	a := &Agent{
		path:  path,
		turn:  make(chan struct{}, 1),
		conn:  conn,
		lines: newLineReader(conn, limits.AgentLine),
		sync:  rand.Int64N(1 << 40), // not the numbers of an earlier client
		left:  make(chan struct{}),
	}
	a.close = sync.OnceValue(func() error {
		close(a.left)
		return conn.Close()
	})
	return a, nil
}

// Close ends the connection; a command in flight fails.
func (a *Agent) Close() error { return a.close() }

// Execute is as Monitor.Execute. It first finds out within limits.AgentSync
// whether there is an agent, else ErrNoAgent; the reply must come within
// limits.AgentReply. Agents take no files.
func (a *Agent) Execute(ctx context.Context, command string, arguments any, files ...*os.File) (json.RawMessage, error) {
	if len(files) > 0 {
		return nil, fmt.Errorf("%s: %w: a guest agent takes no descriptors", command, ErrInvalid)
	}
	ctx, cancel := context.WithTimeout(ctx, limits.AgentReply)
	defer cancel()
	out, err := a.execute(ctx, command, arguments)
	if err != nil {
		return nil, fmt.Errorf("guest agent %q: %w", a.path, err)
	}
	return out, nil
}

func (a *Agent) execute(ctx context.Context, command string, arguments any) (json.RawMessage, error) {
	select {
	case a.turn <- struct{}{}:
		defer func() { <-a.turn }()
	case <-a.left:
		return nil, ErrClosed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	b, err := encode(command, arguments, "")
	if err != nil {
		return nil, fmt.Errorf("%s: %w", command, err)
	}
	if err := a.synchronise(ctx); err != nil {
		return nil, a.unlessLeft(err)
	}
	sent, err := write(ctx, a.conn, b, nil)
	if err == nil {
		var msg message
		if msg, err = a.reply(ctx); err == nil {
			return msg.Return, msg.refusal(command)
		}
	}
	if err = a.unlessLeft(err); sent {
		return nil, fmt.Errorf("%s: %w: %w", command, ErrUnanswered, err)
	}
	return nil, fmt.Errorf("%s: %w", command, err)
}

// unlessLeft is ErrClosed for errors that Close has caused.
func (a *Agent) unlessLeft(err error) error {
	select {
	case <-a.left:
		return ErrClosed
	default:
		return err
	}
}

// synchronise reads past what was meant for others: replies to earlier clients
// and to commands that nobody waits for any more.
func (a *Agent) synchronise(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, limits.AgentSync)
	defer cancel()
	a.sync++
	b, err := encode("guest-sync-delimited", map[string]any{"id": a.sync}, "")
	if err != nil {
		return err
	}
	// The byte ends whatever half command the agent has.
	if _, err := write(ctx, a.conn, append([]byte{0xff}, b...), nil); err != nil {
		return fmt.Errorf("%w: %w", ErrNoAgent, err)
	}
	defer until(ctx, a.conn.SetReadDeadline)()
	noise := 0
	for range limits.AgentStale {
		n, err := skipTo(a.lines.r, 0xff, limits.AgentNoise-noise)
		noise += n
		if err != nil {
			return fmt.Errorf("%w: %w", ErrNoAgent, because(ctx, err))
		}
		line, err := a.lines.next()
		if err != nil {
			return fmt.Errorf("%w: %w", ErrNoAgent, because(ctx, err))
		}
		noise += len(line)
		var reply struct {
			Return int64 `json:"return"`
		}
		if json.Unmarshal(line, &reply) == nil && reply.Return == a.sync {
			return nil
		}
	}
	return fmt.Errorf("%w: %w: nothing but %d replies to others", ErrNoAgent, ErrProtocol, limits.AgentStale)
}

// skipTo reads up to the byte and with it, at most max bytes.
func skipTo(r *bufio.Reader, delimiter byte, max int) (n int, err error) {
	for {
		part, err := r.ReadSlice(delimiter)
		if n += len(part); n > max {
			return n, fmt.Errorf("%w: nothing but noise in %d bytes", ErrProtocol, n)
		}
		if !errors.Is(err, bufio.ErrBufferFull) {
			return n, err
		}
	}
}

// reply reads the one line that answers a command.
func (a *Agent) reply(ctx context.Context) (message, error) {
	defer until(ctx, a.conn.SetReadDeadline)()
	line, err := a.lines.next()
	if err != nil {
		return message{}, because(ctx, err)
	}
	msg, err := parseMessage(line)
	if err == nil && msg.Return == nil && msg.Error == nil {
		err = fmt.Errorf("%w: no reply: %q", ErrProtocol, head(line))
	}
	return msg, err
}

// AgentInfo is what a guest agent says of itself.
type AgentInfo struct {
	Version  string // printable
	Commands []string
}

// Has reports whether the agent offers the command.
func (i *AgentInfo) Has(command string) bool {
	for _, c := range i.Commands {
		if c == command {
			return true
		}
	}
	return false
}

// GuestInfo asks the agent for its version and the commands that it allows.
func GuestInfo(ctx context.Context, a Executor) (*AgentInfo, error) {
	const command = "guest-info"
	info, err := ask[struct {
		Version  string `json:"version"`
		Commands []struct {
			Name    string `json:"name"`
			Enabled bool   `json:"enabled"`
		} `json:"supported_commands"`
	}](ctx, a, command, nil)
	if err != nil {
		return nil, err
	}
	if len(info.Commands) > limits.QMPItems {
		return nil, fmt.Errorf("%s: %w: %d commands", command, ErrProtocol, len(info.Commands))
	}
	out := &AgentInfo{Version: printable(info.Version, limits.QMPName)}
	for _, c := range info.Commands {
		if c.Enabled {
			out.Commands = append(out.Commands, printable(c.Name, limits.QMPName))
		}
	}
	return out, nil
}

// GuestFilesystem is a mounted file system, as the guest claims. The texts are
// printable.
type GuestFilesystem struct {
	Name, Mountpoint, Type string
	Disks                  []GuestDisk
}

// GuestDisk is a disk below a file system.
type GuestDisk struct {
	Serial, Device, Bus string
}

// UsesSerial reports whether one of the disks has the serial number.
func (f *GuestFilesystem) UsesSerial(serial string) bool {
	return slices.ContainsFunc(f.Disks, func(d GuestDisk) bool { return IsSerial(d.Serial, serial) })
}

// IsSerial reports whether what a guest says of a disk is the serial number, not
// empty. Some guests give it with the model before it, and newer ones that of an
// NVMe disk with its namespace, which is 1 with QEMU, behind.
func IsSerial(said, serial string) bool {
	return serial != "" && (said == serial || strings.HasSuffix(said, "_"+serial) || strings.HasSuffix(said, "_"+serial+"_1"))
}

// GuestFilesystems lists what is mounted in the guest, at most limits.QMPItems.
func GuestFilesystems(ctx context.Context, a Executor) ([]GuestFilesystem, error) {
	const command = "guest-get-fsinfo"
	list, err := ask[[]struct {
		Name       string `json:"name"`
		Mountpoint string `json:"mountpoint"`
		Type       string `json:"type"`
		Disks      []struct {
			Serial string `json:"serial"`
			Device string `json:"dev"`
			Bus    string `json:"bus-type"`
		} `json:"disk"`
	}](ctx, a, command, nil)
	if err != nil {
		return nil, err
	}
	var out []GuestFilesystem
	total := len(list)
	for _, f := range list {
		if total += len(f.Disks); total > limits.QMPItems {
			return nil, fmt.Errorf("%s: %w: more than %d file systems and disks", command, ErrProtocol, limits.QMPItems)
		}
		fs := GuestFilesystem{Name: printable(f.Name, limits.QMPName), Mountpoint: printable(f.Mountpoint, limits.MaxString), Type: printable(f.Type, limits.QMPName)}
		for _, d := range f.Disks {
			fs.Disks = append(fs.Disks, GuestDisk{printable(d.Serial, limits.QMPName), printable(d.Device, limits.QMPName), printable(d.Bus, limits.QMPName)})
		}
		out = append(out, fs)
	}
	return out, nil
}

// GuestFrozen asks whether the guest's file systems are frozen, by whomever. QEMU's
// agent answers that of a frozen guest too, and refuses FreezeGuest then.
func GuestFrozen(ctx context.Context, a Executor) (bool, error) {
	const command = "guest-fsfreeze-status"
	status, err := ask[string](ctx, a, command, nil)
	switch {
	case err != nil:
		return false, err
	case status == "frozen", status == "thawed":
		return status == "frozen", nil
	}
	return false, fmt.Errorf("%s: %w: %q", command, ErrProtocol, printable(status, limits.QMPName))
}

// FreezeGuest has the guest write out and freeze its file systems and returns
// how many. After an error, ErrUnanswered above all, they may be frozen: the
// caller calls ThawGuest either way.
func FreezeGuest(ctx context.Context, a Executor) (int, error) {
	return countOf(ctx, a, "guest-fsfreeze-freeze")
}

// ThawGuest lets the guest write again and returns the number of file systems
// that were frozen.
func ThawGuest(ctx context.Context, a Executor) (int, error) {
	return countOf(ctx, a, "guest-fsfreeze-thaw")
}

func countOf(ctx context.Context, a Executor, command string) (int, error) {
	n, err := ask[int](ctx, a, command, nil)
	if err == nil && n < 0 {
		err = fmt.Errorf("%s: %w: %d file systems", command, ErrProtocol, n)
	}
	return n, err
}
