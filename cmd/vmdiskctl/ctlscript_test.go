package main

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
	ctlserver "github.com/vmdiskd/vmdiskd/internal/control/server"
)

// TestScripts runs testdata/ctl, where the commands stand with what they
// print. UPDATE_SCRIPTS=1 writes down what they print now.
func TestScripts(t *testing.T) {
	runScripts(t, "ctl", func(e *testscript.Env) error {
		socket := filepath.Join(e.WorkDir, "control")
		stop, err := answerAt(socket, scripted(), ctlserver.Change)
		if err != nil {
			return err
		}
		e.Defer(stop)
		e.Setenv(socketVariable, socket)
		return nil
	})
}

// runScripts runs the scripts in a folder of testdata, for which setup prepares
// what they talk to.
func runScripts(t *testing.T, folder string, setup func(*testscript.Env) error) {
	t.Helper()
	self, err := os.Executable()
	must(t, err)
	bin := t.TempDir()
	must(t, os.Symlink(self, filepath.Join(bin, "vmdiskctl")))
	testscript.Run(t, testscript.Params{
		Dir:                 filepath.Join("testdata", folder),
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		UpdateScripts:       os.Getenv("UPDATE_SCRIPTS") != "",
		Cmds:                map[string]func(*testscript.TestScript, bool, []string){"exits": exits},
		Setup: func(e *testscript.Env) error {
			e.Setenv("PATH", bin+string(os.PathListSeparator)+e.Getenv("PATH"))
			e.Setenv(asMain, "1")
			e.Setenv("GORACE", "atexit_sleep_ms=0") // by default each process waits for a second
			return setup(e)
		},
	})
}

// exits runs a command that must end with a code: exits CODE COMMAND...
func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits CODE COMMAND [ARGUMENT...]")
	}
	code := 0
	err := ts.Exec(args[1], args[2:]...)
	if e, ok := errors.AsType[*exec.ExitError](err); ok {
		code = e.ExitCode()
	} else {
		ts.Check(err)
	}
	if strconv.Itoa(code) != args[0] {
		ts.Fatalf("exit code %d, want %s", code, args[0])
	}
}

// scripted is a service with some of everything.
func scripted() *eventful {
	s := &eventful{events: happened, then: stay}
	web := exportOf("web")
	web.Description = "the disk of a server"
	web.Grants = []config.Grant{{Access: "rw", UIDs: []uint32{1000}}, {Access: "ro", Addresses: []string{"10.0.0.0/8"}}}
	web.Rate = &config.Rate{Bytes: 50 << 20}
	s.Put(web)
	odd := exportOf(nasty)
	odd.State, odd.Error, odd.Writable = "failed", "no such\nfile", false
	s.Put(odd)
	s.PutClient(api.Client{ID: 7, Peer: "uid:1000", Via: "unix:/run/nbd", Export: "web", Since: noon, Writable: true,
		Features: []string{"structured", "base:allocation"}, InFlight: 2, Requests: 12345, BytesIn: 1 << 20, BytesOut: 3 << 30})
	return s
}
