package uring

import (
	"fmt"
	"os"
	"testing"
	"time"

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

// TestFilesThatHangLeavePlacesToOthers: with more requests than the ring has places
// for each of several, which no owner's transfer, and no pulse, may wait for.
func TestFilesThatHangLeavePlacesToOthers(t *testing.T) {
	e := mustNew(t, Options{}, 0, limits.RingEntries, limits.RingFiles)
	defer e.Close()
	other, err := e.Open(tempFile(t, 4096, os.O_RDWR))
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	var ends []func()
	defer func() { // when all of them answer
		for _, end := range ends {
			end()
		}
	}()
	for range 4 {
		s := enginetest.NewSilent(t)
		osf, err := os.Open(s.Path)
		if err != nil {
			t.Fatal(err)
		}
		silent := e.enrol(osf, false, 1)
		over := s.Hang(e, silent, make([]byte, 4096*2*limits.RingWorkers), 1)
		defer s.Answer()
		ends = append(ends, func() { over(); silent.Close() })
	}
	late := time.After(time.Minute)
	for _, o := range []engine.Owner{engine.OwnerOf("calm"), 0, engine.Pulse} {
		done := make(chan error, 1)
		sync := &engine.IO{Op: engine.OpSync, Owner: o, File: other, Done: func(io *engine.IO) { done <- io.Err }}
		for i := range 200 { // those that hang come one by one
			e.Submit([]*engine.IO{sync})
			select {
			case err := <-done:
				if err != nil {
					t.Fatalf("sync of another file by %d: %v", o, err)
				}
			case <-late:
				t.Fatalf("sync %d of another file by %d waits", i, o)
			}
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
