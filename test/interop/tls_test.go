package interop

import (
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"fmt"
	"path/filepath"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/transport/transporttest"
	"github.com/vmdiskd/vmdiskd/test/testenv"
)

func TestToolsReadThroughTLS(t *testing.T) {
	testenv.Require(t, "nbdinfo", "nbdcopy", "qemu-img")
	certs := testenv.Certificates(t)
	port := testenv.FreePort(t)
	image := testenv.PatternImage(t, diskSize)
	s := serve(t, testenv.Options{Image: image, TLSDir: certs, Port: port})
	t.Run("nbdinfo", func(t *testing.T) {
		var got info
		decode(t, testenv.Run(t, "nbdinfo", "--json", s.URI), &got)
		if !got.TLS || len(got.Exports) != 1 || got.Exports[0].Size != diskSize {
			t.Errorf("got %+v, want TLS and one export", got)
		}
	})
	t.Run("nbdcopy", func(t *testing.T) {
		out := filepath.Join(testenv.TempDir(t), "out.img")
		testenv.Run(t, "nbdcopy", "--connections=4", s.URI, out)
		sameFiles(t, image, out, -1)
	})
	t.Run("qemu-img", func(t *testing.T) {
		out := filepath.Join(testenv.TempDir(t), "out.img")
		testenv.Run(t, "qemu-img", "convert", "--object", "tls-creds-x509,id=tls0,endpoint=client,dir="+certs,
			"--image-opts", fmt.Sprintf("driver=nbd,server.type=inet,server.host=127.0.0.1,server.port=%d,tls-creds=tls0", port),
			"-O", "raw", out)
		sameFiles(t, image, out, -1)
	})
	t.Run("python", func(t *testing.T) {
		python(t, s.URI, "structured")
		python(t, s.URI, "simple")
		python(t, s.URI, "in_flight")
	})
}

// TestClientCertificatesOfAllKinds: GnuTLS is particular about what a server
// says that it takes.
func TestClientCertificatesOfAllKinds(t *testing.T) {
	testenv.Require(t, "nbdinfo", "qemu-img")
	needOverlay(t)
	ca := transporttest.NewCA(t, "test authority")
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	_, edKey, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for name, key := range map[string]crypto.Signer{"RSA": rsaKey, "Ed25519": edKey} {
		t.Run(name, func(t *testing.T) {
			certs := testenv.TempDir(t)
			transporttest.WriteServer(t, certs, ca, ca.IssueServer("localhost"))
			transporttest.WriteClient(t, certs, ca, ca.Issue("client", key, transporttest.Usage(x509.ExtKeyUsageClientAuth)))
			port := testenv.FreePort(t)
			s := serve(t, testenv.Options{Image: testenv.PatternImage(t, diskSize), TLSDir: certs, Port: port})
			testenv.Run(t, "nbdinfo", s.URI)
			testenv.Run(t, "qemu-img", "info", "--object", "tls-creds-x509,id=tls0,endpoint=client,dir="+certs,
				"--image-opts", fmt.Sprintf("driver=nbd,server.type=inet,server.host=127.0.0.1,server.port=%d,tls-creds=tls0", port))
		})
	}
}

func TestPlainClientIsRefusedWhereTLSIsRequired(t *testing.T) {
	testenv.Require(t, "nbdinfo", "qemu-img")
	port := testenv.FreePort(t)
	serve(t, testenv.Options{TLSDir: testenv.Certificates(t), Port: port})
	plain := fmt.Sprintf("nbd://127.0.0.1:%d/", port)
	if out, err := testenv.Try(t, "nbdinfo", plain); err == nil {
		t.Errorf("nbdinfo reads without TLS:\n%s", out)
	}
	if out, err := testenv.Try(t, "qemu-img", "info", plain); err == nil {
		t.Errorf("qemu-img reads without TLS:\n%s", out)
	}
}

func TestClientOfAnotherAuthorityRefusesTheServer(t *testing.T) {
	testenv.Require(t, "nbdinfo")
	port := testenv.FreePort(t)
	serve(t, testenv.Options{TLSDir: testenv.Certificates(t), Port: port})
	stranger := fmt.Sprintf("nbds://127.0.0.1:%d/?tls-certificates=%s", port, testenv.Certificates(t))
	if out, err := testenv.Try(t, "nbdinfo", stranger); err == nil {
		t.Errorf("nbdinfo trusts a server of an unknown authority:\n%s", out)
	}
}
