package open

import "github.com/vmdiskd/vmdiskd/internal/units"

// ParseSize reads a size in bytes as units.ParseSize does.
func ParseSize(s string) (int64, error) { return units.ParseSize(s) }
