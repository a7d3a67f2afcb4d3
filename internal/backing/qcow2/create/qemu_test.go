package create

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
)

const combinations = 60

func qemu(t testing.TB, program string, args ...string) string {
	t.Helper()
	out, err := exec.Command(program, args...).CombinedOutput()
	if err != nil {
		t.Errorf("%s %s: %v\n%s", program, strings.Join(args, " "), err, out)
	}
	return string(out)
}

func pick[T any](r *rand.Rand, v ...T) T { return v[r.IntN(len(v))] }

// guess makes options of which check may refuse some.
func guess(r *rand.Rand, dir string) Options {
	o := Options{
		Version: pick(r, 2, 3, 3, 3), ClusterSize: pick[int64](r, 512, 1<<10, 4<<10, 64<<10, 256<<10, 2<<20),
		RefcountBits: pick(r, 1, 2, 4, 8, 16, 16, 32, 64), ExtendedL2: r.IntN(2) == 0,
		Compression:   pick(r, format.Deflate, format.Zstd),
		Preallocation: pick(r, Off, Metadata, Falloc, Full),
	}
	o.Size = pick(r, 0, 512, o.ClusterSize-512, o.ClusterSize, o.ClusterSize+512, 3<<20+7*512, 16<<20)
	if o.Version == 2 {
		o.RefcountBits, o.ExtendedL2, o.Compression = 16, false, format.Deflate
	}
	o.ExtendedL2 = o.ExtendedL2 && o.ClusterSize >= minExtended
	switch r.IntN(4) {
	case 0:
		o.Backing, o.BackingFormat = filepath.Join(dir, "base.raw"), "raw"
	case 1:
		o.Backing, o.BackingFormat = filepath.Join(dir, "base.qcow2"), "qcow2"
	case 2:
		if o.Version == 3 {
			o.DataFile, o.DataFileRaw = "data", r.IntN(2) == 0
		}
	}
	if o.Backing != "" && !o.ExtendedL2 {
		o.Preallocation = Off
	}
	return o
}

// TestQEMUFindsNewImagesSound makes images of random options and lets qemu-img
// judge each and compare it with its own.
func TestQEMUFindsNewImagesSound(t *testing.T) {
	const seed = 3
	r := rand.New(rand.NewPCG(seed, 0))
	base := t.TempDir()
	makeBases(t, base)
	for i := range combinations {
		o := guess(r, base)
		t.Run(fmt.Sprintf("%02d-%s", i, o.text()), func(t *testing.T) {
			dir := t.TempDir()
			ours, theirs := filepath.Join(dir, "ours"), filepath.Join(dir, "theirs")
			if o.DataFile != "" {
				o.DataFile = filepath.Join(dir, "ours.data")
				o.Data = fileStore(t, o.DataFile)
			}
			st := fileStore(t, ours)
			must(t, Image(context.Background(), st, o))
			must(t, st.Close())
			if o.Data != nil {
				must(t, o.Data.Close())
			}
			makeTheirs(t, o, theirs)
			qemu(t, "qemu-img", "check", "-q", "-f", "qcow2", ours)
			qemu(t, "qemu-img", "compare", "-q", "-f", "qcow2", "-F", "qcow2", ours, theirs)
			compareInfo(t, ours, theirs)
			compareSizes(t, o, ours, theirs)
			write(t, ours, o)
		})
	}
}

func (o Options) text() string {
	return fmt.Sprintf("v%d-%d-rc%d-ext=%v-%d-%s-%s-%v-%v-%d", o.Version, o.ClusterSize, o.RefcountBits,
		o.ExtendedL2, o.Compression, o.Preallocation, o.BackingFormat, o.DataFile != "", o.DataFileRaw, o.Size)
}

func makeBases(t *testing.T, dir string) {
	t.Helper()
	raw := filepath.Join(dir, "base.raw")
	must(t, os.WriteFile(raw, []byte(strings.Repeat("what lies below ", 100<<10)), 0o600))
	qemu(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, filepath.Join(dir, "base.qcow2"))
}

// makeTheirs lets qemu-img make an image of the same options.
func makeTheirs(t *testing.T, o Options, path string) {
	t.Helper()
	s := fmt.Sprintf("compat=%s,cluster_size=%d,preallocation=%s", map[int]string{2: "0.10", 3: "1.1"}[o.Version],
		o.ClusterSize, o.Preallocation)
	if o.Version == 3 {
		s += fmt.Sprintf(",refcount_bits=%d,extended_l2=%v,compression_type=%s", o.RefcountBits,
			onOff(o.ExtendedL2), map[format.Compression]string{0: "zlib", 1: "zstd"}[o.Compression])
	}
	if o.DataFile != "" {
		s += fmt.Sprintf(",data_file=%s.data,data_file_raw=%s", path, onOff(o.DataFileRaw))
	}
	args := []string{"create", "-q", "-f", "qcow2", "-o", s}
	if o.Backing != "" {
		args = append(args, "-b", o.Backing, "-F", o.BackingFormat)
	}
	qemu(t, "qemu-img", append(args, path, fmt.Sprint(o.Size))...)
}

func onOff(on bool) string {
	if on {
		return "on"
	}
	return "off"
}

// compareInfo compares what qemu-img says of two images, but for names and
// space.
func compareInfo(t *testing.T, ours, theirs string) {
	t.Helper()
	var said [2]string
	for i, path := range []string{ours, theirs} {
		var info map[string]any
		out := qemu(t, "qemu-img", "info", "--output=json", "-f", "qcow2", path)
		must(t, json.Unmarshal([]byte(out), &info))
		delete(info, "actual-size")
		b, err := json.Marshal(info)
		must(t, err)
		said[i] = strings.ReplaceAll(string(b), path, "PATH")
	}
	if said[0] != said[1] {
		t.Errorf("qemu-img info says\n%s, of its own\n%s", said[0], said[1])
	}
}

// compareSizes allows a few clusters that are not shared or not filled.
func compareSizes(t *testing.T, o Options, ours, theirs string) {
	t.Helper()
	a, b := stat(t, ours), stat(t, theirs)
	slack := 4*o.ClusterSize + b.Size/50
	if a.Size > b.Size+slack || a.Size < b.Size-slack {
		t.Errorf("file has %d bytes, that of qemu-img %d", a.Size, b.Size)
	}
	if a.Blocks*512 > b.Blocks*512+slack || (o.Preallocation == Full || o.Preallocation == Falloc) && a.Blocks*512 < b.Blocks*512-slack {
		t.Errorf("file takes %d bytes, that of qemu-img %d", a.Blocks*512, b.Blocks*512)
	}
	if o.DataFile == "" {
		return
	}
	// QEMU makes its own a cluster longer at times, and does not allocate it.
	a = stat(t, o.DataFile)
	if a.Size != o.Size {
		t.Errorf("data file has %d bytes, the disk %d", a.Size, o.Size)
	}
	allocate := o.Preallocation == Falloc || o.Preallocation == Full
	if allocate && a.Blocks*512 < o.Size || !allocate && a.Blocks*512 > 4096 {
		t.Errorf("data file takes %d bytes with preallocation %s", a.Blocks*512, o.Preallocation)
	}
}

func stat(t testing.TB, path string) (st syscall.Stat_t) {
	t.Helper()
	must(t, syscall.Stat(path, &st))
	return st
}

// write lets QEMU use the image, which then is still sound.
func write(t *testing.T, path string, o Options) {
	t.Helper()
	if o.Size == 0 {
		return
	}
	n := min(o.Size, 100<<10)
	qemu(t, "qemu-io", "-f", "qcow2", "-c", fmt.Sprintf("write -q -P 7 0 %d", n),
		"-c", fmt.Sprintf("write -q -P 8 %d 512", o.Size-512),
		"-c", fmt.Sprintf("read -q -P 7 0 %d", min(n, o.Size-512)), path)
	qemu(t, "qemu-img", "check", "-q", "-f", "qcow2", path)
}

// TestQEMUReadsNamesWithColons as those of files, in the words of format.FileName.
func TestQEMUReadsNamesWithColons(t *testing.T) {
	for _, name := range []string{"vm:1.raw", "file:x.raw", "json:{}", ":", "plain.raw", "a b:c"} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			base, top := filepath.Join(dir, name), filepath.Join(dir, "top.qcow2")
			must(t, os.WriteFile(base, make([]byte, 64<<10), 0o600))
			st := fileStore(t, top)
			o := Options{Size: 64 << 10, Backing: format.FileName(name), BackingFormat: "raw"}
			must(t, Image(context.Background(), st, o))
			must(t, st.Close())
			qemu(t, "qemu-io", "-f", "qcow2", "-c", "write -q -P 7 0 64k", top)
			qemu(t, "qemu-img", "commit", "-q", "-f", "qcow2", top)
			b, err := os.ReadFile(base)
			must(t, err)
			if want := strings.Repeat("\x07", 64<<10); string(b) != want {
				t.Errorf("commit has left %x… in %q, want 07", b[:4], name)
			}
		})
	}
}
