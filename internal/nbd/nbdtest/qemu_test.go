package nbdtest_test

import (
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/nbd/nbdtest"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

// qemuDeviations are those of qemu-nbd 7.2 whatever it serves.
var qemuDeviations = map[string]string{
	"HS-08/65537":                   "waits for payloads below its own limit",
	"HS-08/1048576":                 "waits for payloads below its own limit",
	"HS-12":                         "repeats the name, line breaks included",
	"HS-14/long/list-meta-context":  "ignores bytes behind the last query",
	"HS-14/long/set-meta-context":   "ignores bytes behind the last query",
	"HS-15/real":                    "has no bound on information requests",
	"HS-16":                         "has no bound on options",
	"HS-17/early/list-meta-context": "lists contexts without structured replies",
	"TX-01":                         "answers EINVAL to a wrong magic before it closes",
	"TX-08/33-mib":                  "serves reads up to 32 MiB",
	"TX-08/64-mib":                  "serves reads up to 32 MiB",
	"TX-15/read":                    "takes requests of length 0",
	"TX-15/cache":                   "takes requests of length 0",
	"TX-17":                         "takes a FLUSH with offset and length",
	"TX-27":                         nbdtest.Races + "drops what is in flight when DISC comes",
	"TX-28":                         nbdtest.Races + "drops what is in flight at half-close",
	"TX-28/partial":                 nbdtest.Races + "drops what is in flight at half-close",
	"HS-25/*":                       nbdtest.Races + "may see the half-close first",
}

// qemuWriteDeviations are those of a writable export.
var qemuWriteDeviations = map[string]string{
	"TX-15/write":        "takes requests of length 0",
	"TX-15/write-zeroes": "takes requests of length 0",
	"TX-15/trim":         "takes requests of length 0",
	"TX-09/*":            "answers EINVAL, not ENOSPC, beyond the end",
	"TX-11/33-mib":       "closes on writes above 32 MiB",
	"TX-11/64-mib":       "closes on writes above 32 MiB",
}

// qemuReadOnlyDeviations are those of a read-only export.
var qemuReadOnlyDeviations = map[string]string{
	"TX-09/write": "answers EINVAL, not EPERM, when read-only",
	"TX-14":       "answers EINVAL, not EPERM, when read-only",
	"TX-14/write": "answers EINVAL, not EPERM, when read-only",
}

// qemuNBD starts qemu-nbd on a new image of zeroes.
func qemuNBD(t *testing.T, size int64, args ...string) *process {
	t.Helper()
	socket := socketPath(t)
	args = append([]string{"-k", socket, "-e", "16", "--persistent", "-f", "raw", "-x", "disk"}, args...)
	return start(t, socket, "qemu-nbd", append(args, sparseFile(t, size))...)
}

func qemuServer(p *process) nbdtest.Server {
	return nbdtest.Server{
		Dial: p.dial, Export: "disk", Size: 256 << 20, Invariants: p.alive,
		Features: nbdtest.Features{Flags: rwFlags, Structured: true, Contexts: true, BlockSizes: true},
	}
}

func TestQemuNBDConformsButForItsList(t *testing.T) {
	t.Parallel()
	s := qemuServer(qemuNBD(t, 256<<20))
	s.Deviations = with(qemuDeviations, qemuWriteDeviations)
	nbdtest.Conformance(t, s)
}

func TestQemuNBDReadOnlyConformsButForItsList(t *testing.T) {
	t.Parallel()
	s := qemuServer(qemuNBD(t, 256<<20, "-r"))
	s.ReadOnly = true
	s.Features.Flags = wire.HasFlags | wire.ReadOnly | wire.SendFlush | wire.SendFUA | wire.SendDF | wire.CanMultiConn | wire.SendCache
	s.Deviations = with(qemuDeviations, qemuReadOnlyDeviations)
	nbdtest.Conformance(t, s)
}

func TestQemuNBDOnALargeDiskConformsButForItsList(t *testing.T) {
	t.Parallel()
	s := qemuServer(qemuNBD(t, 8<<40))
	s.Size = 8 << 40
	s.Large = &nbdtest.Export{Name: s.Export, Size: s.Size}
	s.Deviations = with(qemuDeviations, qemuWriteDeviations)
	nbdtest.Conformance(t, s)
}
