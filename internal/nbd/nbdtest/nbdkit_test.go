package nbdtest_test

import (
	"maps"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/nbd/nbdtest"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

// nbdkitDeviations are those of nbdkit 1.32 whatever it serves.
var nbdkitDeviations = map[string]string{
	"HS-06":                         "answers options of a client without fixed newstyle",
	"HS-08/65537":                   "waits for payloads below its own limit",
	"HS-08/1048576":                 "waits for payloads below its own limit",
	"HS-08/67108864":                "waits for payloads below its own limit",
	"HS-14/long/list-meta-context":  "ignores bytes behind the last query",
	"HS-14/long/set-meta-context":   "ignores bytes behind the last query",
	"HS-15/real":                    "has no bound on information requests",
	"HS-16":                         "allows 32 options",
	"HS-17/early/list-meta-context": "lists contexts without structured replies",
	"HS-19/count/*":                 "answers queries before it finds the next one cut short",
	"HS-19/duplicates/*":            "answers each of several equal queries",
	"HS-19/1000/*":                  "answers each of several equal queries",
	"HS-20/structured":              "acknowledges a second STRUCTURED_REPLY",
	"HS-22":                         "refuses a second LIST",
	"HS-10/list-meta-context/2*":    "selects contexts of any name",
	"HS-10/set-meta-context/2*":     "selects contexts of any name",
	"HS-10/list-meta-context/4095":  "selects contexts of any name",
	"HS-10/list-meta-context/4096":  "selects contexts of any name",
	"HS-10/set-meta-context/4095":   "selects contexts of any name",
	"HS-10/set-meta-context/4096":   "selects contexts of any name",
	"WR-24/unknown":                 "selects contexts of any name",
	"WR-24/malformed":               "keeps the selection when SET is malformed",
	"TX-08@simple":                  "answers ENOMEM above its limit",
	"TX-08@structured":              "answers ENOMEM above its limit",
	"TX-10/*":                       "waits for the payload, or closes without an answer",
}

// emptyWrites are the deviations of a writable export.
var emptyWrites = map[string]string{
	"TX-15/write":        "answers ENOSPC to a write of length 0",
	"TX-15/write-zeroes": "answers ENOSPC to a write of length 0",
}

// anyName are the deviations of a plugin that takes every export name.
var anyName = map[string]string{
	"HS-10/export-name": "takes any name",
	"HS-10/info/2*":     "takes any name",
	"HS-10/go/2*":       "takes any name",
	"HS-10/info/4095":   "takes any name",
	"HS-10/info/4096":   "takes any name",
	"HS-10/go/4095":     "takes any name",
	"HS-10/go/4096":     "takes any name",
	"HS-11":             "takes any name",
	"HS-12":             "takes any name",
}

// with merges lists of deviations.
func with(lists ...map[string]string) map[string]string {
	all := map[string]string{}
	for _, l := range lists {
		maps.Copy(all, l)
	}
	return all
}

// nbdkit starts nbdkit with one thread per connection: with more, 1.32 aborts
// on an assertion when a client resets with requests in flight.
func nbdkit(t *testing.T, args ...string) *process {
	t.Helper()
	socket := socketPath(t)
	return start(t, socket, "nbdkit", append([]string{"-f", "-t", "1", "-U", socket}, args...)...)
}

// nbdkitServer is what all runs against nbdkit share.
func nbdkitServer(p *process) nbdtest.Server {
	return nbdtest.Server{
		Dial: p.dial, Size: 256 << 20, Invariants: p.alive,
		Features: nbdtest.Features{Flags: rwFlags, Structured: true, Contexts: true},
	}
}

func TestNbdkitMemoryConformsButForItsList(t *testing.T) {
	t.Parallel()
	s := nbdkitServer(nbdkit(t, "memory", "256M"))
	s.Deviations = with(nbdkitDeviations, anyName, emptyWrites)
	nbdtest.Conformance(t, s)
}

func TestNbdkitFileConformsButForItsList(t *testing.T) {
	t.Parallel()
	// 1.32 aborts on a FAST_ZERO that it has not offered, which the file plugin
	// alone does not; the filter offers it and answers ENOTSUP.
	s := nbdkitServer(nbdkit(t, "--filter=exportname", "--filter=nozero", "file", sparseFile(t, 256<<20),
		"exportname=disk", "exportname-strict=true", "zeromode=notrim", "fastzeromode=slow"))
	s.Export = "disk"
	s.Deviations = with(nbdkitDeviations, emptyWrites)
	nbdtest.Conformance(t, s)
}

func TestNbdkitReadOnlyConformsButForItsList(t *testing.T) {
	t.Parallel()
	s := nbdkitServer(nbdkit(t, "-r", "--filter=exportname", "file", sparseFile(t, 256<<20), "exportname=disk", "exportname-strict=true"))
	s.Export, s.ReadOnly = "disk", true
	s.Features.Flags = wire.HasFlags | wire.ReadOnly | wire.SendFlush | wire.SendDF | wire.CanMultiConn | wire.SendCache
	s.Deviations = nbdkitDeviations
	nbdtest.Conformance(t, s)
}

func TestNbdkitOldstyleConforms(t *testing.T) {
	t.Parallel()
	nbdtest.Oldstyle(t, nbdkitServer(nbdkit(t, "-o", "memory", "256M")))
}
