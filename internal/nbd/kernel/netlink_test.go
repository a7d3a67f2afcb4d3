package kernel

import (
	"context"
	"errors"
	"io"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/genetlink/genltest"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

func TestConnectSaysWhatTheDriverAsksFor(t *testing.T) {
	k := newFakeKernel(t)
	r, w, err := os.Pipe()
	must(t, err)
	defer r.Close()
	defer w.Close()
	index, err := k.d.Connect(Setup{Index: 3, Size: 1 << 40, Block: 4096, Flags: wire.HasFlags | wire.CanMultiConn,
		Timeout: 1500 * time.Millisecond, DeadConn: time.Minute, Backend: "who", Sockets: []*os.File{r, w}})
	must(t, err)
	_, got := k.last()
	want := call{cmd: 1, backend: "who", sockets: 2, numbers: map[uint16]uint64{1: 3, 2: 1 << 40, 3: 4096, 4: 2, 5: 0x101, 8: 60}}
	if index != 3 || !reflect.DeepEqual(got, want) {
		t.Errorf("device %d, %+v; want %+v", index, got, want)
	}
}

func TestReplaceAndResizeNameTheBackend(t *testing.T) {
	k := newFakeKernel(t)
	r, w, err := os.Pipe()
	must(t, err)
	defer r.Close()
	defer w.Close()
	must(t, k.d.Replace(5, "who", r))
	if _, got := k.last(); !reflect.DeepEqual(got, call{cmd: 3, backend: "who", sockets: 1, numbers: map[uint16]uint64{1: 5}}) {
		t.Errorf("replace: %+v", got)
	}
	must(t, k.d.Resize(5, "who", 8192, 512))
	if _, got := k.last(); !reflect.DeepEqual(got, call{cmd: 3, backend: "who", numbers: map[uint16]uint64{1: 5, 2: 8192, 3: 512}}) {
		t.Errorf("resize: %+v", got)
	}
}

func TestErrorsOfTheDriverHaveKinds(t *testing.T) {
	for errno, want := range map[unix.Errno]error{
		unix.EPERM: ErrPermission, unix.EBUSY: ErrBusy, unix.ENODEV: ErrNoDevice, unix.ENOENT: ErrNoDevice, unix.EINVAL: unix.EINVAL,
	} {
		d := scripted(t, func(genetlink.Message, netlink.Message) ([]genetlink.Message, error) {
			return nil, genltest.Error(int(errno))
		})
		if _, err := d.Connect(Setup{}); !errors.Is(err, want) {
			t.Errorf("%v becomes %v, want %v", errno, err, want)
		}
	}
}

func TestKernelWithoutTheDriverIsSaidSo(t *testing.T) {
	conn := genltest.Dial(func(genetlink.Message, netlink.Message) ([]genetlink.Message, error) {
		return nil, genltest.Error(int(unix.ENOENT))
	})
	defer conn.Close()
	if _, err := newDriver(conn); !errors.Is(err, ErrNoModule) || !strings.Contains(err.Error(), "modprobe nbd") {
		t.Errorf("got %v", err)
	}
}

func TestSenselessRepliesAreErrors(t *testing.T) {
	index := func(n uint32) []byte {
		return attrs(t, func(ae *netlink.AttributeEncoder) { ae.Uint32(attrIndex, n) })
	}
	for name, replies := range map[string][][]byte{
		"none":             nil,
		"two":              {index(3), index(3)},
		"empty":            {{}},
		"another device":   {index(4)},
		"device too large": {index(limits.DeviceIndex + 1)},
		"number too short": {attrs(t, func(ae *netlink.AttributeEncoder) { ae.Uint16(attrIndex, 3) })},
		"number too long":  {attrs(t, func(ae *netlink.AttributeEncoder) { ae.Uint64(attrIndex, 3) })},
		"cut attribute":    {{8, 0, 1, 0, 3}},
		"length of one":    {{1, 0, 1, 0, 3, 0, 0, 0}},
	} {
		if index, err := answering(t, replies...).Connect(Setup{Index: 3}); !errors.Is(err, ErrReply) {
			t.Errorf("%s: device %d, %v", name, index, err)
		}
	}
}

// deviceList is the driver's list of devices.
func deviceList(t *testing.T, fill func(ae *netlink.AttributeEncoder)) []byte {
	return attrs(t, func(ae *netlink.AttributeEncoder) {
		ae.Nested(attrDeviceList, func(ae *netlink.AttributeEncoder) error {
			fill(ae)
			return nil
		})
	})
}

func item(ae *netlink.AttributeEncoder, index uint32, connected uint8) {
	ae.Nested(deviceItem, func(ae *netlink.AttributeEncoder) error {
		ae.Uint32(deviceIndex, index)
		ae.Uint8(deviceConnected, connected)
		return nil
	})
}

func TestDevicesAreListed(t *testing.T) {
	reply := deviceList(t, func(ae *netlink.AttributeEncoder) {
		item(ae, 0, 0)
		item(ae, 7, 1)
	})
	got, err := answering(t, reply).Devices()
	if want := []Status{{0, false}, {7, true}}; err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, %v; want %v", got, err, want)
	}
}

func TestSenselessListsAreErrors(t *testing.T) {
	for name, reply := range map[string][]byte{
		"no index":         deviceList(t, func(ae *netlink.AttributeEncoder) { ae.Bytes(deviceItem, nil) }),
		"index too large":  deviceList(t, func(ae *netlink.AttributeEncoder) { item(ae, 1<<31, 1) }),
		"garbage in item":  deviceList(t, func(ae *netlink.AttributeEncoder) { ae.Bytes(deviceItem, []byte{9, 9, 9}) }),
		"garbage in list":  attrs(t, func(ae *netlink.AttributeEncoder) { ae.Bytes(attrDeviceList, []byte{255, 255, 1, 0}) }),
		"cut":              {12, 0, 9, 0, 8, 0},
		"connected a word": deviceList(t, func(ae *netlink.AttributeEncoder) { ae.Nested(deviceItem, wordy) }),
	} {
		if got, err := answering(t, reply).Devices(); !errors.Is(err, ErrReply) {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
}

func wordy(ae *netlink.AttributeEncoder) error {
	ae.Uint32(deviceIndex, 1)
	ae.Uint32(deviceConnected, 1)
	return nil
}

func TestWatchTellsOfDeadConnectionsOnly(t *testing.T) {
	dead := func(cmd uint8, data []byte) genetlink.Message {
		return genetlink.Message{Header: genetlink.Header{Command: cmd}, Data: data}
	}
	seven := attrs(t, func(ae *netlink.AttributeEncoder) { ae.Uint32(attrIndex, 7) })
	sent := false
	conn := genltest.Dial(genltest.ServeFamily(nbdFamily, func(m genetlink.Message, _ netlink.Message) ([]genetlink.Message, error) {
		if sent {
			return nil, unix.EBADF
		}
		sent = true
		return []genetlink.Message{dead(cmdStatus, seven), dead(cmdLinkDead, []byte{1}), dead(cmdLinkDead, nil), dead(cmdLinkDead, seven)}, nil
	}))
	d, err := newDriver(conn)
	must(t, err)
	got := make(chan int, 8)
	d.watch(context.Background(), got)
	var all []int
	for n := range got {
		all = append(all, n)
	}
	if !reflect.DeepEqual(all, []int{7}) {
		t.Errorf("got %v, want the one message about device 7", all)
	}
}

func TestWatchNeedsTheGroup(t *testing.T) {
	bare := nbdFamily
	bare.Groups = nil
	conn := genltest.Dial(genltest.ServeFamily(bare, func(genetlink.Message, netlink.Message) ([]genetlink.Message, error) { return nil, io.EOF }))
	if _, err := watchOn(context.Background(), conn); !errors.Is(err, ErrReply) {
		t.Errorf("got %v", err)
	}
}
