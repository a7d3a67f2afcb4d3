package qcow2

import (
	"context"
	"fmt"
	"strings"

	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/store"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// firstSnapshotRead is enough for the snapshots of nearly every image.
const firstSnapshotRead = 64 << 10

// ReadSnapshots reads the snapshot table of the image in st, whose header is h,
// as far as it has limit bytes. used is how many it takes. Entries without names
// take one read, however many there are. What is wrong with the table is an error
// with a format.Corrupt.
func ReadSnapshots(ctx context.Context, st store.Store, h *format.Header, limit int64) (list []format.Snapshot, used int, err error) {
	if h.Snapshots == 0 {
		return nil, 0, nil
	}
	size, err := st.Size()
	if err != nil {
		return nil, 0, err
	}
	off := int64(h.SnapshotsOffset)
	most := min(size-off, limit)
	for n := max(firstSnapshotRead, h.LeastSnapshotTable()); ; n *= 4 {
		b := make([]byte, max(0, min(n, most)))
		if err := store.ReadFull(ctx, st, b, off); err != nil {
			return nil, 0, err
		}
		// An entry says how long it is only where it lies.
		list, used, err = format.ParseSnapshots(b, int(h.Snapshots))
		if err == nil || n >= most {
			return list, used, err
		}
	}
}

// findSnapshot finds the one with this ID, else the first with this name.
func findSnapshot(list []format.Snapshot, name string) (*format.Snapshot, error) {
	for i := range list {
		if list[i].ID == name {
			return &list[i], nil
		}
	}
	for i := range list {
		if list[i].Name == name {
			return &list[i], nil
		}
	}
	if len(list) == 0 {
		return nil, fmt.Errorf("no snapshot %q: the image has none", name)
	}
	return nil, fmt.Errorf("no snapshot %q: there are %s", name, snapshotNames(list))
}

// snapshotNames lists some snapshots for an error.
func snapshotNames(list []format.Snapshot) string {
	var s []string
	for i := range list {
		if i == limits.SnapshotsNamed {
			s = append(s, fmt.Sprintf("and %d more", len(list)-i))
			break
		}
		s = append(s, fmt.Sprintf("%.80q (ID %.20q)", list[i].Name, list[i].ID))
	}
	return strings.Join(s, ", ")
}

// snapshotSize is the size of the disk when s was taken, in bytes; active is
// that of the disk now.
func snapshotSize(s *format.Snapshot, active uint64) int64 {
	size := active
	if s.DiskSize != 0 {
		size = s.DiskSize
	}
	return int64(size &^ 511)
}
