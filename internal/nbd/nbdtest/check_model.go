package nbdtest

import (
	"bytes"
	"fmt"
	"math/rand/v2"

	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

// modelSeed repeats the random operations of every run.
const modelSeed = 31

// modelChecks compare the export with a model in memory.
func modelChecks(s *Server) []check {
	if s.ReadOnly {
		return nil
	}
	l := perForm(s, check{id: "TX-31/own", claim: "random operations on 8 connections read as a model of bytes"}, func(c *script, f form) {
		c.together(8, func(c *script, i int) { randomOps(c, f, i) })
	})
	l = append(l, perForm(s, check{id: "TX-31/shared", claim: "racing writes of 8 connections leave every sector one of them"}, func(c *script, f form) {
		const area, n = 1 << 20, 8
		c.open(f).put(0, sectors(0, area), 0)
		c.together(n, func(c *script, i int) {
			rng := rand.New(rand.NewPCG(modelSeed, uint64(i)))
			p := c.open(f)
			for range 40 {
				length := sectorSize * (1 + rng.IntN(256))
				off := sectorSize * rng.IntN((area-length)/sectorSize+1)
				p.put(uint64(off), sectors(uint64(i+1), length), 0)
			}
			p.works()
		})
		wholeSectors(c.open(f), 0, area, n)
	})...)
	return append(l, perForm(s, check{id: "TX-32", claim: "overlapping writes in flight on one connection leave every sector one of them"}, func(c *script, f form) {
		p := c.open(f)
		const n, length = 16, 64 << 10
		p.put(0, sectors(0, 1<<20), 0)
		var b []byte
		for i := range uint64(n) {
			b = append(b, p.encode(wire.Request{Cmd: wire.CmdWrite, Off: i * 8 * sectorSize, Len: length}, sectors(i+1, length))...)
		}
		wait := p.sendAside(b, whole)
		for _, r := range p.collect(n) {
			if r.errno != wire.OK {
				c.failf("WRITE at %d: got %v", r.Off, r.errno)
			}
		}
		p.sent(wait)
		wholeSectors(p, 0, 1<<20, n)
		p.works()
	})...)
}

const sectorSize = 512

// sectors returns n bytes of sectors that each carry the seed.
func sectors(seed uint64, n int) []byte {
	return bytes.Repeat(pattern(1000+seed, sectorSize), n/sectorSize)
}

// wholeSectors expects that each sector is that of one of the seeds 0..n.
func wholeSectors(p *peer, off, length uint64, n int) {
	known := map[string]bool{}
	for i := range uint64(n + 1) {
		known[string(sectors(i, sectorSize))] = true
	}
	got := p.get(off, length)
	for i := 0; i < len(got); i += sectorSize {
		if !known[string(got[i:i+sectorSize])] {
			p.c.failf("sector at %d is none of the writes", off+uint64(i))
		}
	}
}

// randomOps works on a range of its own: nobody else's operations may show.
// The ranges of the connections have no space between them.
func randomOps(c *script, f form, i int) {
	const area = 256<<10 + 512 // neighbours share a page
	base := uint64(i * area)
	rng := rand.New(rand.NewPCG(modelSeed, uint64(i)))
	p := c.open(f)
	model := pattern(uint64(i), area)
	p.put(base, model, 0)
	for step := range 100 {
		n := randomLen(rng, area)
		off := rng.IntN(area - n + 1)
		m := int(c.s.minBlock())
		off, n = off/m*m, max(n/m*m, m)
		r := wire.Request{Off: base + uint64(off), Len: uint64(n)}
		switch op := rng.IntN(10); {
		case op < 4:
			b := pattern(rng.Uint64(), n)
			copy(model[off:], b)
			p.put(r.Off, b, 0)
		case op < 5 && c.s.has(wire.SendZero):
			r.Cmd = wire.CmdZero
			clear(model[off : off+n])
			p.wantErrno(r, nil, wire.OK)
		case op < 6 && c.s.has(wire.SendFlush):
			p.wantErrno(wire.Request{Cmd: wire.CmdFlush}, nil, wire.OK)
		default:
			if !bytes.Equal(p.get(r.Off, r.Len), model[off:off+n]) {
				c.failf("connection %d, seed %d, step %d: read of %d+%d differs from the model", i, modelSeed, step, r.Off, n)
			}
		}
	}
	p.wantData(base, model)
	p.works()
}

// randomLen prefers small lengths and boundaries.
func randomLen(rng *rand.Rand, limit int) int {
	n := 1 << rng.IntN(18)
	switch rng.IntN(3) {
	case 0:
		n += rng.IntN(3) - 1
	case 1:
		n = 1 + rng.IntN(n)
	}
	return min(max(n, 1), limit)
}

// largeChecks are about an export that is larger than 32 bits of anything.
func largeChecks(s *Server) []check {
	if s.Large == nil {
		return nil
	}
	big := *s
	big.Export, big.Size = s.Large.Name, s.Large.Size
	on := func(run func(*script, form)) func(*script, form) {
		return func(c *script, f form) {
			sub := &script{s: &big, ctx: c.ctx, patience: c.patience}
			if err := sub.attempt(func(c *script) { run(c, f) }); err != nil {
				c.failf("%v", err)
			}
		}
	}
	l := perForm(s, check{id: "TX-19/large", claim: "TRIM and WRITE_ZEROES of 4 GiB - 512 are one request each"}, on(func(c *script, f form) {
		p := c.open(f)
		end := uint64(big.Size)
		for _, off := range []uint64{0, 1 << 32, end - 8<<30} {
			p.put(off, pattern(19, 8192), 0)
			for _, cmd := range []wire.Cmd{wire.CmdZero, wire.CmdTrim} {
				p.wantErrno(wire.Request{Cmd: cmd, Off: off, Len: 1<<32 - 512}, nil, wire.OK)
			}
			p.wantErrno(wire.Request{Cmd: wire.CmdZero, Off: off, Len: 1<<32 - 512}, nil, wire.OK)
			p.wantData(off, make([]byte, 8192))
		}
		p.works()
	}))
	if s.Features.Extended {
		l = append(l, check{id: "WR-57/64-bit", claim: "TRIM and WRITE_ZEROES of the whole export are one request each", run: func(c *script) {
			on(func(c *script, f form) {
				p := c.open(f)
				p.wantErrno(wire.Request{Cmd: wire.CmdTrim, Len: uint64(big.Size)}, nil, wire.OK)
				p.wantErrno(wire.Request{Cmd: wire.CmdZero, Len: uint64(big.Size)}, nil, wire.OK)
				p.works()
			})(c, extended)
		}})
	}
	if !s.Features.Contexts {
		return l
	}
	for _, f := range s.forms() {
		if f != simple {
			l = append(l, check{id: fmt.Sprintf("TX-21/large@%s", f), claim: "extents of a large sparse export never wrap", run: func(c *script) {
				on(func(c *script, f form) {
					p := c.openContexts(f)
					walkLengths(p, uint64(big.Size))
					p.walk(uint64(big.Size), 0)
					p.works()
				})(c, f)
			}})
		}
	}
	return l
}
