// Package daemon builds the server from a configuration, runs it and takes it
// down in good order.
package daemon

import (
	"io"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/backing/open"
	"github.com/vmdiskd/vmdiskd/internal/nbd"
	"github.com/vmdiskd/vmdiskd/internal/obs"
	"github.com/vmdiskd/vmdiskd/internal/transport"
)

// Config is everything that a run of the daemon depends on. Values are valid:
// whoever makes a Config has checked what a user wrote.
type Config struct {
	// The disk.
	Image       string // path, or a size for the formats that have no file
	Format      string
	Cache       string
	Lock        string
	ReadOnly    bool
	Backing     open.Policy // of a qcow2 image; see ParseBacking
	Snapshot    string      // of a qcow2 image, by ID or name; "" for the disk
	Discard     string      // what trims do in a qcow2 image: "unmap", "keep" or "ignore"
	Lenient     bool        // damaged qcow2 images are read as QEMU reads them
	ExportName  string
	Description string

	// Where it listens: Endpoints, or the sockets that systemd passed, or
	// standard input and output.
	Endpoints []transport.Endpoint
	Activated bool
	Stdio     bool

	TLS             nbd.TLSMode
	TLSCertificates string
	TLSVerifyPeer   *bool // nil: verified when a CA is there

	Engine        string        // "auto", "uring" or "pool"
	Requests      int           // in flight per connection, 0 for the default
	Poll          time.Duration // see nbd.Options
	Oldstyle      bool
	MaskHandshake uint16
	NoStructured  bool
	NoMeta        bool
	Handshake     time.Duration
	Drain         time.Duration

	// Life of the process.
	User, Group    string
	PIDFile        string
	Run            string // shell command of a captive run
	ExitWithParent bool
	PrintURI       bool
	Stdout         io.Writer

	Log obs.Options
}

// ParseBacking reads what a user wrote about the files that an image may name:
// a policy, and files where the policy is to name them. See open.ParsePolicy.
func ParseBacking(policy string, files, dataFiles []string) (open.Policy, error) {
	return open.ParsePolicy(policy, files, dataFiles)
}

// wantsTLS tells whether URIs are nbds.
func (c *Config) wantsTLS() bool { return c.TLS == nbd.TLSRequire }
