package interop

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
	"github.com/vmdiskd/vmdiskd/test/testenv"
)

var errDiffers = errors.New("what is read differs from what was written")

func TestFlushedWritesOutliveAKilledServer(t *testing.T) {
	image := testenv.SparseImage(t, diskSize)
	s := testenv.StartToKill(t, testenv.Options{Image: image})
	ctx := testenv.Context(t)
	c := dial(t, s)
	want := make([]byte, 1<<20)
	for off := int64(0); off < diskSize; off += int64(len(want)) {
		testenv.PatternAt(want, off)
		if err := c.WriteAt(ctx, want, off, 0); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.Flush(ctx); err != nil {
		t.Fatal(err)
	}
	s.Kill()
	if err := c.ReadAt(ctx, want, 0); err == nil {
		t.Error("a read from a dead server succeeds")
	}
	sameFiles(t, testenv.PatternImage(t, diskSize), image, -1)

	again := dial(t, testenv.Start(t, testenv.Options{Image: image}))
	got := make([]byte, len(want))
	if err := again.ReadAt(ctx, got, diskSize-int64(len(got))); err != nil || !bytes.Equal(got[:8], lastPattern()) {
		t.Errorf("after the restart: %v, % x", err, got[:8])
	}
}

// lastPattern is how the last MiB of a patterned disk begins.
func lastPattern() []byte {
	p := make([]byte, 8)
	testenv.PatternAt(p, diskSize-1<<20)
	return p
}

func TestStoppedServerAnswersWhenItGoesOn(t *testing.T) {
	s := serve(t, testenv.Options{})
	ctx := testenv.Context(t)
	c := dial(t, s)
	if err := s.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	if err := testenv.Await(ctx, func() bool { return state(s.Pid()) == 'T' }); err != nil {
		t.Fatal(err)
	}
	const reads = 32
	results := make(chan error, reads)
	for i := range int64(reads) {
		go func() { results <- readPattern(ctx, c, i<<19) }()
	}
	resume := time.NewTimer(2 * time.Second)
	defer resume.Stop()
	select {
	case err := <-results:
		t.Errorf("a stopped server has answered: %v", err)
	case <-resume.C:
	}
	if err := s.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	for range reads {
		if err := <-results; err != nil {
			t.Error(err)
		}
	}
}

// reader is what readPattern reads from.
type reader interface {
	ReadAt(ctx context.Context, p []byte, off int64) error
}

func readPattern(ctx context.Context, r reader, off int64) error {
	got, want := make([]byte, 64<<10), make([]byte, 64<<10)
	testenv.PatternAt(want, off)
	if err := r.ReadAt(ctx, got, off); err != nil {
		return err
	}
	if !bytes.Equal(got, want) {
		return fmt.Errorf("at %d: %w", off, errDiffers)
	}
	return nil
}

// state returns the letter of the process's state, 0 if it is gone.
func state(pid int) byte {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	_, after, ok := strings.Cut(string(text), ") ")
	if !ok || after == "" {
		return 0
	}
	return after[0]
}

func TestServerOutlivesResetsWithRequestsInFlight(t *testing.T) {
	if testenv.Under(t).Name == "nbdkit" {
		t.Skip("packaged nbdkit aborts when a client vanishes with replies pending")
	}
	port := testenv.FreePort(t)
	s := serve(t, testenv.Options{Port: port})
	ctx := testenv.Context(t)
	address := fmt.Sprintf("127.0.0.1:%d", port)
	before := descriptors(t, s.Pid())
	for range 20 {
		reset(t, address, 128)
	}
	if err := testenv.Await(ctx, func() bool { return descriptors(t, s.Pid()) <= before }); err != nil {
		t.Errorf("%d file descriptors, %d before the resets", descriptors(t, s.Pid()), before)
	}
	testenv.Require(t, "nbdinfo")
	testenv.Run(t, "nbdinfo", s.URI)
}

// reset opens the export, sends reads of 1 MiB and resets the connection
// without reading any answer.
func reset(t *testing.T, address string, requests int) {
	t.Helper()
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	enterTransmission(t, conn)
	var out []byte
	for i := range requests {
		out = wire.AppendRequest(out, wire.Request{
			Cmd: wire.CmdRead, Cookie: uint64(i), Off: uint64(i%8) << 20, Len: 1 << 20,
		})
	}
	if _, err := conn.Write(out); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(conn, make([]byte, 16)); err != nil { // they are being served
		t.Fatal(err)
	}
	if err := conn.(*net.TCPConn).SetLinger(0); err != nil {
		t.Fatal(err)
	}
	if err := conn.Close(); err != nil {
		t.Fatal(err)
	}
}

// enterTransmission chooses the default export by NBD_OPT_EXPORT_NAME.
func enterTransmission(t *testing.T, conn net.Conn) {
	t.Helper()
	if _, err := io.ReadFull(conn, make([]byte, 18)); err != nil {
		t.Fatal(err)
	}
	hello := []byte{0, 0, 0, wire.FlagFixedNewstyle | wire.FlagNoZeroes}
	if _, err := conn.Write(wire.AppendOption(hello, wire.OptExportName, nil)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(conn, make([]byte, 10)); err != nil {
		t.Fatal(err)
	}
}

func descriptors(t *testing.T, pid int) int {
	t.Helper()
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

func TestTruncatedImageIsAnErrorNotZeroes(t *testing.T) {
	image := testenv.PatternImage(t, diskSize)
	s := serve(t, testenv.Options{Image: image})
	ctx := testenv.Context(t)
	c := dial(t, s)
	if err := os.Truncate(image, diskSize/2); err != nil {
		t.Fatal(err)
	}
	err := c.ReadAt(ctx, make([]byte, 4096), diskSize-4096)
	if !errors.Is(err, wire.EIO) {
		t.Errorf("a small read beyond the end is answered %v, want EIO", err)
	}
	if err := readPattern(ctx, c, 0); err != nil {
		t.Errorf("what is still there: %v", err)
	}
	// A large read may have its header out already: then the server hangs up.
	large := dial(t, s)
	if err := large.ReadAt(ctx, make([]byte, 1<<20), diskSize/2-512<<10); err == nil {
		t.Error("a large read across the end succeeds")
	}
	if err := readPattern(ctx, dial(t, s), 1<<20); err != nil {
		t.Errorf("a new connection: %v", err)
	}
}
