package guest

import (
	"bufio"
	"context"
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// syncingInit is the first process of a disk: it holds the files that it wrote
// before against their sums, and writes more, each made durable before the
// console has its name and sum, until somebody ends it. With the argument "last"
// it writes none and ends in good order.
const syncingInit = `#!/bin/busybox sh
export PATH=/bin
mount -t proc proc /proc
report() { printf '\nLAB-RC=%s\n' "$1"; sync; poweroff -f; }
trap 'report 1' EXIT
set -e
cd /data
touch sums
[ ! -s sums ] || sha256sum -c sums >/dev/null
printf '\nVERIFIED %s\n' $(wc -l <sums)
if [ "$1" = last ]; then
	mount -o remount,ro /
	trap - EXIT
	report 0
fi
i=$(wc -l <sums)
while :; do
	i=$((i+1))
	dd if=/dev/urandom of=file$i bs=1000 count=$((i*37%200+1)) conv=fsync 2>/dev/null
	sum=$(sha256sum file$i)
	echo "$sum" | dd of=sums oflag=append conv=notrunc,fsync 2>/dev/null
	printf '\nSYNCED %s\n' "$sum"
	dd if=/dev/urandom of=scratch bs=64k count=8 2>/dev/null
	[ $((i%5)) != 0 ] || rm scratch
done
`

// synced is a file of the guest that is durable.
type synced struct{ name, sum string }

// runUntil boots the guest and calls enough once it has synced n files; that
// must end QEMU. It returns all files that the console names.
func runUntil(t *testing.T, in *initramfs, socket string, n int, enough func(q *os.Process)) (files []synced) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), bootPatience)
	defer cancel()
	cmd, err := command(ctx, in, testenv.TempDir(t), 256, nbdRoot(socket)...)
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = cmd.Stdout
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var console strings.Builder
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		line := strings.TrimSpace(lines.Text())
		fmt.Fprintln(&console, line)
		if f := strings.Fields(line); len(f) == 3 && f[0] == "SYNCED" {
			if files = append(files, synced{name: f[2], sum: f[1]}); len(files) == n {
				enough(cmd.Process)
			}
		}
	}
	_ = cmd.Wait() // it was killed
	if len(files) < n {
		t.Fatalf("the guest has synced %d files, want %d; console:\n%s", len(files), n, console.String())
	}
	return files
}

// wantNoCorruption holds an image against qemu-img check: leaks are no fault.
func wantNoCorruption(t *testing.T, image string) {
	t.Helper()
	const onlyLeaks = 3
	var out []byte
	var err error
	// The kernel lets go of what an io_uring had locked a while after its
	// process.
	if late := testenv.Await(testenv.Context(t), func() bool {
		out, err = exec.Command(testenv.Path(t, "qemu-img"), "check", "-f", "qcow2", image).CombinedOutput()
		return !strings.Contains(string(out), `"write" lock`)
	}); late != nil {
		t.Fatalf("qemu-img check: %v: %s", late, out)
	}
	if exit, ok := err.(*exec.ExitError); err != nil && (!ok || exit.ExitCode() != onlyLeaks) {
		t.Fatalf("qemu-img check: %v: %s", err, out)
	}
}

// TestSyncedFilesOutliveKills: a guest on an overlay loses its server in the
// middle of writing, then its QEMU and the server at once. It boots again each
// time, and finds all that it had made durable.
func TestSyncedFilesOutliveKills(t *testing.T) {
	requireGuest(t)
	if k := testenv.Under(t); k.Program != "" {
		t.Skipf("is about vmdiskd, not %s", k.Name)
	}
	testenv.Require(t, "qemu-img")
	t.Parallel()
	base := makeRoot(t, syncingInit)
	image := filepath.Join(filepath.Dir(base), "top.qcow2")
	testenv.Run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", image)
	o := testenv.Options{Image: image, Format: "qcow2", Extra: []string{"--backing=same-dir"}}
	kernel := testenv.CloudKernel(t, kernels[0])
	var files []synced
	for _, server := range []bool{true, false} {
		s := testenv.StartToKill(t, o)
		files = append(files, runUntil(t, rootInitramfs(t, kernel, ""), s.Socket, 12, func(q *os.Process) {
			if server {
				s.Kill()
			}
			_ = q.Kill()
			s.Kill()
		})...)
		wantNoCorruption(t, image)
	}
	s := testenv.Start(t, o)
	console := mustBoot(t, rootInitramfs(t, kernel, "last"), 256, nbdRoot(s.Socket)...)
	if err := s.Stop(); err != nil {
		t.Fatal(err)
	}
	wantNoCorruption(t, image)
	disk := filepath.Join(testenv.TempDir(t), "disk.raw")
	testenv.Run(t, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, disk)
	if out, err := testenv.Try(t, "e2fsck", "-fn", disk); err != nil {
		t.Errorf("the file system is not clean: %v\n%s", err, out)
	}
	for _, f := range files {
		if got := fmt.Sprintf("%x", sha256.Sum256(dump(t, disk, "/data/"+f.name))); got != f.sum {
			t.Errorf("%s has the sum %s, the guest saw %s", f.name, got, f.sum)
		}
	}
	if t.Failed() {
		t.Logf("console:\n%s", console)
	}
}

// rootInitramfs hands over to the disk, whose first process gets an argument.
func rootInitramfs(t *testing.T, k testenv.Kernel, argument string) *initramfs {
	t.Helper()
	in, err := newInitramfs(testenv.Context(t), k, "", "virtio_pci", "virtio_blk", "ext4")
	if err != nil {
		t.Fatal(err)
	}
	in.addFile("init", 0o755, []byte(prelude+strings.TrimSpace(enterRoot)+" "+argument+"\n"))
	return in
}
