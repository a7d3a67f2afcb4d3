package nbd

import (
	"context"
	"encoding/binary"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

// capFlags maps what a device can do to what a client may send. Nothing is
// advertised that the device does not have.
var capFlags = [...]struct {
	caps backing.Caps
	flag wire.ExportFlags
}{
	{backing.CanFlush, wire.SendFlush},
	{backing.CanFUA, wire.SendFUA},
	{backing.IsRotational, wire.Rotational},
	{backing.CanTrim, wire.SendTrim},
	{backing.CanZero, wire.SendZero},
	{backing.CanZero | backing.CanFastZero, wire.SendFastZero},
	{backing.CanMultiConn, wire.CanMultiConn},
	{backing.CanCache, wire.SendCache},
}

// exportFlags are the transmission flags for this connection: DF and the
// payload form of BLOCK_STATUS depend on what the session negotiated, not on
// the export (proto.md, "Transmission flags").
func (n *negotiation) exportFlags(x *Export) wire.ExportFlags {
	caps := x.Device.Info().Caps
	f := wire.HasFlags
	if !caps.Has(backing.CanWrite) {
		f |= wire.ReadOnly
	}
	for _, c := range capFlags {
		if caps.Has(c.caps) {
			f |= c.flag
		}
	}
	if n.agreed.structured || n.agreed.extended {
		f |= wire.SendDF
	}
	if n.agreed.extended && len(n.agreed.meta.forExport(x.Name)) > 0 {
		f |= wire.SendBlockStatusPayload
	}
	return f
}

// blockSizes are the constraints of a device (proto.md, "Block size
// constraints"): minimum ≤ 64 KiB, preferred ≥ 512, maximum ≥ preferred.
func blockSizes(i backing.Info) wire.BlockSizes {
	return wire.BlockSizes{
		Min:       uint32(min(i.MinBlock, 64<<10)),
		Preferred: uint32(min(max(i.Preferred, i.MinBlock, 512), limits.AdvertisedIO)),
		Max:       limits.AdvertisedIO,
	}
}

// oldstyle is the handshake of -o: no names, no options, no errors (proto.md,
// "Oldstyle negotiation"). Size and flags follow the greeting unasked.
func (n *negotiation) oldstyle(ctx context.Context) error {
	if n.opt.TLS == TLSRequire {
		return errTLSReqd
	}
	x, _, err := n.open(ctx, "", n.opt.Exports.Open)
	if err != nil {
		return err
	}
	b := binary.BigEndian.AppendUint64(nil, wire.MagicInit)
	b = binary.BigEndian.AppendUint64(b, wire.MagicOldstyle)
	b = binary.BigEndian.AppendUint64(b, uint64(x.Device.Info().Size))
	b = binary.BigEndian.AppendUint16(b, 0)
	b = binary.BigEndian.AppendUint16(b, uint16(n.exportFlags(x)))
	n.out = append(b, make([]byte, wire.ExportNameZeroes)...)
	n.export = x
	return n.flush()
}
