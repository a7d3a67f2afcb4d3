// Package api has the words of the control API: HTTP with JSON over a Unix
// socket, version 1. The server's handlers, the client and openapi.yaml say
// the same with them.
package api

import (
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/config"
)

// Version is the first part of every path: "/v1/exports".
const Version = "v1"

// Paths of version 1. {name} is an export's name, percent-encoded.
//
//	GET    /v1/status                     Status
//	GET    /v1/exports                    []Export
//	POST   /v1/exports                    AddExport -> Export
//	GET    /v1/exports/{name}             Export
//	PATCH  /v1/exports/{name}             Patch -> Export
//	DELETE /v1/exports/{name}?force=&timeout=
//	POST   /v1/exports/{name}/pause       Pause
//	POST   /v1/exports/{name}/resume
//	POST   /v1/exports/{name}/resize      Resize -> Export
//	POST   /v1/exports/{name}/snapshot    Snapshot -> Export
//	DELETE /v1/exports/{name}/snapshot?force=&dry-run=
//	                                      Forgotten
//	GET    /v1/clients?export=            []Client
//	DELETE /v1/clients/{id}
//	GET    /v1/stats                      []Stats
//	GET    /v1/events                     a line of JSON for each Event, until the client leaves
//	GET    /v1/leases                     []Lease
//	POST   /v1/leases                     OpenLease -> Lease
//	DELETE /v1/leases/{id}?start=&holder=
//	                                      {id} is a CID
//	POST   /v1/reload?dry-run=            Reload
//	GET    /metrics                       Prometheus' text format
const (
	PathStatus  = "/v1/status"
	PathExports = "/v1/exports"
	PathClients = "/v1/clients"
	PathStats   = "/v1/stats"
	PathEvents  = "/v1/events"
	PathLeases  = "/v1/leases"
	PathReload  = "/v1/reload"
	PathMetrics = "/metrics"
)

// FilePrefix and a decimal number, "fd:0", stand in the place of a path for a
// descriptor that is sent with the first byte of the request (SCM_RIGHTS).
const FilePrefix = "fd:"

// Error is the body of every answer that is not a success.
type Error struct {
	Code string `json:"code"` // one of the Code constants
	Text string `json:"text"` // for people
}

// Error is the text.
func (e *Error) Error() string { return e.Text }

// Codes of errors, with their HTTP status.
const (
	CodeInvalid     = "invalid"     // 400, and 405, 408 or 413: the request makes no sense
	CodeForbidden   = "forbidden"   // 403: the peer or the image's place does not allow it
	CodeNotFound    = "not-found"   // 404
	CodeExists      = "exists"      // 409: the name is taken
	CodeInUse       = "in-use"      // 409: not while there are clients, or no room for one more; 503: too many connections, nothing was read
	CodeUnsupported = "unsupported" // 422: this disk cannot do that
	CodeTimeout     = "timeout"     // 504: it takes longer than was allowed
	CodeFailed      = "failed"      // 500: the storage or the system failed
)

// Status is the daemon as a whole.
type Status struct {
	Version   string            `json:"version"`
	PID       int               `json:"pid"`
	Started   time.Time         `json:"started"`
	Engine    string            `json:"engine"`
	Exports   int               `json:"exports"`
	Clients   int               `json:"clients"`
	Listeners []string          `json:"listeners"` // addresses
	Config    string            `json:"config,omitempty"`
	Memory    map[string]int64  `json:"memory"` // bytes in buffers and caches
	Notes     map[string]string `json:"notes,omitempty"`
	Security  []Control         `json:"security,omitempty"` // what confines the daemon
}

// Control is a measure that confines the daemon.
type Control struct {
	Name   string `json:"name"`
	State  string `json:"state"`            // "enforced", "degraded" or "off"
	Reason string `json:"reason,omitempty"` // why it is not enforced
}

// AddExport asks for a new export. Images may be names of files, or stand for
// descriptors that come with the request (SCM_RIGHTS): the image is then
// "fd:0", its backing file or data file "fd:1", and so on.
type AddExport struct {
	config.Export
	Persist bool `json:"persist,omitempty"` // keep it in the state folder
}

// States of an export: those of package export in which it can be seen, and two
// beside them.
const (
	StateOpening  = "opening"
	StateReady    = "ready"
	StateFailed   = "failed"
	StateDraining = "draining"
	StatePaused   = "paused"   // ready, but requests are held back
	StatePoisoned = "poisoned" // ready, but it takes no more writes
)

// Export is an export as it is.
type Export struct {
	config.Export
	State    string   `json:"state"` // see StateReady
	Size     int64    `json:"size"`  // bytes; 0 of one that could not be opened
	Writable bool     `json:"writable"`
	Clients  int      `json:"clients"`
	Origin   string   `json:"origin"`          // "config", "state", "api" or "command line"
	URIs     []string `json:"uris"`            // where clients find it
	Error    string   `json:"error,omitempty"` // why it does not work, yet or any more, or takes no more writes
	File
}

// File tells which file an export has open as its image, or the top of its chain,
// whatever is at the path by now. Of a block device Device is its own number, and
// Inode absent. Both are absent where no file is open.
type File struct {
	Device string `json:"device,omitempty"` // "major:minor"; of another file that of its file system
	Inode  uint64 `json:"inode,omitempty"`
}

// FileOf is the file that stat(2) says st of.
func FileOf(st *unix.Stat_t) File {
	dev, ino := st.Dev, st.Ino
	if st.Mode&unix.S_IFMT == unix.S_IFBLK { // another node may have its number
		dev, ino = st.Rdev, 0
	}
	return File{Device: fmt.Sprintf("%d:%d", unix.Major(dev), unix.Minor(dev)), Inode: ino}
}

// Patch changes what can change while an export is in use. What is absent
// stays.
type Patch struct {
	Description *string         `json:"description,omitempty"`
	ReadOnly    *bool           `json:"readonly,omitempty"`
	Default     *bool           `json:"default,omitempty"`
	Grants      *[]config.Grant `json:"grants,omitempty"`
	TrustCID    *bool           `json:"vsock-trust-cid,omitempty"`
	Connections *int            `json:"max-connections,omitempty"`
	Rate        *config.Rate    `json:"rate,omitempty"` // all zero: no bound
	LogRequests *bool           `json:"log-requests,omitempty"`
	Faults      *[]config.Fault `json:"faults,omitempty"`

	// WriteThreshold arms that of the export, also at the offset at which it was
	// before; 0 disarms it.
	WriteThreshold *config.Size `json:"write-threshold,omitempty"`

	// RateKeys are single keys of the rate, as config.Rate.Set has them; the
	// others stay. Not with Rate.
	RateKeys map[string]string `json:"rate-keys,omitempty"`
}

// Pause holds back all requests of an export after a flush, until Resume or
// the limit.
type Pause struct {
	Limit config.Duration `json:"limit,omitempty"` // 0: the longest allowed
}

// Resize makes the disk larger. For a raw image the file is extended unless it
// is large enough already.
type Resize struct {
	Size int64 `json:"size,omitempty"` // bytes, or
	By   int64 `json:"by,omitempty"`   // what comes on top of what the disk has then
}

// Snapshot puts a new qcow2 overlay above the image, while the export is
// paused: what is written from then on goes there. An export that was not kept is
// kept from then on.
type Snapshot struct {
	Overlay string `json:"overlay"` // path, or "fd:0": an empty file
}

// Forgotten is the overlay that a snapshot has put above an image of the
// configuration and that is forgotten, or would be. Its file stays.
type Forgotten struct {
	DryRun  bool   `json:"dry-run,omitempty"`
	Overlay string `json:"overlay,omitempty"` // unless what was remembered cannot be read
	Image   string `json:"image,omitempty"`   // what the configuration names, if it has the export
}

// Client is a connection.
type Client struct {
	ID       uint64    `json:"id"`
	Peer     string    `json:"peer"`
	Via      string    `json:"via"` // listener
	Export   string    `json:"export"`
	Since    time.Time `json:"since"`
	TLS      string    `json:"tls,omitempty"` // version and cipher
	Cert     string    `json:"cert,omitempty"`
	PSK      string    `json:"psk,omitempty"` // identity of the pre-shared key
	Writable bool      `json:"writable"`
	Features []string  `json:"features"` // "structured", "extended", "base:allocation", …
	InFlight int       `json:"in-flight"`
	Requests uint64    `json:"requests"`
	BytesIn  uint64    `json:"bytes-in"`
	BytesOut uint64    `json:"bytes-out"`
	Stalled  bool      `json:"stalled,omitempty"`
}

// OpenLease says that a CID belongs to one start of a machine, or that it still
// does.
type OpenLease struct {
	CID   uint32          `json:"cid"`
	VM    string          `json:"vm"`    // as grants name it
	Start string          `json:"start"` // tells this start of the machine from others
	TTL   config.Duration `json:"ttl"`   // it ends then if it is not renewed

	// Holder tells who says so from others who do: the lease lasts as long as one
	// of them wants it to. Those without it are one.
	Holder string `json:"holder,omitempty"`
}

// Lease is one that is open.
type Lease struct {
	CID     uint32    `json:"cid"`
	VM      string    `json:"vm"`
	Start   string    `json:"start"`
	Expires time.Time `json:"expires"`
}

// Stats are the counters of one export since it was opened.
type Stats struct {
	Export   string             `json:"export"`
	Time     time.Time          `json:"time"`
	InFlight int                `json:"in-flight"`
	Commands map[string]Command `json:"commands"` // "read", "write", "flush", …
}

// Command counts the requests of one kind.
type Command struct {
	Requests uint64 `json:"requests"`
	Errors   uint64 `json:"errors"`
	Bytes    uint64 `json:"bytes"`
	// Latency counts requests by duration: Latency[i] took less than
	// 2^i microseconds and no less than half of that.
	Latency []uint64 `json:"latency"`
}

// Event is something that happened.
type Event struct {
	Time   time.Time `json:"time"`
	Kind   string    `json:"kind"` // those of package obs, "reloaded", or "lost"
	Export string    `json:"export,omitempty"`
	Client uint64    `json:"client,omitempty"`
	State  string    `json:"state,omitempty"`
	Text   string    `json:"text,omitempty"`
	Lost   uint64    `json:"lost,omitempty"` // of kind "lost": events that this listener was too slow for

	// Of kind "threshold", both in bytes: the offset that a write has gone beyond,
	// and by how much.
	Threshold int64 `json:"write-threshold,omitempty"`
	Exceeded  int64 `json:"amount-exceeded,omitempty"`
}

// Reload says what a reload of the configuration has changed, or would change.
type Reload struct {
	DryRun  bool     `json:"dry-run,omitempty"`
	Changes []string `json:"changes"`
	Restart bool     `json:"restart,omitempty"` // of a dry run: a reload refuses it, a start does it
}
