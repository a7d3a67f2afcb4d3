package qcow2

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/store"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// Image is an open qcow2 image as an immutable layer: the disk itself or one of
// its snapshots. Safe for concurrent use.
type Image struct {
	path  string
	st    store.Store
	data  store.Store // what has the guest clusters: st or the data file
	below Layer       // nil at the end of the chain

	lenient bool // as Options

	header *format.Header
	g      format.Geometry
	size   int64 // of the disk in bytes

	stSize, dataSize int64  // where the files ended when the image was opened
	l1               []byte // the L1 table as the file has it, for the disk only

	fixed  metadata // where neither L2 tables nor clusters may lie
	tables metadata // L2 tables and snapshots: where no clusters may lie either
}

var _ Layer = (*Image)(nil)

// ReadHeader reads the header of the image in st and checks it, also against
// where the file ends. It reads at most the first cluster. Its errors are
// *backing.Error: of kind ErrInvalid or ErrNotSupported when the image is
// refused.
func ReadHeader(ctx context.Context, st store.Store) (*format.Header, error) {
	size, err := st.Size()
	if err != nil {
		return nil, refusal("", err)
	}
	b := make([]byte, min(size, 1<<format.MinClusterBits))
	if err := store.ReadFull(ctx, st, b, 0); err != nil {
		return nil, refusal("", err)
	}
	clusterSize, err := format.ClusterSize(b)
	if err != nil {
		return nil, refusal("", err)
	}
	if rest := min(size, clusterSize) - int64(len(b)); rest > 0 {
		first := len(b)
		b = append(b, make([]byte, rest)...)
		if err := store.ReadFull(ctx, st, b[first:], int64(first)); err != nil {
			return nil, refusal("", err)
		}
	}
	h, err := format.ParseHeader(b)
	if err == nil {
		err = h.Within(size, false)
	}
	if err != nil {
		return nil, refusal("", err)
	}
	return h, nil
}

// refusal says why an image cannot be opened. A caller who gave up is told
// that.
func refusal(path string, err error) error {
	if backing.GaveUp(err) {
		return err
	}
	kind := backing.KindOf(err)
	var corrupt format.Corrupt
	var unsupported format.Unsupported
	var e *backing.Error
	switch {
	case errors.As(err, &e):
		return backing.WithPath(path, err)
	case errors.As(err, &corrupt):
		kind = backing.ErrInvalid
	case errors.As(err, &unsupported):
		kind = backing.ErrNotSupported
	}
	return &backing.Error{Op: "open", Path: path, Off: -1, Kind: kind, Err: err}
}

// invalid refuses an image that was opened in the wrong way.
func invalid(path, text string, args ...any) error {
	return &backing.Error{Op: "open", Path: path, Off: -1, Kind: backing.ErrInvalid, Err: fmt.Errorf(text, args...)}
}

// OpenImage opens the image in st for reading; of o it heeds Path, Backing,
// DataFile, Snapshot, Lenient and Log. It takes over st, o.Backing and o.DataFile, also
// when it fails. A damaged part of the image that the rest does not need is
// found when it is read. Its errors are *backing.Error, or that of ctx.
func OpenImage(ctx context.Context, st store.Store, o Options) (*Image, error) {
	m := &Image{path: o.Path, st: st, data: st, below: o.Backing, lenient: o.Lenient}
	if o.DataFile != nil {
		m.data = o.DataFile
	}
	if err := m.open(ctx, o); err != nil {
		m.Close()
		return nil, refusal(o.Path, err)
	}
	return m, nil
}

func (m *Image) open(ctx context.Context, o Options) (err error) {
	if m.header, err = ReadHeader(ctx, m.st); err != nil {
		return err
	}
	m.g = m.header.Geometry()
	if err := m.checkFiles(o); err != nil {
		return err
	}
	if m.stSize, err = m.st.Size(); err != nil {
		return err
	}
	if m.dataSize, err = m.data.Size(); err != nil {
		return err
	}
	log := o.Log
	if log == nil {
		log = slog.Default()
	}
	m.warn(log)
	return m.load(ctx, o.Snapshot, log)
}

// checkFiles refuses an image that was not given the files that it needs.
func (m *Image) checkFiles(o Options) error {
	names := NamesOf(m.header)
	switch {
	case names.NeedsDataFile && o.DataFile == nil:
		return invalid(o.Path, "the data file %q is not open", names.DataFile)
	case !names.NeedsDataFile && o.DataFile != nil:
		return invalid(o.Path, "the image has no data file")
	case names.Backing != "" && o.Backing == nil:
		return invalid(o.Path, "the backing file %q is not open", names.Backing)
	}
	return nil
}

// warn tells of marks that matter only to a writer.
func (m *Image) warn(log *slog.Logger) {
	if m.header.Incompat&format.IncompatCorrupt != 0 {
		log.Warn("image is marked corrupt", "path", m.path)
	}
	if m.header.Incompat&format.IncompatDirty != 0 {
		log.Warn("image was not closed properly, its refcounts may be wrong", "path", m.path)
	}
	if m.lenient {
		log.Warn("damaged places of the image are read as QEMU reads them", "path", m.path)
	}
	if err := m.header.BitmapsErr; err != nil {
		log.Warn("image has bitmaps that cannot be used", "path", m.path, "error", err)
	}
}

// load reads the L1 table of the disk or of a snapshot, and where metadata lie.
func (m *Image) load(ctx context.Context, snapshot string, log *slog.Logger) error {
	h := m.header
	m.fixed.clusterSize, m.tables.clusterSize = m.g.ClusterSize, m.g.ClusterSize
	m.fixed.addRange(0, 1)
	m.fixed.addRange(int64(h.L1Offset), int64(h.L1Size)*8)
	list, used, snapErr := ReadSnapshots(ctx, m.st, h, limits.SnapshotTable)
	switch {
	case snapErr == nil:
		m.addSnapshots(list, used)
	case snapshot != "" || !isCorrupt(snapErr):
		return snapErr
	default:
		log.Warn("image has snapshots that cannot be used", "path", m.path, "error", snapErr)
	}
	l1, entries, size := int64(h.L1Offset), h.L1Size, int64(h.Size)
	if snapshot != "" {
		s, err := findSnapshot(list, snapshot)
		if err != nil {
			return invalid(m.path, "%w", err)
		}
		if err := m.checkSnapshot(s); err != nil {
			return invalid(m.path, "snapshot %q: %w", snapshot, err)
		}
		if err := m.eachPiece(ctx, l1, int64(entries)*8, m.addTables); err != nil {
			return err
		}
		l1, entries, size = s.L1Offset, s.L1Size, snapshotSize(s, h.Size)
	}
	if err := m.readL1(ctx, l1, entries, size); err != nil {
		return err
	}
	if err := m.addRefcounts(ctx); err != nil {
		return err
	}
	m.fixed.seal()
	m.tables.seal()
	return nil
}

// readL1 reads the L1 table. Entries beyond the disk, those of a VM state, only
// say where metadata lie.
func (m *Image) readL1(ctx context.Context, off int64, entries uint32, size int64) error {
	table := make([]byte, int64(entries)*8)
	if err := store.ReadFull(ctx, m.st, table, off); err != nil {
		return err
	}
	m.tables.reserve(table)
	m.addTables(table)
	m.size, m.l1 = size, table[:m.g.L1Size(size)*8]
	return nil
}

func (m *Image) addTables(l1 []byte) { m.tables.addTables(&m.g, l1, m.stSize) }

// addRefcounts notes where the refcounts lie, as far as their table lies in
// the file: a reader does not need them.
func (m *Image) addRefcounts(ctx context.Context) error {
	off := int64(m.header.RefTableOffset)
	n := min(int64(m.header.RefTableClusters)<<m.g.ClusterBits, m.stSize-off)
	if off == 0 || n <= 0 {
		return nil
	}
	m.fixed.addRange(off, n)
	return m.eachPiece(ctx, off, n, func(table []byte) { m.fixed.addBlocks(&m.g, table, m.stSize) })
}

// addSnapshots notes where the snapshot table and the L1 tables of the
// snapshots lie. What they claim wrongly does not keep L2 tables from being
// read: snapshots are not needed to serve the disk.
func (m *Image) addSnapshots(list []format.Snapshot, used int) {
	m.tables.addRange(int64(m.header.SnapshotsOffset), int64(used))
	for i := range list {
		if s := &list[i]; m.checkSnapshot(s) == nil {
			m.tables.addRange(s.L1Offset, int64(s.L1Size)*8)
		}
	}
}

// checkSnapshot says why a snapshot cannot be served.
func (m *Image) checkSnapshot(s *format.Snapshot) error {
	if err := s.Check(&m.g, m.header.Size); err != nil {
		return err
	}
	if n := int64(s.L1Size) * 8; n > m.stSize || s.L1Offset > m.stSize-n {
		return format.Corrupt(fmt.Sprintf("L1 table at %#x lies beyond the end of the file", s.L1Offset))
	}
	return nil
}

// eachPiece reads a table in pieces that f does not keep.
func (m *Image) eachPiece(ctx context.Context, off, n int64, f func([]byte)) error {
	b := tableBuffers.Get().(*tableBuffer)
	defer tableBuffers.Put(b)
	for n > 0 {
		p := b[:min(n, int64(len(b)))]
		if err := store.ReadFull(ctx, m.st, p, off); err != nil {
			return err
		}
		f(p)
		off, n = off+int64(len(p)), n-int64(len(p))
	}
	return nil
}

func isCorrupt(err error) bool {
	var c format.Corrupt
	return errors.As(err, &c)
}

func be64(b []byte) uint64 { return binary.BigEndian.Uint64(b) }

// Header is that of the file; it must not be changed.
func (m *Image) Header() *format.Header { return m.header }

// Geometry of the image.
func (m *Image) Geometry() format.Geometry { return m.g }

// Snapshots reads the snapshot table. What is wrong with it is an
// *backing.Error of kind ErrInvalid.
func (m *Image) Snapshots(ctx context.Context) ([]format.Snapshot, error) {
	list, _, err := ReadSnapshots(ctx, m.st, m.header, limits.SnapshotTable)
	if err != nil {
		return nil, refusal(m.path, err)
	}
	return list, nil
}

// Size of the disk, or of the disk when the snapshot was taken.
func (m *Image) Size() int64 { return m.size }

// ClusterSize in bytes.
func (m *Image) ClusterSize() int64 { return m.g.ClusterSize }

// Below is the layer that Options.Backing named.
func (m *Image) Below() Layer { return m.below }

// Close closes the image, its data file and the layers below.
func (m *Image) Close() error {
	err := m.st.Close()
	if m.data != m.st {
		err = errors.Join(err, m.data.Close())
	}
	if m.below != nil {
		err = errors.Join(err, m.below.Close())
	}
	return err
}

// tableBuffer receives a piece of a table.
type tableBuffer [limits.MaxTableRead]byte
