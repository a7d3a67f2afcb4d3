package limits

import "time"

// What vmdiskctl waits for and shows.
const (
	// ControlCall is how long the daemon has for a request, beyond what it is
	// asked to wait for: an image on slow storage takes a minute to open.
	// Events come for as long as they are wanted.
	ControlCall = 4 * time.Minute

	// TopIntervalLeast and TopIntervalMost bound the time between two looks
	// at the counters: many exports' cost the daemon some milliseconds.
	TopIntervalLeast = 100 * time.Millisecond
	TopIntervalMost  = time.Hour
)
