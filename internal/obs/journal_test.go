package obs

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// journalEnd is the journal's end of the socket.
type journalEnd struct {
	t *testing.T
	*net.UnixConn
}

// journald makes a journal and a log that writes to it.
func journald(t *testing.T) (*Log, journalEnd) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "journal")
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if err := c.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil {
		t.Fatal(err)
	}
	j, err := dialJournal(path)
	if err != nil {
		t.Fatal(err)
	}
	l := newLog(Options{Format: "journal"}, j)
	t.Cleanup(l.Close)
	return l, journalEnd{t, c}
}

// entry receives an entry and tells whether it came as a file.
func (j journalEnd) entry() (fields map[string]string, file bool) {
	j.t.Helper()
	b, oob := make([]byte, 1<<20), make([]byte, 128)
	n, k, _, _, err := j.ReadMsgUnix(b, oob)
	if err != nil {
		j.t.Fatal(err)
	}
	b = b[:n]
	if k > 0 {
		file = true
		b = j.contents(oob[:k])
	}
	return parseEntry(j.t, b), file
}

// contents reads the file whose descriptor came along; it must be sealed.
func (j journalEnd) contents(oob []byte) []byte {
	j.t.Helper()
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil || len(msgs) != 1 {
		j.t.Fatalf("control messages: %v, %v", msgs, err)
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(fds) != 1 {
		j.t.Fatalf("descriptors: %v, %v", fds, err)
	}
	f := os.NewFile(uintptr(fds[0]), "entry")
	defer f.Close()
	if _, err := f.WriteAt([]byte("x"), 0); !errors.Is(err, unix.EPERM) {
		j.t.Errorf("write to the file: got %v, want that it is sealed", err)
	}
	info, err := f.Stat()
	if err != nil {
		j.t.Fatal(err)
	}
	b := make([]byte, info.Size())
	if _, err := f.ReadAt(b, 0); err != nil {
		j.t.Fatal(err)
	}
	return b
}

// parseEntry takes an entry apart as the journal's documentation says.
func parseEntry(t *testing.T, b []byte) map[string]string {
	t.Helper()
	fields := map[string]string{}
	for len(b) > 0 {
		line, rest, ok := bytes.Cut(b, []byte("\n"))
		if !ok {
			t.Fatalf("entry ends in %q", b)
		}
		name, value, short := strings.Cut(string(line), "=")
		if b = rest; !short {
			n := binary.LittleEndian.Uint64(b)
			value = string(b[8 : 8+n])
			if b[8+n] != '\n' {
				t.Fatalf("field %s is not followed by a newline", name)
			}
			b = b[9+n:]
		}
		if _, twice := fields[name]; twice {
			t.Errorf("field %s is there twice", name)
		}
		fields[name] = value
	}
	return fields
}

func TestJournalGetsFields(t *testing.T) {
	l, j := journald(t)
	l.For("nbd").With("peer", "vsock:3:1").WithGroup("io").Warn("request failed",
		"offset", 4096, "error", errors.New("no space left"), slog.Group("disk", "name", "a b"), "none", "")
	got, file := j.entry()
	want := map[string]string{
		"MESSAGE":              `request failed in=nbd peer=vsock:3:1 io.offset=4096 io.error="no space left" io.disk.name="a b" io.none=""`,
		"PRIORITY":             "4",
		"SYSLOG_IDENTIFIER":    "vmdiskd",
		"VMDISKD_IN":           "nbd",
		"VMDISKD_PEER":         "vsock:3:1",
		"VMDISKD_IO_OFFSET":    "4096",
		"VMDISKD_IO_ERROR":     "no space left",
		"VMDISKD_IO_DISK_NAME": "a b",
		"VMDISKD_IO_NONE":      "",
	}
	if file || len(got) != len(want) {
		t.Errorf("got %d fields, want %d: %q", len(got), len(want), got)
	}
	for k, v := range want {
		if got[k] != v {
			t.Errorf("%s: got %q, want %q", k, got[k], v)
		}
	}
}

func TestPeerCannotForgeFields(t *testing.T) {
	l, j := journald(t)
	forged := "a\nPRIORITY=0\nMESSAGE=forged\x1b[31m\x00"
	l.For("nbd").Info("export", "name", forged)
	got, _ := j.entry()
	if got["PRIORITY"] != "6" || got["VMDISKD_NAME"] != forged || strings.ContainsAny(got["MESSAGE"], "\n\x1b\x00") {
		t.Errorf("got %q, want the name as one field and a message of one line", got)
	}
}

func TestLargeEntryIsASealedFile(t *testing.T) {
	l, j := journald(t)
	log := l.For("nbd")
	large := strings.Repeat("x", 2*limits.JournalField)
	args := []any{}
	for _, k := range []string{"a", "b", "c", "d", "e", "f", "g", "h", "i", "j"} {
		args = append(args, k, large)
	}
	log.Info("large", args...)
	log.Info("small")
	got, file := j.entry()
	if !file || len(got["VMDISKD_J"]) != limits.JournalField || len(got["MESSAGE"]) != limits.JournalField {
		t.Errorf("file %v, field of %d bytes, message of %d, want a file with both cut to %d", file, len(got["VMDISKD_J"]), len(got["MESSAGE"]), limits.JournalField)
	}
	if got, file := j.entry(); file || got["MESSAGE"] != "small in=nbd" {
		t.Errorf("then: file %v, %q, want the small entry", file, got)
	}
}

func TestJournalFieldsAreBoundedAndWellNamed(t *testing.T) {
	l, j := journald(t)
	args := []any{strings.Repeat("k", 100), 1, "é-x", 2}
	for i := range 2 * limits.JournalFields {
		args = append(args, strings.Repeat("n", i%40+1)+string(rune('a'+i/40)), i)
	}
	l.For("nbd").Info("many", args...)
	got, _ := j.entry()
	if len(got) != limits.JournalFields+3 {
		t.Errorf("fields: got %d, want %d", len(got), limits.JournalFields+3)
	}
	for name := range got {
		if len(name) > 64 || strings.Trim(name, "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_") != "" || name[0] == '_' {
			t.Errorf("field name %q", name)
		}
	}
	if got["VMDISKD___X"] != "2" {
		t.Errorf("key é-x: got %q", got)
	}
}

func TestLevelsOfTheJournal(t *testing.T) {
	l, j := journald(t)
	l.SetLevel(slog.LevelInfo)
	log := l.For("nbd")
	log.Debug("unseen")
	for level, want := range map[slog.Level]string{slog.LevelInfo: "6", slog.LevelWarn: "4", slog.LevelError: "3"} {
		log.Log(t.Context(), level, "seen")
		if got, _ := j.entry(); got["PRIORITY"] != want || got["MESSAGE"] != "seen in=nbd" {
			t.Errorf("%v: got %q, want priority %s", level, got, want)
		}
	}
	if priority(slog.LevelDebug) != "7" {
		t.Error("debug is not 7")
	}
}

func TestLostLinesAreAFieldOfTheJournal(t *testing.T) {
	l, j := journald(t)
	l.out.lost = 5
	l.For("nbd").Info("at last")
	if got, _ := j.entry(); got["VMDISKD_LINES_LOST"] != "5" || got["MESSAGE"] != "at last in=nbd" {
		t.Errorf("got %q, want 5 lost lines", got)
	}
}

func TestDerivedLoggersDoNotShareFields(t *testing.T) {
	l, j := journald(t)
	base := l.For("nbd")
	a, b := base.With("x", "a"), base.With("x", "b")
	a.Info("one")
	b.Info("two")
	first, _ := j.entry()
	second, _ := j.entry()
	if first["VMDISKD_X"] != "a" || second["VMDISKD_X"] != "b" {
		t.Errorf("got %q and %q", first, second)
	}
}

func TestFormatsOfALog(t *testing.T) {
	l, read := open(t, Options{Format: "json"})
	l.out.lost = 2
	l.For("nbd").Info("hello", "name", "a\nb")
	lines := strings.Split(strings.TrimSpace(read()), "\n")
	if len(lines) != 2 {
		t.Fatalf("log says %q, want two lines", lines)
	}
	var first, second map[string]any
	if err := json.Unmarshal([]byte(lines[0]), &first); err != nil || first["name"] != "a\nb" || first["in"] != "nbd" {
		t.Errorf("first line %q: %v", lines[0], err)
	}
	if err := json.Unmarshal([]byte(lines[1]), &second); err != nil || second["count"] != 2.0 {
		t.Errorf("second line %q: %v", lines[1], err)
	}
	for _, o := range []Options{{Format: "xml"}, {Format: "journal", Sink: "/tmp/x"}, {Format: "journal", Sink: "syslog"}} {
		if _, err := Open(o); err == nil {
			t.Errorf("%+v was accepted", o)
		}
	}
}
