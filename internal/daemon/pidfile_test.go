package daemon

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestPIDFileOfAServerThatStartsIsNoOthers: it is empty, and stays there when
// another cannot have it. By a symbolic link it is the same.
func TestPIDFileOfAServerThatStartsIsNoOthers(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pid")
	link := path + ".link"
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	first := &daemon{cfg: Config{PIDFile: link}}
	if err := first.openPIDFile(); err != nil {
		t.Fatal(err)
	}
	second := &daemon{cfg: Config{PIDFile: path}}
	if err := second.openPIDFile(); err == nil {
		t.Error("two servers have one PID file")
	}
	second.removePIDFile()
	if _, err := os.Stat(path); err != nil {
		t.Errorf("the file of the first: %v", err)
	}
	if err := first.pid.file.Close(); err != nil {
		t.Fatal(err)
	}
	if err := second.openPIDFile(); err != nil {
		t.Errorf("when the first has ended: %v", err)
	}
	second.removePIDFile()
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("the file of a server that did not start: %v", err)
	}
}

// TestPIDFileOfASuccessorStays: somebody has removed that of a server that runs, and
// another server has made one at its path.
func TestPIDFileOfASuccessorStays(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pid")
	var servers []*daemon
	for range 2 {
		if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
		d := &daemon{cfg: Config{PIDFile: path}}
		if err := errors.Join(d.openPIDFile(), d.fillPIDFile()); err != nil {
			t.Fatal(err)
		}
		servers = append(servers, d)
	}
	servers[0].removePIDFile()
	if text, err := os.ReadFile(path); err != nil || string(text) != fmt.Sprintln(os.Getpid()) {
		t.Errorf("the file of the second, when the first has ended: %q, %v", text, err)
	}
	servers[1].removePIDFile()
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("when the second has ended: %v", err)
	}
}

// TestFileThatIsNoPIDFileStays: a wrong path costs nobody a disk.
func TestFileThatIsNoPIDFileStays(t *testing.T) {
	for _, tt := range []struct {
		name, in string
		taken    bool
	}{
		{"an empty one", "", true},
		{"of a server that was killed", "4711\n", true},
		{"of another program", "   4711\n", true},
		{"after a crash", "\x00\x00\x00\x00\x00", true},
		{"text", "[control]\n", false},
		{"an empty disk", strings.Repeat("\x00", 512), false},
		{"numbers with text between", "4711 x 4712\n", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "pid")
			if err := os.WriteFile(path, []byte(tt.in), 0o600); err != nil {
				t.Fatal(err)
			}
			d := &daemon{cfg: Config{PIDFile: path}}
			err := d.openPIDFile()
			if (err == nil) != tt.taken {
				t.Errorf("it is opened with error %v, want that it is taken: %t", err, tt.taken)
			}
			if err == nil {
				err = d.fillPIDFile()
			}
			d.removePIDFile()
			if text, lost := os.ReadFile(path); !tt.taken && (lost != nil || string(text) != tt.in) {
				t.Errorf("it has %d bytes in the end, %v; want its own %d", len(text), lost, len(tt.in))
			}
		})
	}
}
