package kernel

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

// Names and numbers of linux/nbd-netlink.h.
const (
	familyName = "nbd"
	groupName  = "nbd_mc_group"

	cmdConnect     = 1
	cmdDisconnect  = 2
	cmdReconfigure = 3
	cmdLinkDead    = 4
	cmdStatus      = 5

	attrIndex       = 1
	attrSizeBytes   = 2
	attrBlockSize   = 3
	attrTimeout     = 4
	attrServerFlags = 5
	attrSockets     = 7
	attrDeadConn    = 8
	attrDeviceList  = 9
	attrBackend     = 10

	sockItem = 1
	sockFD   = 1

	deviceItem      = 1
	deviceIndex     = 1
	deviceConnected = 2
)

// Setup is a device as the driver is told of it.
type Setup struct {
	// Index is the device's number, or Any.
	Index int
	// Size and Block are in bytes; Block is a power of two.
	Size  uint64
	Block uint32
	Flags wire.ExportFlags
	// Timeout is how long a request may take before its connection counts as
	// dead and it is sent again; 0 is for ever. DeadConn is how long requests
	// wait for a new connection when there is none left; then they fail. Both
	// count in whole seconds.
	Timeout, DeadConn time.Duration
	// Backend is what the driver remembers of who has attached the device, at
	// most limits.Backend bytes; kernels before 5.14 forget it.
	Backend string
	// Sockets are open for as long as the call takes.
	Sockets []*os.File
}

// Status is what the driver says of one device.
type Status struct {
	Index     int
	Connected bool
}

// Driver is the kernel's nbd driver. It is safe for concurrent use.
type Driver struct {
	conn   *genetlink.Conn
	family genetlink.Family
	nodes  string // folder of the devices' nodes
}

// Open finds the driver. It fails with ErrNoModule if there is none.
func Open() (*Driver, error) {
	conn, err := genetlink.Dial(nil)
	if err != nil {
		return nil, fmt.Errorf("generic netlink: %w", err)
	}
	// The words that the kernel has for an error are nice to have.
	_ = conn.SetOption(netlink.ExtendedAcknowledge, true)
	d, err := newDriver(conn)
	if err != nil {
		conn.Close()
	}
	return d, err
}

// newDriver asks for the family. conn stays the caller's on an error.
func newDriver(conn *genetlink.Conn) (*Driver, error) {
	f, err := conn.GetFamily(familyName)
	if errors.Is(err, os.ErrNotExist) {
		return nil, ErrNoModule
	}
	if err != nil {
		return nil, fmt.Errorf("nbd driver: %w", err)
	}
	return &Driver{conn: conn, family: f, nodes: "/dev"}, nil
}

// Close ends the use of the driver; devices stay as they are.
func (d *Driver) Close() error { return d.conn.Close() }

// Connect attaches a device and returns its number.
func (d *Driver) Connect(s Setup) (int, error) {
	ae := netlink.NewAttributeEncoder()
	if s.Index != Any {
		ae.Uint32(attrIndex, uint32(s.Index))
	}
	ae.Uint64(attrSizeBytes, s.Size)
	ae.Uint64(attrBlockSize, uint64(s.Block))
	ae.Uint64(attrServerFlags, uint64(s.Flags))
	ae.Uint64(attrTimeout, seconds(s.Timeout))
	ae.Uint64(attrDeadConn, seconds(s.DeadConn))
	encodeBackend(ae, s.Backend)
	encodeSockets(ae, s.Sockets)
	replies, err := d.call(cmdConnect, ae, netlink.Request)
	if err != nil {
		return 0, err
	}
	if len(replies) != 1 {
		return 0, senseless("%d replies to a connect", len(replies))
	}
	index, err := indexOf(replies[0])
	if err == nil && s.Index != Any && index != s.Index {
		err = senseless("device %d instead of %d", index, s.Index)
	}
	return index, err
}

// Replace puts the sockets into the places of dead connections of an attached
// device. A socket for which there is no place is left alone, without an
// error. backend must be what it was when the device was attached: else the
// device is somebody else's, and it fails.
func (d *Driver) Replace(index int, backend string, sockets ...*os.File) error {
	ae := netlink.NewAttributeEncoder()
	ae.Uint32(attrIndex, uint32(index))
	encodeBackend(ae, backend)
	encodeSockets(ae, sockets)
	_, err := d.call(cmdReconfigure, ae, netlink.Request|netlink.Acknowledge)
	return err
}

// Resize gives an attached device a size in bytes, a multiple of its block; to
// backend applies what Replace says. The driver waits for the requests in
// flight: call it while there are connections.
func (d *Driver) Resize(index int, backend string, size uint64, block uint32) error {
	ae := netlink.NewAttributeEncoder()
	ae.Uint32(attrIndex, uint32(index))
	encodeBackend(ae, backend)
	ae.Uint64(attrSizeBytes, size)
	ae.Uint64(attrBlockSize, uint64(block))
	_, err := d.call(cmdReconfigure, ae, netlink.Request|netlink.Acknowledge)
	return err
}

func encodeBackend(ae *netlink.AttributeEncoder, backend string) {
	if backend != "" {
		ae.String(attrBackend, backend)
	}
}

func encodeSockets(ae *netlink.AttributeEncoder, sockets []*os.File) {
	ae.Nested(attrSockets, func(ae *netlink.AttributeEncoder) error {
		for _, f := range sockets {
			ae.Nested(sockItem, func(ae *netlink.AttributeEncoder) error {
				ae.Uint32(sockFD, uint32(f.Fd()))
				return nil
			})
		}
		return nil
	})
}

// seconds rounds up: a time that is not zero must not become for ever.
func seconds(d time.Duration) uint64 {
	return uint64((d + time.Second - 1) / time.Second)
}

// Disconnect detaches a device, whoever uses it. Requests in flight fail.
func (d *Driver) Disconnect(index int) error {
	ae := netlink.NewAttributeEncoder()
	ae.Uint32(attrIndex, uint32(index))
	_, err := d.call(cmdDisconnect, ae, netlink.Request|netlink.Acknowledge)
	return err
}

// Devices are all devices that the driver has, in no order.
func (d *Driver) Devices() ([]Status, error) {
	replies, err := d.call(cmdStatus, netlink.NewAttributeEncoder(), netlink.Request)
	if err != nil {
		return nil, err
	}
	var list []Status
	for _, r := range replies {
		if list, err = appendStatus(list, r.Data); err != nil {
			return nil, err
		}
	}
	return list, nil
}

func appendStatus(list []Status, data []byte) ([]Status, error) {
	ad, err := netlink.NewAttributeDecoder(data)
	if err != nil {
		return nil, senseless("status: %v", err)
	}
	for ad.Next() {
		if ad.Type() != attrDeviceList {
			continue
		}
		ad.Nested(func(ad *netlink.AttributeDecoder) error {
			for ad.Next() {
				if ad.Type() != deviceItem {
					continue
				}
				if len(list) > limits.DeviceIndex {
					return errors.New("too many devices")
				}
				s := Status{Index: Any}
				ad.Nested(s.decode)
				list = append(list, s)
			}
			return nil
		})
	}
	if err := ad.Err(); err != nil {
		return nil, senseless("status: %v", err)
	}
	for _, s := range list {
		if s.Index < 0 || s.Index > limits.DeviceIndex {
			return nil, senseless("status of device %d", s.Index)
		}
	}
	return list, nil
}

func (s *Status) decode(ad *netlink.AttributeDecoder) error {
	for ad.Next() {
		switch ad.Type() {
		case deviceIndex:
			s.Index = toIndex(ad.Uint32())
		case deviceConnected:
			s.Connected = ad.Uint8() != 0
		}
	}
	return nil
}

// toIndex is -1 for what is out of range.
func toIndex(n uint32) int {
	if n > limits.DeviceIndex {
		return -1
	}
	return int(n)
}

func indexOf(m genetlink.Message) (int, error) {
	ad, err := netlink.NewAttributeDecoder(m.Data)
	if err != nil {
		return 0, senseless("%v", err)
	}
	index := -1
	for ad.Next() {
		if ad.Type() == attrIndex {
			index = toIndex(ad.Uint32())
		}
	}
	if err := ad.Err(); err != nil {
		return 0, senseless("%v", err)
	}
	if index < 0 {
		return 0, senseless("a reply without a device")
	}
	return index, nil
}

func (d *Driver) call(cmd uint8, ae *netlink.AttributeEncoder, flags netlink.HeaderFlags) ([]genetlink.Message, error) {
	data, err := ae.Encode()
	if err != nil {
		return nil, fmt.Errorf("nbd driver: %w", err)
	}
	m := genetlink.Message{Header: genetlink.Header{Command: cmd, Version: 1}, Data: data}
	replies, err := d.conn.Execute(m, d.family.ID, flags)
	if err != nil {
		return nil, driverError(err)
	}
	return replies, nil
}

// driverError gives the errors that users meet a kind. The text of the kernel,
// if there is one, follows.
func driverError(err error) error {
	text := ""
	if op, ok := errors.AsType[*netlink.OpError](err); ok && op.Message != "" {
		text = fmt.Sprintf(" (%q)", op.Message[:min(len(op.Message), limits.MaxString)])
	}
	switch {
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return fmt.Errorf("%w%s", ErrPermission, text)
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("%w%s", ErrBusy, text)
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return fmt.Errorf("%w%s", ErrNoDevice, text)
	}
	return fmt.Errorf("nbd driver: %w%s", err, text)
}

// Watch tells of connections that died, by the number of their device, until
// ctx ends. A device may be named more than once, and a full buffer of the
// kernel may swallow one: each is a reason to look, and no more. The channel is
// closed at the end.
func Watch(ctx context.Context) (<-chan int, error) {
	conn, err := genetlink.Dial(nil)
	if err != nil {
		return nil, fmt.Errorf("generic netlink: %w", err)
	}
	return watchOn(ctx, conn)
}

// watchOn owns conn.
func watchOn(ctx context.Context, conn *genetlink.Conn) (<-chan int, error) {
	d, err := newDriver(conn)
	if err == nil {
		err = d.join()
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	dead := make(chan int, limits.DeviceSockets)
	go d.watch(ctx, dead)
	return dead, nil
}

func (d *Driver) join() error {
	for _, g := range d.family.Groups {
		if g.Name != groupName {
			continue
		}
		if err := d.conn.JoinGroup(g.ID); err != nil {
			return fmt.Errorf("nbd driver: join %s: %w", groupName, err)
		}
		return nil
	}
	return senseless("no group %q", groupName)
}

// watch owns the connection.
func (d *Driver) watch(ctx context.Context, dead chan<- int) {
	defer close(dead)
	stop := context.AfterFunc(ctx, func() { d.conn.Close() })
	defer func() {
		if stop() {
			d.conn.Close()
		}
	}()
	for ctx.Err() == nil {
		messages, _, err := d.conn.Receive()
		if err != nil && !errors.Is(err, unix.ENOBUFS) {
			return
		}
		for _, m := range messages {
			if m.Header.Command != cmdLinkDead {
				continue
			}
			index, err := indexOf(m)
			if err != nil {
				continue
			}
			select {
			case dead <- index:
			case <-ctx.Done():
				return
			}
		}
	}
}
