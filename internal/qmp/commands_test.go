package qmp_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"reflect"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/qmp"
	"github.com/vmdiskd/vmdiskd/internal/qmp/qmptest"
	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// recorder answers every command with an empty object and keeps what was sent.
type recorder struct {
	command   string
	arguments string
}

func (r *recorder) Execute(_ context.Context, command string, arguments any, _ ...*os.File) (json.RawMessage, error) {
	b, err := json.Marshal(arguments)
	r.command, r.arguments = command, string(b)
	return json.RawMessage("{}"), err
}

// wantSent compares JSON values.
func wantSent(t *testing.T, r *recorder, command, arguments string) {
	t.Helper()
	var got, want any
	if err := json.Unmarshal([]byte(r.arguments), &got); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal([]byte(arguments), &want); err != nil {
		t.Fatal(err)
	}
	if r.command != command || !reflect.DeepEqual(got, want) {
		t.Errorf("sent %s %s\nwant %s %s", r.command, r.arguments, command, arguments)
	}
}

func TestBlockCommandsAreTypedAsQEMUTakesThem(t *testing.T) {
	ctx := testContext(t)
	for _, tt := range []struct {
		name, command, arguments string
		do                       func(x qmp.Executor) error
	}{
		{"unix with all", "blockdev-add", `{"driver":"nbd","node-name":"n","read-only":false,"discard":"unmap",
			"server":{"type":"unix","path":"/run/a,b\"c'<d\n"},"export":"-e,\"x","tls-creds":"tls0","tls-hostname":"h","reconnect-delay":30,"open-timeout":2}`,
			func(x qmp.Executor) error {
				return qmp.NBD{Node: "n", Server: qmp.UnixAddress("/run/a,b\"c'<d\n"), Export: "-e,\"x", TLSCreds: "tls0",
					TLSHostname: "h", ReconnectDelay: 30 * time.Second, OpenTimeout: 1500 * time.Millisecond, Discard: true}.Add(ctx, x)
			}},
		{"inet, read-only", "blockdev-add", `{"driver":"nbd","node-name":"n","read-only":true,"discard":"ignore","server":{"type":"inet","host":"::1","port":"10809"}}`,
			func(x qmp.Executor) error {
				return qmp.NBD{Node: "n", Server: qmp.InetAddress{Host: "::1", Port: 10809}, ReadOnly: true}.Add(ctx, x)
			}},
		{"vsock", "blockdev-add", `{"driver":"nbd","node-name":"n","read-only":false,"discard":"ignore","server":{"type":"vsock","cid":"4294967294","port":"10809"}}`,
			func(x qmp.Executor) error {
				return qmp.NBD{Node: "n", Server: qmp.VSockAddress{CID: 4294967294, Port: 10809}}.Add(ctx, x)
			}},
		{"fd", "blockdev-add", `{"driver":"nbd","node-name":"n","read-only":false,"discard":"ignore","server":{"type":"fd","str":"sock-1"}}`,
			func(x qmp.Executor) error {
				return qmp.NBD{Node: "n", Server: qmp.FDAddress("sock-1")}.Add(ctx, x)
			}},
		{"reopen", "blockdev-reopen", `{"options":[{"driver":"raw","node-name":"d","read-only":true,"discard":"unmap","file":"n2"}]}`,
			func(x qmp.Executor) error {
				return qmp.Raw{Node: "d", ReadOnly: true, Discard: true}.Reopen(ctx, x, "n2")
			}},
		{"raw", "blockdev-add", `{"driver":"raw","node-name":"d","read-only":false,"discard":"ignore","file":"n"}`,
			func(x qmp.Executor) error { return qmp.Raw{Node: "d"}.Add(ctx, x, "n") }},
		{"drive of an id", "qom-set", `{"path":"/machine/peripheral/s","property":"drive","value":"n2"}`,
			func(x qmp.Executor) error { return qmp.SetDrive(ctx, x, &qmp.BlockDevice{QDev: "s"}, "n2") }},
		{"drive of a path", "qom-set", `{"path":"/machine/peripheral/v/virtio-backend","property":"drive","value":"n2"}`,
			func(x qmp.Executor) error {
				return qmp.SetDrive(ctx, x, &qmp.BlockDevice{QDev: "/machine/peripheral/v/virtio-backend"}, "n2")
			}},
		{"detect-zeroes", "blockdev-add", `{"driver":"nbd","node-name":"n","read-only":false,"discard":"ignore","detect-zeroes":"on","server":{"type":"unix","path":"/s"}}`,
			func(x qmp.Executor) error {
				return qmp.NBD{Node: "n", Server: qmp.UnixAddress("/s"), DetectZeroes: "on"}.Add(ctx, x)
			}},
		{"del", "blockdev-del", `{"node-name":"d"}`, func(x qmp.Executor) error { return qmp.BlockdevDel(ctx, x, "d") }},
		{"resize", "block_resize", `{"node-name":"d","size":1099511627776}`, func(x qmp.Executor) error { return qmp.BlockResize(ctx, x, "d", 1<<40) }},
		{"virtio-blk", "device_add", `{"driver":"virtio-blk-pci","id":"v","drive":"d","bus":"rp1","serial":"a,\"b'<&-","rerror":"stop","werror":"report"}`,
			func(x qmp.Executor) error {
				return qmp.DeviceAdd(ctx, x, qmp.Device{Model: qmp.VirtIOBlk, ID: "v", Node: "d", Bus: "rp1", Serial: `a,"b'<&-`, ReadError: qmp.PolicyStop, WriteError: qmp.PolicyReport})
			}},
		{"virtio-blk in a slot", "device_add", `{"driver":"virtio-blk-pci","id":"v","drive":"d","bus":"pci.0","addr":"1f"}`,
			func(x qmp.Executor) error {
				return qmp.DeviceAdd(ctx, x, qmp.Device{Model: qmp.VirtIOBlk, ID: "v", Node: "d", Bus: "pci.0", Slot: 31})
			}},
		{"scsi", "device_add", `{"driver":"scsi-hd","id":"s","drive":"d","bus":"scsi0.0","scsi-id":7,"lun":0,"werror":"stop"}`,
			func(x qmp.Executor) error {
				return qmp.DeviceAdd(ctx, x, qmp.Device{Model: qmp.SCSIDisk, ID: "s", Node: "d", Bus: "scsi0.0", Target: 7, WriteError: qmp.PolicyStop})
			}},
		{"nvme", "device_add", `{"driver":"nvme","id":"n","drive":"d","bus":"rp2","serial":"S1"}`,
			func(x qmp.Executor) error {
				return qmp.DeviceAdd(ctx, x, qmp.Device{Model: qmp.NVMe, ID: "n", Node: "d", Bus: "rp2", Serial: "S1", WriteError: qmp.PolicyStop})
			}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var r recorder
			if err := tt.do(&r); err != nil {
				t.Fatal(err)
			}
			wantSent(t, &r, tt.command, tt.arguments)
		})
	}
}

func TestWhatCannotBeRightIsNotSent(t *testing.T) {
	ctx := testContext(t)
	unix := qmp.UnixAddress("/s")
	long := strings.Repeat("n", limits.NodeName+1)
	nbd := func(n qmp.NBD) func(qmp.Executor) error {
		return func(x qmp.Executor) error { return n.Add(ctx, x) }
	}
	device := func(d qmp.Device) func(qmp.Executor) error {
		return func(x qmp.Executor) error { return qmp.DeviceAdd(ctx, x, d) }
	}
	for name, f := range map[string]func(qmp.Executor) error{
		"no node name":      nbd(qmp.NBD{Server: unix}),
		"long node name":    nbd(qmp.NBD{Node: long, Server: unix}),
		"quote in a node":   nbd(qmp.NBD{Node: `a"b`, Server: unix}),
		"leading dash":      nbd(qmp.NBD{Node: "-a", Server: unix}),
		"leading digit":     nbd(qmp.NBD{Node: "1a", Server: unix}),
		"no ASCII":          nbd(qmp.NBD{Node: "aä", Server: unix}),
		"no server":         nbd(qmp.NBD{Node: "a"}),
		"no path":           nbd(qmp.NBD{Node: "a", Server: qmp.UnixAddress("")}),
		"long path":         nbd(qmp.NBD{Node: "a", Server: qmp.UnixAddress("/" + strings.Repeat("p", 107))}),
		"zero in a path":    nbd(qmp.NBD{Node: "a", Server: qmp.UnixAddress("/a\x00b")}),
		"zero in an export": nbd(qmp.NBD{Node: "a", Server: unix, Export: "a\x00b"}),
		"no host":           nbd(qmp.NBD{Node: "a", Server: qmp.InetAddress{Port: 1}}),
		"no port":           nbd(qmp.NBD{Node: "a", Server: qmp.InetAddress{Host: "h"}}),
		"no fd name":        nbd(qmp.NBD{Node: "a", Server: qmp.FDAddress("")}),
		"long export":       nbd(qmp.NBD{Node: "a", Server: unix, Export: strings.Repeat("e", limits.MaxString+1)}),
		"negative delay":    nbd(qmp.NBD{Node: "a", Server: unix, ReconnectDelay: -1}),
		"endless delay":     nbd(qmp.NBD{Node: "a", Server: unix, ReconnectDelay: limits.NBDReconnect + 1}),
		"long open timeout": nbd(qmp.NBD{Node: "a", Server: unix, OpenTimeout: limits.NBDOpen + 1}),
		"raw node":          func(x qmp.Executor) error { return qmp.Raw{}.Add(ctx, x, "a") },
		"reopen":            func(x qmp.Executor) error { return qmp.Raw{Node: "a"}.Reopen(ctx, x, "b,c") },
		"del":               func(x qmp.Executor) error { return qmp.BlockdevDel(ctx, x, "") },
		"drive of commas":   func(x qmp.Executor) error { return qmp.SetDrive(ctx, x, &qmp.BlockDevice{QDev: "a"}, "b,c") },
		"resize of nothing": func(x qmp.Executor) error { return qmp.BlockResize(ctx, x, "", 1) },
		"negative size":     func(x qmp.Executor) error { return qmp.BlockResize(ctx, x, "a", -1) },
		"no model":          device(qmp.Device{ID: "a", Node: "b"}),
		"another model":     device(qmp.Device{Model: "ide-hd", ID: "a", Node: "b"}),
		"no id":             device(qmp.Device{Model: qmp.VirtIOBlk, Node: "b"}),
		"no node":           device(qmp.Device{Model: qmp.VirtIOBlk, ID: "b"}),
		"long serial":       device(qmp.Device{Model: qmp.VirtIOBlk, ID: "a", Node: "b", Serial: strings.Repeat("s", 21)}),
		"newline in serial": device(qmp.Device{Model: qmp.SCSIDisk, ID: "a", Node: "b", Serial: "a\nb"}),
		"nvme, no serial":   device(qmp.Device{Model: qmp.NVMe, ID: "a", Node: "b"}),
		"slot 32":           device(qmp.Device{Model: qmp.VirtIOBlk, ID: "a", Node: "b", Slot: 32}),
		"target -1":         device(qmp.Device{Model: qmp.SCSIDisk, ID: "a", Node: "b", Target: -1}),
		"long bus":          device(qmp.Device{Model: qmp.SCSIDisk, ID: "a", Node: "b", Bus: strings.Repeat("b", 1000)}),
	} {
		var r recorder
		if err := f(&r); !errors.Is(err, qmp.ErrInvalid) || r.command != "" {
			t.Errorf("%s: %v, sent %q", name, err, r.command)
		}
	}
	m := qmp.New("/nowhere")
	if err := m.Unplug(ctx, "a b"); !errors.Is(err, qmp.ErrInvalid) {
		t.Errorf("unplug: %v", err)
	}
	if err := m.AwaitUnplug(ctx, ""); !errors.Is(err, qmp.ErrInvalid) {
		t.Errorf("await unplug: %v", err)
	}
	if err := m.GetFD(ctx, "a b", os.Stdin); !errors.Is(err, qmp.ErrInvalid) {
		t.Errorf("getfd: %v", err)
	}
}

func TestQueriesReadWhatQEMUSays(t *testing.T) {
	m := dial(t, func(c *qmptest.Conn) {
		c.Handshake()
		c.Table(map[string]string{
			"query-status":            `{"running":false,"status":"prelaunch\u001b[2J","more":1}`,
			"query-named-block-nodes": `[{"node-name":"n","drv":"nbd","ro":true,"file":"nbd+unix:///?socket=/s\n","image":{"virtual-size":4096}}]`,
			"query-block":             `[{"device":"cd","qdev":"/machine/unattached/device[1]"},{"device":"","qdev":"/machine/peripheral/d0/virtio-backend","io-status":"ok","inserted":{"node-name":"n","image":{"virtual-size":4096}}}]`,
		}, nil)
	})
	ctx := testContext(t)
	if s, err := qmp.QueryStatus(ctx, m); err != nil || s.Running || s.State != `prelaunch\x1b[2J` {
		t.Errorf("status %+v, %v", s, err)
	}
	nodes, err := qmp.QueryNamedBlockNodes(ctx, m)
	if err != nil || len(nodes) != 1 || nodes[0].Name != "n" || nodes[0].Image.VirtualSize != 4096 || !nodes[0].ReadOnly || strings.Contains(nodes[0].File, "\n") {
		t.Errorf("nodes %+v, %v", nodes, err)
	}
	disks, err := qmp.QueryBlock(ctx, m)
	if err != nil || len(disks) != 2 || disks[0].Inserted != nil || disks[1].Inserted.Name != "n" {
		t.Fatalf("disks %+v, %v", disks, err)
	}
	if disks[0].Is("cd") || !disks[1].Is("d0") || disks[1].Is("d") || disks[1].Is("") {
		t.Errorf("wrong disk belongs to d0: %+v", disks)
	}
}

// TestLyingRepliesAreErrors gives every query values that no QEMU has.
func TestLyingRepliesAreErrors(t *testing.T) {
	long := strings.Repeat("x", limits.MaxString+1)
	many := "[" + strings.Repeat("{},", limits.QMPItems) + "{}]"
	queries := map[string]func(ctx context.Context, x *qmp.Monitor) error{
		"query-status": func(ctx context.Context, x *qmp.Monitor) error { _, err := qmp.QueryStatus(ctx, x); return err },
		"query-named-block-nodes": func(ctx context.Context, x *qmp.Monitor) error {
			_, err := qmp.QueryNamedBlockNodes(ctx, x)
			return err
		},
		"query-block":      func(ctx context.Context, x *qmp.Monitor) error { _, err := qmp.QueryBlock(ctx, x); return err },
		"qom-list":         func(ctx context.Context, x *qmp.Monitor) error { _, err := qmp.FreePCI(ctx, x); return err },
		"query-qmp-schema": func(ctx context.Context, x *qmp.Monitor) error { _, err := x.Schema(ctx); return err },
	}
	lies := map[string][]string{
		"query-status":            {`[]`, `"x"`, `{"status":1}`},
		"query-named-block-nodes": {`{}`, many, `[{"image":{"virtual-size":-1}}]`, `[{"image":{"virtual-size":1e30}}]`, `[{"node-name":"` + long + `"}]`},
		"query-block":             {`{}`, many, `[{"inserted":{"image":{"virtual-size":-1}}}]`, `[{"qdev":"` + long + `"}]`, `[{"device":5}]`},
		"qom-list":                {`{}`, many, `[{"name":"` + long + `"}]`, `[{"type":7}]`},
		"query-qmp-schema":        {`{}`, `[1]`, `[{"members":1}]`},
	}
	for command, values := range lies {
		for i, value := range values {
			t.Run(fmt.Sprint(command, i), func(t *testing.T) {
				m := dial(t, func(c *qmptest.Conn) {
					c.Handshake()
					c.Table(map[string]string{command: value}, nil)
				})
				if err := queries[command](testContext(t), m); !errors.Is(err, qmp.ErrProtocol) {
					t.Errorf("%.60s: %v, want ErrProtocol", value, err)
				}
			})
		}
	}
}

// TestEndlessTreeIsGivenUp: every object has buses below it, for ever.
func TestEndlessTreeIsGivenUp(t *testing.T) {
	var items []string
	for i := range 2000 {
		items = append(items, fmt.Sprintf(`{"name":"d%d","type":"child<x>"},{"name":"b%d","type":"child<PCI>"}`, i, i))
	}
	m := dial(t, func(c *qmptest.Conn) {
		c.Handshake()
		c.Table(map[string]string{"qom-list": "[" + strings.Join(items, ",") + `,{"name":"virtio-backend","type":"child<y>"}]`, "qom-get": `"/h"`}, nil)
	})
	if _, err := qmp.FreePCI(testContext(t), m); !errors.Is(err, qmp.ErrProtocol) {
		t.Errorf("error %v, want ErrProtocol", err)
	}
}

func TestUnplugEndsByTheEventsOfItsDevice(t *testing.T) {
	for _, tt := range []struct {
		name   string
		events []string
		want   error
	}{
		{"deleted", []string{`{"event":"DEVICE_DELETED","data":{"path":"/machine/peripheral/d0/virtio-backend"}}`, `{"event":"DEVICE_DELETED","data":{"device":"other"}}`,
			`{"event":"DEVICE_DELETED","data":[]}`, `{"event":"DEVICE_DELETED","data":{"device":{}}}`, `{"event":"DEVICE_DELETED","data":{"device":"d0"}}`}, nil},
		{"refused", []string{`{"event":"DEVICE_DELETED","data":{"device":"other"}}`, `{"event":"DEVICE_UNPLUG_GUEST_ERROR","data":{"device":"other"}}`, `{"event":"DEVICE_UNPLUG_GUEST_ERROR","data":{"device":"d0"}}`}, qmp.ErrUnplugRefused},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := dial(t, func(c *qmptest.Conn) {
				c.Handshake()
				c.Table(map[string]string{"device_del": "{}", "qom-list": `[{"name":"d0","type":"child<virtio-blk-pci>"}]`},
					map[string]func(){"device_del": func() {
						for _, e := range tt.events {
							c.Say(e)
						}
					}})
			})
			if err := m.Unplug(testContext(t), "d0"); !errors.Is(err, tt.want) {
				t.Errorf("unplug: %v, want %v", err, tt.want)
			}
		})
	}
}

// TestUnplugSeesADeviceGoWithoutItsEvent: the event is lost in a flood. The
// device is looked for twice, because its node is free only a moment after it
// has left the tree.
func TestUnplugSeesADeviceGoWithoutItsEvent(t *testing.T) {
	var looked atomic.Int32
	m := dial(t, func(c *qmptest.Conn) {
		c.Handshake()
		c.Table(map[string]string{"device_del": "{}", "qom-list": `[{"name":"type","type":"string"}]`}, map[string]func(){"qom-list": func() { looked.Add(1) }})
	})
	if err := m.Unplug(testContext(t), "d0"); err != nil {
		t.Errorf("unplug: %v", err)
	}
	m.Close()
	if err := testenv.Await(testContext(t), func() bool { return looked.Load() >= 2 }); err != nil {
		t.Error(err)
	}
	if n := looked.Load(); n != 2 {
		t.Errorf("looked for the device %d times, want 2", n)
	}
}

// TestUnplugOutlastsAQEMUThatIsBusy with the requests of the device: it answers
// no question meanwhile, and the first is given up.
func TestUnplugOutlastsAQEMUThatIsBusy(t *testing.T) {
	t.Parallel()
	m := dial(t, func(c *qmptest.Conn) {
		c.Handshake()
		if cmd, ok := c.Next(); ok {
			c.Return(cmd, "{}")
		}
		first, _ := c.Next()
		second, _ := c.Next()
		for _, cmd := range []qmptest.Command{first, second} {
			c.Return(cmd, `[{"name": "d0", "type": "child<virtio-blk-pci>"}]`)
		}
		c.Say(`{"event":"DEVICE_DELETED","data":{"device":"d0"}}`)
		c.Hold()
	})
	if err := m.Unplug(testContext(t), "d0"); err != nil {
		t.Errorf("unplug: %v", err)
	}
}

// TestQuestionWaitsForTheChangeBeforeIt, which QEMU answers first, longer than a
// monitor that owes no other answer has time.
func TestQuestionWaitsForTheChangeBeforeIt(t *testing.T) {
	t.Parallel()
	asked, given := make(chan struct{}), make(chan struct{})
	busy := dial(t, func(c *qmptest.Conn) {
		c.Handshake()
		change, _ := c.Next()
		question, _ := c.Next()
		close(asked)
		<-given
		c.Return(change, "{}")
		c.Return(question, "1")
		c.Hold()
	})
	silent := dial(t, func(c *qmptest.Conn) { c.Handshake(); c.Hold() })
	ctx, cancel := context.WithTimeout(testContext(t), 50*time.Millisecond)
	defer cancel()
	if _, err := busy.Execute(ctx, "blockdev-add", nil); !errors.Is(err, qmp.ErrUnanswered) {
		t.Errorf("blockdev-add: got %v, want ErrUnanswered", err)
	}
	go func() {
		defer close(given)
		<-asked
		if _, err := silent.Execute(testContext(t), "query-block", nil); !errors.Is(err, qmp.ErrUnanswered) {
			t.Errorf("query-block of the silent one: got %v, want ErrUnanswered", err)
		}
	}()
	if out, err := busy.Execute(testContext(t), "query-block", nil); err != nil || string(out) != "1" {
		t.Errorf("query-block behind blockdev-add: %s, %v", out, err)
	}
}

func TestUnplugOfAGuestThatIsSilent(t *testing.T) {
	m := dial(t, func(c *qmptest.Conn) {
		c.Handshake()
		c.Table(map[string]string{"device_del": "{}", "qom-list": `[{"name":"d0","type":"child<virtio-blk-pci>"}]`}, nil)
	})
	ctx, cancel := context.WithTimeout(testContext(t), 50*time.Millisecond)
	defer cancel()
	if err := m.Unplug(ctx, "d0"); !errors.Is(err, qmp.ErrNotReleased) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("unplug: %v, want ErrNotReleased", err)
	}
}

func TestUnplugOfADeviceThatIsNotThereOrAQEMUThatDies(t *testing.T) {
	m := dial(t, func(c *qmptest.Conn) {
		c.Handshake()
		cmd, _ := c.Next()
		c.Refuse(cmd, "DeviceNotFound", "Device 'd0' not found")
		cmd, _ = c.Next()
		c.Return(cmd, "{}")
	})
	if err := m.Unplug(testContext(t), "d0"); !qmp.HasClass(err, qmp.ClassDeviceNotFound) {
		t.Errorf("no such device: %v", err)
	}
	if err := m.Unplug(testContext(t), "d0"); !errors.Is(err, qmp.ErrLost) {
		t.Errorf("QEMU died: %v", err)
	}
}
