package nbdtest_test

import (
	"bytes"
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

// startLimit detects a server that does not start.
const startLimit = 20 * time.Second

// process is a server of somebody else's making.
type process struct {
	cmd    *exec.Cmd
	socket string
	output bytes.Buffer
	ended  chan struct{}
}

// socketPath is a path that is short enough for a Unix socket.
func socketPath(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "nbdtest")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return filepath.Join(dir, "nbd.sock")
}

// start runs a server in the foreground and waits until its socket answers.
// The test ends it.
func start(t *testing.T, socket, name string, args ...string) *process {
	t.Helper()
	p := &process{cmd: exec.Command(name, args...), socket: socket, ended: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = &p.output, &p.output
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { _ = p.cmd.Wait(); close(p.ended) }()
	t.Cleanup(func() { p.stop(t) })
	limit := time.NewTimer(startLimit)
	defer limit.Stop()
	again := time.NewTicker(5 * time.Millisecond)
	defer again.Stop()
	for {
		if conn, err := p.dial(t.Context()); err == nil {
			_ = conn.Close()
			return p
		}
		select {
		case <-again.C:
		case <-p.ended:
			t.Fatalf("%s ended before it listened: %s", name, p.output.String())
		case <-limit.C:
			t.Fatalf("%s does not listen", name)
		}
	}
}

func (p *process) dial(ctx context.Context) (net.Conn, error) {
	var d net.Dialer
	return d.DialContext(ctx, "unix", p.socket)
}

// alive fails the test when the server has ended.
func (p *process) alive(t *testing.T) {
	t.Helper()
	select {
	case <-p.ended:
		t.Errorf("%s has ended, %v: %s", p.cmd.Path, p.cmd.ProcessState, p.output.String())
	default:
	}
}

// stop ends the server by its own process ID.
func (p *process) stop(t *testing.T) {
	t.Helper()
	p.alive(t)
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	limit := time.NewTimer(5 * time.Second)
	defer limit.Stop()
	select {
	case <-p.ended:
	case <-limit.C:
		_ = p.cmd.Process.Kill()
		<-p.ended
	}
}

// memoryDir is a file system without a disk below it, where there is one: a
// flush of the images here proves nothing and need not wait.
const memoryDir = "/dev/shm"

// sparseFile makes an image of zeroes.
func sparseFile(t *testing.T, size int64) string {
	t.Helper()
	parent := memoryDir
	if _, err := os.Stat(parent); err != nil {
		parent = ""
	}
	dir, err := os.MkdirTemp(parent, "nbdtest")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	path := filepath.Join(dir, "disk.img")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	return path
}

// rwFlags is what a writable export of a full-grown server offers.
const rwFlags = wire.HasFlags | wire.SendFlush | wire.SendFUA | wire.SendTrim | wire.SendZero |
	wire.SendDF | wire.CanMultiConn | wire.SendCache | wire.SendFastZero
