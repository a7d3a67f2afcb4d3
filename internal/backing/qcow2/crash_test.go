package qcow2_test

import (
	"context"
	"errors"
	"math/rand/v2"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/disktest"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/qcowtest"
)

// TestPowerCutsLoseNothingThatWasFlushed cuts the power during random scripts.
func TestPowerCutsLoseNothingThatWasFlushed(t *testing.T) {
	list := created(t)
	list = append(list, compressedImage(t, "", 64<<10, 2<<20), compressedImage(t, ",compression_type=zstd", 4096, 1<<20),
		fromQEMUIO(t, "512,snapshots", "", 512, "1M", "write -P 1 0 700k", "snapshot a", "write -P 2 300k 200k", "snapshot b"),
		fromQEMUIO(t, "16k,subclusters,snapshot", ",extended_l2=on", 16<<10, "2M", "write -P 1 0 1M", "write -z 600k 20k", "snapshot a"))
	list = append(list, fromOptions(t, qcowtest.Options{Compat: "1.1", ClusterSize: 4096, RefcountBits: 16, Bitmaps: 2,
		Backing: qcowtest.NoBacking, Preallocation: "off", Shape: qcowtest.AboveL2})...)
	share := (*crashStates + len(list) - 1) / len(list)
	for _, s := range list {
		t.Run(s.name, func(t *testing.T) {
			seed, states := seedOf(t), 0
			for last := seed + 1000; states < share; seed++ {
				if seed == last {
					t.Fatalf("1000 scripts have led to %d states only, want %d", states, share)
				}
				s.discard = discards[seed%4]
				shape := disktest.Shape{Size: int64(len(s.first)), Cluster: s.cluster, Ops: 30, Reopen: true, Largest: 40 * s.cluster}
				script := shape.Random(rand.New(rand.NewPCG(seed, 0)))
				n, err := s.episode(seed, script, share-states)
				if err != nil {
					s.report(t, seed, script, max(n, 1), err)
				}
				states += n
			}
			if got := s.judge.images; got != states {
				t.Errorf("qemu-img has judged %d of %d states", got, states)
			}
			t.Logf("%d states, %d of them distinct", states, len(s.judge.known))
		})
	}
}

// TestPowerCutsAfterFailures has calls to the host file fail now and then: what
// was undone, or is to be done again, must hold in a power cut as well.
func TestPowerCutsAfterFailures(t *testing.T) {
	ctx, seed := t.Context(), seedOf(t)
	share := (*crashStates + 19) / 20
	for _, s := range []*specimen{created(t)[1], compressedImage(t, "", 4096, 256<<10),
		fromQEMUIO(t, "snapshot", "", 512, "256k", "write -P 1 0 128k", "snapshot a")} {
		for states, first := 0, seed; states < share; seed++ {
			if seed == first+1000 {
				t.Fatalf("%s: 1000 scripts have led to %d states only, want %d", s.name, states, share)
			}
			rnd := rand.New(rand.NewPCG(seed, 0))
			h, r := s.start(t)
			r.Faulty = true
			cuts := disktest.PowerCuts{Format: s.format(), Oracle: r.Oracle, Files: h.files, PerSync: 4, Check: s.judged}
			cuts.Start(rnd, share-states)
			shape := disktest.Shape{Size: int64(len(s.first)), Cluster: s.cluster, Ops: 40, Largest: 40 * s.cluster}
			script := shape.Random(rand.New(rand.NewPCG(seed, 1)))
			for i := range script {
				if i%3 == 0 {
					h.files[0].FailCall(1+i*7%40, backing.ErrNoSpace)
				}
				var refused *backing.Error // by the disk; what is wrong with contents is none
				if err := r.Do(ctx, script[i:i+1]); err != nil && !errors.As(err, &refused) {
					t.Fatalf("%s: -disk.seed %d: batch %d: %v\n%s", s.name, seed, i, err, script)
				}
			}
			n, err := cuts.Stop()
			if err != nil {
				t.Fatalf("%s: -disk.seed %d: %v\n%s", s.name, seed, err, script)
			}
			states += n
			_ = r.Dev.Close() // it may have failed for good
			h.files[0].FailCall(0, nil)
			if _, err := audit(ctx, h.again()); err != nil {
				t.Fatalf("%s: -disk.seed %d: at the end: %v\n%s", s.name, seed, err, script)
			}
		}
	}
}

// TestMissingBarrierIsSeen takes the first Sync of each commit away: the same
// power cuts must then find something.
func TestMissingBarrierIsSeen(t *testing.T) {
	s := created(t)[1]
	for seed := range uint64(40) {
		ctx, h := context.Background(), s.host()
		f := h.again()
		f.Image = &disktest.BrokenSync{Store: f.Image, Drop: func(n int) bool { return n%2 == 0 }}
		d, err := s.open(ctx, f, false)
		if err != nil {
			t.Fatal(err)
		}
		r := disktest.Run{Dev: d, Oracle: disktest.NewOracle(make([]byte, len(s.first)))}
		cuts := disktest.PowerCuts{Format: s.format(), Oracle: r.Oracle, Files: h.files, PerSync: 8}
		cuts.Start(rand.New(rand.NewPCG(seed, 1)), 200)
		shape := disktest.Shape{Size: int64(len(s.first)), Cluster: s.cluster, Ops: 30, Largest: 40 * s.cluster}
		err = r.Do(ctx, shape.Random(rand.New(rand.NewPCG(seed, 0))))
		_, broken := cuts.Stop()
		if err = errors.Join(err, d.Close()); err != nil {
			t.Fatalf("without a power cut: %v", err)
		}
		if broken != nil {
			t.Logf("seed %d: %v", seed, broken)
			return
		}
	}
	t.Error("no power cut has shown it")
}
