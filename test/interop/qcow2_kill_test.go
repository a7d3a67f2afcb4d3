package interop

import (
	"bytes"
	"context"
	"encoding/binary"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/nbd/client"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
	"github.com/vmdiskd/vmdiskd/test/testenv"
)

var kills = flag.Int("qcow2.kills", 25, "how often a server that writes qcow2 is killed under load")

const (
	killDisk  = 32 << 20
	killBlock = 4096 // of which each has one tag
	workers   = 4    // each with a connection and a part of the disk
	blocksPer = killDisk / killBlock / workers
)

// tag fills a block with what version of it was written; version 0 is zeroes.
func tag(p []byte, block int, version uint64) {
	clear(p)
	if version == 0 {
		return
	}
	for i := 0; i < len(p); i += 16 {
		binary.LittleEndian.PutUint64(p[i:], uint64(block)<<16|uint64(i))
		binary.LittleEndian.PutUint64(p[i+8:], version)
	}
}

// tagOf is the version of a block, if it is whole.
func tagOf(p []byte, block int) (version uint64, ok bool) {
	version = binary.LittleEndian.Uint64(p[8:])
	want := make([]byte, len(p))
	tag(want, block, version)
	return version, bytes.Equal(p, want)
}

// ledger is what the blocks of one worker may hold: what was there at the last
// flush, and what was asked for since.
type ledger struct {
	first int // block
	may   [][]uint64
	next  uint64 // version
	rng   *rand.Rand
}

// change asks for n blocks from i on to become version 0 or a new one. A trim
// may do nothing, so what was there stays possible.
func (l *ledger) change(ctx context.Context, c *client.Client, i, n, kind int) (versions []uint64, err error) {
	off, size := int64(l.first+i)*killBlock, int64(n)*killBlock
	versions = make([]uint64, n)
	p := make([]byte, size)
	if kind > 1 {
		for k := range versions {
			l.next++
			versions[k] = l.next
			tag(p[k*killBlock:(k+1)*killBlock], l.first+i+k, l.next)
		}
	}
	for k, v := range versions {
		l.may[i+k] = append(l.may[i+k], v)
	}
	switch kind {
	case 0:
		return nil, c.Trim(ctx, off, size, 0)
	case 1:
		return versions, c.Zero(ctx, off, size, 0)
	default:
		return versions, c.WriteAt(ctx, p, off, 0)
	}
}

// load writes until the server is gone. It flushes now and then; what was
// answered before is certain then. With answered, so is what was answered after
// the last flush.
func (l *ledger) load(ctx context.Context, c *client.Client, answered bool) {
	certain := map[int]uint64{}
	sure := func() {
		for i, v := range certain {
			// What was asked for since, without an answer, stays possible.
			at := len(l.may[i]) - 1
			for l.may[i][at] != v {
				at--
			}
			l.may[i] = append(l.may[i][:0], l.may[i][at:]...)
		}
		clear(certain)
	}
	if answered {
		defer sure()
	}
	for {
		for range 1 + l.rng.IntN(40) {
			n := 1 + l.rng.IntN(1<<l.rng.IntN(6))
			i := l.rng.IntN(blocksPer - n)
			kind := l.rng.IntN(12)
			versions, err := l.change(ctx, c, i, n, kind)
			if err != nil {
				return
			}
			for k := range n {
				if versions == nil {
					delete(certain, i+k)
				} else {
					certain[i+k] = versions[k]
				}
			}
		}
		if c.Flush(ctx) != nil {
			return
		}
		sure()
	}
}

// settle holds what is read against the ledger, and starts anew from it.
func (l *ledger) settle(p []byte) error {
	for i := range l.may {
		block := l.first + i
		v, ok := tagOf(p[block*killBlock:(block+1)*killBlock], block)
		if !ok || !slices.Contains(l.may[i], v) {
			return fmt.Errorf("block %d holds version %d (whole: %v), want one of %d", block, v, ok, l.may[i])
		}
		l.may[i] = append(l.may[i][:0], v)
	}
	return nil
}

// killRun is a disk that is written to by servers that are killed.
type killRun struct {
	t     *testing.T
	image string
	rng   *rand.Rand
	parts [workers]*ledger

	caches []string // the cache modes that take turns
}

// launch serves the disk in one of the ways that there are.
func (r *killRun) launch(round int) *testenv.Server {
	r.t.Helper()
	kind, err := testenv.KindByName([]string{"vmdiskd-uring", "vmdiskd-pool"}[round%2])
	if err != nil {
		r.t.Fatal(err)
	}
	cache := "--cache=" + r.caches[round/2%len(r.caches)]
	s, err := kind.Launch(testenv.Context(r.t), testenv.TempDir(r.t), writable(r.image, cache))
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(s.Kill)
	return s
}

// round loads a server, ends it, and looks at what is left, by way of the next
// one.
func (r *killRun) round(s *testenv.Server, round int, kill bool) *testenv.Server {
	r.t.Helper()
	var all sync.WaitGroup
	for _, l := range r.parts {
		c := dial(r.t, s)
		all.Go(func() { l.load(testenv.Context(r.t), c, !kill) })
	}
	end, stopped := s.Kill, error(nil)
	if !kill {
		end = func() { stopped = s.Stop() }
	}
	over := make(chan struct{})
	time.AfterFunc(time.Duration(r.rng.IntN(300))*time.Millisecond, func() { end(); close(over) })
	all.Wait()
	<-over
	if stopped != nil {
		r.t.Error(stopped)
	}
	wantSound(r.t, r.image, kill)
	next := r.launch(round + 1)
	p := make([]byte, killDisk)
	if err := dial(r.t, next).ReadAt(testenv.Context(r.t), p, 0); err != nil {
		r.t.Fatal(err)
	}
	for _, l := range r.parts {
		if err := l.settle(p); err != nil {
			r.t.Fatalf("round %d: %v", round, err)
		}
	}
	return next
}

// newKillRun makes a disk of zeroes, or with above one whose blocks all have
// version 1 below.
func newKillRun(t *testing.T, above bool, options ...string) *killRun {
	t.Helper()
	vmdiskdOnly(t)
	needQEMU(t)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	dir := testenv.TempDir(t)
	r := &killRun{t: t, image: filepath.Join(dir, "disk.qcow2"), rng: rand.New(rand.NewPCG(seed, 0)),
		caches: []string{"writeback", "none"}}
	initial := uint64(0)
	if above {
		initial = 1
		base := make([]byte, killDisk)
		for i := range killDisk / killBlock {
			tag(base[i*killBlock:(i+1)*killBlock], i, initial)
		}
		if err := os.WriteFile(filepath.Join(dir, "base.raw"), base, 0o600); err != nil {
			t.Fatal(err)
		}
		options = append(options, "-b", "base.raw", "-F", "raw")
	}
	createQcow2(t, dir, "disk.qcow2", fmt.Sprint(killDisk), options...)
	for i := range r.parts {
		l := &ledger{first: i * blocksPer, may: make([][]uint64, blocksPer), next: 1, rng: rand.New(rand.NewPCG(seed, uint64(i+1)))}
		for k := range l.may {
			l.may[k] = []uint64{initial}
		}
		r.parts[i] = l
	}
	return r
}

// rounds ends so many servers, and the last one in good order.
func (r *killRun) rounds(n int, kill bool) {
	r.t.Helper()
	s := r.launch(0)
	for round := range n {
		s = r.round(s, round, kill)
	}
	stopAndCompare(r.t, s, r.image, served(r.t, s))
	wantSound(r.t, r.image, kill)
}

func TestFlushedBlocksOutliveKilledWritersOfQcow2(t *testing.T) {
	for _, tt := range []struct {
		name    string
		above   bool
		options []string
		caches  []string // nil: those of every run
		share   int      // of the kills, in fifths
	}{
		{"plain", false, nil, nil, 2},
		{"overlay", true, []string{"-o", "cluster_size=8k"}, nil, 2},
		{"subclusters", false, []string{"-o", "extended_l2=on"}, nil, 1},
		// The host goes on: its page cache has all that the tables name.
		{"unsafe", false, nil, []string{"unsafe"}, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := newKillRun(t, tt.above, tt.options...)
			if tt.caches != nil {
				r.caches = tt.caches
			}
			r.rounds(*kills*tt.share/5, true)
		})
	}
}

// TestAnsweredBlocksOutliveStoppedWritersOfQcow2: a server that ends in good
// order loses nothing that it has answered, and leaves no leaks.
func TestAnsweredBlocksOutliveStoppedWritersOfQcow2(t *testing.T) {
	newKillRun(t, true).rounds(4, false)
}

// TestForcedWritesOutliveAKilledWriterOfQcow2: what FUA asks for is in the image,
// tables included, when the write is answered, without a flush.
func TestForcedWritesOutliveAKilledWriterOfQcow2(t *testing.T) {
	for _, engine := range []string{"vmdiskd-uring", "vmdiskd-pool"} {
		t.Run(engine, func(t *testing.T) {
			image := newQcow2(t, fmt.Sprint(killDisk))
			kind, err := testenv.KindByName(engine)
			if err != nil {
				t.Fatal(err)
			}
			ctx := testenv.Context(t)
			s, err := kind.Launch(ctx, testenv.TempDir(t), writable(image))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(s.Kill)
			const at, n = 3 << 20, 192 << 10 // three clusters
			c := dial(t, s)
			if err := c.WriteAt(ctx, bytes.Repeat([]byte{0x5a}, n), at, wire.FlagFUA); err != nil {
				t.Fatal(err)
			}
			if err := c.Zero(ctx, at+n/2, killBlock, wire.FlagFUA|wire.FlagNoHole); err != nil {
				t.Fatal(err)
			}
			s.Kill()
			wantSound(t, image, true)
			testenv.Run(t, "qemu-io", "-r", "-f", "qcow2",
				"-c", fmt.Sprintf("read -P 0x5a %d %d", at, n/2),
				"-c", fmt.Sprintf("read -P 0 %d %d", at+n/2, killBlock),
				"-c", fmt.Sprintf("read -P 0x5a %d %d", at+n/2+killBlock, n/2-killBlock), image)
		})
	}
}
