package qcow2_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/bitmaps"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/storetest"
)

// Sizes of the disks that grow, neither a multiple of what a bit stands for.
const (
	smallDisk = 3<<20 + 512
	largeDisk = 40<<20 + 5*512
)

// marked is an image with bitmaps in whose last bytes are dirty: on and fine are
// enabled, off is not.
func marked(t *testing.T, cluster int) []byte {
	t.Helper()
	dir := t.TempDir()
	path := filepath.Join(dir, "t")
	q := func(args ...string) { qemu(t, dir, args[0], args[1:]...) }
	q("qemu-img", "create", "-q", "-f", "qcow2", "-o", fmt.Sprintf("cluster_size=%d", cluster), path, fmt.Sprint(smallDisk))
	q("qemu-img", "bitmap", "--add", "-g", "64k", path, "on")
	q("qemu-img", "bitmap", "--add", "-g", "512", path, "fine")
	q("qemu-img", "bitmap", "--add", "-g", "4k", path, "off")
	q("qemu-io", "-f", "qcow2", "-c", "write -q -P 3 0 3146240", path)
	q("qemu-img", "bitmap", "--disable", path, "off")
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// bits are the bitmaps of an image that is not open, as text; size is that of
// its disk.
func bits(t *testing.T, st *storetest.Mem) (text map[string]string, size int64) {
	t.Helper()
	d := openQuiet(t, st, true)
	defer st.Reopen()
	defer d.Close()
	text = map[string]string{}
	for _, name := range d.(backing.Describer).Descriptions() {
		if short, is := strings.CutPrefix(name, "qemu:dirty-bitmap:"); is {
			text[short] = fmt.Sprint(statuses(t, d, name))
		}
	}
	return text, d.Info().Size
}

func resize(t *testing.T, d backing.Device, size int64) {
	t.Helper()
	if err := d.(backing.Resizer).Resize(t.Context(), size); err != nil {
		t.Fatalf("resize to %d: %v", size, err)
	}
}

func TestBitmapsGrowAsThoseOfQEMU(t *testing.T) {
	for _, cluster := range []int{512, 4096, 64 << 10} {
		t.Run(fmt.Sprint(cluster), func(t *testing.T) {
			image := marked(t, cluster)
			dir := t.TempDir()
			theirs, ours := filepath.Join(dir, "theirs"), filepath.Join(dir, "ours")
			st := storetest.New(image)
			d := openQuiet(t, st, false)
			resize(t, d, largeDisk)
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
			st.Reopen()
			wantSound(t, st, 0)
			for path, b := range map[string][]byte{theirs: image, ours: st.Contents()} {
				if err := os.WriteFile(path, b, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			qemu(t, dir, "qemu-img", "resize", "-q", "-f", "qcow2", theirs, fmt.Sprint(largeDisk))
			qemu(t, dir, "qemu-img", "check", "-q", "-f", "qcow2", ours)
			b, err := os.ReadFile(theirs)
			if err != nil {
				t.Fatal(err)
			}
			want, _ := bits(t, storetest.New(b))
			got, size := bits(t, st)
			if fmt.Sprint(got) != fmt.Sprint(want) || size != largeDisk || len(got) != 3 {
				t.Errorf("disk of %d bytes has\n%v\nQEMU's has\n%v", size, got, want)
			}
			// QEMU takes them as its own.
			for _, name := range []string{"on", "fine", "off"} {
				qemu(t, dir, "qemu-img", "bitmap", "--clear", "-f", "qcow2", ours, name)
			}
			qemu(t, dir, "qemu-img", "check", "-q", "-f", "qcow2", ours)
		})
	}
}

// TestBitmapsGrowWhileWritesMarkThem: no write before, at the same time or after
// is lost, and nothing else is marked.
func TestBitmapsGrowWhileWritesMarkThem(t *testing.T) {
	const step = 64 << 10
	st := storetest.New(marked(t, 4096))
	d := openQuiet(t, st, false)
	if err := d.(interface{ Bitmaps() *bitmaps.Set }).Bitmaps().Clear("fine"); err != nil {
		t.Fatal(err)
	}
	var want []backing.Status
	write := func(off int64) {
		if err := d.WriteAt(t.Context(), make([]byte, 512), off, 0); err != nil {
			t.Error(err)
		}
	}
	done := int64(0) // what is written so far ends here
	for _, next := range []int64{5 << 20, 17<<20 + 512, largeDisk - 512, largeDisk, largeDisk + 512} {
		size := d.Info().Size
		var wg sync.WaitGroup
		for from := done; done+512 <= size; done += step {
			want = append(want, backing.Status{Len: 512, Value: 1}, backing.Status{Len: step - 512})
			if done == from {
				wg.Go(func() {
					for off := from; off+512 <= size; off += step {
						write(off)
					}
				})
			}
		}
		resize(t, d, next)
		wg.Wait()
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	st.Reopen()
	wantSound(t, st, 0)
	want[len(want)-1].Len += largeDisk + 512 - done
	got, _ := bits(t, st)
	if got["fine"] != fmt.Sprint(want) {
		t.Errorf("got  %s\nwant %v", got["fine"], want)
	}
}

// TestPowerCutWhileBitmapsGrow: at each change of the file the bitmaps are those
// of the disk that the image has, or are not to be believed.
func TestPowerCutWhileBitmapsGrow(t *testing.T) {
	image := marked(t, 512)
	small, _ := bits(t, storetest.New(image))
	grown := storetest.New(image)
	d := openQuiet(t, grown, false)
	resize(t, d, largeDisk)
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	grown.Reopen()
	large, _ := bits(t, grown)

	rnd, dir := rand.New(rand.NewPCG(1, 2)), t.TempDir()
	c := storetest.NewCrash(storetest.New(image))
	dev, err := qcow2.Open(t.Context(), c, quiet())
	if err != nil {
		t.Fatal(err)
	}
	seen, states := map[string]int{}, 0
	c.SetHook(func(storetest.Call) {
		for name, st := range c.Crashes(rnd, 3) {
			states++
			wantSound(t, st, 1<<20)
			if states%20 == 0 {
				if _, err := judged(dir, st.Contents()); err != nil {
					t.Errorf("%s: %v", name, err)
				}
			}
			got, size := bits(t, st)
			want := map[int64]map[string]string{smallDisk: small, largeDisk: large}[size]
			for name, text := range got {
				if text != want[name] {
					t.Errorf("%s: disk of %d bytes: bitmap %q is %s, want %s", name, size, name, text, want[name])
				}
			}
			seen[fmt.Sprint(size, " ", len(got))]++
		}
	})
	err = dev.(backing.Resizer).Resize(t.Context(), largeDisk)
	err = errors.Join(err, dev.Close())
	c.SetHook(nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{fmt.Sprint(smallDisk, " ", 3), fmt.Sprint(smallDisk, " ", 0), fmt.Sprint(largeDisk, " ", 0), fmt.Sprint(largeDisk, " ", 3)} {
		if seen[want] == 0 {
			t.Errorf("no state has size and bitmaps %s: %v", want, seen)
		}
	}
	t.Logf("%d states: %v", states, seen)
}

// TestDiskWithAnInconsistentBitmapDoesNotGrow: as in QEMU, it has to be removed
// first.
func TestDiskWithAnInconsistentBitmapDoesNotGrow(t *testing.T) {
	c := storetest.New(marked(t, 4096))
	d := openQuiet(t, c, false)
	if err := d.WriteAt(t.Context(), []byte{1}, 0, backing.FUA); err != nil {
		t.Fatal(err)
	}
	left := c.Clone() // as a crash leaves it
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	d = openQuiet(t, left, false)
	defer d.Close()
	err := d.(backing.Resizer).Resize(t.Context(), largeDisk)
	if !errors.Is(err, backing.ErrNotSupported) || !strings.Contains(err.Error(), `"on"`) && !strings.Contains(err.Error(), `"fine"`) {
		t.Errorf("got %v, want %v for a bitmap", err, backing.ErrNotSupported)
	}
	if got := d.Info().Size; got != smallDisk {
		t.Errorf("size: got %d", got)
	}
}
