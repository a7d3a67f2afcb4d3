package limits

import "time"

// Leases of context IDs (vsock).
const (
	// Leases bounds the leases at a time: as many guests as one host has, and
	// more.
	Leases = 1024

	// LeaseHolders bounds who holds one lease at a time: the service of a
	// machine, one that takes its place, and somebody who tries it by hand.
	LeaseHolders = 16

	// LeaseName bounds the names of a machine, of its start and of a holder: a
	// UUID, a path of a QMP socket.
	LeaseName = 256

	// LeaseShortest and LeaseLongest bound how long a lease lasts if its
	// holder does not renew it: short enough that a CID whose holder has died
	// is not trusted for long, long enough for a holder that is held up.
	LeaseShortest = time.Second
	LeaseLongest  = time.Hour

	// LeaseUsual is what a holder asks for if nobody says otherwise.
	LeaseUsual = 30 * time.Second
)
