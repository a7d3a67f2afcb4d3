package qcow2_test

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/check"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/create"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/disktest"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/qcowtest"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/storetest"
)

var (
	diskSeed     = flag.Uint64("disk.seed", 0, "repeat the random runs of this seed")
	diskEpisodes = flag.Int("disk.episodes", max(1, 3/thinner), "random runs on each kind of image")
	crashStates  = flag.Int("disk.crashes", 2600/thinner, "power cuts that are looked at")
)

// specimen is a kind of image to be written to, with its contents at first.
type specimen struct {
	name        string
	image, data *storetest.Mem // never changed; data may be nil
	below       func() (qcow2.Layer, error)
	first       []byte // what a guest reads
	cluster     int64
	discard     qcow2.Discard
	bitmaps     bool
	dir         string // for qemu-img to check images in, with the files that they name
	judge       *judge // made when it is needed

	perSync, perCall int // of disktest.PowerCuts; 0 for what is usual
}

// open opens files of the specimen. Emulate is above it as in the daemon.
func (s *specimen) open(ctx context.Context, f disktest.Files, readOnly bool) (backing.Device, error) {
	o := quiet()
	o.ReadOnly, o.Discard, o.DataFile = readOnly, s.discard, f.Data
	if s.below != nil {
		var err error
		if o.Backing, err = s.below(); err != nil {
			return nil, err
		}
	}
	d, err := qcow2.Open(ctx, f.Image, o)
	if err != nil || readOnly {
		return d, err
	}
	return backing.NewEmulate(d), nil
}

// audit is the check of an image from outside of the writer.
func audit(ctx context.Context, f disktest.Files) (leaks int64, err error) {
	h, err := qcow2.ReadHeader(ctx, f.Image)
	if err != nil {
		return 0, err
	}
	r, err := check.Run(ctx, f.Image, h, check.Options{})
	if err == nil && r.Corruptions+r.Errors > 0 {
		err = fmt.Errorf("%d corruptions, %d errors: %+v", r.Corruptions, r.Errors, r.Problems)
	}
	if err != nil {
		return 0, err
	}
	return r.Leaks, nil
}

func (s *specimen) format() disktest.Format { return disktest.Format{Open: s.open, Audit: audit} }

// host is a copy of a specimen's files.
type host struct {
	s     *specimen
	files []*storetest.Crash
}

func (s *specimen) host() *host {
	if s.judge == nil {
		s.judge = newJudge(s.dir)
	}
	h := &host{s, []*storetest.Crash{storetest.NewCrash(s.image.Clone())}}
	if s.data != nil {
		h.files = append(h.files, storetest.NewCrash(s.data.Clone()))
	}
	return h
}

// again is the host's files for another use.
func (h *host) again() (f disktest.Files) {
	for _, c := range h.files {
		c.Reopen()
	}
	f.Image = h.files[0]
	if len(h.files) > 1 {
		f.Data = h.files[1]
	}
	return f
}

// closed judges what a disk leaves behind.
func (h *host) closed(ctx context.Context) error {
	leaks, err := audit(ctx, h.again())
	if err == nil && leaks > 0 && leaks != h.s.dropped(ctx, h.files[0].Mem) {
		err = fmt.Errorf("%d clusters leaked", leaks)
	}
	return errors.Join(err, h.headerKept())
}

// dropped is how many clusters are lost when the autoclear bits of s are
// cleared, as they are in image: those of bitmaps.
func (s *specimen) dropped(ctx context.Context, image *storetest.Mem) int64 {
	p := make([]byte, 8)
	if _, err := image.ReadAt(ctx, p, format.OffAutoclear); err != nil || !s.bitmaps || p[7]&format.AutoclearBitmaps != 0 {
		return 0
	}
	was := s.image.Clone()
	was.Patch(format.OffAutoclear, p)
	leaks, err := audit(ctx, disktest.Files{Image: was})
	if err != nil {
		return 0
	}
	return leaks
}

// headerKept tells whether the header is as it was, but for the place of the
// refcount table, the autoclear bits and, if there are bitmaps, the extensions.
func (h *host) headerKept() error {
	was, is := make([]byte, 4096), make([]byte, 4096)
	n := min(h.s.cluster, 4096)
	for _, f := range []struct {
		p  []byte
		st interface {
			ReadAt(context.Context, []byte, int64) (int, error)
		}
	}{{was[:n], h.s.image.Clone()}, {is[:n], h.files[0]}} {
		if _, err := f.st.ReadAt(context.Background(), f.p, 0); err != nil {
			return err
		}
		clear(f.p[48:60])
		clear(f.p[88:96])
		if h.s.bitmaps {
			clear(f.p[104:])
		}
	}
	for i := range was {
		if was[i] != is[i] {
			return fmt.Errorf("byte %d of the header was %#x and is %#x", i, was[i], is[i])
		}
	}
	return nil
}

// episode runs a script on a fresh host of s, with power cuts if there shall
// be states. It returns how many there were.
func (s *specimen) episode(seed uint64, script disktest.Script, states int) (taken int, err error) {
	ctx, h := context.Background(), s.host()
	dev, err := s.open(ctx, h.again(), false)
	if err != nil {
		return 0, fmt.Errorf("open: %w", err)
	}
	r := disktest.Run{Dev: dev, Oracle: disktest.NewOracle(bytes.Clone(s.first))}
	r.Reopen = func(ctx context.Context, old backing.Device) (backing.Device, error) {
		if err := errors.Join(old.Close(), h.closed(ctx)); err != nil {
			return nil, err
		}
		return s.open(ctx, h.again(), false)
	}
	if states == 0 {
		err = r.Do(ctx, script)
	} else {
		rnd := rand.New(rand.NewPCG(seed, 1))
		cuts := disktest.PowerCuts{Format: s.format(), Oracle: r.Oracle, Files: h.files, PerSync: max(5, s.perSync), PerCall: s.perCall, Check: s.judged}
		cuts.Start(rnd, states)
		err = r.Do(ctx, script)
		var broken error
		taken, broken = cuts.Stop()
		err = errors.Join(err, broken)
	}
	if r.Dev != nil {
		err = errors.Join(err, r.Dev.Close())
	}
	if err == nil {
		err = h.closed(ctx)
	}
	if err == nil {
		err = reread(ctx, h, r.Oracle)
	}
	return taken, err
}

// reread reads the disk once more, read-only.
func reread(ctx context.Context, h *host, o *disktest.Oracle) error {
	d, err := h.s.open(ctx, h.again(), true)
	if err != nil {
		return fmt.Errorf("open for reading: %w", err)
	}
	r := disktest.Run{Dev: d, Oracle: o}
	return errors.Join(r.ReadAll(ctx), d.Close())
}

// report says how to repeat what failed, with as little as still fails.
func (s *specimen) report(t *testing.T, seed uint64, script disktest.Script, states int, err error) {
	t.Helper()
	short := disktest.Shrink(script, func(try disktest.Script) bool {
		_, err := s.episode(seed, try, states)
		return err != nil
	})
	_, again := s.episode(seed, short, states)
	t.Fatalf("-disk.seed %d: %v\n%d of %d batches are enough:\n%s%v", seed, err, len(short), len(script), short, again)
}

// seedOf is what a test's random numbers come from.
func seedOf(t *testing.T) uint64 {
	seed := *diskSeed
	if seed == 0 {
		seed = rand.Uint64()
	}
	t.Logf("-disk.seed %d", seed)
	return seed
}

// discards are what an image may do with trims, the usual more often.
var discards = [4]qcow2.Discard{qcow2.Unmap, qcow2.Unmap, qcow2.KeepCluster, qcow2.IgnoreTrim}

// TestRandomOperationsMatchTheModel runs scripts on images of all kinds. After
// each the contents are those of the model, the image is without leaks and the
// header is untouched.
func TestRandomOperationsMatchTheModel(t *testing.T) {
	for _, s := range kinds(append(created(t), fromQEMU(t)...)) {
		t.Run(s.name, func(t *testing.T) {
			t.Parallel()
			first := seedOf(t)
			for i := range *diskEpisodes {
				seed := first + uint64(i)
				s.discard = discards[seed%4]
				shape := disktest.Shape{Size: int64(len(s.first)), Cluster: s.cluster, Reopen: true, Ops: 60}
				script := shape.Random(rand.New(rand.NewPCG(seed, 0)))
				if _, err := s.episode(seed, script, 0); err != nil {
					s.report(t, seed, script, 0, err)
				}
			}
		})
	}
}

// created are images that were never written.
func created(t *testing.T) (list []*specimen) {
	t.Helper()
	const size = 3<<20 + 5*512
	for _, tt := range []struct {
		name  string
		o     create.Options
		below int64 // bytes of a raw layer below
	}{
		{"64k", create.Options{}, 0},
		{"512", create.Options{ClusterSize: 512}, 0},
		{"512,v2", create.Options{ClusterSize: 512, Version: 2}, 0},
		{"4k,v2,overlay", create.Options{ClusterSize: 4096, Version: 2}, 2 << 20},
		{"4k,overlay", create.Options{ClusterSize: 4096}, size + 4096},
		{"64k,overlay", create.Options{}, 1<<20 + 700},
		{"16k,subclusters", create.Options{ClusterSize: 16 << 10, ExtendedL2: true}, 0},
		{"64k,subclusters,overlay", create.Options{ExtendedL2: true}, 2<<20 + 512},
		{"512,refcounts of 1 bit", create.Options{ClusterSize: 512, RefcountBits: 1}, 0},
		{"512,refcounts of 64 bits", create.Options{ClusterSize: 512, RefcountBits: 64}, 0},
		{"1k,refcounts of 2 bits", create.Options{ClusterSize: 1024, RefcountBits: 2}, 0},
		{"4k,data file", create.Options{ClusterSize: 4096, DataFile: "data"}, 0},
		{"4k,data file,overlay", create.Options{ClusterSize: 4096, DataFile: "data"}, 2<<20 + 512},
		{"16k,subclusters,data file,overlay", create.Options{ClusterSize: 16 << 10, ExtendedL2: true, DataFile: "data"}, size},
		{"64k,raw data file", create.Options{DataFile: "data", DataFileRaw: true}, 0},
		{"16k,preallocated", create.Options{ClusterSize: 16 << 10, Preallocation: create.Metadata}, 0},
	} {
		s := &specimen{name: tt.name, dir: t.TempDir(), cluster: tt.o.ClusterSize, image: storetest.New(nil), first: make([]byte, size)}
		if s.cluster == 0 {
			s.cluster = create.DefaultClusterSize
		}
		tt.o.Size = size
		if tt.o.DataFile != "" {
			s.data = storetest.New(nil)
			tt.o.Data = s.data
			s.put(t, "data", nil)
		}
		if tt.below > 0 {
			tt.o.Backing, tt.o.BackingFormat = "below", "raw"
			raw := make([]byte, tt.below)
			disktest.Fill(raw[:1<<20], 0, belowVersion)
			s.below = func() (qcow2.Layer, error) { return qcow2.NewRawLayer(storetest.New(raw)) }
			copy(s.first, raw)
			s.put(t, "below", raw)
		}
		if err := create.Image(t.Context(), s.image, tt.o); err != nil {
			t.Fatal(err)
		}
		list = append(list, s)
	}
	return append(list, onBlockDevice(list[0]), onBlockDevice(list[1]))
}

// put makes a file that images of s name.
func (s *specimen) put(t *testing.T, name string, b []byte) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(s.dir, name), b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// Versions of what was there before a script.
const (
	belowVersion   = 1<<24 - 1
	foreignVersion = 1<<24 - 2
	oldVersion     = 1<<24 - 3
)

// onBlockDevice is s on a device that is full of bytes of somebody else.
func onBlockDevice(s *specimen) *specimen {
	d := *s
	d.name, d.image = s.name+",block device", s.image.Clone()
	size, _ := d.image.Size()
	p := make([]byte, 24<<20)
	disktest.Fill(p, 0, foreignVersion)
	d.image.Patch(size, p)
	d.image.SetFixed(true)
	return &d
}

// fromQEMU are images that QEMU has written, of all kinds.
func fromQEMU(t *testing.T) (list []*specimen) {
	t.Helper()
	var options []qcowtest.Options
	for i, o := range qcowtest.Pairwise(qcowtest.Seed) {
		if o.Size() > 0 && o.Size() <= 4<<20 && o.Snapshots < 1<<min(o.RefcountBits, 3)-1 && i%2 == 0 {
			options = append(options, o)
		}
	}
	return fromOptions(t, options...)
}

// fromOptions are images that QEMU has made and written.
func fromOptions(t *testing.T, options ...qcowtest.Options) (list []*specimen) {
	t.Helper()
	for _, image := range qcowtest.Make(t, qcowtest.Seed, options) {
		s := &specimen{name: image.Name, cluster: image.Options.ClusterSize, dir: filepath.Dir(image.Path),
			bitmaps: image.Options.Bitmaps > 0, image: storetest.New(fileBytes(t, image.Path)), first: fileBytes(t, image.Raw())}
		if image.Options.DataFile != "" {
			s.data = storetest.New(fileBytes(t, image.Path+".data"))
		}
		h, err := qcow2.ReadHeader(t.Context(), s.image)
		if err != nil {
			t.Fatal(err)
		}
		s.below = layerOf(t, filepath.Dir(image.Path), h.Backing)
		list = append(list, s)
	}
	return list
}

func fileBytes(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// layerOf makes the layer of a file and all below; nil for no name.
func layerOf(t *testing.T, dir, name string) func() (qcow2.Layer, error) {
	t.Helper()
	if name == "" {
		return nil
	}
	b := fileBytes(t, filepath.Join(dir, name))
	if strings.HasSuffix(name, ".raw") {
		return func() (qcow2.Layer, error) { return qcow2.NewRawLayer(storetest.New(b)) }
	}
	h, err := qcow2.ReadHeader(t.Context(), storetest.New(b))
	if err != nil {
		t.Fatal(err)
	}
	below := layerOf(t, dir, h.Backing)
	return func() (qcow2.Layer, error) {
		o := quiet()
		if below != nil {
			var err error
			if o.Backing, err = below(); err != nil {
				return nil, err
			}
		}
		return qcow2.OpenImage(context.Background(), storetest.New(b), o)
	}
}

// compressedImage is an image of size bytes whose clusters QEMU has compressed,
// as far as they can be: every other one is of random bytes.
func compressedImage(t *testing.T, options string, cluster, size int64) *specimen {
	t.Helper()
	dir := t.TempDir()
	s := &specimen{name: "compressed" + options, dir: dir, cluster: cluster, first: make([]byte, size)}
	disktest.Fill(s.first, 0, oldVersion)
	for off := int64(0); off < size; off += 2 * cluster {
		clear(s.first[off+cluster/8 : min(off+cluster, size)])
	}
	if err := os.WriteFile(filepath.Join(dir, "raw"), s.first, 0o600); err != nil {
		t.Fatal(err)
	}
	qemu(t, dir, "qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", fmt.Sprintf("cluster_size=%d", cluster)+options, "raw", "image")
	s.image = storetest.New(fileBytes(t, filepath.Join(dir, "image")))
	return s
}

// fromQEMUIO is an image that qemu-io has written with commands, as by made.
func fromQEMUIO(t *testing.T, name, options string, cluster int64, size string, commands ...string) *specimen {
	t.Helper()
	s := &specimen{name: name, dir: t.TempDir(), cluster: cluster}
	b := made(t, fmt.Sprintf("cluster_size=%d%s", cluster, options), size, commands...)
	if err := os.WriteFile(filepath.Join(s.dir, "image"), b, 0o600); err != nil {
		t.Fatal(err)
	}
	qemu(t, s.dir, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", "image", "raw")
	s.image, s.first = storetest.New(b), fileBytes(t, filepath.Join(s.dir, "raw"))
	return s
}
