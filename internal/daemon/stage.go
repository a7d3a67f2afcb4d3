package daemon

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/layer"
	"github.com/vmdiskd/vmdiskd/internal/backing/open"
	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/confine"
	"github.com/vmdiskd/vmdiskd/internal/obs"
	"github.com/vmdiskd/vmdiskd/internal/transport"
)

// handover is what stage 0 tells the worker. Numbers are those of descriptors,
// which both know by the same; 0 is none.
type handover struct {
	Parent    int
	Config    []byte
	Listeners map[string][]transport.Handed // by their keys
	Control   *transport.Handed
	Metrics   int
	Images    map[string]handedImage // by the names of exports
	Silent    map[string]bool        // exports whose images did not answer, and whether they were asked
	TLS       map[string]int         // by file name; nil: none were opened
	Keys      int                    // file of the pre-shared keys
	NoSecrets string                 // why TLS and Keys are missing, if they were wanted
	Closed    []closedListener
	Log       int
	PIDFile   int
	Command   int      // process of --run
	Gate      int      // what it waits for
	Forbidden []string // folders that cannot be opened
	Caged     bool     // Unix sockets can be made in Sockets alone, which are folders
	Sockets   []string
}

// handedImage are the files of one image.
type handedImage struct {
	Image string // as the export names it
	Dirs  map[string]string
	Files []handedFile
	InUse string // who has the image, whose files are only read then; "": nobody
}

type handedFile struct {
	Path     string
	ReadOnly bool
	Direct   bool
	FD       int

	file *os.File // of the worker, once it has looked at it
}

// Keys of listeners.
func endpointKey(i int) string             { return fmt.Sprintf("endpoint %d", i) }
func listenerKey(l config.Listener) string { return "listener " + l.URI }

// stage0 opens what the worker may not.
type stage0 struct {
	*daemon
	out   handover
	files []*os.File
	paths []confine.Path
	open  []io.Closer        // what an error closes again
	first transport.Listener // where a command finds the disk
	gate  *os.File

	signals *signals

	waiting map[string]bool // what the names of sockets begin with that the service manager passes
}

// becomeWorker opens everything, gives up all rights and goes on as the
// worker. It returns only if that fails.
func (d *daemon) becomeWorker(signals *signals) error {
	s := &stage0{daemon: d, signals: signals, out: handover{
		Parent: os.Getppid(), Config: d.cfg.Text,
		Listeners: map[string][]transport.Handed{}, Images: map[string]handedImage{},
	}}
	for _, step := range [...]func() error{
		d.watchParent,
		s.checkSwap,
		s.openLog,
		s.checkState,
		s.openTLS,
		d.findSupervisor,
		s.lookPassed,
		s.listenAll,
		s.openControl,
		s.handExports,
		s.openPIDFile,
		s.startCommand,
		s.exec,
	} {
		if err := step(); err != nil {
			s.undo()
			return err
		}
	}
	return nil
}

// undo closes what was opened, and removes what was made; close does the rest.
func (s *stage0) undo() {
	for _, c := range s.open {
		_ = c.Close() // the error that led here matters more
	}
	if s.gate != nil {
		_ = s.gate.Close() // the command ends
	}
}

// hand keeps f open until the worker has it.
func (s *stage0) hand(f *os.File) int {
	s.files = append(s.files, f)
	return int(f.Fd())
}

// may lets the worker go on using a path.
func (s *stage0) may(path string, r confine.Right) {
	if abs, err := filepath.Abs(path); err == nil {
		s.paths = append(s.paths, confine.Path{Path: abs, May: r})
	}
}

// mayReadAgain lets the worker read a file when it has been replaced: in its
// folder, and in that of the file to which it is a symbolic link, as certbot and
// Kubernetes lay out certificates.
func (s *stage0) mayReadAgain(path string) {
	s.may(filepath.Dir(path), confine.Read)
	if to, err := filepath.EvalSymlinks(path); err == nil {
		s.may(filepath.Dir(to), confine.Read)
	}
}

// checkSwap is enterSwap without the exec, of which this one has its own.
func (s *stage0) checkSwap() error {
	if !s.cfg.Swap.On {
		return nil
	}
	err := s.cfg.checkSwap()
	if err == nil {
		err = s.cfg.Swap.tolerate(s.cfg.swapStorage())
	}
	if err != nil {
		return fmt.Errorf("--swap: %w", err)
	}
	s.may(fmt.Sprintf("/proc/%d", os.Getpid()), confine.Read|confine.List) // what threads have
	s.may("/proc/sys/vm", confine.Read)
	s.may("/proc/swaps", confine.Read) // who swaps to the disk
	s.may("/sys/devices", confine.Read|confine.List)
	return nil
}

func (s *stage0) openLog() error {
	if !strings.HasPrefix(s.cfg.Log.Sink, "/") {
		return nil
	}
	f, err := obs.OpenFile(s.cfg.Log.Sink)
	if err != nil {
		return err
	}
	s.out.Log = s.hand(f)
	return nil
}

// checkState refuses a folder of kept exports that another daemon has, before
// anything is made. The worker, whose user it belongs to, takes it.
func (s *stage0) checkState() error {
	c := s.conf.Load()
	if c != nil && c.Control.State != "" && config.StateInUse(c.Control.State) {
		return fmt.Errorf("control.state: %q: %w", c.Control.State, config.ErrStateInUse)
	}
	return nil
}

// openTLS opens certificates and keys for the worker, both or neither.
func (s *stage0) openTLS() error {
	wanted, needed := s.secrets()
	if !wanted {
		return nil
	}
	keys, err := s.openKeys()
	if err == nil {
		err = s.openCertificates()
	}
	if err != nil {
		keys.Close() // of none, too
		if needed {
			return err
		}
		s.out.NoSecrets = err.Error() // the worker complains
		return nil
	}
	if keys != nil {
		s.out.Keys = s.hand(keys)
		s.mayReadAgain(s.cfg.TLSKeys)
	}
	return nil
}

// openCertificates shows mistakes in them before anything is made.
func (s *stage0) openCertificates() error {
	dir := s.cfg.TLSCertificates
	if dir == "" {
		return nil
	}
	if _, err := transport.LoadCredentials(dir, transport.TLSOptions{Log: slog.New(slog.DiscardHandler)}); err != nil {
		return err
	}
	all, err := transport.OpenCredentials(dir, transport.TLSOptions{})
	if err != nil {
		return err
	}
	s.out.TLS = map[string]int{}
	for name, f := range all {
		s.out.TLS[name] = s.hand(f)
		if name != transport.CredentialsFolder {
			s.mayReadAgain(filepath.Join(dir, name))
		}
	}
	s.may(dir, confine.Read)
	return nil
}

// lookPassed finds what the service manager passes, which the worker takes.
func (s *stage0) lookPassed() (err error) {
	if !s.served() {
		return nil
	}
	if s.out.Closed, err = s.makeWay(); err != nil {
		return err
	}
	s.waiting = map[string]bool{}
	for _, name := range strings.Split(os.Getenv("LISTEN_FDNAMES"), ":") {
		listener, _, _ := splitKept(name)
		s.waiting[listener] = true
	}
	return nil
}

// listenAll opens the listeners that all exports share.
func (s *stage0) listenAll() error {
	for i, e := range s.cfg.Endpoints {
		if err := s.listen(endpointKey(i), e); err != nil {
			return err
		}
	}
	c := s.conf.Load()
	if c == nil {
		return nil
	}
	for _, l := range c.Listeners {
		if err := s.listenTo(l); err != nil {
			return fmt.Errorf("listener %q: %w", l.URI, err)
		}
	}
	return nil
}

// handExports opens listeners and images of the exports, after all that the
// service cannot be without: descriptors may run out.
func (s *stage0) handExports() error {
	if s.served() {
		defer keepSpare().release()
		s.listenExports()
	}
	return s.openImages()
}

// listenExports opens the listeners of single exports of the configuration. One that
// cannot be opened is the worker's to complain of, because other exports do not
// depend on it. Those of kept exports the worker opens, where it may: it can write
// what is kept, and would choose its own folders.
func (s *stage0) listenExports() {
	for _, x := range s.conf.Load().Exports {
		for _, l := range x.Listeners {
			_ = s.listenTo(l)
		}
	}
}

func (s *stage0) listenTo(l config.Listener) error {
	if strings.HasPrefix(l.URI, config.SystemdScheme) { // the worker takes it itself
		return nil
	}
	e, err := endpointOf(l)
	if err != nil {
		return err
	}
	if e.Kind == transport.Unix {
		s.may(filepath.Dir(e.Path), confine.List|confine.Remove|confine.Socket)
	}
	if name := keptName(l, e); name != "" && s.waiting[name] { // that one, too
		return nil
	}
	return s.listen(listenerKey(l), e)
}

// listen opens one endpoint for the worker.
func (s *stage0) listen(key string, e transport.Endpoint) error {
	if s.out.Listeners[key] != nil {
		return nil // the worker complains of the second
	}
	ls, err := transport.Listen(s.ctx, e)
	if err != nil {
		return err
	}
	for _, l := range ls {
		h, err := s.handListener(l)
		if err != nil {
			return err
		}
		s.out.Listeners[key] = append(s.out.Listeners[key], h)
		if s.first == nil {
			s.first = l
		}
	}
	return nil
}

// handListener keeps a listener open until the worker has it. One that cannot be
// handed over is closed: its file would be in the worker's way.
func (s *stage0) handListener(l io.Closer) (transport.Handed, error) {
	h, files, err := transport.HandOver(l)
	if err != nil {
		return h, errors.Join(err, l.Close())
	}
	s.open = append(s.open, l)
	for _, f := range files {
		s.hand(f)
	}
	s.mayRemove(h)
	return h, nil
}

// mayRemove lets the worker remove the file of a socket, and make it anew at
// the same place.
func (s *stage0) mayRemove(h transport.Handed) {
	if h.Path == "" {
		return
	}
	s.may(filepath.Dir(h.Path), confine.List|confine.Remove|confine.Socket)
	if h.Private != "" {
		s.may(filepath.Dir(h.Private), confine.Rmdir)
	}
}

// exports0 are the exports that the worker will open.
func (s *stage0) exports0() []config.Export {
	list, _ := s.allExports() // the worker complains
	return list
}

func (s *stage0) openControl() error {
	c := s.conf.Load()
	if c == nil {
		return nil
	}
	s.mayReadAgain(s.cfg.File)
	s.mayLabel()
	if c.Control.State != "" {
		s.may(c.Control.State, confine.Images)
	}
	if c.Control.Socket != "" {
		l, err := listenControl(s.ctx, &c.Control)
		if err != nil {
			return err
		}
		h, err := s.handListener(l)
		if err != nil {
			return err
		}
		s.out.Control = &h
	}
	if at := c.Metrics.Listen; at != "" {
		l, err := net.Listen("tcp", at)
		if err != nil {
			return err
		}
		f, err := l.(*net.TCPListener).File()
		if err != nil {
			return err
		}
		s.out.Metrics = s.hand(f)
	}
	return nil
}

// openImages opens the images. What cannot be opened for a service is the
// worker's to complain of.
func (s *stage0) openImages() (err error) {
	if s.out.Silent, err = takeSilent(); err != nil {
		return err
	}
	var list []sought
	for _, x := range s.exports0() {
		if _, silent := s.out.Silent[x.Name]; !silent {
			list = append(list, sought{Export: x})
		}
	}
	known := len(s.out.Silent)
	done := make(chan []gathered, 1)
	go func() { done <- s.gatherFirst(list) }()
	select {
	case all := <-done:
		for i, g := range all {
			if err := s.handImage(&list[i].Export, g); err != nil && !s.served() {
				return err
			}
		}
	case <-s.signals.stopping: // storage may hang
		return errStopped
	}
	if len(s.out.Silent) > known {
		return s.startAnew()
	}
	for _, r := range s.roots() {
		s.may(r, confine.Images)
	}
	return nil
}

// handImage keeps the files of an image open until the worker has them, or notes what
// it is not to wait for once more.
func (s *stage0) handImage(x *config.Export, g gathered) error {
	h := handedImage{Image: x.Image}
	switch {
	case errors.Is(g.err, errNoAnswer):
		s.out.Silent[x.Name] = !errors.Is(g.err, errNoTurn)
	case errors.Is(g.err, backing.ErrLocked):
		h.InUse = g.err.Error()
	}
	if g.table == nil && h.InUse == "" {
		return g.err
	}
	files, dirs := g.table.Contents()
	h.Dirs = dirs
	for r, f := range files {
		h.Files = append(h.Files, handedFile{Path: r.Path, ReadOnly: r.ReadOnly, Direct: r.Direct, FD: s.hand(f)})
		if s.served() && (!r.ReadOnly || h.InUse != "" && r.Path == x.Image) {
			s.mayOpenAgain(f)
		}
	}
	s.out.Images[x.Name] = h
	return g.err
}

// mayOpenAgain lets the worker open a block device again that it writes to, wherever
// links to it lie, as raw.Unclaimed does. To read and to write, both: a reload opens it
// as it shall be served, and asks by ioctl(2) for its size.
func (s *stage0) mayOpenAgain(f *os.File) {
	if fi, err := f.Stat(); err == nil && fi.Mode().Type() == fs.ModeDevice {
		s.may(pathOf(f), confine.Read|confine.Write)
	}
}

func (s *stage0) openPIDFile() error {
	err := s.daemon.openPIDFile()
	if s.pid != nil {
		s.out.PIDFile = s.hand(s.pid.file)
		s.may(filepath.Dir(s.pid.path), confine.Remove)
	}
	return err
}

// startCommand starts the command of --run outside the cage, because the worker
// can start nothing. It waits for a line from the worker.
func (s *stage0) startCommand() error {
	if s.cfg.Run == "" {
		return nil
	}
	if s.first == nil {
		return errNoSocket
	}
	cred, err := confine.CredentialOf(s.cfg.User, s.cfg.Group)
	if err != nil {
		return err
	}
	wait, gate, err := os.Pipe()
	if err != nil {
		return err
	}
	defer wait.Close()
	cmd := exec.Command("/bin/sh", "-c", "read -r _ <&3 || exit 1\nexec 3<&-\n"+s.cfg.shellVariables(s.first)+s.cfg.Run)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.ExtraFiles = []*os.File{wait}
	if cred != nil {
		cmd.SysProcAttr = &unix.SysProcAttr{Credential: cred}
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	s.gate = gate
	s.out.Command, s.out.Gate = cmd.Process.Pid, s.hand(gate)
	return nil
}

// Files that look-ups of users, hosts and times read, and what storage says of
// itself.
var alwaysRead = []string{
	"/etc/passwd", "/etc/group", "/etc/hosts", "/etc/resolv.conf", "/etc/nsswitch.conf", "/etc/localtime",
	"/usr/share/zoneinfo", "/sys/dev/block", "/sys/devices",
}

// forbidden are folders that the worker may not open, by which it tries its
// cage.
func (s *stage0) forbidden() (list []string) {
	for _, dir := range [...]string{"/", "/proc", "/etc"} {
		if _, err := os.Stat(dir); err != nil {
			continue
		}
		if !slices.ContainsFunc(s.paths, func(p confine.Path) bool { return p.May&confine.List != 0 && open.Within(p.Path, dir) }) {
			list = append(list, dir)
		}
	}
	return list
}

// socketFolders are those in which the worker may make sockets.
func (s *stage0) socketFolders() (list []string) {
	for _, p := range s.paths {
		if p.May&confine.Socket != 0 && !slices.Contains(list, p.Path) {
			list = append(list, p.Path)
		}
	}
	return list
}

// errStopped is that a signal came before anything was served.
var errStopped = errors.New("stopped while starting")

// exec goes on as the worker.
func (s *stage0) exec() error {
	for _, path := range alwaysRead {
		s.may(path, confine.Read)
	}
	if s.served() { // overlays of exports that come later
		s.may(layer.TemporaryFolder(), confine.Read|confine.Write)
	}
	s.may(os.DevNull, confine.Read|confine.Write)
	p := &confine.Plan{
		Mode: s.cfg.Confine, User: s.cfg.User, Group: s.cfg.Group,
		Files: s.files, Paths: s.paths,
		AbstractSockets: strings.HasPrefix(os.Getenv("NOTIFY_SOCKET"), "@"),
	}
	if s.served() {
		p.BindTCP = true
		p.RootKeeps = []uintptr{unix.CAP_CHOWN, unix.CAP_DAC_OVERRIDE, unix.CAP_FOWNER, unix.CAP_NET_BIND_SERVICE}
		if s.roots() == nil {
			p.OpenPaths = "the configuration names no images.roots: a reload may name images anywhere"
		}
	}
	if s.cfg.Swap.On {
		p.Lock = true
		p.Thread = func() error { return s.cfg.Swap.tolerate(confine.PrepareSwap()) }
	}
	if p.OpenPaths == "" {
		s.out.Forbidden = s.forbidden()
		s.out.Caged, s.out.Sockets = true, s.socketFolders()
	}
	p.State = &s.out
	// From here on signals have their default actions: none is lost.
	if sig := s.signals.release(); sig != nil {
		return errStopped
	}
	err := p.Exec()
	runtime.KeepAlive(s)
	return fmt.Errorf("confine: %w", err)
}
