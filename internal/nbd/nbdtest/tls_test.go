package nbdtest_test

import (
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/nbd/nbdtest"
)

// nbdkitTLSDeviations are those of nbdkit 1.32 with TLS.
var nbdkitTLSDeviations = map[string]string{
	"TL-06/random": "waits for the end of what it takes for a record",
	"TL-06/sslv2":  "waits for the end of what it takes for a record",
	"TL-13/1.0":    "speaks TLS 1.0",
	"TL-13/1.1":    "speaks TLS 1.1",
}

// nbdkitInsideTLS are those of connections inside TLS.
var nbdkitInsideTLS = map[string]string{
	"TX-04/write": "skips payloads on the socket, below TLS",
	"TX-09/write": "skips payloads on the socket, below TLS",
	"WR-50":       "skips payloads on the socket, below TLS",
}

// qemuTLSDeviations are those of qemu-nbd 7.2 with TLS.
var qemuTLSDeviations = map[string]string{
	"TL-06/random": "waits for the end of what it takes for a record",
	"TL-06/sslv2":  "waits for the end of what it takes for a record",
	"TL-01/abort":  "answers ABORT with ERR_TLS_REQD",
	"TL-13/1.0":    "speaks TLS 1.0",
	"TL-13/1.1":    "speaks TLS 1.1",
}

func TestNbdkitWithTLSConformsButForItsList(t *testing.T) {
	for mode, list := range map[nbdtest.TLSMode]map[string]string{
		nbdtest.TLSOn:      nil,
		nbdtest.TLSRequire: nbdkitInsideTLS,
	} {
		t.Run(string(mode), func(t *testing.T) {
			t.Parallel()
			keys := newPKI(t)
			s := nbdkitServer(nbdkit(t, "--tls="+string(mode), "--tls-certificates="+keys.dir, "memory", "256M"))
			s.TLS = nbdtest.TLS{Mode: mode, Config: keys.client()}
			s.Deviations = with(nbdkitDeviations, anyName, emptyWrites, nbdkitTLSDeviations, list)
			nbdtest.Conformance(t, s)
		})
	}
}

func TestQemuNBDWithTLSConformsButForItsList(t *testing.T) {
	t.Parallel()
	keys := newPKI(t)
	s := qemuServer(qemuNBD(t, 256<<20, "--object", "tls-creds-x509,id=tls0,endpoint=server,verify-peer=no,dir="+keys.dir, "--tls-creds", "tls0"))
	s.TLS = nbdtest.TLS{Mode: nbdtest.TLSRequire, Config: keys.client()}
	s.Deviations = with(qemuDeviations, qemuWriteDeviations, qemuTLSDeviations)
	nbdtest.Conformance(t, s)
}
