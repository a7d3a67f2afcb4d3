package kernel

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/nbd/client"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

// hold is the claim of the process that keeps a device: a lock that ends with
// the process, in a file named after the attachment.
type hold struct{ file *os.File }

// claimHold fails with ErrBusy while another process keeps the attachment.
func claimHold(dir, backend string) (*hold, error) {
	id, _, _ := strings.Cut(backend, " ")
	path := filepath.Join(dir, filepath.Base(id)+".lock")
	for {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
		if err != nil {
			return nil, err
		}
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil && isAt(f, path) {
			return &hold{f}, nil
		}
		f.Close()
		switch {
		case errors.Is(err, unix.EWOULDBLOCK):
			return nil, fmt.Errorf("%w: a process keeps it", ErrBusy)
		case err != nil:
			return nil, os.NewSyscallError("flock", err)
		}
	}
}

// isAt tells whether a file has the path: who gives a claim up removes the name, and
// a lock on the nameless file that is left keeps nobody out.
func isAt(f *os.File, path string) bool {
	own, err := f.Stat()
	if err != nil {
		return false
	}
	there, err := os.Lstat(path)
	return err == nil && os.SameFile(own, there)
}

// release gives the claim up; nil has none.
func (h *hold) release() {
	if h == nil {
		return
	}
	_ = os.Remove(h.file.Name()) // it means nothing without the lock
	h.file.Close()
}

// attached tells whether the device that is asked for has a server already, of
// which this process could become the keeper.
func (c *Config) attached() (Info, bool) {
	if c.Holds == "" || c.Index == Any {
		return Info{}, false
	}
	info, err := c.Sysfs.Info(c.Index)
	return info, err == nil
}

// takeOver becomes the keeper of a device whose own has died. What it has of
// connections may live: the driver has them, and nobody else. New ones are
// offered for those that do not.
func (v *Device) takeOver(ctx context.Context, now Info) error {
	c := &v.config
	uri, alias, ours := parseBackend(now.Backend)
	if !ours || ShownURI(uri) != ShownURI(c.URI) {
		return fmt.Errorf("%w: it was not attached from %q", ErrBusy, clip(ShownURI(c.URI)))
	}
	if alias != "" {
		c.Server.settle(alias)
	}
	v.setup = Setup{Index: c.Index, Backend: now.Backend, Block: uint32(now.Block), Size: uint64(now.Size)}
	var err error
	if v.hold, err = claimHold(c.Holds, now.Backend); err != nil {
		return err
	}
	export, err := v.connectAll(ctx)
	if err != nil {
		return err
	}
	if err := v.resembles(now, export); err != nil {
		return err
	}
	v.setup.Flags = export.Flags &^ wire.ReadOnly
	if now.ReadOnly {
		v.setup.Flags |= wire.ReadOnly
	}
	if err := v.same(export); err != nil {
		return err
	}
	if err := v.driver.Replace(v.setup.Index, v.setup.Backend, v.sockets()...); err != nil {
		return err
	}
	v.TakenOver = true
	return v.tune(export)
}

// resembles refuses an export that cannot be the device's: its size never falls,
// and a device is not larger than the export.
func (v *Device) resembles(now Info, e client.Export) error {
	size, err := usable(e.Size, v.setup.Block)
	switch {
	case err != nil:
		return err
	case size < v.setup.Size:
		return refused("the device has %d bytes, the export %d: it is another one", v.setup.Size, e.Size)
	case v.config.ReadOnly != now.ReadOnly && !(now.ReadOnly && e.Has(wire.ReadOnly)):
		return refused("the device is attached with another mode (read-only: %v)", now.ReadOnly)
	case v.config.Block != 0 && v.config.Block != v.setup.Block:
		return refused("the device has blocks of %d bytes", v.setup.Block)
	}
	return nil
}
