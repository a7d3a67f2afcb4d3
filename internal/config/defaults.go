package config

import (
	"cmp"
	"strings"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// The folder of the certificates and the mode of sockets, if nothing is said.
const (
	defaultCertificates = "/etc/pki/vmdiskd"
	defaultMode         = "0600"
)

// SetDefaults puts a value where the file has none and nothing is not a value:
// afterwards no word is empty but those that say that something is absent, and a
// format that nobody said.
func (c *Config) SetDefaults() {
	or(&c.Engine, "auto")
	if c.Drain == 0 {
		c.Drain = Duration(limits.Drain)
	}
	or(&c.Log.Level, "info")
	or(&c.Log.Format, "text")
	if c.TLS.PSK == "" {
		or(&c.TLS.Certificates, defaultCertificates)
	}
	if c.Control.Socket != "" {
		or(&c.Control.Mode, defaultMode)
	}
	for i := range c.Listeners {
		c.Listeners[i].SetDefaults()
	}
	for i := range c.Exports {
		c.Exports[i].SetDefaults()
	}
}

// ImageFormat is the format that the image is opened with, raw if nobody said one.
func (e *Export) ImageFormat() string { return cmp.Or(e.Format, "raw") }

// Threshold is WriteThreshold, 0 for none.
func (e *Export) Threshold() int64 {
	if e.WriteThreshold == nil {
		return 0
	}
	return int64(*e.WriteThreshold)
}

// SetDefaults is that of Config, for one export.
func (e *Export) SetDefaults() {
	or(&e.Cache, "writeback")
	or(&e.Lock, "auto")
	if e.Format == "qcow2" {
		or(&e.Discard, "unmap")
		if e.Backing == "" && len(e.BackingFiles)+len(e.DataFiles) > 0 {
			e.Backing = "explicit"
		}
		or(&e.Backing, "deny")
	}
	for i := range e.Listeners {
		e.Listeners[i].SetDefaults()
	}
	for i := range e.Faults {
		if e.Faults[i].Probability == 0 {
			e.Faults[i].Probability = 1
		}
	}
}

// SetDefaults is that of Config, for one listener. The schemes nbds,
// nbds+unix and nbds+vsock demand TLS.
func (l *Listener) SetDefaults() {
	scheme := l.scheme()
	if strings.HasPrefix(scheme, "nbds") {
		or(&l.TLS, "require")
	}
	or(&l.TLS, "off")
	if strings.HasSuffix(scheme, "+unix") {
		or(&l.Mode, defaultMode)
	}
}

// scheme is that of the URI, in lower case.
func (l *Listener) scheme() string {
	scheme, _, _ := strings.Cut(l.URI, ":")
	return strings.ToLower(scheme)
}

// or sets s to v if it is empty.
func or(s *string, v string) {
	if *s == "" {
		*s = v
	}
}
