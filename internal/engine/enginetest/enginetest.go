// Package enginetest is the suite that every engine passes: the same claims,
// on buffered and on direct files. A package runs it on its own engine; Run
// takes the directory, so that it also runs on a filesystem that injects
// faults or answers slowly.
package enginetest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/engine/bufpool"
)

// NewEngine makes the engine under test. bufs lends the suite's buffers and
// outlives the engine; an engine that registers buffers takes them from it.
type NewEngine func(t *testing.T, bufs *bufpool.Pool) engine.Engine

// Run runs the suite on engines from newEngine, with files below dir. It
// skips, by name, what the filesystem of dir cannot do.
func Run(t *testing.T, dir string, newEngine NewEngine) {
	for _, direct := range []bool{false, true} {
		mode := "buffered"
		if direct {
			mode = "direct"
		}
		t.Run(mode, func(t *testing.T) {
			if direct && !supportsDirect(t, dir) {
				t.Skipf("the filesystem of %s has no O_DIRECT", dir)
			}
			for _, c := range claims {
				t.Run(c.name, func(t *testing.T) { c.run(newEnv(t, dir, direct, newEngine)) })
			}
		})
	}
}

// RunSilent is Run with files that hang, on engines with as many transfers in
// flight as they have in service.
func RunSilent(t *testing.T, dir string, newEngine NewEngine) {
	for mode, direct := range map[string]bool{"buffered": false, "direct": true} {
		t.Run(mode, func(t *testing.T) { silentFile(newEnv(t, dir, direct, newEngine)) })
	}
}

// claims are the tests of the suite, each with a fresh engine.
var claims = []struct {
	name string
	run  func(*env)
}{
	{"RandomTransfersMatchAModel", randomTransfersMatchAModel},
	{"BatchLargerThanAnyQueueIsServed", batchLargerThanAnyQueueIsServed},
	{"ReadIsShortOnlyAtTheEndOfTheFile", readIsShortOnlyAtTheEndOfTheFile},
	{"WriteExtendsTheFile", writeExtendsTheFile},
	{"LargeTransferIsWhole", largeTransferIsWhole},
	{"EmptyTransfersSucceed", emptyTransfersSucceed},
	{"WritesAndSyncSucceed", writesAndSyncSucceed},
	{"PunchedRangeReadsAsZeroAndKeepsTheSize", punchedRangeReadsAsZero},
	{"ZeroedRangeReadsAsZeroAndKeepsTheSize", zeroedRangeReadsAsZero},
	{"ErrorsAreTheKernelsNumbers", errorsAreTheKernelsNumbers},
	{"FullFilesystemIsENOSPC", fullFilesystemIsENOSPC},
	{"OneFailureLeavesTheRestOfTheBatchAlone", oneFailureLeavesTheRest},
	{"NeighboursReadIsNotBehindALongQueue", neighboursRead},
	{"CalledOffInTheQueueIsNotMade", calledOffIsNotMade},
	{"SubmitFromDoneDoesNotDeadlock", submitFromDone},
	{"CloseWaitsForEverything", closeWaitsForEverything},
	{"BufferBelongsToTheCallerAfterDone", bufferBelongsToTheCallerAfterDone},
	{"TransferStaysInsideItsBuffer", transferStaysInsideItsBuffer},
	{"ReadNowAnswersFromThePageCache", readNowAnswersFromThePageCache},
	{"ReadNowDoesNotAllocate", readNowDoesNotAllocate},
	{"WriteNowWritesToThePageCache", writeNowWritesToThePageCache},
	{"SubmitDoesNotAllocate", submitDoesNotAllocate},
	{"OnlyFilesAndBlockDevicesAreOpened", onlyFilesAndBlockDevicesAreOpened},
	{"FilesComeAndGoWhileOthersWork", filesComeAndGo},
	{"ClosedFileIsNotTheNextOne", closedFileIsNotTheNextOne},
}

// blockBytes is the grain of every offset and length in the suite, aligned
// enough for any direct file.
const blockBytes = 4096

// env is what one claim works with. Its engine is closed, and nothing may be
// left running or lent, when the claim ends.
type env struct {
	*testing.T
	dir    string
	direct bool
	eng    engine.Engine
	bufs   *bufpool.Pool
	closed bool
	files  int
}

func newEnv(t *testing.T, dir string, direct bool, newEngine NewEngine) *env {
	t.Helper()
	leaks := goleak.IgnoreCurrent()
	bufs := bufpool.New(256 << 20)
	bufs.SetPoison(true)
	e := &env{T: t, dir: dir, direct: direct, bufs: bufs, eng: newEngine(t, bufs)}
	t.Cleanup(func() {
		e.closeEngine()
		if err := bufs.Close(); err != nil {
			t.Error(err)
		}
		goleak.VerifyNone(t, leaks)
	})
	return e
}

func (e *env) closeEngine() {
	if e.closed {
		return
	}
	e.closed = true
	if err := e.eng.Close(); err != nil {
		e.Errorf("close engine: %v", err)
	}
}

// path is a name for a new file, removed with the test.
func (e *env) path() string {
	e.files++
	p := filepath.Join(e.dir, fmt.Sprintf("enginetest-%d-%d", os.Getpid(), e.files))
	e.Cleanup(func() { os.Remove(p) })
	return p
}

// create makes a file with the given contents and opens it in the engine.
func (e *env) create(data []byte) *engine.File {
	e.Helper()
	p := e.path()
	if err := os.WriteFile(p, data, 0o600); err != nil {
		e.Fatal(err)
	}
	return e.open(p, os.O_RDWR)
}

// open gives the file at p to the engine until the test ends.
func (e *env) open(p string, flags int) *engine.File {
	e.Helper()
	f := e.openFile(p, flags)
	e.Cleanup(func() {
		if err := f.Close(); err != nil {
			e.Errorf("close file: %v", err)
		}
	})
	return f
}

// openFile is open without the closing.
func (e *env) openFile(p string, flags int) *engine.File {
	e.Helper()
	if e.direct {
		flags |= unix.O_DIRECT
	}
	osf, err := os.OpenFile(p, flags, 0)
	if err != nil {
		e.Fatal(err)
	}
	f, err := e.eng.Open(osf)
	if err != nil {
		osf.Close()
		e.Fatal(err)
	}
	if f.Direct != e.direct || f.Align < 1 || blockBytes%f.Align != 0 {
		e.Fatalf("opened as direct %v, alignment %d; want %v and a divisor of %d",
			f.Direct, f.Align, e.direct, blockBytes)
	}
	return f
}

// buf lends n bytes until the test ends; by then the engine is closed.
func (e *env) buf(n int) []byte {
	e.Helper()
	b, err := e.bufs.Get(e.Context(), n)
	if err != nil {
		e.Fatal(err)
	}
	e.Cleanup(func() {
		e.closeEngine()
		b.Release()
	})
	return b.Bytes()
}

// do runs the batch and fails the test on any error.
func (e *env) do(batch ...*engine.IO) {
	e.Helper()
	if err := engine.Do(e.Context(), e.eng, batch...); err != nil {
		e.Fatal(err)
	}
}

// contents reads the whole file behind the engine's back.
func (e *env) contents(f *engine.File) []byte {
	e.Helper()
	data, err := os.ReadFile(f.OS.Name())
	if err != nil {
		e.Fatal(err)
	}
	return data
}

// pattern is n bytes that tell their own position and seed.
func pattern(n int, seed byte) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(i) ^ byte(i>>8)*7 ^ byte(i>>16)*13 ^ seed
	}
	return p
}

// group hands out a Done that counts, for batches that Do does not fit.
type group struct{ sync.WaitGroup }

func (g *group) done(*engine.IO) { g.Done() }

// supportsDirect tries O_DIRECT on a file in dir.
func supportsDirect(t *testing.T, dir string) bool {
	t.Helper()
	p := filepath.Join(dir, fmt.Sprintf("enginetest-direct-%d", os.Getpid()))
	f, err := os.OpenFile(p, os.O_CREATE|os.O_RDWR|unix.O_DIRECT, 0o600)
	defer os.Remove(p)
	if errors.Is(err, syscall.EINVAL) {
		return false
	}
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	return true
}
