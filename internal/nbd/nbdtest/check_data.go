package nbdtest

import (
	"bytes"
	"fmt"

	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

// put writes b at off, or fails.
func (p *peer) put(off uint64, b []byte, flags wire.CmdFlags) {
	p.wantErrno(wire.Request{Cmd: wire.CmdWrite, Flags: flags, Off: off, Len: uint64(len(b))}, b, wire.OK)
}

// get returns n bytes at off, or fails.
func (p *peer) get(off, n uint64) []byte {
	return p.wantErrno(wire.Request{Cmd: wire.CmdRead, Off: off, Len: n}, nil, wire.OK).data
}

// wantData expects that the export reads as b at off.
func (p *peer) wantData(off uint64, b []byte) {
	if got := p.get(off, uint64(len(b))); !bytes.Equal(got, b) {
		i := 0
		for got[i] == b[i] {
			i++
		}
		p.c.failf("read of %d+%d differs from byte %d on: got % x, want % x", off, len(b), i,
			got[i:min(i+16, len(got))], b[i:min(i+16, len(b))])
	}
}

// dataChecks are about bytes that go in and come out.
func dataChecks(s *Server) []check {
	l := perForm(s, check{id: "WR-29", claim: "reads at both ends of the export in all sizes"}, func(c *script, f form) {
		p := c.open(f)
		for _, n := range []uint64{1, 511, 512, 513, 4096, 65535, 65536, 65537, 1 << 20, 1<<20 + 1} {
			n = roundUp(n, s)
			p.get(0, n)
			p.get(uint64(s.Size)-n, n)
		}
		p.works()
	})
	l = append(l, largeIOChecks(s)...)
	if !s.ReadOnly {
		l = append(l, writeChecks(s)...)
	}
	if s.Features.Structured && s.has(wire.SendDF) {
		l = append(l, dfChecks(s)...)
	}
	return append(l, cacheChecks(s)...)
}

// roundUp rounds a length to what s serves.
func roundUp(n uint64, s *Server) uint64 {
	m := uint64(s.minBlock())
	return (n + m - 1) / m * m
}

// largeIOChecks: requests up to 64 MiB are served whatever was advertised.
func largeIOChecks(s *Server) []check {
	var l []check
	for _, mib := range []int{32, 33, 64} {
		if s.Features.AnyLimit && mib > 32 {
			continue
		}
		l = append(l, perForm(s, check{id: fmt.Sprintf("TX-08/%d-mib", mib), claim: "a read is served"}, func(c *script, f form) {
			p := c.open(f)
			p.get(0, uint64(mib)<<20)
			p.works()
		})...)
		if s.ReadOnly {
			continue
		}
		l = append(l, perForm(s, check{id: fmt.Sprintf("TX-11/%d-mib", mib), claim: "a write is served and reads back"}, func(c *script, f form) {
			p := c.open(f)
			b := pattern(uint64(mib), mib<<20)
			p.put(4096, b, 0)
			p.wantData(4096, b[:1<<20])
			p.wantData(4096+uint64(len(b))-1<<20, b[len(b)-1<<20:])
			p.works()
		})...)
	}
	return l
}

func writeChecks(s *Server) []check {
	l := perForm(s, check{id: "TX-16/write", claim: "writes of odd sizes at odd offsets change those bytes only"}, func(c *script, f form) {
		p := c.open(f)
		const area = 1 << 20
		model := pattern(16, area)
		p.put(0, model, 0)
		m := uint64(s.minBlock())
		for i, n := range []uint64{1, 2, 511, 512, 513, 4095, 4096, 4097, 65535, 65537} {
			n = roundUp(n, s)
			off := (uint64(i)*90001 + 1) / m * m
			b := pattern(uint64(100+i), int(n))
			copy(model[off:], b)
			p.put(off, b, 0)
		}
		p.wantData(0, model)
		p.works()
	})
	if s.has(wire.SendFUA) {
		l = append(l, perForm(s, check{id: "WR-39", claim: "what was written with FUA reads back from another connection"}, func(c *script, f form) {
			b := pattern(39, 128<<10)
			c.open(f).put(1<<20, b, wire.FlagFUA)
			c.open(f).wantData(1<<20, b)
		})...)
	}
	if s.has(wire.SendFlush | wire.CanMultiConn) {
		l = append(l, perForm(s, check{id: "WR-40", claim: "write on A, flush on B, read on C"}, func(c *script, f form) {
			x, y, z := c.open(f), c.open(f), c.open(f)
			for i := range uint64(20) {
				b := pattern(400+i, 4096)
				x.put(i*8192, b, 0)
				y.wantErrno(wire.Request{Cmd: wire.CmdFlush}, nil, wire.OK)
				z.wantData(i*8192, b)
			}
		})...)
	}
	l = append(l, check{id: "TX-13", claim: "a write cut in the middle leaves every sector old or new, others are untouched", negative: true, run: cutWrite})
	if s.minBlock() > 1 {
		l = append(l, perForm(s, check{id: "TX-16/unaligned", claim: "requests below the minimum block are EINVAL", negative: true}, func(c *script, f form) {
			p := c.open(f)
			for _, b := range []span{{1, 513}, {0, 1}, {1, 1 + uint64(s.minBlock())}, {0, uint64(s.minBlock()) + 1}} {
				r, payload := of(wire.CmdWrite, b.off, b.end-b.off)
				p.wantErrno(r, payload, wire.EINVAL)
				r.Cmd = wire.CmdRead
				p.wantErrno(r, nil, wire.EINVAL)
			}
			p.works()
		})...)
	}
	return l
}

// cutWrite announces 1 MiB, sends half of it, and is gone.
func cutWrite(c *script) {
	const off, n, half = 2 << 20, 1 << 20, 512 << 10
	before, after := pattern(130, n), pattern(131, n)
	p := c.open(simple)
	p.put(off, before, 0)
	p.put(off+n, before, 0)
	cut := c.open(simple)
	b := cut.encode(wire.Request{Cmd: wire.CmdWrite, Off: off, Len: n}, after)
	cut.send(b[:wire.RequestSize+half])
	if cut.closeWrite() {
		cut.wantEnd("half a write")
	} else {
		cut.reset()
	}
	got := p.get(off, n)
	for i := 0; i < n; i += 512 {
		s := got[i:][:512]
		if !bytes.Equal(s, before[i:][:512]) && !(i < half && bytes.Equal(s, after[i:][:512])) {
			c.failf("sector at %d of the cut write is neither old nor new", i)
		}
	}
	p.wantData(off+n, before)
	p.works()
}

// dfChecks are about reads that must not be split.
func dfChecks(s *Server) []check {
	var l []check
	for _, f := range s.forms() {
		if f == simple {
			continue
		}
		l = append(l, check{id: "WR-33/df@" + string(f), claim: "DF gives one content chunk, holes spelt out", run: func(c *script) {
			p := c.open(f)
			if !s.ReadOnly { // data, hole, data
				p.put(0, pattern(33, 1<<20), 0)
				if s.has(wire.SendZero) {
					p.wantErrno(wire.Request{Cmd: wire.CmdZero, Off: 64 << 10, Len: 512 << 10}, nil, wire.OK)
				}
			}
			for _, n := range []uint64{512, 65536, 1 << 20} {
				p.wantErrno(wire.Request{Cmd: wire.CmdRead, Flags: wire.FlagDF, Len: n}, nil, wire.OK)
			}
			// Above 64 KiB the server may also say EOVERFLOW.
			p.wantErrno(wire.Request{Cmd: wire.CmdRead, Flags: wire.FlagDF, Len: 32 << 20}, nil, wire.OK, wire.EOVERFLOW)
			p.works()
		}})
	}
	return l
}

// cacheChecks are about CACHE.
func cacheChecks(s *Server) []check {
	if !s.has(wire.SendCache) {
		return perForm(s, check{id: "WR-45", claim: "CACHE that is not offered gets an answer, connection usable", negative: true}, func(c *script, f form) {
			p := c.open(f)
			p.wantErrno(wire.Request{Cmd: wire.CmdCache, Len: 4096}, nil, wire.OK, wire.EINVAL)
			p.works()
		})
	}
	return perForm(s, check{id: "TX-20", claim: "CACHE of the whole export, again and again, is answered"}, func(c *script, f form) {
		p := c.open(f)
		for range 16 {
			p.wantErrno(wire.Request{Cmd: wire.CmdCache, Len: p.most(uint64(s.Size))}, nil, wire.OK, wire.EINVAL)
		}
		p.wantErrno(wire.Request{Cmd: wire.CmdCache, Len: roundUp(4096, s)}, nil, wire.OK)
		p.works()
	})
}

// zeroChecks are about WRITE_ZEROES and TRIM.
func zeroChecks(s *Server) []check {
	if s.ReadOnly {
		return nil
	}
	var l []check
	if s.has(wire.SendZero) {
		for _, row := range []struct {
			id, claim string
			flags     wire.CmdFlags
		}{
			{"WR-42/plain", "a zeroed range reads as zeroes, its neighbours as before", 0},
			{"TX-18/no-hole", "NO_HOLE zeroes all the same", wire.FlagNoHole},
		} {
			l = append(l, perForm(s, check{id: row.id, claim: row.claim}, func(c *script, f form) { zeroed(c.open(f), row.flags, wire.OK) })...)
		}
		l = append(l, perForm(s, check{id: "WR-42/whole", claim: "zeroing above the largest payload is one request"}, func(c *script, f form) {
			p := c.open(f)
			n := p.most(uint64(s.Size)-witnessArea) &^ 4095
			for _, off := range []uint64{0, n / 2, n - 4096} {
				p.put(off, pattern(42, 4096), 0)
			}
			p.wantErrno(wire.Request{Cmd: wire.CmdZero, Len: n}, nil, wire.OK)
			for _, off := range []uint64{0, n / 2, n - 4096} {
				p.wantData(off, make([]byte, 4096))
			}
			p.works()
		})...)
	}
	switch {
	case s.has(wire.SendFastZero):
		l = append(l, perForm(s, check{id: "TX-18/fast", claim: "FAST_ZERO zeroes, or is ENOTSUP and leaves the data alone"}, func(c *script, f form) {
			zeroed(c.open(f), wire.FlagFastZero, wire.OK, wire.ENOTSUP)
			zeroed(c.open(f), wire.FlagFastZero|wire.FlagNoHole, wire.OK, wire.ENOTSUP)
		})...)
	case s.has(wire.SendZero):
		l = append(l, perForm(s, check{id: "TX-18/not-offered", claim: "FAST_ZERO that is not offered is EINVAL", negative: true}, func(c *script, f form) {
			zeroed(c.open(f), wire.FlagFastZero, wire.EINVAL)
		})...)
	}
	if s.has(wire.SendTrim) {
		l = append(l, trimChecks(s)...)
	}
	return l
}

// zeroed zeroes the middle of a written range and compares; after an error
// nothing has changed.
func zeroed(p *peer, flags wire.CmdFlags, want ...wire.Errno) {
	for _, hole := range []span{{4096, 8192}, {1, 3}, {4095, 65537}, {512, 513}, {100000, 900001}} {
		model := pattern(18, 1<<20)
		p.put(0, model, 0)
		m := uint64(p.c.s.minBlock())
		hole.off, hole.end = hole.off/m*m, roundUp(hole.end, p.c.s)
		r := p.wantErrno(wire.Request{Cmd: wire.CmdZero, Flags: flags, Off: hole.off, Len: hole.end - hole.off}, nil, want...)
		if r.errno == wire.OK {
			clear(model[hole.off:hole.end])
		}
		p.wantData(0, model)
	}
	p.works()
}

func trimChecks(s *Server) []check {
	l := perForm(s, check{id: "WR-44", claim: "TRIM changes nothing outside its range"}, func(c *script, f form) {
		p := c.open(f)
		for _, hole := range []span{{4096, 8192}, {1, 5000}, {4095, 65537}, {100001, 900001}} {
			m := uint64(s.minBlock())
			hole.off, hole.end = hole.off/m*m, roundUp(hole.end, s)
			model := pattern(44, 1<<20)
			p.put(0, model, 0)
			p.wantErrno(wire.Request{Cmd: wire.CmdTrim, Off: hole.off, Len: hole.end - hole.off}, nil, wire.OK)
			p.get(hole.off, hole.end-hole.off)
			if hole.off > 0 {
				p.wantData(0, model[:hole.off])
			}
			p.wantData(hole.end, model[hole.end:])
		}
		p.works()
	})
	if s.Size >= 1<<32 {
		return l
	}
	return append(l, perForm(s, check{id: "TX-19/small", claim: "TRIM of 4 GiB - 1 on a smaller export is EINVAL", negative: true}, func(c *script, f form) {
		p := c.open(f)
		p.wantErrno(wire.Request{Cmd: wire.CmdTrim, Len: 1<<32 - 1}, nil, wire.EINVAL)
		p.works()
	})...)
}
