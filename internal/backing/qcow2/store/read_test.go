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
