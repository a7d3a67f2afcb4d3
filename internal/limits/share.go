package limits

import "time"

// How those who use one process share its storage. What a transfer costs is
// told in bytes that the storage could move meanwhile.
const (
	// ShareOp is what a transfer costs beyond its bytes: a disk that reads 1.5
	// GB/s in large pieces makes some 45000 transfers of 4 KiB a second.
	ShareOp = 32 << 10

	// ShareSync is the cost of what moves no bytes of ours: a sync, the
	// release or zeroing of a range. It is bounded so that a guest that
	// flushes a lot is served the less, and yet served.
	ShareSync = 128 << 10

	// ShareTurn is what an owner may spend in one round of those that wait.
	ShareTurn = 64 << 10

	// ShareDelay is how long a disk may work at what several owners have in
	// flight there, divided among them: the disk has a queue of its own, which
	// is not fair, and what is in it stands before whatever comes. Beside a
	// guest with one read at a time on a disk of 75000 requests a second, a
	// neighbour has some 10 in flight; with 16 less than a third of the
	// guest's reads are left. A disk that does more has more in flight.
	ShareDelay = 250 * time.Microsecond

	// ShareFlying is the least cost of that: 16 small transfers of two. A disk of
	// which nothing is known yet has it.
	ShareFlying = 512 << 10

	// ShareLook is how much a disk moves between two looks at the clock.
	ShareLook = 4 << 20

	// ShareIdle is what others have moved on a disk since an owner's last
	// request when that owner does not count any more: some 50 ms.
	ShareIdle = 32 << 20

	// ShareSpare is the part of the places of an engine that the disk which has
	// most of them leaves free, if it hangs, and of what it takes the part that
	// one owner leaves to others: one in so many.
	ShareSpare = 8

	// ShareLast is the part of all places that each disk leaves free at least, one
	// in so many, or half of those that the others have left where that is less. So
	// of the 256 places of a ring some are free yet when six disks hang, each of
	// which had all that it may have in flight.
	ShareLast = 16

	// ShareTrial is the part of the free places that a disk takes beyond those it
	// gives back, until something of it ends again: one in so many. What works has
	// all it wants after a few transfers, what hangs has no more: twelve such disks
	// leave some of 256 places, five some of 16.
	ShareTrial = 3

	// ShareKept is how many places of an engine are for the watchdog alone, and
	// how many the owners leave to the program itself. Where both together were
	// more than one in ShareSpare, there are none.
	ShareKept = 1

	// ShareOwners bounds the owners that are remembered for one disk while
	// they have nothing to do.
	ShareOwners = 64
)
