package uring

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/engine/bufpool"
)

// childEnv names the part that a test process started by another one plays.
const childEnv = "URING_TEST_CHILD"

// runChild runs the named part in a process of its own, which finds the
// files from descriptor 4 on.
func runChild(t *testing.T, part string, attr *syscall.SysProcAttr, files ...*os.File) {
	t.Helper()
	if e, err := New(Options{}); err != nil {
		t.Skipf("no io_uring: %v", err)
	} else if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	exe, err := os.Open("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	defer exe.Close()
	// The binary may lie where another user cannot reach it: by descriptor.
	cmd := exec.Command("/proc/self/fd/3", "-test.run=^TestChild$", "-test.count=1")
	cmd.ExtraFiles = append([]*os.File{exe}, files...)
	cmd.Dir = "/"
	cmd.Env = append(os.Environ(), childEnv+"="+part)
	cmd.SysProcAttr = attr
	if out, err := cmd.CombinedOutput(); err != nil || !bytes.Contains(out, []byte("PASS")) {
		t.Errorf("child %s: %v\n%s", part, err, out)
	}
}

// TestChild is what runChild runs; on its own it has nothing to do.
func TestChild(t *testing.T) {
	switch part := os.Getenv(childEnv); {
	case part == "":
	case part == "memlock":
		childMemlock(t)
	case part == "unrestricted":
		childUnrestricted(t)
	case strings.HasPrefix(part, "seccomp "):
		var e syscall.Errno
		fmt.Sscanf(part, "seccomp %d", &e)
		childSeccomp(t, e)
	default:
		t.Fatalf("no part %q", part)
	}
}

func TestSeccompRefusalIsExplained(t *testing.T) {
	for _, e := range []syscall.Errno{syscall.EPERM, syscall.ENOSYS} {
		runChild(t, fmt.Sprintf("seccomp %d", e), nil)
	}
}

// childSeccomp makes io_uring_setup answer e in the whole process, as the
// filter of a container does.
func childSeccomp(t *testing.T, e syscall.Errno) {
	filterCalls(t, []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0}, // seccomp_data.nr
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: 1, K: unix.SYS_IO_URING_SETUP},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(e)},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	})
	_, err := New(Options{})
	if !errors.Is(err, e) || !strings.Contains(err.Error(), "seccomp") {
		t.Errorf("New: %v, want %v and a hint at seccomp", err, e)
	}
}

// filterCalls puts all threads of the process under a filter.
func filterCalls(t *testing.T, prog []unix.SockFilter) {
	t.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		t.Fatal(err)
	}
	fprog := unix.SockFprog{Len: uint16(len(prog)), Filter: unsafe.SliceData(prog)}
	_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER,
		unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&fprog)))
	if errno != 0 {
		t.Fatal(errno)
	}
}

func TestRingThatIsNotRestrictedIsRefused(t *testing.T) { runChild(t, "unrestricted", nil) }

// childUnrestricted has the registration of restrictions succeed without
// being done.
func childUnrestricted(t *testing.T) {
	filterCalls(t, []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0}, // seccomp_data.nr
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: 3, K: unix.SYS_IO_URING_REGISTER},
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 24}, // seccomp_data.args[1], its lower half
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: 1, K: registerRestrictions},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	})
	e, err := New(Options{})
	if err == nil {
		err = e.Close()
		t.Fatalf("an engine was made, closed with %v", err)
	}
	if !strings.Contains(err.Error(), "the ring is not restricted") {
		t.Errorf("New: %v, want that it is not restricted", err)
	}
}

func TestMemlockRefusalLeavesTheEngineWorking(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("not root: cannot start a process without CAP_IPC_LOCK")
	}
	var files []*os.File
	for range 2 {
		f := tempFile(t, 8192, os.O_RDWR|unix.O_DIRECT)
		defer f.Close()
		files = append(files, f)
	}
	// Locked memory is counted by user, and given back after the end of a process.
	attr := &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 1<<20 + rand.Uint32N(1<<30), Gid: 65534}}
	runChild(t, "memlock", attr, files...)
}

func childMemlock(t *testing.T) {
	if err := unix.Setrlimit(unix.RLIMIT_MEMLOCK, &unix.Rlimit{Cur: 64 << 10, Max: 64 << 10}); err != nil {
		t.Fatal(err)
	}
	bufs := bufpool.New(64 << 20)
	defer bufs.Close()
	var log bytes.Buffer
	e, err := New(Options{Buffers: bufs, Log: slog.New(slog.NewTextHandler(&log, nil))})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	for fd := range uintptr(2) {
		f, err := e.Open(os.NewFile(4+fd, "disk"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		b := bufs.TryGet(4096)
		io := &engine.IO{Op: engine.OpRead, File: f, Buf: b.Bytes()}
		if err := engine.Do(t.Context(), e, io); err != nil || io.N != 4096 || io.Buf[4095] != 0x5C {
			t.Errorf("read: %d, %v", io.N, err)
		}
		b.Release()
	}
	if n := strings.Count(log.String(), "RLIMIT_MEMLOCK"); e.issuer.fixed || n != 1 {
		t.Errorf("arena registered: %v, %d lines about it, want one:\n%s", e.issuer.fixed, n, log.String())
	}
}

func TestErrorsOfNewNameTheLikelyCause(t *testing.T) {
	for _, tt := range []struct {
		err  error
		want string
	}{
		{syscall.EPERM, "forbids"},
		{syscall.ENOSYS, "older than 5.13"},
		{syscall.EINVAL, "older than 5.13"},
		{syscall.ENOMEM, "RLIMIT_MEMLOCK"},
		{syscall.EMFILE, "too many open files"},
	} {
		got := explain(fmt.Errorf("io_uring_setup: %w", tt.err))
		if !errors.Is(got, tt.err) || !strings.Contains(got.Error(), tt.want) {
			t.Errorf("%v is explained as %q, want %q", tt.err, got, tt.want)
		}
	}
}
