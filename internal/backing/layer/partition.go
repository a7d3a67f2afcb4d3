package layer

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"slices"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// FindPartition reads the partition table of dev, MBR or GPT, and returns where
// partition number n lies. Numbers are Linux's: from 1; the logical ones of an
// MBR from 5; extended partitions themselves have none to offer. A GPT is read
// from the end of the disk if its beginning is damaged.
//
// A table counts in the logical sectors of the disk that it was made on, and does
// not tell their size: sector is that in bytes, 0 for what dev says of itself. Where
// dev does not know it either, an MBR counts in 512 bytes, and a GPT is looked for
// as one of 512 and of 4096 bytes.
//
// The table is a guest's word: it is bounded and checked, and what it names
// lies in the disk. Errors: ErrInvalid for a sector that is no power of two from
// 512 to limits.LargestBlock, for a table that is missing, damaged or contradicts
// another, and for a partition that is missing, empty or not in the disk; those
// of reading.
func FindPartition(ctx context.Context, dev backing.Device, n int, sector int64) (Range, error) {
	if n < 1 || n > limits.Partitions {
		return Range{}, invalid("find partition", "number %d is not between 1 and %d", n, limits.Partitions)
	}
	if sector != 0 && (sector < mbrSize || sector > limits.LargestBlock || sector&(sector-1) != 0) {
		return Range{}, invalid("find partition", "sectors of %d bytes", sector)
	}
	i := dev.Info()
	t := table{ctx: ctx, dev: dev, size: i.Size, block: max(i.MinBlock, mbrSize), sector: cmp.Or(sector, i.Sector, mbrSize)}
	switch {
	case sector != 0:
		t.gpts = [][]int64{{sector}}
	case i.Sector != 0:
		t.gpts = [][]int64{{i.Sector}, gptSectors}
	default:
		t.gpts = [][]int64{gptSectors}
	}
	r, err := t.find(n)
	if err != nil {
		return Range{}, err
	}
	if !r.valid() || r.Off+r.Len > t.size {
		return Range{}, invalid("find partition", "number %d lies at %d+%d, the disk has %d bytes", n, r.Off, r.Len, t.size)
	}
	return r, nil
}

// table reads a partition table.
type table struct {
	ctx         context.Context
	dev         backing.Device
	size, block int64
	sector      int64 // what an MBR counts in, bytes

	// gpts are the sizes of sectors that a GPT may count in. Those of one list
	// are as likely as each other, those of the next are tried if there is none.
	gpts [][]int64
}

// Types of MBR partitions.
const (
	mbrExtended      = 0x05
	mbrExtendedLBA   = 0x0f
	mbrExtendedLinux = 0x85
	mbrProtective    = 0xee
)

// mbrSize is that of an MBR or an EBR in bytes, whatever the sector that it begins,
// and what it counts in on a disk of which nothing is known.
const mbrSize = 512

// mbrEntry is one of the four of an MBR or an EBR.
type mbrEntry struct {
	kind         byte
	first, count int64 // sectors
}

func (e mbrEntry) extended() bool {
	return e.kind == mbrExtended || e.kind == mbrExtendedLBA || e.kind == mbrExtendedLinux
}

// at is where e lies, in bytes: e counts from the sector base.
func (t *table) at(e mbrEntry, base int64) Range {
	return Range{(base + e.first) * t.sector, e.count * t.sector}
}

// read reads n ≤ 1 MiB bytes at off, in whole blocks of the device.
func (t *table) read(off, n int64) ([]byte, error) {
	lo := off / t.block * t.block
	hi := (off + n + t.block - 1) / t.block * t.block
	if off < 0 || off > t.size-n || hi > t.size/t.block*t.block {
		return nil, invalid("find partition", "the table is not in the disk")
	}
	p := make([]byte, hi-lo)
	if err := t.dev.ReadAt(t.ctx, p, lo); err != nil {
		return nil, err
	}
	return p[off-lo:][:n], nil
}

// find tells a GPT by the protective partition of its MBR.
func (t *table) find(n int) (Range, error) {
	mbr, err := t.mbr(0)
	if err != nil {
		return Range{}, err
	}
	for _, e := range mbr {
		if e.kind == mbrProtective {
			return t.findGPT(n)
		}
	}
	if n > len(mbr) {
		return t.findLogical(mbr, n)
	}
	e := mbr[n-1]
	if e.kind == 0 || e.count == 0 || e.extended() {
		return Range{}, missing(n)
	}
	return t.at(e, 0), nil
}

func missing(n int) error { return invalid("find partition", "there is no number %d", n) }

// mbr reads the four entries of the table in a sector.
func (t *table) mbr(sector int64) (list [4]mbrEntry, err error) {
	p, err := t.read(sector*t.sector, mbrSize)
	if err != nil {
		return list, err
	}
	if p[510] != 0x55 || p[511] != 0xaa {
		return list, invalid("find partition", "there is no table in sector %d", sector)
	}
	for i := range list {
		e := p[446+16*i:][:16]
		list[i] = mbrEntry{e[4], int64(binary.LittleEndian.Uint32(e[8:])), int64(binary.LittleEndian.Uint32(e[12:]))}
	}
	return list, nil
}

// findLogical follows the chain of EBRs, which may be a loop: no more of them
// are read than there are numbers. The first entry of each names a partition
// relative to itself, the second the next EBR relative to the extended
// partition. As in Linux, an EBR without a partition has no number.
func (t *table) findLogical(mbr [4]mbrEntry, n int) (Range, error) {
	i := slices.IndexFunc(mbr[:], mbrEntry.extended)
	if i < 0 {
		return Range{}, missing(n)
	}
	ext, next, no := mbr[i], int64(0), len(mbr)
	for range limits.Partitions {
		at := ext.first + next
		if next >= ext.count {
			return Range{}, invalid("find partition", "the table in sector %d is not in its extended partition", at)
		}
		ebr, err := t.mbr(at)
		if err != nil {
			return Range{}, err
		}
		if e := ebr[0]; e.kind != 0 && e.count != 0 && !e.extended() {
			if no++; no == n {
				return t.at(e, at), nil
			}
		}
		if next = ebr[1].first; !ebr[1].extended() || next == 0 {
			break
		}
	}
	return Range{}, missing(n)
}

// gptSectors are the sizes of sectors that are usual.
var gptSectors = []int64{512, 4096}

// Bounds of a GPT header and of the entries that it announces, in bytes.
const (
	gptMinHeader = 92
	gptMinEntry  = 128
	gptMaxEntry  = 4096
	gptMaxTable  = 1 << 20
)

// findGPT takes the first table that is whole. Copies at the beginning of the disk
// come before those at its end: whoever makes a table for sectors of another size
// overwrites the beginning of the old one, and of its end perhaps nothing.
func (t *table) findGPT(n int) (Range, error) {
	var first error
	for _, sectors := range t.gpts {
		for _, end := range [...]bool{false, true} {
			r, whole, err := t.gptOf(sectors, end, n)
			if whole || backing.KindOf(err) != backing.ErrInvalid {
				return r, err
			}
			first = cmp.Or(first, err)
		}
	}
	return Range{}, first
}

// gptOf finds a partition by the copies at the beginning or at the end of the disk,
// for each size of sectors. If more than one is whole, they must say the same.
func (t *table) gptOf(sectors []int64, end bool, n int) (r Range, whole bool, err error) {
	var first error
	var by int64 // the sectors of that which is whole
	for _, sector := range sectors {
		lba := int64(1)
		if end {
			lba = t.size/sector - 1
		}
		s, ok, e := t.gpt(sector, lba, n)
		switch {
		case !ok && backing.KindOf(e) != backing.ErrInvalid:
			return Range{}, false, e
		case !ok:
			first = cmp.Or(first, e)
		case whole && (s != r || (e == nil) != (err == nil)):
			return Range{}, true, invalid("find partition", "GPTs in sectors of %d and of %d bytes contradict each other: the size of the sectors must be given", by, sector)
		default:
			r, whole, err, by = s, true, e, sector
		}
	}
	if !whole {
		err = first
	}
	return r, whole, err
}

// gpt finds a partition by the header in block lba, if that and its entries
// are whole.
func (t *table) gpt(sector, lba int64, n int) (r Range, whole bool, err error) {
	broken := func(format string, args ...any) (Range, bool, error) {
		return Range{}, false, invalid("find partition", "GPT in block %d of %d bytes: %s", lba, sector, fmt.Sprintf(format, args...))
	}
	h, err := t.read(lba*sector, sector)
	if err != nil {
		return Range{}, false, err
	}
	le := binary.LittleEndian
	if !bytes.Equal(h[:8], []byte("EFI PART")) {
		return broken("there is none")
	}
	length := int64(le.Uint32(h[12:]))
	if length < gptMinHeader || length > sector {
		return broken("a header of %d bytes", length)
	}
	sum := le.Uint32(h[16:])
	clear(h[16:20])
	if crc32.ChecksumIEEE(h[:length]) != sum || le.Uint64(h[24:]) != uint64(lba) {
		return broken("the header is damaged")
	}
	at, count, size := le.Uint64(h[72:]), int64(le.Uint32(h[80:])), int64(le.Uint32(h[84:]))
	if size < gptMinEntry || size > gptMaxEntry || size%gptMinEntry != 0 || count < 1 || count > gptMaxTable/size || at > uint64(t.size/sector) {
		return broken("%d entries of %d bytes at block %d", count, size, at)
	}
	entries, err := t.read(int64(at)*sector, count*size)
	if err != nil {
		return Range{}, false, err
	}
	if crc32.ChecksumIEEE(entries) != le.Uint32(h[88:]) {
		return broken("the entries are damaged")
	}
	if int64(n) > count {
		return Range{}, true, missing(n)
	}
	r, err = t.gptEntry(entries[int64(n-1)*size:], sector, n)
	return r, true, err
}

// gptEntry reads one entry.
func (t *table) gptEntry(e []byte, sector int64, n int) (Range, error) {
	first, last := binary.LittleEndian.Uint64(e[32:]), binary.LittleEndian.Uint64(e[40:])
	if bytes.Equal(e[:16], make([]byte, 16)) {
		return Range{}, missing(n)
	}
	if blocks := uint64(t.size / sector); first > last || last >= blocks {
		return Range{}, invalid("find partition", "number %d is in blocks %d to %d of %d", n, first, last, blocks)
	}
	return Range{int64(first) * sector, int64(last-first+1) * sector}, nil
}
