package client_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/internal/control/client"
	"github.com/vmdiskd/vmdiskd/internal/limits"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func testContext(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// evil answers every connection with what talk sends, and then closes it.
func evil(t *testing.T, talk func(c net.Conn)) *client.Client {
	t.Helper()
	path := filepath.Join(t.TempDir(), "control")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			// The request is small: one read takes all of it.
			_, _ = c.Read(make([]byte, 64<<10))
			talk(c)
			_ = c.Close()
		}
	}()
	t.Cleanup(func() {
		_ = l.Close()
		<-done
	})
	return client.Dial(path)
}

func says(text string) func(net.Conn) {
	return func(c net.Conn) { _, _ = io.WriteString(c, text) }
}

// endless repeats text until the client has had enough.
func endless(begin, text string) func(net.Conn) {
	return func(c net.Conn) {
		_, err := io.WriteString(c, begin)
		for b := []byte(strings.Repeat(text, 1+4096/len(text))); err == nil; {
			_, err = c.Write(b)
		}
	}
}

// TestCallEndsWhereThereIsNoRoomForEver holds that the wait for a place is bounded,
// by the client and by the context, and that its end is told from other refusals.
func TestCallEndsWhereThereIsNoRoomForEver(t *testing.T) {
	c := evil(t, says("HTTP/1.1 503 No\r\nConnection: close\r\n\r\n{\"code\":\"in-use\",\"text\":\"full\"}"))
	c.WaitForRoom(50 * time.Millisecond)
	_, err := c.Status(testContext(t))
	var refusal *api.Error
	if !errors.As(err, new(*client.NoRoomError)) || !errors.As(err, &refusal) || refusal.Code != api.CodeInUse {
		t.Errorf("after the wait: got %v, want no room", err)
	}
	if e := client.RefusalOf(err); e != nil {
		t.Errorf("after the wait: the request is refused with %v, which nobody has read", e)
	}
	c.WaitForRoom(time.Hour)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := c.Status(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("after the context's end: got %v, want that", err)
	}
}

const ok = "HTTP/1.1 200 OK\r\n\r\n"

// TestHostileServersAreLeft holds that each reply ends in an error, and that
// none is read for ever.
func TestHostileServersAreLeft(t *testing.T) {
	for _, tt := range []struct {
		name string
		talk func(net.Conn)
	}{
		{"nothing", says("")},
		{"no HTTP", says("hello\n")},
		{"header for ever", endless("HTTP/1.1 200 OK\r\n", "X: y\r\n")},
		{"one header for ever", endless("HTTP/1.1 200 OK\r\nX: ", "y")},
		{"status line for ever", endless("HTTP/1.1 200 ", "y")},
		{"continue for ever", endless("", "HTTP/1.1 100 Continue\r\n\r\n")},
		{"list for ever", endless(ok+"[", "{},")},
		{"list of numbers", says(ok + "[1,1]")},
		{"many numbers", says(ok + "[" + strings.Repeat("1,", 1<<20) + "1]")},
		{"element for ever", endless(ok+`[{"name":"`, "x")},
		{"many objects", says(ok + "[" + strings.Repeat("{},", limits.ControlObjects) + "{}]")},
		{"large element", says(ok + `[{"description":"` + strings.Repeat("x", limits.ControlObject) + `"}]`)},
		{"deep", says(ok + strings.Repeat("[", 1<<20))},
		{"cut off", says(ok + `[{"name":"a"}`)},
		{"behind the end of a chunk", says("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n[{\r\n0\r\n\r\n")},
		{"cut off in a chunk", says("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\n[]")},
		{"object", says(ok + `{}`)},
		{"redirect", says("HTTP/1.1 302 Found\r\nLocation: /v1/status\r\n\r\n")},
		{"error without words", says("HTTP/1.1 500 No\r\n\r\n")},
		{"error for ever", endless("HTTP/1.1 500 No\r\n\r\n{\"code\":\"failed\",\"text\":\"", "x")},
	} {
		c := evil(t, tt.talk)
		if e, err := c.Exports(testContext(t)); err == nil || errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s: got %d exports, %v", tt.name, len(e), err)
		}
	}
}

func TestHostileObjectsAreLeft(t *testing.T) {
	for name, talk := range map[string]func(net.Conn){
		"for ever":     endless(ok+`{"name":"`, "x"),
		"many objects": says(ok + `{"grants":[` + strings.Repeat("{},", limits.ControlObjects) + `{}]}`),
		"cut off":      says(ok + `{"name":`),
	} {
		c := evil(t, talk)
		if _, err := c.Export(testContext(t), "a"); err == nil || errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

func TestMetricsEnd(t *testing.T) {
	c := evil(t, endless(ok, "x 1\n"))
	if err := c.Metrics(testContext(t), io.Discard); err == nil || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
}

func TestHostileEventsAreLeft(t *testing.T) {
	for name, talk := range map[string]func(net.Conn){
		"a line for ever": endless(ok, "x"),
		"no JSON":         says(ok + "x\n"),
		"cut off":         says(ok + `{"kind":"lost"`),
		"cut in a chunk":  says("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{}\n"),
	} {
		seq, err := evil(t, talk).Events(testContext(t))
		if err != nil {
			t.Fatal(err)
		}
		var last error
		for _, last = range seq {
		}
		if last == nil || errors.Is(last, context.DeadlineExceeded) {
			t.Errorf("%s: got %v", name, last)
		}
	}
}

// TestSilentServerEndsWithTheContext also holds for a server that is silent
// within its reply.
func TestSilentServerEndsWithTheContext(t *testing.T) {
	for _, begin := range []string{"", ok + "[", "HTTP/1.1 200 OK\r\n"} {
		begun, leave := make(chan struct{}, 1), make(chan struct{})
		c := evil(t, func(c net.Conn) {
			says(begin)(c)
			begun <- struct{}{}
			<-leave
		})
		ctx, cancel := context.WithCancel(testContext(t))
		go func() {
			<-begun
			cancel()
		}()
		if _, err := c.Exports(ctx); !errors.Is(err, context.Canceled) {
			t.Errorf("after %q: got %v", begin, err)
		}
		close(leave)
	}
}

// TestSilentServerIsGivenUp by a call, whatever its context says, and wherever in
// the reply it is silent. Events come for longer than a call may take.
func TestSilentServerIsGivenUp(t *testing.T) {
	ended, end := context.WithCancel(t.Context())
	defer end()
	silent := func(begin, more string) *client.Client {
		c := evil(t, func(c net.Conn) {
			says(begin)(c)
			<-ended.Done()
			says(more)(c)
		})
		c.EndAfter(20 * time.Millisecond)
		return c
	}
	events, err := silent(ok, `{"kind":"lost"}`+"\n").Events(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	givenUp := func(name string, call func(context.Context) error) {
		t.Helper()
		ctx := testContext(t)
		if err := call(ctx); !errors.Is(err, context.DeadlineExceeded) || ctx.Err() != nil {
			t.Errorf("%s: got %v, and the context has %v", name, err, ctx.Err())
		}
	}
	for _, begin := range []string{"", "HTTP/1.1 200 OK\r\n", ok + "[", "HTTP/1.1 400 No\r\n\r\n{"} {
		c := silent(begin, "")
		givenUp(fmt.Sprintf("exports after %q", begin), func(ctx context.Context) error { _, err := c.Exports(ctx); return err })
		givenUp(fmt.Sprintf("export after %q", begin), func(ctx context.Context) error { _, err := c.Export(ctx, "a"); return err })
		givenUp(fmt.Sprintf("metrics after %q", begin), func(ctx context.Context) error { return c.Metrics(ctx, io.Discard) })
	}
	c := silent("", "")
	givenUp("add", func(ctx context.Context) error { _, err := c.Add(ctx, api.AddExport{}, os.Stdin); return err })
	givenUp("remove", func(ctx context.Context) error { return c.Remove(ctx, "a", true, time.Millisecond) })
	givenUp("pause", func(ctx context.Context) error { return c.Pause(ctx, "a", time.Millisecond) })
	end()
	for e, err := range events {
		if err != nil || e.Kind != "lost" {
			t.Errorf("event %+v, %v", e, err)
		}
	}
}

func TestErrorsSayWhichSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "none")
	_, err := client.Dial(path).Status(testContext(t))
	if !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), path) {
		t.Errorf("got %v", err)
	}
	_, err = client.Dial("/" + strings.Repeat("x", 200)).Status(testContext(t))
	if err == nil {
		t.Error("a path that is too long for a socket: no error")
	}
}

func TestServerOfNBDIsNoControlAPI(t *testing.T) {
	_, err := evil(t, says("NBDMAGICIHAVEOPT\x00\x03")).Status(testContext(t))
	var e *client.SocketError
	if !errors.As(err, &e) || !errors.Is(err, client.ErrForeign) {
		t.Errorf("got %v, want %v", err, client.ErrForeign)
	}
}

func TestErrorTextIsBounded(t *testing.T) {
	c := evil(t, says("HTTP/1.1 500 No\r\n\r\n{\"code\":\"failed\",\"text\":\""+strings.Repeat("x", 2*limits.ControlErrorText)+"\"}"))
	_, err := c.Status(testContext(t))
	var e *api.Error
	if !errors.As(err, &e) || e.Code != api.CodeFailed || len(e.Text) != limits.ControlErrorText {
		t.Errorf("got %.100v", err)
	}
}

func TestOlderServerIsNamedAsTheReason(t *testing.T) {
	c := evil(t, says("HTTP/1.1 400 No\r\n\r\n{\"code\":\"invalid\",\"text\":\"body: unknown field \\\"by\\\"\"}"))
	if _, err := c.Resize(testContext(t), "a", api.Resize{By: 1}); err == nil || !strings.Contains(err.Error(), "older version") {
		t.Errorf("got %v", err)
	}
}

// TestCallWaitsForAPlace holds that a full table of connections is no refusal: the
// request is sent again until there is a place.
func TestCallWaitsForAPlace(t *testing.T) {
	const full = "HTTP/1.1 503 No\r\nContent-Length: 32\r\n\r\n{\"code\":\"in-use\",\"text\":\"full\"}\n"
	var asked atomic.Int32
	c := evil(t, func(c net.Conn) {
		if asked.Add(1) <= 3 {
			says(full)(c)
		} else {
			says(ok + `{"name":"a"}`)(c)
		}
	})
	e, err := c.Add(testContext(t), api.AddExport{Export: config.Export{Name: "a", Image: "a.raw"}})
	if err != nil || e.Name != "a" || asked.Load() != 4 {
		t.Errorf("got %q, %v after %d requests, want \"a\" after 4", e.Name, err, asked.Load())
	}
}

// TestOtherRefusalsAreNotAskedAgain: "in-use" is also the code of what is there
// too often, as streams of events.
func TestOtherRefusalsAreNotAskedAgain(t *testing.T) {
	var asked atomic.Int32
	c := evil(t, func(c net.Conn) {
		asked.Add(1)
		says("HTTP/1.1 409 No\r\n\r\n{\"code\":\"in-use\",\"text\":\"too many\"}")(c)
	})
	_, err := c.Events(testContext(t))
	if e := client.RefusalOf(err); e == nil || e.Code != api.CodeInUse || asked.Load() != 1 {
		t.Errorf("got %v after %d requests, want a refusal after one", err, asked.Load())
	}
}

// TestWhatTheServerWouldRefuseIsNotSent uses a path at which nobody listens.
func TestWhatTheServerWouldRefuseIsNotSent(t *testing.T) {
	c := client.Dial(filepath.Join(t.TempDir(), "none"))
	ctx := testContext(t)
	var e *api.Error
	_, err := c.Add(ctx, api.AddExport{Export: config.Export{Image: strings.Repeat("x", limits.ControlBody)}})
	if !errors.As(err, &e) || e.Code != api.CodeInvalid {
		t.Errorf("long body: got %v", err)
	}
	_, err = c.Add(ctx, api.AddExport{}, make([]*os.File, limits.ControlFiles+1)...)
	if !errors.As(err, &e) || e.Code != api.CodeInvalid {
		t.Errorf("many files: got %v", err)
	}
	if err = c.Resume(ctx, strings.Repeat("/", limits.ControlHeader)); !errors.As(err, &e) || e.Code != api.CodeInvalid {
		t.Errorf("long name: got %v", err)
	}
}
