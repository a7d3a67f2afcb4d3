// Package config is what an operator says of a service: its listeners, its
// exports and who may use them. The same words are those of the file, in TOML,
// and of the control API, in JSON.
package config

import "time"

// Config is a whole configuration file.
type Config struct {
	// Engine is "auto", "uring" or "pool".
	Engine string `toml:"engine"`

	// Drain bounds how long requests in flight are waited for at the end.
	Drain Duration `toml:"drain-timeout"`

	Log       Log        `toml:"log"`
	TLS       TLS        `toml:"tls"`
	Control   Control    `toml:"control"`
	Metrics   Metrics    `toml:"metrics"`
	Images    Images     `toml:"images"`
	Listeners []Listener `toml:"listener"`
	Exports   []Export   `toml:"export"`

	// Groups are rate limits that exports share, by name.
	Groups map[string]Rate `toml:"rate-group"`
}

// Log says what is logged and where to.
type Log struct {
	Level  string `toml:"level"`  // "debug", "info", "warn" or "error"
	Format string `toml:"format"` // "text", "json" or "journal"

	// Slow is how long a request may take before it is logged; 0 is never.
	Slow Duration `toml:"slow-request"`
}

// TLS is where certificates and keys are.
type TLS struct {
	// Certificates is a folder; with PSK, "" is for none.
	Certificates string `toml:"certificates"`
	PSK          string `toml:"psk"`         // file of pre-shared keys; "" for none
	VerifyPeer   *bool  `toml:"verify-peer"` // nil: when there is a CA
}

// Control is the control socket.
type Control struct {
	Socket string `toml:"socket"` // path; "" for none
	Mode   string `toml:"mode"`   // octal
	Owner  string `toml:"owner"`  // USER[:GROUP]

	// Who may look, and who may change: user and group names or numbers. The
	// user of the daemon and root may do both.
	ReadUsers    []string `toml:"read-users"`
	ReadGroups   []string `toml:"read-groups"`
	ChangeUsers  []string `toml:"change-users"`
	ChangeGroups []string `toml:"change-groups"`

	// State is the folder of the exports that were made by the API and are to
	// be kept; "" keeps none.
	State string `toml:"state"`
}

// Metrics is the listener for Prometheus beside the control socket.
type Metrics struct {
	Listen string `toml:"listen"` // HOST:PORT; "" for none
}

// Images bounds what exports may open.
type Images struct {
	// Roots are the folders in which images of the API and of the file must
	// lie; none allows every path in the file and none in the API.
	Roots []string `toml:"roots"`
}

// Listener is an address that clients connect to.
type Listener struct {
	// URI without an export: nbd://HOST:PORT, nbds://…, nbd+unix:///?socket=PATH,
	// nbd+vsock://CID:PORT; or systemd:NAME for a socket that systemd opened.
	URI   string `toml:"uri" json:"uri"`
	Mode  string `toml:"mode" json:"mode,omitempty"`   // octal, of a Unix socket
	Owner string `toml:"owner" json:"owner,omitempty"` // USER[:GROUP] of a Unix socket

	// SELinux contexts of a Unix socket and of its file; "" for what the
	// policy gives them.
	SELinuxLabel     string `toml:"selinux-label" json:"selinux-label,omitempty"`
	SELinuxPathLabel string `toml:"selinux-path-label" json:"selinux-path-label,omitempty"`

	// TLS is "off", "on" (clients may encrypt) or "require".
	TLS string `toml:"tls" json:"tls,omitempty"`

	// InsecurePlaintext lets clients come from networks, at a TCP address that
	// is not of the loopback, without encryption.
	InsecurePlaintext bool `toml:"insecure-plaintext" json:"insecure-plaintext,omitempty"`

	// Exports are the names that can be seen here; none for all that name no
	// listener of their own.
	Exports []string `toml:"exports" json:"exports,omitempty"`
}

// Export is a named disk.
type Export struct {
	Name        string `toml:"name" json:"name"`
	Description string `toml:"description" json:"description,omitempty"`

	// Default: the empty name opens it too. One export at most.
	Default bool `toml:"default" json:"default,omitempty"`

	// The image: a path, or for the formats "mem" and "null" a size.
	Image        string   `toml:"image" json:"image,omitempty"`
	Format       string   `toml:"format" json:"format,omitempty"` // "" is raw that nobody said: see open.Open
	ReadOnly     bool     `toml:"readonly" json:"readonly,omitempty"`
	Cache        string   `toml:"cache" json:"cache,omitempty"`
	Lock         string   `toml:"image-lock" json:"image-lock,omitempty"`
	Backing      string   `toml:"backing" json:"backing,omitempty"` // policy, as --backing
	BackingFiles []string `toml:"backing-files" json:"backing-files,omitempty"`
	DataFiles    []string `toml:"data-files" json:"data-files,omitempty"`
	Snapshot     string   `toml:"snapshot" json:"snapshot,omitempty"`
	Discard      string   `toml:"discard" json:"discard,omitempty"`
	Lenient      bool     `toml:"lenient" json:"lenient,omitempty"`

	// Snapshots is how many of BackingFiles, from the first one on, snapshots of the
	// daemon have put there: the image above each must name it. Nobody else says it.
	Snapshots int `toml:"-" json:"-"`

	L2CacheSize Size `toml:"l2-cache-size" json:"l2-cache-size,omitempty"` // bytes; 0 is limits.MapCache

	// WriteThreshold is an offset in the file that has the guest's data, in bytes:
	// the first write that goes beyond it is told. 0, or nil where it was never
	// set, is none.
	WriteThreshold *Size `toml:"write-threshold" json:"write-threshold,omitempty"`

	// RequireTLS hides the export from connections that are not encrypted.
	RequireTLS bool `toml:"require-tls" json:"require-tls,omitempty"`

	// Listeners are addresses at which only this export is to be found.
	Listeners []Listener `toml:"listener" json:"listeners,omitempty"`

	// Grants say who may open it and how: the first that matches decides, and
	// with none of them everybody may who reaches a listener.
	Grants []Grant `toml:"grant" json:"grants,omitempty"`

	// TrustCID lets vsock peers write without a lease and a proof.
	TrustCID bool `toml:"vsock-trust-cid" json:"vsock-trust-cid,omitempty"`

	// Connections bounds the clients at a time; 0 is no bound but the
	// server's.
	Connections int `toml:"max-connections" json:"max-connections,omitempty"`

	// Layers above the image, in the order in which they stand here, the
	// window lowest.
	Window       *Window    `toml:"window" json:"window,omitempty"`
	Overlay      *Overlay   `toml:"overlay" json:"overlay,omitempty"`
	Protect      []Range    `toml:"protect" json:"protect,omitempty"`
	BlockSize    *BlockSize `toml:"block-size" json:"block-size,omitempty"`
	Rate         *Rate      `toml:"rate" json:"rate,omitempty"`
	RateGroup    string     `toml:"rate-group" json:"rate-group,omitempty"`
	LogRequests  bool       `toml:"log-requests" json:"log-requests,omitempty"`
	FlushOnClose bool       `toml:"flush-on-close" json:"flush-on-close,omitempty"`
	Faults       []Fault    `toml:"fault" json:"faults,omitempty"`
}

// Grant gives a kind of access to peers that have all the facts that it names;
// of a list, one of them. A fact that a peer does not have does not match.
type Grant struct {
	Access string `toml:"access" json:"access"` // "rw", "ro" or "none"

	UIDs      []uint32 `toml:"uid" json:"uid,omitempty"`
	GIDs      []uint32 `toml:"gid" json:"gid,omitempty"`
	CIDs      []uint32 `toml:"cid" json:"cid,omitempty"`
	Addresses []string `toml:"address" json:"address,omitempty"` // IP or prefix
	Label     string   `toml:"label" json:"label,omitempty"`     // SELinux context, whole
	CertNames []string `toml:"cert-name" json:"cert-name,omitempty"`

	// Parts of the context: its type, and its level with exactly the
	// categories, as in "s0:c1,c2".
	SELinuxTypes []string `toml:"selinux-type" json:"selinux-type,omitempty"`
	SELinuxLevel string   `toml:"selinux-level" json:"selinux-level,omitempty"`
	PSKs         []string `toml:"psk" json:"psk,omitempty"` // identities of pre-shared keys

	// Tokens are the SHA-256, in hexadecimal digits, of tokens that come with
	// the name of the export; "@" and a time behind it say when it expires.
	Tokens []string `toml:"token-sha256" json:"token-sha256,omitempty"`

	// VMs are machines, one of which has a lease of the CID.
	VMs []string `toml:"vm" json:"vm,omitempty"`
}

// Range is a range of the disk; sizes are as ParseSize reads them.
type Range struct {
	Offset Size `toml:"offset" json:"offset"`
	Length Size `toml:"length" json:"length"`
}

// Window shows a part of the image: a range, to the end with a Length of 0, or
// a partition.
type Window struct {
	Offset    Size `toml:"offset" json:"offset,omitempty"`
	Length    Size `toml:"length" json:"length,omitempty"`
	Partition int  `toml:"partition" json:"partition,omitempty"` // from 1

	// SectorSize is what the partition table counts in, in bytes; 0 for the
	// logical sectors of a block device, and 512 for a file.
	SectorSize Size `toml:"sector-size" json:"sector-size,omitempty"`
}

// Overlay takes all writes and forgets them at the end.
type Overlay struct {
	Quota Size `toml:"quota" json:"quota"` // bytes that it may take
}

// BlockSize is what clients are told, and held to.
type BlockSize struct {
	Minimum   Size `toml:"minimum" json:"minimum,omitempty"`
	Preferred Size `toml:"preferred" json:"preferred,omitempty"`
	Maximum   Size `toml:"maximum" json:"maximum,omitempty"`
}

// Fault makes requests slow or fail, where the daemon was started with
// --enable-fault-injection.
type Fault struct {
	Ops         []string `toml:"ops" json:"ops,omitempty"` // "read", "write", "zero", "trim", "flush"; none is all
	Offset      Size     `toml:"offset" json:"offset,omitempty"`
	Length      Size     `toml:"length" json:"length,omitempty"` // 0: to the end
	Probability float64  `toml:"probability" json:"probability,omitempty"`
	Count       int      `toml:"count" json:"count,omitempty"` // 0: for ever
	Error       string   `toml:"error" json:"error,omitempty"` // "EIO" or "ENOSPC"; "" for a delay only
	Delay       Duration `toml:"delay" json:"delay,omitempty"`
}

// Duration is a time.Duration that is written as Go does: "5s", "250ms".
type Duration time.Duration

// Size is a number of bytes, or text with a suffix: "10G".
type Size int64
