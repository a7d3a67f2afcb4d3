package daemon

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"regexp"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/backing/open"
	"github.com/vmdiskd/vmdiskd/internal/confine"
	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/engine/bufpool"
	"github.com/vmdiskd/vmdiskd/internal/engine/choose"
	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd"
	"github.com/vmdiskd/vmdiskd/internal/transport"
)

// Swap says how to serve a disk that this machine swaps to: the kernel, short
// of memory, waits for the server, which therefore never may wait for memory.
type Swap struct {
	On           bool
	BestEffort   bool // go on without a protection that cannot be had
	SkipHeadroom bool // what takes memory is limited in another way
}

// swapStage marks the process that was executed by enterSwap.
const swapStage = "VMDISKD_SWAP_STAGE"

// enterSwap refuses what is not safe below swap, and executes the program
// anew with what all its threads need. It returns in the process that has
// that, and with an error.
func enterSwap(c *Config) error {
	if !c.Swap.On {
		return nil
	}
	if err := c.checkSwap(); err != nil {
		return fmt.Errorf("--swap: %w", err)
	}
	if os.Getenv(swapStage) != "" {
		return os.Unsetenv(swapStage)
	}
	if err := c.Swap.tolerate(c.swapStorage()); err != nil {
		return err
	}
	runtime.LockOSThread()
	if err := c.Swap.tolerate(confine.PrepareSwap()); err != nil {
		return err
	}
	if err := os.Setenv(swapStage, "2"); err != nil {
		return err
	}
	return confine.Reexec(os.Environ())
}

// tolerate turns what is missing into an error, unless the user goes without.
func (s *Swap) tolerate(missing []*confine.Missing) error {
	if s.BestEffort || len(missing) == 0 {
		return nil
	}
	errs := []error{errors.New("--swap is not safe here (--swap=best-effort goes on all the same):")}
	for _, m := range missing {
		errs = append(errs, fmt.Errorf("  %w", m))
	}
	return errors.Join(errs...)
}

// checkSwap refuses settings that have a safe alternative.
func (c *Config) checkSwap() error {
	for _, e := range c.Endpoints {
		if e.Kind != transport.Unix {
			return fmt.Errorf("swap over %s is not safe: packets and relays take memory that is not there; listen on a Unix socket (-U)", e.Kind)
		}
	}
	for _, wrong := range [...]struct {
		is   bool
		text string
	}{
		{c.Stdio, "standard input is no socket that the kernel can connect to; listen on a Unix socket (-U)"},
		{c.TLS != nbd.TLSOff, "encryption takes memory for each reply; a Unix socket does not need it (--tls=off)"},
		{c.Disk.ImageFormat() != "raw", fmt.Sprintf("format %q takes memory to find its clusters; use --format=raw", c.Disk.Format)},
		{!directCache(c.Disk.Cache) && !confine.Without(confine.SwapDirect),
			fmt.Sprintf("cache mode %q takes memory of the page cache; use --cache=none", c.Disk.Cache)},
		{c.Engine == choose.Uring, "the kernel's threads of a ring are made as they are needed, which takes memory; use --engine=pool"},
		{c.Run != "", "the command of --run would have the priority of the server; start it apart"},
		{c.Log.Level < 0 || len(c.Log.Components) > 0, "a log of each request takes memory; leave out --verbose and --debug"},
	} {
		if wrong.is {
			return errors.New(wrong.text)
		}
	}
	return nil
}

func directCache(mode string) bool { return mode == open.CacheNone || mode == open.CacheDirectSync }

// Names of what swapStorage finds.
const (
	swapFile     = "storage"
	swapHeadroom = "headroom"
)

// swapStorage says what is wrong with the place of the disk, and with the
// memory that the kernel keeps back.
func (c *Config) swapStorage() (missing []*confine.Missing) {
	if err := checkSwapFile(c.Disk.Image); err != nil {
		missing = append(missing, &confine.Missing{Protection: swapFile, Err: err, Remedy: "use a block device, or a file on ext4 or XFS"})
	}
	if c.Swap.SkipHeadroom {
		return missing
	}
	if m := checkHeadroom("/proc/sys/vm/min_free_kbytes"); m != nil {
		missing = append(missing, m)
	}
	return missing
}

// File systems that write a file in place without asking for memory that
// IO_FLUSHER does not cover.
var swapFileSystems = map[int64]bool{unix.EXT4_SUPER_MAGIC: true, unix.XFS_SUPER_MAGIC: true}

// Names of others, for the message.
var fileSystems = map[int64]string{
	unix.FUSE_SUPER_MAGIC: "FUSE", unix.NFS_SUPER_MAGIC: "NFS", unix.OVERLAYFS_SUPER_MAGIC: "overlayfs",
	unix.TMPFS_MAGIC: "tmpfs", unix.RAMFS_MAGIC: "ramfs", unix.BTRFS_SUPER_MAGIC: "Btrfs", unix.SMB2_SUPER_MAGIC: "SMB",
}

// swapBadDisk matches the names, as drivers give them, of disks that have memory
// or another program below them. swapBadDisks is what those are.
var (
	swapBadDisk  = regexp.MustCompile(`^(loop|nbd|zram|ram)\d`)
	swapBadDisks = map[string]string{"loop": "loop device", "nbd": nbdKind, "zram": "zram device", "ram": "RAM disk"}
)

// nbdKind is a device of the kernel's client.
const nbdKind = "NBD device"

// diskKind is what makes a disk no safe place for swap, by its name or that of a
// partition, or "".
func diskKind(name string) string {
	m := swapBadDisk.FindStringSubmatch(name)
	if m == nil {
		return ""
	}
	return swapBadDisks[m[1]]
}

// checkSwapDisk says why a block device, or what stands on it, is no safe place
// for swap; root has sys.
func checkSwapDisk(root fs.FS, path string, dev uint64) error {
	name, err := deviceName(root, unix.Major(dev), unix.Minor(dev))
	if err != nil {
		return fmt.Errorf("%q is on a device of which nothing is known: %w", path, err)
	}
	disk, err := disksBelow(root, name, func(disk string) bool { return diskKind(disk) != "" })
	if err != nil {
		return fmt.Errorf("%q is on %s, of which not all is known: %w", path, name, err)
	}
	if disk == "" {
		return nil
	}
	kind := diskKind(disk)
	if kind == "" {
		return fmt.Errorf("%q has more than %d devices below it", path, limits.SwapDepth)
	}
	return fmt.Errorf("%q is on the %s %s, which takes memory to write", path, kind, disk)
}

// checkSwapFile says why a file or device is no safe place for swap.
func checkSwapFile(path string) error {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return &os.PathError{Op: "stat", Path: path, Err: err}
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFBLK:
		return checkSwapDisk(os.DirFS("/"), path, st.Rdev)
	case unix.S_IFREG:
	default:
		return fmt.Errorf("%q is neither a regular file nor a block device", path)
	}
	var in unix.Statfs_t
	if err := unix.Statfs(path, &in); err != nil {
		return &os.PathError{Op: "statfs", Path: path, Err: err}
	}
	if !swapFileSystems[int64(in.Type)] {
		name := fileSystems[int64(in.Type)]
		if name == "" {
			name = fmt.Sprintf("a file system of type 0x%x", in.Type)
		}
		return fmt.Errorf("%q is on %s, which takes memory to write", path, name)
	}
	return checkSwapDisk(os.DirFS("/"), path, st.Dev)
}

// hasHoles tells whether writes to a file have to allocate space.
func hasHoles(path string) bool {
	var st unix.Stat_t
	return unix.Stat(path, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFREG && st.Blocks*512 < st.Size
}

// checkHeadroom compares the memory that the kernel keeps free with what
// replies take.
func checkHeadroom(file string) *confine.Missing {
	m := &confine.Missing{Protection: swapHeadroom}
	b, err := os.ReadFile(file)
	if err != nil {
		m.Err = err
		return m
	}
	have, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 50)
	if err != nil {
		m.Err = err
		return m
	}
	want := max(limits.SwapHeadroom, limits.SwapHeadroomFactor*limits.SwapServerBytes) >> 10
	if have >= int64(want) {
		return nil
	}
	m.Err = fmt.Errorf("the kernel keeps %d KiB free, a server of swap needs %d", have, want)
	m.Remedy = fmt.Sprintf("sysctl -w vm.min_free_kbytes=%d (or --swap-headroom=skip, where cgroups limit all that takes memory)", want)
	return m
}

// newEngine makes the engine; below swap it is the pool, with all its workers.
func (d *daemon) newEngine() (engine.Engine, error) {
	if !d.cfg.Swap.On {
		return choose.New(d.cfg.Engine, d.buffers, d.logs.For("engine"))
	}
	p := engine.NewInlinePool(limits.PoolWorkers)
	p.StartAll()
	return p, nil
}

// newBuffers makes the pool of buffers; below swap all of them are there.
func (d *daemon) newBuffers() (*bufpool.Pool, error) {
	if !d.cfg.Swap.On {
		return bufpool.New(limits.BufferBudget), nil
	}
	p := bufpool.New(limits.SwapBudget)
	for _, b := range limits.SwapBuffers {
		if err := p.Keep(b.Bytes, b.Count); err != nil {
			return nil, errors.Join(err, p.Close())
		}
	}
	return p, nil
}

// settle makes everything that a server of swap will need: threads, heap, and
// memory that stays. It comes before the first connection.
func (d *daemon) settle() error {
	if !d.cfg.Swap.On {
		return nil
	}
	for _, o := range d.doors.all() {
		if o.Kind() != transport.Unix {
			return fmt.Errorf("--swap: the socket that was passed is of %s: let the unit listen on a Unix socket", o.Kind())
		}
	}
	if hasHoles(d.cfg.Disk.Image) {
		d.log.Warn("the file has holes: to fill them its file system takes memory", "image", d.cfg.Disk.Image, "remedy", "fallocate")
	}
	if err := confine.SettleRuntime(); err != nil {
		return err
	}
	missing := confine.VerifySwap()
	if d.cfg.Swap.BestEffort { // else it was refused before
		missing = append(missing, d.cfg.swapStorage()...)
	}
	resident, err := confine.LockMemory()
	var m *confine.Missing
	if errors.As(err, &m) {
		missing = append(missing, m)
	}
	if err := d.cfg.Swap.tolerate(missing); err != nil {
		return err
	}
	for _, m := range missing {
		d.log.Warn("swap is not safe", "missing", m.Protection, "error", m.Err, "remedy", m.Remedy)
		d.swapCage = append(d.swapCage, confine.Control{Name: "swap-" + m.Protection, State: confine.Off, Reason: m.Err.Error()})
	}
	if len(missing) == 0 {
		d.swapCage = []confine.Control{{Name: "swap", State: confine.Enforced}}
	}
	d.log.Info("memory is locked", "bytes", resident)
	return nil
}
