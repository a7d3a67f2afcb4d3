package testenv

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { Main(m) }

func TestMissingToolIsNamedWithItsPackage(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	for name, pkg := range packages {
		if path, err := Tool(name); err != nil {
			if want := "needs " + name + " (package " + pkg + ")"; err.Error() != want {
				t.Errorf("got %q, want %q", err, want)
			}
		} else if !filepath.IsAbs(path) {
			t.Errorf("%s is found at the relative path %q", name, path)
		}
	}
	if _, err := Tool("no-such-tool"); err == nil || !strings.Contains(err.Error(), "no-such-tool") {
		t.Errorf("an unknown tool is answered %v", err)
	}
}

func TestAwaitEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := Await(ctx, func() bool { return false }); err != context.Canceled {
		t.Errorf("got %v, want %v", err, context.Canceled)
	}
	calls := 0
	if err := Await(context.Background(), func() bool { calls++; return calls == 3 }); err != nil || calls != 3 {
		t.Errorf("%d calls, %v; want 3 and no error", calls, err)
	}
}

func TestSocketThatIsBoundDoesNotListenYet(t *testing.T) {
	path := filepath.Join(TempDir(t), "sock")
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: path}); err != nil || Listens(path) {
		t.Fatalf("listens after bind, %v", err)
	}
	if err := unix.Listen(fd, 1); err != nil || !Listens(path) {
		t.Fatalf("does not listen, %v", err)
	}
}

func TestPatternDependsOnTheOffsetOnly(t *testing.T) {
	var whole bytes.Buffer
	const size = 3<<20 + 4096
	if err := WritePattern(&whole, size); err != nil || whole.Len() != size {
		t.Fatalf("%d bytes, %v; want %d", whole.Len(), err, size)
	}
	for _, off := range []int64{0, 8, 4096, 1<<20 - 8, 1 << 20, size - 4096} {
		p := make([]byte, 4096)
		PatternAt(p, off)
		if !bytes.Equal(p[:min(4096, size-off)], whole.Bytes()[off:min(off+4096, size)]) {
			t.Errorf("the pattern at %d differs from the same place of the whole", off)
		}
	}
	if first := binary.LittleEndian.Uint64(whole.Bytes()); first != 1 {
		t.Errorf("the first word is %#x, want 1", first)
	}
}

func TestImagesHaveTheirSizeAndAllocation(t *testing.T) {
	for _, tt := range []struct {
		path  string
		size  int64
		empty bool
	}{
		{PatternImage(t, 1<<20), 1 << 20, false},
		{SparseImage(t, 8<<40), 8 << 40, true},
	} {
		st, err := os.Stat(tt.path)
		if err != nil || st.Size() != tt.size {
			t.Errorf("%s: %v, %v; want %d bytes", tt.path, st, err, tt.size)
		}
		if first, err := os.Open(tt.path); err != nil {
			t.Error(err)
		} else {
			p := make([]byte, 8)
			first.Read(p)
			first.Close()
			if zero := bytes.Equal(p, make([]byte, 8)); zero != tt.empty {
				t.Errorf("%s starts with % x", tt.path, p)
			}
		}
	}
}

func TestURIsAreWhatToolsExpect(t *testing.T) {
	for _, tt := range []struct {
		o    Options
		want string
	}{
		{Options{}, "nbd+unix:///?socket=/tmp/a.sock"},
		{Options{Export: "disk a"}, "nbd+unix:///disk%20a?socket=/tmp/a.sock"},
		{Options{Port: 7}, "nbd://127.0.0.1:7/"},
		{Options{Port: 7, TLSDir: "/tls"}, "nbds://127.0.0.1:7/?tls-certificates=/tls"},
		{Options{TLSDir: "/tls"}, "nbds+unix:///?socket=/tmp/a.sock&tls-certificates=/tls"},
	} {
		if got := uri(tt.o, "/tmp/a.sock"); got != tt.want {
			t.Errorf("%+v: got %q, want %q", tt.o, got, tt.want)
		}
	}
}

func TestUnknownServerIsAnsweredWithTheKnownOnes(t *testing.T) {
	for _, k := range Kinds {
		if got, err := KindByName(k.Name); err != nil || got.Name != k.Name {
			t.Errorf("%s: got %q, %v", k.Name, got.Name, err)
		}
	}
	if _, err := KindByName("nbd-server"); err == nil || !strings.Contains(err.Error(), "qemu-nbd-uring") {
		t.Errorf("got %v", err)
	}
}

func TestEveryReferenceServerServes(t *testing.T) {
	image := PatternImage(t, 1<<20)
	for _, k := range Kinds {
		if k.Program == "" {
			continue
		}
		for name, o := range map[string]Options{
			"unix":   {Image: image},
			"export": {Image: image, Export: "disk"},
			"tcp":    {Image: image, Port: FreePort(t), ReadOnly: true},
		} {
			t.Run(k.Name+"/"+name, func(t *testing.T) {
				Require(t, k.Program, "nbdinfo")
				s, err := k.Launch(Context(t), TempDir(t), o)
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(s.Kill)
				if size := strings.TrimSpace(Run(t, "nbdinfo", "--size", s.URI)); size != "1048576" {
					t.Errorf("size %s, want 1048576", size)
				}
				if err := s.Stop(); err != nil {
					t.Error(err)
				}
			})
		}
	}
}

func TestServerThatCannotStartIsAnErrorWithItsWords(t *testing.T) {
	Require(t, "nbdkit")
	k, err := KindByName("nbdkit")
	if err != nil {
		t.Fatal(err)
	}
	s, err := k.Launch(Context(t), TempDir(t), Options{Image: "/nowhere/disk.img"})
	if err == nil {
		s.Kill()
		t.Fatal("a missing image is served")
	}
	if !strings.Contains(err.Error(), "/nowhere/disk.img") || !strings.Contains(err.Error(), "ended before it answered") {
		t.Errorf("got %q", err)
	}
}

func TestCertificatesHaveTheNamesThatToolsExpect(t *testing.T) {
	dir := Certificates(t)
	for _, name := range []string{"ca-cert.pem", "server-cert.pem", "server-key.pem", "client-cert.pem", "client-key.pem"} {
		if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
			t.Error(err)
		}
	}
}

func TestCacheIsFilledOnceAndOnlyBySuccess(t *testing.T) {
	name := "test-" + filepath.Base(TempDir(t))
	final := filepath.Join(Root(), ".cache", name)
	t.Cleanup(func() {
		os.RemoveAll(final)
		os.Remove(final + ".lock")
	})
	failure := errors.New("no network")
	_, err := Cached(name, func(_ context.Context, dir string) error {
		return errors.Join(failure, os.WriteFile(filepath.Join(dir, "half"), nil, 0o600))
	})
	if !errors.Is(err, failure) {
		t.Fatalf("got %v, want %v", err, failure)
	}
	if _, err := os.Stat(final); err == nil {
		t.Fatal("a failed fill is taken for the whole")
	}
	calls := 0
	for range 2 {
		dir, err := Cached(name, func(_ context.Context, dir string) error {
			calls++
			return os.WriteFile(filepath.Join(dir, "whole"), nil, 0o600)
		})
		if err != nil || dir != final {
			t.Fatalf("got %q, %v; want %q", dir, err, final)
		}
	}
	if _, err := os.Stat(filepath.Join(final, "whole")); err != nil || calls != 1 {
		t.Errorf("%d fills, %v; want one", calls, err)
	}
}
