package interop

import (
	"slices"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/nbd/client"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// TestServerOffersLessWhenToldTo: by the options for tests of clients.
func TestServerOffersLessWhenToldTo(t *testing.T) {
	vmdiskdOnly(t)
	contexts := []string{wire.ContextAllocation}
	for _, tt := range []struct {
		option   string // "" for none
		protocol client.Protocol
		replies  client.Replies
		contexts []string
	}{
		{"", client.NewstyleFixed, client.Extended, contexts},
		{"--mask-handshake=0", client.Newstyle, client.Simple, nil},
		{"--mask-handshake=1", client.NewstyleFixed, client.Extended, contexts},
		{"--no-sr", client.NewstyleFixed, client.Simple, nil},
		{"--no-mc", client.NewstyleFixed, client.Extended, nil},
	} {
		var o testenv.Options
		if tt.option != "" {
			o.Extra = []string{tt.option}
		}
		c := dial(t, serve(t, o))
		if got := c.Export().Contexts; c.Protocol() != tt.protocol || c.Replies() != tt.replies || !slices.Equal(got, tt.contexts) {
			t.Errorf("server with %q: got %v, %v replies and contexts %q, want %v, %v and %q",
				tt.option, c.Protocol(), c.Replies(), got, tt.protocol, tt.replies, tt.contexts)
		}
	}
}
