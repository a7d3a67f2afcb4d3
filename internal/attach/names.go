package attach

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strconv"
	"strings"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/qmp"
)

// Kinds of disks, by the beginnings of their nodes' names.
const (
	ownPrefix     = "vmd" // an export that a plan has made
	foreignPrefix = "vmu" // an export that was there, or of another server
)

// key is n hexadecimal digits that stand for the texts.
func key(n int, texts ...string) string {
	h := sha256.New()
	for _, t := range texts {
		fmt.Fprintf(h, "%d:%s", len(t), t)
	}
	return hex.EncodeToString(h.Sum(nil))[:n]
}

// DiskID is the name that a disk has in a machine when its user gives none:
// the same for the same image or URI.
func DiskID(image string) string { return "disk-" + key(12, image) }

// checkID holds the name of a disk to QEMU's rule for ids, before anything is
// done for it.
func checkID(id string) error {
	if id == "" || len(id) > limits.DeviceID || !letter(rune(id[0])) || strings.ContainsFunc(id, odd) {
		return fmt.Errorf("%w name of a disk %q: a letter, then letters, digits, '-', '.' or '_', at most %d in all", qmp.ErrInvalid, id, limits.DeviceID)
	}
	return nil
}

func letter(c rune) bool { return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' }

// odd characters stand in no name that QEMU takes.
func odd(c rune) bool {
	return !letter(c) && (c < '0' || c > '9') && !strings.ContainsRune("-._", c)
}

// ExportName is the name of the export of a machine's disk. It follows from
// the two alone: nothing that a machine says leads to another's export.
func ExportName(machine, id string) string {
	return "vm-" + key(12, machine) + "-" + id
}

// serial is the number by which a guest finds a disk whose user gives none.
func serial(machine, id string) string {
	return strings.ToUpper("vmd" + key(12, machine, id))
}

// nodesOf begins the names of all nodes of a disk, less the kind.
func nodesOf(id string) string { return "-" + key(12, id) + "-" }

// rawNode is the node that the device of a disk uses. Its name says what is
// below, so that the same disk is told from another of its name.
func rawNode(own bool, id, uri string, readOnly bool) string {
	prefix := foreignPrefix
	if own {
		prefix = ownPrefix
	}
	return prefix + nodesOf(id) + key(8, uri, strconv.FormatBool(readOnly))
}

// isNodeOf tells whether a node was made for the disk.
func isNodeOf(node, id string) bool {
	rest, own := strings.CutPrefix(node, ownPrefix)
	if !own {
		var foreign bool
		if rest, foreign = strings.CutPrefix(node, foreignPrefix); !foreign {
			return false
		}
	}
	return strings.HasPrefix(rest, nodesOf(id))
}

// isOwn tells whether the node is of an export that a plan has made.
func isOwn(node string) bool { return strings.HasPrefix(node, ownPrefix+"-") }

// clientNode is the n-th NBD client below a raw node.
func clientNode(raw string, n int) string { return raw + "-" + strconv.Itoa(n) }

// clientNumber is n of clientNode, or 0 for other nodes.
func clientNumber(raw, node string) int {
	rest, ok := strings.CutPrefix(node, raw+"-")
	n, err := strconv.Atoi(rest)
	if !ok || err != nil || n < 1 || n > limits.AttachClients {
		return 0
	}
	return n
}
