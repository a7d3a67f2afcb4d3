package daemon

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
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
