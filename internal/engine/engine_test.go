package engine_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/engine/bufpool"
	"github.com/vmdiskd/vmdiskd/internal/engine/enginetest"
)

func TestPoolPassesTheSuite(t *testing.T) {
	for name, workers := range map[string]int{"one worker": 1, "default": 0} {
		t.Run(name, func(t *testing.T) {
			enginetest.Run(t, t.TempDir(), func(*testing.T, *bufpool.Pool) engine.Engine {
				return engine.NewPool(workers)
			})
		})
	}
}

func TestInlinePoolPassesTheSuite(t *testing.T) {
	enginetest.Run(t, t.TempDir(), func(*testing.T, *bufpool.Pool) engine.Engine { return engine.NewInlinePool(0) })
}

func TestPoolPassesTheSuiteOnTmpfs(t *testing.T) {
	enginetest.Run(t, tmpfs(t), func(*testing.T, *bufpool.Pool) engine.Engine { return engine.NewPool(0) })
}

// tmpfs is a directory on /dev/shm.
func tmpfs(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "engine")
	if err != nil {
		t.Skipf("no tmpfs: %v", err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func TestDoRefusesAnEndedContextBeforeSubmitting(t *testing.T) {
	p := engine.NewPool(1)
	defer p.Close()
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	// An IO without a file would panic in a worker.
	if err := engine.Do(ctx, p, &engine.IO{}); !errors.Is(err, context.Canceled) {
		t.Errorf("Do with an ended context: %v", err)
	}
	if err := engine.Do(context.Background(), p); err != nil {
		t.Errorf("Do of nothing: %v", err)
	}
}

// leaving is an engine whose caller leaves as soon as it has submitted something.
type leaving struct {
	engine.Engine
	leave func()
}

func (l leaving) Submit(batch []*engine.IO) {
	l.Engine.Submit(batch)
	l.leave()
}

// TestDoEndsWithItsContextInTheQueue, whatever has ended that; one that does not end
// has its transfer made.
func TestDoEndsWithItsContextInTheQueue(t *testing.T) {
	for name, tt := range map[string]struct {
		ctx  func(context.Context) context.Context
		want error
	}{
		"canceled":     {func(ctx context.Context) context.Context { return ctx }, context.Canceled},
		"does not end": {context.WithoutCancel, nil},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "disk")
			if err := os.WriteFile(path, make([]byte, 1), 0o600); err != nil {
				t.Fatal(err)
			}
			osf, err := os.OpenFile(path, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			p := engine.NewPool(1)
			defer p.Close()
			f, err := p.Open(osf)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			free := make(chan struct{})
			p.Submit([]*engine.IO{{Op: engine.OpSync, File: f, Done: func(*engine.IO) { <-free }}}) // the only worker
			ctx, cancel := context.WithCancel(t.Context())
			e := leaving{p, func() { cancel(); close(free) }}
			err = engine.Do(tt.ctx(ctx), e, &engine.IO{Op: engine.OpWrite, File: f, Buf: []byte("A")})
			if err != tt.want {
				t.Errorf("write: got %v, want %v", err, tt.want)
			}
			if b, err := os.ReadFile(path); err != nil || (b[0] == 'A') != (tt.want == nil) {
				t.Errorf("the file has %q, %v", b, err)
			}
		})
	}
}

func TestDescribeTellsDirectFilesAndTheirAlignment(t *testing.T) {
	p := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(p, make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name   string
		flags  int
		direct bool
	}{{"buffered", os.O_RDONLY, false}, {"direct", os.O_RDONLY | unix.O_DIRECT, true}} {
		t.Run(tt.name, func(t *testing.T) {
			f, err := os.OpenFile(p, tt.flags, 0)
			if errors.Is(err, syscall.EINVAL) {
				t.Skip("the temporary directory's filesystem has no O_DIRECT")
			}
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			direct, align, err := engine.Describe(f)
			if err != nil || direct != tt.direct {
				t.Fatalf("Describe = %v, %d, %v, want direct %v", direct, align, err, tt.direct)
			}
			if !direct && align != 1 || direct && (align < 512 || align&(align-1) != 0) {
				t.Errorf("alignment %d", align)
			}
		})
	}
}

func TestOpNamesAreVerbs(t *testing.T) {
	for op, want := range map[engine.Op]string{
		engine.OpRead: "read", engine.OpWrite: "write", engine.OpSync: "sync",
		engine.OpPunch: "punch", engine.OpZero: "zero",
	} {
		if op.String() != want {
			t.Errorf("Op %d is %q, want %q", op, op, want)
		}
	}
}

func BenchmarkReadNow(b *testing.B) {
	p := filepath.Join(b.TempDir(), "disk")
	if err := os.WriteFile(p, make([]byte, 1<<20), 0o600); err != nil {
		b.Fatal(err)
	}
	osf, err := os.Open(p)
	if err != nil {
		b.Fatal(err)
	}
	e := engine.NewPool(1)
	defer e.Close()
	f, err := e.Open(osf)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	buf := make([]byte, 4096)
	b.ReportAllocs()
	b.SetBytes(int64(len(buf)))
	for i := 0; b.Loop(); i++ {
		if e.ReadNow(f, buf, int64(i%256)*4096) != len(buf) {
			b.Fatal("not in the page cache")
		}
	}
}

func TestFileThatHangsHoldsUpNoOther(t *testing.T) {
	enginetest.RunSilent(t, t.TempDir(), func(*testing.T, *bufpool.Pool) engine.Engine { return engine.NewPool(0) })
}
