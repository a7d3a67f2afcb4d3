package server_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/internal/control/client"
	"github.com/vmdiskd/vmdiskd/internal/control/controltest"
	"github.com/vmdiskd/vmdiskd/internal/control/server"
	"github.com/vmdiskd/vmdiskd/internal/limits"
	"golang.org/x/sys/unix"
)

// TestPeerWithoutRightIsClosedUnread is CT-01: nothing of the request is read,
// not even by the kernel's account.
func TestPeerWithoutRightIsClosedUnread(t *testing.T) {
	s := &controltest.Service{}
	w := start(t, s, server.NoAccess)
	got := w.raw(t, post("/v1/reload", ""))
	if strings.Contains(got, "HTTP") {
		t.Errorf("a peer without access got %q", got)
	}
	if calls := s.Calls(); len(calls) != 0 {
		t.Errorf("the service was asked for %q", calls)
	}
}

// TestOtherUserIsRefused is CT-01 with a process of another user.
func TestOtherUserIsRefused(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs to be root, to become somebody else")
	}
	const uid, gid, extra = 61001, 61002, 61003
	seen := make(chan server.Peer, 1)
	rules := server.Rules{ReadGroups: []uint32{extra}, ChangeUsers: []uint32{0}}
	w := startWith(t, &controltest.Service{}, func(p server.Peer) server.Access {
		select {
		case seen <- p:
		default:
		}
		return rules.Access(p)
	})
	// The temporary folder is root's own: let the others through to the socket.
	for dir := filepath.Dir(w.path); dir != os.TempDir() && dir != "/"; dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(w.path, 0o777); err != nil {
		t.Fatal(err)
	}
	curl := func(groups string, more ...string) string {
		args := append([]string{fmt.Sprint("--reuid=", uid), fmt.Sprint("--regid=", gid), groups, "curl", "-sS", "-m30", "--unix-socket", w.path}, more...)
		out, _ := exec.CommandContext(testContext(t), "setpriv", args...).CombinedOutput()
		return string(out)
	}
	if got := curl("--clear-groups", "http://x/v1/status"); strings.Contains(got, "version") || !strings.Contains(got, "curl: (") {
		t.Errorf("another user: got %q", got)
	}
	p := <-seen
	if p.UID != uid || p.GID != gid || len(p.Groups) != 0 || p.PID == 0 {
		t.Errorf("the peer is %+v", p)
	}
	if got := curl(fmt.Sprint("--groups=", extra), "http://x/v1/status"); !strings.Contains(got, `"version":"test"`) {
		t.Errorf("a member of a group that may read: got %q", got)
	}
	if got := curl(fmt.Sprint("--groups=", extra), "-XPOST", "http://x/v1/reload"); !strings.Contains(got, "forbidden") {
		t.Errorf("a reader that reloads: got %q", got)
	}
}

// TestOverflowUserIsNobody holds that even an Authorizer without sense does not
// let in the id that stands for all unknown users.
func TestOverflowUserIsNobody(t *testing.T) {
	r := server.Rules{ReadGroups: []uint32{65534}, ReadUsers: []uint32{5}, ChangeGroups: []uint32{7}}
	for _, tt := range []struct {
		p    server.Peer
		want server.Access
	}{
		{server.Peer{UID: 1, GID: 65534}, server.NoAccess},
		{server.Peer{UID: 1, GID: 1, Groups: []uint32{65534}}, server.NoAccess},
		{server.Peer{UID: 5, GID: 1}, server.Read},
		{server.Peer{UID: 5, GID: 1, Groups: []uint32{7}}, server.Change},
		{server.Peer{UID: 1, GID: 7}, server.Change},
		{server.Peer{UID: 0, GID: 0}, server.NoAccess},
	} {
		if got := r.Access(tt.p); got != tt.want {
			t.Errorf("%+v: got %d, want %d", tt.p, got, tt.want)
		}
	}
}

func TestRequestsThatMakeNoSense(t *testing.T) {
	s := &controltest.Service{}
	s.Put(export("a"))
	w := start(t, s, server.Change)
	big := `{"name":"` + strings.Repeat("x", limits.ControlBody) + `"}`
	for _, tt := range []struct{ name, send, want string }{
		{"no such path", request("GET", "/v2/status", ""), "404"},
		{"root", request("GET", "/", ""), "404"},
		{"star", request("OPTIONS", "*", ""), "404"},
		{"double slash", request("GET", "//v1/status", ""), "404"},
		{"dots are no way up", request("GET", "/v1/exports/../status", ""), "404"},
		{"slash in a word of the path", request("GET", "/v1%2Fstatus", ""), "404"},
		{"wrong method", request("PUT", "/v1/exports", ""), "405"},
		{"unknown parameter", request("GET", "/v1/status?x=1", ""), "400"},
		{"parameter twice", request("DELETE", "/v1/exports/a?force=1&force=0", ""), "400"},
		{"half a percent", request("GET", "/v1/clients?export=%", ""), "400"},
		{"semicolon", request("DELETE", "/v1/exports/a?force=1;x", ""), "400"},
		{"force is not a bool", request("DELETE", "/v1/exports/a?force=maybe", ""), "400"},
		{"time-out is not a duration", request("DELETE", "/v1/exports/a?timeout=5", ""), "400"},
		{"time-out for ever", request("DELETE", "/v1/exports/a?timeout=1000h", ""), "400"},
		{"time-out below zero", request("DELETE", "/v1/exports/a?timeout=-1s", ""), "400"},
		{"name is not UTF-8", request("DELETE", "/v1/exports/%ff", ""), "400"},
		{"name has a zero", request("DELETE", "/v1/exports/a%00", ""), "400"},
		{"name is long", request("DELETE", "/v1/exports/"+strings.Repeat("x", limits.ControlName+1), ""), "400"},
		{"header is long", request("DELETE", "/v1/exports/"+strings.Repeat("x", limits.ControlHeader), ""), "431"},
		{"client is a word", request("DELETE", "/v1/clients/me", ""), "404"},
		{"client is beyond", request("DELETE", "/v1/clients/18446744073709551616", ""), "404"},
		{"body where none is", request("DELETE", "/v1/exports/a", "{}"), "400"},
		{"chunked body where none is", "DELETE /v1/exports/a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "400"},
		{"no body", post("/v1/exports/a/resize", ""), "400"},
		{"body is long", post("/v1/exports", big), "413"},
		{"1 GiB", "POST /v1/exports HTTP/1.1\r\nHost: x\r\nContent-Length: 1073741824\r\n\r\n{", "413"},
		{"body is long, in chunks", "POST /v1/exports HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" +
			fmt.Sprintf("%x\r\n%s\r\n0\r\n\r\n", len(big), big), "413"},
		{"deep", post("/v1/exports", `{"x":`+strings.Repeat("[", 10000)), "400"},
		{"name twice", post("/v1/exports", `{"name":"a","name":"b"}`), "400"},
		{"trailing", post("/v1/exports/a/resize", `{"size":1}{}`), "400"},
		{"not UTF-8", post("/v1/exports", "{\"name\":\"\xff\"}"), "400"},
		{"smuggled", "POST /v1/exports HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}", "400"},
		{"size zero", post("/v1/exports/a/resize", `{"size":0}`), "400"},
		{"size below", post("/v1/exports/a/resize", `{"size":-1}`), "400"},
		{"size beyond", post("/v1/exports/a/resize", `{"size":9223372036854775808}`), "400"},
		{"size is a fraction", post("/v1/exports/a/resize", `{"size":1.5}`), "400"},
		{"pause is long", post("/v1/exports/a/pause", `{"limit":"24h"}`), "400"},
		{"pause below zero", post("/v1/exports/a/pause", `{"limit":"-1s"}`), "400"},
		{"no overlay", post("/v1/exports/a/snapshot", `{}`), "400"},
		{"descriptor that did not come", post("/v1/exports", `{"name":"b","image":"fd:0"}`), "400"},
		{"no HTTP", "hello\r\n\r\n", "400"},
		{"HTTP/2", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "404"},
	} {
		if got := status(w.raw(t, tt.send)); got != tt.want {
			t.Errorf("%s: got %.200q, want %s", tt.name, got, tt.want)
		}
	}
	if got := s.Calls(); len(got) != 0 {
		t.Errorf("the service was asked for %q", got)
	}
}

// TestOneRequestEndsAConnection holds that bytes behind a request are never
// taken for another one.
func TestOneRequestEndsAConnection(t *testing.T) {
	s := &controltest.Service{}
	w := start(t, s, server.Change)
	got := w.raw(t, request("GET", "/v1/status", "")+post("/v1/reload", ""))
	if strings.Count(got, "HTTP/1.1") != 1 || len(s.Calls()) != 0 {
		t.Errorf("got %q, calls %q", got, s.Calls())
	}
}

// TestSlowPeersAreGivenUp is CT-02 at one byte per second, where the whole body
// never comes.
func TestSlowPeersAreGivenUp(t *testing.T) {
	w := start(t, &controltest.Service{}, server.Change)
	header, body := w.dial(t), w.dial(t)
	for c, text := range map[net.Conn]string{header: "GET /v1/st", body: "POST /v1/exports HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{"} {
		if _, err := io.WriteString(c, text); err != nil {
			t.Fatal(err)
		}
	}
	b, err := io.ReadAll(body)
	if status(string(b)) != "408" {
		t.Errorf("slow body: got %q, %v", b, err)
	}
	b, err = io.ReadAll(header)
	if status(string(b)) != "400" || err != nil {
		t.Errorf("slow header: got %q, %v", b, err)
	}
}

// TestNoUserTakesAllConnections holds the bound of one user, that who is beyond it
// is told so, and that what was closed makes room again.
func TestNoUserTakesAllConnections(t *testing.T) {
	s := &controltest.Service{Started: make(chan string, 1)}
	s.Put(export("a"))
	w := start(t, s, server.Change)
	ctx, cancel := context.WithCancel(testContext(t))
	defer cancel()
	var left sync.WaitGroup
	defer left.Wait()
	for range limits.ControlConnsPerUID {
		left.Go(func() { _ = w.client.Remove(ctx, "a", false, limits.ControlRemoveMost) })
		<-s.Started
	}
	got, err := io.ReadAll(w.dial(t))
	for _, want := range []string{"Retry-After: 1\r\n", `"code":"` + api.CodeInUse, "too many connections"} {
		if status(string(got)) != "503" || !strings.Contains(string(got), want) {
			t.Errorf("one connection more than the bound: got %q, %v, want status 503 with %q", got, err, want)
		}
	}
	done := make(chan error, 1)
	go func() {
		_, err := w.client.Status(testContext(t))
		done <- err
	}()
	cancel()
	if err := <-done; err != nil {
		t.Errorf("no room after the others have left: %v", err)
	}
}

// TestMoreCommandsThanConnectionsAreAllDone: who is beyond the bound of a user waits
// for those before, with the descriptors that it sends.
func TestMoreCommandsThanConnectionsAreAllDone(t *testing.T) {
	s := &controltest.Service{}
	w := start(t, s, server.Change)
	disk := tempFile(t, unix.O_RDWR)
	var all sync.WaitGroup
	for i := range 4 * limits.ControlConnsPerUID {
		all.Go(func() {
			a := api.AddExport{Export: export(fmt.Sprintf("e%d", i)).Export}
			a.Image = "fd:0"
			if _, err := w.client.Add(testContext(t), a, disk); err != nil {
				t.Errorf("export %d: %v", i, err)
			}
		})
	}
	all.Wait()
	files := s.Files()
	for _, f := range files {
		_ = f.Close()
	}
	if got := len(s.Exports()); got != 4*limits.ControlConnsPerUID || len(files) != got {
		t.Errorf("got %d exports and %d files", got, len(files))
	}
}

// sendFiles sends text, n bytes of it first and alone, and descriptors with
// the first byte behind these.
func (w *world) sendFiles(t *testing.T, text string, n int, fds ...int) string {
	t.Helper()
	c := w.dial(t)
	defer c.Close()
	if n > 0 {
		if _, err := io.WriteString(c, text[:n]); err != nil {
			t.Fatal(err)
		}
	}
	if _, _, err := c.WriteMsgUnix([]byte(text[n:]), unix.UnixRights(fds...), nil); err != nil {
		return err.Error()
	}
	b, err := io.ReadAll(c)
	if err != nil {
		return string(b) + err.Error()
	}
	return string(b)
}

func tempFile(t *testing.T, flag int) *os.File {
	t.Helper()
	name := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(name, make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	return openFile(t, name, flag)
}

func openFile(t *testing.T, name string, flag int) *os.File {
	t.Helper()
	fd, err := unix.Open(name, flag|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), name)
	t.Cleanup(func() { _ = f.Close() })
	return f
}

func TestDescriptorsReachTheService(t *testing.T) {
	s := &controltest.Service{}
	w := start(t, s, server.Change)
	ctx := testContext(t)
	rw, ro := tempFile(t, unix.O_RDWR), tempFile(t, unix.O_RDONLY)
	a := api.AddExport{Export: config.Export{Name: "a", Image: "fd:0", BackingFiles: []string{"fd:1", "/b"}}}
	if _, err := w.client.Add(ctx, a, rw, ro); err != nil {
		t.Fatal(err)
	}
	got := s.Files()
	if len(got) != 2 || !same(t, got[0], rw) || !same(t, got[1], ro) {
		t.Fatalf("the service got %d files, or in another order", len(got))
	}
	for _, f := range got {
		flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFD, 0)
		if err != nil || flags&unix.FD_CLOEXEC == 0 {
			t.Errorf("%s survives exec: %d, %v", f.Name(), flags, err)
		}
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	}
	if _, err := w.client.Snapshot(ctx, "a", api.Snapshot{Overlay: "fd:0"}, rw); err != nil {
		t.Error(err)
	}
}

func same(t *testing.T, a, b *os.File) bool {
	t.Helper()
	x, err := a.Stat()
	if err != nil {
		t.Fatal(err)
	}
	y, err := b.Stat()
	if err != nil {
		t.Fatal(err)
	}
	return os.SameFile(x, y)
}

// TestBadDescriptorsAreRefusedAndClosed is CT-04.
func TestBadDescriptorsAreRefusedAndClosed(t *testing.T) {
	s := &controltest.Service{}
	s.Put(export("a"))
	w := start(t, s, server.Change)
	rw, ro, wo := tempFile(t, unix.O_RDWR), tempFile(t, unix.O_RDONLY), tempFile(t, unix.O_WRONLY)
	path := openFile(t, rw.Name(), unix.O_PATH)
	dir := openFile(t, t.TempDir(), unix.O_RDONLY)
	null := openFile(t, "/dev/null", unix.O_RDWR)
	pr, pw, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer pr.Close()
	defer pw.Close()
	fd := func(files ...*os.File) (out []int) {
		for _, f := range files {
			out = append(out, int(f.Fd()))
		}
		return out
	}
	many := func(n int) (out []int) {
		for range n {
			out = append(out, int(rw.Fd()))
		}
		return out
	}
	add := post("/v1/exports", `{"name":"b","image":"fd:0"}`)
	head := strings.Index(add, "{")
	before := openFDs(t)
	for _, tt := range []struct {
		name  string
		send  string
		first int
		fds   []int
		want  string
	}{
		{"O_PATH", add, 0, fd(path), "O_PATH"},
		{"folder", add, 0, fd(dir), "regular file"},
		{"character device", add, 0, fd(null), "regular file"},
		{"pipe", add, 0, fd(pr), "regular file"},
		{"read-only for a writable export", add, 0, fd(ro), "writing"},
		{"write-only", add, 0, fd(wo), "reading"},
		{"write-only for reading", post("/v1/exports", `{"name":"b","image":"fd:0","readonly":true}`), 0, fd(wo), "reading"},
		{"read-only data file", post("/v1/exports", `{"name":"b","image":"fd:0","data-files":["fd:1"]}`), 0, fd(rw, ro), "writing"},
		{"one that is not named", add, 0, fd(rw, rw), "not named"},
		{"one in two places", post("/v1/exports", `{"name":"b","image":"fd:0","backing-files":["fd:0"]}`), 0, fd(rw), "in use"},
		{"number with a zero in front", post("/v1/exports", `{"name":"b","image":"fd:00"}`), 0, fd(rw), "not the number"},
		{"number with a sign", post("/v1/exports", `{"name":"b","image":"fd:+0"}`), 0, fd(rw), "not the number"},
		{"large number", post("/v1/exports", `{"name":"b","image":"fd:65535"}`), 0, fd(rw), "did not come"},
		{"too many", add, 0, many(limits.ControlFiles + 1), "more than"},
		{"253", add, 0, many(253), "more than"},
		{"with a request that takes none", request("GET", "/v1/status", ""), 0, fd(rw), "takes no descriptors"},
		{"with another one", post("/v1/exports/a/resume", ""), 0, fd(rw), "takes no descriptors"},
		{"with no such path", request("GET", "/", ""), 0, fd(rw), "404 Not Found"},
		{"with bad JSON", post("/v1/exports", `{"name":`), 0, fd(rw), "400"},
		{"in the header", add, 5, fd(rw), "400 Bad Request"},
		{"in the body", add, head, fd(rw), "400 Bad Request"},
		{"read-only overlay", post("/v1/exports/a/snapshot", `{"overlay":"fd:0"}`), 0, fd(ro), "writing"},
	} {
		got := w.sendFiles(t, tt.send, tt.first, tt.fds...)
		if !strings.Contains(got, tt.want) || strings.HasPrefix(status(got), "2") {
			t.Errorf("%s: got %q, want %q", tt.name, got, tt.want)
		}
	}
	if got := s.Calls(); len(got) != 0 {
		t.Errorf("the service was asked for %q", got)
	}
	eventually(t, "descriptors are closed", func() bool { return openFDs(t) <= before })
}

// TestDescriptorsOfFailedCallsAreClosed holds the end of Service's promise
// that is the server's, and that what a peer leaves behind goes with it.
func TestDescriptorsOfFailedCallsAreClosed(t *testing.T) {
	s := &controltest.Service{Fail: errors.New("no")}
	w := start(t, s, server.Change)
	rw := tempFile(t, unix.O_RDWR)
	before := openFDs(t)
	for range 20 {
		_, err := w.client.Add(testContext(t), api.AddExport{Export: config.Export{Name: "a", Image: "fd:0"}}, rw)
		if err == nil {
			t.Fatal("it worked")
		}
		c := w.dial(t)
		if _, _, err := c.WriteMsgUnix([]byte("P"), unix.UnixRights(int(rw.Fd())), nil); err != nil {
			t.Fatal(err)
		}
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "descriptors are closed", func() bool { return openFDs(t) <= before })
}

func TestReadersDescriptorsNeverArrive(t *testing.T) {
	w := start(t, &controltest.Service{}, server.Read)
	rw := tempFile(t, unix.O_RDWR)
	got := w.sendFiles(t, request("GET", "/v1/status", ""), 0, int(rw.Fd()))
	if status(got) != "400" || !strings.Contains(got, "may change") {
		t.Errorf("got %q", got)
	}
}

// TestInheritedListenerPassesNoCredentials holds that a socket on which
// systemd has set PassCredentials works as any other.
func TestInheritedListenerPassesNoCredentials(t *testing.T) {
	s := &controltest.Service{}
	path := filepath.Join(t.TempDir(), "control")
	lc := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) (err error) {
		ctlErr := raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PASSCRED, 1) })
		return errors.Join(err, ctlErr)
	}}
	l, err := lc.Listen(testContext(t), "unix", path)
	if err != nil {
		t.Fatal(err)
	}
	w := serveOn(t, s, l, path)
	if _, err := w.client.Status(testContext(t)); err != nil {
		t.Error(err)
	}
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	ctx := testContext(t)
	for !ok() {
		if ctx.Err() != nil {
			t.Fatalf("not in time: %s", what)
		}
		select {
		case <-time.After(time.Millisecond):
		case <-ctx.Done():
		}
	}
}

func TestAuditSaysWhoDidWhat(t *testing.T) {
	w := start(t, &controltest.Service{}, server.Change)
	_ = w.client.Remove(testContext(t), "a\nlevel=ERROR \"x\"", true, 0)
	want := []string{
		`msg="DELETE /v1/exports/a%0Alevel=ERROR%20%22x%22"`, fmt.Sprintf("peer.uid=%d", os.Getuid()),
		fmt.Sprintf("peer.pid=%d", os.Getpid()), `query="force=true"`, "status=404", "error=",
	}
	eventually(t, "a line in the log", func() bool { return strings.Contains(w.log.String(), "error=") })
	for _, x := range want {
		if !strings.Contains(w.log.String(), x) {
			t.Errorf("no %s in %q", x, w.log)
		}
	}
	if n := strings.Count(w.log.String(), "\n"); n != 1 {
		t.Errorf("%d lines: %q", n, w.log)
	}
}

func TestRemovalEndsWithItsTimeAndWithItsPeer(t *testing.T) {
	s := &controltest.Service{Started: make(chan string, 1)}
	s.Put(export("a"))
	w := start(t, s, server.Change)
	err := w.client.Remove(testContext(t), "a", false, time.Millisecond)
	var e *api.Error
	if !errors.As(err, &e) || e.Code != api.CodeTimeout {
		t.Errorf("time-out: got %v", err)
	}
	<-s.Started
	ctx, cancel := context.WithCancel(testContext(t))
	done := make(chan error, 1)
	go func() { done <- w.client.Remove(ctx, "a", false, time.Hour/10) }()
	<-s.Started
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("the peer leaves: got %v", err)
	}
}

// TestCloseWaitsForRequestsInProgress holds that what was begun has the time
// that it was given.
func TestCloseWaitsForRequestsInProgress(t *testing.T) {
	s := &controltest.Service{Started: make(chan string, 1)}
	s.Put(export("a"))
	w := start(t, s, server.Change)
	removed := make(chan error, 1)
	go func() { removed <- w.client.Remove(testContext(t), "a", false, 300*time.Millisecond) }()
	<-s.Started
	if err := w.server.Close(testContext(t)); err != nil {
		t.Error(err)
	}
	if err := <-removed; err == nil || err.Error() != "it was not done in time" {
		t.Errorf("a removal while the server ends: got %v", err)
	}
	if _, err := w.client.Status(testContext(t)); err == nil {
		t.Error("a request after the end was served")
	}
}

// TestCloseCutsWhatTakesTooLong ends with a request that would go on.
func TestCloseCutsWhatTakesTooLong(t *testing.T) {
	s := &controltest.Service{Started: make(chan string, 1)}
	s.Put(export("a"))
	w := start(t, s, server.Change)
	removed := make(chan error, 1)
	go func() { removed <- w.client.Remove(testContext(t), "a", false, limits.ControlRemoveMost) }()
	<-s.Started
	ctx, cancel := context.WithTimeout(context.Background(), time.Millisecond)
	defer cancel()
	if err := w.server.Close(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("close: got %v", err)
	}
	if err := <-removed; err == nil {
		t.Error("the removal was a success")
	}
}

func TestMetricsServerHasNothingElse(t *testing.T) {
	s := &controltest.Service{}
	m := server.NewMetrics(s, discard())
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- m.Serve(l) }()
	defer func() {
		if err := errors.Join(m.Close(testContext(t)), <-done); err != nil {
			t.Error(err)
		}
	}()
	defer http.DefaultClient.CloseIdleConnections()
	for path, want := range map[string]int{
		"/metrics": 200, "/v1/status": 404, "/v1/exports": 404, "/v1/reload": 404, "/debug/pprof/": 404, "/metrics?x=1": 400,
	} {
		for _, method := range []string{"GET", "POST"} {
			req, err := http.NewRequestWithContext(testContext(t), method, "http://"+l.Addr().String()+path, nil)
			if err != nil {
				t.Fatal(err)
			}
			r, err := http.DefaultClient.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			b, _ := io.ReadAll(r.Body)
			_ = r.Body.Close()
			if method == "POST" && strings.HasPrefix(path, "/metrics") {
				want = 405
			}
			if r.StatusCode != want || want == 200 && string(b) != "vmdiskd_exports 0\n" {
				t.Errorf("%s %s: got %d %q, want %d", method, path, r.StatusCode, b, want)
			}
		}
	}
}

// brokenMetrics fails behind n bytes.
type brokenMetrics struct{ n int }

func (b brokenMetrics) Metrics(w io.Writer) error {
	_, err := w.Write(make([]byte, b.n))
	return errors.Join(err, errors.New("broken"))
}

// TestMetricsAreNeverTakenForWhole holds that a failure in the middle is seen.
func TestMetricsAreNeverTakenForWhole(t *testing.T) {
	for _, n := range []int{0, 1, 1 << 20} {
		path := filepath.Join(t.TempDir(), "metrics")
		l, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		m := server.NewMetrics(brokenMetrics{n}, discard())
		done := make(chan error, 1)
		go func() { done <- m.Serve(l) }()
		var got strings.Builder
		if err := client.Dial(path).Metrics(testContext(t), &got); err == nil || n < 64<<10 && got.Len() != 0 {
			t.Errorf("%d bytes: got %d and %v", n, got.Len(), err)
		}
		if err := errors.Join(m.Close(testContext(t)), <-done); err != nil {
			t.Error(err)
		}
	}
}
