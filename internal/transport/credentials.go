package transport

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/transport/stamp"
)

// The files of a certificate directory have the names that QEMU, libnbd and
// nbdkit use.
const (
	caFile  = "ca-cert.pem"
	crlFile = "ca-crl.pem"
)

// CredentialsFolder is the name of the folder itself among the files of
// OpenCredentials.
const CredentialsFolder = "."

// TLSOptions are for LoadCredentials.
type TLSOptions struct {
	// Client loads client-cert.pem and client-key.pem, which may both be
	// absent, instead of server-cert.pem and server-key.pem.
	Client bool

	// NoVerifyPeer makes a server accept clients without a certificate even
	// though there is a CA. A client always verifies.
	NoVerifyPeer bool

	// Given, if not nil, are all files that there are, opened by
	// OpenCredentials: they are what is loaded first. With an error LoadCredentials
	// closes them; else they stay open, to look at while the folder is closed to the
	// process.
	Given map[string]*os.File

	// Log gets the reloads; nil is slog.Default.
	Log *slog.Logger
}

// Credentials are the certificates of one directory. They follow the files:
// each handshake looks whether one of them has changed, and then uses those that
// are in order in place of the old ones. Certificate and key change together. What
// is wrong with one file keeps no revocation in another from taking effect, and a
// file that has not changed is not read again: the process may have lost the right
// to, and in a folder that is closed to it, that is told by the files that it was
// given. Safe for concurrent use.
type Credentials struct {
	dir    string
	opt    TLSOptions  // Given included
	folder stamp.Stamp // of the one that was given, before the files were read
	log    *slog.Logger

	mu  sync.Mutex
	set *credentialSet // guarded by mu; what it points to never changes

	// refused says which files could not be loaded, why, and when that was
	// found; guarded by mu.
	refused struct {
		stamps map[string]stamp.Stamp // of all files
		unused map[string]stamp.Stamp // of those that the set does not have
		text   string
		at     time.Time
	}
}

// credentialSet is what the files of one moment say.
type credentialSet struct {
	given  map[string]*os.File // only while they are loaded
	stamps map[string]stamp.Stamp
	own    *tls.Certificate // nil for a client without one
	roots  *x509.CertPool   // nil for a server without ca-cert.pem
	crls   revocations      // nil without ca-crl.pem
	server *tls.Config      // nil for a client

	authorities []*x509.Certificate // those of roots
}

// part is what of a set can change while the rest stays.
type part struct {
	files []string
	read  func(s *credentialSet, dir string, o TLSOptions) error
}

// parts are all that a set has.
func (o TLSOptions) parts() (own, ca, crl part) {
	cert, key := o.ownFiles()
	return part{[]string{cert, key}, (*credentialSet).readOwn},
		part{[]string{caFile}, (*credentialSet).readCA},
		part{[]string{crlFile}, (*credentialSet).readCRL}
}

// LoadCredentials reads the certificates in dir. A server needs its
// certificate and key; with ca-cert.pem it demands certificates of its
// clients, and with ca-crl.pem it refuses revoked ones. A client needs
// ca-cert.pem: who names a folder does not mean the system's authorities.
//
// Once loaded, ca-cert.pem and ca-crl.pem may change but not vanish: that
// would silently open what they close.
func LoadCredentials(dir string, o TLSOptions) (*Credentials, error) {
	c := &Credentials{dir: dir, opt: o, log: o.Log}
	if f := o.Given[CredentialsFolder]; f != nil {
		if fi, err := f.Stat(); err == nil {
			c.folder = stamp.Of(fi, nil)
		}
	}
	set := &credentialSet{given: o.Given}
	own, ca, crl := o.parts()
	set, err := set.with(dir, o, own, ca, crl)
	if err != nil {
		for _, f := range o.Given {
			f.Close()
		}
		return nil, fmt.Errorf("tls credentials in %q: %w", dir, err)
	}
	set.given, c.set = nil, set
	if c.log == nil {
		c.log = slog.Default()
	}
	set.crls.warn(c.log, dir)
	return c, nil
}

// VerifiesPeers says whether a server with these credentials demands
// certificates of its clients.
func (c *Credentials) VerifiesPeers() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.set.server != nil && c.set.server.ClientAuth == tls.RequireAndVerifyClientCert
}

// ServerConfig returns the configuration of a server, which stays valid as
// the files change: at least TLS 1.2, no session tickets, so that each
// connection is verified anew.
func (c *Credentials) ServerConfig() *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS12,
		SessionTicketsDisabled: true,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
			if s := c.current().server; s != nil {
				return s, nil
			}
			return nil, errors.New("credentials are those of a client")
		},
	}
}

// ClientConfig returns the configuration for connections to the server that
// is called serverName in its certificate; an IP address is possible. The
// server is always verified. Files that change later need a new ClientConfig.
func (c *Credentials) ClientConfig(serverName string) *tls.Config {
	set := c.current()
	cfg := &tls.Config{
		MinVersion:       tls.VersionTLS12,
		ServerName:       serverName,
		RootCAs:          set.roots,
		VerifyConnection: set.verify,
	}
	if set.own != nil && c.opt.Client {
		cfg.Certificates = []tls.Certificate{*set.own}
	}
	return cfg
}

// ClientConfig is for connections to the server that is called serverName, with
// the certificates in dir: LoadCredentials and Credentials.ClientConfig.
func ClientConfig(dir, serverName string) (*tls.Config, error) {
	c, err := LoadCredentials(dir, TLSOptions{Client: true})
	if err != nil {
		return nil, err
	}
	return c.ClientConfig(serverName), nil
}

// Look uses files that have changed at once, and not only for the next handshake,
// and tells whether it does. What is wrong with them is an error; then those that
// were read before stay in use.
func (c *Credentials) Look() (changed bool, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	before := c.set
	changed = c.currentLocked() != before
	return changed, c.told(c.refused.text)
}

// Check tells what Look would, and changes nothing.
func (c *Credentials) Check() (changed bool, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	set, wrong := c.set.renew(c.dir, c.opt, c.stampAll())
	return set != c.set, c.told(wrong)
}

// told is what renew says is wrong, as an error.
func (c *Credentials) told(wrong string) error {
	if wrong == "" {
		return nil
	}
	return fmt.Errorf("certificates in %q: %s", c.dir, wrong)
}

// current returns the newest set that is in order.
func (c *Credentials) current() *credentialSet {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.currentLocked()
}

func (c *Credentials) currentLocked() *credentialSet {
	now := c.stampAll()
	if maps.Equal(now, c.set.stamps) {
		c.refused.stamps, c.refused.unused, c.refused.text = nil, nil, ""
		return c.set
	}
	known := maps.Equal(now, c.refused.stamps)
	if known && time.Since(c.refused.at) < limits.CertificateRetry {
		return c.set
	}
	set, wrong := c.set.renew(c.dir, c.opt, now)
	if set != c.set {
		c.set = set
		c.log.Info("tls credentials reloaded", "dir", c.dir)
		set.crls.warn(c.log, c.dir)
	}
	if wrong == "" {
		c.refused.stamps, c.refused.unused, c.refused.text = nil, nil, ""
		return c.set
	}
	unused := c.set.lacks(now)
	if wrong != c.refused.text || !maps.Equal(unused, c.refused.unused) {
		c.log.Warn("tls files that are not in order stay as they were", "dir", c.dir, "error", wrong)
	}
	c.refused.stamps, c.refused.unused, c.refused.text, c.refused.at = now, unused, wrong, time.Now()
	return c.set
}

func (o TLSOptions) ownFiles() (cert, key string) {
	if o.Client {
		return "client-cert.pem", "client-key.pem"
	}
	return "server-cert.pem", "server-key.pem"
}

// renew is s with what has changed and is in order, and says what is not. Both
// authorities and lists may be wrong without the other: a new authority comes with a
// list that it has signed.
func (s *credentialSet) renew(dir string, o TLSOptions, now map[string]stamp.Stamp) (_ *credentialSet, wrong string) {
	own, ca, crl := o.parts()
	var all []string
	for _, parts := range [...][]part{{own}, {ca, crl}, {ca}, {crl}} {
		if slices.ContainsFunc(parts, func(p part) bool { return s.has(p, now) }) {
			continue
		}
		next, err := s.with(dir, o, parts...)
		switch {
		case err == nil:
			s = next
		case len(parts) == 1: // of two each is tried alone
			all = append(all, err.Error())
		}
	}
	return s, strings.Join(all, "; ")
}

// has tells whether the files of p are those that s was made of.
func (s *credentialSet) has(p part, now map[string]stamp.Stamp) bool {
	return !slices.ContainsFunc(p.files, func(name string) bool { return now[name] != s.stamps[name] })
}

// lacks is what of now is not in s.
func (s *credentialSet) lacks(now map[string]stamp.Stamp) map[string]stamp.Stamp {
	rest := maps.Clone(now)
	maps.DeleteFunc(rest, func(name string, at stamp.Stamp) bool { return s.stamps[name] == at })
	return rest
}

// with is another set, for which parts are read and the rest is as in s.
func (s *credentialSet) with(dir string, o TLSOptions, parts ...part) (*credentialSet, error) {
	next := *s
	next.stamps = map[string]stamp.Stamp{}
	maps.Copy(next.stamps, s.stamps)
	for _, p := range parts {
		if err := p.read(&next, dir, o); err != nil {
			return nil, err
		}
	}
	if err := next.crls.signedBy(next.authorities); err != nil {
		return nil, fmt.Errorf("%q and %q: %w", caFile, crlFile, err)
	}
	if !o.Client {
		next.server = next.serverConfig(o)
	}
	return &next, nil
}

func (s *credentialSet) serverConfig(o TLSOptions) *tls.Config {
	cfg := &tls.Config{
		MinVersion:             tls.VersionTLS12,
		SessionTicketsDisabled: true,
		Certificates:           []tls.Certificate{*s.own},
	}
	if s.roots != nil && !o.NoVerifyPeer {
		cfg.ClientAuth = tls.RequireAndVerifyClientCert
		cfg.ClientCAs = s.roots
		cfg.VerifyConnection = s.verify
	}
	return cfg
}

// readOwn reads this side's certificate and key.
func (s *credentialSet) readOwn(dir string, o TLSOptions) error {
	certName, keyName := o.ownFiles()
	cert, err := s.read(dir, certName, limits.CertificateFile)
	if err != nil {
		return err
	}
	key, err := s.read(dir, keyName, limits.CertificateFile)
	if err != nil {
		return err
	}
	switch {
	case cert == nil && key == nil && o.Client:
		s.own = nil
		return nil
	case cert == nil:
		return fmt.Errorf("%q: %w", certName, fs.ErrNotExist)
	case key == nil:
		return fmt.Errorf("%q: %w", keyName, fs.ErrNotExist)
	}
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return fmt.Errorf("%q and %q: %w", certName, keyName, err)
	}
	s.own = &pair
	return nil
}

// readCA reads the authorities, if there are any. Those that were there demand
// something of the peer, and cannot vanish; nor can the lists of readCRL.
func (s *credentialSet) readCA(dir string, o TLSOptions) error {
	data, err := s.read(dir, caFile, limits.CertificateFile)
	switch {
	case err != nil:
		return err
	case data == nil && s.roots != nil:
		return fmt.Errorf("%q has vanished", caFile)
	case data == nil && o.Client:
		return fmt.Errorf("%q: %w", caFile, fs.ErrNotExist)
	case data == nil:
		return nil
	}
	s.roots, s.authorities = x509.NewCertPool(), nil
	err = eachPEM(data, "CERTIFICATE", func(der []byte) error {
		c, err := x509.ParseCertificate(der)
		if err == nil {
			s.roots.AddCert(c)
			s.authorities = append(s.authorities, c)
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("%q: %w", caFile, err)
	}
	return nil
}

func (s *credentialSet) readCRL(dir string, _ TLSOptions) error {
	data, err := s.read(dir, crlFile, limits.RevocationFile)
	switch {
	case err != nil:
		return err
	case data == nil && s.crls != nil:
		return fmt.Errorf("%q has vanished", crlFile)
	case data == nil:
		return nil
	case s.roots == nil:
		return fmt.Errorf("%q has no use without %q", crlFile, caFile)
	}
	if s.crls, err = parseRevocations(data); err != nil {
		return fmt.Errorf("%q: %w", crlFile, err)
	}
	return nil
}

// open opens a file, or gives what was opened already.
func (s *credentialSet) open(dir, name string) (*os.File, error) {
	if s.given == nil {
		return openFile(dir, name)
	}
	if f := s.given[name]; f != nil {
		return f, nil
	}
	return nil, fs.ErrNotExist
}

// openFile is not held up by a FIFO; read refuses it.
func openFile(dir, name string) (*os.File, error) {
	if name == CredentialsFolder {
		return os.OpenFile(dir, unix.O_PATH|unix.O_DIRECTORY, 0)
	}
	return os.OpenFile(filepath.Join(dir, name), os.O_RDONLY|syscall.O_NONBLOCK, 0)
}

// OpenCredentials opens the files that LoadCredentials would read, for a
// process that may not. Their folder is there too, opened with O_PATH.
func OpenCredentials(dir string, o TLSOptions) (map[string]*os.File, error) {
	cert, key := o.ownFiles()
	all := map[string]*os.File{}
	for _, name := range [...]string{CredentialsFolder, cert, key, caFile, crlFile} {
		f, err := openFile(dir, name)
		switch {
		case err == nil:
			all[name] = f
		case !errors.Is(err, fs.ErrNotExist):
			for _, f := range all {
				f.Close()
			}
			return nil, err
		}
	}
	return all, nil
}

// read returns the content of a file and remembers its stamp, and nil for an
// absent file. A key that others may read is refused.
func (s *credentialSet) read(dir, name string, limit int64) ([]byte, error) {
	f, err := s.open(dir, name)
	if errors.Is(err, fs.ErrNotExist) {
		s.stamps[name] = stamp.Stamp{}
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if s.given == nil {
		defer f.Close()
	}
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	s.stamps[name] = stamp.Of(fi, nil)
	switch {
	case !fi.Mode().IsRegular():
		return nil, fmt.Errorf("%q is no regular file", f.Name())
	case isKey(name) && fi.Mode().Perm()&0o066 != 0:
		return nil, fmt.Errorf("private key %q has mode %#o: others may read or write it", f.Name(), fi.Mode().Perm())
	case fi.Size() > limit:
		return nil, fmt.Errorf("%q has %d bytes, which is more than %d", f.Name(), fi.Size(), limit)
	}
	data, err := io.ReadAll(io.LimitReader(f, limit))
	if err != nil {
		return nil, err
	}
	if len(data) == 0 {
		return nil, fmt.Errorf("%q is empty", f.Name())
	}
	return data, nil
}

func isKey(name string) bool { return name == "server-key.pem" || name == "client-key.pem" }

// eachPEM calls f for each block of data, of which there must be at least one
// and none of another kind. What package pem passes over, as it cannot decode it, is
// an error: a list of which half is missing would let in whom that half revokes.
func eachPEM(data []byte, kind string, f func(der []byte) error) error {
	n := 0
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != kind {
			return fmt.Errorf("holds a block of type %q, want %q", block.Type, kind)
		}
		if err := f(block.Bytes); err != nil {
			return err
		}
		n++
	}
	begun := bytes.Count(data, []byte("-----BEGIN "))
	switch {
	case n == 0:
		return fmt.Errorf("holds no %q", kind)
	case n != begun:
		return fmt.Errorf("begins %d blocks, of which %d can be decoded", begun, n)
	}
	return nil
}

// stampAll looks at all files of a set, without opening them.
func (c *Credentials) stampAll() map[string]stamp.Stamp {
	cert, key := c.opt.ownFiles()
	all := make(map[string]stamp.Stamp, 4)
	for _, name := range [...]string{cert, key, caFile, crlFile} {
		fi, err := os.Stat(filepath.Join(c.dir, name))
		if errors.Is(err, fs.ErrPermission) && c.folderStays() {
			all[name] = c.stampGiven(name)
			continue
		}
		all[name] = stamp.Of(fi, err)
	}
	return all
}

// folderStays tells whether the folder that was given has the entries that it had then:
// its times tell of any other.
func (c *Credentials) folderStays() bool {
	f := c.opt.Given[CredentialsFolder]
	return f != nil && stamp.OfOpen(f) == c.folder
}

// stampGiven looks at a file that was given, for a folder that has the same entries.
func (c *Credentials) stampGiven(name string) stamp.Stamp {
	f := c.opt.Given[name]
	if f == nil {
		return stamp.Stamp{} // absent, as it was
	}
	return stamp.OfOpen(f)
}

// Unseen is why files cannot be looked at by their paths, nil if all can. Then what
// becomes of those that were given, and of their folder, is noticed all the same, but
// not that a folder above it, or one to which a symbolic link leads, is another one.
func (c *Credentials) Unseen() error {
	cert, key := c.opt.ownFiles()
	for _, name := range [...]string{cert, key, caFile, crlFile} {
		if _, err := os.Stat(filepath.Join(c.dir, name)); errors.Is(err, fs.ErrPermission) {
			return err
		}
	}
	return nil
}
