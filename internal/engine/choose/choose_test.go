package choose

import (
	"bytes"
	"errors"
	"log/slog"
	"strings"
	"syscall"
	"testing"

	"go.uber.org/goleak"

	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/engine/bufpool"
	"github.com/vmdiskd/vmdiskd/internal/engine/enginetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestNamesChooseEngines(t *testing.T) {
	ring := func() (engine.Engine, error) { return named{}, nil }
	none := func() (engine.Engine, error) { return nil, syscall.EPERM }
	for _, tt := range []struct {
		name    string
		newRing func() (engine.Engine, error)
		want    string // engine name, "" for an error
		says    string // in the log, or in the error
	}{
		{"auto", ring, "uring", "level=INFO msg=\"engine is uring\""},
		{"auto", none, "pool", "level=INFO msg=\"engine is pool\" reason=\"operation not permitted\""},
		{"uring", ring, "uring", ""},
		{"uring", none, "", `engine "uring": operation not permitted`},
		{"pool", none, "pool", ""},
		{"", ring, "", `engine "": want "auto", "uring" or "pool"`},
		{"aio", ring, "", `engine "aio": want "auto", "uring" or "pool"`},
	} {
		var log bytes.Buffer
		e, err := choose(tt.name, slog.New(slog.NewTextHandler(&log, nil)), tt.newRing)
		if tt.want == "" {
			if err == nil || err.Error() != tt.says {
				t.Errorf("%q: error %v, want %s", tt.name, err, tt.says)
			}
			continue
		}
		if err != nil || e.Name() != tt.want {
			t.Errorf("%q: %v, %v, want %s", tt.name, e, err, tt.want)
			continue
		}
		if !strings.Contains(log.String(), tt.says) || tt.says == "" && log.Len() > 0 {
			t.Errorf("%q: logged %q, want %q", tt.name, log.String(), tt.says)
		}
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestForcedRingKeepsTheCause(t *testing.T) {
	none := func() (engine.Engine, error) { return nil, syscall.ENOSYS }
	if _, err := choose(Uring, slog.Default(), none); !errors.Is(err, syscall.ENOSYS) {
		t.Errorf("error %v, want one that is ENOSYS", err)
	}
}

// named stands for a ring: it has a name and nothing to close.
type named struct{ engine.Engine }

func (named) Name() string { return "uring" }
func (named) Close() error { return nil }

func TestWhateverAutoChoosesPassesTheSuite(t *testing.T) {
	enginetest.Run(t, t.TempDir(), func(t *testing.T, bufs *bufpool.Pool) engine.Engine {
		e, err := New(Auto, bufs, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		return e
	})
}
