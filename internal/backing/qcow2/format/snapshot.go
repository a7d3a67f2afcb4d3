package format

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
)

// Bounds of QEMU for the snapshot table.
const (
	MaxSnapshotTable = 64 << 20 // bytes
	MaxSnapshotExtra = 1024     // bytes
)

const (
	snapshotFixed = 40
	// Ends of the extra data that have a meaning: the size of the VM state,
	// the size of the disk, the instruction count.
	extraState  = 8
	extraDisk   = 16
	extraICount = 24
)

// Snapshot is an entry of the snapshot table (section "Snapshots").
type Snapshot struct {
	// L1Offset and L1Size (entries) are those of its own L1 table; Check says
	// whether they make sense.
	L1Offset int64
	L1Size   uint32

	// ID and Name are bytes as the file has them: quote them in a log.
	ID, Name string

	Seconds, Nanoseconds uint32 // when it was taken, since 1970
	VMClock              uint64 // nanoseconds that the guest had run
	VMStateSize          uint64 // bytes, beyond the end of the disk
	DiskSize             uint64 // bytes, 0 for not said
	ICount               uint64 // instructions that the guest had run

	// ExtraSize is the size of the extra data, of which VMStateSize, DiskSize
	// and ICount take 8 bytes each as far as it goes. Extra is the rest.
	ExtraSize uint32
	Extra     []byte
}

// HasICount reports whether the entry says ICount; images without it are older
// than it.
func (s *Snapshot) HasICount() bool { return s.ExtraSize >= extraICount }

// HasDiskSize reports whether the entry says DiskSize, as all in an image of
// version 3 must.
func (s *Snapshot) HasDiskSize() bool { return s.ExtraSize >= extraDisk }

// LeastSnapshotTable is how many bytes the snapshots take at least.
func (h *Header) LeastSnapshotTable() int64 { return int64(h.Snapshots) * snapshotFixed }

// knownExtra is how much of n bytes of extra data has a meaning.
func knownExtra(n uint32) int { return int(min(n, extraICount) &^ 7) }

// ParseSnapshots reads n entries of the snapshot table that b begins with;
// used is how many bytes they take. b may go on behind it. Nothing of b is
// kept. Its errors are Corrupt.
func ParseSnapshots(b []byte, n int) (list []Snapshot, used int, err error) {
	if n < 0 || n > MaxSnapshots || n > len(b)/snapshotFixed {
		return nil, 0, corrupt("snapshot table of %d bytes cannot have %d snapshots", len(b), n)
	}
	b = b[:min(len(b), MaxSnapshotTable)]
	list = make([]Snapshot, n)
	for i := range list {
		size, err := list[i].parse(b[used:])
		if err != nil {
			return nil, 0, corrupt("snapshot %d: %v", i, err)
		}
		used += size
	}
	return list, used, nil
}

// parse reads the entry that b begins with and says how long it is.
func (s *Snapshot) parse(b be) (size int, err error) {
	if len(b) < snapshotFixed {
		return 0, corrupt("the table ends within it")
	}
	idLen, nameLen := int(b.u16(12)), int(b.u16(14))
	s.ExtraSize = b.u32(36)
	if s.ExtraSize > MaxSnapshotExtra {
		return 0, corrupt("too much extra metadata: %d bytes", s.ExtraSize)
	}
	id := snapshotFixed + int(s.ExtraSize)
	name := id + idLen
	end := name + nameLen
	if end > len(b) {
		return 0, corrupt("the table ends within it")
	}
	if b.u64(0) > math.MaxInt64 {
		return 0, corrupt("L1 table offset %#x invalid", b.u64(0))
	}
	s.L1Offset, s.L1Size = int64(b.u64(0)), b.u32(8)
	s.Seconds, s.Nanoseconds = b.u32(16), b.u32(20)
	s.VMClock, s.VMStateSize = b.u64(24), uint64(b.u32(32))
	s.ID, s.Name = string(b[id:name]), string(b[name:end])
	s.parseExtra(b[snapshotFixed:id])
	// QEMU does not write the padding of the last entry, where a file may end.
	return min(int(padded(int64(end))), len(b)), nil
}

func (s *Snapshot) parseExtra(b be) {
	if len(b) >= extraState {
		s.VMStateSize = b.u64(0)
	}
	if len(b) >= extraDisk {
		s.DiskSize = b.u64(8)
	}
	if len(b) >= extraICount {
		s.ICount = b.u64(16)
	}
	s.Extra = bytes.Clone(b[knownExtra(s.ExtraSize):])
}

// Check refuses a snapshot whose L1 table is too large, does not cover its
// disk or cannot lie where it should. A snapshot that does not say how large
// its disk was has that of the active one: size bytes. Its errors are Corrupt.
func (s *Snapshot) Check(g *Geometry, size uint64) error {
	if s.DiskSize != 0 {
		size = s.DiskSize
	}
	return g.CheckL1(uint64(s.L1Offset), s.L1Size, size)
}

// EncodeSnapshots is the reverse of ParseSnapshots. It fails when the list
// breaks a bound of the table.
func EncodeSnapshots(list []Snapshot) ([]byte, error) {
	if len(list) > MaxSnapshots {
		return nil, fmt.Errorf("%d snapshots are more than %d", len(list), MaxSnapshots)
	}
	var b []byte
	for i := range list {
		s := &list[i]
		if len(s.ID) > math.MaxUint16 || len(s.Name) > math.MaxUint16 || s.ExtraSize > MaxSnapshotExtra ||
			knownExtra(s.ExtraSize)+len(s.Extra) != int(s.ExtraSize) {
			return nil, fmt.Errorf("snapshot %d cannot be written: id of %d bytes, name of %d, extra metadata of %d",
				i, len(s.ID), len(s.Name), s.ExtraSize)
		}
		b = s.append(b)
		if len(b) > MaxSnapshotTable {
			return nil, fmt.Errorf("snapshot table is larger than %d bytes", MaxSnapshotTable)
		}
	}
	return b, nil
}

func (s *Snapshot) append(b []byte) []byte {
	w := binary.BigEndian
	b = w.AppendUint64(b, uint64(s.L1Offset))
	b = w.AppendUint32(b, s.L1Size)
	b = w.AppendUint16(b, uint16(len(s.ID)))
	b = w.AppendUint16(b, uint16(len(s.Name)))
	b = w.AppendUint32(b, s.Seconds)
	b = w.AppendUint32(b, s.Nanoseconds)
	b = w.AppendUint64(b, s.VMClock)
	b = w.AppendUint32(b, uint32(s.VMStateSize))
	b = w.AppendUint32(b, s.ExtraSize)
	var extra []byte
	for _, n := range []uint64{s.VMStateSize, s.DiskSize, s.ICount} {
		extra = w.AppendUint64(extra, n)
	}
	b = append(b, extra[:knownExtra(s.ExtraSize)]...)
	b = append(b, s.Extra...)
	b = append(b, s.ID...)
	return appendPadded(b, []byte(s.Name))
}
