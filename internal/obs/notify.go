package obs

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// Supervisor is the service manager that started the program, told by the
// protocol of sd_notify(3). It keeps its socket, so that a process that may
// open nothing any more can go on telling. All methods do nothing for a nil
// Supervisor, which is what NewSupervisor returns where there is none; they
// are for any goroutine.
type Supervisor struct {
	conn  *net.UnixConn
	watch time.Duration
	room  int
}

// NewSupervisor finds the supervisor that NOTIFY_SOCKET names, or returns nil
// if nothing does. It fails if it cannot be reached, or if the watchdog's time
// in the environment is nonsense.
func NewSupervisor() (*Supervisor, error) {
	name := os.Getenv("NOTIFY_SOCKET")
	if name == "" {
		return nil, nil
	}
	watch, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		return nil, fmt.Errorf("watchdog: %w", err)
	}
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: name, Net: "unixgram"})
	if err != nil {
		return nil, fmt.Errorf("notify socket: %w", err)
	}
	room, err := strconv.Atoi(os.Getenv("FDSTORE"))
	if err != nil || room < 0 {
		room = 0 // not said, or nonsense: what it keeps is not relied on
	}
	return &Supervisor{conn: c, watch: watch, room: min(room, limits.KeptSockets)}, nil
}

// tell sends lines of assignments. A supervisor that does not read is given up
// after limits.Notify.
func (s *Supervisor) tell(lines ...string) error {
	if s == nil {
		return nil
	}
	if err := s.conn.SetWriteDeadline(time.Now().Add(limits.Notify)); err != nil {
		return err
	}
	_, err := s.conn.Write([]byte(strings.Join(lines, "\n")))
	return err
}

// statusLine makes an assignment of a text, which may have anything in it.
func statusLine(text string) string {
	if len(text) > limits.NotifyStatus {
		text = text[:limits.NotifyStatus]
	}
	clean := strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(text, ""))
	return "STATUS=" + clean
}

// Ready says that the program serves, or that it does so again after
// Reloading. status is for people.
func (s *Supervisor) Ready(status string) error {
	return s.tell(daemon.SdNotifyReady, statusLine(status))
}

// Reloading says that the configuration is read anew. Ready ends it, whatever
// comes of it, and so does Stopping.
func (s *Supervisor) Reloading() error {
	return s.tell(daemon.SdNotifyReloading, strings.TrimSpace(daemon.SdNotifyMonotonicUsec()))
}

// Stopping says that the program is about to end.
func (s *Supervisor) Stopping(status string) error {
	return s.tell(daemon.SdNotifyStopping, statusLine(status))
}

// Status says how things are, for people.
func (s *Supervisor) Status(text string) error { return s.tell(statusLine(text)) }

// Alive resets the watchdog. It is for callers that have just seen the program
// do its work.
func (s *Supervisor) Alive() error { return s.tell(daemon.SdNotifyWatchdog) }

// Interval is how often Alive is to be called, half of what the watchdog
// waits; 0 if there is no watchdog.
func (s *Supervisor) Interval() time.Duration {
	if s == nil {
		return 0
	}
	return s.watch / 2
}

// Keep gives the service manager a duplicate of a socket, which it hands back
// under name when the program starts again (FDSTORE=1 of sd_notify(3)). Sockets
// may share a name. One that it has no room for it closes without a word: see
// Room. The name is of the caller's own making.
func (s *Supervisor) Keep(name string, f *os.File) error {
	if s == nil {
		return nil
	}
	to, err := s.conn.SyscallConn()
	if err != nil {
		return err
	}
	what, err := f.SyscallConn()
	if err != nil {
		return err
	}
	// It is not to be watched: a listener that nobody accepts at is no broken one.
	text := fmt.Appendf(nil, "FDSTORE=1\nFDNAME=%s\nFDPOLL=0", name)
	if err := s.conn.SetWriteDeadline(time.Now().Add(limits.Notify)); err != nil {
		return err
	}
	var sent, lost error
	err = what.Control(func(fd uintptr) {
		sent = to.Write(func(boss uintptr) bool {
			err := unix.Sendmsg(int(boss), text, unix.UnixRights(int(fd)), nil, unix.MSG_NOSIGNAL)
			if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
				return false
			}
			lost = err
			return true
		})
	})
	return errors.Join(err, sent, lost)
}

// Forget makes the service manager close all that it keeps under name.
func (s *Supervisor) Forget(name string) error {
	return s.tell("FDSTOREREMOVE=1", "FDNAME="+name)
}

// Room is how many sockets the service manager keeps for the program: what it
// says in FDSTORE (systemd 254 and later), or the unit in its place.
func (s *Supervisor) Room() int {
	if s == nil {
		return 0
	}
	return s.room
}

// Close lets go of the socket.
func (s *Supervisor) Close() error {
	if s == nil {
		return nil
	}
	return s.conn.Close()
}
