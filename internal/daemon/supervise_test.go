package daemon

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/export"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// patience is for what must come, however busy the machine is.
const patience = time.Minute

// silent is an engine that keeps what it is given until somebody takes it from
// asked. Once answers is closed it is the pool that it stands on.
type silent struct {
	engine.Engine
	asked   chan *engine.IO
	answers chan struct{}
}

func (s *silent) Submit(batch []*engine.IO) {
	select {
	case <-s.answers:
		s.Engine.Submit(batch)
	default:
		for _, io := range batch {
			s.asked <- io
		}
	}
}

// next is what the engine is asked for.
func (s *silent) next(t *testing.T) *engine.IO {
	t.Helper()
	select {
	case io := <-s.asked:
		return io
	case <-time.After(patience):
		t.Fatal("nothing is asked of the engine")
		return nil
	}
}

// errorsOf is a log that passes on the value of the key "error" of each record.
type errorsOf chan error

func (errorsOf) Enabled(context.Context, slog.Level) bool { return true }
func (e errorsOf) WithAttrs([]slog.Attr) slog.Handler     { return e }
func (e errorsOf) WithGroup(string) slog.Handler          { return e }

func (e errorsOf) Handle(_ context.Context, r slog.Record) error {
	r.Attrs(func(a slog.Attr) bool {
		if err, ok := a.Value.Any().(error); ok && a.Key == "error" {
			select {
			case e <- err:
			default: // enough have been said
			}
		}
		return true
	})
	return nil
}

// watched makes NOTIFY_SOCKET a service manager with a watchdog, and passes on
// what it is told.
func watched(t *testing.T) <-chan string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "notify")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("NOTIFY_SOCKET", name)
	t.Setenv("WATCHDOG_USEC", "20000")
	t.Setenv("WATCHDOG_PID", "")
	told, over := make(chan string), make(chan struct{})
	go func() {
		defer close(told)
		for b := make([]byte, 512); ; {
			n, err := l.Read(b)
			if err != nil {
				return
			}
			select {
			case told <- string(b[:n]):
			case <-over:
				return
			}
		}
	}()
	t.Cleanup(func() {
		close(over)
		l.Close()
		for range told {
		}
	})
	return told
}

// TestWatchdogIsToldOnlyWhenTheEngineAnswers: while a read is not answered, and
// after one that failed, the service manager hears nothing; then it does again.
// Datagrams keep their order: what was sent before Status is read before it.
func TestWatchdogIsToldOnlyWhenTheEngineAnswers(t *testing.T) {
	told := watched(t)
	pool := engine.NewPool(1)
	defer pool.Close()
	hung := &silent{Engine: pool, asked: make(chan *engine.IO, 1), answers: make(chan struct{})}
	said := make(errorsOf, 1)
	d := &daemon{engine: hung, exports: export.NewRegistry(), log: slog.New(said)}
	d.ctx, d.cancel = context.WithCancel(t.Context())
	if err := d.findSupervisor(); err != nil {
		t.Fatal(err)
	}
	defer d.boss.Close()
	if err := d.ready(); err != nil {
		t.Fatal(err)
	}
	defer d.accepted.Wait()
	defer d.cancel()
	expect(t, told, "READY=1\nSTATUS=serving 0 exports")

	for range 3 {
		refused(t, told, said, errNoAnswer)
	}
	io := hung.next(t)
	io.Err = unix.EIO
	io.Done(io)
	refused(t, told, said, unix.EIO)
	io = hung.next(t)
	if err := d.boss.Status("answering"); err != nil {
		t.Fatal(err)
	}
	expect(t, told, "STATUS=answering")
	close(hung.answers)
	hung.Submit([]*engine.IO{io})
	for range 3 {
		expect(t, told, "WATCHDOG=1")
	}
}

// refused waits until the log says an error in place of what the watchdog is
// told. One that was said while nobody took it may come before.
func refused(t *testing.T, told <-chan string, said <-chan error, want error) {
	t.Helper()
	for {
		select {
		case err := <-said:
			if err == want {
				return
			}
		case m := <-told:
			t.Fatalf("the service manager was told %q, although the engine gave no answer", m)
		case <-time.After(patience):
			t.Fatalf("the log does not say %q", want)
		}
	}
}

func expect(t *testing.T, told <-chan string, want string) {
	t.Helper()
	select {
	case m := <-told:
		if m != want {
			t.Fatalf("the service manager was told %q, want %q", m, want)
		}
	case <-time.After(patience):
		t.Fatalf("the service manager was not told %q", want)
	}
}

// TestPulseIsNotBehindTransfersThatHang: not even behind the program's own.
func TestPulseIsNotBehindTransfersThatHang(t *testing.T) {
	e := engine.NewPool(0)
	p, err := newPulse(e)
	if err != nil {
		t.Fatal(err)
	}
	var over sync.WaitGroup
	answer := make(chan bool)
	batch := make([]*engine.IO, 2*limits.PoolWorkers)
	for i := range batch {
		over.Add(1)
		batch[i] = &engine.IO{Op: engine.OpRead, File: p.file, Buf: make([]byte, 1), Done: func(*engine.IO) {
			<-answer
			over.Done()
		}}
	}
	e.Submit(batch)
	for range 3 {
		if err := p.beat(patience); err != nil {
			t.Errorf("beat beside transfers that hang: %v", err)
			break
		}
	}
	close(answer)
	over.Wait()
	if err := errors.Join(p.file.Close(), e.Close()); err != nil {
		t.Error(err)
	}
}
