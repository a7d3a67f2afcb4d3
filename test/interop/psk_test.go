package interop

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/transport/psk"
	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// needOverlay skips in a build that cannot do it; the servers are built as this
// test is.
func needOverlay(t *testing.T) {
	t.Helper()
	if err := psk.Supported(); err != nil {
		t.Skipf("this build has no overlay of crypto/tls, make test has: %v", err)
	}
}

// pskDir is a folder with keys.psk, as QEMU wants it, and its path.
func pskDir(t *testing.T, lines ...string) (dir, file string) {
	t.Helper()
	dir = testenv.TempDir(t)
	file = filepath.Join(dir, "keys.psk")
	if err := os.WriteFile(file, []byte(strings.Join(lines, "\n")+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir, file
}

func TestToolsReadWithAPreSharedKey(t *testing.T) {
	testenv.Require(t, "nbdinfo", "nbdcopy", "qemu-img")
	needOverlay(t)
	good := "vm1:" + strings.Repeat("1a", 32)
	dir, file := pskDir(t, good, "vm2:"+strings.Repeat("2b", 16))
	image := testenv.PatternImage(t, diskSize)
	port := testenv.FreePort(t)
	serve(t, testenv.Options{Image: image, Port: port, Extra: []string{"--tls=require", "--tls-psk=" + file}})
	uri := func(user, file string) string {
		return fmt.Sprintf("nbds://%s@127.0.0.1:%d/?tls-psk-file=%s", user, port, file)
	}
	qemu := func(dir, user string) []string {
		return []string{"--object", fmt.Sprintf("tls-creds-psk,id=tls0,endpoint=client,dir=%s,username=%s", dir, user),
			"--image-opts", fmt.Sprintf("driver=nbd,server.type=inet,server.host=127.0.0.1,server.port=%d,tls-creds=tls0", port)}
	}
	t.Run("nbdcopy", func(t *testing.T) {
		out := filepath.Join(testenv.TempDir(t), "out.img")
		testenv.Run(t, "nbdcopy", "--connections=4", uri("vm1", file), out)
		sameFiles(t, image, out, -1)
	})
	t.Run("nbdinfo with a key of 16 bytes", func(t *testing.T) {
		var got info
		decode(t, testenv.Run(t, "nbdinfo", "--json", uri("vm2", file)), &got)
		if !got.TLS || len(got.Exports) != 1 || got.Exports[0].Size != diskSize {
			t.Errorf("got %+v, want TLS and one export", got)
		}
	})
	t.Run("qemu-img", func(t *testing.T) {
		out := filepath.Join(testenv.TempDir(t), "out.img")
		args := append([]string{"qemu-img", "convert"}, qemu(dir, "vm1")...)
		testenv.Run(t, append(args, "-O", "raw", out)...)
		sameFiles(t, image, out, -1)
	})
	other := "vm1:" + strings.Repeat("3c", 32)
	wrongDir, wrong := pskDir(t, other, "vm3:"+strings.Repeat("1a", 32))
	firstDir, first := pskDir(t, good, other)
	secondDir, second := pskDir(t, other, good)
	t.Run("the first of two keys", func(t *testing.T) { // as psk.ClientConfig does
		testenv.Run(t, "nbdinfo", uri("vm1", first))
		testenv.Run(t, append([]string{"qemu-img", "info"}, qemu(firstDir, "vm1")...)...)
	})
	for name, argv := range map[string][]string{
		"nbdinfo, wrong key":         {"nbdinfo", uri("vm1", wrong)},
		"nbdinfo, unknown identity":  {"nbdinfo", uri("vm3", wrong)},
		"nbdinfo, certificates only": {"nbdinfo", fmt.Sprintf("nbds://127.0.0.1:%d/?tls-certificates=%s", port, testenv.Certificates(t))},
		"nbdinfo, second key":        {"nbdinfo", uri("vm1", second)},
		"qemu-img, second key":       append([]string{"qemu-img", "info"}, qemu(secondDir, "vm1")...),
		"qemu-img, wrong key":        append([]string{"qemu-img", "info"}, qemu(wrongDir, "vm1")...),
		"qemu-img, unknown identity": append([]string{"qemu-img", "info"}, qemu(wrongDir, "vm3")...),
	} {
		if out, err := testenv.Try(t, argv...); err == nil {
			t.Errorf("%s: it reads\n%s", name, out)
		}
	}
}

// TestKeysAndCertificatesGoTogether serves both kinds of clients.
func TestKeysAndCertificatesGoTogether(t *testing.T) {
	testenv.Require(t, "nbdinfo")
	vmdiskdOnly(t)
	needOverlay(t)
	certs := testenv.Certificates(t)
	_, file := pskDir(t, "vm1:"+strings.Repeat("1a", 32))
	_, wrong := pskDir(t, "vm1:"+strings.Repeat("3c", 32))
	port := testenv.FreePort(t)
	s := serve(t, testenv.Options{TLSDir: certs, Port: port, Extra: []string{"--tls-psk=" + file}})
	testenv.Run(t, "nbdinfo", s.URI)
	testenv.Run(t, "nbdinfo", fmt.Sprintf("nbds://vm1@127.0.0.1:%d/?tls-psk-file=%s", port, file))
	if out, err := testenv.Try(t, "nbdinfo", fmt.Sprintf("nbds://vm1@127.0.0.1:%d/?tls-psk-file=%s", port, wrong)); err == nil {
		t.Errorf("a wrong key is no reason to refuse:\n%s", out)
	}
}

// TestCtlProvesAKeyToOtherServers: the client's side, to vmdiskd and to those
// that use GnuTLS. A server that has another key is not talked to.
func TestCtlProvesAKeyToOtherServers(t *testing.T) {
	testenv.Require(t, "nbdkit", "qemu-nbd")
	needOverlay(t)
	dir, file := pskDir(t, "vm1:"+strings.Repeat("1a", 32))
	_, wrong := pskDir(t, "vm1:"+strings.Repeat("3c", 32))
	image := testenv.PatternImage(t, diskSize)
	ctl := testenv.Binary(t, "vmdiskctl")
	for kind, extra := range map[string][]string{
		"vmdiskd":  {"--tls=require", "--tls-psk=" + file},
		"nbdkit":   {"--tls=require", "--tls-psk=" + file},
		"qemu-nbd": {"--object", "tls-creds-psk,id=tls0,endpoint=server,dir=" + dir, "--tls-creds=tls0"},
	} {
		t.Run(kind, func(t *testing.T) {
			k, err := testenv.KindByName(kind)
			if err != nil {
				t.Fatal(err)
			}
			port := testenv.FreePort(t)
			s, err := k.Launch(testenv.Context(t), testenv.TempDir(t), testenv.Options{Image: image, Port: port, Extra: extra})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(s.Kill)
			uri := func(file string) string { return fmt.Sprintf("nbds://vm1@127.0.0.1:%d/?tls-psk-file=%s", port, file) }
			out := filepath.Join(testenv.TempDir(t), "out.img")
			testenv.Run(t, ctl, "copy", uri(file), out)
			sameFiles(t, image, out, -1)
			if out, err := testenv.Try(t, ctl, "info", uri(wrong)); err == nil {
				t.Errorf("a server with another key is read:\n%s", out)
			}
		})
	}
}
