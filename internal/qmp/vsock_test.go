package qmp_test

import (
	"errors"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/qmp"
	"github.com/vmdiskd/vmdiskd/internal/qmp/qmptest"
)

func TestGuestCIDIsThatOfTheVsockDevice(t *testing.T) {
	const device = `[{"name":"type","type":"string"},{"name":"v0","type":"child<vhost-vsock-pci>"}]`
	for _, tt := range []struct {
		name, list, cid string
		want            uint32
		err             error
	}{
		{"device", device, "42", 42, nil},
		{"no device", `[{"name":"d0","type":"child<virtio-blk-pci>"}]`, "42", 0, qmp.ErrNoCID},
		{"nothing", `[]`, "42", 0, qmp.ErrNoCID},
		{"large", device, "4294967296", 0, qmp.ErrProtocol},
		{"anybody", device, "4294967295", 0, qmp.ErrProtocol},
		{"negative", device, "-1", 0, qmp.ErrProtocol},
		{"text", device, `"42"`, 0, qmp.ErrProtocol},
		{"name with a slash", `[{"name":"../x","type":"child<vhost-vsock-pci>"}]`, "42", 0, qmp.ErrProtocol},
		{"no list", `{}`, "42", 0, qmp.ErrProtocol},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := dial(t, func(c *qmptest.Conn) {
				c.Handshake()
				c.Table(map[string]string{"qom-list": tt.list, "qom-get": tt.cid}, nil)
			})
			got, err := qmp.GuestCID(testContext(t), m)
			if tt.err == nil && (err != nil || got != tt.want) || tt.err != nil && !errors.Is(err, tt.err) {
				t.Errorf("got %d, %v; want %d, %v", got, err, tt.want, tt.err)
			}
		})
	}
}
