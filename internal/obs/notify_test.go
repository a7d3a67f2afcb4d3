package obs

import (
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// supervise starts a supervisor whose messages recv returns.
func supervise(t *testing.T, name string) (recv func() string) {
	t.Helper()
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	t.Setenv("NOTIFY_SOCKET", name)
	if err := l.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil {
		t.Fatal(err)
	}
	return func() string {
		t.Helper()
		b := make([]byte, 8192)
		n, err := l.Read(b)
		if err != nil {
			t.Fatal(err)
		}
		return string(b[:n])
	}
}

func supervisor(t *testing.T) *Supervisor {
	t.Helper()
	s, err := NewSupervisor()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func TestSupervisorIsTold(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notify")
	for _, name := range []string{path, "@vmdiskd-" + strings.ReplaceAll(path, "/", "-")} {
		recv := supervise(t, name)
		s := supervisor(t)
		for _, tt := range []struct {
			tell func() error
			want string
		}{
			{func() error { return s.Ready("serving 2 exports") }, "READY=1\nSTATUS=serving 2 exports"},
			{func() error { return s.Status("a\nWATCHDOG=1\x00é") }, "STATUS=a WATCHDOG=1 é"},
			{s.Alive, "WATCHDOG=1"},
			{func() error { return s.Stopping("draining") }, "STOPPING=1\nSTATUS=draining"},
		} {
			if err := tt.tell(); err != nil {
				t.Fatal(err)
			}
			if got := recv(); got != tt.want {
				t.Errorf("supervisor was told %q, want %q", got, tt.want)
			}
		}
	}
}

func TestReloadingHasATimeOfTheMonotonicClock(t *testing.T) {
	recv := supervise(t, filepath.Join(t.TempDir(), "notify"))
	s := supervisor(t)
	before := monotonic(t)
	if err := s.Reloading(); err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`^RELOADING=1\nMONOTONIC_USEC=(\d+)$`).FindStringSubmatch(recv())
	if m == nil {
		t.Fatal("no time in the message")
	}
	if at, _ := strconv.ParseInt(m[1], 10, 64); at < before || at > monotonic(t) {
		t.Errorf("time is %d, want between %d and %d", at, before, monotonic(t))
	}
}

// monotonic is the clock's time in microseconds.
func monotonic(t *testing.T) int64 {
	t.Helper()
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		t.Fatal(err)
	}
	return ts.Nano() / 1000
}

func TestStatusIsBounded(t *testing.T) {
	got := statusLine(strings.Repeat("é", limits.NotifyStatus))
	if len(got) > len("STATUS=")+limits.NotifyStatus {
		t.Errorf("status has %d bytes", len(got))
	}
}

func TestSupervisorKeepsSockets(t *testing.T) {
	name := filepath.Join(t.TempDir(), "notify")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	t.Setenv("NOTIFY_SOCKET", name)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	s := supervisor(t)
	if err := s.Keep("listener-1", w); err != nil {
		t.Fatal(err)
	}
	text, rights := make([]byte, 512), make([]byte, 512)
	n, oobn, _, _, err := l.ReadMsgUnix(text, rights)
	if err != nil || string(text[:n]) != "FDSTORE=1\nFDNAME=listener-1\nFDPOLL=0" {
		t.Fatalf("supervisor was told %q, %v", text[:n], err)
	}
	got := passedFile(t, rights[:oobn])
	if _, err := got.WriteString("x"); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 1)
	if _, err := r.Read(b); err != nil || b[0] != 'x' {
		t.Errorf("what was kept is not the pipe: read %q, %v", b, err)
	}
	if err := s.Forget("listener-1"); err != nil {
		t.Fatal(err)
	}
	n, _, _, _, err = l.ReadMsgUnix(text, rights)
	if err != nil || string(text[:n]) != "FDSTOREREMOVE=1\nFDNAME=listener-1" {
		t.Errorf("supervisor was told %q, %v", text[:n], err)
	}
}

// passedFile is the one descriptor of a control message.
func passedFile(t *testing.T, rights []byte) *os.File {
	t.Helper()
	ms, err := unix.ParseSocketControlMessage(rights)
	if err != nil || len(ms) != 1 {
		t.Fatalf("control messages %v, %v", ms, err)
	}
	fds, err := unix.ParseUnixRights(&ms[0])
	if err != nil || len(fds) != 1 {
		t.Fatalf("descriptors %v, %v", fds, err)
	}
	f := os.NewFile(uintptr(fds[0]), "passed")
	t.Cleanup(func() { f.Close() })
	return f
}

func TestRoomIsWhatTheSupervisorSays(t *testing.T) {
	supervise(t, filepath.Join(t.TempDir(), "notify"))
	for said, want := range map[string]int{"": 0, "12": 12, "-1": 0, "many": 0, "1000000": limits.KeptSockets} {
		t.Setenv("FDSTORE", said)
		if got := supervisor(t).Room(); got != want {
			t.Errorf("FDSTORE=%q: room for %d, want %d", said, got, want)
		}
	}
}

func TestNoSupervisorIsToldNothing(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", "")
	s := supervisor(t)
	if s != nil || s.Ready("") != nil || s.Reloading() != nil || s.Stopping("") != nil || s.Alive() != nil || s.Interval() != 0 || s.Keep("", nil) != nil || s.Forget("") != nil || s.Room() != 0 {
		t.Error("there is a supervisor although nothing names one")
	}
}

func TestUnreachableSupervisorIsAnError(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", filepath.Join(t.TempDir(), "nobody"))
	if s, err := NewSupervisor(); err == nil || s != nil {
		t.Errorf("got %v, %v, want an error", s, err)
	}
}

func TestWatchdogIntervalIsHalfItsTime(t *testing.T) {
	supervise(t, filepath.Join(t.TempDir(), "notify"))
	for _, tt := range []struct {
		usec, pid string
		want      time.Duration
		fails     bool
	}{
		{"3000000", "", 1500 * time.Millisecond, false},
		{"", "", 0, false},
		{"3000000", "1", 0, false}, // meant for another process
		{"soon", "", 0, true},
	} {
		t.Setenv("WATCHDOG_USEC", tt.usec)
		t.Setenv("WATCHDOG_PID", tt.pid)
		s, err := NewSupervisor()
		if (err != nil) != tt.fails || s.Interval() != tt.want {
			t.Errorf("%s µs for process %q: got %v, %v, want %v", tt.usec, tt.pid, s.Interval(), err, tt.want)
		}
		s.Close()
	}
}
