package progress

import (
	"math"
	"os"
	"strings"
	"sync"
	"testing"
	"time"
)

// clock is a time that the test moves.
type clock struct{ t time.Time }

func (c *clock) now() time.Time          { return c.t }
func (c *clock) advance(d time.Duration) { c.t = c.t.Add(d) }

func bar(width int, total int64) (*Bar, *strings.Builder, *clock) {
	c := &clock{time.Unix(1000, 0)}
	var out strings.Builder
	return newBar(&out, func() int { return width }, c.now, total), &out, c
}

func TestLineSaysHowFarAndHowLong(t *testing.T) {
	b, out, c := bar(120, 1<<30)
	c.advance(2 * time.Second)
	b.Add(256 << 20)
	want := "\r[############--------------------------------------]  25% 256 MiB of 1.00 GiB, 128 MiB/s, 6s left"
	if out.String() != want {
		t.Errorf("got  %q\nwant %q", out.String(), want)
	}
}

func TestCloseShowsTheEnd(t *testing.T) {
	b, out, c := bar(40, 1<<20)
	c.advance(time.Second)
	b.Add(1 << 20)
	b.Close()
	if !strings.HasSuffix(out.String(), "100% 1.00 MiB of 1.00 MiB, 1.00 MiB/s\n") {
		t.Errorf("got %q", out.String())
	}
}

func TestDrawsNoOftenerThanTheInterval(t *testing.T) {
	b, out, c := bar(80, 1000)
	for range 1000 {
		c.advance(time.Millisecond)
		b.Add(1)
	}
	if n := strings.Count(out.String(), "\r"); n != 10 {
		t.Errorf("%d drawings in a second, want 10", n)
	}
}

func TestLineFitsEveryTerminal(t *testing.T) {
	for width := range 200 {
		b, _, c := bar(width, math.MaxInt64)
		c.advance(time.Hour)
		b.done = math.MaxInt64 / 3
		if got := b.line(c.now()); len(got) > max(width-1, 0) {
			t.Errorf("width %d: %d columns: %q", width, len(got), got)
		}
	}
}

func TestShorterLineCoversTheLongerOne(t *testing.T) {
	b, out, c := bar(30, 1<<20)
	c.advance(time.Second)
	b.Add(1 << 10)
	first := len(out.String())
	b.width = func() int { return 12 }
	c.advance(time.Second)
	b.Add(1)
	if second := len(out.String()) - first; second != first {
		t.Errorf("the second drawing has %d columns, the first %d", second, first)
	}
}

func TestMoreWorkThanAnnouncedStaysWithinTheBar(t *testing.T) {
	for _, total := range []int64{0, 1, 100} {
		b, out, c := bar(80, total)
		c.advance(time.Second)
		b.Add(1000)
		if !strings.Contains(out.String(), "100%") {
			t.Errorf("total %d: %q", total, out.String())
		}
	}
}

func TestNilBarIsSilent(t *testing.T) {
	var b *Bar
	b.Add(1)
	b.Close()
}

func TestBarIsSafeForConcurrentUse(t *testing.T) {
	f, err := os.Create(t.TempDir() + "/out")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if IsTerminal(f) {
		t.Error("a file is taken for a terminal")
	}
	b := New(f, 1000)
	var wg sync.WaitGroup
	for range 10 {
		wg.Go(func() {
			for range 100 {
				b.Add(1)
			}
		})
	}
	wg.Wait()
	b.Close()
	got, err := os.ReadFile(f.Name())
	if err != nil || !strings.Contains(string(got), "100%") {
		t.Errorf("got %q, %v", got, err)
	}
}

func TestBytesHasThreeDigitsAndAUnit(t *testing.T) {
	for _, tt := range []struct {
		n    int64
		want string
	}{
		{0, "0 B"}, {1, "1 B"}, {1023, "1023 B"}, {-5, "-5 B"},
		{1024, "1.00 KiB"}, {1536, "1.50 KiB"}, {10 << 10, "10.0 KiB"}, {100 << 10, "100 KiB"},
		{1 << 20, "1.00 MiB"}, {1000 << 10, "0.98 MiB"}, {999 << 10, "999 KiB"},
		{1 << 40, "1.00 TiB"}, {math.MaxInt64, "8.00 EiB"},
	} {
		if got := Bytes(tt.n); got != tt.want {
			t.Errorf("Bytes(%d) = %q, want %q", tt.n, got, tt.want)
		}
	}
}
