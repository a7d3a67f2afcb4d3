package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// route is a row of the API: what a request must look like, and who does it.
type route struct {
	method string
	path   string // "{name}" and "{id}" stand for one segment
	access Access
	query  []string // the parameters it takes
	body   body
	files  bool // descriptors may come with it
	do     func(*call) (any, error)
}

// body says whether a request has one.
type body uint8

const (
	noBody body = iota
	mayHaveBody
	mustHaveBody
)

var routes = []route{
	{method: "GET", path: api.PathStatus, access: Read, do: (*call).status},
	{method: "GET", path: api.PathExports, access: Read, do: (*call).exports},
	{method: "POST", path: api.PathExports, access: Change, body: mustHaveBody, files: true, do: (*call).add},
	{method: "GET", path: api.PathExports + "/{name}", access: Read, do: (*call).export},
	{method: "PATCH", path: api.PathExports + "/{name}", access: Change, body: mustHaveBody, do: (*call).patch},
	{method: "DELETE", path: api.PathExports + "/{name}", access: Change, query: []string{"force", "timeout"}, do: (*call).remove},
	{method: "POST", path: api.PathExports + "/{name}/pause", access: Change, body: mayHaveBody, do: (*call).pause},
	{method: "POST", path: api.PathExports + "/{name}/resume", access: Change, do: (*call).resume},
	{method: "POST", path: api.PathExports + "/{name}/resize", access: Change, body: mustHaveBody, do: (*call).resize},
	{method: "POST", path: api.PathExports + "/{name}/snapshot", access: Change, body: mustHaveBody, files: true, do: (*call).snapshot},
	{method: "DELETE", path: api.PathExports + "/{name}/snapshot", access: Change, query: []string{"force", "dry-run"}, do: (*call).forget},
	{method: "GET", path: api.PathClients, access: Read, query: []string{"export"}, do: (*call).clients},
	{method: "DELETE", path: api.PathClients + "/{id}", access: Change, do: (*call).disconnect},
	{method: "GET", path: api.PathLeases, access: Read, do: (*call).leases},
	{method: "POST", path: api.PathLeases, access: Change, body: mustHaveBody, do: (*call).openLease},
	{method: "DELETE", path: api.PathLeases + "/{id}", access: Change, query: []string{"start", "holder"}, do: (*call).closeLease},
	{method: "GET", path: api.PathStats, access: Read, do: (*call).stats},
	{method: "GET", path: api.PathEvents, access: Read, do: (*call).events},
	{method: "POST", path: api.PathReload, access: Change, query: []string{"dry-run"}, do: (*call).reload},
	{method: "GET", path: api.PathMetrics, access: Read, do: (*call).metrics},
}

var metricsRoutes = []route{
	{method: "GET", path: api.PathMetrics, access: Read, do: (*call).metrics},
}

// call is one request on its way.
type call struct {
	s     *Server
	conn  *conn
	ctx   context.Context // ends with the peer
	w     http.ResponseWriter
	r     *http.Request
	route *route
	name  string // the segment that "{name}" or "{id}" stands for
	query url.Values
	body  []byte
	files []*os.File // whose they are is said at Service
	added string     // the name of the export that is made
	asked any        // what is to be changed, for the log; no secrets

	sentStatus int // 0 before the reply
}

// created is a result whose status is 201.
type created struct{ v any }

// sent is the result of a method that has written its reply itself.
type sent struct{}

// serve answers one request.
func (s *Server) serve(w http.ResponseWriter, r *http.Request) {
	c := &call{s: s, conn: connOf(r.Context()), ctx: r.Context(), w: w, r: r}
	start := time.Now()
	files, err := c.conn.take()
	c.files = files
	var v any
	if err == nil {
		v, err = c.run()
	} else {
		err = invalid("%s", err)
	}
	if err != nil {
		closeAll(c.files)
		err = c.fail(err)
	} else if err = c.reply(v); err != nil {
		s.log.Debug("control reply lost", "error", err)
		err = nil
	}
	c.audit(start, err)
}

// run finds the route, checks the request against it and does it.
func (c *call) run() (any, error) {
	if err := c.find(); err != nil {
		return nil, err
	}
	if c.route.access > c.conn.access {
		return nil, &api.Error{Code: api.CodeForbidden, Text: "only peers that may change things may do this: change-users and change-groups of [control] name them"}
	}
	if len(c.files) > 0 && !c.route.files {
		return nil, invalid("%s %s takes no descriptors", c.route.method, c.route.path)
	}
	var err error
	if c.query, err = c.parameters(); err != nil {
		return nil, err
	}
	if c.body, err = c.readBody(); err != nil {
		return nil, err
	}
	return c.route.do(c)
}

// find matches the path as it was sent. Each segment is decoded once, after
// the path was taken apart: an escaped slash belongs to a name.
func (c *call) find() error {
	segs := strings.Split(c.r.URL.EscapedPath(), "/")
	var methods []string
	for i := range c.s.routes {
		name, ok, err := match(c.s.routes[i].path, segs)
		if err != nil {
			return err
		}
		if !ok {
			continue
		}
		if methods = append(methods, c.s.routes[i].method); c.r.Method == c.s.routes[i].method {
			c.route, c.name = &c.s.routes[i], name
			return nil
		}
	}
	if methods == nil {
		return &api.Error{Code: api.CodeNotFound, Text: "no such path"}
	}
	c.w.Header().Set("Allow", strings.Join(methods, ", "))
	return &statusError{http.StatusMethodNotAllowed, invalid("%s is not for this path", short(c.r.Method, 32))}
}

func match(pattern string, segs []string) (name string, ok bool, err error) {
	parts := strings.Split(pattern, "/")
	if len(parts) != len(segs) {
		return "", false, nil
	}
	for i, p := range parts {
		if p == "{name}" || p == "{id}" {
			name = segs[i]
		} else if p != segs[i] {
			return "", false, nil
		}
	}
	name, err = url.PathUnescape(name)
	if err == nil {
		err = checkText(name)
	}
	if err == nil && len(name) > limits.ControlName {
		err = errors.New("too long")
	}
	if err != nil {
		return "", false, invalid("name in the path: %s", err)
	}
	return name, true, nil
}

// parameters takes those that the route has, once each.
func (c *call) parameters() (url.Values, error) {
	q, err := url.ParseQuery(c.r.URL.RawQuery)
	if err != nil {
		return nil, invalid("query: %s", err)
	}
	for k, v := range q {
		switch {
		case !slices.Contains(c.route.query, k):
			return nil, invalid("unknown parameter %q", short(k, 64))
		case len(v) > 1:
			return nil, invalid("parameter %q is there twice", k)
		case len(v[0]) > limits.ControlName:
			return nil, invalid("parameter %q is too long", k)
		}
		if err := checkText(v[0]); err != nil {
			return nil, invalid("parameter %q: %s", k, err)
		}
	}
	return q, nil
}

// flag is a parameter that is true or false, and false if it is not there.
func (c *call) flag(name string) (bool, error) {
	v, ok := c.query[name]
	if !ok {
		return false, nil
	}
	switch v[0] {
	case "", "1", "true":
		return true, nil
	case "0", "false":
		return false, nil
	}
	return false, invalid("parameter %q is neither true nor false", name)
}

func (c *call) readBody() ([]byte, error) {
	if c.route.body == noBody {
		if c.r.ContentLength != 0 {
			return nil, invalid("%s %s takes no body", c.route.method, c.route.path)
		}
		return nil, nil
	}
	if c.r.ContentLength > limits.ControlBody {
		return nil, tooLong()
	}
	rc := http.NewResponseController(c.w)
	if err := rc.SetReadDeadline(time.Now().Add(limits.ControlBodyTime)); err != nil {
		return nil, err
	}
	b, err := io.ReadAll(http.MaxBytesReader(c.w, c.r.Body, limits.ControlBody))
	var tooMany *http.MaxBytesError
	switch {
	case errors.As(err, &tooMany):
		return nil, tooLong()
	case errors.Is(err, os.ErrDeadlineExceeded):
		return nil, &statusError{http.StatusRequestTimeout, invalid("the body took too long")}
	case err != nil:
		return nil, invalid("body: %s", err)
	case len(b) == 0 && c.route.body == mustHaveBody:
		return nil, invalid("no body")
	}
	return b, rc.SetReadDeadline(time.Time{})
}

func tooLong() error {
	return &statusError{http.StatusRequestEntityTooLarge, invalid("the body is longer than %d bytes", limits.ControlBody)}
}

// checkText refuses what no name has.
func checkText(s string) error {
	switch {
	case !utf8.ValidString(s):
		return errors.New("not UTF-8")
	case strings.ContainsRune(s, 0):
		return errors.New("it has a zero byte")
	}
	return nil
}

// short bounds what an error or the log repeats.
func short(s string, most int) string {
	if len(s) > most {
		s = strings.ToValidUTF8(s[:most], "") + "…"
	}
	return s
}

// inLog is v as JSON, cut for the log.
func inLog(v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		return err.Error()
	}
	return short(string(b), limits.ControlAuditChange)
}

// into decodes the body.
func (c *call) into(v any) error {
	if err := decode(c.body, v); err != nil {
		return invalid("body: %s", err)
	}
	return nil
}

// statusError is an error with a status of its own.
type statusError struct {
	status int
	error
}

func (e *statusError) Unwrap() error { return e.error }

func invalid(format string, a ...any) error {
	return &api.Error{Code: api.CodeInvalid, Text: fmt.Sprintf(format, a...)}
}

// statusOf are the codes' HTTP status.
var statusOf = map[string]int{
	api.CodeInvalid:     http.StatusBadRequest,
	api.CodeForbidden:   http.StatusForbidden,
	api.CodeNotFound:    http.StatusNotFound,
	api.CodeExists:      http.StatusConflict,
	api.CodeInUse:       http.StatusConflict,
	api.CodeUnsupported: http.StatusUnprocessableEntity,
	api.CodeTimeout:     http.StatusGatewayTimeout,
	api.CodeFailed:      http.StatusInternalServerError,
}

// public is what the peer is told of err.
func (c *call) public(err error) (*api.Error, int) {
	var e *api.Error
	switch {
	case errors.As(err, &e) && statusOf[e.Code] != 0:
	case errors.Is(err, context.DeadlineExceeded):
		e = &api.Error{Code: api.CodeTimeout, Text: "it was not done in time"}
	case errors.Is(err, context.Canceled):
		e = &api.Error{Code: api.CodeTimeout, Text: "it was given up"}
	case c.conn.access == Change:
		e = &api.Error{Code: api.CodeFailed, Text: err.Error()}
	default:
		e = &api.Error{Code: api.CodeFailed, Text: "it failed; those who may change things are told why"}
	}
	text := strings.ReplaceAll(e.Text, "\n", "; ") // errors.Join tells of each on a line
	if len(text) > limits.ControlErrorText {
		text = strings.ToValidUTF8(text[:limits.ControlErrorText], "")
	}
	e = &api.Error{Code: e.Code, Text: text}
	status := statusOf[e.Code]
	var s *statusError
	if errors.As(err, &s) {
		status = s.status
	}
	return e, status
}

// fail sends err, and returns it as the log is to show it.
func (c *call) fail(err error) error {
	e, status := c.public(err)
	if sendErr := c.send(status, e); sendErr != nil {
		c.s.log.Debug("control reply lost", "error", sendErr)
	}
	return err
}

// reply sends what a method has returned.
func (c *call) reply(v any) error {
	switch v := v.(type) {
	case sent:
		return nil
	case created:
		return c.send(http.StatusCreated, v.v)
	case nil:
		return c.send(http.StatusNoContent, nil)
	}
	return c.send(http.StatusOK, v)
}

func (c *call) send(status int, v any) error {
	c.sentStatus = status
	if err := c.writeDeadline(); err != nil {
		return err
	}
	if status == http.StatusNoContent {
		c.w.WriteHeader(status)
		return nil
	}
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	c.w.Header().Set("Content-Type", "application/json")
	c.w.Header().Set("Content-Length", strconv.Itoa(len(b)+1))
	c.w.WriteHeader(status)
	_, err = c.w.Write(append(b, '\n'))
	return err
}

// writeDeadline gives the peer its time to read what is sent next.
func (c *call) writeDeadline() error {
	return http.NewResponseController(c.w).SetWriteDeadline(time.Now().Add(limits.ControlReplyTime))
}

// audit writes the line about a change by somebody who may change things. Its
// message has the subject, so that it reads as a sentence. Of other requests there
// is a line at level debug.
func (c *call) audit(start time.Time, err error) {
	level := slog.LevelDebug
	if c.route != nil && c.route.access == Change && c.conn.access == Change {
		level = slog.LevelInfo
	}
	msg := short(c.r.Method, 32) + " " + short(c.r.URL.EscapedPath(), limits.ControlAuditPath)
	if c.added != "" {
		msg += " " + strconv.Quote(short(c.added, limits.ControlAuditPath))
	}
	attrs := []slog.Attr{c.conn.auditAttrs(), slog.Int("status", c.sentStatus), slog.Duration("took", time.Since(start))}
	if q := c.r.URL.RawQuery; q != "" {
		attrs = append(attrs, slog.String("query", short(q, limits.ControlAuditPath)))
	}
	if c.asked != nil {
		attrs = append(attrs, slog.String("change", inLog(c.asked)))
	}
	if len(c.files) > 0 {
		attrs = append(attrs, slog.Int("descriptors", len(c.files)))
	}
	if err != nil {
		attrs = append(attrs, slog.String("error", short(err.Error(), limits.ControlErrorText)))
	}
	c.s.log.LogAttrs(context.WithoutCancel(c.ctx), level, msg, attrs...)
}
