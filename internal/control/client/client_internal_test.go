package client

import (
	"context"
	"errors"
	"io"
	"net"
	"path/filepath"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/control/api"
)

// TestCallEndsWhereThereIsNoRoomForEver holds that the wait for a place is bounded,
// by the client and by the context, and that its end is told from other refusals.
func TestCallEndsWhereThereIsNoRoomForEver(t *testing.T) {
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
			_, _ = io.WriteString(c, "HTTP/1.1 503 No\r\nConnection: close\r\n\r\n{\"code\":\"in-use\",\"text\":\"full\"}")
			_ = c.(*net.UnixConn).CloseWrite()
			_, _ = io.Copy(io.Discard, c)
			_ = c.Close()
		}
	}()
	defer func() {
		_ = l.Close()
		<-done
	}()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	_, err = (&Client{path: path, room: 50 * time.Millisecond}).Status(ctx)
	var refusal *api.Error
	if !errors.As(err, new(*NoRoomError)) || !errors.As(err, &refusal) || refusal.Code != api.CodeInUse {
		t.Errorf("after the wait: got %v, want no room", err)
	}
	ctx, cancel = context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err = (&Client{path: path, room: time.Hour}).Status(ctx)
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("after the context's end: got %v, want that", err)
	}
}
