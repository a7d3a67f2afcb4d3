package units_test

import (
	"math"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/units"
)

func TestSizesAreReadAsQemuImgReadsThem(t *testing.T) {
	for in, want := range map[string]int64{
		"0": 0, "512": 512, "512b": 512, "64k": 64 << 10, "64K": 64 << 10, "3M": 3 << 20,
		"10G": 10 << 30, "2t": 2 << 40, "9223372036854775807": math.MaxInt64, "8388607T": 8388607 << 40,
	} {
		if got, err := units.ParseSize(in); err != nil || got != want {
			t.Errorf("ParseSize(%q) = %d, %v; want %d", in, got, err, want)
		}
	}
}

func TestWhatIsNoSizeIsRefused(t *testing.T) {
	for _, in := range []string{
		"", "G", "-1", "+1", "1.5G", "1 G", "1KK", "1KiB", "1P", "0x10", "1e3", "9223372036854775808", "8388608T", "1_000",
	} {
		if got, err := units.ParseSize(in); err == nil {
			t.Errorf("ParseSize(%q) = %d, want an error", in, got)
		}
	}
}
