package server_test

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/internal/control/client"
	"github.com/vmdiskd/vmdiskd/internal/control/controltest"
	"github.com/vmdiskd/vmdiskd/internal/control/server"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// hang is how long a test waits for what must come.
const hang = 30 * time.Second

// logged collects a log.
type logged struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// world is a server on a socket with a service that has no disks.
type world struct {
	path    string
	service *controltest.Service
	server  *server.Server
	client  *client.Client
	log     *logged
}

// start runs a server; access is what every peer may do.
func start(t *testing.T, service *controltest.Service, access server.Access) *world {
	t.Helper()
	return startWith(t, service, func(server.Peer) server.Access { return access })
}

func startWith(t *testing.T, service *controltest.Service, authorize server.Authorizer) *world {
	t.Helper()
	path := filepath.Join(t.TempDir(), "control")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	return serve(t, service, authorize, l, path)
}

// serveOn lets everybody do everything.
func serveOn(t *testing.T, service *controltest.Service, l net.Listener, path string) *world {
	t.Helper()
	return serve(t, service, func(server.Peer) server.Access { return server.Change }, l, path)
}

func serve(t *testing.T, service *controltest.Service, authorize server.Authorizer, l net.Listener, path string) *world {
	t.Helper()
	w := &world{path: path, service: service, log: &logged{}, client: client.Dial(path)}
	w.server = server.New(server.Config{
		Service: service, Authorize: authorize,
		Log: slog.New(slog.NewTextHandler(w.log, nil)),
	})
	done := make(chan error, 1)
	go func() { done <- w.server.Serve(l) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), hang)
		defer cancel()
		if err := w.server.Close(ctx); err != nil {
			t.Errorf("close: %v", err)
		}
		if err := <-done; err != nil {
			t.Errorf("serve: %v", err)
		}
		if strings.Contains(w.log.String(), "panic") {
			t.Errorf("the server's log has a panic: %s", w.log)
		}
		service.Close()
		for _, f := range service.Files() {
			_ = f.Close()
		}
	})
	return w
}

func discard() *slog.Logger { return slog.New(slog.DiscardHandler) }

// dial opens a connection that does not hang for ever.
func (w *world) dial(t *testing.T) *net.UnixConn {
	t.Helper()
	c, err := net.Dial("unix", w.path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	if err := c.SetDeadline(time.Now().Add(hang)); err != nil {
		t.Fatal(err)
	}
	return c.(*net.UnixConn)
}

// raw sends text and returns what comes back until the end, an error of the
// connection included.
func (w *world) raw(t *testing.T, text string) string {
	t.Helper()
	c := w.dial(t)
	defer c.Close()
	if _, err := io.WriteString(c, text); err != nil {
		return err.Error()
	}
	b, err := io.ReadAll(c)
	if err != nil {
		return string(b) + err.Error()
	}
	return string(b)
}

// status is the first line's number of a raw reply.
func status(reply string) string {
	f := strings.Fields(reply)
	if len(f) < 2 || f[0] != "HTTP/1.1" {
		return reply
	}
	return f[1]
}

// post is a raw request with a body.
func post(path, body string) string {
	return request("POST", path, body)
}

func request(method, path, body string) string {
	var b strings.Builder
	b.WriteString(method + " " + path + " HTTP/1.1\r\nHost: x\r\n")
	if body != "" {
		b.WriteString("Content-Length: " + itoa(len(body)) + "\r\n")
	}
	b.WriteString("\r\n" + body)
	return b.String()
}

func itoa(n int) string { return config.Size(n).String() }

func export(name string) api.Export {
	return api.Export{Export: config.Export{Name: name, Image: "/images/a.raw"}, State: "ready", Size: 1 << 20, Origin: "config"}
}

// openFDs counts the descriptors of the process.
func openFDs(t *testing.T) int {
	t.Helper()
	all, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(all)
}

func testContext(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), hang)
	t.Cleanup(cancel)
	return ctx
}
