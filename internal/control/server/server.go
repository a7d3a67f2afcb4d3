// Package server answers the control API: HTTP/1.1 with JSON on a Unix socket.
// Who the peer is decides before a byte of it is read; a connection carries one
// request, and the descriptors that come with its first byte.
//
// What is asked for is done by a Service. Readers see everything that the API
// shows, the paths of images included; only peers that may change things learn
// the causes of failures, since these tell what there is on the host.
package server

import (
	"context"
	"errors"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// Service does what the API asks for. All methods are safe for concurrent use.
// An error that is an *api.Error is sent as it is and must not tell readers
// what they may not know; a context's end is api.CodeTimeout, and everything
// else api.CodeFailed. Maps and lists that are returned become the server's.
//
// Files are open for reading, regular files or block devices, and open for
// writing where the request needs that. If the method succeeds they are the
// service's; if it fails the server closes them, those that are closed
// already included.
type Service interface {
	Status() api.Status
	Exports() []api.Export
	Export(name string) (api.Export, error)
	Add(ctx context.Context, a api.AddExport, files []*os.File) (api.Export, error)
	Patch(ctx context.Context, name string, p api.Patch) (api.Export, error)
	Remove(ctx context.Context, name string, force bool) error
	// Pause with a limit of 0 pauses for the longest time that is allowed.
	Pause(ctx context.Context, name string, limit time.Duration) error
	Resume(name string) error
	Resize(ctx context.Context, name string, r api.Resize) (api.Export, error)
	Snapshot(ctx context.Context, name string, s api.Snapshot, files []*os.File) (api.Export, error)
	// Forget forgets the overlay of a snapshot; with force whatever it has.
	Forget(ctx context.Context, name string, force, dryRun bool) (api.Forgotten, error)
	// Clients of one export, or of all if it is nil.
	Clients(export *string) []api.Client
	Disconnect(id uint64) error
	Leases() []api.Lease
	OpenLease(l api.OpenLease) (api.Lease, error)
	// CloseLease for one holder, or for all if holder is "".
	CloseLease(cid uint32, start, holder string) error
	Stats() []api.Stats
	// Subscribe gives the events from now on. At most n of them wait; of later
	// ones an event of kind "lost" tells the number. The channel is closed
	// after cancel, which must be called once, or when the service ends. With
	// an error there is neither.
	Subscribe(n int) (events <-chan api.Event, cancel func(), err error)
	Reload(ctx context.Context, dryRun bool) (api.Reload, error)
	MetricsSource
}

// MetricsSource writes its counters in Prometheus' text format. It holds no
// lock while it writes.
type MetricsSource interface {
	Metrics(w io.Writer) error
}

// Config is what a Server needs.
type Config struct {
	Service Service

	// Authorize says what a peer may do. It is asked for each connection before
	// anything is read, and again before an event is sent on it.
	Authorize Authorizer

	// Log gets a line for each change, and for each that was refused.
	Log *slog.Logger
}

// Server answers on one listener.
type Server struct {
	service   Service
	metrics   MetricsSource
	authorize Authorizer // nil: no peer is asked for, everybody may read
	log       *slog.Logger
	routes    []route
	http      http.Server
	conns     connTable
	readers   connTable // streams of events of those who may only read
	changers  connTable // the same of those who may change things

	ending sync.Once
	ended  chan struct{}      // closed by Close: streams of events end
	cancel context.CancelFunc // ends the contexts of all requests
}

// New makes a server of the whole API.
func New(c Config) *Server {
	s := &Server{service: c.Service, metrics: c.Service, authorize: c.Authorize, log: c.Log, routes: routes}
	s.init()
	return s
}

// NewMetrics makes a server for a listener of any kind that has nothing but
// "/metrics": it knows no peers and cannot change anything.
func NewMetrics(m MetricsSource, log *slog.Logger) *Server {
	s := &Server{metrics: m, log: log, routes: metricsRoutes}
	s.init()
	return s
}

func (s *Server) init() {
	ctx, cancel := context.WithCancel(context.Background())
	s.cancel = cancel
	s.ended = make(chan struct{})
	s.http = http.Server{
		Handler:           http.HandlerFunc(s.serve),
		ReadHeaderTimeout: limits.ControlHeaderTime,
		// net/http grants 4096 bytes more than it is told.
		MaxHeaderBytes:               limits.ControlHeader - 4096,
		DisableGeneralOptionsHandler: true,
		ErrorLog:                     log.New(httpLog{s.log}, "", 0),
		BaseContext:                  func(net.Listener) context.Context { return ctx },
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, connKey{}, c)
		},
	}
	s.http.SetKeepAlivesEnabled(false)
}

// Serve answers on l until Close, and then returns nil. The connections of a
// server with an Authorizer are *net.UnixConn. It is called once.
func (s *Server) Serve(l net.Listener) error {
	err := s.http.Serve(&listener{Listener: l, s: s})
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

// Close ends the streams of events, waits for the requests in progress until
// ctx ends, and then cuts the connections. The listener is closed.
func (s *Server) Close(ctx context.Context) error {
	s.ending.Do(func() { close(s.ended) })
	defer s.cancel()
	err := s.http.Shutdown(ctx)
	if err != nil {
		err = errors.Join(err, s.http.Close())
	}
	return err
}

// httpLog takes the lines of net/http, which are about what peers do wrong but
// for panics.
type httpLog struct{ log *slog.Logger }

func (h httpLog) Write(p []byte) (int, error) {
	level := slog.LevelDebug
	if strings.HasPrefix(string(p), "http: panic serving") {
		level = slog.LevelError
	}
	h.log.Log(context.Background(), level, strings.TrimSpace(string(p)))
	return len(p), nil
}
