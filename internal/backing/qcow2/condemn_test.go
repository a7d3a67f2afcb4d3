package qcow2_test

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"syscall"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/storetest"
)

// TestImageThatIsDamagedMeanwhileTakesNoMoreWrites: whoever spoils the mapping of
// an open image gets EIO there and no write anywhere, and the image is marked, so
// that nobody opens it for writing before it is repaired. The rest can be read.
func TestImageThatIsDamagedMeanwhileTakesNoMoreWrites(t *testing.T) {
	for _, tt := range []struct {
		name, options string
		damage        string // of the L2 entry of the first cluster
		mark          int
	}{
		{"in metadata", "cluster_size=64k", "8000000000030000", format.IncompatCorrupt},
		{"not aligned", "cluster_size=64k", "8000000000050200", format.IncompatCorrupt},
		{"compressed beyond the end", "cluster_size=64k", "4000001000000000", format.IncompatCorrupt},
		{"version 2", "cluster_size=64k,compat=0.10", "8000000000030000", 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			// L2 tables of one slice each: the damaged one is read late.
			sound := made(t, tt.options, "2G", "write -P 17 0 64k", "write -P 18 1G 64k")
			st := storetest.New(sound)
			var told []error
			d, err := qcow2.Open(t.Context(), st, qcow2.Options{Path: "image", Log: slog.New(slog.DiscardHandler),
				Poisoned: func(err error) { told = append(told, err) }})
			if err != nil {
				t.Fatal(err)
			}
			p := make([]byte, 4096)
			if err := d.ReadAt(t.Context(), p, 1<<30); err != nil {
				t.Fatal(err)
			}
			if err := st.WriteAt(t.Context(), patchedBytes(t, make([]byte, 8), 0, tt.damage), 0x40000, true); err != nil {
				t.Fatal(err)
			}
			if err := d.ReadAt(t.Context(), p, 0); !errors.Is(err, backing.ErrIO) {
				t.Errorf("read through the damaged entry: %v, want an I/O error", err)
			}
			for name, change := range map[string]func() error{
				"write in place":   func() error { return d.WriteAt(t.Context(), p, 1<<30, 0) },
				"write that links": func() error { return d.WriteAt(t.Context(), p, 1<<30+1<<20, 0) },
				"zero":             func() error { return d.Zero(t.Context(), 1<<30, 65536, 0) },
				"trim":             func() error { return d.Trim(t.Context(), 1<<30, 65536, 0) },
				"flush":            func() error { return d.Flush(t.Context()) },
			} {
				if err := change(); !errors.Is(err, backing.ErrIO) {
					t.Errorf("%s: %v, want an I/O error", name, err)
				}
			}
			if err := d.ReadAt(t.Context(), p, 1<<30); err != nil || p[0] != 18 {
				t.Errorf("read elsewhere: %v, %d, want 18", err, p[0])
			}
			if err := d.Close(); err == nil {
				t.Error("close says that all was written")
			}
			if len(told) != 1 {
				t.Errorf("told %d times: %v, want once", len(told), told)
			}
			after := patchedBytes(t, st.Contents(), 0x40000, "8000000000050000")
			if got := u64(after, format.OffIncompat) ^ u64(sound, format.OffIncompat); got != tt.mark {
				t.Errorf("marks of the image are %#x, want %#x", got, tt.mark)
			}
			copy(after[format.OffIncompat:], sound[format.OffIncompat:][:8])
			if string(after) != string(sound) {
				t.Error("more was written than the mark")
			}
		})
	}
}

// TestAuditFindsWhatWouldCondemn: an image in which one bit of an entry is wrong, or
// whose end is missing, is refused, or nothing is found when it is read.
func TestAuditFindsWhatWouldCondemn(t *testing.T) {
	const size, entries = 64 << 10, 32 // bytes of the disk, and of its L2 table that have entries
	for _, tt := range []struct {
		options  string
		commands []string
	}{
		{"cluster_size=4k", []string{"write -q -P 17 0 8k"}},
		{"cluster_size=4k", []string{"write -q -c -P 17 0 4k", "write -q -c -P 18 4k 4k"}},
		{"cluster_size=16k,extended_l2=on", []string{"write -q -P 17 0 20k"}},
		{"cluster_size=4k,data_file=t.data", []string{"write -q -P 17 0 8k"}},
		{"cluster_size=16k,extended_l2=on,data_file=t.data", []string{"write -q -P 17 0 20k"}},
	} {
		sound := made(t, tt.options, fmt.Sprint(size), tt.commands...)
		refused := 0
		try := func(name string, b []byte) {
			st, o := storetest.New(b), quiet()
			o.DataFile = dataFor(t, st)
			o.Poisoned = func(err error) { t.Errorf("%s, %q, %s: %v", tt.options, tt.commands, name, err) }
			d, err := qcow2.Open(t.Context(), st, o)
			if err != nil {
				refused++
				return
			}
			_ = d.ReadAt(t.Context(), make([]byte, size), 0)
			_ = d.Close()
		}
		table := u64(sound, u64(sound, format.OffL1+4)) & format.OffsetMask
		for bit := range entries * 8 {
			b := bytes.Clone(sound)
			b[table+bit/8] ^= 1 << (bit % 8)
			try(fmt.Sprintf("bit %d of byte %d", bit%8, bit/8), b)
		}
		for end := table + entries; end < len(sound); end += 128 {
			try(fmt.Sprintf("%d bytes", end), sound[:end])
		}
		if refused < entries {
			t.Errorf("%s, %q: only %d images are refused", tt.options, tt.commands, refused)
		}
	}
}

// TestCommitThatIsLostAtTheEndIsTold: of an image that is closed without its mapping
// who opens it again must know.
func TestCommitThatIsLostAtTheEndIsTold(t *testing.T) {
	st := storetest.New(made(t, "cluster_size=64k", "2G"))
	var told []error
	d, err := qcow2.Open(t.Context(), st, qcow2.Options{Path: "image", Log: slog.New(slog.DiscardHandler),
		Poisoned: func(err error) { told = append(told, err) }})
	if err != nil {
		t.Fatal(err)
	}
	if err := d.WriteAt(t.Context(), make([]byte, 4096), 0, 0); err != nil {
		t.Fatal(err)
	}
	st.FailOp(storetest.Write, 1, syscall.ENOSPC)
	if err := d.Close(); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("close: got %v, want %v", err, syscall.ENOSPC)
	}
	if len(told) != 1 || !errors.Is(told[0], backing.ErrPoisoned) {
		t.Errorf("told of %v, want one error that a write was lost", told)
	}
}
