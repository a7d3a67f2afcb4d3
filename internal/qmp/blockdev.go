package qmp

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// Address is where QEMU finds an NBD server: UnixAddress, InetAddress,
// VSockAddress or FDAddress.
type Address interface {
	// options is QEMU's SocketAddress.
	options() (map[string]any, error)
}

// UnixAddress is the path of a Unix socket, as QEMU sees it.
type UnixAddress string

func (a UnixAddress) options() (map[string]any, error) {
	if a == "" || len(a) > limits.QEMUSocketPath || strings.ContainsRune(string(a), 0) {
		return nil, fmt.Errorf("%w socket path %.200q: 1 to %d bytes, none of them zero", ErrInvalid, string(a), limits.QEMUSocketPath)
	}
	return map[string]any{"type": "unix", "path": string(a)}, nil
}

// InetAddress is a TCP port of a host by name or number.
type InetAddress struct {
	Host string
	Port uint16
}

func (a InetAddress) options() (map[string]any, error) {
	if a.Host == "" || len(a.Host) > limits.QMPName || a.Port == 0 {
		return nil, fmt.Errorf("%w TCP address %q, port %d", ErrInvalid, a.Host, a.Port)
	}
	return map[string]any{"type": "inet", "host": a.Host, "port": strconv.Itoa(int(a.Port))}, nil
}

// VSockAddress is a vsock port of a context, as the host of QEMU sees it.
type VSockAddress struct {
	CID, Port uint32
}

func (a VSockAddress) options() (map[string]any, error) {
	return map[string]any{
		"type": "vsock",
		"cid":  strconv.FormatUint(uint64(a.CID), 10),
		"port": strconv.FormatUint(uint64(a.Port), 10),
	}, nil
}

// FDAddress is a connected socket that Monitor.GetFD has passed by that name.
// QEMU cannot reconnect it.
type FDAddress string

func (a FDAddress) options() (map[string]any, error) {
	if err := checkID("descriptor", string(a)); err != nil {
		return nil, err
	}
	return map[string]any{"type": "fd", "str": string(a)}, nil
}

// NBD is a block node that is a client of an NBD server.
type NBD struct {
	Node   string // name of the node
	Server Address
	Export string // at most limits.MaxString bytes; empty is the default export

	TLSCreds    string // id of a tls-creds object; empty: no TLS
	TLSHostname string // QEMU 7.0: the name in the server's certificate

	// ReconnectDelay is how long requests wait for a lost server; with 0 the
	// guest gets an error at once. Rounded up to seconds.
	ReconnectDelay time.Duration
	// OpenTimeout is how long blockdev-add tries to connect, from QEMU 7.0
	// (Schema.HasOption). Rounded up to seconds.
	OpenTimeout time.Duration

	ReadOnly bool
	Discard  bool       // pass the guest's discards on
	Cache    *NodeCache // nil: QEMU's default

	DetectZeroes string // "off", "on" or "unmap"; empty: off
}

// NodeCache is how a node uses the host's page cache, and whether it drops
// flushes. An NBD client does neither, but shows it.
type NodeCache struct {
	Direct  bool `json:"direct"`
	NoFlush bool `json:"no-flush"`
}

// options is QEMU's BlockdevOptions.
func (n *NBD) options() (map[string]any, error) {
	if err := checkNode(n.Node); err != nil {
		return nil, err
	}
	if n.Server == nil || strings.ContainsRune(n.Export, 0) || len(n.Export) > limits.MaxString || len(n.TLSCreds) > limits.QMPName || len(n.TLSHostname) > limits.QMPName {
		return nil, fmt.Errorf("%w NBD node %q: no server, or a name too long or with a zero byte", ErrInvalid, n.Node)
	}
	if n.ReconnectDelay < 0 || n.ReconnectDelay > limits.NBDReconnect || n.OpenTimeout < 0 || n.OpenTimeout > limits.NBDOpen {
		return nil, fmt.Errorf("%w NBD node %q: reconnect delay %v, at most %v; open timeout %v, at most %v", ErrInvalid, n.Node, n.ReconnectDelay, limits.NBDReconnect, n.OpenTimeout, limits.NBDOpen)
	}
	server, err := n.Server.options()
	if err != nil {
		return nil, err
	}
	o := map[string]any{"driver": "nbd", "node-name": n.Node, "server": server, "read-only": n.ReadOnly, "discard": discard(n.Discard)}
	for name, value := range map[string]string{"export": n.Export, "tls-creds": n.TLSCreds, "tls-hostname": n.TLSHostname, "detect-zeroes": n.DetectZeroes} {
		if value != "" {
			o[name] = value
		}
	}
	if n.Cache != nil {
		o["cache"] = n.Cache
	}
	for name, value := range map[string]time.Duration{"reconnect-delay": n.ReconnectDelay, "open-timeout": n.OpenTimeout} {
		if value > 0 {
			o[name] = int64((value + time.Second - 1) / time.Second)
		}
	}
	return o, nil
}

func discard(pass bool) string {
	if pass {
		return "unmap"
	}
	return "ignore"
}

// Add adds the NBD client alone.
func (n NBD) Add(ctx context.Context, x Executor) error {
	options, err := n.options()
	if err != nil {
		return err
	}
	return do(ctx, x, "blockdev-add", options)
}

// Raw is a raw node with the options that it has: those that are left out when
// it is opened again become QEMU's defaults. A device uses one, so that another
// client can be put below it.
type Raw struct {
	Node              string
	ReadOnly, Discard bool
	Cache             *NodeCache // nil: QEMU's default
	DetectZeroes      string     // "off", "on" or "unmap"; empty: off
}

// Add adds the raw node above the node file.
func (r Raw) Add(ctx context.Context, x Executor, file string) error {
	o, err := r.options(file)
	if err != nil {
		return err
	}
	return do(ctx, x, "blockdev-add", o)
}

// Reopen puts the node file below the raw node in place of the one it has. It
// needs QEMU 6.1: Schema.HasCommand("blockdev-reopen").
func (r Raw) Reopen(ctx context.Context, x Executor, file string) error {
	o, err := r.options(file)
	if err != nil {
		return err
	}
	return do(ctx, x, "blockdev-reopen", map[string]any{"options": []any{o}})
}

func (r Raw) options(file string) (map[string]any, error) {
	for _, name := range []string{r.Node, file} {
		if err := checkNode(name); err != nil {
			return nil, err
		}
	}
	o := map[string]any{"driver": "raw", "node-name": r.Node, "read-only": r.ReadOnly, "discard": discard(r.Discard), "file": file}
	if r.Cache != nil {
		o["cache"] = r.Cache
	}
	if r.DetectZeroes != "" {
		o["detect-zeroes"] = r.DetectZeroes
	}
	return o, nil
}

// SetDrive has a disk of the guest use another node, in place of the one that it
// has: requests wait meanwhile. The node must be of the same iothread. QEMU takes
// it from 6.0 on.
func SetDrive(ctx context.Context, x Executor, disk *BlockDevice, node string) error {
	if err := checkNode(node); err != nil {
		return err
	}
	path := disk.QDev
	if !strings.HasPrefix(path, "/") {
		path = peripheral + "/" + path
	}
	return do(ctx, x, "qom-set", map[string]any{"path": path, "property": "drive", "value": node})
}

// BlockdevDel removes a node that nothing uses.
func BlockdevDel(ctx context.Context, x Executor, node string) error {
	if err := checkNode(node); err != nil {
		return err
	}
	return do(ctx, x, "blockdev-del", map[string]any{"node-name": node})
}

// BlockResize tells a node its new size in bytes. For an NBD client it must be
// the size that the server has, and the client must have connected since.
func BlockResize(ctx context.Context, x Executor, node string, size int64) error {
	if err := checkNode(node); err != nil {
		return err
	}
	if size < 0 {
		return fmt.Errorf("%w size %d", ErrInvalid, size)
	}
	return do(ctx, x, "block_resize", map[string]any{"node-name": node, "size": size})
}

// do executes a command that returns nothing of use.
func do(ctx context.Context, x Executor, command string, arguments any) error {
	_, err := x.Execute(ctx, command, arguments)
	return err
}

// Node is a block node, as QEMU describes it.
type Node struct {
	Name     string `json:"node-name"`
	Driver   string `json:"drv"`
	File     string `json:"file"` // QEMU's name of what it serves; for people
	ReadOnly bool   `json:"ro"`

	Cache        NodeCache `json:"cache"`
	DetectZeroes string    `json:"detect_zeroes"`

	Image struct {
		VirtualSize int64 `json:"virtual-size"` // bytes
	} `json:"image"`
}

// check refuses what no QEMU reports.
func (n *Node) check() error {
	if len(n.Name) > limits.QMPName || len(n.Driver) > limits.QMPName || len(n.DetectZeroes) > limits.QMPName || n.Image.VirtualSize < 0 {
		return fmt.Errorf("%w: a node of %d bytes named %.40q", ErrProtocol, n.Image.VirtualSize, n.Name)
	}
	n.File = printable(n.File, limits.MaxString)
	return nil
}

// QueryNamedBlockNodes lists all nodes, at most limits.QMPItems.
func QueryNamedBlockNodes(ctx context.Context, x Executor) ([]Node, error) {
	const command = "query-named-block-nodes"
	nodes, err := ask[[]Node](ctx, x, command, map[string]any{"flat": true})
	if err != nil {
		return nil, err
	}
	if len(nodes) > limits.QMPItems {
		return nil, fmt.Errorf("%s: %w: %d nodes", command, ErrProtocol, len(nodes))
	}
	for i := range nodes {
		if err := nodes[i].check(); err != nil {
			return nil, fmt.Errorf("%s: %w", command, err)
		}
	}
	return nodes, nil
}

// BlockDevice is a guest's disk, as QEMU describes it.
type BlockDevice struct {
	Device   string `json:"device"`    // name of an old-style backend, else empty
	QDev     string `json:"qdev"`      // id or path of the guest's device
	IOStatus string `json:"io-status"` // "ok", "failed", "nospace" or empty
	Inserted *Node  `json:"inserted"`  // nil for an empty drive
}

// ID is the id of the device that the disk belongs to, or else its path.
func (b *BlockDevice) ID() string {
	id, _ := strings.CutPrefix(b.QDev, peripheral+"/")
	return strings.TrimSuffix(id, "/virtio-backend")
}

// Is reports whether the disk belongs to the device with the id.
func (b *BlockDevice) Is(id string) bool {
	return id != "" && (b.QDev == id || b.QDev == peripheral+"/"+id || b.QDev == peripheral+"/"+id+"/virtio-backend")
}

// QueryBlock lists the guest's disks, at most limits.QMPItems.
func QueryBlock(ctx context.Context, x Executor) ([]BlockDevice, error) {
	const command = "query-block"
	disks, err := ask[[]BlockDevice](ctx, x, command, nil)
	if err != nil {
		return nil, err
	}
	if len(disks) > limits.QMPItems {
		return nil, fmt.Errorf("%s: %w: %d disks", command, ErrProtocol, len(disks))
	}
	for i := range disks {
		d := &disks[i]
		d.IOStatus = printable(d.IOStatus, limits.QMPName)
		if len(d.Device) > limits.QMPName || len(d.QDev) > limits.MaxString {
			return nil, fmt.Errorf("%s: %w: a disk named %.40q", command, ErrProtocol, d.QDev)
		}
		if d.Inserted == nil {
			continue
		}
		if err := d.Inserted.check(); err != nil {
			return nil, fmt.Errorf("%s: %w", command, err)
		}
	}
	return disks, nil
}

// Status is the state of a machine.
type Status struct {
	Running bool   `json:"running"`
	State   string `json:"status"` // such as "running", "paused", "prelaunch"; printable
}

// QueryStatus asks whether the machine runs.
func QueryStatus(ctx context.Context, x Executor) (Status, error) {
	s, err := ask[Status](ctx, x, "query-status", nil)
	s.State = printable(s.State, limits.QMPName)
	return s, err
}
