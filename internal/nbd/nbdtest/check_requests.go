package nbdtest

import (
	"fmt"
	"slices"
	"strings"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

// cmdName is the name of a command for an ID.
func cmdName(c wire.Cmd) string {
	return strings.ReplaceAll(strings.ToLower(strings.TrimPrefix(c.String(), "NBD_CMD_")), "_", "-")
}

// command is what s offers of one command.
type command struct {
	cmd   wire.Cmd
	flags wire.CmdFlags // valid ones, FUA aside
	write bool          // changes the export
}

// commands lists the commands that s offers, DISC aside.
func commands(s *Server, f form) []command {
	l := []command{{cmd: wire.CmdRead}, {cmd: wire.CmdWrite, write: true}}
	if f != simple && s.has(wire.SendDF) {
		l[0].flags = wire.FlagDF
	}
	for _, row := range []struct {
		flag wire.ExportFlags
		command
	}{
		{wire.SendFlush, command{cmd: wire.CmdFlush}},
		{wire.SendTrim, command{cmd: wire.CmdTrim, write: true}},
		{wire.SendZero, command{cmd: wire.CmdZero, flags: wire.FlagNoHole, write: true}},
		{wire.SendCache, command{cmd: wire.CmdCache}},
	} {
		if s.has(row.flag) {
			l = append(l, row.command)
		}
	}
	for i := range l {
		if l[i].cmd == wire.CmdZero && s.has(wire.SendFastZero) {
			l[i].flags |= wire.FlagFastZero
		}
	}
	if s.Features.Contexts && f != simple {
		l = append(l, command{cmd: wire.CmdExtents, flags: wire.FlagReqOne})
	}
	return l
}

// refused is the set of right answers to a request that breaks a rule, on an
// export that may also be read-only: which of two errors comes first is free.
func refused(s *Server, cmd command, e ...wire.Errno) []wire.Errno {
	if cmd.write && s.ReadOnly {
		return append(e, wire.EPERM)
	}
	return e
}

// of builds a request of the command, n bytes at off, with the payload that
// belongs to it.
func of(cmd wire.Cmd, off, n uint64) (wire.Request, []byte) {
	r := wire.Request{Cmd: cmd, Off: off, Len: n}
	switch cmd {
	case wire.CmdFlush:
		r.Off, r.Len = 0, 0
	case wire.CmdWrite:
		return r, make([]byte, n)
	}
	return r, nil
}

// session opens with contexts when the form has them.
func (c *script) session(f form) *peer {
	if c.s.Features.Contexts && f != simple {
		return c.openContexts(f)
	}
	return c.open(f)
}

// requestChecks are about headers: magic, type and flags.
func requestChecks(s *Server) []check {
	l := perForm(s, check{id: "TX-01", claim: "a wrong request magic ends the connection without a reply", negative: true}, func(c *script, f form) {
		for _, magic := range []uint32{0, wire.MagicRequest + 1, wire.MagicReply, wire.MagicChunk} {
			p := c.open(f)
			b := p.encode(wire.Request{Cmd: wire.CmdRead, Len: 512}, nil)
			be.PutUint32(b, magic)
			p.trySend(b)
			p.wantClosed(fmt.Sprintf("request magic %#x", magic))
		}
	})
	l = append(l, perForm(s, check{id: "TX-02", claim: "unknown commands are EINVAL, connection usable", negative: true}, func(c *script, f form) {
		p := c.open(f)
		for _, cmd := range []wire.Cmd{8, 9, 255, 256, 0x5e, 32768, 65535} {
			p.wantErrno(wire.Request{Cmd: cmd, Len: 512}, nil, wire.EINVAL)
			p.wantErrno(wire.Request{Cmd: cmd, Off: 1<<64 - 1, Len: 1<<32 - 1}, nil, wire.EINVAL)
		}
		p.works()
	})...)
	l = append(l, perForm(s, check{id: "TX-03", claim: "an unknown command has no payload: what follows is a request", negative: true}, func(c *script, f form) {
		p := c.open(f)
		p.trySend(append(p.encode(wire.Request{Cmd: 99, Len: 512}, nil), make([]byte, 512)...))
		if got := p.next(); got.errno != wire.EINVAL {
			c.failf("unknown command: got %v, want EINVAL", got.errno)
		}
		p.wantEnd("bytes that are no request")
	})...)
	for _, f := range s.forms() {
		for _, cmd := range commands(s, f) {
			l = append(l, flagCheck(s, f, cmd))
			if s.has(wire.SendFUA) && !(cmd.write && s.ReadOnly) {
				l = append(l, fuaCheck(f, cmd))
			}
		}
	}
	return append(l, modifierChecks(s)...)
}

// flagCheck sets each flag bit that the command does not have.
func flagCheck(s *Server, f form, cmd command) check {
	return check{id: fmt.Sprintf("TX-04/%s@%s", cmdName(cmd.cmd), f), claim: "reserved and foreign flags are EINVAL, connection usable", negative: true, run: func(c *script) {
		p := c.session(f)
		for bit := range 16 {
			flag := wire.CmdFlags(1 << bit)
			if flag == wire.FlagFUA || cmd.flags&flag != 0 || flag == wire.FlagPayloadLen && f == extended {
				continue
			}
			r, payload := of(cmd.cmd, 0, 4096)
			r.Flags = flag
			p.wantErrno(r, payload, refused(s, cmd, wire.EINVAL)...)
		}
		p.works()
	}}
}

// fuaCheck: "Command flags" has FUA accepted on every command.
func fuaCheck(f form, cmd command) check {
	return check{id: fmt.Sprintf("TX-05/%s@%s", cmdName(cmd.cmd), f), claim: "FUA is accepted", run: func(c *script) {
		p := c.session(f)
		r, payload := of(cmd.cmd, 0, 64<<10)
		r.Flags = wire.FlagFUA
		p.wantErrno(r, payload, wire.OK)
		p.works()
	}}
}

// modifierChecks are about flags whose validity depends on negotiation.
func modifierChecks(s *Server) []check {
	l := []check{{id: "TX-06/df", claim: "DF without structured replies is EINVAL", negative: true, run: func(c *script) {
		p := c.open(simple)
		p.wantErrno(wire.Request{Cmd: wire.CmdRead, Flags: wire.FlagDF, Len: 512}, nil, wire.EINVAL)
		p.works()
	}}}
	l = append(l, perForm(s, check{id: "TX-23", claim: "BLOCK_STATUS without a context is EINVAL, connection usable", negative: true}, func(c *script, f form) {
		p := c.open(f)
		p.wantErrno(wire.Request{Cmd: wire.CmdExtents, Len: 4096}, nil, wire.EINVAL)
		p.works()
	})...)
	l = append(l, perForm(s, check{id: "WR-53", claim: "DISC ends the connection whatever its flags, offset and length", negative: true}, func(c *script, f form) {
		for _, r := range []wire.Request{{}, {Flags: wire.FlagFUA}, {Flags: 0xff00}, {Off: 1<<64 - 1, Len: 1<<32 - 1}} {
			r.Cmd = wire.CmdDisc
			p := c.open(f)
			p.send(p.encode(r, nil))
			p.wantEOF(fmt.Sprintf("DISC %+v", r))
		}
	})...)
	if s.Features.Extended {
		l = append(l, payloadFlagChecks(s)...)
	}
	return l
}

// payloadFlagChecks are about PAYLOAD_LEN on the commands that have no payload.
func payloadFlagChecks(s *Server) []check {
	var l []check
	for _, cmd := range commands(s, extended) {
		if cmd.cmd == wire.CmdWrite || cmd.cmd == wire.CmdExtents {
			continue
		}
		l = append(l, check{id: "WR-57/" + cmdName(cmd.cmd), claim: "a payload that the command does not have is consumed, then EINVAL", negative: true, run: func(c *script) {
			p := c.open(extended)
			for _, n := range []int{1, 8, 4096, 1 << 20} {
				p.wantErrno(wire.Request{Cmd: cmd.cmd, Flags: wire.FlagPayloadLen, Len: uint64(n)}, make([]byte, n), refused(s, cmd, wire.EINVAL)...)
			}
			p.works()
		}})
	}
	return append(l,
		check{id: "WR-57/unknown", claim: "the payload of an unknown command is consumed, then EINVAL", negative: true, run: func(c *script) {
			p := c.open(extended)
			p.wantErrno(wire.Request{Cmd: 99, Flags: wire.FlagPayloadLen, Len: 4096}, make([]byte, 4096), wire.EINVAL)
			p.works()
		}},
		check{id: "WR-57/huge", claim: "a payload beyond every limit ends the connection", negative: true, run: func(c *script) {
			for _, n := range []uint64{limits.MaxIO + 1, 1 << 32, 1 << 63, 1<<64 - 1} {
				p := c.open(extended)
				p.trySend(p.encode(wire.Request{Cmd: wire.CmdWrite, Len: n}, nil))
				p.wantEnd(fmt.Sprintf("WRITE of %d bytes", n))
			}
		}},
	)
}

// errorChecks are about requests that are well formed and wrong.
func errorChecks(s *Server) []check {
	var l []check
	for _, f := range s.forms() {
		for _, cmd := range commands(s, f) {
			if cmd.cmd == wire.CmdFlush {
				continue
			}
			l = append(l, boundsCheck(s, f, cmd), emptyCheck(s, f, cmd))
			if cmd.write && s.ReadOnly {
				l = append(l, readOnlyCheck(f, cmd))
			}
		}
	}
	if s.ReadOnly { // writing commands that are not offered are EPERM, too
		l = append(l, perForm(s, check{id: "TX-14", claim: "writing commands on a read-only export are EPERM, payload consumed", negative: true}, func(c *script, f form) {
			p := c.open(f)
			for _, cmd := range []wire.Cmd{wire.CmdWrite, wire.CmdTrim, wire.CmdZero} {
				r, payload := of(cmd, 0, 4096)
				p.wantErrno(r, payload, wire.EPERM)
			}
			p.works()
		})...)
	}
	if s.has(wire.SendFlush) {
		l = append(l, perForm(s, check{id: "TX-17", claim: "FLUSH with an offset or a length is EINVAL", negative: true}, func(c *script, f form) {
			p := c.open(f)
			p.wantErrno(wire.Request{Cmd: wire.CmdFlush, Len: 4096}, nil, wire.EINVAL)
			p.wantErrno(wire.Request{Cmd: wire.CmdFlush, Off: 4096}, nil, wire.EINVAL)
			p.wantErrno(wire.Request{Cmd: wire.CmdFlush}, nil, wire.OK)
			p.works()
		})...)
	}
	l = append(l, textChecks(s)...)
	return append(l, oversizeChecks(s)...)
}

// bounds are ranges that are not inside an export of the size.
func bounds(size uint64, min uint64) []span {
	return []span{
		{size - min, size + min}, {size, size + min}, {size + min, size + 2*min}, {0, size + min},
		{1 << 63, 1<<63 + min}, {1<<63 - min, 1 << 63}, {-min, 0}, {-min, min}, {0 - 2*min, size},
	}
}

// boundsCheck: "Error values" wants ENOSPC of the commands that provision,
// EINVAL of the others.
func boundsCheck(s *Server, f form, cmd command) check {
	want := wire.EINVAL
	if cmd.cmd == wire.CmdWrite || cmd.cmd == wire.CmdZero {
		want = wire.ENOSPC
	}
	return check{id: boundsID(cmd.cmd, f), claim: fmt.Sprintf("beyond the end is %v, connection usable", want), negative: true, run: func(c *script) {
		p := c.session(f)
		for _, b := range bounds(uint64(s.Size), uint64(s.minBlock())) {
			r := wire.Request{Cmd: cmd.cmd, Off: b.off, Len: b.end - b.off}
			if cmd.cmd == wire.CmdWrite && r.Len > 1<<20 {
				continue // too big is another error
			}
			if f != extended && r.Len > 1<<32-1 {
				continue
			}
			var payload []byte
			if cmd.cmd == wire.CmdWrite {
				payload = make([]byte, r.Len)
			}
			p.wantErrno(r, payload, refused(s, cmd, want)...)
		}
		p.works()
		if got := c.haggle().info(wire.OptInfo, s.Export); got.size != uint64(s.Size) {
			c.failf("size is now %d, was %d", got.size, s.Size)
		}
	}}
}

func boundsID(cmd wire.Cmd, f form) string {
	id := "TX-07"
	if cmd == wire.CmdWrite || cmd == wire.CmdZero {
		id = "TX-09"
	}
	return fmt.Sprintf("%s/%s@%s", id, cmdName(cmd), f)
}

func emptyCheck(s *Server, f form, cmd command) check {
	return check{id: fmt.Sprintf("TX-15/%s@%s", cmdName(cmd.cmd), f), claim: "length 0 is EINVAL, connection usable", negative: true, run: func(c *script) {
		p := c.session(f)
		for _, off := range []uint64{0, 4096, uint64(s.Size)} {
			p.wantErrno(wire.Request{Cmd: cmd.cmd, Off: off}, nil, refused(s, cmd, wire.EINVAL)...)
		}
		p.works()
	}}
}

func readOnlyCheck(f form, cmd command) check {
	return check{id: fmt.Sprintf("TX-14/%s@%s", cmdName(cmd.cmd), f), claim: "on a read-only export EPERM, payload consumed", negative: true, run: func(c *script) {
		p := c.session(f)
		for _, n := range []uint64{512, 4096, 1 << 20} {
			r, payload := of(cmd.cmd, 0, n)
			p.wantErrno(r, payload, wire.EPERM)
		}
		p.works()
	}}
}

// textChecks hold the text of error chunks to what clients survive and hosts
// may tell.
func textChecks(s *Server) []check {
	var l []check
	for _, f := range s.forms() {
		if f == simple {
			continue
		}
		l = append(l, check{id: "WR-50@" + string(f), claim: "error texts are at most 512 bytes and name no path", negative: true, run: func(c *script) {
			p := c.session(f)
			for _, cmd := range commands(s, f) {
				if cmd.cmd == wire.CmdFlush {
					continue
				}
				r, payload := of(cmd.cmd, uint64(s.Size), 4096)
				got := p.do(r, payload)
				if got.errno == wire.OK {
					c.failf("%v at the end succeeds", cmd.cmd)
				}
				if len(got.text) > limits.MaxErrorText || strings.ContainsAny(got.text, "/\n\x00") {
					c.failf("%v: error text of %d bytes %.100q", cmd.cmd, len(got.text), got.text)
				}
			}
			p.works()
		}})
	}
	return l
}

// oversizeChecks are about lengths that nobody serves.
func oversizeChecks(s *Server) []check {
	l := perForm(s, check{id: "TX-08", claim: "reads above 64 MiB are an error at once, connection usable", negative: true}, func(c *script, f form) {
		p := c.open(f)
		lens := []uint64{limits.MaxIO + 1, 1 << 31, 1<<32 - 1}
		if f == extended {
			lens = append(lens, 1<<32, 1<<63, 1<<64-1)
		}
		for _, n := range lens {
			if uint64(s.minBlock()) > 1 {
				n &^= uint64(s.minBlock()) - 1
			}
			p.wantErrno(wire.Request{Cmd: wire.CmdRead, Len: n}, nil, wire.EINVAL, wire.EOVERFLOW)
		}
		p.works()
	})
	for _, f := range slices.DeleteFunc(s.forms(), func(f form) bool { return f == extended }) {
		for _, n := range []uint64{limits.MaxIO + 1, 1<<32 - 1} {
			l = append(l, check{id: fmt.Sprintf("TX-10/%d@%s", n, f), claim: "a WRITE announcing more than 64 MiB is EINVAL, then the end", negative: true, run: func(c *script) {
				p := c.open(f)
				p.trySend(p.encode(wire.Request{Cmd: wire.CmdWrite, Len: n}, nil))
				if got := p.next(); !slices.Contains(refused(s, command{write: true}, wire.EINVAL), got.errno) {
					c.failf("WRITE of %d bytes: got %v, want EINVAL", n, got.errno)
				}
				p.wantClosed("the error")
			}})
		}
	}
	return l
}
