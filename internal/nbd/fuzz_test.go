package nbd

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

// hangLimit ends a test that would wait for ever; nothing is measured by it.
const hangLimit = 30 * time.Second

// feed plays bytes to a fresh connection, closes its sending half, and
// returns when the server has ended the connection.
func (r *rig) feed(t *testing.T, p []byte) []byte {
	t.Helper()
	c := r.dial(t).(*net.UnixConn)
	defer c.Close()
	c.SetDeadline(time.Now().Add(hangLimit))
	got := make(chan []byte)
	go func() {
		b, err := io.ReadAll(c)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			t.Error("server did not end the connection")
		}
		got <- b
	}()
	c.Write(p) // the server may hang up in the middle
	c.CloseWrite()
	b := <-got
	select {
	case <-r.errs:
	case <-time.After(hangLimit):
		t.Fatal("Serve did not return")
	}
	if r.exports.open.Load() != 0 {
		t.Fatalf("%d exports stayed open", r.exports.open.Load())
	}
	return b
}

func clientFlags(b []byte) []byte {
	return binary.BigEndian.AppendUint32(b, wire.FlagFixedNewstyle|wire.FlagNoZeroes)
}

func goOption(b []byte) []byte {
	return wire.AppendOption(b, wire.OptGo, wire.AppendInfoRequest(nil, wire.InfoRequest{Name: "disk"}))
}

func metaOption(b []byte) []byte {
	return wire.AppendOption(b, wire.OptSetMeta, wire.AppendMetaRequest(nil,
		wire.MetaRequest{Name: "disk", Queries: []string{wire.ContextAllocation}}))
}

func FuzzOptions(f *testing.F) {
	f.Add([]byte{})
	f.Add(clientFlags(nil))
	f.Add(goOption(clientFlags(nil)))
	f.Add(goOption(metaOption(wire.AppendOption(clientFlags(nil), wire.OptStructuredReply, nil))))
	f.Add(goOption(metaOption(wire.AppendOption(clientFlags(nil), wire.OptExtendedHeaders, nil))))
	f.Add(wire.AppendOption(clientFlags(nil), wire.OptExportName, []byte("disk")))
	f.Add(wire.AppendOption(wire.AppendOption(clientFlags(nil), wire.OptList, nil), wire.OptAbort, nil))
	f.Add(wire.AppendOption(clientFlags(nil), wire.OptStartTLS, nil))
	f.Add(wire.AppendOption(clientFlags(nil), wire.OptInfo, wire.AppendInfoRequest(nil,
		wire.InfoRequest{Infos: []wire.Info{wire.InfoName, wire.InfoDescription, wire.InfoBlockSize, 9}})))
	f.Add(binary.BigEndian.AppendUint32(wire.AppendOption(clientFlags(nil), 77, []byte("x")), 0xffffffff))
	r := memRig(f, 1<<20)
	f.Fuzz(func(t *testing.T, p []byte) { r.feed(t, p) })
}

// sessionPrefixes are the three forms of transmission.
var sessionPrefixes = [...][]byte{
	wire.AppendOption(clientFlags(nil), wire.OptExportName, nil),
	goOption(metaOption(wire.AppendOption(clientFlags(nil), wire.OptStructuredReply, nil))),
	goOption(metaOption(wire.AppendOption(clientFlags(nil), wire.OptExtendedHeaders, nil))),
}

func FuzzRequests(f *testing.F) {
	for form := range sessionPrefixes {
		for cmd := wire.CmdRead; cmd <= wire.CmdExtents+1; cmd++ {
			for _, flags := range [...]wire.CmdFlags{0, wire.FlagFUA, wire.FlagDF, wire.FlagNoHole | wire.FlagFastZero, wire.FlagReqOne, wire.FlagPayloadLen} {
				q := wire.Request{Flags: flags, Cmd: cmd, Cookie: 7, Off: 512, Len: 12}
				var b []byte
				if form == 2 {
					b = wire.AppendExtRequest(nil, q)
				} else {
					b = wire.AppendRequest(nil, q)
				}
				f.Add(uint8(form), append(b, "twelve bytes"...))
			}
		}
	}
	f.Add(uint8(0), wire.AppendRequest(nil, wire.Request{Cmd: wire.CmdWrite, Len: 0xffffffff}))
	f.Add(uint8(0), wire.AppendRequest(nil, wire.Request{Cmd: wire.CmdRead, Off: 1<<64 - 1, Len: 0xffffffff}))
	f.Add(uint8(2), wire.AppendExtRequest(nil, wire.Request{Cmd: wire.CmdZero, Off: 1, Len: 1<<64 - 1}))
	r := memRig(f, 1<<20)
	f.Fuzz(func(t *testing.T, form uint8, p []byte) {
		prefix := sessionPrefixes[int(form)%len(sessionPrefixes)]
		r.feed(t, append(append([]byte(nil), prefix...), p...))
	})
}
