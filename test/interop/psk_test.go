package interop

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/test/testenv"
)

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
	wrongDir, wrong := pskDir(t, "vm1:"+strings.Repeat("3c", 32), "vm3:"+strings.Repeat("1a", 32))
	for name, argv := range map[string][]string{
		"nbdinfo, wrong key":         {"nbdinfo", uri("vm1", wrong)},
		"nbdinfo, unknown identity":  {"nbdinfo", uri("vm3", wrong)},
		"nbdinfo, certificates only": {"nbdinfo", fmt.Sprintf("nbds://127.0.0.1:%d/?tls-certificates=%s", port, testenv.Certificates(t))},
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
