package qcowtest

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
)

// builder makes one image with its chain in a folder of its own.
type builder struct {
	ctx    context.Context
	dir    string
	source string // file of random bytes
	rnd    *rand.Rand
}

// run runs a program in the folder.
func (b *builder) run(program string, args ...string) error {
	cmd := exec.CommandContext(b.ctx, program, args...)
	cmd.Dir = b.dir
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s %q: %w\n%s", program, args, err, out)
	}
	return nil
}

// build makes the chain from its end and returns the path of the top image.
func (b *builder) build(o Options, seed uint64) (string, error) {
	b.rnd = rand.New(rand.NewPCG(seed, 1))
	if err := os.MkdirAll(b.dir, 0o755); err != nil {
		return "", err
	}
	backing, format, err := b.chain(o)
	if err != nil {
		return "", err
	}
	return filepath.Join(b.dir, "top.qcow2"), b.image("top.qcow2", o, o.Size(), backing, format)
}

// chain makes what lies below the top image and names its uppermost layer.
func (b *builder) chain(o Options) (name, format string, err error) {
	size := o.Size()
	smaller := size / 2 / 512 * 512
	depth := 1
	switch o.Backing {
	case NoBacking:
		return "", "", nil
	case RawEqual:
		return b.raw(size)
	case RawSmaller:
		return b.raw(smaller)
	case RawLarger:
		return b.raw(size + 5*512)
	case Qcow2Small:
		size = smaller
	case Qcow2Depth2:
		depth = 2
	case Qcow2Depth5:
		depth = 5
	}
	sizes := []int64{64 << 10, 512, 4 << 10, 2 << 20, 256 << 10}
	for i := range depth {
		layer := Options{Compat: "1.1", ClusterSize: sizes[i], RefcountBits: 16, Compression: "zlib",
			Preallocation: "off"}
		below := name
		name = fmt.Sprintf("layer%d.qcow2", i)
		if err := b.image(name, layer, size, below, format); err != nil {
			return "", "", err
		}
		format = "qcow2"
	}
	return name, format, nil
}

// raw makes a raw file of random bytes with a hole.
func (b *builder) raw(size int64) (name, format string, err error) {
	f, err := os.Create(filepath.Join(b.dir, "base.raw"))
	if err != nil {
		return "", "", err
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		return "", "", err
	}
	p, err := os.ReadFile(b.source)
	if err != nil {
		return "", "", err
	}
	for _, part := range []int64{0, size / 2, size - int64(len(p))} {
		n := min(int64(len(p)), size)
		if part = max(0, min(part, size-n)); n == 0 {
			break
		}
		if _, err := f.WriteAt(p[:n], part); err != nil {
			return "", "", err
		}
	}
	return "base.raw", "raw", nil
}

// image makes one qcow2 image and writes to it.
func (b *builder) image(name string, o Options, size int64, backing, format string) error {
	args := []string{"create", "-q", "-f", "qcow2", "-o", b.createOptions(name, o)}
	if backing != "" {
		args = append(args, "-b", backing, "-F", format)
	}
	if err := b.run("qemu-img", append(args, name, fmt.Sprint(size))...); err != nil {
		return err
	}
	for i := range o.Bitmaps {
		if err := b.run("qemu-img", "bitmap", "--add", "-f", "qcow2", name, fmt.Sprintf("bitmap%d", i)); err != nil {
			return err
		}
	}
	if err := b.write(name, b.compressed(o, size)); err != nil {
		return err
	}
	for i := range o.Snapshots {
		if err := b.write(name, b.mixed(o, size, mixedOps/2)); err != nil {
			return err
		}
		if err := b.run("qemu-img", "snapshot", "-c", fmt.Sprintf("snapshot%d", i), name); err != nil {
			return err
		}
	}
	return b.write(name, b.mixed(o, size, mixedOps))
}

// createOptions is the -o of qemu-img create.
func (b *builder) createOptions(name string, o Options) string {
	s := fmt.Sprintf("compat=%s,cluster_size=%d", o.Compat, o.ClusterSize)
	if o.Compat == "1.1" {
		s += fmt.Sprintf(",refcount_bits=%d,extended_l2=%s,lazy_refcounts=%s", o.RefcountBits,
			onOff(o.ExtendedL2), onOff(o.LazyRefcounts))
	}
	if o.Compression == "zstd" {
		s += ",compression_type=zstd"
	}
	if o.DataFile != "" {
		s += fmt.Sprintf(",data_file=%s,data_file_raw=%s", filepath.Join(b.dir, name+".data"), onOff(o.DataFile == "raw"))
	}
	return s + ",preallocation=" + o.Preallocation
}

func onOff(on bool) string {
	if on {
		return "on"
	}
	return "off"
}

const (
	compressedOps = 12
	mixedOps      = 16
	maxOp         = 160 << 10 // bytes of one write
	sourceSize    = 256 << 10
)

// compressed writes some clusters compressed, each once.
func (b *builder) compressed(o Options, size int64) []string {
	if o.Compression == "" || size == 0 {
		return nil
	}
	var ops []string
	n := (size + o.ClusterSize - 1) / o.ClusterSize
	done := map[int64]bool{}
	for range compressedOps {
		c := b.rnd.Int64N(n)
		if b.rnd.IntN(3) == 0 {
			c = n - 1
		} else if b.rnd.IntN(2) == 0 {
			c = b.rnd.Int64N(min(n, compressedOps)) // neighbours
		}
		if done[c] {
			continue
		}
		done[c] = true
		off := c * o.ClusterSize
		ops = append(ops, fmt.Sprintf("write -q -c %s %d %d", b.contents(), off, min(o.ClusterSize, size-off)))
	}
	return ops
}

// contents is one byte over and over, or what the source has.
func (b *builder) contents() string {
	if b.rnd.IntN(2) == 0 {
		return "-s " + b.source
	}
	return fmt.Sprintf("-P %d", 1+b.rnd.IntN(255))
}

// mixed writes, zeroes and discards n ranges of any alignment to sectors.
func (b *builder) mixed(o Options, size int64, n int) []string {
	if size == 0 {
		return nil
	}
	var ops []string
	for range n {
		off, length := b.extent(o, size)
		where := fmt.Sprintf("%d %d", off, length)
		switch b.rnd.IntN(6) {
		case 0:
			ops = append(ops, "write -q -z "+where)
		case 1:
			ops = append(ops, "write -q -z -u "+where)
		case 2:
			ops = append(ops, "discard -q "+where)
		default:
			ops = append(ops, "write -q "+b.contents()+" "+where)
		}
	}
	return ops
}

// extent chooses a range, often whole clusters and often at an end of the disk.
func (b *builder) extent(o Options, size int64) (off, length int64) {
	off = b.rnd.Int64N(size/512) * 512
	length = (1 + b.rnd.Int64N(maxOp/512)) * 512
	switch b.rnd.IntN(5) {
	case 0:
		off = max(0, size-length)
	case 1:
		off = b.rnd.Int64N(min(size, 1<<20)/512) * 512
	case 2, 3:
		off = off / o.ClusterSize * o.ClusterSize
		length = max(o.ClusterSize, length/o.ClusterSize*o.ClusterSize)
	}
	return off, min(length, size-off)
}

// write runs the commands in one qemu-io.
func (b *builder) write(name string, ops []string) error {
	if len(ops) == 0 {
		return nil
	}
	args := []string{"-f", "qcow2", "-d", "unmap"}
	for _, op := range ops {
		args = append(args, "-c", op)
	}
	return b.run("qemu-io", append(args, name)...)
}

// writeSource makes a file of random bytes in which stretches repeat, so that
// some of it can be compressed and some not.
func writeSource(path string, seed uint64) error {
	rnd := rand.New(rand.NewPCG(seed, 2))
	p := make([]byte, sourceSize)
	for i := range p {
		switch {
		case i/(16<<10)%2 == 0:
			p[i] = byte(rnd.Uint32())
		case i%64 < 8:
			p[i] = byte(i >> 6)
		default:
			p[i] = p[i-64]
		}
	}
	return os.WriteFile(path, p, 0o644)
}
