package main

import (
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
	runScripts(t, "machine", func(e *testscript.Env) error {
		e.Setenv(socketVariable, filepath.Join(d.dir, "control"))
		e.Setenv("VM", vm)
		e.Setenv("DIR", d.dir)
		return nil
	})
}
