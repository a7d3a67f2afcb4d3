package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/transport/transporttest"
	"github.com/vmdiskd/vmdiskd/internal/version"
)

// nbdinfo is what libnbd's tool prints.
func nbdinfo(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command("nbdinfo", args...).Output()
	if err != nil {
		t.Fatalf("nbdinfo %q: %v", args, err)
	}
	return string(out)
}

func TestInfoPrintsFlagsSizesAndContexts(t *testing.T) {
	u := nbdkit(t, "--filter=blocksize-policy", "--filter=exportname", "memory", "1536K",
		"blocksize-minimum=512", "blocksize-preferred=4096", "blocksize-maximum=1M", "blocksize-error-policy=error",
		"exportdesc=fixed:a \x1b[1mbold\x1b[0m disk")
	got := want(t, exitDone, "info", u)
	expect := `protocol: newstyle-fixed without TLS, using structured packets
export="":
	description: "a \x1b[1mbold\x1b[0m disk"
	export-size: 1572864 (1536K)
	uri: ` + u + `
	contexts:
		base:allocation
	is_rotational: false
	is_read_only: false
	can_block_status_payload: false
	can_cache: true
	can_df: true
	can_fast_zero: true
	can_flush: true
	can_fua: true
	can_multi_conn: true
	can_trim: true
	can_zero: true
	block_size_minimum: 512
	block_size_preferred: 4096
	block_size_maximum: 1048576
`
	if got != expect {
		t.Errorf("got\n%s\nwant\n%s", got, expect)
	}
}

func TestInfoAgreesWithNbdinfo(t *testing.T) {
	img := disk(t)
	for name, u := range map[string]string{
		"nbdkit":      nbdkit(t, "-r", "file", img),
		"no-sr":       nbdkit(t, "--no-sr", "memory", "1000"),
		"oldstyle":    nbdkit(t, "-o", "memory", "1M"),
		"newstyle":    nbdkit(t, "--mask-handshake=0", "memory", "1M"),
		"qemu":        uri(serve(t, "qemu-nbd", "-t", "-f", "raw", "-x", "a disk", img), "a%20disk"),
		"empty":       nbdkit(t, "memory", "0"),
		"large":       nbdkit(t, "null", "7E"),
		"qemu-shared": uri(serve(t, "qemu-nbd", "-t", "-r", "-e", "4", "-f", "raw", img), ""),
	} {
		t.Run(name, func(t *testing.T) {
			var ours, theirs map[string]any
			must(t, json.Unmarshal([]byte(want(t, exitDone, "info", "--json", u)), &ours))
			must(t, json.Unmarshal([]byte(nbdinfo(t, "--json", "--no-content", u)), &theirs))
			agree(t, "", ours, theirs)
			if got := want(t, exitDone, "info", "--size", u); got != nbdinfo(t, "--size", u) {
				t.Errorf("size %q", got)
			}
		})
	}
}

// agree checks that every field of theirs is in ours with the same value.
func agree(t *testing.T, at string, ours, theirs map[string]any) {
	t.Helper()
	for k, v := range theirs {
		switch {
		case k == "exports":
			a, b := ours[k].([]any), v.([]any)
			if len(a) != len(b) {
				t.Fatalf("%d exports, nbdinfo has %d", len(a), len(b))
			}
			for i := range a {
				agree(t, fmt.Sprintf("export %d: ", i), a[i].(map[string]any), b[i].(map[string]any))
			}
		case k == "uri": // may be spelled in several ways
		case !reflect.DeepEqual(ours[k], v):
			t.Errorf("%s%s is %v, nbdinfo has %v", at, k, ours[k], v)
		}
	}
}

func TestListShowsAllExports(t *testing.T) {
	dir := t.TempDir()
	must(t, os.WriteFile(filepath.Join(dir, "one"), make([]byte, 512), 0o600))
	must(t, os.WriteFile(filepath.Join(dir, "two words"), make([]byte, 1024), 0o600))
	sock := serve(t, "nbdkit", "-f", "file", "dir="+dir)
	got := want(t, exitDone, "info", "--list", uri(sock, "ignored"))
	for _, s := range []string{`export="one":`, "export-size: 512 (512)", `export="two words":`, "export-size: 1024 (1K)",
		"uri: nbd+unix:///two%20words?socket="} {
		if !strings.Contains(got, s) {
			t.Errorf("%q is missing in\n%s", s, got)
		}
	}
	var r report
	must(t, json.Unmarshal([]byte(want(t, exitDone, "info", "-L", "--json", uri(sock, ""))), &r))
	if len(r.Exports) != 2 {
		t.Errorf("exports %+v", r.Exports)
	}
	want(t, exitDone, "info", uri(sock, "two%20words"))
	want(t, exitFailed, "info", uri(sock, "three"))
}

func TestMapAgreesWithNbdinfo(t *testing.T) {
	img := disk(t)
	for name, u := range map[string]string{
		"nbdkit": nbdkit(t, "file", img),
		"qemu":   uri(serve(t, "qemu-nbd", "-t", "-f", "raw", img), ""),
		"memory": nbdkit(t, "memory", "1M"),
		"large":  nbdkit(t, "null", "6G"),
	} {
		t.Run(name, func(t *testing.T) {
			for _, flags := range [][]string{{"--map"}, {"--map", "--totals"}, {"--map=base:allocation"}} {
				got := want(t, exitDone, append([]string{"info", u}, flags...)...)
				expect := nbdinfo(t, append(flags, "--", u)...)
				if got != expect {
					t.Errorf("%v: got\n%swant\n%s", flags, got, expect)
				}
			}
			var ours, theirs any
			must(t, json.Unmarshal([]byte(want(t, exitDone, "info", "--map", "--json", u)), &ours))
			must(t, json.Unmarshal([]byte(nbdinfo(t, "--map", "--json", u)), &theirs))
			if !reflect.DeepEqual(ours, theirs) {
				t.Errorf("JSON %v, nbdinfo has %v", ours, theirs)
			}
		})
	}
	want(t, exitFailed, "info", "--map=no:such", nbdkit(t, "memory", "1M"))
}

func TestTotalsOfSeveralStates(t *testing.T) {
	got := want(t, exitDone, "info", "--map", "--totals", nbdkit(t, "file", disk(t)))
	if expect := "   3145728  75.0%   0 data\n   1048576  25.0%   3 hole,zero\n"; got != expect {
		t.Errorf("got %q, want %q", got, expect)
	}
}

// TestMapIsPrintedAsItComes: what is known is there when the rest cannot be had.
func TestMapIsPrintedAsItComes(t *testing.T) {
	u := nbdkit(t, "eval", "get_size=echo 1G", "can_extents=exit 0", "pread=exit 1",
		`extents=[ $4 -lt 536870912 ] || { echo EIO lost >&2; exit 1; }; echo 0 268435456; echo 268435456 268435456 hole`)
	code, out, _ := ctl(t, "info", "--map", u)
	if code != exitFailed || strings.Count(out, "\n") != 1 {
		t.Errorf("exit code %d, map %q", code, out)
	}
}

func TestStatesAreBounded(t *testing.T) {
	m := &mapTotals{w: io.Discard}
	for i := range uint64(maxStates) {
		must(t, m.add(mapEntry{Len: 1, Type: i}))
	}
	if err := m.add(mapEntry{Len: 1, Type: maxStates}); err == nil {
		t.Errorf("%d states were told apart", maxStates+1)
	}
}

func TestStatesHaveNames(t *testing.T) {
	for _, tt := range []struct {
		context string
		flags   uint64
		want    string
	}{
		{"base:allocation", 0, "data"}, {"base:allocation", 1, "hole"}, {"base:allocation", 2, "zero"},
		{"base:allocation", 3, "hole,zero"}, {"base:allocation", 4, ""}, {"base:allocation", 1 << 63, ""},
		{"qemu:dirty-bitmap:b", 0, "clean"}, {"qemu:dirty-bitmap:b", 1, "dirty"},
		{"qemu:allocation-depth", 0, "unallocated"}, {"qemu:allocation-depth", 1, "local"}, {"qemu:allocation-depth", 7, "backing depth 7"},
		{"x:y", 0, ""},
	} {
		if got := state(tt.context, tt.flags); got != tt.want {
			t.Errorf("state %d of %s is %q, want %q", tt.flags, tt.context, got, tt.want)
		}
	}
}

// certificates makes a directory for nbdkit and vmdiskctl.
func certificates(t *testing.T, name string) string {
	t.Helper()
	ca, dir := transporttest.NewCA(t, "ca"), t.TempDir()
	server, client := ca.IssueServer(name), ca.IssueClient("tester")
	for file, b := range map[string][]byte{
		"ca-cert.pem":     ca.PEM(),
		"server-cert.pem": server.CertPEM(), "server-key.pem": server.KeyPEM(t),
		"client-cert.pem": client.CertPEM(), "client-key.pem": client.KeyPEM(t),
	} {
		must(t, os.WriteFile(filepath.Join(dir, file), b, 0o600))
	}
	return dir
}

func TestTLSIsAsTheURISays(t *testing.T) {
	dir := certificates(t, "disks")
	sock := serve(t, "nbdkit", "-f", "--tls=require", "--tls-verify-peer", "--tls-certificates="+dir, "memory", "1M")
	tls := strings.Replace(uri(sock, ""), "nbd+", "nbds+", 1)

	got := want(t, exitDone, "info", "--tls-certificates", dir, tls+"&tls-hostname=disks")
	if !strings.HasPrefix(got, "protocol: newstyle-fixed with TLS, using structured packets\n") {
		t.Errorf("got %s", got)
	}
	want(t, exitDone, "info", "--tls-certificates", dir, tls) // the certificate names localhost too
	want(t, exitDone, "info", tls+"&tls-certificates="+dir)
	want(t, exitFailed, "info", "--tls-certificates", dir, tls+"&tls-hostname=other")
	want(t, exitFailed, "info", "--tls-certificates", certificates(t, "disks"), tls)
	want(t, exitFailed, "info", "--tls-certificates", t.TempDir(), tls)
	want(t, exitFailed, "info", tls) // nobody that the system trusts has signed it
	want(t, exitRefused, "info", uri(sock, ""))
	want(t, exitUsage, "info", tls+"&tls-verify-peer=false")

	plain := strings.Replace(nbdkit(t, "memory", "1M"), "nbd+", "nbds+", 1)
	want(t, exitRefused, "info", "--tls-certificates", dir, plain)
}

func TestWrongUsageExitsWithTwo(t *testing.T) {
	for _, args := range [][]string{
		{}, {"bogus"}, {"info"}, {"info", "a", "b"}, {"info", "--bogus", "nbd://localhost"}, {"info", "http://localhost"},
		{"info", "/dev/null"}, {"info", "--totals", "nbd://localhost"}, {"info", "--list", "--size", "nbd://localhost"},
		{"info", "--map", "--size", "nbd://localhost"}, {"info", "nbd://localhost/?bogus=1"}, {"info", "--size", "--json", "nbd://localhost"},
		{"copy", "a"}, {"copy", "--requests=0", "a", "b"}, {"copy", "--connections=0", "a", "b"},
		{"copy", "--request-size=1", "a", "b"}, {"copy", "--request-size=1G", "a", "b"}, {"copy", "--request-size=x", "a", "b"},
		{"version", "x"},
	} {
		want(t, exitUsage, args...)
	}
}

func TestServerThatIsNotThereIsAFailure(t *testing.T) {
	want(t, exitFailed, "info", uri(filepath.Join(t.TempDir(), "none"), ""))
	want(t, exitFailed, "copy", uri(filepath.Join(t.TempDir(), "none"), ""), filepath.Join(t.TempDir(), "x"))
}

func TestVersionAndCompletion(t *testing.T) {
	if got := want(t, exitDone, "--version"); got != want(t, exitDone, "version") {
		t.Errorf("--version is %q, unlike the command", got)
	}
	if got := want(t, exitDone, "version"); !strings.HasPrefix(got, "vmdiskctl "+version.Version+" (") {
		t.Errorf("version is %q", got)
	}
	for _, shell := range []string{"bash", "zsh", "fish"} {
		if got := want(t, exitDone, "completion", shell); !strings.Contains(got, "vmdiskctl") {
			t.Errorf("completion for %s is %q", shell, got)
		}
	}
}

func TestSizesReadAndWrite(t *testing.T) {
	for _, tt := range []struct {
		in, out string
		n       int64
	}{
		{"0", "0", 0}, {"512", "512", 512}, {"1k", "1K", 1024}, {"1536K", "1536K", 1536 << 10}, {"4M", "4M", 4 << 20},
		{"7E", "7E", 7 << 60}, {"100b", "100", 100},
	} {
		var b byteSize
		if err := b.Set(tt.in); err != nil || int64(b) != tt.n || b.String() != tt.out {
			t.Errorf("%q reads as %d, writes as %q, error %v", tt.in, b, b.String(), err)
		}
	}
	for _, in := range []string{"", "K", "-1", "+5", "+", "-0", "8E", "1.5M", "1MB", "0x10"} {
		var b byteSize
		if err := b.Set(in); err == nil {
			t.Errorf("%q reads as %d", in, b)
		}
	}
}
