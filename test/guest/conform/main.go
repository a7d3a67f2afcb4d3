// Command conform runs the conformance suite of the NBD protocol against a
// server that is reached over vsock, from inside the guest that has one:
// package nbdtest is for tests, and a guest has no Go to build them with.
//
// "conform CID PORT SIZE" expects a writable export without a name of SIZE
// bytes. It has the flags of a test, prints what one prints, and ends with status
// 1 unless every check that -test.run names passes.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"regexp"
	"strconv"
	"testing"

	"github.com/mdlayher/vsock"

	"github.com/vmdiskd/vmdiskd/internal/nbd/nbdtest"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

// offered is what vmdiskd offers for a raw file.
const offered = wire.HasFlags | wire.SendFlush | wire.SendFUA | wire.SendTrim | wire.SendZero |
	wire.SendDF | wire.CanMultiConn | wire.SendCache | wire.SendFastZero

func main() {
	testing.Init()
	flag.Parse()
	s, err := server(flag.Args())
	if err != nil {
		fmt.Fprintln(os.Stderr, "conform:", err)
		os.Exit(2)
	}
	suite := testing.InternalTest{Name: "Conformance", F: func(t *testing.T) { nbdtest.Conformance(t, s) }}
	testing.Main(regexp.MatchString, []testing.InternalTest{suite}, nil, nil)
}

func server(args []string) (nbdtest.Server, error) {
	if len(args) != 3 {
		return nbdtest.Server{}, errors.New("want CID PORT SIZE")
	}
	cid, err1 := strconv.ParseUint(args[0], 10, 32)
	port, err2 := strconv.ParseUint(args[1], 10, 32)
	size, err3 := strconv.ParseInt(args[2], 10, 64)
	return nbdtest.Server{
		Dial: func(ctx context.Context) (net.Conn, error) {
			return vsock.DialContext(ctx, uint32(cid), uint32(port), nil)
		},
		Size:     size,
		Features: nbdtest.Features{Flags: offered, Structured: true, Extended: true, Contexts: true, BlockSizes: true},
	}, errors.Join(err1, err2, err3)
}
