package daemon

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// swapInUse names a device of this machine that swaps to the disk, or may be
// taken for one that does, or returns "". To stop then would end every program
// that has memory there.
func (d *daemon) swapInUse() string {
	if !d.cfg.Swap.On || d.server == nil || !d.server.Busy() {
		return ""
	}
	k := d.disks.find(d.cfg.Disk.Name)
	if k == nil {
		return ""
	}
	_, now, _ := d.disks.look(k)
	return swapOn(d.root, now.top.Info().Size)
}

// heldStop is a stop that waits until the machine does not swap to the disk any
// more: service managers ask once. The zero value is none.
type heldStop struct {
	signal os.Signal
	device string           // swapInUse, when it was asked last
	again  <-chan time.Time // it is time to ask again
	table  fs.File          // swapsFile; nil if it cannot be opened
	text   []byte           // room for it
}

// refuseStop holds a stop, and tells so, if the disk is in use as swap.
func (d *daemon) refuseStop(h *heldStop, sig os.Signal) bool {
	device := d.swapInUse()
	if device == "" {
		return false
	}
	if h.again == nil {
		h.again, h.text = time.Tick(limits.SwapLook), make([]byte, limits.SwapsFile)
		h.table, _ = d.root.Open("proc/swaps") // without it the clients have to leave
	}
	h.signal, h.device = sig, device
	d.log.Error("not stopping: the machine swaps to this disk", "signal", sig.String(), "device", device, "remedy", "swapoff "+device+", it stops then")
	_ = d.boss.Status("stopping as soon as swapoff " + device + " is done") // it is in the log
	return true
}

// mustWait tells whether what held a stop is there yet. It allocates nothing: what
// a server of swap takes, it never gives back, and this is asked for as long as
// swapoff(8) may take.
func (d *daemon) mustWait(h *heldStop) bool { return d.server.Busy() && h.listed() }

// listed tells whether the device is in swapsFile, also if that cannot be read.
func (h *heldStop) listed() bool {
	table, ok := h.table.(io.ReaderAt)
	if !ok {
		return true
	}
	n, err := table.ReadAt(h.text, 0)
	if err != nil && err != io.EOF {
		return true
	}
	for line := range bytes.Lines(h.text[:n]) {
		if n := len(h.device); len(line) > n && string(line[:n]) == h.device && (line[n] == ' ' || line[n] == '\t') {
			return true
		}
	}
	return false
}

func (h *heldStop) close() {
	if h.table != nil {
		_ = h.table.Close() // it was read only
	}
}

// swapsFile is where the kernel tells its swap areas. It stands for an area
// when it cannot be read.
const swapsFile = "/proc/swaps"

// swapOn looks for a swap area on an NBD device of at most size bytes, in the
// file system of this machine, and names it as the kernel does. A device keeps
// the size that the disk had, which may have grown since and does not shrink.
// An area of which not all is known is taken for one on such a device.
func swapOn(root fs.FS, size int64) string {
	f, err := root.Open("proc/swaps")
	if errors.Is(err, fs.ErrNotExist) {
		return "" // a kernel without swap
	}
	if err != nil {
		return swapsFile
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, limits.SwapsFile))
	if err != nil {
		return swapsFile
	}
	for i, line := range strings.Split(string(text), "\n") {
		fields := strings.Fields(line)
		if i == 0 || len(fields) < 5 {
			continue
		}
		name, err := areaDevice(root, unescape.Replace(fields[0]))
		if err != nil {
			return fields[0]
		}
		disk, err := disksBelow(root, name, func(disk string) bool { return isServed(root, disk, size) })
		if disk != "" || err != nil {
			return fields[0]
		}
	}
	return ""
}

// unescape undoes what seq_file_path of the kernel does to the paths in
// swapsFile.
var unescape = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)

// areaDevice names, as sys/class/block does, the block device that the swap area
// at a path is, or that has the file system of the area's file. It is an error if
// nothing is at the path, as where a mount is not seen or the node of a device is
// not there, and if the file system has no device number that sys knows, as Btrfs.
func areaDevice(root fs.FS, at string) (string, error) {
	if dir, name := path.Split(at); dir == "/dev/" {
		if _, err := fs.ReadLink(root, "sys/class/block/"+name); err == nil {
			return name, nil
		}
	}
	fi, err := fs.Stat(root, strings.TrimPrefix(at, "/"))
	if err != nil {
		return "", err
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return "", fmt.Errorf("%s: no device number", at)
	}
	dev := st.Dev
	if fi.Mode()&fs.ModeDevice != 0 {
		dev = st.Rdev
	}
	return deviceName(root, unix.Major(dev), unix.Minor(dev))
}

// isServed tells whether a block device is, by its name, of the kernel's client,
// and has at most size bytes.
func isServed(root fs.FS, name string, size int64) bool {
	if diskKind(name) != nbdKind {
		return false
	}
	sectors, err := readNumber(root, "sys/class/block/"+name+"/size")
	return err != nil || sectors <= size/512
}

func readNumber(root fs.FS, name string) (int64, error) {
	b, err := fs.ReadFile(root, name)
	if err != nil {
		return 0, err
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 54)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", name, err)
	}
	return n, nil
}
