package kernel

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// Sysfs is a folder of block devices, as /sys/block is.
type Sysfs string

// BlockDevices is where the running kernel shows its block devices.
const BlockDevices Sysfs = "/sys/block"

// Info is what sysfs says of one attached device.
type Info struct {
	Index int
	// Size and Block are in bytes.
	Size, Block int64
	ReadOnly    bool
	// PID is the process that attached it, which may have ended.
	PID int
	// Backend is what that process called the server, at most
	// limits.SysfsFile bytes of data, or "" on kernels before 5.14.
	Backend string
}

// Info describes a device. It fails with ErrNoDevice when there is none, or
// when it is not attached.
func (s Sysfs) Info(index int) (Info, error) {
	i := Info{Index: index}
	pid, err := s.number(index, "pid", math.MaxInt32)
	if errors.Is(err, fs.ErrNotExist) {
		return i, ErrNoDevice
	}
	if err != nil {
		return i, err
	}
	i.PID = int(pid)
	sectors, err := s.number(index, "size", math.MaxInt64/512)
	if err != nil {
		return i, err
	}
	i.Size = sectors * 512
	if i.Block, err = s.number(index, "queue/logical_block_size", math.MaxInt32); err != nil {
		return i, err
	}
	ro, err := s.number(index, "ro", 1)
	if err != nil {
		return i, err
	}
	i.ReadOnly = ro == 1
	i.Backend, err = s.read(index, "backend")
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	return i, err
}

// List describes all attached devices, in the order of their numbers. Those
// that are detached at the same time are left out.
func (s Sysfs) List() ([]Info, error) {
	dir, err := os.Open(string(s))
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	var list []Info
	for {
		names, err := dir.Readdirnames(256)
		if err == io.EOF {
			slices.SortFunc(list, func(a, b Info) int { return a.Index - b.Index })
			return list, nil
		}
		if err != nil {
			return nil, err
		}
		for _, name := range names {
			index, err := ParseDevice(name)
			if err != nil {
				continue
			}
			i, err := s.Info(index)
			if errors.Is(err, ErrNoDevice) || errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return nil, err
			}
			list = append(list, i)
		}
	}
}

func (s Sysfs) path(index int, file string) string {
	return filepath.Join(string(s), Name(index), file)
}

// read returns a file without its last newline.
func (s Sysfs) read(index int, file string) (string, error) {
	f, err := os.Open(s.path(index, file))
	if err != nil {
		return "", err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, limits.SysfsFile+1))
	if err != nil {
		return "", err
	}
	if len(b) > limits.SysfsFile {
		return "", senseless("%s has more than %d bytes", f.Name(), limits.SysfsFile)
	}
	return strings.TrimSuffix(string(b), "\n"), nil
}

// number reads one from 0 to most.
func (s Sysfs) number(index int, file string, most int64) (int64, error) {
	text, err := s.read(index, file)
	if err != nil {
		return 0, err
	}
	n, err := strconv.ParseInt(strings.TrimSpace(text), 10, 64)
	if err != nil || n < 0 || n > most {
		return 0, senseless("%s holds %q", s.path(index, file), clip(text))
	}
	return n, nil
}

// lower writes n into a file of the device's queue that holds a larger number.
func (s Sysfs) lower(index int, file string, n int64) error {
	now, err := s.number(index, file, math.MaxInt64)
	if err != nil || now <= n {
		return err
	}
	f, err := os.OpenFile(s.path(index, file), os.O_WRONLY|os.O_TRUNC, 0)
	if err == nil {
		_, err = f.WriteString(strconv.FormatInt(n, 10))
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		return fmt.Errorf("%s: lower %d to %d: %w", file, now, n, err)
	}
	return nil
}

// clip bounds a text that is part of an error.
func clip(s string) string { return s[:min(len(s), 64)] }
