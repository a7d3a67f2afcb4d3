package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

// TestMachineScripts runs testdata/machine, where the commands on machines
// stand with what they print, on a real machine with a real daemon.
// UPDATE_SCRIPTS=1 writes down what they print now. Digests of paths are
// masked: they change with the folder of the test.
func TestMachineScripts(t *testing.T) {
	d := startDaemon(t)
	d.image(t, "disk.img")
	vm := startQEMU(t, "-device", "virtio-scsi-pci,id=scsi0", "-device", "pcie-root-port,id=rp1,chassis=1")
	self, err := os.Executable()
	must(t, err)
	bin := t.TempDir()
	must(t, os.Symlink(self, filepath.Join(bin, "vmdiskctl")))
	testscript.Run(t, testscript.Params{
		Dir:                 filepath.Join("testdata", "machine"),
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		UpdateScripts:       os.Getenv("UPDATE_SCRIPTS") != "",
		Cmds:                map[string]func(*testscript.TestScript, bool, []string){"exits": exits},
		Setup: func(e *testscript.Env) error {
			for name, value := range map[string]string{
				"PATH": bin + string(os.PathListSeparator) + e.Getenv("PATH"), asMain: "1", "GORACE": "atexit_sleep_ms=0",
				socketVariable: filepath.Join(d.dir, "control"), "VM": vm, "DIR": d.dir,
			} {
				e.Setenv(name, value)
			}
			return nil
		},
	})
}
