package store_test

import (
	"bytes"
	"errors"
	"io"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/store"
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

// TestReadPaddedKnowsWhereTheFileEnded: less than it had then is an error.
func TestReadPaddedKnowsWhereTheFileEnded(t *testing.T) {
	st, _, _ := newStore(t, false, 5000, 7)
	for _, off := range []int64{4900, 4950, 5000, 9000} {
		p := bytes.Repeat([]byte{1}, 100)
		have := int(max(0, min(100, 5000-off)))
		want := append(bytes.Repeat([]byte{7}, have), make([]byte, 100-have)...)
		if err := store.ReadPadded(t.Context(), st, p, off, 5000); err != nil || !bytes.Equal(p, want) {
			t.Errorf("read at %d: got %v, %v, want %v", off, err, p, want)
		}
	}
	err := store.ReadPadded(t.Context(), st, make([]byte, 100), 4950, 5001)
	if !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("read of a file that ended later: got %v, want %v", err, io.ErrUnexpectedEOF)
	}
}
