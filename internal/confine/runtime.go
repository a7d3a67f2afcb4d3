package confine

import (
	"errors"
	"fmt"
	"os"
	"reflect"
	"runtime"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// SettleRuntime gives the Go runtime all that a server of swap makes it use:
// heap, threads, goroutines and what those need to wait for one another. It
// turns the collector off and fixes the number of processors; neither may be
// changed any more.
func SettleRuntime() error {
	runtime.GOMAXPROCS(limits.SwapProcs)
	if err := startThreads(limits.SwapThreads); err != nil {
		return err
	}
	growHeap(limits.SwapHeap)
	// After the collection, which drops what is not in use.
	makeGoroutines(limits.SwapWaiters)
	makeWaiters(limits.SwapWaiters)
	return nil
}

// makeGoroutines leaves n ended goroutines to the runtime, which uses them for
// new ones.
func makeGoroutines(n int) {
	var alive sync.WaitGroup
	over := make(chan struct{})
	for range n {
		alive.Go(func() { <-over })
	}
	close(over)
	alive.Wait()
}

// makeWaiters leaves n entries of wait queues to the runtime: a goroutine takes
// one for each channel, lock or condition that it waits for, and leaves it to
// the processor that it runs on then.
func makeWaiters(n int) {
	wake := make(chan struct{})
	queues := slices.Repeat([]reflect.SelectCase{{Dir: reflect.SelectRecv, Chan: reflect.ValueOf(wake)}}, n)
	var waiting sync.WaitGroup
	waiting.Go(func() { reflect.Select(queues) })
	for woken := false; !woken; {
		select {
		case wake <- struct{}{}: // it stands in all queues
			woken = true
		default:
			runtime.Gosched()
		}
	}
	waiting.Wait()
}

// growHeap leaves n bytes of the heap free and turns the collector off, which
// would otherwise give memory back, and ask for it again.
func growHeap(n int) {
	const piece = 32 << 10
	pieces := make([][]byte, n/piece)
	for i := range pieces {
		pieces[i] = make([]byte, piece)
	}
	runtime.KeepAlive(pieces)
	pieces = nil
	runtime.GC()
	debug.SetGCPercent(-1)
}

var errFewThreads = errors.New("the threads of a server of swap do not start")

// startThreads makes n threads wait in the kernel at the same time. They stay
// when they need not wait any more.
func startThreads(n int) error {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		return err
	}
	var waiting sync.WaitGroup
	for range n {
		waiting.Go(func() {
			var b [1]byte
			for {
				if _, err := unix.Read(p[0], b[:]); !errors.Is(err, unix.EINTR) {
					return
				}
			}
		})
	}
	err := awaitThreads(n + 1)
	err = errors.Join(err, unix.Close(p[1])) // ends all reads
	waiting.Wait()
	return errors.Join(err, unix.Close(p[0]))
}

// awaitThreads returns when the process has n threads.
func awaitThreads(n int) error {
	over := time.NewTimer(limits.SwapThreadsWait)
	defer over.Stop()
	look := time.NewTicker(time.Millisecond)
	defer look.Stop()
	for {
		dir, err := os.ReadDir("/proc/self/task")
		if err != nil || len(dir) >= n {
			return err
		}
		select {
		case <-look.C:
		case <-over.C:
			return fmt.Errorf("%w: %d of %d", errFewThreads, len(dir), n)
		}
	}
}
