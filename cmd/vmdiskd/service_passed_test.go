package main

import (
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/internal/transport/transporttest"
)

// manager is the service manager of a test: it keeps what it is given, as
// systemd does.
type manager struct {
	*testing.T
	path string
	conn *net.UnixConn

	mu    sync.Mutex
	kept  map[string][]*os.File // guarded by mu
	slow  *slowness             // guarded by mu; nil for a manager that is quick
	ready int                   // guarded by mu; services that were ready
}

// slowness holds a manager up that is to forget something.
type slowness struct {
	asked  chan struct{} // has a value when it is to
	forget func()        // lets it; further calls do nothing
	let    chan struct{}
}

// slowDown makes the manager slow until the test calls forget or ends.
func (m *manager) slowDown() *slowness {
	s := &slowness{asked: make(chan struct{}, 1), let: make(chan struct{})}
	s.forget = sync.OnceFunc(func() { close(s.let) })
	m.Cleanup(s.forget)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.slow = s
	return s
}

// dawdle waits as long as a slow manager does.
func (m *manager) dawdle() {
	m.mu.Lock()
	s := m.slow
	m.mu.Unlock()
	if s == nil {
		return
	}
	select {
	case s.asked <- struct{}{}:
	default:
	}
	<-s.let
}

func newManager(t *testing.T) *manager {
	t.Helper()
	m := &manager{T: t, path: filepath.Join(t.TempDir(), "notify"), kept: map[string][]*os.File{}}
	var err error
	if m.conn, err = net.ListenUnixgram("unixgram", &net.UnixAddr{Name: m.path, Net: "unixgram"}); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		m.listen()
	}()
	t.Cleanup(func() {
		m.conn.Close()
		<-done
		for name := range m.kept {
			m.drop(name)
		}
	})
	return m
}

func (m *manager) listen() {
	text, rights := make([]byte, 4096), make([]byte, 512)
	for {
		n, oobn, _, _, err := m.conn.ReadMsgUnix(text, rights)
		if err != nil {
			return
		}
		said := map[string]string{}
		for line := range strings.Lines(string(text[:n])) {
			key, value, _ := strings.Cut(strings.TrimSpace(line), "=")
			said[key] = value
		}
		if said["FDSTOREREMOVE"] == "1" {
			m.dawdle()
		}
		m.mu.Lock()
		switch {
		case said["FDSTORE"] == "1":
			ms, _ := unix.ParseSocketControlMessage(rights[:oobn])
			for i := range ms {
				fds, _ := unix.ParseUnixRights(&ms[i])
				for _, fd := range fds {
					m.kept[said["FDNAME"]] = append(m.kept[said["FDNAME"]], os.NewFile(uintptr(fd), said["FDNAME"]))
				}
			}
		case said["FDSTOREREMOVE"] == "1":
			m.drop(said["FDNAME"])
		case said["READY"] == "1":
			m.ready++
		}
		m.mu.Unlock()
	}
}

// awaitReady waits until n services were ready: what they have said before is done.
func (m *manager) awaitReady(s *testService, n int) {
	m.Helper()
	s.await("the manager knows that the service is ready", func() bool {
		m.mu.Lock()
		defer m.mu.Unlock()
		return m.ready >= n
	})
}

// drop closes what is kept under a name.
func (m *manager) drop(name string) {
	for _, f := range m.kept[name] {
		f.Close()
	}
	delete(m.kept, name)
}

// names are those under which something is kept, sorted.
func (m *manager) names() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Sorted(maps.Keys(m.kept))
}

// pass makes cmd a service of the manager, with what is kept and the sockets of
// socket units.
func (m *manager) pass(cmd *exec.Cmd, units map[string]*os.File) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var names []string
	for _, name := range slices.Sorted(maps.Keys(m.kept)) {
		for _, f := range m.kept[name] {
			// A duplicate: what the manager drops it may drop at any time.
			fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
			if err != nil {
				m.Fatal(err)
			}
			again := os.NewFile(uintptr(fd), name)
			m.Cleanup(func() { again.Close() })
			names, cmd.ExtraFiles = append(names, name), append(cmd.ExtraFiles, again)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(units)) {
		names, cmd.ExtraFiles = append(names, name), append(cmd.ExtraFiles, units[name])
	}
	if cmd.Env == nil {
		cmd.Env = os.Environ()
	}
	cmd.Env = append(cmd.Env, "NOTIFY_SOCKET="+m.path, "FDSTORE=16")
	if len(names) > 0 {
		cmd.Env = append(cmd.Env, fmt.Sprint("LISTEN_FDS=", len(names)), "LISTEN_FDNAMES="+strings.Join(names, ":"))
		forItself(cmd)
	}
}

// forItself sets LISTEN_PID to the process that cmd becomes.
func forItself(cmd *exec.Cmd) {
	cmd.Args = append([]string{"sh", "-c", `LISTEN_PID=$$ exec "$0" "$@"`, cmd.Path}, cmd.Args[1:]...)
	cmd.Path = "/bin/sh"
}

// newManaged is a service of the manager; units are sockets of socket units.
func newManaged(t *testing.T, more string, units map[string]*os.File) (*testService, *manager) {
	t.Helper()
	m := newManager(t)
	s := &testService{T: t, dir: t.TempDir()}
	if err := os.WriteFile(filepath.Join(s.dir, "a.img"), make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	s.prepare = func(cmd *exec.Cmd) { m.pass(cmd, units) }
	s.configure(more)
	return s, m
}

// TestListenersSurviveARestart: a client that comes while the service is down
// is not refused, but waits and is served (LI-09).
func TestListenersSurviveARestart(t *testing.T) {
	t.Parallel()
	s, m := newManaged(t, exportA+`
[[export]]
name = "own"
format = "mem"
image = "1M"
[[export.listener]]
uri = "nbd+unix:///?socket=DIR/own"
`, nil)
	s.start()
	s.await("two listeners are kept", func() bool { return len(m.names()) == 2 })
	names := m.names()
	for range 3 {
		s.stop()
		c := s.dialNBD()
		own, err := net.Dial("unix", filepath.Join(s.dir, "own"))
		if err != nil {
			t.Fatalf("connect while the service is down: %v", err)
		}
		defer own.Close()
		s.start()
		k, _ := mustGo(t, c, "a")
		k.reads(1)
		k, _ = mustGo(t, own, "own")
		k.reads(1)
		c.Close()
		if got := m.names(); !slices.Equal(got, names) {
			t.Fatalf("kept are %q, before the restart %q", got, names)
		}
	}
}

// TestListenersThatGoAreNotKept: those that a reload removes, and those of a
// configuration that has changed while the service was down.
func TestListenersThatGoAreNotKept(t *testing.T) {
	t.Parallel()
	const more = "[[listener]]\nuri = \"nbd+unix:///?socket=DIR/more\"\n"
	s, m := newManaged(t, more, nil)
	s.start()
	s.await("two listeners are kept", func() bool { return len(m.names()) == 2 })
	s.configure("")
	if _, err := s.ctl.Reload(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	s.await("one is not kept any more", func() bool { return len(m.names()) == 1 })
	if exists(filepath.Join(s.dir, "more")) {
		t.Error("the socket is still there")
	}
	s.configure(more)
	if _, err := s.ctl.Reload(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	s.await("both are kept again", func() bool { return len(m.names()) == 2 })
	s.stop()
	s.configure("")
	s.start()
	s.await("one is not kept any more", func() bool { return len(m.names()) == 1 })
	if exists(filepath.Join(s.dir, "more")) {
		t.Error("the socket is still there after the restart")
	}
}

// TestChangedListenerIsOpenedAnew: the socket that waits is of a listener that
// there is no more, and has the address of the one that is to be made.
func TestChangedListenerIsOpenedAnew(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	unixURI, tcp := "nbd+unix:///?socket=DIR/l", "nbd://127.0.0.1:"+port
	shared := "[[export]]\nname = \"m\"\nformat = \"mem\"\nimage = \"1M\"\n[[listener]]\n"
	own := "[[export]]\nname = \"m\"\nformat = \"mem\"\nimage = \"1M\"\n[[export.listener]]\n"
	for _, tt := range []struct{ name, before, after, uri string }{
		{"mode", shared + "uri = \"" + unixURI + "\"", shared + "uri = \"" + unixURI + "\"\nmode = \"0660\"", "nbd+unix:///m?socket=DIR/l"},
		{"mode of an export's own", own + "uri = \"" + unixURI + "\"", own + "uri = \"" + unixURI + "\"\nmode = \"0660\"", "nbd+unix:///m?socket=DIR/l"},
		{"owner", shared + "uri = \"" + unixURI + "\"", shared + "uri = \"" + unixURI + "\"\nmode = \"0660\"\nowner = \"" + fmt.Sprint(os.Getuid()) + "\"", "nbd+unix:///m?socket=DIR/l"},
		{"name of the host", shared + "uri = \"" + tcp + "\"", shared + "uri = \"nbd://localhost:" + port + "\"", "nbd://127.0.0.1:" + port + "/m"},
	} {
		for _, confined := range []string{"auto", "off"} {
			t.Run(tt.name+", confine "+confined, func(t *testing.T) {
				s, m := newManaged(t, tt.before+"\n", nil)
				s.prepare = func(cmd *exec.Cmd) {
					cmd.Args = append(cmd.Args, "--confine="+confined)
					m.pass(cmd, nil)
				}
				s.start()
				s.await("two listeners are kept", func() bool { return len(m.names()) == 2 })
				before := m.names()
				s.stop()
				s.configure(tt.after + "\n")
				s.start()
				if got := s.size(strings.ReplaceAll(tt.uri, "DIR", s.dir)); got != "1048576" {
					t.Errorf("size at the changed listener is %q", got)
				}
				if fi, err := os.Stat(filepath.Join(s.dir, "l")); err == nil && fi.Mode().Perm() != 0o660 {
					t.Errorf("the socket has mode %v, want 0660", fi.Mode())
				}
				s.await("the new one is kept, the old one not", func() bool {
					now := m.names()
					same := slices.DeleteFunc(slices.Clone(now), func(name string) bool { return !slices.Contains(before, name) })
					return len(now) == 2 && len(same) == 1
				})
				s.stop()
			})
		}
	}
}

// hasVsock tells whether vsock ports can be had on this machine.
func hasVsock() bool {
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	return unix.Bind(fd, &unix.SockaddrVM{CID: unix.VMADDR_CID_ANY, Port: unix.VMADDR_PORT_ANY}) == nil
}

// TestReopenedListenerDoesNotMeetItsPredecessor: the service manager has a
// duplicate of that until it has come to forget it.
func TestReopenedListenerDoesNotMeetItsPredecessor(t *testing.T) {
	t.Parallel()
	const small = "[[export]]\nname = \"m\"\nformat = \"mem\"\nimage = \"1M\"\n"
	large := strings.Replace(small, "1M", "2M", 1)
	tcp, vsock := "uri = \"nbd://127.0.0.1:"+freePort(t)+"\"\n", "uri = \"nbd+vsock://4294967295:"+freePort(t)+"\"\n"
	type test struct {
		name, before, after string
		held                bool // the address is free only when it is forgotten
	}
	pki := t.TempDir()
	ca := transporttest.NewCA(t, "test")
	transporttest.WriteServer(t, pki, ca, ca.IssueServer("localhost"))
	certificates := "[tls]\ncertificates = \"" + pki + "\"\n"
	tests := []test{
		{"of an export", small + "[[export.listener]]\n" + tcp, large + "[[export.listener]]\n" + tcp, false},
		{"shared", certificates + small + "[[listener]]\ntls = \"on\"\n" + tcp, certificates + large + "[[listener]]\n" + tcp, false},
	}
	if hasVsock() {
		more := "readonly = true\n[[export.listener]]\n" + vsock
		tests = append(tests, test{"vsock", small + more, large + more, true})
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s, m := newManaged(t, tt.before, nil)
			slow := m.slowDown()
			s.start()
			s.await("two listeners are kept", func() bool { return len(m.names()) == 2 })
			s.configure(tt.after)
			if tt.held {
				go func() {
					<-slow.asked
					time.AfterFunc(200*time.Millisecond, slow.forget)
				}()
			}
			if _, err := s.ctl.Reload(t.Context(), false); err != nil {
				t.Fatal(err)
			}
			if x, err := s.ctl.Export(t.Context(), "m"); err != nil || x.State != "ready" || x.Size != 2<<20 || len(x.URIs) == 0 {
				t.Errorf("after the reload: %+v, %v", x, err)
			}
			slow.forget()
			s.await("the new one is kept", func() bool { return len(m.names()) == 2 })
			s.stop()
		})
	}
}

// TestKeptListenersAreTakenUpWithoutRoom: a listener that comes before them in
// the configuration does not push one out.
func TestKeptListenersAreTakenUpWithoutRoom(t *testing.T) {
	t.Parallel()
	const last = "[[listener]]\nuri = \"nbd+unix:///?socket=DIR/last\"\n"
	s, m := newManaged(t, exportA+last, nil)
	s.prepare = func(cmd *exec.Cmd) {
		m.pass(cmd, nil)
		cmd.Env = append(cmd.Env, "FDSTORE=2")
	}
	s.start()
	s.await("both listeners are kept", func() bool { return len(m.names()) == 2 })
	s.stop()
	names := m.names()
	s.configure(exportA + "[[listener]]\nuri = \"nbd+unix:///?socket=DIR/new\"\n" + last)
	s.start()
	for _, at := range []string{"nbd", "new", "last"} {
		if got := s.size("nbd+unix:///a?socket=" + filepath.Join(s.dir, at)); got != "1048576" {
			t.Errorf("size at %q is %q", at, got)
		}
	}
	s.stop()
	if got := m.names(); !slices.Equal(got, names) {
		t.Errorf("kept are %q, before %q", got, names)
	}
	if exists(filepath.Join(s.dir, "new")) {
		t.Error("the socket that nobody keeps is still there")
	}
}

// rename has what is kept under a name kept under another.
func (m *manager) rename(to func(name string) string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for name, files := range maps.Clone(m.kept) {
		delete(m.kept, name)
		m.kept[to(name)] = files
	}
}

// TestKeptListenerOfAnOlderVersionIsTakenUp: its name does not say how many sockets
// there are.
func TestKeptListenerOfAnOlderVersionIsTakenUp(t *testing.T) {
	t.Parallel()
	s, m := newManaged(t, exportA, nil)
	s.start()
	m.awaitReady(s, 1)
	s.stop()
	m.rename(func(name string) string { return strings.TrimSuffix(name, ".1") })
	names := m.names()
	if len(names) != 1 || strings.Count(names[0], ".") != 1 {
		t.Fatalf("kept are %q, want one name with the file of the socket", names)
	}
	c := s.dialNBD()
	defer c.Close()
	s.start()
	k, _ := mustGo(t, c, "a")
	k.reads(1)
	m.awaitReady(s, 2)
	if got := m.names(); !slices.Equal(got, names) {
		t.Errorf("kept are %q, before the restart %q", got, names)
	}
}

// TestListenerThatIsNotKeptWholeIsOpenedAnew: of one at several addresses the
// service manager may have dropped a socket.
func TestListenerThatIsNotKeptWholeIsOpenedAnew(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	s, m := newManaged(t, exportA+"[[listener]]\nuri = \"nbd://127.0.0.1:"+port+"\"\n", nil)
	s.start()
	m.awaitReady(s, 1)
	s.stop()
	names := m.names()
	if len(names) != 2 {
		t.Fatalf("kept are %q, want two listeners", names)
	}
	m.rename(func(name string) string { return strings.Replace(name, "..1", "..2", 1) })
	s.start()
	if got := s.size("nbd://127.0.0.1:" + port + "/a"); got != "1048576" {
		t.Errorf("size at the listener is %q", got)
	}
	s.await("it is kept anew, and what there was of it is not", func() bool { return slices.Equal(m.names(), names) })
}

// TestKeptListenerWithoutItsPathIsOpenedAnew: nobody could reach it.
func TestKeptListenerWithoutItsPathIsOpenedAnew(t *testing.T) {
	t.Parallel()
	s, m := newManaged(t, exportA, nil)
	s.start()
	s.await("the listener is kept", func() bool { return len(m.names()) == 1 })
	s.stop()
	if err := os.Remove(filepath.Join(s.dir, "nbd")); err != nil {
		t.Fatal(err)
	}
	s.start()
	s.open("a").reads(1)
	s.stop()
	s.start()
	s.open("a").reads(1)
}

// TestKeptListenerWhosePathIsAnothers: clients would reach the other server, so
// that the export fails, and the other's socket stays.
func TestKeptListenerWhosePathIsAnothers(t *testing.T) {
	t.Parallel()
	s, m := newManaged(t, exportA+"[[export.listener]]\nuri = \"nbd+unix:///?socket=DIR/own\"\n", nil)
	s.start()
	s.await("both listeners are kept", func() bool { return len(m.names()) == 2 })
	s.stop()
	own := filepath.Join(s.dir, "own")
	if err := os.Remove(own); err != nil {
		t.Fatal(err)
	}
	other, err := net.Listen("unix", own)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	s.start()
	if got := s.states(); !slices.Equal(got, []string{"a failed"}) {
		t.Errorf("states %q, want one that failed", got)
	}
	s.await("one listener is kept", func() bool { return len(m.names()) == 1 })
	s.stop()
	c, err := net.Dial("unix", own)
	if err != nil {
		t.Fatalf("the other server: %v", err)
	}
	c.Close()
}

// unixSocket is a listening socket as a socket unit makes it.
func unixSocket(t *testing.T, path string) *os.File {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	defer l.Close()
	f, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// TestSocketsOfSystemdAreNamedByTheConfiguration, also after a reload has taken
// the listener away and brought it back.
func TestSocketsOfSystemdAreNamedByTheConfiguration(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "unit")
	units := map[string]*os.File{"nbd": unixSocket(t, path)}
	const listener = "[[listener]]\nuri = \"systemd:nbd\"\n"
	s, _ := newManaged(t, exportA+listener, units)
	s.start()
	uri := "nbd+unix:///a?socket=" + path
	if got := s.size(uri); got != "1048576" {
		t.Errorf("size by the passed socket is %q", got)
	}
	second := config.Export{Name: "b", Image: filepath.Join(s.dir, "b.img"), Listeners: []config.Listener{{URI: "systemd:nbd"}}}
	if _, err := s.ctl.Add(t.Context(), api.AddExport{Export: second}); err == nil || !strings.Contains(err.Error(), "another one has its sockets") {
		t.Errorf("another listener with these sockets: %v", err)
	}
	s.configure(exportA)
	if _, err := s.ctl.Reload(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	s.configure(exportA + listener)
	if _, err := s.ctl.Reload(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	if got := s.size(uri); got != "1048576" {
		t.Errorf("after a reload the size by the passed socket is %q", got)
	}
	s.stop()
	if !exists(path) {
		t.Error("the service has removed the socket of systemd")
	}
}

// TestSocketOfNobodyWaitsForAKeptExport: the service starts with a passed socket that
// no listener names, where exports are kept: one that is added may take it, and the file
// of the one that took it may be damaged.
func TestSocketOfNobodyWaitsForAKeptExport(t *testing.T) {
	t.Parallel()
	for _, confined := range []string{"auto", "off"} {
		t.Run("confine "+confined, func(t *testing.T) {
			t.Parallel()
			path := filepath.Join(t.TempDir(), "unit")
			units := map[string]*os.File{"vmx": unixSocket(t, path)}
			s, m := newManaged(t, exportA, units)
			s.prepare = func(cmd *exec.Cmd) {
				cmd.Args = append(cmd.Args, "--confine="+confined)
				m.pass(cmd, units)
			}
			s.start()
			s.wantLogged("vmx")
			k := api.AddExport{Export: config.Export{Name: "k", Format: "mem", Image: "1M",
				Listeners: []config.Listener{{URI: "systemd:vmx"}}}, Persist: true}
			add := func() {
				if _, err := s.ctl.Add(t.Context(), k); err != nil {
					t.Fatal(err)
				}
				if got := s.size("nbd+unix:///k?socket=" + path); got != "1048576" {
					t.Errorf("size by the passed socket is %q", got)
				}
			}
			again := func(when string) {
				s.stop()
				s.start()
				s.wantExports(when, "a ready config")
			}
			add()
			if err := os.Truncate(filepath.Join(s.dir, "state", "k.json"), 20); err != nil {
				t.Fatal(err)
			}
			again("with a damaged file")
			if err := s.ctl.Remove(t.Context(), "k", true, time.Minute); err != nil {
				t.Fatal(err)
			}
			again("without the file")
			add()
			s.stop()
		})
	}
}

// TestPassedSocketsThatDoNotFit: what systemd passes and what the configuration
// or the command line says is one, or the start fails (CF-14). It leaves no socket of
// its own behind.
func TestPassedSocketsThatDoNotFit(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	s, _ := newManaged(t, "[[listener]]\nuri = \"systemd:nbd\"\n", nil)
	taken := filepath.Join(s.dir, "conf")
	plain := filepath.Join(s.dir, "plain")
	own := []string{filepath.Join(dir, "control"), filepath.Join(dir, "shared")}
	text := fmt.Sprintf("[control]\nsocket = %q\n[[listener]]\nuri = \"nbd+unix:///?socket=%s\"\n", own[0], own[1])
	if err := os.WriteFile(plain, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	disk := filepath.Join(s.dir, "a.img")
	for _, tt := range []struct {
		name, want string
		args       []string
		env        []string
		files      []*os.File
	}{
		{"none for the configuration", `no socket that is called "nbd", but []`, []string{"--config", taken}, nil, nil},
		{"another name", `no socket that is called "nbd", but ["other"]`, []string{"--config", taken},
			[]string{"LISTEN_FDS=1", "LISTEN_FDNAMES=other"}, []*os.File{unixSocket(t, filepath.Join(dir, "1"))}},
		{"nobody takes it", `no listener of the configuration has the uri "systemd:nbd"`, []string{"--config", plain},
			[]string{"LISTEN_FDS=1", "LISTEN_FDNAMES=nbd"}, []*os.File{unixSocket(t, filepath.Join(dir, "2"))}},
		{"a file", "not a socket", []string{"--config", taken}, []string{"LISTEN_FDS=1", "LISTEN_FDNAMES=nbd"}, []*os.File{null}},
		{"a file for nobody", "not a socket", []string{"--config", plain}, []string{"LISTEN_FDS=1", "LISTEN_FDNAMES=nbd"}, []*os.File{null}},
		{"a file for one disk", "not a socket", []string{disk}, []string{"LISTEN_FDS=1"}, []*os.File{null}},
		{"none for one disk", "passed no socket", []string{disk}, []string{"LISTEN_FDS=0"}, nil},
		{"of another process", "passed no socket", []string{disk}, []string{"LISTEN_FDS=1", "LISTEN_PID=1"}, []*os.File{unixSocket(t, filepath.Join(dir, "3"))}},
		{"no number", "passed no socket", []string{disk}, []string{"LISTEN_FDS=many"}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cmd := program(tt.args...)
			cmd.Env = append(append(cmd.Environ(), tt.env...), "NOTIFY_SOCKET=")
			cmd.ExtraFiles = tt.files
			if !slices.Contains(tt.env, "LISTEN_PID=1") {
				forItself(cmd)
			}
			kill := time.AfterFunc(time.Minute, func() { _ = cmd.Process.Kill() })
			defer kill.Stop()
			out, err := cmd.CombinedOutput()
			if cmd.ProcessState.ExitCode() != 1 || !strings.Contains(string(out), tt.want) {
				t.Errorf("%v, want exit status 1 and %q:\n%s", err, tt.want, out)
			}
			if slices.ContainsFunc(own, exists) {
				t.Errorf("one of %q is left", own)
			}
		})
	}
}
