package uring

import (
	"fmt"
	"os"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/engine/enginetest"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// TestTransfersThatHangLeaveThreadsToOthers has a file in the ring whose reads
// make threads of the kernel wait.
func TestTransfersThatHangLeaveThreadsToOthers(t *testing.T) {
	for p, flags := range profiles {
		t.Run(fmt.Sprintf("%#x", flags), func(t *testing.T) { hangInRing(t, p) })
	}
}

func hangInRing(t *testing.T, profile int) {
	s := enginetest.NewSilent(t)
	e := mustNew(t, Options{}, profile, limits.RingEntries, limits.RingFiles)
	defer e.Close()
	osf, err := os.Open(s.Path)
	if err != nil {
		t.Fatal(err)
	}
	silent := e.enrol(osf, false, 1)
	defer silent.Close()
	other, err := e.Open(tempFile(t, 4096, os.O_RDWR))
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if silent.Index() < 0 || other.Index() < 0 {
		t.Fatalf("files have index %d and %d, want both in the ring", silent.Index(), other.Index())
	}
	over := s.Hang(e, silent, make([]byte, enginetest.ManyReads()), 1)
	defer over()
	defer s.Answer()
	calm := engine.WithOwner(t.Context(), engine.OwnerOf("calm"))
	for range 200 { // the reads get their threads one by one
		if err := engine.Do(calm, e, &engine.IO{Op: engine.OpSync, File: other}); err != nil {
			t.Fatalf("sync of another file: %v", err)
		}
	}
}

// TestTransfersInFlightHaveAThreadEach of the kernel, if they need one.
func TestTransfersInFlightHaveAThreadEach(t *testing.T) {
	e := mustNew(t, Options{}, 0, limits.RingEntries, limits.RingFiles)
	defer e.Close()
	if n := len(e.issuer.slots); n != limits.RingWorkers {
		t.Errorf("%d places in flight, want %d", n, limits.RingWorkers)
	}
}
