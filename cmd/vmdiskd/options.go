package main

import (
	"bytes"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spf13/pflag"

	"github.com/vmdiskd/vmdiskd/internal/cmdline"
	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/confine"
	"github.com/vmdiskd/vmdiskd/internal/daemon"
	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd"
	"github.com/vmdiskd/vmdiskd/internal/obs"
	"github.com/vmdiskd/vmdiskd/internal/transport"
	"github.com/vmdiskd/vmdiskd/internal/version"
)

// usageError is a mistake on the command line.
type usageError struct{ text string }

func (e usageError) Error() string { return e.text }

func usagef(format string, a ...any) error { return usageError{fmt.Sprintf(format, a...)} }

// defaultPort is the port that IANA gave to NBD.
const defaultPort = 10809

// options is what was asked for: a text to print, or a daemon to run.
type options struct {
	text   string
	config daemon.Config
}

// raw is the command line as it was written.
type raw struct {
	unix, port, address          string
	only4, only6, vsock, local   bool
	trustCID                     bool
	unixMode, unixOwner          string
	label, pathLabel             string
	readonly, oldstyle, newstyle bool
	export, description          string
	single, foreground           bool
	threads                      int
	user, group, pidfile         string
	verbose, version, help, dump bool
	debug                        []string
	log, run                     string
	exitWithParent, printURI     bool
	tls, certificates, psk       string
	verifyPeer, plaintext        bool
	mask                         string
	noSR, noMC                   bool
	format, cache, lock, engine  string
	backing, snapshot            string
	lenient                      bool
	discard, config, l2Cache     string
	check, faults                bool
	backingFiles, dataFiles      []string
	swap, headroom               string
	timeout, drain, poll         time.Duration
	confine                      string
	handed                       *daemon.Handed // what the worker gets
}

func (r *raw) flags() *pflag.FlagSet {
	f := pflag.NewFlagSet("vmdiskd", pflag.ContinueOnError)
	f.SortFlags = false
	f.Usage = func() {}
	f.StringVarP(&r.unix, "unix", "U", "", "listen on a Unix socket at `PATH`; - makes a private temporary one")
	f.StringVarP(&r.port, "port", "p", "", "listen on TCP or vsock `PORT` (default 10809); 0 lets the kernel choose")
	f.StringVarP(&r.address, "ipaddr", "i", "", "listen on this IP `ADDRESS` only")
	f.BoolVarP(&r.only4, "ipv4-only", "4", false, "listen on IPv4 only")
	f.BoolVarP(&r.only6, "ipv6-only", "6", false, "listen on IPv6 only")
	f.BoolVar(&r.vsock, "vsock", false, "listen on AF_VSOCK instead of TCP")
	f.BoolVar(&r.local, "vsock-local", false, "with --vsock: serve not only guests (CIDs 0, 1 and 2, too)")
	f.BoolVar(&r.trustCID, "vsock-trust-cid", false, "let everybody write who comes over vsock (else: --readonly, or --config with grants that ask for leases and keys)")
	f.StringVar(&r.unixMode, "unix-mode", "0600", "`MODE` of the Unix socket")
	f.StringVar(&r.unixOwner, "unix-owner", "", "`USER[:GROUP]` that owns the Unix socket")
	f.StringVar(&r.label, "selinux-label", "", "SELinux `CONTEXT` of the Unix socket, with the categories of the machine that connects")
	f.StringVar(&r.pathLabel, "selinux-path-label", "", "SELinux `CONTEXT` of the Unix socket's file")
	f.BoolVarP(&r.single, "single", "s", false, "serve one client on standard input and output")
	f.BoolVar(&r.single, "stdin", false, "same as --single")
	f.BoolVarP(&r.readonly, "readonly", "r", false, "refuse writes; the image is opened read-only")
	f.StringVarP(&r.export, "exportname", "e", "", "`NAME` of the export (the empty name opens it too)")
	f.StringVar(&r.export, "export", "", "same as --exportname")
	f.StringVar(&r.description, "description", "", "`TEXT` that describes the export to clients")
	f.StringVar(&r.format, "format", "raw", "`FORMAT` of IMAGE: raw, qcow2, mem or null; never guessed from contents")
	f.StringVar(&r.backing, "backing", "", "`POLICY` for files that a qcow2 image names: deny (the default), same-dir, beneath=DIR or explicit")
	f.StringArrayVar(&r.backingFiles, "backing-file", nil, "`PATH[:FORMAT]` of the backing file, instead of what the image says; again for the next below")
	f.StringArrayVar(&r.dataFiles, "data-file", nil, "`PATH` of the external data file, instead of what the image says")
	f.StringVar(&r.snapshot, "snapshot", "", "`ID|NAME` of the internal snapshot to serve")
	f.BoolVar(&r.lenient, "lenient", false, "with --readonly: read damaged places of a qcow2 image as QEMU does")
	f.StringVar(&r.config, "config", "", "serve what the configuration `FILE` says instead of one IMAGE")
	f.BoolVar(&r.faults, "enable-fault-injection", false, "with --config: let exports have faults, for tests of what depends on them")
	f.BoolVar(&r.check, "check", false, "with --config: say what is wrong with the file, or what a reload of its service would change, or a start open, and end")
	f.StringVar(&r.discard, "discard", "unmap", "what trims do in a qcow2 image: unmap frees clusters, keep keeps them as holes, ignore")
	f.StringVar(&r.l2Cache, "l2-cache-size", "", "`SIZE` that the mapping of a qcow2 image may take of memory: 64M by default")
	f.StringVar(&r.cache, "cache", "writeback", "`MODE`: writeback, none, writethrough, directsync or unsafe")
	f.StringVar(&r.lock, "image-lock", "auto", "lock the image against other programs: auto, on or off")
	f.StringVar(&r.engine, "engine", "auto", "I/O `ENGINE`: auto, uring or pool")
	f.IntVarP(&r.threads, "threads", "t", 0, fmt.Sprintf("requests in flight per connection: `N` from 1 to %d, the default", limits.RequestsPerConn))
	f.DurationVar(&r.poll, "poll-max", limits.Poll, "longest `TIME` that an idle connection polls its socket; 0 never")
	f.StringVar(&r.tls, "tls", "off", "off, on (clients may encrypt) or require")
	f.StringVar(&r.certificates, "tls-certificates", "/etc/pki/vmdiskd", "`DIRECTORY` with ca-cert.pem, server-cert.pem, server-key.pem, ca-crl.pem")
	f.StringVar(&r.psk, "tls-psk", "", "`FILE` of pre-shared keys, as psktool writes it; without --tls-certificates there are no certificates then")
	f.BoolVar(&r.verifyPeer, "tls-verify-peer", false, "demand a client certificate (the default when there is a ca-cert.pem)")
	f.BoolVar(&r.plaintext, "insecure-plaintext", false, "serve networks over TCP without encryption")
	f.BoolVarP(&r.newstyle, "newstyle", "n", false, "speak the newstyle protocol (the default)")
	f.BoolVarP(&r.oldstyle, "oldstyle", "o", false, "speak the oldstyle protocol")
	f.StringVar(&r.mask, "mask-handshake", "", "`MASK` of the handshake flags that may be offered (for tests of clients)")
	f.BoolVar(&r.noSR, "no-sr", false, "refuse structured replies and extended headers (for tests of clients)")
	f.BoolVar(&r.noMC, "no-mc", false, "refuse metadata contexts (for tests of clients)")
	f.StringVarP(&r.user, "user", "u", "", "change to this `USER` when everything is open")
	f.StringVarP(&r.group, "group", "g", "", "change to this `GROUP` when everything is open")
	f.StringVar(&r.confine, "confine", "auto", "`MODE`: strict does not start unless everything confines it, auto says what is missing, off does without")
	f.StringVarP(&r.pidfile, "pidfile", "P", "", "write the process ID to `FILE` when the server is ready")
	f.BoolVarP(&r.foreground, "foreground", "f", false, "stay in the foreground (the only way; systemd does the rest)")
	f.BoolVar(&r.foreground, "no-fork", false, "same as --foreground")
	f.StringVar(&r.run, "run", "", "run a shell `COMMAND` with $uri, $unixsocket, $port, $exportname and $nbd set, and end with it")
	f.BoolVar(&r.exitWithParent, "exit-with-parent", false, "end when the parent process ends")
	f.BoolVar(&r.printURI, "print-uri", false, "print the NBD URI of each listener when the server is ready")
	f.StringVar(&r.swap, "swap", "off", "serve a disk that this machine swaps to: on, off, or best-effort (go on without protections that cannot be had)")
	f.Lookup("swap").NoOptDefVal = "on"
	f.StringVar(&r.headroom, "swap-headroom", "check", "with --swap: check that the kernel keeps memory free, or skip that")
	f.DurationVar(&r.timeout, "timeout", limits.Handshake, "`TIME` that a client has for its handshake")
	f.DurationVar(&r.drain, "drain-timeout", limits.Drain, "`TIME` that requests in flight have after SIGTERM")
	f.StringVar(&r.log, "log", "stderr", "write the log to stderr, syslog, null or a file, by its absolute `PATH`")
	f.BoolVarP(&r.verbose, "verbose", "v", false, "log everything, each request included")
	f.StringArrayVarP(&r.debug, "debug", "D", nil, "`COMPONENT=LEVEL`: log one component ("+strings.Join(obs.Components, ", ")+") at debug, info, warn or error")
	f.BoolVar(&r.dump, "dump-config", false, "print what this build and machine can do")
	f.BoolVarP(&r.version, "version", "V", false, "print the version")
	f.BoolVarP(&r.help, "help", "h", false, "print this help")
	return f
}

// parse turns arguments into options, those of a worker with what stage 0 has
// read. A usageError is the user's mistake.
func parse(args []string, handed *daemon.Handed) (options, error) {
	r := raw{handed: handed}
	f := r.flags()
	if err := f.Parse(args); err != nil {
		return options{}, usageError{cmdline.FlagError(err, f, elsewhere).Error()}
	}
	switch {
	case r.help:
		return options{text: help(f)}, nil
	case r.version:
		return options{text: "vmdiskd " + version.Version + "\n"}, nil
	case r.dump:
		return options{text: daemon.DumpConfig()}, nil
	}
	if err := said(f); err != nil {
		return options{}, err
	}
	if r.config != "" {
		return r.service(f)
	}
	if err := r.oneImage(f); err != nil {
		return options{}, err
	}
	c, err := r.configure(f)
	if err != nil {
		return options{}, err
	}
	c.Disk.Image = f.Arg(0)
	return options{config: c}, nil
}

// said refuses options without the value that they are for: a variable of a script that
// is not set asks neither for root, nor for all addresses, which to leave them out means.
func said(f *pflag.FlagSet) error {
	for _, name := range [...]string{
		"config", "unix", "port", "ipaddr", "unix-owner", "tls-certificates", "user", "group", "pidfile", "run",
	} {
		if f.Changed(name) && f.Lookup(name).Value.String() == "" {
			return usagef("--%s: it is empty", name)
		}
	}
	return nil
}

// formats are the values of --format.
var formats = []string{"raw", "qcow2", "mem", "null"}

// oneImage checks what there is beside the options of a run without --config.
func (r *raw) oneImage(f *pflag.FlagSet) error {
	for _, name := range [...]string{"check", "enable-fault-injection"} {
		if f.Changed(name) {
			return usagef("--%s goes with --config", name)
		}
	}
	switch {
	case f.NArg() == 1:
		return nil
	case r.foreground && f.NArg() == 2 && contains(formats, f.Arg(0)):
		return usagef("want one IMAGE, got 2 arguments: -f is --foreground, the format is --format=%s", f.Arg(0))
	}
	return usagef("want one IMAGE, got %d arguments", f.NArg())
}

// serviceOptions are those that go with --config.
var serviceOptions = []string{
	"config", "check", "log", "verbose", "debug", "user", "group", "pidfile", "foreground", "no-fork",
	"exit-with-parent", "confine", "timeout", "enable-fault-injection", "poll-max", "threads",
}

// imageOptions are those that no file says, as they are of a run with one IMAGE.
var imageOptions = []string{
	"run", "print-uri", "swap", "swap-headroom", "single", "stdin", "newstyle", "oldstyle", "no-sr", "no-mc", "mask-handshake",
}

// service is what --config says.
func (r *raw) service(f *pflag.FlagSet) (options, error) {
	var wrong string
	f.Visit(func(x *pflag.Flag) {
		if !contains(serviceOptions, x.Name) {
			wrong = x.Name
		}
	})
	switch {
	case contains(imageOptions, wrong):
		return options{}, usagef("--%s does not go with --config: it is for one IMAGE", wrong)
	case wrong != "":
		return options{}, usagef("--%s does not go with --config: the file says it", wrong)
	case f.NArg() > 0:
		return options{}, usagef("--config serves the images of the file, not %q", f.Arg(0))
	}
	text, err := r.configText()
	if err != nil {
		return options{}, err
	}
	if !utf8.Valid(text) || bytes.ContainsRune(text, 0) {
		return options{}, fmt.Errorf("%q is not text: is that a configuration file? An image is served without --config", r.config)
	}
	c, err := config.LoadText(r.config, text)
	if err != nil {
		return options{}, err
	}
	if r.check {
		text, err := check(r.config, c)
		return options{text: text}, err
	}
	d, err := r.configure(f)
	if err != nil {
		return options{}, err
	}
	d.File = r.config
	if path, err := filepath.Abs(r.config); err == nil { // else a worker may not look where it is
		d.File = path
	}
	d.Service, d.Text, d.Endpoints, d.FaultInjection = c, text, nil, r.faults
	d.Engine, d.Drain = c.Engine, time.Duration(c.Drain)
	d.Log.Format = c.Log.Format
	d.TLSCertificates, d.TLSVerifyPeer, d.TLSKeys = c.TLS.Certificates, c.TLS.VerifyPeer, c.TLS.PSK
	d.TLSSaid = config.SaysTLS(text)
	if !r.verbose {
		err = d.Log.Level.UnmarshalText([]byte(c.Log.Level))
	}
	return options{config: d}, err
}

// configText is the configuration file, which the worker may not be able to
// read.
func (r *raw) configText() ([]byte, error) {
	if r.handed != nil {
		return r.handed.ConfigText(), nil
	}
	return config.ReadText(r.config)
}

func help(f *pflag.FlagSet) string {
	return "Usage: vmdiskd [options] IMAGE\n       vmdiskd [options] --config FILE\n\n" +
		"Serves IMAGE, a file or block device, to NBD clients.\n\n" +
		"Options:\n" + f.FlagUsagesWrapped(78)
}

// configure checks what flags mean together.
func (r *raw) configure(f *pflag.FlagSet) (daemon.Config, error) {
	c := daemon.Config{
		Disk: config.Export{
			Name: r.export, Description: r.description,
			Format: r.saidFormat(f), Cache: r.cache, Lock: r.lock, ReadOnly: r.readonly,
			Backing: r.backing, BackingFiles: r.backingFiles, DataFiles: r.dataFiles,
			Snapshot: r.snapshot, Lenient: r.lenient, Discard: r.discard,
			TrustCID: r.trustCID,
		},
		Stdio: r.single, Engine: r.engine, Oldstyle: r.oldstyle,
		NoStructured: r.noSR, NoMeta: r.noMC,
		TLSCertificates: r.certificates, InsecurePlaintext: r.plaintext,
		Handshake: r.timeout, Drain: r.drain,
		User: r.user, Group: r.group, PIDFile: r.pidfile, Run: r.run,
		Confine: confine.Mode(r.confine), Handed: r.handed,
		ExitWithParent: r.exitWithParent, PrintURI: r.printURI, Stdout: os.Stdout,
	}
	for _, step := range [...]func(*pflag.FlagSet, *daemon.Config) error{
		r.checkWords, r.ids, r.chain, r.endpoints, r.labels, r.tlsMode, r.handshake, r.logging, r.swapMode,
	} {
		if err := step(f, &c); err != nil {
			return c, err
		}
	}
	return c, nil
}

// saidFormat is --format, or nothing where it is the default.
func (r *raw) saidFormat(f *pflag.FlagSet) string {
	if !f.Changed("format") {
		return ""
	}
	return r.format
}

// checkWords checks options that take one of a few words or numbers.
func (r *raw) checkWords(f *pflag.FlagSet, c *daemon.Config) error {
	for _, w := range [...]struct {
		name, got string
		want      []string
	}{
		{"discard", r.discard, []string{"unmap", "keep", "ignore"}},
		{"format", r.format, formats},
		{"cache", r.cache, []string{"writeback", "none", "writethrough", "directsync", "unsafe"}},
		{"image-lock", r.lock, []string{"auto", "on", "off"}},
		{"engine", r.engine, []string{"auto", "uring", "pool"}},
		{"tls", r.tls, []string{"off", "on", "require"}},
		{"swap", r.swap, []string{"on", "off", "best-effort"}},
		{"swap-headroom", r.headroom, []string{"check", "skip"}},
		{"confine", r.confine, []string{"strict", "auto", "off"}},
	} {
		if !contains(w.want, w.got) {
			return usagef("--%s: %q is not one of %s", w.name, w.got, strings.Join(w.want, ", "))
		}
	}
	if f.Changed("threads") && r.threads < 1 || r.threads > limits.RequestsPerConn {
		return usagef("--threads: want 1 to %d", limits.RequestsPerConn)
	}
	c.Requests = r.threads
	if r.poll < 0 || r.poll > time.Millisecond {
		return usagef("--poll-max: want 0 to 1ms")
	}
	c.Poll = r.poll
	if r.timeout <= 0 || r.drain <= 0 {
		return usagef("--timeout and --drain-timeout must be positive")
	}
	if r.oldstyle && r.newstyle {
		return usagef("--oldstyle and --newstyle exclude each other")
	}
	return nil
}

// ids demands that the user and the group exist. The worker has become them.
func (r *raw) ids(_ *pflag.FlagSet, _ *daemon.Config) error {
	if r.handed != nil {
		return nil
	}
	if err := confine.CheckIDs(r.user, r.group); err != nil {
		return usagef("--user, --group: %v", err)
	}
	return nil
}

// swapMode sets what --swap changes of the defaults.
func (r *raw) swapMode(f *pflag.FlagSet, c *daemon.Config) error {
	if r.swap == "off" {
		if f.Changed("swap-headroom") {
			return usagef("--swap-headroom needs --swap")
		}
		return nil
	}
	c.Swap = daemon.Swap{On: true, BestEffort: r.swap == "best-effort", SkipHeadroom: r.headroom == "skip"}
	if !f.Changed("cache") {
		c.Disk.Cache = "none"
	}
	if c.Requests == 0 || c.Requests > limits.SwapServerRequests {
		c.Requests = limits.SwapServerRequests
	}
	return nil
}

// chain checks the options of qcow2 images.
func (r *raw) chain(f *pflag.FlagSet, c *daemon.Config) error {
	for _, name := range [...]string{"backing", "backing-file", "data-file", "snapshot", "lenient", "discard", "l2-cache-size"} {
		if f.Changed(name) && r.format != "qcow2" {
			return usagef("--%s needs --format=qcow2", name)
		}
	}
	if f.Changed("l2-cache-size") {
		n := &c.Disk.L2CacheSize
		if err := n.UnmarshalText([]byte(r.l2Cache)); err != nil || *n < limits.MapCacheLeast || *n > limits.MapCacheMost {
			return usagef("--l2-cache-size: want a size from 1M to 4G")
		}
	}
	if f.Changed("snapshot") && r.snapshot == "" {
		return usagef("--snapshot: want an ID or a name")
	}
	if r.lenient && !r.readonly {
		return usagef("--lenient needs --readonly")
	}
	if err := daemon.CheckBacking(&c.Disk); err != nil {
		return usagef("%v", err)
	}
	return nil
}

func contains(list []string, s string) bool {
	for _, x := range list {
		if x == s {
			return true
		}
	}
	return false
}

// endpoints decides where to listen. Sockets that systemd passed go before
// everything; without any word it is TCP, as in nbdkit.
func (r *raw) endpoints(f *pflag.FlagSet, c *daemon.Config) error {
	network := f.Changed("port") || f.Changed("ipaddr") || r.only4 || r.only6 || r.vsock
	passed := r.passed(r.unix != "" || network || r.run != "")
	if err := r.excluded(network, passed); err != nil {
		return err
	}
	switch {
	case r.single:
		return nil
	case passed:
		c.Activated = true
		return nil
	case r.unix == "" && r.run != "" && !network:
		r.unix = transport.PrivatePath
	}
	if r.unix != "" {
		return r.unixEndpoint(c)
	}
	return r.networkEndpoint(c)
}

// excluded refuses words about listening that do not go together. network: one of them
// is about TCP or vsock; passed: systemd has passed sockets.
func (r *raw) excluded(network, passed bool) error {
	switch {
	case r.only4 && r.only6:
		return usagef("--ipv4-only and --ipv6-only exclude each other")
	case r.single && (r.unix != "" || network || r.run != ""):
		return usagef("--single excludes listening and --run")
	case r.vsock && (r.only4 || r.only6 || r.address != ""):
		return usagef("--vsock excludes IP options")
	case r.local && !r.vsock:
		return usagef("--vsock-local goes with --vsock")
	case r.trustCID && !r.vsock && !passed:
		return usagef("--vsock-trust-cid goes with --vsock, and with a socket that systemd passes")
	case r.plaintext && (r.vsock || r.unix != ""):
		return usagef("--insecure-plaintext goes with TCP")
	case r.plaintext && r.confine == string(confine.Strict):
		return usagef("--confine=strict excludes --insecure-plaintext")
	case r.single:
		return nil
	case passed && (r.unix != "" || network):
		return usagef("sockets were passed by systemd: -U, -p, -i and --vsock do not go with that")
	case r.vsock && !r.readonly && !r.trustCID:
		return usagef("--vsock: %s", daemon.NeedProof)
	case r.unix != "" && network:
		return usagef("--unix excludes TCP and vsock options")
	}
	return nil
}

// networkEndpoint is TCP or vsock.
func (r *raw) networkEndpoint(c *daemon.Config) error {
	port := uint64(defaultPort)
	if r.port != "" {
		var err error
		bits := 16
		if r.vsock {
			bits = 32
		}
		if port, err = strconv.ParseUint(r.port, 10, bits); err != nil {
			return usagef("--port: %q is not a port", r.port)
		}
	}
	e := transport.Endpoint{Kind: transport.TCP, Address: r.address, Port: uint32(port)}
	switch {
	case r.vsock:
		e.Kind = transport.VSock
		// A command of --run is a process of this host.
		if r.local || r.run != "" {
			c.Disk.Grants = []config.Grant{{Access: "rw", CIDs: []uint32{0, 1, 2}}, {Access: "rw"}}
		}
	case r.only4:
		e.Family = "4"
	case r.only6:
		e.Family = "6"
	}
	c.Endpoints = []transport.Endpoint{e}
	return nil
}

// passed tells whether to serve the sockets that systemd passed. Those of another
// process are none (sd_listen_fds(3)); but where no option says where to listen
// instead, they are an error, and not a reason to listen everywhere.
func (r *raw) passed(elsewhere bool) bool {
	mine := os.Getenv("LISTEN_PID") == strconv.Itoa(os.Getpid())
	return os.Getenv("LISTEN_FDS") != "" && (mine || !elsewhere)
}

func (r *raw) unixEndpoint(c *daemon.Config) error {
	if isDescriptor(r.unix) {
		return usagef("--unix: %q is no path: sockets that are open already are passed as systemd does it, by LISTEN_FDS and LISTEN_PID; a file of that name is ./%s", r.unix, r.unix)
	}
	mode, err := transport.ParseMode(r.unixMode)
	if err != nil {
		return usagef("--unix-mode: %v", err)
	}
	e := transport.Endpoint{Kind: transport.Unix, Path: r.unix, Mode: mode}
	if r.unixOwner != "" {
		if e.Owner, err = transport.ParseOwner(r.unixOwner); err != nil {
			return usagef("--unix-owner: %v", err)
		}
	}
	if r.unixOwner == "" && r.unix == transport.PrivatePath && r.handed == nil {
		to, err := confine.CredentialOf(r.user, r.group)
		if err != nil {
			return usagef("--user, --group: %v", err)
		}
		if to != nil { // whom the command of --run is, and who removes it
			e.Owner = &transport.Owner{UID: int(to.Uid), GID: int(to.Gid)}
		}
	}
	c.Endpoints = []transport.Endpoint{e}
	return nil
}

// isDescriptor tells whether s is "fd:N", by which other servers take a socket
// that is open already.
func isDescriptor(s string) bool {
	digits, ok := strings.CutPrefix(s, "fd:")
	_, err := strconv.ParseUint(digits, 10, 32)
	return ok && err == nil
}

// labels gives the Unix socket its labels. A request for one is never ignored.
func (r *raw) labels(f *pflag.FlagSet, c *daemon.Config) error {
	for name, label := range map[string]string{"selinux-label": r.label, "selinux-path-label": r.pathLabel} {
		switch {
		case !f.Changed(name):
			continue
		case label == "":
			return usagef("--%s: want a context", name)
		case len(c.Endpoints) != 1 || c.Endpoints[0].Kind != transport.Unix:
			return usagef("--%s needs --unix: other sockets, and those that systemd passes, are labelled by who makes them", name)
		}
	}
	if len(c.Endpoints) == 1 {
		c.Endpoints[0].Label, c.Endpoints[0].PathLabel = r.label, r.pathLabel
	}
	return nil
}

func (r *raw) tlsMode(f *pflag.FlagSet, c *daemon.Config) error {
	switch r.tls {
	case "on":
		c.TLS = nbd.TLSOn
	case "require":
		c.TLS = nbd.TLSRequire
	}
	if f.Changed("tls-verify-peer") {
		c.TLSVerifyPeer = &r.verifyPeer
	}
	if c.TLS == nbd.TLSOff && (f.Changed("tls-certificates") || f.Changed("tls-verify-peer")) {
		return usagef("--tls-certificates and --tls-verify-peer need --tls=on or --tls=require")
	}
	if err := r.keys(f, c); err != nil {
		return err
	}
	if r.oldstyle && c.TLS != nbd.TLSOff {
		return usagef("--oldstyle cannot be encrypted: leave out --tls=%s", r.tls)
	}
	return nil
}

// keys is --tls-psk, which alone does without certificates.
func (r *raw) keys(f *pflag.FlagSet, c *daemon.Config) error {
	switch {
	case !f.Changed("tls-psk"):
		return nil
	case r.psk == "":
		return usagef("--tls-psk: want a file")
	case c.TLS == nbd.TLSOff:
		return usagef("--tls-psk needs --tls=on or --tls=require")
	case !f.Changed("tls-certificates") && f.Changed("tls-verify-peer"):
		return usagef("--tls-verify-peer: there are no certificates with --tls-psk alone")
	}
	c.TLSKeys = r.psk
	if !f.Changed("tls-certificates") {
		c.TLSCertificates = ""
	}
	return nil
}

func (r *raw) handshake(f *pflag.FlagSet, c *daemon.Config) error {
	c.MaskHandshake = 0xffff
	if !f.Changed("mask-handshake") {
		return nil
	}
	m, err := strconv.ParseUint(r.mask, 0, 16)
	if err != nil {
		return usagef("--mask-handshake: %q is not a 16-bit number", r.mask)
	}
	c.MaskHandshake = uint16(m)
	return nil
}

func (r *raw) logging(_ *pflag.FlagSet, c *daemon.Config) error {
	switch {
	case r.log == "default":
		r.log = "stderr"
	case r.log != "stderr" && r.log != "syslog" && r.log != "null" && !strings.HasPrefix(r.log, "/"):
		return usagef("--log: %q is not stderr, syslog, null or an absolute path", r.log)
	}
	c.Log.Sink = r.log
	c.Log.Level, c.Verbose = slog.LevelInfo, r.verbose
	if r.verbose {
		c.Log.Level = slog.LevelDebug
	}
	c.Log.Components = make(map[string]slog.Level)
	for _, d := range r.debug {
		name, level, ok := strings.Cut(d, "=")
		var l slog.Level
		switch {
		case !ok || name == "" || l.UnmarshalText([]byte(level)) != nil:
			return usagef("--debug: %q is not COMPONENT=LEVEL, where LEVEL is debug, info, warn or error", d)
		case !contains(obs.Components, name):
			return usagef("--debug: %q is not one of %s", name, strings.Join(obs.Components, ", "))
		}
		c.Log.Components[name] = l
	}
	return nil
}
