package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/backing/open"
	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// storage answers for images, of which the first ones hang until it is mended.
type storage struct {
	hung   int
	asked  int // guarded by the turn
	mended chan struct{}
}

func (s *storage) ask(turns chan struct{}) func(context.Context, int) gathered {
	return func(_ context.Context, i int) gathered {
		turns <- struct{}{}
		s.asked++
		<-turns
		if i < s.hung {
			<-s.mended
		}
		return gathered{table: open.NewTable(nil, nil)}
	}
}

// TestStorageThatHangsLeavesOthersTheirTime: however many images are silent, all
// are done in limits.ImageAnswers, and those that answer have answered.
func TestStorageThatHangsLeavesOthersTheirTime(t *testing.T) {
	for _, tt := range []struct {
		hung, well int
		turns      int // of those that hang and are asked
	}{
		{0, 3 * limits.ImagesAtOnce, 0},
		{3*limits.ImagesAtOnce + 1, 3 * limits.ImagesAtOnce, 3*limits.ImagesAtOnce + 1},
		{limits.ImagesAsked + 5, 0, limits.ImagesAsked},
	} {
		t.Run(fmt.Sprint(tt.hung, " hang, ", tt.well, " do not"), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := &storage{hung: tt.hung, mended: make(chan struct{})}
				var a asking
				began := time.Now()
				out := a.all(t.Context(), tt.hung+tt.well, s.ask(make(chan struct{}, 1)))
				if took := time.Since(began); took > limits.ImageAnswers {
					t.Errorf("it took %v, want %v at most", took, limits.ImageAnswers)
				}
				for i, g := range out {
					if hangs := i < tt.hung; hangs != errors.Is(g.err, errNoAnswer) || hangs != (g.table == nil) {
						t.Errorf("image %d: got %+v", i, g)
					}
					if turn := i >= tt.hung || i < tt.turns; turn == errors.Is(g.err, errNoTurn) {
						t.Errorf("image %d: got %v, it had a turn: %v", i, g.err, turn)
					}
				}
				synctest.Wait()
				if want := tt.turns + tt.well; s.asked != want {
					t.Errorf("%d images were asked for, want %d", s.asked, want)
				}
				close(s.mended)
				synctest.Wait()
				if n := len(a.places()); n != 0 {
					t.Errorf("%d calls have places when all have ended", n)
				}
			})
		})
	}
}

// TestImagesThatGoOnHangingAreBounded: each reload asks for them anew, and what it
// has given up goes on.
func TestImagesThatGoOnHangingAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &storage{hung: limits.ImagesAsked, mended: make(chan struct{})}
		var a asking
		turns := make(chan struct{}, 1)
		for range 5 {
			a.all(t.Context(), limits.ImagesAsked/2, s.ask(turns))
		}
		if s.asked != limits.ImagesAsked {
			t.Errorf("%d calls hang, want %d", s.asked, limits.ImagesAsked)
		}
		ctx, cancel := context.WithTimeout(t.Context(), limits.ImageAnswers)
		defer cancel()
		if g := a.one(ctx, func() gathered { return gathered{} }); !errors.Is(g.err, errNoTurn) {
			t.Errorf("one more: got %v, want %v", g.err, errNoTurn)
		}
		close(s.mended)
		synctest.Wait()
		if g := a.one(t.Context(), func() gathered { return gathered{} }); g.err != nil {
			t.Errorf("when the storage is well again: %v", g.err)
		}
	})
}

// poolMemory is how much is mapped as buffers are, whether or not it is resident: in
// KiB, of what is left out of core dumps.
func poolMemory(t *testing.T) (total int) {
	t.Helper()
	b, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	size := 0
	for line := range strings.Lines(string(b)) {
		key, value, _ := strings.Cut(line, ":")
		switch words := strings.Fields(value); {
		case key == "Size":
			if size, err = strconv.Atoi(words[0]); err != nil {
				t.Fatal(err)
			}
		case key == "VmFlags" && slices.Contains(words, "dd"):
			total += size
		}
	}
	return total
}

// TestGatheringLeavesNoMemory: however many images are gathered, what they were read
// with is one pool.
func TestGatheringLeavesNoMemory(t *testing.T) {
	d := emptyService(t)
	x := config.Export{Name: "x", Image: filepath.Join(t.TempDir(), "x"), Cache: open.CacheNone}
	if err := os.WriteFile(x.Image, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	gather := func() {
		t.Helper()
		one, err := d.gather(t.Context(), &x, nil)
		if err != nil {
			t.Fatal(err)
		}
		one.Close()
		for _, g := range d.gatherAll([]sought{{Export: x}, {Export: x}}) {
			if g.err != nil {
				t.Fatal(g.err)
			}
			g.table.Close()
		}
	}
	gather()
	before := poolMemory(t)
	for range 50 {
		gather()
	}
	if more := poolMemory(t) - before; more > limits.RingArena>>10 {
		t.Errorf("150 images that were gathered leave %d KiB mapped", more)
	}
	if n, bytes := d.asking.memory().Outstanding(); n != 0 {
		t.Errorf("%d buffers of %d bytes are lent when all calls have ended", n, bytes)
	}
}

// TestSilentExportsAreKnownAfterTheExec, however many: they are longer than a
// variable of the environment may be.
func TestSilentExportsAreKnownAfterTheExec(t *testing.T) {
	silent := map[string]bool{}
	for i := range limits.ConfigExports {
		silent[fmt.Sprintf("%s %d", strings.Repeat("x", 100), i)] = i%2 == 0
	}
	f, err := keepSilent(silent)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fd, err := unix.Dup(int(f.Fd())) // takeSilent closes it
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv(silentVar, fmt.Sprint(fd))
	got, err := takeSilent()
	if err != nil || len(got) != len(silent) {
		t.Fatalf("got %d exports, %v, want %d", len(got), err, len(silent))
	}
	h := &Handed{in: handover{Silent: got}}
	var list []*disk
	for _, name := range []string{"answers", strings.Repeat("x", 100) + " 0", strings.Repeat("x", 100) + " 1"} {
		list = append(list, &disk{cfg: config.Export{Name: name, Image: "/i"}})
	}
	out := h.gathered(list)
	if out[0].err != nil || !errors.Is(out[1].err, errNoAnswer) || errors.Is(out[1].err, errNoTurn) || !errors.Is(out[2].err, errNoTurn) {
		t.Errorf("errors of the worker: %v, %v, %v", out[0].err, out[1].err, out[2].err)
	}
}
