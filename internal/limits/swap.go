package limits

import "time"

// A server that the machine's own swap depends on. All of its memory is there
// before the first request, so what can be in flight is little.
const (
	// SwapPriority is the real-time priority of its threads: above all that
	// are not real-time, and next to nothing above that.
	SwapPriority = 2

	// SwapServerRequests and SwapServerBytes bound what a connection has in
	// flight. The kernel swaps in by 32 KiB and out by at most 128 KiB in
	// Linux 6.1 and 1280 KiB in 6.12; one request may exceed the bound of
	// bytes.
	SwapServerRequests = 16
	SwapServerBytes    = 1 << 20

	// SwapBudget bounds all buffers: one request of the largest size.
	SwapBudget = MaxIO

	// SwapHeap is the Go heap that is there before the collector is turned
	// off: requests take nothing of it, a connection some ten kilobytes.
	SwapHeap = 8 << 20

	// SwapProcs is how many goroutines run at a time: one for the connection,
	// one for what has been read or written.
	SwapProcs = 2

	// SwapWaiters is how many goroutines, and how many entries in queues of the
	// runtime's waits, there are beyond those in use. Each processor keeps up
	// to 128 unused entries and 64 goroutines for itself: what one of them may
	// lack lies with the others. The rest is what may be in use at a time: the
	// workers of the pool, the requests and the connections.
	SwapWaiters = SwapProcs*128 + PoolWorkers + 2*SwapKeep

	// SwapKeep is for how many requests of all connections there is memory.
	SwapKeep = 4 * SwapServerRequests

	// SwapThreads is how many threads are there from the start: one for each
	// worker of the pool that waits for the storage, and for what else may
	// wait: the log, signals, the control of memory, two that run.
	SwapThreads = PoolWorkers + 12

	// SwapThreadsWait bounds the wait for them.
	SwapThreadsWait = 10 * time.Second

	// SwapHeadroom is the least memory that the kernel must keep free
	// (vm.min_free_kbytes): each reply takes some for a moment, and only
	// below that bound others wait and a server of swap does not.
	// SwapHeadroomFactor times what is in flight is the other bound.
	SwapHeadroom       = 8 << 20
	SwapHeadroomFactor = 4

	// SwapUntouched is the length of a run of pages that nobody has touched
	// from which on it is not made resident: the runtime's index of the heap
	// and a table of the random generator have 32 MiB each. The heap itself has
	// no such run, it grows by 4 MiB. SwapMargin at both ends is made all the
	// same: the run may end in variables of others.
	SwapUntouched = 8 << 20
	SwapMargin    = 1 << 20

	// SwapDepth bounds the block devices that stand on one another between one
	// that is asked about and the disk.
	SwapDepth = 8

	// SwapsFile bounds /proc/swaps: some dozen areas are the kernel's own
	// bound.
	SwapsFile = 64 << 10

	// SwapLook is how often a server that was told to stop looks whether the
	// machine still swaps to its disk.
	SwapLook = time.Second
)

// SwapBuffer is a size of buffers, in bytes, and how many of them a server of
// swap has.
type SwapBuffer struct{ Bytes, Count int }

// SwapBuffers are the buffers beyond those of RingArena, which has the sizes
// up to 64 KiB, more than SwapServerRequests of each: what SwapServerBytes allows at a
// time, with the request that exceeds it, and both TurnBuffers of four
// connections.
var SwapBuffers = [...]SwapBuffer{
	{128 << 10, SwapServerBytes / (128 << 10)},
	{256 << 10, SwapServerBytes/(256<<10) + 2*4},
	{512 << 10, SwapServerBytes/(512<<10) + 1},
	{1 << 20, 2},
	{2 << 20, 1},
}
