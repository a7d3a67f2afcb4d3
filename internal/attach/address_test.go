package attach

import (
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/control/api"
)

// TestDiskIsAtAnAddressOfItsExport or from elsewhere, however its host is spelled.
func TestDiskIsAtAnAddressOfItsExport(t *testing.T) {
	own := "127.0.0.1"
	for _, a := range ownAddresses() {
		if a.Is4() && !a.IsLoopback() {
			own = a.String()
		}
	}
	for _, tt := range []struct {
		disk, export string
		unnamed      bool // it may be
		want         bool
	}{
		{"nbd+unix:///web?socket=/a", "nbd+unix:///web?socket=/a", false, true},
		{"nbd+unix:///web?socket=/b", "nbd+unix:///web?socket=/a", false, false},
		{"nbd+unix:///other?socket=/a", "nbd+unix:///web?socket=/a", false, false},
		{"nbd+unix:///?socket=/a", "nbd+unix:///web?socket=/a", true, false},
		{"nbd+unix:///?socket=/b", "nbd+unix:///web?socket=/a", false, false},
		{"nbd://127.0.0.1/web", "nbd://127.0.0.1:10809/web", false, true},
		{"nbd://127.0.0.1/web", "nbd://127.0.0.1:10810/web", false, false},
		{"nbd://127.0.0.1/web", "nbds://127.0.0.1/web", false, false},
		{"nbd://localhost/web", "nbd://127.0.0.1/web", false, true},
		{"nbd://127.0.0.1/web", "nbd://localhost/web", false, true},
		{"nbd://" + own + "/web", "nbd://localhost/web", false, true},
		{"nbd://192.0.2.1/web", "nbd://localhost/web", false, false}, // of RFC 5737, nobody's
		{"nbd://192.0.2.1/web", "nbd://127.0.0.1/web", false, false},
		{"nbd://[::1]/web", "nbd://127.0.0.1/web", false, false},
		{"nbd://127.0.0.1/web", "nbd+unix:///web?socket=127.0.0.1", false, false},
	} {
		uri, _, err := new(Source).remote(tt.disk)
		if err != nil {
			t.Fatal(err)
		}
		x := api.Export{URIs: []string{"nbd+unix:///web?socket=/none", tt.export}}
		x.Name = "web"
		if got, may := isAt(t.Context(), uri, x), mayBe(t.Context(), uri, x); got != tt.want || may != tt.unnamed {
			t.Errorf("a disk from %s is export web at %s: %t, may be %t, want %t and %t", tt.disk, tt.export, got, may, tt.want, tt.unnamed)
		}
	}
}
