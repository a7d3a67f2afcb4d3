package testenv

import (
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/transport/transporttest"
)

// Certificates fills a folder with a fresh authority, a server certificate for
// localhost and 127.0.0.1 and a client certificate, under the file names that
// libnbd, nbdkit and QEMU share.
func Certificates(t testing.TB) string {
	t.Helper()
	dir := TempDir(t)
	ca := transporttest.NewCA(t, "test authority")
	transporttest.WriteServer(t, dir, ca, ca.IssueServer("localhost"))
	transporttest.WriteClient(t, dir, ca, ca.IssueClient("client"))
	return dir
}
