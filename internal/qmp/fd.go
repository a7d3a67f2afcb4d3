package qmp

import (
	"context"
	"os"
)

// GetFD gives QEMU a descriptor under a name: a socket for FDAddress. A name
// that it already has is replaced. file stays the caller's.
func (m *Monitor) GetFD(ctx context.Context, name string, file *os.File) error {
	if err := checkID("descriptor", name); err != nil {
		return err
	}
	_, err := m.Execute(ctx, "getfd", map[string]string{"fdname": name}, file)
	return err
}

// CloseFD takes back a descriptor that nothing has used.
func (m *Monitor) CloseFD(ctx context.Context, name string) error {
	_, err := m.Execute(ctx, "closefd", map[string]string{"fdname": name})
	return err
}
