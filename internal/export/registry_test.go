package export

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/mem"
	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd"
)

var _ nbd.Exports = (*Registry)(nil)

// recorder notes what happens to a device.
type recorder struct {
	backing.Device
	calls []string
}

func (r *recorder) Flush(ctx context.Context) error {
	r.calls = append(r.calls, "flush")
	return r.Device.Flush(ctx)
}

func (r *recorder) Close() error {
	r.calls = append(r.calls, "close")
	return r.Device.Close()
}

func add(t *testing.T, r *Registry, s Spec) {
	t.Helper()
	if s.Device == nil {
		s.Device = mem.New(1<<20, nil)
	}
	if err := r.Add(s); err != nil {
		t.Fatal(err)
	}
}

func TestEmptyNameOpensTheFirstExport(t *testing.T) {
	r := NewRegistry()
	add(t, r, Spec{Name: "b"})
	add(t, r, Spec{Name: "a"})
	x, err := r.Find("", nil)
	if err != nil || x.Name != "b" {
		t.Errorf("got %q, %v; want b", x.Name, err)
	}
}

func TestListIsSorted(t *testing.T) {
	r := NewRegistry()
	for _, n := range []string{"c", "a", "b"} {
		add(t, r, Spec{Name: n, Description: "disk " + n})
	}
	var got []string
	for _, x := range r.List(nil) {
		got = append(got, x.Name+":"+x.Description)
	}
	if s := strings.Join(got, " "); s != "a:disk a b:disk b c:disk c" {
		t.Errorf("got %q", s)
	}
}

func TestUnknownNameIsUnknown(t *testing.T) {
	r := NewRegistry()
	if _, err := r.Find("", nil); !errors.Is(err, nbd.ErrUnknownExport) {
		t.Errorf("empty registry: got %v", err)
	}
	add(t, r, Spec{Name: "a"})
	if _, err := r.Open(t.Context(), "A", nil); !errors.Is(err, nbd.ErrUnknownExport) {
		t.Errorf("other name: got %v", err)
	}
}

func TestBadSpecsAreRefused(t *testing.T) {
	r := NewRegistry()
	add(t, r, Spec{Name: "a"})
	long := strings.Repeat("x", limits.MaxString+1)
	for _, s := range []Spec{{Name: "a"}, {Name: long}, {Name: "\xff"}, {Name: "b", Description: long}, {Name: "b", Description: "\xff"}} {
		s.Device = mem.New(1, nil)
		if err := r.Add(s); err == nil {
			t.Errorf("%.20q was accepted", s.Name)
		}
	}
	if err := r.Add(Spec{Name: "a"}); !errors.Is(err, ErrExists) {
		t.Errorf("second a: got %v, want %v", err, ErrExists)
	}
}

func TestReadOnlyExportHasNoRightToWrite(t *testing.T) {
	r := NewRegistry()
	add(t, r, Spec{Name: "a", ReadOnly: true})
	x, err := r.Open(t.Context(), "a", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer x.Close()
	if err := x.Device.WriteAt(t.Context(), make([]byte, 512), 0, 0); !errors.Is(err, backing.ErrReadOnly) {
		t.Errorf("write: got %v, want %v", err, backing.ErrReadOnly)
	}
}

func TestCloseWaitsFlushesAndCloses(t *testing.T) {
	r := NewRegistry()
	rw, ro := &recorder{Device: mem.New(1, nil)}, &recorder{Device: mem.New(1, nil)}
	add(t, r, Spec{Name: "rw", Device: rw})
	add(t, r, Spec{Name: "ro", Device: ro, ReadOnly: true})
	x, err := r.Open(t.Context(), "rw", nil)
	if err != nil {
		t.Fatal(err)
	}
	closed := make(chan error)
	go func() { closed <- r.Close(context.Background()) }()
	select {
	case <-closed:
		t.Fatal("closed under a user")
	default:
	}
	x.Close()
	x.Close() // twice is once
	if err := <-closed; err != nil {
		t.Error(err)
	}
	if got := strings.Join(rw.calls, " "); got != "flush close" {
		t.Errorf("writable device: got %q, want flush close", got)
	}
	if got := strings.Join(ro.calls, " "); got != "close" {
		t.Errorf("read-only device: got %q, want close", got)
	}
	if _, err := r.Open(t.Context(), "rw", nil); !errors.Is(err, nbd.ErrUnknownExport) {
		t.Errorf("open after close: got %v", err)
	}
}
