package attach

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/control/api"
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

// description tells which image an export was made of, also after a snapshot. It
// is meant, but not named: clients can read this.
func description(id, image string) string { return "disk " + id + ", image " + key(16, image) }

// above is the overlay that a snapshot has put above the image that an export was
// made of; empty if the description has the image, or is not Attach's.
func above(x api.Export) string {
	_, made, ours := strings.Cut(x.Description, ", image ")
	if !ours || !filepath.IsAbs(x.Image) || made == key(16, x.Image) {
		return ""
	}
	return x.Image
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
	return prefix + nodesOf(id) + sourceKey(uri, readOnly)
}

// sourceKey ends the name of a raw node.
func sourceKey(uri string, readOnly bool) string { return key(8, uri, strconv.FormatBool(readOnly)) }

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

// isNodeAt tells whether a node was made for a disk at one of the URIs, whatever the
// disk was called.
func isNodeAt(node string, uris []string) bool {
	parts := strings.SplitN(node, "-", 4)
	if len(parts) < 3 || parts[0] != ownPrefix && parts[0] != foreignPrefix {
		return false
	}
	return slices.ContainsFunc(uris, func(uri string) bool {
		return parts[2] == sourceKey(uri, false) || parts[2] == sourceKey(uri, true)
	})
}

// isOwn tells whether the node is of an export that a plan has made.
func isOwn(node string) bool { return strings.HasPrefix(node, ownPrefix+"-") }

// waitDigits are those of a number in the name of a client, from 0.
const waitDigits = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"

// nbdClient is an NBD client below a raw node, as its name tells: QEMU does not
// say how long a client waits for a server that is lost.
type nbdClient struct {
	node   string
	number int // from 1; 0: there is none
	wait   time.Duration
}

// clientNode is the n-th NBD client below a raw node. The name has the seconds
// that it waits, if those are not limits.AttachReconnect, which 0 stands for.
func clientNode(raw string, n int, wait time.Duration) string {
	digits := ""
	if wait != 0 && wait != limits.AttachReconnect {
		for s := wholeSeconds(wait); s > 0; s /= len(waitDigits) {
			digits = string(waitDigits[s%len(waitDigits)]) + digits
		}
	}
	return raw + "-" + strconv.Itoa(n) + digits
}

// wholeSeconds is what QEMU makes of a delay.
func wholeSeconds(d time.Duration) int { return int((d + time.Second - 1) / time.Second) }

// clientOf is the client of the raw node with the name; the zero value for
// other nodes.
func clientOf(raw, node string) nbdClient {
	rest, ok := strings.CutPrefix(node, raw+"-")
	number := strings.TrimRight(rest, waitDigits)
	n, err := strconv.Atoi(number)
	if !ok || err != nil || n < 1 || n > limits.AttachClients || len(node) > limits.NodeName {
		return nbdClient{}
	}
	c := nbdClient{node: node, number: n, wait: limits.AttachReconnect}
	if digits := rest[len(number):]; digits != "" {
		seconds := 0
		for _, d := range digits {
			seconds = seconds*len(waitDigits) + strings.IndexRune(waitDigits, d)
		}
		c.wait = time.Duration(seconds) * time.Second
	}
	return c
}

// lastClient is the client of the raw node with the largest number.
func lastClient(list []qmp.Node, raw string) (last nbdClient) {
	for _, n := range list {
		if c := clientOf(raw, n.Name); c.number > last.number {
			last = c
		}
	}
	return last
}

// next is the name of a client in place of this one.
func (c nbdClient) next(raw string, wait time.Duration) (string, error) {
	node := clientNode(raw, c.number+1, wait)
	if c.number >= limits.AttachClients || len(node) > limits.NodeName {
		return "", fmt.Errorf("%w: the disk has grown %d times: detach and attach it once", qmp.ErrTooMany, c.number)
	}
	return node, nil
}

// Path is path from the root. The folder of one with ".." is looked up before it
// is cleaned: behind a symbolic link that leads out of another.
func Path(path string) (string, error) {
	dir, base := filepath.Split(path)
	if !slices.Contains(strings.Split(dir, "/"), "..") {
		return filepath.Abs(path)
	}
	if !filepath.IsAbs(dir) {
		wd, err := os.Getwd()
		if err != nil {
			return "", err
		}
		dir = wd + "/" + dir
	}
	dir, err := filepath.EvalSymlinks(dir)
	return filepath.Join(dir, base), err
}

// pathOf is Path of a word that a user names a disk by; one that is no path stays.
func pathOf(word string) string {
	path, err := Path(word)
	if err != nil {
		return word
	}
	return path
}
