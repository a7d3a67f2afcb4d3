package obs

import (
	"fmt"
	"net"
	"os"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"

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
	return &Supervisor{conn: c, watch: watch}, nil
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
// comes of it.
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

// Close lets go of the socket.
func (s *Supervisor) Close() error {
	if s == nil {
		return nil
	}
	return s.conn.Close()
}
