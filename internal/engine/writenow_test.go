package engine

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// TestWriteNowIsForABoundedNumberOfCallers has as many in it as may be.
func TestWriteNowIsForABoundedNumberOfCallers(t *testing.T) {
	p := NewPool(1)
	defer p.Close()
	file, err := os.Create(filepath.Join(t.TempDir(), "image"))
	if err != nil {
		t.Fatal(err)
	}
	f, err := p.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, tt := range []struct{ others, want int }{{limits.CachedWriters - 1, 5}, {limits.CachedWriters, 0}, {0, 5}} {
		p.writers.Store(int64(tt.others))
		if got, err := p.WriteNow(f, []byte("12345"), 0); got != tt.want || err != nil {
			t.Errorf("WriteNow beside %d others = %d, %v, want %d", tt.others, got, err, tt.want)
		}
	}
}
