package obs

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"strconv"
	"strings"
	"unicode"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// journalSocket is where systemd's journal takes entries.
const journalSocket = "/run/systemd/journal/socket"

// journal sends entries of the journal's native protocol, one by one Write. It
// keeps its socket.
type journal struct {
	conn *net.UnixConn
}

func dialJournal(path string) (*journal, error) {
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return nil, fmt.Errorf("journal: %w", err)
	}
	return &journal{conn: c}, nil
}

// Write sends an entry, as a sealed file in memory if it is too large for a
// datagram.
func (j *journal) Write(entry []byte) (int, error) {
	_, err := j.conn.Write(entry)
	if errors.Is(err, unix.EMSGSIZE) || errors.Is(err, unix.ENOBUFS) {
		err = j.writeFile(entry)
	}
	if err != nil {
		return 0, err
	}
	return len(entry), nil
}

func (j *journal) writeFile(entry []byte) error {
	fd, err := unix.MemfdCreate("vmdiskd-log", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return os.NewSyscallError("memfd_create", err)
	}
	f := os.NewFile(uintptr(fd), "journal entry")
	defer f.Close()
	if _, err := f.Write(entry); err != nil {
		return err
	}
	const seals = unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE | unix.F_SEAL_SEAL
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, seals); err != nil {
		return os.NewSyscallError("seal", err)
	}
	raw, err := j.conn.SyscallConn()
	if err != nil {
		return err
	}
	var sent error
	err = raw.Write(func(sock uintptr) bool {
		sent = unix.Sendmsg(int(sock), nil, unix.UnixRights(int(f.Fd())), nil, unix.MSG_NOSIGNAL)
		return !errors.Is(sent, unix.EAGAIN)
	})
	return errors.Join(err, sent)
}

// journalHandler makes entries of records: MESSAGE is the text with the
// attributes behind it, as people read it, and each attribute is a field of
// its own, too.
type journalHandler struct {
	out    io.Writer
	level  slog.Leveler
	prefix string // of keys, from groups
	fields []byte // of WithAttrs, as in an entry
	text   string // of WithAttrs, as in MESSAGE
	count  int    // of fields
}

func (h *journalHandler) Enabled(_ context.Context, l slog.Level) bool { return l >= h.level.Level() }

func (h *journalHandler) Handle(_ context.Context, r slog.Record) error {
	all := *h
	r.Attrs(func(a slog.Attr) bool {
		all.add(h.prefix, a)
		return true
	})
	b := appendField(nil, "MESSAGE", r.Message+all.text)
	b = appendField(b, "PRIORITY", priority(r.Level))
	b = appendField(b, "SYSLOG_IDENTIFIER", "vmdiskd")
	_, err := h.out.Write(append(b, all.fields...))
	return err
}

// WithAttrs is slog.Handler's.
func (h *journalHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	n := *h
	for _, a := range attrs {
		n.add(h.prefix, a)
	}
	return &n
}

// WithGroup is slog.Handler's.
func (h *journalHandler) WithGroup(name string) slog.Handler {
	if name == "" {
		return h
	}
	n := *h
	n.prefix += name + "."
	return &n
}

// add puts an attribute to the text and to the fields, without changing those
// that h has been copied from.
func (h *journalHandler) add(prefix string, a slog.Attr) {
	v := a.Value.Resolve()
	if v.Kind() == slog.KindGroup {
		if a.Key != "" {
			prefix += a.Key + "."
		}
		for _, x := range v.Group() {
			h.add(prefix, x)
		}
		return
	}
	if a.Equal(slog.Attr{}) || h.count >= limits.JournalFields {
		return
	}
	h.count++
	key, text := prefix+a.Key, cutText(v.String())
	h.text += " " + key + "=" + readable(text)
	h.fields = appendField(h.fields[:len(h.fields):len(h.fields)], fieldName(key), text)
}

func cutText(s string) string { return s[:min(len(s), limits.JournalField)] }

// readable quotes what would not be one word on one line.
func readable(s string) string {
	if s == "" || strings.ContainsFunc(s, func(r rune) bool {
		return r == ' ' || r == '"' || r == '=' || r == unicode.ReplacementChar || !unicode.IsPrint(r)
	}) {
		return strconv.Quote(s)
	}
	return s
}

// fieldName makes a name that the journal accepts, and that is none of its
// own: capital letters, digits and underscores, at most 64.
func fieldName(key string) string {
	name := "VMDISKD_" + strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z':
			return r - 'a' + 'A'
		case r >= 'A' && r <= 'Z', r >= '0' && r <= '9':
			return r
		}
		return '_'
	}, key)
	return name[:min(len(name), 64)]
}

// appendField appends a field in the form that suits its value: text up to the
// end of the line, or its length and any bytes.
func appendField(b []byte, name, value string) []byte {
	b = append(b, name...)
	value = cutText(value)
	if !strings.ContainsFunc(value, func(r rune) bool { return r < ' ' && r != '\t' }) {
		b = append(append(b, '='), value...)
	} else {
		b = binary.LittleEndian.AppendUint64(append(b, '\n'), uint64(len(value)))
		b = append(b, value...)
	}
	return append(b, '\n')
}

// priority is the level as syslog counts.
func priority(l slog.Level) string {
	switch {
	case l >= slog.LevelError:
		return "3"
	case l >= slog.LevelWarn:
		return "4"
	case l >= slog.LevelInfo:
		return "6"
	}
	return "7"
}
