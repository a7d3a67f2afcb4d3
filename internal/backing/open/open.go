// Package open is the only place that opens images.
package open

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/mem"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/backing/raw"
	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/engine/bufpool"
)

// Cache modes, with QEMU's names and meanings.
const (
	CacheWriteback    = "writeback"    // page cache, durable at a flush
	CacheNone         = "none"         // O_DIRECT, durable at a flush
	CacheWritethrough = "writethrough" // page cache, every write durable
	CacheDirectSync   = "directsync"   // O_DIRECT, every write durable
	CacheUnsafe       = "unsafe"       // page cache, and the host's disk is never asked to be durable
)

// Spec says what to open and how.
type Spec struct {
	Path     string // of the image; for "mem" and "null" a size, see ParseSize
	Format   string // "raw", "qcow2", "mem" or "null", never guessed from contents; "" is raw that nobody said: see Open
	ReadOnly bool
	Cache    string       // "" is CacheWriteback
	Lock     raw.LockMode // "" is raw.LockAuto
	For      string       // that of raw.Options, for all files
	Engine   engine.Engine
	Buffers  *bufpool.Pool
	Log      *slog.Logger // nil: slog.Default

	// Files are open files that stand for the paths which are the keys: of
	// the image, or of files that Backing names. They stay the caller's.
	Files map[string]*os.File

	// Table, if not nil, has files that are open already. What it has is taken
	// from it; the caller closes it.
	Table *Table

	// Writes, if not nil, is asked about each file that is to be written to,
	// before that is locked: an error refuses it.
	Writes func(f *os.File) error

	// Opened, if not nil, is called with each file of an image that was opened.
	// It stays the device's. below tells that it is of what the image stands on,
	// which is never written to.
	Opened func(f *os.File, below bool)

	// Known are open files of the same image, each of which stands for its path
	// where there is no right to open that.
	Known []*os.File

	// Roots, if not nil, are the folders beneath which everything must lie
	// that is named and is not among Files. Paths are absolute then, and
	// symbolic links within the folders are not followed.
	Roots []string

	// For "qcow2": which files the image may name, and the internal snapshot
	// to serve instead of the disk, by ID or name.
	Backing  Policy
	Snapshot string

	// Discard is what becomes of the clusters of a qcow2 image that the guest
	// trims, one of the values of qcow2.Discard; "" is qcow2.Unmap.
	Discard string

	// L2Cache bounds the mapping of a qcow2 image, and that of what is below it,
	// in memory: qcow2.Options.CacheBytes. 0 is limits.MapCache.
	L2Cache int64

	// Lenient reads damaged qcow2 images as QEMU does (qcow2.Options); only
	// with ReadOnly.
	Lenient bool

	// Threshold, if not nil, is told of what is written to the file that has the
	// guest's data: the image, or the data file that it names.
	Threshold *raw.Threshold

	// Lost, if not nil, is that of raw.Options, of each file.
	Lost error

	// Poisoned, if not nil, is that of raw.Options, of each file that is open
	// for writing, and that of qcow2.Options.
	Poisoned func(err error)

	gathers bool // the files are for another Open, which locks them
}

// Formats of image files.
const (
	formatRaw   = "raw"
	formatQcow2 = "qcow2"
)

// formats is all there is.
var formats = map[string]func(context.Context, Spec, cacheMode) (backing.Device, error){
	"":          openUnsaid,
	formatRaw:   openRaw,
	formatQcow2: openQcow2,
	"mem":       openMem,
	"null":      openNull,
}

var discards = []qcow2.Discard{"", qcow2.Unmap, qcow2.KeepCluster, qcow2.IgnoreTrim}

type cacheMode struct{ direct, through, unsafe bool }

var cacheModes = map[string]cacheMode{
	"":                {},
	CacheWriteback:    {},
	CacheNone:         {direct: true},
	CacheWritethrough: {through: true},
	CacheDirectSync:   {direct: true, through: true},
	CacheUnsafe:       {unsafe: true},
}

// Open opens an image and stands Emulate above it: the device is ready for
// Checked. The caller closes it. Errors are those of raw.Open, *fs.PathError
// for a path that cannot be opened, and ErrInvalid for a Spec that makes no
// sense or a path that names neither a regular file nor a block device, or for
// writing without a format one that begins as a qcow2 image.
func Open(ctx context.Context, s Spec) (backing.Device, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	open, ok := formats[s.Format]
	if !ok {
		return nil, invalid(s, fmt.Errorf("unknown format %q", s.Format))
	}
	cache, ok := cacheModes[s.Cache]
	if !ok {
		return nil, invalid(s, fmt.Errorf("unknown cache mode %q", s.Cache))
	}
	if !slices.Contains(discards, qcow2.Discard(s.Discard)) {
		return nil, invalid(s, fmt.Errorf("unknown discard mode %q", s.Discard))
	}
	if s.Lenient && !(s.ReadOnly && s.Format == formatQcow2) {
		return nil, invalid(s, errors.New("lenient reading is for qcow2 images that are opened read-only"))
	}
	if err := checkPolicy(s); err != nil {
		return nil, err
	}
	dev, err := open(ctx, s, cache)
	if err != nil {
		return nil, err
	}
	return backing.NewEmulate(dev), nil
}

func invalid(s Spec, why error) error {
	return &backing.Error{Op: "open", Path: s.Path, Off: -1, Kind: backing.ErrInvalid, Err: why}
}

func openRaw(_ context.Context, s Spec, c cacheMode) (backing.Device, error) {
	f, err := openFile(s, c)
	if err != nil {
		return nil, err
	}
	if err := s.admit(f, s.ReadOnly); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	dev, err := raw.Open(f, s.Engine, raw.Options{
		Path: s.Path, ReadOnly: s.ReadOnly, Direct: c.direct, Writethrough: c.through,
		Lock: s.lock(), For: s.For, Buffers: s.Buffers, Log: s.Log, Lost: s.Lost, Poisoned: s.Poisoned,
	})
	if err != nil {
		return nil, err
	}
	dev.SetThreshold(s.Threshold)
	s.opened(f, false)
	if c.unsafe {
		return careless{backing.Transparent{Passthrough: backing.Passthrough{Next: dev}}}, nil
	}
	return dev, nil
}

// openUnsaid is openRaw where raw is only the default. To write to a qcow2 image
// as if it were raw destroys it: what begins as one is not opened for that until
// somebody says what it is. Its bytes decide nothing else: a guest may have
// written them to a raw disk.
func openUnsaid(ctx context.Context, s Spec, c cacheMode) (backing.Device, error) {
	dev, err := openRaw(ctx, s, c)
	if err != nil || !format.Begins(ctx, dev, dev.Info().Size) {
		return dev, err
	}
	if !s.ReadOnly {
		return nil, errors.Join(invalid(s, errUnsaid), dev.Close())
	}
	log := s.Log
	if log == nil {
		log = slog.Default()
	}
	log.Warn("image begins as a qcow2 image and is served as raw, because its format was not said", "path", s.Path)
	return dev, nil
}

var errUnsaid = errors.New("its format was not said, and it begins as a qcow2 image; " +
	"say --format=qcow2, or --format=raw if it really is raw (in a configuration format = \"qcow2\" or \"raw\")")

// admit asks whether a file may be written to, if it shall be.
func (s *Spec) admit(f *os.File, readOnly bool) error {
	if readOnly || s.Writes == nil {
		return nil
	}
	return s.Writes(f)
}

// lock is how files are locked.
func (s *Spec) lock() raw.LockMode {
	if s.gathers {
		return raw.LockOff
	}
	return s.Lock
}

// unclaimed passes on what has just been opened, unless it is refused by
// raw.Unclaimed. Files of a Table are not asked about again: to open an image anew
// that is served takes nothing from anybody.
func (s *Spec) unclaimed(f *os.File, err error) (*os.File, error) {
	if err != nil {
		return nil, err
	}
	if err := raw.Unclaimed(f, raw.Options{Path: s.Path, ReadOnly: s.ReadOnly, Lock: s.Lock}); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// opened tells of a file that a device has now.
func (s *Spec) opened(f *os.File, below bool) {
	if s.Opened != nil {
		s.Opened(f, below)
	}
}

// openAnywhere opens a regular file or block device. Other kinds are refused
// before they are opened, because opening some of them has effects; what
// takes the path's place meanwhile is refused afterwards, and O_NONBLOCK
// keeps a FIFO from holding up the open.
func openAnywhere(s Spec, c cacheMode) (*os.File, error) {
	var st unix.Stat_t
	if err := unix.Stat(s.Path, &st); err != nil {
		return nil, &fs.PathError{Op: "open", Path: s.Path, Err: err}
	}
	if err := checkKind(s, st.Mode); err != nil {
		return nil, err
	}
	flags := unix.O_RDWR | unix.O_NONBLOCK | unix.O_CLOEXEC | unix.O_NOCTTY
	if s.ReadOnly {
		flags = flags&^unix.O_RDWR | unix.O_RDONLY
	}
	if c.direct {
		flags |= unix.O_DIRECT
	}
	fd, err := openRetrying(s.Path, flags)
	if err != nil {
		if c.direct && errors.Is(err, unix.EINVAL) {
			return nil, &backing.Error{Op: "open", Path: s.Path, Off: -1, Kind: backing.ErrNotSupported,
				Err: errors.New("file system has no direct I/O for this file")}
		}
		return nil, &fs.PathError{Op: "open", Path: s.Path, Err: err}
	}
	return admitted(fd, s.Path, func(mode uint32) error { return checkKind(s, mode) })
}

// admitted takes over fd, which was opened with O_NONBLOCK, and closes it
// again unless check admits the mode of the file.
func admitted(fd int, path string, check func(mode uint32) error) (*os.File, error) {
	var st unix.Stat_t
	err := unix.Fstat(fd, &st)
	if err == nil {
		err = check(st.Mode)
	}
	if err == nil {
		err = stored(fd, path)
	}
	if err == nil {
		err = unix.SetNonblock(fd, false) // io_uring would answer EAGAIN where it should wait
	}
	if err != nil {
		_ = unix.Close(fd) // err matters more
		return nil, err
	}
	return os.NewFile(uintptr(fd), path), nil
}

// kernelFiles are file systems whose files are no storage, but memory of
// processes and settings of the kernel.
var kernelFiles = map[int64]string{
	unix.PROC_SUPER_MAGIC: "proc", unix.SYSFS_MAGIC: "sysfs", unix.DEBUGFS_MAGIC: "debugfs", unix.TRACEFS_MAGIC: "tracefs",
	unix.SECURITYFS_MAGIC: "securityfs", unix.SELINUX_MAGIC: "selinuxfs", unix.CGROUP_SUPER_MAGIC: "cgroup",
	unix.CGROUP2_SUPER_MAGIC: "cgroup2", unix.EFIVARFS_MAGIC: "efivarfs", unix.BPF_FS_MAGIC: "bpf",
}

// stored refuses files that only look like regular ones.
func stored(fd int, path string) error {
	var st unix.Statfs_t
	if err := unix.Fstatfs(fd, &st); err != nil {
		return err
	}
	if kind := kernelFiles[int64(st.Type)]; kind != "" {
		return invalid(Spec{Path: path}, fmt.Errorf("a file of %s is no image", kind))
	}
	return nil
}

func openRetrying(path string, flags int) (int, error) {
	return raw.PastLease(func() (int, error) { return unix.Open(path, flags, 0) })
}

var kinds = map[uint32]string{
	unix.S_IFDIR: "directory", unix.S_IFIFO: "FIFO", unix.S_IFSOCK: "socket",
	unix.S_IFCHR: "character device",
}

func checkKind(s Spec, mode uint32) error {
	switch kind := mode & unix.S_IFMT; kind {
	case unix.S_IFREG, unix.S_IFBLK:
		return nil
	default:
		return invalid(s, fmt.Errorf("a %s is neither a regular file nor a block device", kinds[kind]))
	}
}

func openMem(_ context.Context, s Spec, c cacheMode) (backing.Device, error) {
	size, err := volatileSize(s, c)
	if err != nil {
		return nil, err
	}
	if m := s.Table.takeMemory(size); m != nil {
		return m, nil
	}
	return mem.New(size, nil), nil
}

func openNull(_ context.Context, s Spec, c cacheMode) (backing.Device, error) {
	size, err := volatileSize(s, c)
	if err != nil {
		return nil, err
	}
	return mem.Null(size), nil
}

// volatileSize is the size of a disk without a file.
func volatileSize(s Spec, c cacheMode) (int64, error) {
	if c.direct {
		return 0, invalid(s, fmt.Errorf("cache mode %q needs a file", s.Cache))
	}
	n, err := ParseSize(s.Path)
	if err != nil {
		return 0, invalid(s, err)
	}
	return n, nil
}

// through makes every write durable.
type through struct{ backing.Passthrough }

func (t through) WriteAt(ctx context.Context, p []byte, off int64, f backing.Flags) error {
	return t.Next.WriteAt(ctx, p, off, f|backing.FUA)
}

func (t through) Zero(ctx context.Context, off, n int64, f backing.Flags) error {
	return t.Next.Zero(ctx, off, n, f|backing.FUA)
}

func (t through) Trim(ctx context.Context, off, n int64, f backing.Flags) error {
	return t.Next.Trim(ctx, off, n, f|backing.FUA)
}

// Map names what is read; what is written must go through WriteAt.
func (t through) Map(op engine.Op, off, n int64, m *backing.Mapping) error {
	if op != engine.OpRead {
		return backing.ErrNotMappable
	}
	return t.Next.Map(op, off, n, m)
}

// MapStats says how the mapping of the image is cached that an Open has opened;
// false for formats that have none.
func MapStats(d backing.Device) (qcow2.MapStats, bool) {
	for d != nil {
		if m, ok := d.(interface{ Stats() qcow2.MapStats }); ok {
			return m.Stats(), true
		}
		w, ok := d.(interface{ Unwrap() backing.Device })
		if !ok {
			break
		}
		d = w.Unwrap()
	}
	return qcow2.MapStats{}, false
}
