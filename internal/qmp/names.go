package qmp

import (
	"fmt"
	"strings"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// checkID holds a device's id to QEMU's rule for ids.
func checkID(what, id string) error {
	return wellFormed(what, id, limits.DeviceID)
}

// checkNode holds the name of a block node to QEMU's rule.
func checkNode(name string) error {
	return wellFormed("node", name, limits.NodeName)
}

// wellFormed is id_wellformed of QEMU: a letter, then letters, digits, '-',
// '.' and '_'.
func wellFormed(what, id string, max int) error {
	letter := func(c rune) bool { return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' }
	ok := id != "" && len(id) <= max && letter(rune(id[0])) && strings.IndexFunc(id, func(c rune) bool {
		return !letter(c) && (c < '0' || c > '9') && !strings.ContainsRune("-._", c)
	}) < 0
	if !ok {
		return fmt.Errorf("%w name of a %s: %q: a letter, then letters, digits, '-', '.' or '_', at most %d in all", ErrInvalid, what, id, max)
	}
	return nil
}
