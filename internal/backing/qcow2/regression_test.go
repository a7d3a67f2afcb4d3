package qcow2_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"reflect"
	"sync"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/create"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/disktest"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/storetest"
)

// The tests of this file are ways in which other writers of qcow2 images have
// lost data.

// blank is a new image.
func blank(t testing.TB, name string, o create.Options) *specimen {
	t.Helper()
	s := &specimen{name: name, dir: t.TempDir(), cluster: o.ClusterSize, image: storetest.New(nil), first: make([]byte, o.Size)}
	if err := create.Image(t.Context(), s.image, o); err != nil {
		t.Fatal(err)
	}
	return s
}

// start opens a fresh copy of s.
func (s *specimen) start(t testing.TB) (*host, *disktest.Run) {
	t.Helper()
	h := s.host()
	d, err := s.open(t.Context(), h.again(), false)
	if err != nil {
		t.Fatalf("open: %v", err)
	}
	return h, &disktest.Run{Dev: d, Oracle: disktest.NewOracle(bytes.Clone(s.first))}
}

// finish closes the disk and judges what it leaves behind.
func finish(t testing.TB, h *host, r *disktest.Run) {
	t.Helper()
	err := errors.Join(r.ReadAll(t.Context()), r.Dev.Close(), h.closed(t.Context()))
	if err == nil {
		err = reread(t.Context(), h, r.Oracle)
	}
	if err != nil {
		t.Error(err)
	}
	if h.s.below == nil && h.s.data == nil {
		if leaks, err := judged(h.s.dir, h.files[0].Contents()); err != nil || leaks {
			t.Errorf("qemu-img check: leaks %v, %v", leaks, err)
		}
	}
}

// do carries out a script that must go well.
func do(t testing.TB, r *disktest.Run, s disktest.Script) {
	t.Helper()
	if err := r.Do(t.Context(), s); err != nil {
		t.Fatalf("%v\n%s", err, s)
	}
}

func write(off, n int64, version uint32) disktest.Op {
	return disktest.Op{Kind: disktest.Write, Off: off, N: n, Version: version}
}

func trim(off, n int64) disktest.Op { return disktest.Op{Kind: disktest.Trim, Off: off, N: n} }

func wipe(off, n int64) disktest.Op { return disktest.Op{Kind: disktest.Zero, Off: off, N: n} }

var (
	flush  = disktest.Op{Kind: disktest.Flush}
	reopen = disktest.Op{Kind: disktest.Reopen}
)

// serial is a script of single operations.
func serial(ops ...disktest.Op) (s disktest.Script) {
	for _, op := range ops {
		s = append(s, disktest.Batch{op})
	}
	return s
}

// TestCrashQ1: a compressed cluster is partly overwritten, and others are
// written behind it. Until the new mapping is durable, nothing may take the
// place of the compressed bytes: the mapping in the file still leads there.
func TestCrashQ1(t *testing.T) {
	const size = 4 << 20
	s := compressedImage(t, "", 64<<10, 64<<10)
	dir := s.dir
	qemu(t, dir, "qemu-img", "resize", "-f", "qcow2", "image", fmt.Sprint(size))
	s.image, s.first = storetest.New(fileBytes(t, dir+"/image")), append(s.first, make([]byte, size-len(s.first))...)
	s.perSync, s.perCall = 40/thinner, 15/thinner
	script := serial(write(0, 512, 1), write(1<<20, 64<<10, 2), write(2<<20, 64<<10, 3), write(3<<20, 128<<10, 4), flush,
		write(3<<20, 64<<10, 5), flush)
	n, err := s.episode(1, script, 1000)
	if err != nil || n*thinner < 200 {
		t.Errorf("%d power cuts: %v", n, err)
	}
}

// TestRegressionPunchComesBeforeReuse: clusters that are being punched must
// not be handed out yet, or the punch destroys what was written to them since.
func TestRegressionPunchComesBeforeReuse(t *testing.T) {
	s := blank(t, "punch", create.Options{Size: 4 << 20, ClusterSize: 4096})
	h, r := s.start(t)
	do(t, r, serial(write(0, 1<<20, 1), flush))
	next, punched := uint32(2), 0
	h.files[0].SetHook(func(x storetest.Call) {
		if x.Op != storetest.Punch || x.Done || punched == 8 {
			return
		}
		punched++
		written := make(chan error, 1)
		go func() {
			off := int64(1<<20) + int64(punched)*128<<10
			c := r.Oracle.Begin(off, 128<<10, next, false, false)
			p := make([]byte, 128<<10)
			disktest.Fill(p, off, next)
			err := r.Dev.WriteAt(context.Background(), p, off, 0)
			r.Oracle.End(c)
			written <- err
		}()
		select {
		case err := <-written:
			if err != nil {
				t.Errorf("write during a punch: %v", err)
			}
		case <-time.After(10 * time.Second):
			t.Error("write during a punch waits for it")
		}
		next++
	})
	for i := range int64(4) {
		do(t, r, serial(trim(i*256<<10, 256<<10), flush, flush))
	}
	h.files[0].SetHook(nil)
	if punched == 0 {
		t.Error("nothing was punched")
	}
	finish(t, h, r)
}

// TestRegressionLateIOTouchesNobodyElse: a request that has looked up where
// its cluster lies, and is slow, must not read or write what the host cluster
// holds after the guest has trimmed it and others have got it.
func TestRegressionLateIOTouchesNobodyElse(t *testing.T) {
	const late, cluster = 3 * 512, 4096
	for _, op := range []storetest.Op{storetest.Read, storetest.Write} {
		s := blank(t, "late", create.Options{Size: 1 << 20, ClusterSize: cluster})
		h, r := s.start(t)
		do(t, r, serial(write(0, cluster, 1), flush))
		held, gate, done := make(chan struct{}), make(chan struct{}), make(chan error, 1)
		var once sync.Once
		h.files[0].SetHook(func(x storetest.Call) {
			if x.Op == op && x.Len == late && !x.Done {
				once.Do(func() { close(held); <-gate })
			}
		})
		go func() {
			m, p := r.Oracle.Now(), make([]byte, late)
			if op == storetest.Read {
				err := r.Dev.ReadAt(context.Background(), p, 512)
				done <- errors.Join(err, r.Oracle.Verify(p, 512, m))
				return
			}
			c := r.Oracle.Begin(512, late, 2, false, false)
			disktest.Fill(p, 512, 2)
			err := r.Dev.WriteAt(context.Background(), p, 512, 0)
			r.Oracle.End(c)
			done <- err
		}()
		<-held
		do(t, r, serial(trim(0, cluster), flush, flush, write(cluster, 64*cluster, 3), flush))
		close(gate)
		if err := <-done; err != nil {
			t.Errorf("late %s: %v", op, err)
		}
		do(t, r, serial(flush, flush))
		finish(t, h, r)
	}
}

// TestRegressionFailureAtAnyCallLosesNothing: each call to the host file fails
// once, for want of space or for good. Whatever that undoes, a table that is
// in use must not become free, and a table must not be freed before there is
// another: compressed clusters and shared tables are rewritten on the way.
func TestRegressionFailureAtAnyCallLosesNothing(t *testing.T) {
	list := []*specimen{
		blank(t, "new", create.Options{Size: 1 << 20, ClusterSize: 512}),
		compressedImage(t, "", 4096, 128<<10),
		fromQEMUIO(t, "snapshot", "", 512, "256k", "write -P 1 0 128k", "snapshot a"),
		fromQEMUIO(t, "subclusters", ",extended_l2=on", 16<<10, "256k", "write -P 1 0 128k", "snapshot a"),
	}
	for _, s := range list {
		for _, kind := range []backing.Kind{backing.ErrNoSpace, backing.ErrIO} {
			t.Run(s.name+","+string(kind), func(t *testing.T) {
				size := int64(len(s.first))
				script := serial(write(0, 700, 1), write(size/2, 9000, 2), flush, wipe(0, 30000), trim(size/2, 8192),
					write(size/4, 20000, 3), flush, write(0, 5000, 4), write(size-20000, 20000, 5), flush)
				calls := 0
				for n := 1; ; n += thinner {
					h, r := s.start(t)
					h.files[0].FailCall(n, kind)
					before := h.files[0].Calls()
					if err := afterFault(t.Context(), h, r, script); err != nil {
						t.Fatalf("call %d fails: %v", n, err)
					}
					if h.files[0].Calls()-before < n { // there is no such call any more
						break
					}
					calls++
				}
				if calls*thinner < 20 {
					t.Errorf("%d calls could fail, want more", calls)
				}
			})
		}
	}
}

// afterFault runs a script that may fail, and then looks at what is left as
// after a power cut that kept everything: what was flushed must be there.
func afterFault(ctx context.Context, h *host, r *disktest.Run, script disktest.Script) error {
	r.Faulty = true
	var refused *backing.Error // by the disk; what is wrong with contents is none
	if err := r.Do(ctx, script); err != nil && !errors.As(err, &refused) {
		return err
	}
	m := r.Oracle.Crash()
	_ = r.Dev.Close() // it may have failed for good
	h.files[0].FailCall(0, nil)
	if _, err := audit(ctx, h.again()); err != nil {
		return fmt.Errorf("audit: %w", err)
	}
	d, err := h.s.open(ctx, h.again(), false)
	if err != nil {
		return fmt.Errorf("open: %w", err)
	}
	p := make([]byte, len(h.s.first))
	if err = d.ReadAt(ctx, p, 0); err == nil {
		err = r.Oracle.Verify(p, 0, m)
	}
	if err == nil {
		r = &disktest.Run{Dev: d, Oracle: disktest.NewOracle(p)}
		err = r.Do(ctx, serial(write(100, 30000, 20), flush, wipe(5000, 20000), write(0, 6000, 21), flush))
	}
	if err = errors.Join(err, d.Close()); err != nil {
		return err
	}
	_, err = audit(ctx, h.again())
	return err
}

// TestRegressionFileStaysSmall: writes, trims and flushes in a loop must use
// again what they freed, metadata included.
func TestRegressionFileStaysSmall(t *testing.T) {
	for _, cluster := range []int64{512, 4096} {
		s := blank(t, "small", create.Options{Size: 1 << 20, ClusterSize: cluster, RefcountBits: 64})
		h, r := s.start(t)
		for i := range uint32(400) {
			off := int64(i*7%15) * 64 << 10
			ops := serial(write(off, 64<<10, i+1), flush, trim(off, 64<<10), flush)
			for _, b := range ops {
				if err := r.Carry(t.Context(), b); err != nil {
					t.Fatal(err)
				}
			}
		}
		if used := h.files[0].Allocated(); used > 256<<10 {
			t.Errorf("clusters of %d: %d bytes allocated for an empty disk", cluster, used)
		}
		finish(t, h, r)
		if got := int64(len(h.files[0].Contents())); got > 1<<20 {
			t.Errorf("clusters of %d: file of %d bytes for an empty disk, want at most 1 MiB", cluster, got)
		}
	}
}

// TestRegressionManyWritersAndTrims: sixteen at a time write and trim the same
// few clusters, on one device as all connections have it.
func TestRegressionManyWritersAndTrims(t *testing.T) {
	seed := seedOf(t)
	for _, s := range []*specimen{
		blank(t, "512", create.Options{Size: 256 << 10, ClusterSize: 512}),
		blank(t, "16k,subclusters", create.Options{Size: 256 << 10, ClusterSize: 16 << 10, ExtendedL2: true}),
		compressedImage(t, "", 4096, 256<<10),
	} {
		rnd := rand.New(rand.NewPCG(seed, 0))
		var script disktest.Script
		for i := range 40 {
			batch := make(disktest.Batch, 16)
			for k := range batch {
				off, n := rnd.Int64N(16)*4096+rnd.Int64N(3)*512, 512+rnd.Int64N(40)*512
				batch[k] = write(off, n, uint32(i*16+k+1))
				switch rnd.IntN(6) {
				case 0, 1:
					batch[k] = trim(off, n)
				case 2:
					batch[k] = wipe(off, n)
				case 3:
					batch[k] = flush
				}
			}
			script = append(script, batch)
		}
		h, r := s.start(t)
		do(t, r, script)
		finish(t, h, r)
	}
}

// TestRegressionHeaderIsNeverOverwritten: a guest that writes all of its disk,
// again and again, must not get at the first cluster of the file. finish looks.
func TestRegressionHeaderIsNeverOverwritten(t *testing.T) {
	for _, o := range []create.Options{{ClusterSize: 64 << 10}, {ClusterSize: 512}, {ClusterSize: 512, Version: 2}} {
		o.Size = 2 << 20
		s := blank(t, "header", o)
		h, r := s.start(t)
		for round := range uint32(3) {
			for off := int64(0); off < o.Size; off += 64 << 10 {
				c := write(off, 64<<10, round*1000+uint32(off>>16)+1)
				if err := r.Carry(t.Context(), disktest.Batch{c}); err != nil {
					t.Fatal(err)
				}
			}
			do(t, r, serial(trim(int64(round)*300<<10, 700<<10), flush))
		}
		finish(t, h, r)
	}
}

// TestRegressionCloseOrderKeepsTheHeader: a reader and a writer of one image
// close in either order; the header is as before, lazy refcounts included.
func TestRegressionCloseOrderKeepsTheHeader(t *testing.T) {
	s := fromQEMUIO(t, "lazy", ",lazy_refcounts=on", 4096, "1M", "write -P 7 0 64k")
	for _, readerFirst := range []bool{false, true} {
		h, r := s.start(t)
		reader, err := s.open(t.Context(), disktest.Files{Image: h.files[0].Clone()}, true)
		if err != nil {
			t.Fatal(err)
		}
		do(t, r, serial(write(0, 128<<10, 1), flush, write(512<<10, 4096, 2)))
		order := []func() error{r.Dev.Close, reader.Close}
		if readerFirst {
			order[0], order[1] = order[1], order[0]
		}
		for _, closeIt := range order {
			err := closeIt()
			h.again()
			if err = errors.Join(err, h.headerKept()); err != nil {
				t.Errorf("reader first %v: %v", readerFirst, err)
			}
		}
		got, err := qcow2.ReadHeader(t.Context(), h.files[0])
		if err != nil || got.Compat&1 == 0 || got.Incompat != 0 {
			t.Errorf("header: %+v, %v, want lazy refcounts and nothing dirty", got, err)
		}
	}
}

// TestRegressionCopyOfAFrozenImageIsWhole: what is copied after a flush, while
// the disk stays open, has everything that was written before.
func TestRegressionCopyOfAFrozenImageIsWhole(t *testing.T) {
	s := blank(t, "frozen", create.Options{Size: 2 << 20, ClusterSize: 4096})
	h, r := s.start(t)
	for i := range uint32(20) {
		do(t, r, serial(write(int64(i)*90000, 60000, 2*i+1), wipe(int64(i)*80000, 9000), flush))
		image := h.files[0].Clone()
		if leaks, err := judged(s.dir, image.Contents()); err != nil {
			t.Fatalf("copy %d: leaks %v, %v", i, leaks, err)
		}
		d, err := s.open(t.Context(), disktest.Files{Image: image}, true)
		if err != nil {
			t.Fatal(err)
		}
		reader := disktest.Run{Dev: d, Oracle: r.Oracle}
		if err := errors.Join(reader.ReadAll(t.Context()), d.Close()); err != nil {
			t.Fatalf("copy %d: %v", i, err)
		}
	}
	finish(t, h, r)
}

// TestRegressionCopiedFlagsAreWhatQEMUWants: also in the L1 table, and also
// where a snapshot shares it. finish asks qemu-img.
func TestRegressionCopiedFlagsAreWhatQEMUWants(t *testing.T) {
	for _, s := range []*specimen{
		blank(t, "new", create.Options{Size: 1 << 20, ClusterSize: 512}),
		fromQEMUIO(t, "snapshots", "", 512, "1M", "write -P 1 0 300k", "snapshot a", "write -P 2 100k 100k", "snapshot b"),
		fromQEMUIO(t, "zeroes", "", 4096, "1M", "write -P 1 0 300k", "write -z 100k 100k", "snapshot a"),
	} {
		h, r := s.start(t)
		do(t, r, serial(write(0, 100<<10, 1), wipe(20<<10, 30<<10), flush, trim(50<<10, 100<<10), write(600<<10, 1000, 2), flush,
			disktest.Op{Kind: disktest.Zero, Off: 90 << 10, N: 40 << 10, Flags: backing.NoHole}))
		finish(t, h, r)
	}
}

// TestRegressionSharedTablesAreCopiedWhole: a snapshot shares an L2 table of
// which only a part is in memory when the disk gets a copy of its own.
func TestRegressionSharedTablesAreCopiedWhole(t *testing.T) {
	const cluster, size = 16 << 10, 32 << 20 // one table
	commands := []string{}
	for off := int64(0); off < size; off += 4 << 20 {
		commands = append(commands, fmt.Sprintf("write -P %d %d 20k", off>>20+1, off))
	}
	s := fromQEMUIO(t, "shared", "", cluster, fmt.Sprint(size), append(commands, "snapshot a")...)
	for _, at := range []int64{0, 12 << 20, size - cluster} {
		h, r := s.start(t)
		for _, op := range []disktest.Op{write(at, 700, 1), flush} { // reading the disk would load the table
			if err := r.Carry(t.Context(), disktest.Batch{op}); err != nil {
				t.Fatal(err)
			}
		}
		finish(t, h, r)
	}
}

// TestRegressionHeaderFieldsSurvive: the compression type, feature names and
// extensions that nobody knows are in the header after writing and growing the
// refcount table.
func TestRegressionHeaderFieldsSurvive(t *testing.T) {
	s := compressedImage(t, ",compression_type=zstd,refcount_bits=64", 512, 256<<10)
	h0, err := qcow2.ReadHeader(t.Context(), s.image.Clone())
	if err != nil {
		t.Fatal(err)
	}
	ext := binary.BigEndian.AppendUint32(nil, 0x12345678) // the first, in place of the end
	s.image.Patch(int64(h0.Length), append(binary.BigEndian.AppendUint32(ext, 8), "survivor"...))
	was, err := qcow2.ReadHeader(t.Context(), s.image.Clone())
	if err != nil || len(was.Extensions) != len(h0.Extensions)+1 {
		t.Fatalf("header: %+v, %v, want one more extension", was, err)
	}
	h, r := s.start(t)
	do(t, r, serial(write(0, 256<<10, 1), flush, write(100, 100<<10, 2)))
	finish(t, h, r)
	h.again()
	is, err := qcow2.ReadHeader(t.Context(), h.files[0])
	if err != nil {
		t.Fatal(err)
	}
	if is.Compression != format.Zstd || !reflect.DeepEqual(is.Extensions, was.Extensions) || is.Incompat != was.Incompat {
		t.Errorf("header: got %+v, want %+v", is, was)
	}
}

// TestRegressionCompressedNeighboursShareClusters: compressed clusters lie side
// by side in one host cluster, which may only be freed with the last of them,
// and not before the mapping without it is durable.
func TestRegressionCompressedNeighboursShareClusters(t *testing.T) {
	s := compressedImage(t, "", 4096, 256<<10)
	for _, first := range []int64{0, 1} { // the ones that can be compressed well, and the others
		var ops []disktest.Op
		for off := first * 4096; off < 256<<10; off += 2 * 4096 {
			ops = append(ops, write(off, 100, uint32(off+1)))
			if off%5 == 0 {
				ops = append(ops, flush)
			}
		}
		if n, err := s.episode(uint64(first), serial(append(ops, flush, reopen, trim(0, 128<<10), flush)...), 150/thinner); err != nil || n*thinner < 100 {
			t.Errorf("%d power cuts: %v", n, err)
		}
	}
}

// TestRegressionZeroesHaveTheirClusters: zeroes that stay allocated name host
// clusters that nobody writes to. The file must reach behind them all the same,
// also where no other write has made it longer.
func TestRegressionZeroesHaveTheirClusters(t *testing.T) {
	zero := disktest.Op{Kind: disktest.Zero, Off: 4096, N: 512 << 10, Flags: backing.NoHole}
	for _, s := range []*specimen{
		fromQEMUIO(t, "4k", "", 4096, "1M", "write -P 1 0 4096"),
		fromQEMUIO(t, "16k,subclusters", ",extended_l2=on", 16<<10, "1M", "write -P 1 0 4096"),
	} {
		s.perSync, s.perCall = 20, 10
		if n, err := s.episode(1, serial(zero, flush, reopen, zero, write(8192, 512, 1), flush), 400); err != nil || n < 20 {
			t.Errorf("%s: %d power cuts: %v", s.name, n, err)
		}
	}
}

// TestRegressionDecompressedClustersAreForgotten: what was decompressed and
// kept must not answer for what took its place.
func TestRegressionDecompressedClustersAreForgotten(t *testing.T) {
	s := compressedImage(t, "", 4096, 128<<10)
	h, r := s.start(t)
	for i := range int64(8) {
		off := i * 8192
		do(t, r, serial(write(off+100, 50, uint32(i*4+1)), flush, trim(off, 4096), flush, write(off, 4096, uint32(i*4+2)),
			write(off+4096+7, 9, uint32(i*4+3)), wipe(off+512, 700)))
	}
	finish(t, h, r)
}

// TestPowerCutsWhileTheRefcountTableGrows: a new table takes the place of the
// old one in the header, when the file comes to 2 MiB.
func TestPowerCutsWhileTheRefcountTableGrows(t *testing.T) {
	s := fromQEMUIO(t, "growth", ",refcount_bits=64", 512, "2560k", "write -P 1 0 1792k")
	was, err := qcow2.ReadHeader(t.Context(), s.image.Clone())
	if err != nil {
		t.Fatal(err)
	}
	ops := []disktest.Op{write(1800<<10, 300<<10, 1), flush, write(2200<<10, 40<<10, 2), write(0, 5000, 3), flush}
	s.perSync, s.perCall = 8, 2
	n, err := s.episode(1, serial(ops...), 400/thinner)
	if err != nil || n*thinner < 50 {
		t.Errorf("%d power cuts: %v", n, err)
	}
	h, r := s.start(t)
	do(t, r, serial(ops...))
	finish(t, h, r)
	h.again()
	if is, err := qcow2.ReadHeader(t.Context(), h.files[0]); err != nil || is.RefTableOffset == was.RefTableOffset {
		t.Errorf("header: %+v, %v, want another refcount table", is, err)
	}
}
