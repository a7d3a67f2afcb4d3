package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/confine"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/internal/control/server"
	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/engine/bufpool"
	"github.com/vmdiskd/vmdiskd/internal/export"
	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd"
	"github.com/vmdiskd/vmdiskd/internal/obs"
	"github.com/vmdiskd/vmdiskd/internal/transport"
	"github.com/vmdiskd/vmdiskd/internal/transport/psk"
)

// daemon is a running server. Its parts are built in this order and taken
// down in the reverse.
type daemon struct {
	cfg       Config
	root      fs.FS // of this machine, for what it swaps to
	logs      *obs.Log
	log       *slog.Logger
	creds     *transport.Credentials // nil without TLS, or with keys alone
	keys      *psk.Keys              // nil without pre-shared keys
	noSecrets error                  // why there are neither, though they were wanted; set by the start
	buffers   *bufpool.Pool
	engine    engine.Engine
	exports   *export.Registry
	disks     disks
	bases     bases
	asking    asking
	unread    string   // what could not be read of kept exports; set by the start
	lastKept  int      // the greatest order of those that could; set by the start
	stateLock *os.File // held until the process ends; nil without such a folder
	groups    groups
	started   time.Time
	bus       obs.Bus
	told      toldStates
	boss      *obs.Supervisor   // nil without a service manager
	unstaged  string            // why there is no worker, if there is none
	cage      []confine.Control // what confines the process
	swapCage  []confine.Control // what protects a server of swap; made by settle
	controls  []control
	rootsThen map[string]fs.FileInfo // image roots at the start, nil for one that was not there; nil without Landlock
	reloading lock
	reloaded  chan struct{}                 // closed by the reload of a signal that runs, nil if none does; of wait and close
	staleConf atomic.Bool                   // the last reload was not done
	conf      atomic.Pointer[config.Config] // as it is applied; nil for one disk
	coming    atomic.Pointer[config.Config] // what a reload that is under way makes of it, or nil
	chosen    atomic.Pointer[string]        // the name that the control API has made the default last, or nil
	rules     atomic.Pointer[server.Rules]  // of the control socket
	doors     doors
	probe     *transport.Probe  // of a service that is confined, or nil
	passed    *transport.Passed // nil for one disk
	kept      atomic.Int64      // sockets that the service manager keeps
	server    *nbd.Server
	pid       *pidFile // nil without --pidfile
	parent    int      // process of the start, with ExitWithParent

	ctx      context.Context // ends when serving ends
	cancel   context.CancelFunc
	stopping context.Context // ends when the daemon begins to stop: what changes it is given up
	stop     context.CancelFunc
	accepted sync.WaitGroup // accept loops and the connections they made
	closing  sync.WaitGroup // of exports by a reload, also in the background: the registry waits for their storage
	refused  atomic.Uint64  // connections that no export is for
	finished chan error     // a captive command or the one stdio client ended
}

// Run serves until it is told to stop and returns the exit status of the
// process. It owns the process's signals.
func Run(cfg Config) (status int, err error) {
	why := byOption
	if cfg.Confine == confine.Auto && cfg.Handed == nil {
		if err := confine.CanExec(); err != nil {
			cfg.Confine, why = confine.None, err.Error()
		}
	}
	if !cfg.Confine.Staged() { // stage 0 has its own exec
		if err := enterSwap(&cfg); err != nil {
			return 1, err
		}
	}
	d := &daemon{cfg: cfg, root: os.DirFS("/"), unstaged: why, started: time.Now(), finished: make(chan error, 1)}
	d.conf.Store(cfg.Service)
	d.ctx, d.cancel = context.WithCancel(context.Background())
	defer d.cancel()
	d.stopping, d.stop = context.WithCancel(d.ctx)
	signals := catchSignals()
	defer signals.stop()

	if d.cfg.Confine.Staged() && cfg.Handed == nil {
		err = d.becomeWorker(signals)
	} else {
		err = d.startUnless(signals)
	}
	switch {
	case errors.Is(err, errStopped):
		err = nil
	case err == nil:
		d.log.Info("serving", append(d.subject(), "engine", d.engine.Name(), "at", d.addresses())...)
		status, err = d.wait(signals)
	}
	if cerr := d.close(); err == nil && cerr != nil {
		err = cerr
	}
	if err != nil && status == 0 {
		status = 1
	}
	return status, err
}

// subject is what is served, for the log.
func (d *daemon) subject() []any {
	if d.conf.Load() != nil {
		return []any{"config", d.cfg.File, "exports", d.exports.Len(), "failed", len(d.disks.failed())}
	}
	return []any{"image", d.cfg.Disk.Image, "format", d.cfg.Disk.ImageFormat()}
}

// startUnless is start, or errStopped if a signal comes before it is done: what
// waits for storage then is given up.
func (d *daemon) startUnless(s *signals) error {
	over := s.whileStarting(func() {
		d.stop()
		s.exitOnNext(d.lastResort)
	})
	err := d.start()
	if over() {
		return errStopped
	}
	return err
}

// start builds everything and begins to accept. On an error close undoes what
// was done.
func (d *daemon) start() error {
	for _, step := range [...]func() error{
		d.openPIDFile,
		d.openLog,
		d.findSupervisor,
		d.watchParent,
		d.loadTLS,
		d.listen,
		d.lockState,
		d.openExports,
		d.settlePassed,
		d.bindControl,
		d.dropPrivileges,
		d.settle,
		d.confine,
		d.serve,
		d.startControl,
		d.retryLocked,
		d.fillPIDFile,
		d.ready,
		d.printURI,
		d.startCommand,
	} {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

func (d *daemon) openLog() (err error) {
	if d.cfg.Handed != nil {
		d.cfg.Log.File = d.cfg.Handed.logFile()
	}
	if d.logs, err = obs.Open(d.cfg.Log); err != nil {
		return err
	}
	d.log = d.logs.For("daemon")
	return nil
}

func (d *daemon) watchParent() error {
	if !d.cfg.ExitWithParent {
		return nil
	}
	switch t := d.cfg.Handed; {
	case d.parent != 0:
	case t != nil:
		d.parent = t.in.Parent // which may have ended during the exec
	default:
		d.parent = os.Getppid()
	}
	return confine.ExitWithParent(d.parent)
}

// loadTLS loads certificates and pre-shared keys, both or neither.
func (d *daemon) loadTLS() error {
	wanted, needed := d.secrets()
	if !wanted {
		return nil
	}
	err := d.loadSecrets()
	if err == nil {
		d.warnUnseen()
	}
	if err == nil || needed {
		return err
	}
	d.creds, d.keys, d.noSecrets = nil, nil, err
	d.logs.For("tls").Warn("no listener can be encrypted", "error", err)
	return nil
}

// secrets tells whether certificates and keys are wanted, and whether the start fails
// without them. It does for a listener of the configuration. One of an export that is
// kept, or is still to come, is no reason not to serve the others.
func (d *daemon) secrets() (wanted, needed bool) {
	if d.cfg.TLS != nbd.TLSOff || encrypts(d.conf.Load()) {
		return true, true
	}
	if d.cfg.TLSSaid {
		return true, false
	}
	all, _ := d.allExports() // addConfigured complains
	return encrypts(&config.Config{Exports: all}), false
}

func (d *daemon) loadSecrets() (err error) {
	if err := d.cfg.Handed.noSecrets(); err != nil {
		return err
	}
	if err := d.loadKeys(); err != nil || d.cfg.TLSCertificates == "" {
		return err
	}
	given, err := d.cfg.Handed.certificates()
	if err != nil {
		return err
	}
	demand := d.cfg.TLSVerifyPeer
	d.creds, err = transport.LoadCredentials(d.cfg.TLSCertificates, transport.TLSOptions{
		NoVerifyPeer: demand != nil && !*demand,
		Given:        given,
		Log:          d.logs.For("tls"),
	})
	if err == nil && demand != nil && *demand && !d.creds.VerifiesPeers() {
		err = fmt.Errorf("client certificates cannot be verified: no ca-cert.pem in %q", d.cfg.TLSCertificates)
	}
	return err
}

// encrypts tells whether a listener of the configuration, nil for none, does.
func encrypts(c *config.Config) bool {
	if c == nil {
		return false
	}
	encrypts := func(l config.Listener) bool { return tlsModes[l.TLS] != nbd.TLSOff }
	return slices.ContainsFunc(c.Listeners, encrypts) ||
		slices.ContainsFunc(c.Exports, func(x config.Export) bool {
			return slices.ContainsFunc(x.Listeners, encrypts)
		})
}

// listen opens the sockets, but accepts nothing yet: a client that is early
// waits in the queue instead of being refused.
func (d *daemon) listen() error {
	if d.conf.Load() != nil {
		if err := d.takePassed(); err != nil {
			return err
		}
	} else if d.cfg.Activated {
		ls, err := transport.Activated()
		if err != nil {
			return err
		}
		if len(ls) == 0 {
			return errors.New("LISTEN_FDS is set, but systemd passed no socket to this process: LISTEN_PID is another's, or there are none")
		}
		if err := errors.Join(d.addDoors(ls), checkPassed(&d.cfg.Disk, ls)); err != nil {
			return err
		}
	}
	if d.conf.Load() != nil {
		for place, l := range d.conf.Load().Shared() {
			if _, err := d.share(d.ctx, place, *l); err != nil {
				return err
			}
		}
	}
	for i, e := range d.cfg.Endpoints {
		ls, err := d.listenAt(d.ctx, endpointKey(i), e)
		if err != nil {
			return err
		}
		if err := d.addDoors(ls); err != nil {
			return err
		}
	}
	return nil
}

// NeedProof says why one disk is not written to over vsock, where there are no
// leases, and what is to be done.
const NeedProof = "whoever has a CID could write: say --readonly, or --vsock-trust-cid, or --config with a grant that needs a lease, and a key or a token"

// checkPassed refuses sockets that systemd passed for one disk.
func checkPassed(x *config.Export, ls []transport.Listener) error {
	if !x.ReadOnly && !x.TrustCID && slices.ContainsFunc(ls, overVsock) {
		return errors.New("systemd passed a vsock socket: " + NeedProof)
	}
	return nil
}

func overVsock(l transport.Listener) bool { return l.Kind() == transport.VSock }

// listenAt opens an endpoint, or takes up what stage 0 has opened for it.
func (d *daemon) listenAt(ctx context.Context, key string, e transport.Endpoint) ([]transport.Listener, error) {
	if ls, err := d.cfg.Handed.listeners(key); ls != nil || err != nil {
		return ls, err
	}
	e.Probe = d.probe
	ls, err := transport.Listen(ctx, e)
	return ls, d.cfg.Handed.explainSocket(e.Path, err)
}

// addDoors takes listeners of the command line.
func (d *daemon) addDoors(ls []transport.Listener) error {
	for _, l := range ls {
		d.doors.add(&door{Listener: l, tls: d.cfg.TLS})
	}
	if err := d.checkPlain(ls, d.cfg.TLS == nbd.TLSRequire, d.cfg.InsecurePlaintext); err != nil {
		return fmt.Errorf("%w: say -i with a loopback address, or --tls=require, or --insecure-plaintext", err)
	}
	return nil
}

func (d *daemon) openExports() error {
	var err error
	if d.buffers, err = d.newBuffers(); err != nil {
		return err
	}
	if d.engine, err = d.newEngine(); err != nil {
		return err
	}
	if n := d.minProcs(); runtime.GOMAXPROCS(0) < n {
		runtime.GOMAXPROCS(n)
	}
	d.exports = export.NewRegistry()
	d.tellStates()
	if d.conf.Load() == nil {
		return d.addExport(d.stopping, d.cfg.Disk, fromCommandLine, nil)
	}
	defer keepSpare().release()
	return d.addConfigured()
}

// served tells whether this is a service, whose exports can be worked on.
func (d *daemon) served() bool { return d.conf.Load() != nil }

// minProcs is how many processors Go shall see. Two let a connection run on a
// single CPU while a ring's thread sits in the kernel: with one, Go would wait
// some 20 µs, often much longer, before it took it away from that thread. The
// workers of a pool come back from the kernel all the time, and one that finds
// no processor waits behind all that can run, as the request of a guest does
// whose neighbours have many.
func (d *daemon) minProcs() int {
	if !d.cfg.Swap.On && d.engine.Name() == "pool" {
		return limits.PoolProcs
	}
	return limits.MinProcs
}

func (d *daemon) dropPrivileges() error {
	if d.cfg.User == "" && d.cfg.Group == "" || d.cfg.Handed != nil {
		return nil
	}
	if err := confine.Drop(d.cfg.User, d.cfg.Group); err != nil {
		return err
	}
	return d.watchParent() // the kernel has forgotten that
}

// slow is how long a request may take before it is reported.
func (d *daemon) slow() time.Duration {
	if d.conf.Load() == nil {
		return 0
	}
	return time.Duration(d.conf.Load().Log.Slow)
}

// serve begins to accept on every listener, or speaks to the one client on
// standard input and output.
func (d *daemon) serve() error {
	o := nbd.Options{
		Exports:       d.exports,
		Engine:        d.engine,
		Buffers:       d.buffers,
		Log:           d.logs.For("nbd"),
		TLS:           d.cfg.TLS,
		Requests:      d.cfg.Requests,
		Poll:          d.cfg.Poll,
		Oldstyle:      d.cfg.Oldstyle,
		MaskHandshake: d.cfg.MaskHandshake,
		NoStructured:  d.cfg.NoStructured,
		NoMeta:        d.cfg.NoMeta,
		Handshake:     d.cfg.Handshake,
		Events:        &d.bus,
		Slow:          d.slow(),
	}
	o.Encrypt = (&transport.ServerSecurity{Certificates: d.creds, Keys: d.keys}).Encrypt
	if d.cfg.Swap.On {
		o.Bytes, o.Keep = limits.SwapServerBytes, limits.SwapKeep
		o.NoMeta = true // replies with block status take memory, which comes back to nobody below swap
	}
	d.server = nbd.NewServer(o)
	if d.cfg.Stdio {
		return d.serveStdio()
	}
	for _, x := range d.doors.all() {
		d.accept(x)
	}
	return nil
}

func (d *daemon) serveStdio() error {
	c, err := transport.OpenStdio()
	if err != nil {
		return err
	}
	if d.cfg.TLS != nbd.TLSRequire && transport.FromNetwork(c) {
		if err := d.allowPlain(c.LocalAddr().String(), d.cfg.InsecurePlaintext); err != nil {
			return errors.Join(fmt.Errorf("standard input: %w: say --tls=require, or --insecure-plaintext", err), c.Close())
		}
	}
	d.accepted.Add(1)
	go func() {
		defer d.accepted.Done()
		d.finished <- d.converse(c, d.cfg.TLS)
	}()
	return nil
}

// wait blocks until a signal, the captive command or the stdio client ends
// the run.
func (d *daemon) wait(signals *signals) (int, error) {
	var held heldStop
	defer held.close()
	for {
		hup := signals.reload
		if d.reloaded != nil {
			hup = nil // one that comes now waits in its channel
		}
		select {
		case sig := <-signals.stopping:
			if d.refuseStop(&held, sig) {
				continue
			}
			d.beginStop(signals, sig)
			return 0, nil
		case <-held.again:
			if d.mustWait(&held) || d.refuseStop(&held, held.signal) {
				continue
			}
			d.beginStop(signals, held.signal)
			return 0, nil
		case <-hup:
			_ = d.boss.Reloading() // its own error is in the log of the service manager
			d.reloaded = make(chan struct{})
			go d.reload(d.reloaded)
		case <-d.reloaded:
			d.reloaded = nil
			_ = d.boss.Ready(d.summary())
		case err := <-d.finished:
			var exit exitStatus
			if errors.As(err, &exit) {
				return int(exit), nil
			}
			return 0, err
		}
	}
}

// beginStop is the way from a signal to the end.
func (d *daemon) beginStop(signals *signals, sig os.Signal) {
	d.log.Info("stopping", "signal", sig.String())
	_ = d.boss.Stopping("finishing what is in flight") // it has sent the signal
	signals.exitOnNext(d.lastResort)
}

// reload is SIGHUP; it closes done.
func (d *daemon) reload(done chan<- struct{}) {
	defer close(done)
	var changes []string
	var err error
	if d.conf.Load() == nil {
		var take func()
		if changes, take, err = d.readSecrets(false); take != nil {
			take()
		}
		d.staleConf.Store(err != nil)
	} else {
		var r api.Reload
		r, err = service{d}.Reload(d.stopping, false)
		changes = r.Changes
	}
	if err != nil {
		d.log.Error("not reloaded", "error", err)
	} else {
		d.log.Info("reloaded", "changes", changes)
	}
}

// endChanges gives up a reload and what the control API does. Nothing changes the
// daemon any more when it returns, unless what they wait for does not answer within
// limits.EndChanges, which they have together: clients are told to leave after that.
func (d *daemon) endChanges() {
	d.stop()
	ctx, cancel := context.WithTimeout(context.Background(), limits.EndChanges)
	defer cancel()
	d.leaveReload(ctx)
	d.closeControl(ctx)
}

// leaveReload waits for the end of a reload, if there is one.
func (d *daemon) leaveReload(ctx context.Context) {
	if d.reloaded == nil {
		return
	}
	select {
	case <-d.reloaded:
	case <-ctx.Done():
		d.log.Error("a reload does not end", "limit", limits.EndChanges)
	}
}

// close takes down what start has built: no changes, no new clients, requests in
// flight finished within the drain limit, the disk flushed and closed.
func (d *daemon) close() error {
	var given error
	d.endChanges()
	d.leaveDoors()
	d.cfg.Handed.closeRest()
	if d.passed != nil {
		d.passed.Close()
	}
	for _, k := range d.disks.all() {
		d.unpause(k)
	}
	if d.server != nil {
		ctx, cancel := context.WithTimeout(context.Background(), d.drain())
		given = d.server.Shutdown(ctx)
		cancel()
	}
	d.cancel()
	var err error
	switch given {
	case nbd.ErrUnanswered:
		err = d.closeRest()
	case nbd.ErrUntaken:
		d.log.Warn("clients did not take their replies in time and were cut off", "limit", d.drain())
		fallthrough
	default:
		d.accepted.Wait()
		err = d.closeDisk()
	}
	d.removePIDFile()
	if d.logs != nil {
		d.logs.Close()
	}
	return err
}

// closeRest closes what can be closed after a drain that took too long: a guest
// does not keep the data of others from being flushed.
func (d *daemon) closeRest() error {
	d.log.Error("storage did not answer in time, requests were given up", "limit", d.drain())
	ctx, cancel := context.WithTimeout(context.Background(), limits.LastClose)
	defer cancel()
	return errors.Join(nbd.ErrUnanswered, d.exports.Close(ctx))
}

func (d *daemon) drain() time.Duration {
	if c := d.conf.Load(); c != nil {
		return time.Duration(c.Drain)
	}
	if d.cfg.Drain > 0 {
		return d.cfg.Drain
	}
	return limits.Drain
}

func (d *daemon) closeDisk() error {
	var err error
	if d.exports != nil {
		err = d.exports.Close(context.Background())
	}
	if errors.Is(err, export.ErrInUse) { // an opening hangs, which the engine would wait for
		return err
	}
	d.closing.Wait()
	if d.engine != nil {
		err = errors.Join(err, d.engine.Close())
	}
	if d.buffers != nil {
		err = errors.Join(err, d.buffers.Close())
	}
	return err
}

// leaveDoors ends accepting at all doors, at the end of the process.
func (d *daemon) leaveDoors() {
	if err := d.doors.leave(); err != nil {
		d.warn("a listener leaves something behind", "error", err)
	}
}

// lastResort is a second signal: sockets and pid file go, nothing is waited
// for.
func (d *daemon) lastResort() {
	d.leaveDoors()
	d.removePIDFile()
	os.Exit(1)
}

func (d *daemon) addresses() []string {
	var out []string
	for _, l := range d.doors.all() {
		out = append(out, fmt.Sprintf("%s:%s", l.Kind(), l.Addr()))
	}
	return out
}

// printURI tells where the disk is, with the port that the kernel chose.
func (d *daemon) printURI() error {
	if !d.cfg.PrintURI {
		return nil
	}
	var last string // of IPv4 and IPv6 it is the same
	for _, l := range d.doors.all() {
		uri := l.URI(d.cfg.Disk.Name, d.cfg.wantsTLS())
		if uri == last {
			continue
		}
		if _, err := fmt.Fprintln(d.cfg.Stdout, uri); err != nil {
			return err
		}
		last = uri
	}
	return nil
}
