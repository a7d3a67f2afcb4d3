package check

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/storetest"
)

func (i image) header() *format.Header {
	i.Helper()
	h, err := format.ParseHeader(i.bytes())
	if err != nil {
		i.Fatal(err)
	}
	return h
}

// repair runs RepairLeaks and puts the file back.
func (i image) repair() error {
	i.Helper()
	m, h, ctx := storetest.New(i.bytes()), i.header(), context.Background()
	r, err := Run(ctx, m, h, Options{})
	if err != nil {
		i.Fatal(err)
	}
	if err := RepairLeaks(ctx, m, h, r); err != nil {
		return err
	}
	if m.Count(storetest.Write) > 0 && m.Count(storetest.Sync) == 0 {
		i.Error("the repair was not made durable")
	}
	return os.WriteFile(i.path, m.Contents(), 0o600)
}

// guest is what a guest reads.
func (i image) guest() []byte {
	i.Helper()
	out := filepath.Join(i.TempDir(), "raw")
	i.run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", i.path, out)
	b, err := os.ReadFile(out)
	if err != nil {
		i.Fatal(err)
	}
	return b
}

func TestRepairedLeaksAreGone(t *testing.T) {
	seed := rand.Uint64()
	rnd := rand.New(rand.NewPCG(seed, 0))
	for _, options := range []string{
		"", "compat=0.10", "cluster_size=512", "refcount_bits=2", "refcount_bits=4,cluster_size=4k",
		"refcount_bits=8", "refcount_bits=32,cluster_size=512", "refcount_bits=64",
	} {
		t.Run(options, func(t *testing.T) {
			i := create(t, options, "8M", "write -P 1 0 300k", "write -P 2 1M 200k").snap("one").io("write -P 3 64k 9k")
			g := i.header()
			geometry := g.Geometry()
			// Raise refcounts at random: of clusters in use and of free ones.
			b, block := i.bytes(), i.at(int64(g.RefTableOffset))
			entries := b[block : block+geometry.ClusterSize]
			for range 20 {
				c := rnd.Int64N(min(geometry.BlockEntries, geometry.Clusters(int64(len(b)))))
				if n := geometry.Refcount(entries, c); n == 0 || n == 2 {
					geometry.SetRefcount(entries, c, 3)
				}
			}
			if err := os.WriteFile(i.path, b, 0o600); err != nil {
				t.Fatal(err)
			}
			want := i.guest()
			if r := i.check(); r.Leaks == 0 || r.Corruptions != 0 {
				t.Fatalf("seed %d: %d leaks and %d corruptions were made", seed, r.Leaks, r.Corruptions)
			}
			i.agree(nil)
			if err := i.repair(); err != nil {
				t.Fatalf("seed %d: %v", seed, err)
			}
			i.agree(nil)
			i.run("qemu-img", "check", "-q", "-f", "qcow2", i.path)
			if !bytes.Equal(i.guest(), want) {
				t.Errorf("seed %d: the contents changed", seed)
			}
		})
	}
}

// orphaned is an image whose refcounts still tell of a snapshot that its header
// does not name any more: one that was being deleted.
func orphaned(t *testing.T, options string) image {
	i := create(t, options, "8M", "write -P 1 0 300k", "write -P 2 5M 100k").snap("one").io("write -P 3 64k 9k")
	return i.patch(60, "00000000").patch(64, "0000000000000000")
}

// TestRepairedLeaksOfClustersInUse: what is the disk's alone then is marked so,
// and the image is sound.
func TestRepairedLeaksOfClustersInUse(t *testing.T) {
	for _, options := range []string{"", "compat=0.10", "cluster_size=512", "cluster_size=2M", "extended_l2=on", "refcount_bits=2"} {
		t.Run(options, func(t *testing.T) {
			i := orphaned(t, options)
			want := i.guest()
			if r := i.check(); r.Leaks == 0 || r.Corruptions != 0 {
				t.Fatalf("%d leaks and %d corruptions were made", r.Leaks, r.Corruptions)
			}
			if err := i.repair(); err != nil {
				t.Fatal(err)
			}
			i.agree(nil)
			if r := i.check(); r.Leaks+r.Corruptions != 0 {
				t.Errorf("%d leaks and %d corruptions are left%s", r.Leaks, r.Corruptions, texts(r))
			}
			if !bytes.Equal(i.guest(), want) {
				t.Error("the contents changed")
			}
		})
	}
}

// TestRepairCanBeDoneAgain makes each write and sync fail in turn.
func TestRepairCanBeDoneAgain(t *testing.T) {
	i := orphaned(t, "cluster_size=512")
	h, ctx := i.header(), context.Background()
	for _, op := range []storetest.Op{storetest.Write, storetest.Sync} {
		for n, failed := 1, true; failed; n++ {
			m := storetest.New(i.bytes())
			m.FailOp(op, n, errors.New("broken disk"))
			for again := range 2 {
				r, err := Run(ctx, m, h, Options{})
				if err != nil {
					t.Fatal(err)
				}
				err = RepairLeaks(ctx, m, h, r)
				if again > 0 && err != nil {
					t.Fatalf("%s %d failed: the next repair says %v", op, n, err)
				}
				failed = failed && (again > 0 || err != nil)
				m.Reopen()
			}
			if _, err := Run(ctx, m, h, Options{Sound: true}); err != nil {
				t.Errorf("%s %d failed: after the next repair: %v", op, n, err)
			}
			if !failed && n < 3 {
				t.Errorf("only %d calls of %s were made to fail", n-1, op)
			}
		}
	}
}

func TestRepairRefusesCorruptions(t *testing.T) {
	for name, i := range map[string]image{
		"refcount too low":                 leaky(t).patch(0x2000a, "0000"),
		"cluster elsewhere in a data file": create(t, "data_file=data", "64M", fill).patch(0x40000, "8000000000030000").patch(0x2000a, "0001"),
	} {
		before := i.bytes()
		if err := i.repair(); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: RepairLeaks = %v, want ErrCorrupt", name, err)
		}
		if !bytes.Equal(i.bytes(), before) {
			t.Errorf("%s: the image was changed", name)
		}
	}
}

func TestRepairClearsUnknownAutoclearBits(t *testing.T) {
	i := leaky(t).patch(88, "8000000000000000")
	if err := i.repair(); err != nil {
		t.Fatal(err)
	}
	if got := i.header().Autoclear; got != 0 {
		t.Errorf("autoclear bits are %#x, want 0", got)
	}
	i.agree(nil)
}

func TestFailedReadsAreErrorsAndForbidRepair(t *testing.T) {
	i := leaky(t)
	h, ctx := i.header(), context.Background()
	calls := storetest.New(i.bytes())
	if _, err := Run(ctx, calls, h, Options{}); err != nil {
		t.Fatal(err)
	}
	for n := 1; n <= calls.Count(storetest.Read); n++ {
		m := storetest.New(i.bytes())
		m.FailOp(storetest.Read, n, errors.New("broken disk"))
		r, err := Run(ctx, m, h, Options{})
		if err != nil {
			t.Fatal(err)
		}
		if r.Errors != 1 {
			t.Errorf("read %d failed: %d errors, want 1", n, r.Errors)
		}
		if err := RepairLeaks(ctx, m, h, r); err == nil || m.Count(storetest.Write) > 0 {
			t.Errorf("read %d failed: the repair went on: %v", n, err)
		}
	}
}

// TestClearMarksCanBeDoneAgain makes each call fail in turn: the marks are there
// or they are not, and all else stays.
func TestClearMarksCanBeDoneAgain(t *testing.T) {
	i := create(t, "", "1M", "write -P 1 0 64k")
	clean := i.bytes()
	marked := i.patch(format.OffIncompat, "0000000000000003").bytes()
	ctx := context.Background()
	for n, failed := 1, true; failed; n++ {
		m, h := storetest.New(marked), i.header()
		m.FailCall(n, errors.New("broken disk"))
		failed = ClearMarks(ctx, m, h) != nil
		if failed && h.Incompat != format.IncompatDirty|format.IncompatCorrupt {
			t.Errorf("call %d failed: the header in memory has the marks %#x", n, h.Incompat)
		}
		if got := m.Contents(); failed && !bytes.Equal(got, marked) && !bytes.Equal(got, clean) {
			t.Errorf("call %d failed: the image is something else", n)
		}
		m.Reopen()
		m.FailCall(0, nil)
		if err := ClearMarks(ctx, m, h); err != nil || !bytes.Equal(m.Contents(), clean) || h.Incompat != 0 {
			t.Errorf("call %d failed: then it left the marks %#x, %v", n, h.Incompat, err)
		}
		if m.Count(storetest.Sync) == 0 {
			t.Error("the marks were not cleared durably")
		}
	}
}
