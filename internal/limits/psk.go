package limits

import "time"

// Pre-shared keys of TLS.
const (
	// PSKFile bounds the key file: PSKIdentities lines of the longest kind.
	PSKFile = 1 << 20

	// PSKIdentities bounds the identities of a key file. Every handshake
	// compares its identity with all of them, so that the time tells nothing.
	PSKIdentities = 1024

	// PSKIdentity bounds one identity. GnuTLS, which libnbd and QEMU use,
	// sends at most 128 bytes.
	PSKIdentity = 128

	// PSKKeys bounds the keys of one identity: the old and the new one while
	// a key is replaced.
	PSKKeys = 2

	// MinPSK and MaxPSK bound a key. Below 128 bits a recorded handshake can
	// be searched for its key; no hash takes more than 64 bytes in one piece.
	MinPSK = 16
	MaxPSK = 64

	// StrongPSK is what a key should have: below it there is a warning
	// (RFC 9257, section 6, asks for 128 bits of entropy, which a longer
	// random key has for certain).
	StrongPSK = 32

	// PSKLock is how long a command that changes a key file waits for others
	// that do: each takes a few milliseconds.
	PSKLock = 10 * time.Second

	// PSKHello bounds what is remembered of the first messages of a
	// handshake, for each side: two ClientHellos of the size that crypto/tls
	// takes.
	PSKHello = 132 << 10
)

// Tokens, which come with the names of exports.
const (
	// TokenDigits are the hexadecimal digits of a token: 256 bits, which
	// nobody guesses.
	TokenDigits = 64

	// TokenAttempts and TokenWindow bound the wrong tokens of a peer for an export,
	// each counted once: what is more than this many in that time is wrong unseen.
	TokenAttempts = 5
	TokenWindow   = time.Minute

	// TokenPeers bounds the pairs of a peer and an export of which wrong tokens are
	// counted.
	TokenPeers = 4096
)
