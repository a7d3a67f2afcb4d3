package main

import (
	"fmt"
	"os"
	"strings"

	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// testCase is one row of the comparison: what nbdload is told, or for an idle
// case how many connections are held while memory is read.
type testCase struct {
	name  string
	about string
	load  []string // of nbdload; nil for the memory case
	// direct opens the image past the page cache, for the peers that can, and
	// adds fio on the same file.
	direct bool
	writes bool
	// small has the image in the page cache page by page, not in the large
	// folios that reading ahead makes.
	small bool
	// image names what is served; rawImage is the zero value.
	image string
	// fresh has the image made anew for each measurement.
	fresh bool
	// versus is the peer that the others are compared with, the first of the
	// run if it is empty, and by is what is compared: processor time per
	// request if it is nil.
	versus string
	by     func(sample) float64
	// attach measures commands on a machine instead of requests.
	attach bool
	// start measures starts instead of requests.
	start bool
	// peers replaces those of the command line.
	peers string
	// parts, if not 0, cuts each round of a case that only reads a raw image
	// into so many, which share its time: for a difference that is less than
	// what one measurement is off by.
	parts int
}

// confineParts are of 50 ms each by default.
const confineParts = 40

// confined is the peer with all of confinement: strict does not start with
// less, and as root only for another user.
func confined() string {
	if os.Geteuid() == 0 {
		return "vmdiskd --confine=strict --user=nobody"
	}
	return "vmdiskd --confine=strict"
}

func byIOPS(s sample) float64 { return s.IOPS }
func byMBps(s sample) float64 { return s.MBps }
func byP50(s sample) float64  { return s.P50 }
func byP99(s sample) float64  { return s.P99 }

// idleConnections is what the memory case compares with a single connection.
const idleConnections = 256

// directDepth is the queue depth of the O_DIRECT case, for fio too.
const directDepth = 32

var cases = []testCase{
	{name: "rr4k-q1", about: "4 KiB random read, QD1", load: []string{"-o", "randread", "-b", "4096", "-q", "1"}},
	{name: "rr4k-q32", about: "4 KiB random read, QD32", load: []string{"-o", "randread", "-b", "4096", "-q", "32"}},
	{name: "rr4k-q32c4", about: "4 KiB random read, QD32 x 4 connections", load: []string{"-o", "randread", "-b", "4096", "-q", "32", "-c", "4"}},
	{name: "rr4k-q1c64", about: "4 KiB random read, QD1 x 64 connections", load: []string{"-o", "randread", "-b", "4096", "-q", "1", "-c", "64"}},
	{name: "rw4k-q32", about: "4 KiB random write, QD32, image cached page by page", load: []string{"-o", "randwrite", "-b", "4096", "-q", "32"}, writes: true, small: true},
	{name: "rw4k-folio", about: "the same, image cached in large folios, whose every block recent kernels' ext4 looks at for each small write", load: []string{"-o", "randwrite", "-b", "4096", "-q", "32"}, writes: true},
	{name: "r128k-q16", about: "128 KiB sequential read, QD16", load: []string{"-o", "read", "-b", "131072", "-q", "16"}},
	{name: "r1m-q8", about: "1 MiB sequential read, QD8", load: []string{"-o", "read", "-b", "1048576", "-q", "8"}},
	{name: "w1m-q8", about: "1 MiB sequential write, QD8", load: []string{"-o", "write", "-b", "1048576", "-q", "8"}, writes: true},
	{name: "direct", about: "4 KiB random read past the page cache, QD32", load: []string{"-o", "randread", "-b", "4096", "-q", fmt.Sprint(directDepth)}, direct: true, versus: fioPeer, by: byIOPS},
	{name: "q-rr4k", about: "qcow2, plain clusters: 4 KiB random read, QD32", load: []string{"-o", "randread", "-b", "4096", "-q", "32"}, image: plainImage, versus: qemuPeer},
	{name: "q-chain", about: fmt.Sprintf("the same at the bottom of a chain of %d", chainDepth), load: []string{"-o", "randread", "-b", "4096", "-q", "32"}, image: chainImage, versus: qemuPeer},
	{name: "q-10T", about: "the same data on a disk of 10 TiB", load: []string{"-o", "randread", "-b", "4096", "-q", "32"}, image: sparseImage, versus: qemuPeer},
	{name: "q-r1m", about: "qcow2, plain clusters: 1 MiB sequential read, QD8", load: []string{"-o", "read", "-b", "1048576", "-q", "8"}, image: plainImage, versus: qemuPeer},
	{name: "q-zlib-1m", about: "qcow2, zlib: 1 MiB sequential read, QD8", load: []string{"-o", "read", "-b", "1048576", "-q", "8"}, image: zlibImage, versus: qemuPeer, by: byMBps},
	{name: "q-zstd-1m", about: "qcow2, zstd: 1 MiB sequential read, QD8", load: []string{"-o", "read", "-b", "1048576", "-q", "8"}, image: zstdImage, versus: qemuPeer, by: byMBps},
	{name: "q-zlib-4k", about: "qcow2, zlib: 4 KiB random read, QD32", load: []string{"-o", "randread", "-b", "4096", "-q", "32"}, image: zlibImage, versus: qemuPeer},
	{name: "q-zstd-4k", about: "qcow2, zstd: 4 KiB random read, QD32", load: []string{"-o", "randread", "-b", "4096", "-q", "32"}, image: zstdImage, versus: qemuPeer},
	{name: "q-rr4k-rw", about: "qcow2 open for writing, plain clusters: 4 KiB random read, QD32", load: []string{"-o", "randread", "-b", "4096", "-q", "32"}, image: plainImage, writes: true, versus: qemuPeer},
	{name: "q-rw4k", about: "the same: 4 KiB random write, in place", load: []string{"-o", "randwrite", "-b", "4096", "-q", "32"}, image: plainImage, writes: true, small: true, versus: qemuPeer},
	{name: "q-alloc", about: "empty qcow2 overlay on a sparse raw disk of 64 GiB: 4 KiB random write, QD32, each to a new cluster", load: []string{"-o", "randwrite", "-b", "4096", "-q", "32"}, image: overlayImage, fresh: true, writes: true, versus: qemuPeer},
	{name: "q-cow", about: "empty qcow2 overlay on the raw image: 4 KiB random write, QD32, to new clusters as long as there are", load: []string{"-o", "randwrite", "-b", "4096", "-q", "32"}, image: copyImage, fresh: true, writes: true, versus: qemuPeer},
	{name: "c-q32", about: "what confinement costs: 4 KiB random read, QD32, in many short rounds; the goal is less than 2 % more", load: []string{"-o", "randread", "-b", "4096", "-q", "32"}, peers: "vmdiskd --confine=off," + confined(), versus: "vmdiskd --confine=off", parts: confineParts},
	{name: "c-q1", about: "the same at QD1", load: []string{"-o", "randread", "-b", "4096", "-q", "1"}, peers: "vmdiskd --confine=off," + confined(), versus: "vmdiskd --confine=off", parts: confineParts},
	{name: "c-q1-sleep", about: "the same at QD1, by servers that never poll: what polling costs would hide the rest", load: []string{"-o", "randread", "-b", "4096", "-q", "1"}, peers: "vmdiskd --confine=off --poll-max=0," + confined() + " --poll-max=0", versus: "vmdiskd --confine=off --poll-max=0", parts: confineParts},
	{name: "start", about: "from the start of a program with one export until it says READY=1, if it does, and until a client has its greeting; the goal is less than 100 ms", start: true, peers: "nbdkit,qemu-nbd,qemu-nbd-uring,vmdiskd --confine=off,vmdiskd," + confined() + ",service 1", versus: "nbdkit", by: byP50},
	{name: "s-layers", about: "service with one export, whose layers are all there and do nothing: 4 KiB random read, QD32", load: []string{"-o", "randread", "-b", "4096", "-q", "32"}, peers: "vmdiskd,service 1", versus: "vmdiskd"},
	{name: "s-exports", about: "service, one export of many is busy: 4 KiB random read, QD32", load: []string{"-o", "randread", "-b", "4096", "-q", "32"}, peers: "service 1,service 10,service 100,service 1000", versus: "service 1"},
	{name: "s-add", about: "the same at QD1, while an export is added and removed 20 times a second; compared by p99", load: []string{"-o", "randread", "-b", "4096", "-q", "1"}, peers: "service 10,service 10 adding", versus: "service 10", by: byP99},
	{name: "s-rate", about: fmt.Sprintf("4 KiB random read, QD32, limited to %d MiB/s: what comes as part of the limit, and in the quietest and the busiest 10 ms as parts of their mean", rateMiB), load: []string{"-o", "randread", "-b", "4096", "-q", "32", "-j", "10"}, peers: fmt.Sprintf("service 1 rate=%dM", rateMiB), by: byMBps},
	{name: "s-attach", about: "vmdiskctl attach to a QEMU that does not run, over SCSI: latency of the whole command, processor time of the program", attach: true, peers: "service 1"},
	{name: "s-memory", about: "resident memory of a service with few and many exports", peers: "service 1,service 1000"},
	{name: "memory", about: fmt.Sprintf("resident memory of a server with one export, 1 and %d idle connections; the goal is less than 24 MiB with 1", idleConnections)},
}

// chooseCases returns the named cases, all of them for an empty list.
func chooseCases(names string) ([]testCase, error) {
	if names == "" {
		return cases, nil
	}
	var chosen []testCase
	for _, name := range strings.Split(names, ",") {
		i := indexCase(name)
		if i < 0 {
			return nil, fmt.Errorf("case %q is none of %s", name, caseNames())
		}
		chosen = append(chosen, cases[i])
	}
	return chosen, nil
}

func indexCase(name string) int {
	for i := range cases {
		if cases[i].name == name {
			return i
		}
	}
	return -1
}

func caseNames() string {
	var names []string
	for _, c := range cases {
		names = append(names, c.name)
	}
	return strings.Join(names, ",")
}

// peer is a server to compare, perhaps with arguments of its own.
type peer struct {
	name  string
	kind  testenv.Kind
	extra []string
	service
}

// fioPeer is the name under which fio's own reading of the image is listed.
const fioPeer = "fio io_uring"

// qemuPeer is whom the qcow2 cases are compared with.
const qemuPeer = "qemu-nbd-uring"

// directArgs are what makes a server open its image with O_DIRECT. A program
// without an entry has no such mode.
var directArgs = map[string][]string{
	"":         {"--cache=none"}, // vmdiskd
	"qemu-nbd": {"--cache=none"},
}

// parsePeers reads a list like "nbdkit,vmdiskd,vmdiskd --engine=pool": a known
// server, then its extra arguments after blanks.
func parsePeers(list string) ([]peer, error) {
	var peers []peer
	for _, item := range strings.Split(list, ",") {
		words := strings.Fields(item)
		if len(words) == 0 {
			return nil, fmt.Errorf("empty name in the list of peers %q", list)
		}
		if words[0] == serviceName {
			s, err := parseService(words[1:])
			if err != nil {
				return nil, err
			}
			peers = append(peers, peer{name: strings.Join(words, " "), kind: serviceKind, service: s})
			continue
		}
		kind, err := testenv.KindByName(words[0])
		if err != nil {
			return nil, err
		}
		peers = append(peers, peer{name: strings.Join(words, " "), kind: kind, extra: words[1:]})
	}
	return peers, nil
}

// options returns how the peer serves the image in a case; ok is false when
// it cannot.
func (p peer) options(c testCase, image string) (o testenv.Options, ok bool) {
	o = testenv.Options{Image: image, Extra: p.extra}
	if p.exports > 0 {
		return o, c.image == rawImage && !c.direct
	}
	if c.image != rawImage {
		args, ok := imageArgs[p.kind.Program]
		args.Image, args.ReadOnly, args.Extra = image, !c.writes, append(append([]string(nil), args.Extra...), p.extra...)
		return args, ok
	}
	if !c.direct {
		o.ReadOnly = c.parts > 0 // its servers share the image
		return o, true
	}
	args, ok := directArgs[p.kind.Program]
	o.Extra = append(append([]string(nil), args...), p.extra...)
	return o, ok
}
