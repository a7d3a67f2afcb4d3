package store_test

import (
	"bytes"
	"errors"
	"io"
	"os"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/store"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/storetest"
)

func TestReadFullFillsOrFails(t *testing.T) {
	st, _, _ := newStore(t, false, 5000, 7)
	p := make([]byte, 100)
	if err := store.ReadFull(t.Context(), st, p, 4900); err != nil || !bytes.Equal(p, bytes.Repeat([]byte{7}, 100)) {
		t.Errorf("read up to the end: got %v, %v", err, p)
	}
	if err := store.ReadFull(t.Context(), st, nil, 1<<40); err != nil {
		t.Errorf("read of nothing: got %v", err)
	}
	err := store.ReadFull(t.Context(), st, p, 4901)
	var e *backing.Error
	if !errors.As(err, &e) || e.Off != 4901 || e.Len != 100 || !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("read over the end: got %v, want %v at 4901+100", err, io.ErrUnexpectedEOF)
	}
}

func TestReadPaddedIsZeroBehindTheEnd(t *testing.T) {
	st, _, _ := newStore(t, false, 5000, 7)
	for _, off := range []int64{4900, 4950, 5000, 9000} {
		p := bytes.Repeat([]byte{1}, 100)
		have := int(max(0, min(100, 5000-off)))
		want := append(bytes.Repeat([]byte{7}, have), make([]byte, 100-have)...)
		if err := store.ReadPadded(t.Context(), st, p, off); err != nil || !bytes.Equal(p, want) {
			t.Errorf("read at %d: got %v, %v, want %v", off, err, p, want)
		}
	}
}

// TestReadOfWhatAFileHadIsNoZero: what was there when the file was opened, or came
// since, and was cut off by somebody else. What the owner cuts off he knows of.
func TestReadOfWhatAFileHadIsNoZero(t *testing.T) {
	forModes(t, func(t *testing.T, direct bool) {
		st, path, _ := newStore(t, direct, 8192, 7)
		read := func(off int64) error { return store.ReadPadded(t.Context(), st, make([]byte, 4096), off) }
		cut := func(size int64) {
			if err := os.Truncate(path, size); err != nil {
				t.Fatal(err)
			}
		}
		for _, tt := range []struct {
			name  string
			do    func() error
			had   int64
			hasNo int64
		}{
			{"when it was opened", func() error { return nil }, 4096, 8192},
			{"since it was written to", func() error { return st.WriteAt(t.Context(), make([]byte, 4096), 12288, false) }, 12288, 16384},
			{"since it was made longer", func() error { return st.Truncate(20480) }, 16384, 20480},
		} {
			if err := tt.do(); err != nil {
				t.Fatal(err)
			}
			cut(100)
			if err := read(tt.had); backing.KindOf(err) != backing.ErrIO || !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Errorf("read of what it had %s: got %v, want %v", tt.name, err, io.ErrUnexpectedEOF)
			}
			if err := read(tt.hasNo); err != nil {
				t.Errorf("read behind what it had %s: %v", tt.name, err)
			}
		}
		if err := st.Truncate(4096); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(read(4096), read(12288)); err != nil {
			t.Errorf("read of what its owner cut off: %v", err)
		}
	})
}

func TestStretchEndsWhereDataAndHolesMeet(t *testing.T) {
	st := storetest.New(make([]byte, 8192))
	st.Patch(2048, []byte{1})
	for _, tt := range []struct {
		off, length int64
		hole        bool
	}{{0, 2048, true}, {1024, 1024, true}, {2048, 512, false}, {2560, 8192 - 2560, true}} {
		length, hole, err := store.Stretch(t.Context(), st, tt.off, 8192-tt.off)
		if err != nil || length != tt.length || hole != tt.hole {
			t.Errorf("stretch at %d: got %d, hole %v, %v, want %d, %v", tt.off, length, hole, err, tt.length, tt.hole)
		}
	}
	if _, _, err := store.Stretch(t.Context(), st, 8192, 1); err == nil {
		t.Error("stretch behind the end: got no error")
	}
}
