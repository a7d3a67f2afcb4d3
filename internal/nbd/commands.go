package nbd

import (
	"time"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/engine/bufpool"
	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

// command is one row of the table of commands.
type command struct {
	cmd   wire.Cmd
	flags wire.CmdFlags // what a client may set, FUA and the session's flags aside
	// payload: the request carries Len bytes, always.
	payload bool
	// run answers the request, now or later. An error ends the connection.
	run func(*session, *wire.Request) error
}

var commands = [...]command{
	{cmd: wire.CmdRead, flags: wire.FlagDF, run: (*session).read},
	{cmd: wire.CmdWrite, payload: true, run: (*session).write},
	{cmd: wire.CmdFlush, run: (*session).flush},
	{cmd: wire.CmdTrim, run: (*session).background},
	{cmd: wire.CmdCache, run: (*session).background},
	{cmd: wire.CmdZero, flags: wire.FlagNoHole | wire.FlagFastZero, run: (*session).background},
	{cmd: wire.CmdExtents, flags: wire.FlagReqOne, run: (*session).extents},
}

func findCommand(c wire.Cmd) *command {
	for i := range commands {
		if commands[i].cmd == c {
			return &commands[i]
		}
	}
	return nil
}

var (
	errUnknownCommand = &refusal{wire.EINVAL, "unknown command"}
	errBadFlags       = &refusal{wire.EINVAL, "flag is not allowed here"}
	errFlushRange     = &refusal{wire.EINVAL, "flush takes no range"}
	errTooLarge       = &refusal{wire.EINVAL, "request is too large"}
	errNoContext      = &refusal{wire.EINVAL, "no metadata context was negotiated"}
	errPayload        = &refusal{wire.EINVAL, "payload is not allowed here"}
	errBadPayload     = &refusal{wire.EINVAL, "malformed payload"}
)

// dispatch checks the request by its command's row and runs it. A request
// that is refused still has its payload on the wire.
func (s *session) dispatch(req *wire.Request) error {
	if s.chatty {
		s.opt.Log.Debug("request", "peer", s.conn.Peer(), "command", req.Cmd.String(),
			"offset", req.Off, "length", req.Len, "flags", req.Flags)
	}
	s.begin()
	row := findCommand(req.Cmd)
	if err := s.check(row, req); err != nil {
		return s.refuse(req, err, s.carries(row, req))
	}
	return row.run(s, req)
}

// check is about form: flags and payload. Ranges and capabilities are the
// device's to check.
func (s *session) check(row *command, req *wire.Request) error {
	if row == nil {
		return errUnknownCommand
	}
	allowed := row.flags | s.always
	if !s.structured {
		allowed &^= wire.FlagDF
	}
	if s.extended {
		if row.payload || row.cmd == wire.CmdExtents && s.payloads {
			allowed |= wire.FlagPayloadLen
		} else if req.Flags&wire.FlagPayloadLen != 0 {
			return errPayload
		}
	}
	if req.Flags&^allowed != 0 {
		return errBadFlags
	}
	if req.Len > limits.MaxIO && (row.cmd == wire.CmdRead || row.payload) {
		return errTooLarge
	}
	return nil
}

// carries tells how many bytes of payload follow the header. A WRITE always
// has one. An extended header should say so by its flag, but QEMU's client
// (10.0) leaves the flag out.
func (s *session) carries(row *command, req *wire.Request) uint64 {
	if row != nil && row.payload || s.extended && req.Flags&wire.FlagPayloadLen != 0 {
		return req.Len
	}
	return 0
}

// refuse answers with an error in this turn and skips the payload. One that
// is longer than any request may be is not worth skipping: the connection
// ends behind the answer.
func (s *session) refuse(req *wire.Request, err error, payload uint64) error {
	if rerr := s.replyError(req, err); rerr != nil {
		return rerr
	}
	if payload > limits.MaxIO {
		return errTooLong
	}
	return s.in.discard(int(payload))
}

// replyDone and replyError append a reply to the turn.
func (s *session) replyDone(req *wire.Request) error {
	if err := s.reserve(maxHead); err != nil {
		return err
	}
	s.out = s.appendDone(s.out, req)
	s.tally.count(req, false)
	return nil
}

func (s *session) replyError(req *wire.Request, err error) error {
	s.refused++
	if rerr := s.reserve(maxHead + limits.MaxErrorText); rerr != nil {
		return rerr
	}
	s.out = s.appendFailure(s.out, req, err, -1)
	s.tally.count(req, true)
	return nil
}

// device turns the wire's unsigned range into the device's; what does not
// fit is negative there and refused.
func device(req *wire.Request) (off, n int64) { return int64(req.Off), int64(req.Len) }

// read answers from the page cache within the turn, or leaves it to the
// engine, or, where the device cannot name the bytes, to a goroutine.
func (s *session) read(req *wire.Request) error {
	off, n := device(req)
	switch err := s.dev.Map(engine.OpRead, off, n, &s.m); err {
	case nil:
	case backing.ErrNotMappable:
		return s.background(req)
	default:
		return s.replyError(req, err)
	}
	if s.hole(req) {
		s.m.Release()
		if err := s.reserve(maxHead + 12); err != nil {
			return err
		}
		s.out = s.appendReadHole(s.out, req)
		s.tally.count(req, false)
		return nil
	}
	if n <= limits.InlineReply {
		done, err := s.readInline(req, int(n))
		if done || err != nil {
			return err
		}
	} else if s.resident(n) {
		if b := s.tryBuffer(int(n)); b != nil {
			return s.readZeroCopy(req, b)
		}
	}
	return s.readLater(req, int(n))
}

// mayBeHole tells whether a read may be answered by a hole chunk: with DF
// zeroes are spelled out.
func (s *session) mayBeHole(req *wire.Request) bool {
	return s.structured && req.Flags&wire.FlagDF == 0
}

// hole tells whether the mapped answer is one hole chunk.
func (s *session) hole(req *wire.Request) bool {
	return s.mayBeHole(req) && s.m.N == 1 && s.m.Runs[0].File == nil
}

// isHole asks the device, for a large read that could not be mapped.
func (s *session) isHole(req *wire.Request) (hole bool) {
	off, n := device(req)
	if !s.mayBeHole(req) || n < limits.HoleRead {
		return false
	}
	err := s.dev.Extents(s.ctx, off, n, backing.ReqOne|backing.AsRead, func(x backing.Extent) bool {
		hole = x.Zero && x.Len == n
		return false
	})
	return err == nil && hole
}

// readInline copies n bytes behind a header in the turn's buffer. done is
// false when a part of them is not in the page cache, or there is no memory; then
// the buffer is as it was.
func (s *session) readInline(req *wire.Request, n int) (done bool, err error) {
	if ok, err := s.tryReserve(maxHead + n); !ok {
		return false, err
	}
	b := s.appendReadHead(s.out, req)
	end := len(b) + n
	for i := range s.m.N {
		run := &s.m.Runs[i]
		p := b[len(b) : len(b)+int(run.Len)]
		if run.File == nil {
			clear(p)
		} else if s.opt.Engine.ReadNow(run.File, p, run.Off) != len(p) {
			return false, nil
		}
		b = b[:len(b)+len(p)]
	}
	s.out = b[:end]
	s.tally.count(req, false)
	s.m.Release()
	return true, nil
}

// resident tells whether a large read is one run of a file that the page cache
// holds whole, so that sendfile(2) will not wait for the disk, and that stays
// this part of the disk.
func (s *session) resident(n int64) bool {
	run := &s.m.Runs[0]
	return s.m.N == 1 && run.File != nil && !s.m.Reused && s.sender.link.zeroCopy() && run.File.Cached(run.Off, n)
}

// readZeroCopy sends the header with the turn's replies and the data from the
// page cache. If the file cannot be sent to the end the connection ends: the
// header is out. Into b, a buffer for all of it, goes what the peer leaves unread.
func (s *session) readZeroCopy(req *wire.Request, b *bufpool.Buf) error {
	n := len(b.Bytes())
	if ok, err := s.tryReserve(maxHead); !ok {
		s.unlend(b)
		s.m.Release()
		if err != nil {
			return err
		}
		return s.background(req)
	}
	s.out = s.appendReadHead(s.out, req)
	s.tally.count(req, false)
	run := s.m.Runs[0]
	sent, left := 0, len(s.out)
	owner := s.sender.claim()
	if owner {
		k, err := s.sender.link.trySend(s.out, true)
		if left -= k; err == nil && left == 0 {
			sent, err = s.sender.link.tryFile(run.File, run.Off, n)
		}
		s.tally.out += uint64(k + sent)
		if err != nil {
			s.m.Release()
			s.unlend(b)
			s.sender.yield()
			s.fail(err)
			return err
		}
	}
	if left == 0 {
		s.out = s.out[:0]
	}
	if sent == n {
		s.m.Release()
		s.unlend(b)
		s.sender.yield()
		s.sending.moved()
		return nil
	}
	return s.queueFile(s.buffered(req, b, true), owner, left, segment{file: run.File, off: run.Off + int64(sent), n: n - sent})
}

// queueFile leaves what readZeroCopy could not send to the sender: the last
// left bytes of the turn's replies, then the rest of the file, which answers r.
func (s *session) queueFile(r *request, owner bool, left int, g segment) error {
	g.req = r
	r.m, s.m = s.m, backing.Mapping{}
	switch {
	case owner && left == 0:
		s.sender.yield(g)
	case owner:
		s.sender.yield(s.takeOut(len(s.out)-left), g)
	default:
		if head := s.takeOut(len(s.out) - left); !s.sender.pushFile(head, g) {
			if err := r.copyFile(&g); err != nil {
				s.fail(err) // then push ends both
			}
			s.sender.push(head, g)
		}
	}
	return s.sender.broken()
}

// readLater gives the read a buffer of its own, fills what the page cache
// has and leaves the rest to the engine.
func (s *session) readLater(req *wire.Request, n int) error {
	b := s.tryBuffer(n)
	if b == nil {
		s.m.Release()
		return s.background(req)
	}
	r := s.buffered(req, b, false)
	r.m, s.m = s.m, backing.Mapping{}
	at := int64(0)
	for i := range r.m.N {
		run := &r.m.Runs[i]
		p := r.p[at : at+run.Len]
		if run.File == nil {
			clear(p)
		} else if k := int64(s.opt.Engine.ReadNow(run.File, p, run.Off)); k < run.Len {
			r.transfer(i, engine.OpRead, run.File, at+k, at+run.Len, run.Off+k)
		}
		at += run.Len
	}
	r.transferred()
	return nil
}

// write takes a short payload from the turn's buffer and copies it to the
// page cache within the turn. What is long, must be durable, goes past the
// page cache or cannot be mapped gets a buffer of its own.
func (s *session) write(req *wire.Request) error {
	off, n := device(req)
	if n > limits.InlineReply || req.Flags&wire.FlagFUA != 0 {
		s.in.want = smallRead
		if err := s.dev.MayWrite(off, n, deviceFlags(req.Flags)); err != nil {
			return s.refuse(req, err, req.Len)
		}
		return s.writeLater(req, int(n))
	}
	s.in.want = limits.TurnBuffer
	p, err := s.in.body(int(n))
	if err != nil {
		return err
	}
	s.begin() // receiving may have ended the turn
	cached, err := s.mapWrite(req, &s.m)
	switch {
	case cached:
		err = s.writeCached(req, &s.m, p)
	case err == nil:
		if b := s.tryBuffer(int(n)); b != nil {
			return s.writeMapped(req, b, p)
		}
		err = backing.ErrNotMappable // nothing stays mapped while others are waited for
	}
	s.m.Release()
	if err == backing.ErrNotMappable {
		return s.writeLater(req, int(n))
	}
	s.in.skip(int(n))
	return s.writeDone(req, err)
}

// writeMapped leaves p, of the turn's buffer, to the engine by a copy in b.
func (s *session) writeMapped(req *wire.Request, b *bufpool.Buf, p []byte) error {
	r := s.buffered(req, b, false)
	r.m, s.m = s.m, backing.Mapping{}
	s.in.skip(copy(r.p, p))
	r.transferWrite()
	return nil
}

// writeDone answers a write of this turn, which it ends if that has been a long one: to
// a peer that is gone no reply can be sent, and its other writes stay undone.
func (s *session) writeDone(req *wire.Request, err error) error {
	if err != nil {
		err = s.replyError(req, err)
	} else {
		err = s.replyDone(req)
	}
	if err == nil && s.pace.long() {
		err = s.endTurn()
	}
	return err
}

// mapWrite maps a write into m. cached says that all of it may be copied to
// the page cache within the turn.
func (s *session) mapWrite(req *wire.Request, m *backing.Mapping) (cached bool, err error) {
	off, n := device(req)
	if err := s.dev.Map(engine.OpWrite, off, n, m); err != nil {
		return false, err
	}
	for _, run := range m.Runs[:m.N] {
		if run.File == nil || run.File.Direct {
			return false, nil
		}
	}
	return s.pace.quick(), nil
}

// writeCached copies p to the page cache.
func (s *session) writeCached(req *wire.Request, m *backing.Mapping, p []byte) error {
	off, n := device(req)
	for _, run := range m.Runs[:m.N] {
		if _, err := run.File.WriteCached(p[:run.Len], run.Off); err != nil {
			return backing.Wrap("write", off, n, run.File.Failed(engine.OpWrite, err))
		}
		p = p[run.Len:]
	}
	s.pace.wrote(time.Now())
	return nil
}

// writeLater receives the payload into a buffer of its own. What is not for
// the page cache goes to the engine if it can be mapped, and to a goroutine if
// not, or if it must be durable.
func (s *session) writeLater(req *wire.Request, n int) error {
	r, err := s.newBuffered(req, n)
	if err != nil {
		return err
	}
	r.begun.Store(0) // the peer's time is not ours
	if err := s.in.payload(r.p); err != nil {
		r.finish()
		return err
	}
	r.begun.Store(int64(s.begin()))
	if req.Flags&wire.FlagFUA != 0 {
		r.start()
		return nil
	}
	cached, err := s.mapWrite(req, &r.m)
	switch {
	case err != nil:
		r.start()
		return nil
	case cached:
		err = s.writeCached(req, &r.m, r.p)
		late := !r.answered.CompareAndSwap(false, true)
		r.finish()
		if late {
			return nil
		}
		return s.writeDone(req, err)
	}
	r.transferWrite()
	return nil
}

// transferWrite has the engine write r where it is mapped.
func (r *request) transferWrite() {
	at := int64(0)
	for i := range r.m.N {
		run := &r.m.Runs[i]
		r.transfer(i, engine.OpWrite, run.File, at, at+run.Len, run.Off)
		at += run.Len
	}
	r.transferred()
}

// flush takes no range: offset and length are reserved (proto.md,
// "NBD_CMD_FLUSH").
func (s *session) flush(req *wire.Request) error {
	if req.Off != 0 || req.Len != 0 {
		return s.replyError(req, errFlushRange)
	}
	return s.background(req)
}

// background runs the request on a goroutine of its own.
func (s *session) background(req *wire.Request) error {
	n := 0
	if req.Cmd == wire.CmdRead {
		n = int(req.Len)
	}
	r, err := s.newBuffered(req, n)
	if err != nil {
		return err
	}
	r.start()
	return nil
}
