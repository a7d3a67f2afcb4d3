package qmp

import (
	"context"
	"errors"
	"math"
	"strings"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// ErrNoCID is the answer of GuestCID for a machine without a vsock device.
var ErrNoCID = errors.New("the machine has no vhost-vsock device")

// property is one of an object of QEMU.
type property struct {
	Name string `json:"name"`
	Type string `json:"type"`
}

// GuestCID asks for the context ID of the machine's vhost-vsock device.
func GuestCID(ctx context.Context, x Executor) (uint32, error) {
	for _, where := range [...]string{"/machine/peripheral", "/machine/peripheral-anon"} {
		list, err := ask[[]property](ctx, x, "qom-list", map[string]any{"path": where})
		if err != nil {
			return 0, err
		}
		for _, p := range list {
			if !strings.HasPrefix(p.Type, "child<vhost-vsock-") || len(p.Name) > limits.QMPName {
				continue
			}
			if strings.ContainsAny(p.Name, "/\x00") {
				return 0, ErrProtocol
			}
			cid, err := ask[uint64](ctx, x, "qom-get", map[string]any{"path": where + "/" + p.Name, "property": "guest-cid"})
			if err == nil && cid >= math.MaxUint32 {
				err = ErrProtocol
			}
			return uint32(cid), err
		}
	}
	return 0, ErrNoCID
}
