package raw_test

import (
	"errors"
	"runtime"
	"syscall"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
)

// TestFileThatDoesNotAnswerHasTheSizeThatItHad: its growth is adopted when it
// answers again, and a resize waits for that.
func TestFileThatDoesNotAnswerHasTheSizeThatItHad(t *testing.T) {
	const before, after = 1 << 20, 4 << 20
	d, b := newBadDisk(t, kind{"pool", false}, before, 0)
	asked, answer := make(chan bool, 64), make(chan bool)
	b.set(func(op string, _, n int64) (int64, syscall.Errno) {
		if op == "getattr" {
			asked <- true
			<-answer
		}
		return n, 0
	})
	b.mu.Lock()
	b.data = make([]byte, after)
	b.mu.Unlock()
	for range 5 {
		if got := d.Info().Size; got != before {
			t.Errorf("size while the file does not answer: got %d, want %d", got, before)
		}
	}
	<-asked
	if n := len(asked); n > 0 {
		t.Errorf("%d questions beside the one that hangs", n)
	}
	resized := make(chan error)
	go func() { resized <- d.Resize(t.Context(), 2<<20) }()
	<-asked
	close(answer)
	if err := <-resized; !errors.Is(err, backing.ErrNotSupported) {
		t.Errorf("resize to less than the file has by now: got %v, want %v", err, backing.ErrNotSupported)
	}
	for d.Info().Size != after {
		runtime.Gosched()
	}
}
