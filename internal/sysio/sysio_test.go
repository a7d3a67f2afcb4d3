package sysio

import (
	"bytes"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

func pair(t *testing.T) (a, b uintptr) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fds[0]); unix.Close(fds[1]) })
	return uintptr(fds[0]), uintptr(fds[1])
}

func file(t *testing.T, content []byte) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "file"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if _, err := f.Write(content); err != nil {
		t.Fatal(err)
	}
	return f
}

func recv(t *testing.T, fd uintptr, n int) []byte {
	t.Helper()
	b := make([]byte, n)
	got, e := TryRecv(fd, b)
	if e != 0 {
		t.Fatalf("recv: %v", e)
	}
	return b[:got]
}

func TestEmptySocketIsEAGAINAndClosedIsZero(t *testing.T) {
	a, b := pair(t)
	if _, e := TryRecv(b, make([]byte, 1)); e != syscall.EAGAIN {
		t.Errorf("empty: got %v, want EAGAIN", e)
	}
	unix.Shutdown(int(a), unix.SHUT_WR)
	if n, e := TryRecv(b, make([]byte, 1)); n != 0 || e != 0 {
		t.Errorf("closed: got %d, %v; want 0", n, e)
	}
}

func TestSendToAClosedSocketIsAnErrorNotASignal(t *testing.T) {
	a, b := pair(t)
	unix.Shutdown(int(b), unix.SHUT_RD)
	if _, e := TrySend(a, []byte("x"), false); e != syscall.EPIPE {
		t.Errorf("got %v, want EPIPE", e)
	}
}

func TestFullSocketIsEAGAIN(t *testing.T) {
	a, _ := pair(t)
	for range 10000 {
		if _, e := TrySend(a, make([]byte, 64<<10), false); e == syscall.EAGAIN {
			return
		} else if e != 0 {
			t.Fatal(e)
		}
	}
	t.Error("socket takes everything")
}

func TestVectorSendsWhatIsLeftAfterSkip(t *testing.T) {
	for skip := 0; skip <= 9; skip++ {
		a, b := pair(t)
		var v Vector
		for _, s := range []string{"abc", "", "de", "fghi"} {
			v.Add([]byte(s))
		}
		if v.Len() != 3 {
			t.Fatalf("buffers: got %d, want 3: an empty one is left out", v.Len())
		}
		v.Skip(skip)
		n, e := TrySendv(a, &v)
		if want := 9 - skip; n != want || e != 0 {
			t.Errorf("skip %d: sent %d, %v; want %d", skip, n, e, want)
		}
		if want := "abcdefghi"[skip:]; want != "" && string(recv(t, b, 16)) != want {
			t.Errorf("skip %d: arrived is not %q", skip, want)
		}
		v.Reset()
		if v.Len() != 0 {
			t.Error("reset vector is not empty")
		}
	}
}

func TestPageCacheReadFindsWhatWasWritten(t *testing.T) {
	want := bytes.Repeat([]byte("page"), 4096)
	f := file(t, want)
	got := make([]byte, len(want)+100)
	n, e := TryPread(f.Fd(), got, 0)
	if n != len(want) || e != 0 || !bytes.Equal(got[:n], want) {
		t.Errorf("got %d bytes, %v; want %d", n, e, len(want))
	}
}

func TestWriteIsRead(t *testing.T) {
	f := file(t, make([]byte, 8192))
	if n, e := Pwrite(f.Fd(), []byte("hello"), 4094); n != 5 || e != 0 {
		t.Errorf("wrote %d, %v", n, e)
	}
	got := make([]byte, 5)
	if n, e := Pread(f.Fd(), got, 4094); n != 5 || e != 0 || string(got) != "hello" {
		t.Errorf("read %d %q, %v", n, got, e)
	}
}

func TestSendfileSendsTheRangeAndStopsAtTheEnd(t *testing.T) {
	a, b := pair(t)
	f := file(t, []byte("0123456789"))
	if n, e := TrySendfile(a, f.Fd(), 3, 4); n != 4 || e != 0 {
		t.Fatalf("got %d, %v; want 4", n, e)
	}
	if got := string(recv(t, b, 16)); got != "3456" {
		t.Errorf("arrived: %q", got)
	}
	if n, e := TrySendfile(a, f.Fd(), 10, 4); n != 0 || e != 0 {
		t.Errorf("behind the end: got %d, %v; want 0", n, e)
	}
}

func TestCachedPagesAreCounted(t *testing.T) {
	f := file(t, make([]byte, 10*os.Getpagesize()))
	pages, e := TryCached(f.Fd(), 0, int64(10*os.Getpagesize()))
	if e == syscall.ENOSYS {
		t.Skip("kernel older than 6.5: cachestat")
	}
	if e != 0 || pages != 10 {
		t.Errorf("got %d, %v; want 10", pages, e)
	}
	if pages, e = TryCached(f.Fd(), int64(20*os.Getpagesize()), 4096); e != 0 || pages != 0 {
		t.Errorf("behind the end: got %d, %v; want 0", pages, e)
	}
}

func TestNoCallAllocates(t *testing.T) {
	a, b := pair(t)
	f := file(t, make([]byte, 8192))
	p := make([]byte, 4096)
	var v Vector
	v.Add(p)
	v.Reset()
	if n := testing.AllocsPerRun(100, func() {
		TryPread(f.Fd(), p, 0)
		Pwrite(f.Fd(), p, 0)
		TrySend(a, p, true)
		TryRecv(b, p)
		v.Add(p)
		TrySendv(a, &v)
		v.Reset()
		TrySendfile(a, f.Fd(), 0, 10)
		TryCached(f.Fd(), 0, 4096)
		for n, e := TryRecv(b, p); n > 0 && e == 0; n, e = TryRecv(b, p) {
		}
	}); n != 0 {
		t.Errorf("allocations: got %v, want 0", n)
	}
}
