package qcow2_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"log/slog"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/check"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/create"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/storetest"
)

// fuzzWindow is how much of each end of a disk FuzzWrite uses, fuzzOps how many
// requests.
const (
	fuzzWindow = 256 << 10
	fuzzOps    = 48
)

// fuzzed is a disk that FuzzWrite has open. want is what the disk holds, nil
// where that is not known.
type fuzzed struct {
	t       *testing.T
	discard qcow2.Discard
	st      *storetest.Mem
	d       backing.Device
	want    []byte
	resized bool
	broken  bool // a request failed
}

// step is one request: six bytes say which.
type step [6]byte

func (s step) kind() byte   { return s[0] & 7 }
func (s step) value() byte  { return s[0] >> 3 }
func (s step) far() bool    { return s[1]&1 != 0 }
func (s step) length() int  { return 1 + int(binary.BigEndian.Uint16(s[4:])) }
func (s step) place() int64 { return int64(s[1]>>1)<<16 | int64(binary.BigEndian.Uint16(s[2:])) }

// at is the range of a step in a disk of size bytes.
func (s step) at(size int64) (off, n int64) {
	window := min(size, fuzzWindow)
	off = s.place() % window
	n = min(int64(s.length()), window-off)
	if s.far() {
		off += size - window
	}
	return off, n
}

// fuzzImages are the images that FuzzWrite damages.
func fuzzImages(f *testing.F) (images [][]byte) {
	for _, kind := range []struct {
		options, size string
		commands      []string
	}{
		{"cluster_size=512", "200k", []string{"write -q -P 17 0 5k", "write -q -P 18 100k 20k"}},
		{"cluster_size=512,refcount_bits=1", "64k", []string{"write -q -P 17 1k 5k"}},
		{"cluster_size=512,refcount_bits=64", "64k", []string{"write -q -z 1k 5k"}},
		{"cluster_size=1k,compat=0.10", "100k", []string{"write -q -P 17 0 5k", "snapshot s", "write -q -P 18 2k 1k"}},
		{"cluster_size=512", "1M", []string{"write -q -P 17 0 5k", "snapshot a", "write -q -P 18 2k 9k", "snapshot b"}},
		{"cluster_size=512", "64k", []string{"write -q -c -P 17 0 512", "write -q -c -P 18 512 512", "write -q -c -P 19 2k 512"}},
		{"cluster_size=16k,extended_l2=on", "100k", []string{"write -q -P 17 512 5k"}},
	} {
		images = append(images, made(f, kind.options, kind.size, kind.commands...))
	}
	for _, version := range []int{2, 3} {
		st := storetest.New(nil)
		o := create.Options{Size: 100 << 10, Version: version, ClusterSize: 1024, Backing: "below", BackingFormat: "raw"}
		if err := create.Image(context.Background(), st, o); err != nil {
			f.Fatal(err)
		}
		images = append(images, st.Contents())
	}
	return images
}

// damage is a copy of an image with bits turned over: of four bytes, three say
// where and one which. Every second one is among the tables at the beginning.
func damage(image, patches []byte) []byte {
	b := bytes.Clone(image)
	for ; len(patches) >= 4; patches = patches[4:] {
		at := int(binary.BigEndian.Uint32(patches) >> 8)
		if at&1 != 0 {
			at = at >> 1 % 4096
		}
		b[at%len(b)] ^= patches[3]
	}
	return b
}

// FuzzWrite damages an image and opens it for writing. Where that is not
// refused, the disk does what the requests say, keeps what it is told, and
// leaves an image behind that is as sound as it was, with a header that is the
// old one.
func FuzzWrite(f *testing.F) {
	images := fuzzImages(f)
	some := []byte("\x08\x00\x01\x00\x20\x00\x11\x01\x03\x00\x10\x00\x02\x00\x40\x00\x80\x00\x03\x00\x00\x00\x00\x00" +
		"\x06\x02\x00\x00\x00\x10\x10\x00\x00\x07\xff\xff\x0c\x00\x00\x00\x40\x00\x05\x00\x00\x00\x00\x00\x18\x01\xff\xff\xff\xff")
	for kind := range images {
		f.Add(byte(kind), []byte{}, some)
		f.Add(byte(kind+len(images)), []byte("\x00\x40\x00\x01"), some)
	}
	f.Fuzz(func(t *testing.T, kind byte, patches, steps []byte) {
		b := damage(images[int(kind)%len(images)], patches)
		trims := []qcow2.Discard{qcow2.Unmap, qcow2.KeepCluster, qcow2.IgnoreTrim}
		x := &fuzzed{t: t, discard: trims[int(kind)/len(images)%len(trims)], st: storetest.New(b)}
		h, err := qcow2.ReadHeader(context.Background(), x.st)
		if err != nil || h.Bitmaps != nil {
			return
		}
		if !x.open(h) {
			if !bytes.Equal(x.st.Contents(), b) {
				t.Fatal("an image that was refused was changed")
			}
			return
		}
		for n := 0; n < fuzzOps && len(steps) >= len(step{}); n++ {
			x.do(step(steps))
			steps = steps[len(step{}):]
		}
		err = x.d.Close()
		x.st.Reopen()
		leaks, before := x.check(x.st), x.check(x.grown(b))
		if err == nil && !x.broken && leaks > before {
			t.Fatalf("%d clusters have leaked, before it were %d", leaks, before)
		}
		x.sameHeader(h, b)
		if err != nil || x.broken {
			return
		}
		if h, err = qcow2.ReadHeader(context.Background(), x.st); err != nil || !x.open(h) {
			t.Fatalf("the image cannot be opened again: %v", err)
		}
		x.compare()
		if err := x.d.Close(); err != nil {
			t.Fatal(err)
		}
	})
}

// open opens the image above whatever it wants.
func (x *fuzzed) open(h *format.Header) bool {
	o := qcow2.Options{Path: "image", Discard: x.discard, Log: slog.New(slog.DiscardHandler)}
	names := qcow2.NamesOf(h)
	if names.Backing != "" {
		o.Backing, _ = qcow2.NewRawLayer(storetest.New(bytes.Repeat([]byte{0xbb}, 3000)))
	}
	if names.NeedsDataFile {
		o.DataFile = storetest.New(nil)
	}
	d, err := qcow2.Open(context.Background(), x.st, o)
	if err != nil {
		return false
	}
	x.d = backing.NewEmulate(d)
	if size := d.Info().Size; size <= 2*fuzzWindow && x.want == nil && !names.NeedsDataFile {
		x.want = make([]byte, size)
		if d.ReadAt(context.Background(), x.want, 0) != nil {
			x.want = nil
		}
	}
	return true
}

// grown is the image b in a file as long as it is now: a check sees the
// refcounts of the file's clusters only.
func (x *fuzzed) grown(b []byte) *storetest.Mem {
	x.t.Helper()
	size, err := x.st.Size()
	if err != nil {
		x.t.Fatal(err)
	}
	st := storetest.New(b)
	st.Cut(max(size, int64(len(b))))
	return st
}

// check counts the leaks of an image that must have nothing worse.
func (x *fuzzed) check(st *storetest.Mem) int64 {
	x.t.Helper()
	h, err := qcow2.ReadHeader(context.Background(), st)
	if err != nil {
		x.t.Fatalf("header: %v", err)
	}
	r, err := check.Run(context.Background(), st, h, check.Options{})
	if err != nil {
		x.t.Fatalf("check: %v", err)
	}
	if r.Corruptions > 0 || r.Errors > 0 {
		x.t.Fatalf("check: %d corruptions, %d errors: %v", r.Corruptions, r.Errors, r.Problems)
	}
	return r.Leaks
}

// do has the disk do one request. What fails may have done anything within its
// range.
func (x *fuzzed) do(s step) {
	size := x.d.Info().Size
	if s.kind() == 6 {
		x.resize(size + int64(s.length())&^511)
		return
	}
	if size == 0 {
		return
	}
	ctx := context.Background()
	off, n := s.at(size)
	var flags backing.Flags
	if s.value()&1 != 0 {
		flags = backing.FUA
	}
	var p []byte
	var err error
	switch s.kind() {
	case 0, 1:
		p = bytes.Repeat([]byte{s.value() + 1}, int(n))
		err = x.d.WriteAt(ctx, p, off, flags)
	case 2:
		p = make([]byte, n)
		err = x.d.Zero(ctx, off, n, flags)
	case 3:
		p = make([]byte, n)
		err = x.d.Zero(ctx, off, n, flags|backing.NoHole)
	case 4:
		err = x.trim(off, n, flags)
	case 5:
		err = x.d.Flush(ctx)
	case 7: // what is in the file at any time is sound
		x.check(x.st.Clone())
	}
	switch {
	case err != nil:
		x.broken, x.want = true, nil
	case x.want != nil:
		copy(x.want[off:], p)
		x.compare()
	}
}

// trim trims a range, and learns what of it reads as zeroes now.
func (x *fuzzed) trim(off, n int64, flags backing.Flags) error {
	ctx := context.Background()
	if err := x.d.Trim(ctx, off, n, flags); err != nil || x.want == nil {
		return err
	}
	p := make([]byte, n)
	if err := x.d.ReadAt(ctx, p, off); err != nil {
		return err
	}
	for i, b := range p {
		if b == 0 {
			x.want[off+int64(i)] = 0
		}
	}
	return nil
}

func (x *fuzzed) resize(size int64) {
	if size > 4*fuzzWindow {
		return
	}
	x.resized = true
	switch err := x.d.(backing.Resizer).Resize(context.Background(), size); {
	case err != nil:
		x.broken, x.want = true, nil
	case x.want != nil:
		x.want = append(x.want, make([]byte, size-int64(len(x.want)))...)
		x.compare()
	}
}

// compare fails unless the disk has what it should.
func (x *fuzzed) compare() {
	x.t.Helper()
	if x.want == nil {
		return
	}
	got := make([]byte, x.d.Info().Size)
	if err := x.d.ReadAt(context.Background(), got, 0); err != nil {
		x.t.Fatalf("read: %v", err)
	}
	for i := range max(len(got), len(x.want)) {
		if i >= len(got) || i >= len(x.want) || got[i] != x.want[i] {
			x.t.Fatalf("the disk of %d bytes is not the one of %d that was written, from %d on", len(got), len(x.want), i)
		}
	}
}

// sameHeader fails if a field has changed that no writer changes, or anything
// of the first cluster behind the header.
func (x *fuzzed) sameHeader(h *format.Header, before []byte) {
	x.t.Helper()
	n := min(int64(len(before)), 1<<h.ClusterBits)
	was, is := bytes.Clone(before[:n]), x.st.Contents()[:n]
	changing := [][2]int{{36, 60}} // L1 and refcount table
	if x.resized {
		changing = append(changing, [2]int{24, 32})
	}
	if h.Version >= 3 {
		changing = append(changing, [2]int{88, 96}) // autoclear features
	}
	for _, r := range changing {
		copy(was[r[0]:r[1]], is[r[0]:])
	}
	if !bytes.Equal(was, is) {
		x.t.Fatal("the header has changed")
	}
}
