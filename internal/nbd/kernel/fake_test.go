package kernel

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/genetlink/genltest"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
	"github.com/vmdiskd/vmdiskd/internal/transport"
)

var nbdFamily = genetlink.Family{ID: 40, Version: 1, Name: familyName, Groups: []genetlink.MulticastGroup{{ID: 7, Name: groupName}}}

// scripted is a driver whose answers are those of fn.
func scripted(t testing.TB, fn genltest.Func) *Driver {
	t.Helper()
	conn := genltest.Dial(genltest.ServeFamily(nbdFamily, fn))
	t.Cleanup(func() { conn.Close() })
	d, err := newDriver(conn)
	must(t, err)
	return d
}

// answering gives every command the same replies.
func answering(t testing.TB, replies ...[]byte) *Driver {
	return scripted(t, func(genetlink.Message, netlink.Message) ([]genetlink.Message, error) {
		var list []genetlink.Message
		for _, data := range replies {
			list = append(list, genetlink.Message{Data: data})
		}
		if list == nil {
			return nil, io.EOF
		}
		return list, nil
	})
}

// attrs encodes attributes.
func attrs(t testing.TB, fill func(ae *netlink.AttributeEncoder)) []byte {
	t.Helper()
	ae := netlink.NewAttributeEncoder()
	fill(ae)
	b, err := ae.Encode()
	must(t, err)
	return b
}

// fakeKernel is a driver with a folder as its sysfs. It keeps duplicates of the
// sockets that it is given.
type fakeKernel struct {
	t     testing.TB
	sysfs Sysfs
	d     *Driver

	mu      sync.Mutex
	calls   []call // guarded by mu
	sockets []*os.File
	refuse  error // guarded by mu; what the next reconfiguration is answered
	changed chan struct{}
}

// call is one command with its attributes.
type call struct {
	cmd     uint8
	numbers map[uint16]uint64
	backend string
	sockets int
}

func newFakeKernel(t testing.TB) *fakeKernel {
	k := &fakeKernel{t: t, sysfs: Sysfs(t.TempDir()), changed: make(chan struct{}, 64)}
	k.d = scripted(t, k.command)
	k.d.nodes = t.TempDir()
	t.Cleanup(func() {
		for _, f := range k.sockets {
			f.Close()
		}
	})
	return k
}

func (k *fakeKernel) command(m genetlink.Message, _ netlink.Message) ([]genetlink.Message, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	c, fds, err := decodeCall(m)
	if err != nil {
		return nil, err
	}
	defer func() { k.changed <- struct{}{} }()
	if c.cmd == cmdReconfigure && k.refuse != nil {
		return nil, k.refuse
	}
	for _, fd := range fds {
		n, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return nil, err
		}
		k.sockets = append(k.sockets, os.NewFile(uintptr(n), "socket"))
	}
	k.calls = append(k.calls, c)
	index := int(c.numbers[attrIndex])
	switch c.cmd {
	case cmdConnect:
		k.show(index, c)
		return []genetlink.Message{{Data: attrs(k.t, func(ae *netlink.AttributeEncoder) { ae.Uint32(attrIndex, uint32(index)) })}}, nil
	case cmdDisconnect:
		os.RemoveAll(filepath.Join(string(k.sysfs), Name(index)))
	}
	return nil, io.EOF
}

// show makes the files of an attached device.
func (k *fakeKernel) show(index int, c call) {
	for name, text := range map[string]string{
		"pid": "1", "size": strconv.FormatUint(c.numbers[attrSizeBytes]/512, 10), "ro": "0", "backend": c.backend,
		"queue/logical_block_size": strconv.FormatUint(c.numbers[attrBlockSize], 10),
		"queue/nr_requests":        "128", "queue/max_sectors_kb": "1280",
	} {
		k.write(index, name, text+"\n")
	}
}

func (k *fakeKernel) write(index int, name, text string) {
	path := k.sysfs.path(index, name)
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, []byte(text), 0o600)); err != nil {
		k.t.Error(err)
	}
}

func (k *fakeKernel) last() (n int, c call) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.calls) == 0 {
		return 0, call{}
	}
	return len(k.calls), k.calls[len(k.calls)-1]
}

func (k *fakeKernel) socket(i int) *os.File {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.sockets[i]
}

func decodeCall(m genetlink.Message) (c call, fds []uint32, err error) {
	c = call{cmd: m.Header.Command, numbers: map[uint16]uint64{}}
	ad, err := netlink.NewAttributeDecoder(m.Data)
	if err != nil {
		return c, nil, err
	}
	for ad.Next() {
		switch ad.Type() {
		case attrIndex:
			c.numbers[attrIndex] = uint64(ad.Uint32())
		case attrBackend:
			c.backend = ad.String()
		case attrSockets:
			ad.Nested(func(ad *netlink.AttributeDecoder) error {
				for ad.Next() {
					ad.Nested(func(ad *netlink.AttributeDecoder) error {
						for ad.Next() {
							fds = append(fds, ad.Uint32())
						}
						return nil
					})
				}
				return nil
			})
		default:
			c.numbers[ad.Type()] = ad.Uint64()
		}
	}
	c.sockets = len(fds)
	return c, fds, ad.Err()
}

// fakeServer is an NBD server that knows GO and INFO, and answers reads with
// the letter x.
type fakeServer struct {
	path   string
	size   atomic.Int64
	flags  atomic.Uint32
	block  atomic.Uint32
	early  atomic.Bool                // sends a byte before the first request
	tls    atomic.Pointer[tls.Config] // nil for none
	names  atomic.Pointer[names]      // nil for a server that has any export, and tells no names
	l      net.Listener
	mu     sync.Mutex
	conns  []net.Conn // guarded by mu
	asked  []string   // guarded by mu; the names of exports that were asked for
	served sync.WaitGroup
}

// names are the exports of a server that tells their names, by the names that
// open them.
type names map[string]fakeExport

type fakeExport struct {
	name string
	size int64
}

func newFakeServer(t testing.TB) *fakeServer {
	s := &fakeServer{path: filepath.Join(t.TempDir(), "nbd")}
	s.size.Store(1 << 20)
	s.flags.Store(uint32(wire.HasFlags | wire.SendFlush | wire.CanMultiConn))
	s.block.Store(1)
	var err error
	s.l, err = net.Listen("unix", s.path)
	must(t, err)
	s.served.Go(s.accept)
	t.Cleanup(func() {
		s.l.Close()
		s.hangUp()
		s.served.Wait()
	})
	return s
}

func (s *fakeServer) server() Server {
	return Server{Target: transport.Target{Kind: transport.Unix, Path: s.path}, Export: "disk"}
}

func (s *fakeServer) accept() {
	for {
		c, err := s.l.Accept()
		if err != nil {
			return
		}
		s.mu.Lock()
		s.conns = append(s.conns, c)
		s.mu.Unlock()
		s.served.Go(func() {
			defer c.Close()
			(&serving{s, c}).run()
		})
	}
}

// hangUp closes all connections.
func (s *fakeServer) hangUp() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.conns {
		c.Close()
	}
	s.conns = nil
}

// serving is one connection; its methods end the goroutine at its end.
type serving struct {
	*fakeServer
	c net.Conn
}

func (s *serving) recv(n int) []byte {
	b := make([]byte, n)
	if _, err := io.ReadFull(s.c, b); err != nil {
		s.c.Close()
		runtime.Goexit()
	}
	return b
}

func (s *serving) send(b []byte) { _, _ = s.c.Write(b) } // the next read sees the end

func (s *serving) run() {
	s.send([]byte("NBDMAGICIHAVEOPT\x00\x03"))
	s.recv(4)
	for s.haggle() {
	}
	for {
		r, err := wire.DecodeRequest(s.recv(wire.RequestSize))
		if err != nil || r.Cmd != wire.CmdRead {
			return
		}
		b := wire.AppendSimpleReply(nil, 0, r.Cookie)
		for range r.Len {
			b = append(b, 'x')
		}
		s.send(b)
	}
}

// haggle is false when the transmission phase begins.
func (s *serving) haggle() bool {
	h, err := wire.DecodeOption(s.recv(wire.OptionHeaderSize))
	if err != nil {
		return false
	}
	p := s.recv(int(h.Len))
	if h.Opt == wire.OptStartTLS && s.tls.Load() != nil {
		s.send(wire.AppendOptReply(nil, h.Opt, wire.RepAck, nil))
		s.c = tls.Server(s.c, s.tls.Load())
		return true
	}
	if h.Opt != wire.OptGo && h.Opt != wire.OptInfo {
		rep := wire.RepErrUnsup
		if h.Opt == wire.OptAbort {
			rep = wire.RepAck
		}
		s.send(wire.AppendOptReply(nil, h.Opt, rep, nil))
		return true
	}
	e, ok := s.find(p)
	if !ok {
		s.send(wire.AppendOptReply(nil, h.Opt, wire.RepErrUnknown, nil))
		return true
	}
	flags := wire.ExportFlags(s.flags.Load())
	b := wire.AppendOptReply(nil, h.Opt, wire.RepInfo, wire.AppendInfoExport(nil, uint64(e.size), flags))
	if s.names.Load() != nil {
		b = wire.AppendOptReply(b, h.Opt, wire.RepInfo, wire.AppendInfoText(nil, wire.InfoName, e.name))
	}
	b = wire.AppendOptReply(b, h.Opt, wire.RepInfo, wire.AppendInfoBlockSize(nil, wire.BlockSizes{Min: s.block.Load(), Preferred: max(4096, s.block.Load()), Max: 1 << 20}))
	b = wire.AppendOptReply(b, h.Opt, wire.RepAck, nil)
	if s.early.Load() {
		b = append(b, 0)
	}
	s.send(b)
	return h.Opt == wire.OptInfo
}

// find is the export of an INFO or GO.
func (s *fakeServer) find(request []byte) (fakeExport, bool) {
	r, err := wire.DecodeInfoRequest(request)
	if err != nil {
		return fakeExport{}, false
	}
	s.mu.Lock()
	s.asked = append(s.asked, r.Name)
	s.mu.Unlock()
	list := s.names.Load()
	if list == nil {
		return fakeExport{size: s.size.Load()}, true
	}
	e, ok := (*list)[r.Name]
	return e, ok
}

// lastAsked is the name of the export that was asked for last.
func (s *fakeServer) lastAsked() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.asked[len(s.asked)-1]
}
