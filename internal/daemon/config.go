// Package daemon builds the server from a configuration, runs it and takes it
// down in good order.
package daemon

import (
	"io"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/backing/open"
	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/confine"
	"github.com/vmdiskd/vmdiskd/internal/nbd"
	"github.com/vmdiskd/vmdiskd/internal/obs"
	"github.com/vmdiskd/vmdiskd/internal/transport"
)

// Config is everything that a run of the daemon depends on. Values are valid:
// whoever makes a Config has checked what a user wrote.
type Config struct {
	// Disk is the one disk of a run without a configuration file. With one,
	// Service is what it says.
	Disk    config.Export
	Service *config.Config

	// Verbose says that the level of the log is not for the configuration to say.
	Verbose bool

	// FaultInjection allows exports to have faults.
	FaultInjection bool

	// File is the path of the configuration file, Text what was read there.
	File string
	Text []byte

	// Confine is what becomes of a daemon that cannot be confined; "" is
	// confine.None. Handed is what stage 0 hands over to the worker, nil in
	// stage 0 and without stages.
	Confine confine.Mode
	Handed  *Handed

	// Where it listens: Endpoints, or the sockets that systemd passed, or
	// standard input and output.
	Endpoints []transport.Endpoint
	Activated bool
	Stdio     bool

	TLS             nbd.TLSMode
	TLSCertificates string
	TLSVerifyPeer   *bool // nil: verified when a CA is there

	// InsecurePlaintext lets Endpoints, passed sockets and standard input be
	// open to networks without TLS.
	InsecurePlaintext bool

	// TLSKeys is the file of the pre-shared keys, or "". With it
	// TLSCertificates may be "": then there are no certificates.
	TLSKeys string

	// TLSSaid: Service has [tls]. Its certificates and keys are loaded then, whether
	// a listener wants them or one that comes will.
	TLSSaid bool

	Engine        string        // "auto", "uring" or "pool"
	Requests      int           // in flight per connection, 0 for the default
	Poll          time.Duration // see nbd.Options
	Oldstyle      bool
	MaskHandshake uint16
	NoStructured  bool
	NoMeta        bool
	Handshake     time.Duration
	Drain         time.Duration

	Swap Swap

	// Life of the process.
	User, Group    string
	PIDFile        string
	Run            string // shell command of a captive run
	ExitWithParent bool
	PrintURI       bool
	Stdout         io.Writer

	Log obs.Options
}

// CheckBacking says what is wrong with what a user wrote about the files that
// an image may name. See open.ParsePolicy.
func CheckBacking(x *config.Export) error {
	_, err := open.ParsePolicy(x.Backing, x.BackingFiles, x.DataFiles)
	return err
}

// wantsTLS tells whether URIs are nbds.
func (c *Config) wantsTLS() bool { return c.TLS == nbd.TLSRequire }
