package testenv

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// Options say what a server serves and where. The zero value of each field
// means the server's own default.
type Options struct {
	Image    string
	Format   string // of the image; empty: raw
	ReadOnly bool
	Export   string
	// TLSDir, if set, holds the certificates and makes TLS obligatory.
	TLSDir string
	// Port, if not zero, is a TCP port on 127.0.0.1 instead of the socket.
	Port int
	// Extra are arguments of this one server, placed before the image.
	Extra []string
}

// Kind is one server program: how to write its command line.
type Kind struct {
	Name string
	// Program is the tool to run; empty stands for the vmdiskd built here.
	Program string
	// Args returns the arguments that serve o on a Unix socket, in the
	// foreground.
	Args func(o Options, socket string) []string
}

// Kinds are the servers that the suites and the benchmark know.
var Kinds = []Kind{
	{Name: "vmdiskd", Args: vmdiskdArgs},
	{Name: "vmdiskd-uring", Args: with(vmdiskdArgs, "--engine=uring")},
	{Name: "vmdiskd-pool", Args: with(vmdiskdArgs, "--engine=pool")},
	{Name: "nbdkit", Program: "nbdkit", Args: nbdkitArgs},
	{Name: "qemu-nbd", Program: "qemu-nbd", Args: with(qemuNBDArgs, "--aio=threads")},
	{Name: "qemu-nbd-uring", Program: "qemu-nbd", Args: with(qemuNBDArgs, "--aio=io_uring")},
}

// KindByName returns the row of Kinds, or an error that lists them all.
func KindByName(name string) (Kind, error) {
	var known []string
	for _, k := range Kinds {
		if k.Name == name {
			return k, nil
		}
		known = append(known, k.Name)
	}
	return Kind{}, fmt.Errorf("server %q is none of %s", name, strings.Join(known, ", "))
}

func with(args func(Options, string) []string, extra ...string) func(Options, string) []string {
	return func(o Options, socket string) []string {
		o.Extra = append(append([]string(nil), extra...), o.Extra...)
		return args(o, socket)
	}
}

func nbdkitLike(o Options, socket string) []string {
	args := []string{"-f"}
	if o.Port != 0 {
		args = append(args, "-i", "127.0.0.1", "-p", fmt.Sprint(o.Port))
	} else {
		args = append(args, "-U", socket)
	}
	if o.ReadOnly {
		args = append(args, "-r")
	}
	if o.Export != "" {
		args = append(args, "-e", o.Export)
	}
	if o.TLSDir != "" {
		args = append(args, "--tls=require", "--tls-certificates="+o.TLSDir)
	}
	return append(args, o.Extra...)
}

func vmdiskdArgs(o Options, socket string) []string {
	args := nbdkitLike(o, socket)
	if o.Format != "" {
		args = append(args, "--format="+o.Format)
	}
	return append(args, o.Image)
}

func nbdkitArgs(o Options, socket string) []string {
	return append(nbdkitLike(o, socket), "file", o.Image)
}

func qemuNBDArgs(o Options, socket string) []string {
	args := []string{"-f", cmp.Or(o.Format, "raw"), "-e", "300", "-t", "-x", o.Export}
	if o.Port != 0 {
		args = append(args, "-b", "127.0.0.1", "-p", fmt.Sprint(o.Port))
	} else {
		args = append(args, "-k", socket)
	}
	if o.ReadOnly {
		args = append(args, "-r")
	}
	if o.TLSDir != "" {
		args = append(args, "--object", "tls-creds-x509,id=tls0,endpoint=server,dir="+o.TLSDir, "--tls-creds=tls0")
	}
	return append(append(args, o.Extra...), o.Image)
}

// Server is a running server. It is safe for concurrent use.
type Server struct {
	// URI is where it listens, for libnbd's tools and QEMU alike.
	URI string
	// Socket is the path of the Unix socket, empty with Options.Port.
	Socket string

	cmd  *exec.Cmd
	log  *logBuffer
	done chan struct{} // closed once the process has been waited for
	err  error         // of the process; valid once done is closed
}

// logBuffer collects what a server prints; it is written by exec's goroutine.
type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer // guarded by mu
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// Launch starts the server and returns once it answers. dir is a folder for
// its socket. wrap, which may be empty, is a command that runs the server,
// like taskset. The caller calls Stop.
func (k Kind) Launch(ctx context.Context, dir string, o Options, wrap ...string) (*Server, error) {
	program, err := k.program(ctx)
	if err != nil {
		return nil, err
	}
	socket := filepath.Join(dir, k.Name+".sock")
	argv := append(append(append([]string(nil), wrap...), program), k.Args(o, socket)...)
	s := &Server{
		URI:    uri(o, socket),
		Socket: socket,
		cmd:    exec.Command(argv[0], argv[1:]...),
		log:    &logBuffer{},
		done:   make(chan struct{}),
	}
	network, address := "unix", socket
	if o.Port != 0 {
		network, address, s.Socket = "tcp", fmt.Sprintf("127.0.0.1:%d", o.Port), ""
	}
	s.cmd.Stdout, s.cmd.Stderr = s.log, s.log
	s.cmd.WaitDelay = time.Second
	if err := s.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", k.Name, err)
	}
	go s.wait()
	if err := s.awaitAnswer(ctx, network, address); err != nil {
		s.Kill()
		return nil, fmt.Errorf("%q: %w\n%s", argv, err, s.Log())
	}
	return s, nil
}

func (k Kind) program(ctx context.Context) (string, error) {
	if k.Program == "" {
		return Build(ctx, "vmdiskd")
	}
	return Tool(k.Program)
}

// uri writes the address in the form of the NBD project's uri.md.
func uri(o Options, socket string) string {
	scheme := "nbd"
	if o.TLSDir != "" {
		scheme = "nbds"
	}
	u := url.URL{Scheme: scheme, Path: "/" + o.Export}
	query := url.Values{}
	if o.Port != 0 {
		u.Host = fmt.Sprintf("127.0.0.1:%d", o.Port)
	} else {
		u.Scheme += "+unix"
		query.Set("socket", socket)
	}
	if o.TLSDir != "" {
		query.Set("tls-certificates", o.TLSDir)
	}
	// The slashes stay readable: libnbd and QEMU take both forms.
	u.RawQuery = strings.ReplaceAll(query.Encode(), "%2F", "/")
	if u.Host == "" {
		// url.URL would leave out the empty authority that the form needs.
		return u.Scheme + "://" + u.EscapedPath() + "?" + u.RawQuery
	}
	return u.String()
}

func (s *Server) wait() {
	s.err = s.cmd.Wait()
	close(s.done)
}

// awaitAnswer waits for the greeting, which says more than a socket file: some
// servers bind long before they can serve.
func (s *Server) awaitAnswer(ctx context.Context, network, address string) error {
	died := errors.New("server ended before it answered")
	var cause error
	err := Await(ctx, func() bool {
		select {
		case <-s.done:
			cause = fmt.Errorf("%w: %v", died, s.err)
			return true
		default:
			return greets(network, address)
		}
	})
	if err != nil {
		return fmt.Errorf("no answer on %s: %w", address, err)
	}
	return cause
}

// greets reports whether the 18 bytes of a newstyle greeting arrive.
func greets(network, address string) bool {
	conn, err := net.DialTimeout(network, address, time.Second)
	if err != nil {
		return false
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(Patience))
	greeting := make([]byte, 18)
	if _, err := conn.Read(greeting); err != nil {
		return false
	}
	// Client flags and NBD_OPT_ABORT: the server is told that this was all.
	conn.Write([]byte("\x00\x00\x00\x01IHAVEOPT\x00\x00\x00\x02\x00\x00\x00\x00"))
	return bytes.HasPrefix(greeting, []byte("NBDMAGICIHAVEOPT"))
}

// Pid returns the server's process id.
func (s *Server) Pid() int { return s.cmd.Process.Pid }

// Log returns what the server has printed until now.
func (s *Server) Log() string { return s.log.String() }

// Signal sends a signal to the server.
func (s *Server) Signal(sig os.Signal) error { return s.cmd.Process.Signal(sig) }

// Done is closed once the server has ended.
func (s *Server) Done() <-chan struct{} { return s.done }

// Kill ends the server at once and waits for its end.
func (s *Server) Kill() {
	s.cmd.Process.Kill()
	<-s.done
}

// Stop asks the server to end, and waits. A server that outlives Patience or
// ends with an error is an error, and so is a report of the race detector.
func (s *Server) Stop() error {
	s.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-s.done:
	case <-time.After(Patience):
		s.Kill()
		return fmt.Errorf("server was still there %v after SIGTERM\n%s", Patience, s.Log())
	}
	if strings.Contains(s.Log(), "DATA RACE") {
		return fmt.Errorf("the race detector reports:\n%s", s.Log())
	}
	if s.err == nil || endedBy(s.err, syscall.SIGTERM) {
		return nil
	}
	return fmt.Errorf("server ended badly: %w\n%s", s.err, s.Log())
}

func endedBy(err error, sig syscall.Signal) bool {
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		return false
	}
	status, ok := exit.Sys().(syscall.WaitStatus)
	return ok && status.Signaled() && status.Signal() == sig
}

// Under returns the kind that a suite runs against: vmdiskd, or what
// VMDISKD_TEST_SERVER names. Running a suite against a reference server tells
// a wrong test from a wrong server.
func Under(t testing.TB) Kind {
	t.Helper()
	name := os.Getenv("VMDISKD_TEST_SERVER")
	if name == "" {
		name = "vmdiskd"
	}
	k, err := KindByName(name)
	if err != nil {
		t.Fatal(err)
	}
	if k.Program != "" {
		Require(t, k.Program)
	} else {
		Binary(t, "vmdiskd") // so that no shorter wait pays for the build
	}
	return k
}

// Start launches the server under test and stops it when the test ends; the
// test fails when the server does not end well.
func Start(t testing.TB, o Options) *Server {
	t.Helper()
	s := StartToKill(t, o)
	t.Cleanup(func() {
		if err := s.Stop(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Logf("server's log:\n%s", s.Log())
		}
	})
	return s
}

// StartToKill is Start for a test that ends the server itself, perhaps badly.
func StartToKill(t testing.TB, o Options) *Server {
	t.Helper()
	s, err := Under(t).Launch(Context(t), TempDir(t), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Kill)
	return s
}

// FreePort returns a TCP port of 127.0.0.1 that was free a moment ago.
func FreePort(t testing.TB) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}
