// Package client speaks to the control API of vmdiskd. The server may be
// anybody who could make the socket: what it sends is bounded.
package client

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/internal/limits"
	"golang.org/x/sys/unix"
)

// Client is a control socket. Each call makes a connection of its own, so that a
// Client is safe for concurrent use and has nothing to close. It ends with its
// context, and all but Events after limits.ControlCall beyond what the server is
// asked to wait for. What the server refuses is an *api.Error.
type Client struct {
	path  string
	room  time.Duration // how long a call waits for a place
	bound time.Duration // of a call
}

// Dial names the socket; nothing is connected before the first call.
func Dial(path string) *Client {
	return &Client{path: path, room: limits.ControlRoom, bound: limits.ControlCall}
}

// SocketError is that a request got no answer: nobody listens at the socket, or
// who does hangs up, as the daemon does on a peer that may not even look.
type SocketError struct {
	Path string
	Err  error
}

// ErrForeign is the cause where something else answers, such as a server of NBD.
var ErrForeign = errors.New("what answers there is no control API")

// Error names the socket.
func (e *SocketError) Error() string { return fmt.Sprintf("control socket %q: %v", e.Path, e.Err) }

// Unwrap is the cause.
func (e *SocketError) Unwrap() error { return e.Err }

// NoRoomError is that the server had no room for one more connection for as long
// as a call waits for it. Nothing of the request was read.
type NoRoomError struct{ Refusal *api.Error }

// Error is what the server says.
func (e *NoRoomError) Error() string { return e.Refusal.Text }

// Unwrap is the *api.Error.
func (e *NoRoomError) Unwrap() error { return e.Refusal }

// RefusalOf is that of a request which the server has read, and nil for any other
// error: one without room for the connection says nothing of what was asked for.
func RefusalOf(err error) *api.Error {
	e, ok := errors.AsType[*api.Error](err)
	if !ok || errors.As(err, new(*NoRoomError)) {
		return nil
	}
	return e
}

// request is what a call sends.
type request struct {
	method string
	path   string // in percent-encoding
	query  url.Values
	body   any // nil: none
	files  []*os.File
	waits  time.Duration // how long the server may wait before it does it
}

// exportPath is the path of an export and of what belongs to it.
func exportPath(name string, more ...string) string {
	p := api.PathExports + "/" + url.PathEscape(name)
	for _, m := range more {
		p += "/" + m
	}
	return p
}

// Status is the daemon as a whole.
func (c *Client) Status(ctx context.Context) (s api.Status, err error) {
	return s, c.call(ctx, request{method: "GET", path: api.PathStatus}, &s)
}

// Exports are all exports.
func (c *Client) Exports(ctx context.Context) ([]api.Export, error) {
	return list[api.Export](ctx, c, request{method: "GET", path: api.PathExports})
}

// Export is the export called name.
func (c *Client) Export(ctx context.Context, name string) (e api.Export, err error) {
	return e, c.call(ctx, request{method: "GET", path: exportPath(name)}, &e)
}

// Add makes an export. In a, "fd:0" stands for the first of files, and so on;
// there are at most limits.ControlFiles, and they stay the caller's.
func (c *Client) Add(ctx context.Context, a api.AddExport, files ...*os.File) (e api.Export, err error) {
	return e, c.call(ctx, request{method: "POST", path: api.PathExports, body: a, files: files}, &e)
}

// Patch changes what p names.
func (c *Client) Patch(ctx context.Context, name string, p api.Patch) (e api.Export, err error) {
	return e, c.call(ctx, request{method: "PATCH", path: exportPath(name), body: p}, &e)
}

// Remove removes an export. Without force one that clients have open is refused;
// with it, what they have in flight after timeout is given up, where 0 is the
// server's own idea.
func (c *Client) Remove(ctx context.Context, name string, force bool, timeout time.Duration) error {
	q := url.Values{}
	if force {
		q.Set("force", "true")
	}
	if timeout > 0 {
		q.Set("timeout", timeout.String())
	}
	waits := cmp.Or(timeout, limits.ControlRemove)
	return c.call(ctx, request{method: "DELETE", path: exportPath(name), query: q, waits: waits}, nil)
}

// Pause holds back the requests of an export; limit as api.Pause has it.
func (c *Client) Pause(ctx context.Context, name string, limit time.Duration) error {
	body := api.Pause{Limit: config.Duration(limit)}
	return c.call(ctx, request{method: "POST", path: exportPath(name, "pause"), body: body, waits: cmp.Or(limit, limits.PauseLongest)}, nil)
}

// Resume ends a pause.
func (c *Client) Resume(ctx context.Context, name string) error {
	return c.call(ctx, request{method: "POST", path: exportPath(name, "resume")}, nil)
}

// Resize makes a disk larger.
func (c *Client) Resize(ctx context.Context, name string, r api.Resize) (e api.Export, err error) {
	return e, c.call(ctx, request{method: "POST", path: exportPath(name, "resize"), body: r}, &e)
}

// Snapshot puts an overlay above the image; files as with Add.
func (c *Client) Snapshot(ctx context.Context, name string, s api.Snapshot, files ...*os.File) (e api.Export, err error) {
	q := request{method: "POST", path: exportPath(name, "snapshot"), body: s, files: files, waits: limits.PauseLongest}
	return e, c.call(ctx, q, &e)
}

// Forget has the server forget the overlay of an export of its configuration,
// with force also one that a guest may have written to, or only say which.
func (c *Client) Forget(ctx context.Context, name string, force, dryRun bool) (f api.Forgotten, err error) {
	q := url.Values{}
	if force {
		q.Set("force", "true")
	}
	if dryRun {
		q.Set("dry-run", "true")
	}
	return f, c.call(ctx, request{method: "DELETE", path: exportPath(name, "snapshot"), query: q}, &f)
}

// Clients are the connections of one export, or all if it is nil.
func (c *Client) Clients(ctx context.Context, export *string) ([]api.Client, error) {
	q := url.Values{}
	if export != nil {
		q.Set("export", *export)
	}
	return list[api.Client](ctx, c, request{method: "GET", path: api.PathClients, query: q})
}

// Disconnect cuts one connection off.
func (c *Client) Disconnect(ctx context.Context, id uint64) error {
	return c.call(ctx, request{method: "DELETE", path: api.PathClients + "/" + strconv.FormatUint(id, 10)}, nil)
}

// Leases are those that are open.
func (c *Client) Leases(ctx context.Context) ([]api.Lease, error) {
	return list[api.Lease](ctx, c, request{method: "GET", path: api.PathLeases})
}

// OpenLease opens or renews a lease.
func (c *Client) OpenLease(ctx context.Context, l api.OpenLease) (x api.Lease, err error) {
	return x, c.call(ctx, request{method: "POST", path: api.PathLeases, body: l}, &x)
}

// CloseLease ends the lease of a start for a holder, or for all if that is "".
func (c *Client) CloseLease(ctx context.Context, cid uint32, start, holder string) error {
	path := api.PathLeases + "/" + strconv.FormatUint(uint64(cid), 10)
	q := url.Values{"start": {start}}
	if holder != "" {
		q.Set("holder", holder)
	}
	return c.call(ctx, request{method: "DELETE", path: path, query: q}, nil)
}

// Stats are the counters of all exports.
func (c *Client) Stats(ctx context.Context) ([]api.Stats, error) {
	return list[api.Stats](ctx, c, request{method: "GET", path: api.PathStats})
}

// Reload makes the server read its configuration again, or only say what that
// would change.
func (c *Client) Reload(ctx context.Context, dryRun bool) (r api.Reload, err error) {
	q := url.Values{}
	if dryRun {
		q.Set("dry-run", "true")
	}
	return r, c.call(ctx, request{method: "POST", path: api.PathReload, query: q}, &r)
}

// Metrics copies the counters in Prometheus' text format to w, at most
// limits.ControlReply bytes.
func (c *Client) Metrics(ctx context.Context, w io.Writer) error {
	return c.ask(ctx, request{method: "GET", path: api.PathMetrics}, func(r *reply) error {
		_, err := io.Copy(w, r.body())
		return err
	})
}

// call sends q and decodes the reply into v, unless it is nil.
func (c *Client) call(ctx context.Context, q request, v any) error {
	return c.ask(ctx, q, func(r *reply) error {
		if v == nil {
			return nil
		}
		r.most.left = limits.ControlObject
		b, err := io.ReadAll(r.body())
		if err != nil {
			return err
		}
		return object(b, v)
	})
}

// list sends q and decodes the reply, a list.
func list[T any](ctx context.Context, c *Client, q request) (out []T, err error) {
	err = c.ask(ctx, q, func(r *reply) error {
		r.most.left = limits.ControlList
		b, err := io.ReadAll(r.body())
		if err == nil {
			out, err = elements[T](b)
		}
		return err
	})
	return out, err
}

// ask sends q and has the reply read, all within the bound of a call.
func (c *Client) ask(ctx context.Context, q request, read func(*reply) error) error {
	ctx, cancel := context.WithTimeout(ctx, c.bound+q.waits)
	defer cancel()
	r, err := c.open(ctx, q)
	if err != nil {
		return err
	}
	defer r.close()
	return r.cause(read(r))
}

// object decodes one object of a bounded size with a bounded number of others.
func object(b []byte, v any) error {
	if len(b) > limits.ControlObject || bytes.Count(b, []byte("{")) > limits.ControlObjects {
		return errTooLong
	}
	return json.Unmarshal(b, v)
}

// elements decodes a list one by one, so that the first element that is wrong
// ends it.
func elements[T any](b []byte) ([]T, error) {
	if bytes.Count(b, []byte("{")) > limits.ControlObjects {
		return nil, errTooLong
	}
	d := json.NewDecoder(bytes.NewReader(b))
	if tok, err := d.Token(); err != nil || tok != json.Delim('[') {
		return nil, errors.Join(errors.New("not a list"), err)
	}
	out := []T{}
	for d.More() {
		var raw json.RawMessage
		if err := d.Decode(&raw); err != nil {
			return nil, err
		}
		var v T
		if err := object(raw, &v); err != nil {
			return nil, err
		}
		out = append(out, v)
	}
	_, err := d.Token()
	return out, err
}

// reply is an open connection whose header says success.
type reply struct {
	ctx    context.Context
	path   string
	conn   net.Conn
	most   *budget
	http   *http.Response
	unhook func() bool
}

// budget reads at most left bytes.
type budget struct {
	r    io.Reader
	left int64
}

var errTooLong = errors.New("longer than a reply may be")

func (b *budget) Read(p []byte) (int, error) {
	if b.left <= 0 {
		return 0, errTooLong
	}
	n, err := b.r.Read(p[:min(int64(len(p)), b.left)])
	b.left -= int64(n)
	return n, err
}

// open is attempt, again as long as the server has no room. The waits double, and
// are of random lengths: those who were refused together do not come back so.
func (c *Client) open(ctx context.Context, q request) (*reply, error) {
	until := time.Now().Add(c.room)
	for most := limits.ControlRoomFirst; ; most = min(2*most, limits.ControlRoomMost) {
		r, err := c.attempt(ctx, q)
		if !errors.As(err, new(*NoRoomError)) || time.Now().After(until) {
			return r, err
		}
		select {
		case <-time.After(most/2 + rand.N(most/2)):
		case <-ctx.Done():
			return nil, fmt.Errorf("control socket %q: %w: %w", c.path, ctx.Err(), err)
		}
	}
}

// attempt sends q and reads the header of the reply. An error reply is the error.
func (c *Client) attempt(ctx context.Context, q request) (*reply, error) {
	hr, err := q.http()
	if err != nil {
		return nil, err
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", c.path)
	if err != nil {
		if dial, ok := errors.AsType[*net.OpError](err); ok {
			err = dial.Err
		}
		return nil, &SocketError{Path: c.path, Err: err}
	}
	r := &reply{ctx: ctx, path: c.path, conn: conn, most: &budget{r: conn, left: limits.ControlReplyHeader}}
	r.unhook = context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	// A server that refuses may do so before it has read everything.
	sendErr := send(conn.(*net.UnixConn), hr, q.files)
	r.http, err = readReply(r.most, hr)
	if err != nil {
		r.close()
		if sendErr != nil && !errors.Is(err, ErrForeign) {
			err = sendErr // the cause
		}
		if ctx.Err() == nil {
			return nil, &SocketError{Path: c.path, Err: err}
		}
		return nil, r.cause(err)
	}
	r.most.left = limits.ControlReply
	if r.http.StatusCode/100 != 2 {
		defer r.close()
		return nil, r.refusal()
	}
	return r, nil
}

// readReply reads the header of the reply to hr.
func readReply(r io.Reader, hr *http.Request) (*http.Response, error) {
	const begin = "HTTP/"
	b := bufio.NewReader(r)
	if p, err := b.Peek(len(begin)); err == nil && string(p) != begin {
		return nil, ErrForeign
	}
	return http.ReadResponse(b, hr)
}

// http checks what the server would refuse unread, and builds the request.
func (q *request) http() (*http.Request, error) {
	var body io.Reader
	if q.body != nil {
		b, err := json.Marshal(q.body)
		if err != nil {
			return nil, err
		}
		if len(b) > limits.ControlBody {
			return nil, &api.Error{Code: api.CodeInvalid, Text: fmt.Sprintf("the request has %d bytes, more than %d", len(b), limits.ControlBody)}
		}
		body = bytes.NewReader(b)
	}
	if len(q.files) > limits.ControlFiles {
		return nil, &api.Error{Code: api.CodeInvalid, Text: fmt.Sprintf("%d descriptors, more than %d", len(q.files), limits.ControlFiles)}
	}
	u := "http://vmdiskd" + q.path
	if len(q.query) > 0 {
		u += "?" + q.query.Encode()
	}
	if len(u) > limits.ControlHeader {
		return nil, &api.Error{Code: api.CodeInvalid, Text: "the name is too long"}
	}
	hr, err := http.NewRequest(q.method, u, body)
	if err != nil {
		return nil, err
	}
	hr.Close = true
	hr.Header.Set("User-Agent", "vmdiskctl")
	if body != nil {
		hr.Header.Set("Content-Type", "application/json")
	}
	return hr, nil
}

// send writes hr, its first byte with the descriptors.
func send(conn *net.UnixConn, hr *http.Request, files []*os.File) error {
	var b bytes.Buffer
	if err := hr.Write(&b); err != nil {
		return err
	}
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, f := range files {
			fds[i] = int(f.Fd())
		}
		_, _, err := conn.WriteMsgUnix(b.Next(1), unix.UnixRights(fds...), nil)
		runtime.KeepAlive(files)
		if err != nil {
			return err
		}
	}
	_, err := conn.Write(b.Bytes())
	return err
}

// refusal is the error that the reply is.
func (r *reply) refusal() error {
	r.most.left = 2 * limits.ControlErrorText * 6 // each byte may be escaped
	b, err := io.ReadAll(r.body())
	var e api.Error
	if err != nil || json.Unmarshal(b, &e) != nil || e.Code == "" {
		return r.cause(fmt.Errorf("unexpected reply %d", r.http.StatusCode))
	}
	e.Text = e.Text[:min(len(e.Text), limits.ControlErrorText)]
	if e.Code == api.CodeInvalid && strings.Contains(e.Text, "unknown field") {
		e.Text += ": the server is of an older version, which does not know it"
	}
	if r.http.StatusCode == http.StatusServiceUnavailable {
		return &NoRoomError{Refusal: &e}
	}
	return &e
}

func (r *reply) body() io.Reader { return r.http.Body }

// cause prefers the context's end to what it led to.
func (r *reply) cause(err error) error {
	if err == nil {
		return nil
	}
	if ctxErr := r.ctx.Err(); ctxErr != nil {
		err = ctxErr
	}
	return fmt.Errorf("control socket %q: %w", r.path, err)
}

func (r *reply) close() {
	r.unhook()
	_ = r.conn.Close()
}
