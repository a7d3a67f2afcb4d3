package backing_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"syscall"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
)

func TestKindOf(t *testing.T) {
	for _, tt := range []struct {
		err  error
		want backing.Kind
	}{
		{backing.ErrLocked, backing.ErrLocked},
		{fmt.Errorf("layer: %w", backing.ErrPoisoned), backing.ErrPoisoned},
		{&backing.Error{Kind: backing.ErrNoSpace, Err: syscall.EIO}, backing.ErrNoSpace},
		{syscall.ENOSPC, backing.ErrNoSpace},
		{syscall.EDQUOT, backing.ErrNoSpace},
		{syscall.EFBIG, backing.ErrNoSpace},
		{syscall.EROFS, backing.ErrReadOnly},
		{syscall.EPERM, backing.ErrReadOnly},
		{syscall.EACCES, backing.ErrReadOnly},
		{syscall.EOPNOTSUPP, backing.ErrNotSupported},
		{syscall.ENOSYS, backing.ErrNotSupported},
		{syscall.ENOTTY, backing.ErrNotSupported},
		{syscall.EIO, backing.ErrIO},
		{syscall.EINVAL, backing.ErrIO},
		{fmt.Errorf("deep: %w", syscall.ENOSPC), backing.ErrNoSpace},
		{io.ErrUnexpectedEOF, backing.ErrIO},
		{io.EOF, backing.ErrIO},
		{errors.New("anything"), backing.ErrIO},
	} {
		if got := backing.KindOf(tt.err); got != tt.want {
			t.Errorf("kind of %v: got %q, want %q", tt.err, got, tt.want)
		}
	}
}

func TestErrorTextHasThePlaceAndKindHasNot(t *testing.T) {
	for _, tt := range []struct {
		err  backing.Error
		want string
	}{
		{backing.Error{Op: "write", Path: "/a b", Off: 5, Len: 7, Kind: backing.ErrNoSpace, Err: syscall.ENOSPC},
			`write "/a b" at 5+7: no space left on the storage: no space left on device`},
		{backing.Error{Op: "flush", Off: -1, Kind: backing.ErrIO}, "flush: input/output error"},
	} {
		if got := tt.err.Error(); got != tt.want {
			t.Errorf("text: got %q, want %q", got, tt.want)
		}
		if p := tt.err.Path; p != "" && strings.Contains(backing.KindOf(&tt.err).Error(), p) {
			t.Errorf("kind of %v, which guests see, names the path", &tt.err)
		}
	}
}

func TestErrorMatchesKindAndCause(t *testing.T) {
	err := fmt.Errorf("above: %w", &backing.Error{Op: "read", Kind: backing.ErrIO, Err: syscall.EREMOTEIO})
	for _, want := range []error{backing.ErrIO, syscall.EREMOTEIO} {
		if !errors.Is(err, want) {
			t.Errorf("%v: want it to match %v", err, want)
		}
	}
	if errors.Is(err, backing.ErrNoSpace) {
		t.Errorf("%v: matches %v", err, backing.ErrNoSpace)
	}
}

func TestWrapAddsOnePlaceOnly(t *testing.T) {
	if err := backing.Wrap("read", 0, 1, nil); err != nil {
		t.Errorf("wrap of nil: got %v", err)
	}
	inner := backing.Wrap("read", 4096, 512, syscall.EIO)
	if got, want := inner.Error(), "read at 4096+512: input/output error: input/output error"; got != want {
		t.Errorf("text: got %q, want %q", got, want)
	}
	if again := backing.Wrap("copy", 0, 0, inner); again != inner {
		t.Errorf("wrap of a wrapped error: got %v, want it unchanged", again)
	}
	for _, why := range []error{context.Canceled, context.DeadlineExceeded} {
		if got := backing.Wrap("read", 0, 1, why); got != why {
			t.Errorf("wrap for a caller who gave up: got %v, want %v", got, why)
		}
	}
}

func TestErrorGetsThePathItDoesNotHave(t *testing.T) {
	cause := errors.New("cause")
	err := backing.WithPath("/a", &backing.Error{Op: "map", Off: 5, Kind: backing.ErrIO, Err: cause})
	var e *backing.Error
	if !errors.As(err, &e) || e.Path != "/a" || e.Off != 5 || !errors.Is(err, cause) {
		t.Errorf("got %v", err)
	}
	if again := backing.WithPath("/b", err); again != err {
		t.Errorf("an error with a path: got %v, want %v", again, err)
	}
	inner := &backing.Error{Op: "allocate", Off: -1, Kind: backing.ErrNoSpace}
	err = backing.WrapIn("resize", "/a", 1, 0, inner)
	if got, want := err.Error(), `allocate "/a": `; !strings.HasPrefix(got, want) || inner.Path != "" {
		t.Errorf("wrapped: got %q, want %q", got, want)
	}
	both := errors.Join(inner, cause)
	if got := backing.WithPath("/a", both); got != both {
		t.Errorf("two errors: got %v, want both", got)
	}
	if got := backing.WithPath("/a", cause); got != cause {
		t.Errorf("another error: got %v, want %v", got, cause)
	}
	if got := backing.WrapIn("read", "/a", 1, 2, context.Canceled); got != context.Canceled {
		t.Errorf("an impatient caller: got %v", got)
	}
	if err := backing.WrapIn("read", "/a", 1, 2, cause); !errors.As(err, &e) || e.Path != "/a" || e.Len != 2 || e.Kind != backing.ErrIO {
		t.Errorf("wrapped: got %v", err)
	}
}
