package kernel

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mdlayher/genetlink/genltest"
	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd/client"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
	"github.com/vmdiskd/vmdiskd/internal/transport"
	"github.com/vmdiskd/vmdiskd/internal/transport/transporttest"
)

// patience ends a test that has failed already.
const patience = time.Minute

// reads sends a request on a socket as the driver does and fails the test
// unless the server answers.
func reads(t *testing.T, f *os.File) {
	t.Helper()
	_, err := f.Write(wire.AppendRequest(nil, wire.Request{Cmd: wire.CmdRead, Cookie: 5, Len: 512}))
	must(t, err)
	b := make([]byte, wire.SimpleReplySize+512)
	_, err = io.ReadFull(f, b)
	must(t, err)
	if !bytes.HasSuffix(b, bytes.Repeat([]byte("x"), 512)) {
		t.Errorf("the answer is %q", b)
	}
}

func (k *fakeKernel) config(s *fakeServer) Config {
	return Config{Server: s.server(), URI: "nbd+unix:///disk", Index: 2, Connections: 1, Sysfs: k.sysfs}
}

func (k *fakeKernel) file(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(k.sysfs.path(2, name))
	must(t, err)
	return strings.TrimSpace(string(b))
}

func TestAttachedDeviceTransmitsOnEachConnection(t *testing.T) {
	k, s := newFakeKernel(t), newFakeServer(t)
	s.size.Store(1<<20 + 100)
	c := k.config(s)
	c.Connections, c.ReadOnly, c.Timeout = 4, true, time.Minute
	v, err := Attach(t.Context(), k.d, c)
	must(t, err)
	defer v.Close()
	_, got := k.last()
	if got.cmd != cmdConnect || got.sockets != 4 || got.numbers[attrSizeBytes] != 1<<20 || got.numbers[attrBlockSize] != 512 ||
		wire.ExportFlags(got.numbers[attrServerFlags]) != wire.HasFlags|wire.SendFlush|wire.CanMultiConn|wire.ReadOnly || got.numbers[attrTimeout] != 60 {
		t.Errorf("the driver is told %+v", got)
	}
	if v.Path() != "/dev/nbd2" || v.Size() != 1<<20 || k.file(t, "queue/max_sectors_kb") != "1024" || k.file(t, "queue/nr_requests") != "128" {
		t.Errorf("%s of %d bytes, requests of %s KiB", v.Path(), v.Size(), k.file(t, "queue/max_sectors_kb"))
	}
	for i := range 4 {
		reads(t, k.socket(i))
	}
}

// TestTokenIsNotShown: everybody may read what the driver remembers.
func TestTokenIsNotShown(t *testing.T) {
	token := strings.Repeat("A5", limits.TokenDigits/2)
	sum, long := transport.ShownToken(token), "nbd://host/"+strings.Repeat("n", limits.Backend)
	all := sha256.Sum256([]byte(long + "%3F" + sum))
	for uri, want := range map[string]string{
		"nbd+unix:///disk%3F" + token + "?socket=/s":             "nbd+unix:///disk%3F" + sum + "?socket=/s",
		"nbd://host/%3f" + strings.ToLower(token):                "nbd://host/%3F" + sum,
		"nbd://host/a%3Fb%3F" + token:                            "nbd://host/a%3Fb%3F" + sum,
		"nbd://host/a%3F" + strings.Repeat("%415", len(token)/2): "nbd://host/a%3F" + sum,
		"nbd://host/a%3F" + token[1:]:                            "nbd://host/a%3F" + token[1:],
		"nbd://host/a%3Fg" + token[1:]:                           "nbd://host/a%3Fg" + token[1:],
		"nbd://host/" + token:                                    "nbd://host/" + token,
		"nbd+unix:///disk?socket=/%3F" + token:                   "nbd+unix:///disk?socket=/%3F" + token,
		long + "%3F" + token:                                     long[:limits.Backend-96] + hex.EncodeToString(all[:16]),
	} {
		if got := BackendURI(remembered(t, uri, "")); got != want {
			t.Errorf("%s:\ngot  %s\nwant %s", uri, got, want)
		}
	}
	k, s := newFakeKernel(t), newFakeServer(t)
	c := k.config(s)
	c.URI = "nbd+unix:///disk%3F" + token + "?socket=/s"
	v, err := Attach(t.Context(), k.d, c)
	must(t, err)
	defer v.Close()
	if got := k.file(t, "backend"); strings.Contains(got, token) || !strings.HasSuffix(got, " nbd+unix:///disk%3F"+sum+"?socket=/s") {
		t.Errorf("the driver remembers %q", got)
	}
}

// TestTokenIsNotSaid: the messages of a keeper go to the journal, and those of the
// first connection to whoever asked for it.
func TestTokenIsNotSaid(t *testing.T) {
	k, s := newFakeKernel(t), newFakeServer(t)
	c := k.config(s)
	c.Server.Export = "a?" + aToken
	s.names.Store(&names{})
	_, err := Attach(t.Context(), k.d, c)
	if refused, ok := errors.AsType[*client.OptionError](err); !ok || refused.Rep != wire.RepErrUnknown || strings.Contains(err.Error(), aToken) {
		t.Errorf("no export: %v", err)
	}
	s.defaultIs("a", 1<<20)
	v, err := Attach(t.Context(), k.d, c)
	must(t, err)
	defer v.Close()
	s.names.Store(&names{})
	said, end := keep(t, &Keeper{Device: v, Poll: limits.DevicePollLeast})
	for _, want := range []string{"asking the server", "connection 1"} {
		if text := hear(t, said, want); strings.Contains(text, aToken) || !strings.Contains(text, `export "a?`) {
			t.Errorf("said: %s", text)
		}
		must(t, unix.Shutdown(int(k.socket(0).Fd()), unix.SHUT_RDWR))
	}
	if err := end(); !errors.Is(err, context.Canceled) {
		t.Errorf("the keeper ends with %v", err)
	}
}

// defaultIs makes a server of the exports a and b, of which one opens to who
// names none, with and without a token.
func (s *fakeServer) defaultIs(name string, sizeOfA int64) {
	list := names{"a": {"a", sizeOfA}, "b": {"b", 2 << 20}}
	list[""] = list[name]
	for _, n := range []string{"", "a", "b"} {
		list[n+"?"+aToken] = list[n]
	}
	s.names.Store(&list)
}

var aToken = strings.Repeat("A5", limits.TokenDigits/2)

// TestKeptDeviceStaysWithItsExport: connections and sizes are those of the
// export that was the server's default at the first connection.
func TestKeptDeviceStaysWithItsExport(t *testing.T) {
	for asked, then := range map[string]string{"": "a", "?" + aToken: "a?" + aToken} {
		k, s := newFakeKernel(t), newFakeServer(t)
		s.defaultIs("a", 1<<20)
		c := k.config(s)
		c.Server.Export, c.Connections = asked, 2
		v, err := Attach(t.Context(), k.d, c)
		must(t, err)
		if got := s.lastAsked(); got != then {
			t.Errorf("the second connection is to %q, want %q", got, then)
		}
		s.defaultIs("b", 1<<20)
		must(t, unix.Shutdown(int(k.socket(0).Fd()), unix.SHUT_RDWR))
		said, end := keep(t, &Keeper{Device: v, Poll: limits.DevicePollLeast})
		hear(t, said, "connection 1 of /dev/nbd2 is new")
		s.defaultIs("b", 3<<20)
		hear(t, said, "has 3145728 bytes")
		if err := end(); !errors.Is(err, context.Canceled) {
			t.Errorf("the keeper ends with %v", err)
		}
		for _, c := range k.calls {
			if c.numbers[attrSizeBytes] == 2<<20 {
				t.Errorf("%q: the driver is told the size of the other export: %+v", asked, c)
			}
		}
		v.Close()
	}
}

// TestSizeOfAnotherExportIsNotFollowed: the server has given its name away.
func TestSizeOfAnotherExportIsNotFollowed(t *testing.T) {
	k, s := newFakeKernel(t), newFakeServer(t)
	s.defaultIs("a", 1<<20)
	c := k.config(s)
	c.Server.Export = "a"
	v, err := Attach(t.Context(), k.d, c)
	must(t, err)
	defer v.Close()
	s.names.Store(&names{"a": {"b", 2 << 20}})
	if size, err := sizeOf(t.Context(), &v.config.Server); !errors.Is(err, ErrRefused) {
		t.Errorf("got %d, %v", size, err)
	}
}

// certified are the configurations of a server called "disks" and of a client
// that trusts it, with a new authority.
func certified(t *testing.T) (server, trusted *tls.Config) {
	t.Helper()
	ca := transporttest.NewCA(t, "ca")
	cert := ca.IssueServer("disks")
	pair, err := tls.X509KeyPair(cert.CertPEM(), cert.KeyPEM(t))
	must(t, err)
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca.PEM())
	return &tls.Config{Certificates: []tls.Certificate{pair}}, &tls.Config{RootCAs: pool, ServerName: "disks"}
}

// TestTLSServerIsReachedThroughARelay: the driver's socket is plain, and the
// server's is not.
func TestTLSServerIsReachedThroughARelay(t *testing.T) {
	k, s := newFakeKernel(t), newFakeServer(t)
	own, trusted := certified(t)
	s.tls.Store(own)
	c := k.config(s)
	c.Server.TLS, c.Connections = func() (*tls.Config, error) { return trusted, nil }, 2
	if c.Server.Direct() {
		t.Fatal("the driver is to speak TLS")
	}
	v, err := Attach(t.Context(), k.d, c)
	must(t, err)
	defer v.Close()
	reads(t, k.socket(0))
	reads(t, k.socket(1))

	other := trusted.Clone()
	other.ServerName = "other"
	c.Server.TLS = func() (*tls.Config, error) { return other, nil }
	if _, err := Attach(t.Context(), k.d, c); !errors.As(err, new(x509.HostnameError)) {
		t.Errorf("a certificate of another name: %v", err)
	}
	s.tls.Store(nil)
	c.Server.TLS = func() (*tls.Config, error) { return trusted, nil }
	if _, err := Attach(t.Context(), k.d, c); !errors.Is(err, client.ErrNoTLS) {
		t.Errorf("a server without TLS: %v", err)
	}
}

func TestSwapDeviceIsHeldSmall(t *testing.T) {
	k, s := newFakeKernel(t), newFakeServer(t)
	c := k.config(s)
	c.Swap = true
	v, err := Attach(t.Context(), k.d, c)
	must(t, err)
	defer v.Close()
	_, got := k.last()
	if got.numbers[attrBlockSize] != 4096 || got.numbers[attrTimeout] != 0 || k.file(t, "queue/max_sectors_kb") != "32" || k.file(t, "queue/nr_requests") != "4" {
		t.Errorf("%+v, %s requests of %s KiB", got, k.file(t, "queue/nr_requests"), k.file(t, "queue/max_sectors_kb"))
	}
}

func TestWhatCannotBeSafeIsRefused(t *testing.T) {
	for name, change := range map[string]func(*Config, *fakeServer){
		"no connection":              func(c *Config, _ *fakeServer) { c.Connections = 0 },
		"too many connections":       func(c *Config, _ *fakeServer) { c.Connections = limits.DeviceSockets + 1 },
		"negative timeout":           func(c *Config, _ *fakeServer) { c.Timeout = -1 },
		"endless timeout":            func(c *Config, _ *fakeServer) { c.DeadConn = limits.DeviceTimeMost + 1 },
		"swap with two connections":  func(c *Config, _ *fakeServer) { c.Swap, c.Connections = true, 2 },
		"swap with a timeout":        func(c *Config, _ *fakeServer) { c.Swap, c.Timeout = true, time.Second },
		"swap over TCP":              func(c *Config, _ *fakeServer) { c.Swap, c.Server.Target.Kind = true, transport.TCP },
		"swap over vsock":            func(c *Config, _ *fakeServer) { c.Swap, c.Server.Target.Kind = true, transport.VSock },
		"swap read-only":             func(c *Config, _ *fakeServer) { c.Swap, c.ReadOnly = true, true },
		"swap on a read-only export": func(c *Config, s *fakeServer) { c.Swap = true; s.flags.Store(uint32(wire.HasFlags | wire.ReadOnly)) },
		"two connections that the server does not allow": func(c *Config, s *fakeServer) {
			c.Connections = 2
			s.flags.Store(uint32(wire.HasFlags))
		},
		"two connections to two exports": func(c *Config, s *fakeServer) {
			c.Server.Export, c.Connections = "", 2
			s.names.Store(&names{"": {"a", 1 << 20}, "a": {"b", 1 << 20}})
		},
		"an export below a block": func(_ *Config, s *fakeServer) { s.size.Store(100) },
		"blocks above a page":     func(_ *Config, s *fakeServer) { s.block.Store(8192) },
	} {
		k, s := newFakeKernel(t), newFakeServer(t)
		c := k.config(s)
		change(&c, s)
		if _, err := Attach(t.Context(), k.d, c); !errors.Is(err, ErrRefused) {
			t.Errorf("%s: %v", name, err)
		}
		if n, got := k.last(); n != 0 {
			t.Errorf("%s: the driver is told %+v", name, got)
		}
	}
}

func TestBytesBeforeTheFirstRequestEndTheAttachment(t *testing.T) {
	k, s := newFakeKernel(t), newFakeServer(t)
	s.early.Store(true)
	if _, err := Attach(t.Context(), k.d, k.config(s)); !errors.Is(err, client.ErrProtocol) {
		t.Errorf("got %v", err)
	}
}

func TestDeviceThatCannotBeTunedIsTakenAway(t *testing.T) {
	k, s := newFakeKernel(t), newFakeServer(t)
	c := k.config(s)
	c.Sysfs = Sysfs(t.TempDir())
	if _, err := Attach(t.Context(), k.d, c); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v", err)
	}
	if _, got := k.last(); got.cmd != cmdDisconnect || got.numbers[attrIndex] != 2 {
		t.Errorf("the last command is %+v", got)
	}
}

func TestDetachByForceTellsTheDriver(t *testing.T) {
	k, s := newFakeKernel(t), newFakeServer(t)
	v, err := Attach(t.Context(), k.d, k.config(s))
	must(t, err)
	defer v.Close()
	must(t, Detach(t.Context(), k.d, k.sysfs, 2, true))
	if _, got := k.last(); got.cmd != cmdDisconnect {
		t.Errorf("the last command is %+v", got)
	}
	if err := Detach(t.Context(), k.d, k.sysfs, 2, true); !errors.Is(err, ErrNoDevice) {
		t.Errorf("a second time: %v", err)
	}
}

// keep runs a keeper until the test ends it and returns what it says.
func keep(t *testing.T, k *Keeper) (said <-chan string, end func() error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	words, ended := make(chan string, 64), make(chan error, 1)
	k.Say = func(format string, args ...any) { words <- sprintf(format, args...) }
	go func() { ended <- k.Keep(ctx) }()
	return words, func() error { cancel(); return <-ended }
}

// hear waits for a message with want in it, and returns it.
func hear(t *testing.T, said <-chan string, want string) string {
	t.Helper()
	deadline := time.After(patience)
	for {
		select {
		case s := <-said:
			if strings.Contains(s, want) {
				return s
			}
			t.Logf("said: %s", s)
		case <-deadline:
			t.Fatalf("%q is not said", want)
		}
	}
}

func TestKeeperReplacesConnectionsAndFollowsTheSize(t *testing.T) {
	k, s := newFakeKernel(t), newFakeServer(t)
	c := k.config(s)
	c.Connections = 2
	v, err := Attach(t.Context(), k.d, c)
	must(t, err)
	dead := make(chan int, 1)
	keeper := &Keeper{Device: v, Dead: dead, Poll: limits.DevicePollLeast}
	said, end := keep(t, keeper)

	s.size.Store(2 << 20)
	hear(t, said, "/dev/nbd2 has 2097152 bytes")
	if _, got := k.last(); got.cmd != cmdReconfigure || got.sockets != 0 || got.numbers[attrSizeBytes] != 2<<20 || got.backend != k.file(t, "backend") {
		t.Errorf("the driver is told %+v", got)
	}

	s.hangUp()
	for i := range 2 {
		// As the driver does with a socket that it gives up.
		must(t, unix.Shutdown(int(k.socket(i).Fd()), unix.SHUT_RDWR))
	}
	dead <- 2
	hear(t, said, "connection 1 of /dev/nbd2 is new")
	hear(t, said, "connection 2 of /dev/nbd2 is new")
	for i := 2; i < 4; i++ {
		reads(t, k.socket(i))
	}
	if err := end(); !errors.Is(err, context.Canceled) {
		t.Errorf("the keeper ends with %v", err)
	}
	v.Close()
}

// TestKeeperFollowsCertificates: the server's are replaced under a device. That a
// new connection would fail is said before the old one is lost, once; when it is
// lost, a new one is made with what is there by then.
func TestKeeperFollowsCertificates(t *testing.T) {
	k, s := newFakeKernel(t), newFakeServer(t)
	own, trusted := certified(t)
	s.tls.Store(own)
	var now atomic.Pointer[tls.Config]
	now.Store(trusted)
	read := make(chan struct{}, 64)
	c := k.config(s)
	c.Server.TLS = func() (*tls.Config, error) {
		select {
		case read <- struct{}{}:
		default:
		}
		if c := now.Load(); c != nil {
			return c, nil
		}
		return nil, errors.New("certificates are gone")
	}
	v, err := Attach(t.Context(), k.d, c)
	must(t, err)
	defer v.Close()
	said, end := keep(t, &Keeper{Device: v, Poll: limits.DevicePollLeast})

	replaced, renewed := certified(t)
	s.tls.Store(replaced)
	hear(t, said, "asking the server of /dev/nbd2 for the size: nbd handshake: tls handshake")
	now.Store(nil)
	hear(t, said, "certificates are gone")
	for range 8 {
		<-read
	}
	select {
	case again := <-said:
		t.Errorf("said again: %s", again)
	default:
	}
	reads(t, k.socket(0))
	must(t, unix.Shutdown(int(k.socket(0).Fd()), unix.SHUT_RDWR))
	hear(t, said, "connection 1 of /dev/nbd2: certificates are gone")
	now.Store(renewed)
	hear(t, said, "connection 1 of /dev/nbd2 is new")
	reads(t, k.socket(1))
	now.Store(trusted)
	hear(t, said, "asking the server")
	now.Store(renewed)
	s.size.Store(2 << 20)
	hear(t, said, "has 2097152 bytes")
	now.Store(trusted)
	hear(t, said, "asking the server") // again: it was right meanwhile
	if err := end(); !errors.Is(err, context.Canceled) {
		t.Errorf("the keeper ends with %v", err)
	}
}

// TestFailureIsTheSameFromAnotherPort: it is told once.
func TestFailureIsTheSameFromAnotherPort(t *testing.T) {
	var said []string
	k := &Keeper{Say: func(format string, args ...any) { said = append(said, sprintf(format, args...)) }}
	for port := range 3 {
		k.fail("connection 1: %w", &net.OpError{Op: "read", Net: "tcp", Source: &net.TCPAddr{Port: 40000 + port}, Err: unix.ECONNRESET})
	}
	if len(said) != 1 || !strings.Contains(said[0], "40000: connection reset") {
		t.Errorf("said: %q", said)
	}
}

func TestKeeperGivesNoDeviceToAnotherExport(t *testing.T) {
	for want, change := range map[string]func(*fakeServer){
		"has become read-only":    func(s *fakeServer) { s.flags.Store(s.flags.Load() | uint32(wire.ReadOnly)) },
		"has lost abilities":      func(s *fakeServer) { s.flags.Store(uint32(wire.HasFlags)) },
		"no requests below 4096":  func(s *fakeServer) { s.block.Store(4096) },
		"broke the protocol":      func(s *fakeServer) { s.early.Store(true) },
		"the device keeps its si": func(s *fakeServer) { s.size.Store(1 << 19) },
		"smaller than one block":  func(s *fakeServer) { s.size.Store(5) },
		`"other", not "disk"`:     func(s *fakeServer) { s.names.Store(&names{"disk": {"other", 1 << 20}}) },
	} {
		k, s := newFakeKernel(t), newFakeServer(t)
		v, err := Attach(t.Context(), k.d, k.config(s))
		must(t, err)
		change(s)
		must(t, unix.Shutdown(int(k.socket(0).Fd()), unix.SHUT_RDWR))
		said, end := keep(t, &Keeper{Device: v})
		hear(t, said, want)
		if err := end(); !errors.Is(err, context.Canceled) {
			t.Errorf("%s: the keeper ends with %v", want, err)
		}
		if n, got := k.last(); (s.size.Load() != 1<<20) != (n == 2) || got.numbers[attrSizeBytes] == 1<<19 {
			t.Errorf("%s: %d commands, the last %+v", want, n, got)
		}
		v.Close()
	}
}

func TestKeeperEndsWithItsDevice(t *testing.T) {
	for name, change := range map[string]func(*fakeKernel){
		"detached":        func(k *fakeKernel) { must(k.t, os.Remove(k.sysfs.path(2, "pid"))) },
		"attached anew":   func(k *fakeKernel) { k.write(2, "backend", "somebody else\n") },
		"asked to detach": nil,
	} {
		k, s := newFakeKernel(t), newFakeServer(t)
		v, err := Attach(t.Context(), k.d, k.config(s))
		must(t, err)
		leave := make(chan os.Signal, 1)
		said := make(chan string, 64)
		ended := make(chan error, 1)
		keeper := &Keeper{Device: v, Leave: leave, Say: func(format string, args ...any) { said <- sprintf(format, args...) }}
		go func() { ended <- keeper.Keep(context.Background()) }()
		if change == nil {
			// There is no node for the fake device: the flush cannot be.
			leave <- unix.SIGTERM
			hear(t, said, "/dev/nbd2 stays")
			change = func(k *fakeKernel) { must(k.t, os.RemoveAll(k.sysfs.path(2, ""))) }
		}
		change(k)
		select {
		case err := <-ended:
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
		case <-time.After(patience):
			t.Fatalf("%s: the keeper goes on", name)
		}
		v.Close()
	}
}

// TestKeeperDetachesItsOwnDeviceAlone: another one may have the number since the
// keeper looked, and since it began to leave.
func TestKeeperDetachesItsOwnDeviceAlone(t *testing.T) {
	for name, tt := range map[string]struct {
		change func(*fakeKernel)
		told   bool
	}{
		"the same":                 {func(*fakeKernel) {}, true},
		"the same, old kernel":     {func(k *fakeKernel) { must(k.t, os.Remove(k.sysfs.path(2, "backend"))) }, true},
		"detached":                 {func(k *fakeKernel) { must(k.t, os.Remove(k.sysfs.path(2, "pid"))) }, false},
		"attached anew":            {func(k *fakeKernel) { k.write(2, "backend", remembered(t, "nbd+unix:///disk", "")+"\n") }, false},
		"attached anew by another": {func(k *fakeKernel) { k.write(2, "backend", "somebody else\n") }, false},
	} {
		k, s := newFakeKernel(t), newFakeServer(t)
		must(t, os.WriteFile(filepath.Join(k.d.nodes, Name(2)), nil, 0o600))
		v, err := Attach(t.Context(), k.d, k.config(s))
		must(t, err)
		before, err := k.sysfs.Info(2)
		must(t, err)
		tt.change(k)
		keeper := &Keeper{Device: v}
		keeper.leave(t.Context())
		if err := <-keeper.leaving; err != nil {
			t.Errorf("%s: the keeper leaves with %v", name, err)
		}
		if _, got := k.last(); (got.cmd == cmdDisconnect) != tt.told {
			t.Errorf("%s: the last command is %+v", name, got)
		}
		v.Close()
		if tt.told {
			continue
		}
		if err := detachUnused(t.Context(), k.d, k.sysfs, before); !errors.Is(err, ErrNoDevice) {
			t.Errorf("%s since it was looked at: %v", name, err)
		}
		if _, got := k.last(); got.cmd == cmdDisconnect {
			t.Errorf("%s since it was looked at: the last command is %+v", name, got)
		}
	}
}

func TestKeeperTellsAFailureOnce(t *testing.T) {
	k, s := newFakeKernel(t), newFakeServer(t)
	v, err := Attach(t.Context(), k.d, k.config(s))
	must(t, err)
	k.mu.Lock()
	k.refuse = genltest.Error(int(unix.EINVAL))
	k.mu.Unlock()
	must(t, unix.Shutdown(int(k.socket(0).Fd()), unix.SHUT_RDWR))
	said, end := keep(t, &Keeper{Device: v})
	hear(t, said, "invalid argument")
	<-k.changed
	for range 3 { // the attachment was the first change
		<-k.changed
	}
	if err := end(); !errors.Is(err, context.Canceled) {
		t.Errorf("the keeper ends with %v", err)
	}
	select {
	case again := <-said:
		t.Errorf("said again: %s", again)
	default:
	}
	v.Close()
}

func TestRelayPassesBytesAndEndsWithEitherSide(t *testing.T) {
	for _, side := range []string{"driver", "server", "relay"} {
		near, far := net.Pipe()
		r, file, err := NewRelay(near)
		must(t, err)
		big := bytes.Repeat([]byte("0123456789"), 100_000)
		go func() { _, _ = file.Write(big) }()
		got := make([]byte, len(big))
		if _, err := io.ReadFull(far, got); err != nil || !bytes.Equal(got, big) {
			t.Errorf("%d bytes arrive, %v", len(got), err)
		}
		go func() { _, _ = far.Write(big) }()
		if _, err := io.ReadFull(file, got); err != nil || !bytes.Equal(got, big) {
			t.Errorf("%d bytes come back, %v", len(got), err)
		}
		l := &link{file: file, relay: r}
		if l.dead() {
			t.Error("dead while it lives")
		}
		switch side {
		case "driver":
			must(t, unix.Shutdown(int(file.Fd()), unix.SHUT_RDWR))
		case "server":
			far.Close()
		case "relay":
			r.Close()
		}
		if n, err := far.Read(got); n != 0 || err == nil {
			t.Errorf("%s ends: the server reads %d bytes, %v", side, n, err)
		}
		if n, err := file.Read(got); n != 0 || err != io.EOF {
			t.Errorf("%s ends: the driver reads %d bytes, %v", side, n, err)
		}
		r.Close()
		if !l.dead() {
			t.Errorf("%s ends, and the connection lives", side)
		}
		l.close()
		far.Close()
	}
}

// remembered is what the driver remembers of a device.
func remembered(t *testing.T, uri, alias string) string {
	t.Helper()
	text, err := backend(uri, alias)
	must(t, err)
	return text
}
