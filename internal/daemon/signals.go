package daemon

import (
	"os"
	"os/signal"

	"golang.org/x/sys/unix"
)

// signals are those that mean something to the daemon. Signals that other
// programs give a meaning, and those of broken pipes and file size limits,
// are ignored: their calls return errors.
type signals struct {
	stopping chan os.Signal
	reload   chan os.Signal
}

func catchSignals() *signals {
	signal.Ignore(unix.SIGPIPE, unix.SIGXFSZ, unix.SIGUSR1, unix.SIGUSR2)
	s := &signals{stopping: make(chan os.Signal, 2), reload: make(chan os.Signal, 1)}
	signal.Notify(s.stopping, unix.SIGTERM, unix.SIGINT, unix.SIGQUIT)
	signal.Notify(s.reload, unix.SIGHUP)
	return s
}

// exitOnNext calls f when another stopping signal comes.
func (s *signals) exitOnNext(f func()) {
	go func() {
		if _, ok := <-s.stopping; ok {
			f()
		}
	}()
}

// whileStarting calls f when a stopping signal comes, until over is called, which
// tells whether one has come.
func (s *signals) whileStarting(f func()) (over func() bool) {
	started, came := make(chan struct{}), make(chan bool)
	go func() {
		select {
		case <-s.stopping:
			f()
			<-started
			came <- true
		case <-started:
			came <- false
		}
	}()
	return func() bool {
		close(started)
		return <-came
	}
}

// release gives the stopping signals back their default actions, and returns
// one that has come meanwhile, or nil. A reload is ignored until somebody
// catches signals again: its default would be the end.
func (s *signals) release() os.Signal {
	signal.Stop(s.stopping)
	signal.Ignore(unix.SIGHUP)
	select {
	case sig := <-s.stopping:
		return sig
	default:
		return nil
	}
}

func (s *signals) stop() {
	signal.Stop(s.stopping)
	signal.Stop(s.reload)
	close(s.stopping)
}
