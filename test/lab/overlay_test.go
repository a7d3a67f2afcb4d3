package lab

import (
	"bufio"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// syncedFiles is how many files the guest has made durable when its server is
// killed.
const syncedFiles = 8

// tellingUnit runs /lab/tell, whose output is the second serial port, once the
// system is up.
const tellingUnit = `[Unit]
After=basic.target

[Service]
Type=exec
ExecStart=/bin/sh -e /lab/tell
StandardOutput=file:/dev/ttyS1
StandardError=inherit
`

// powerOff has the script end with its status, and the system with all that
// systemd does for it.
const powerOff = `
trap 'echo "STATUS $?"; systemctl start --no-block poweroff.target' EXIT
[ "$(cat /proc/1/comm)" = systemd ]
`

// writeOn writes files until somebody ends it. Each is durable before its sum
// and name are told, and its sum stands in a file that is durable as well. Beside
// that, the disk is written to all the time: files come and go that nobody
// syncs, and what they had is trimmed.
const writeOn = powerOff + `
mount -o remount,discard /
mkdir /srv/data
cd /srv/data
head -c 1M /dev/urandom >/run/loose
while :; do
	for i in 1 2 3; do
		dd if=/run/loose of=/srv/loose$i bs=64k oflag=direct status=none
	done
	rm /srv/loose2
done &
i=0
while :; do
	i=$((i+1))
	head -c $((i*37%200*1000+1)) /dev/urandom >file$i
	sync file$i .
	sum=$(sha256sum file$i)
	echo "$sum" >>sums
	sync sums .
	echo "FILE $sum"
done
`

// readBack is for the next start of the same system: the journal of its file
// system was replayed, all that was synced is there, and it is written to again.
const readBack = powerOff + `
dmesg | grep 'EXT4-fs (vda): recovery complete'
cd /srv/data
sha256sum --quiet --strict -c sums
rm -f /srv/loose*
head -c 5M /dev/urandom >file0
echo "FILE $(sha256sum file0)"
`

// toldFile is a file of /srv/data and what the guest says is its sum.
type toldFile struct{ name, sum string }

// bootExport boots the guest from an NBD export until QEMU ends, and returns the
// files that the script tells, and the status by which it ends, if it does. Once
// there are n files, it calls enough, which is to end QEMU.
func bootExport(t *testing.T, socket, script string, n int, enough func(q *os.Process)) (files []toldFile, status string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), bootPatience)
	defer cancel()
	console := filepath.Join(testenv.TempDir(t), "console")
	cmd, err := exportMachine(ctx, testenv.TempDir(t), socket, script, console)
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
	var log strings.Builder
	for told := bufio.NewScanner(out); told.Scan(); {
		fmt.Fprintln(&log, clean(told.Bytes()))
		f := strings.Fields(told.Text())
		switch {
		case len(f) == 3 && f[0] == "FILE":
			if files = append(files, toldFile{name: f[2], sum: f[1]}); len(files) == n {
				enough(cmd.Process)
			}
		case len(f) == 2 && f[0] == "STATUS":
			status = f[1]
		}
	}
	_ = cmd.Wait() // it may have been killed
	t.Cleanup(func() {
		if t.Failed() {
			text, _ := os.ReadFile(console)
			t.Logf("console:\n%s\nthe guest tells:\n%s", tail(clean(text)), tail(log.String()))
		}
	})
	return files, status
}

// exportMachine is QEMU with an NBD export as the first disk, the second serial
// port as its output, and the console in a file.
func exportMachine(ctx context.Context, dir, socket, script, console string) (*exec.Cmd, error) {
	const unit = "/etc/systemd/system/tell.service"
	s := Scenario{
		Text:   map[string]string{unit: tellingUnit, "/lab/tell": script},
		Links:  map[string]string{"/etc/systemd/system/multi-user.target.wants/tell.service": unit},
		Append: "systemd.mask=serial-getty@ttyS0.service",
		Root: []string{
			"-blockdev", "driver=nbd,node-name=root,discard=unmap,server.type=unix,server.path=" + socket,
			"-device", "virtio-blk-pci,drive=root",
		},
	}
	m, err := s.machine(ctx, dir, "", nil)
	if err != nil {
		return nil, err
	}
	m.Serial = "file:" + console
	m.Devices = append(m.Devices, "-serial", "stdio")
	return m.Command(ctx)
}

// awaitWrite returns when the image has been written to since the call.
func awaitWrite(t *testing.T, image string) {
	t.Helper()
	stat := func() os.FileInfo {
		st, err := os.Stat(image)
		if err != nil {
			t.Fatal(err)
		}
		return st
	}
	before := stat().ModTime()
	if err := testenv.Await(testenv.Context(t), func() bool { return !stat().ModTime().Equal(before) }); err != nil {
		t.Fatalf("nobody writes to %s: %v", image, err)
	}
}

// wantCleanImage holds an image against both programs that check it.
func wantCleanImage(t *testing.T, image string) {
	t.Helper()
	for _, argv := range [][]string{
		{testenv.Binary(t, "vmdiskctl"), "image", "check", image},
		{"qemu-img", "check", "-f", "qcow2", image},
	} {
		if out, err := testenv.Try(t, argv...); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
	}
}

// takeBackLeaks repairs an image whose server was killed: leaks are no fault,
// anything else is. The kernel lets go of what an io_uring had locked a while
// after its process.
func takeBackLeaks(t *testing.T, image string) {
	t.Helper()
	var err error
	if late := testenv.Await(testenv.Context(t), func() bool {
		_, err = testenv.Try(t, testenv.Binary(t, "vmdiskctl"), "image", "check", "--repair=leaks", image)
		return err == nil || !strings.Contains(err.Error(), string(backing.ErrLocked))
	}); late != nil || err != nil {
		t.Fatalf("after the kill: %v, %v", late, err)
	}
	wantCleanImage(t, image)
}

// fileSum is the SHA-256 of a file.
func fileSum(t *testing.T, name string) string {
	t.Helper()
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%x", h.Sum(nil))
}

// overlayOfDebian makes an empty overlay above the image of the lab's Debian,
// which is converted to compressed clusters.
func overlayOfDebian(t *testing.T) (base, top string) {
	t.Helper()
	image := (&Scenario{}).image(t)
	dir := testenv.TempDir(t)
	base, top = filepath.Join(dir, "debian.qcow2"), filepath.Join(dir, "top.qcow2")
	testenv.Run(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", "-o", "compression_type=zstd", image, base)
	if err := os.Chmod(base, 0o444); err != nil {
		t.Fatal(err)
	}
	testenv.Run(t, testenv.Binary(t, "vmdiskctl"), "image", "create", top, "--backing-file", filepath.Base(base), "--backing-format", "qcow2")
	return base, top
}

// checkDisk looks at the file system of a disk from outside.
func checkDisk(t *testing.T, disk string, files []toldFile) {
	t.Helper()
	if out, err := testenv.Try(t, "e2fsck", "-fn", disk); err != nil || strings.Contains(out, "recovery") {
		t.Errorf("the file system is not clean: %v\n%s", err, out)
	}
	dir := testenv.TempDir(t)
	for _, f := range files {
		file := filepath.Join(dir, f.name)
		testenv.Run(t, "debugfs", "-R", "dump /srv/data/"+f.name+" "+file, disk)
		if got := fileSum(t, file); got != f.sum {
			t.Errorf("%s has the sum %s, the guest saw %s", f.name, got, f.sum)
		}
	}
}

// TestDebianOnAnOverlayOutlivesAKill boots Debian from a qcow2 image above a
// compressed one. Its server is killed while it writes, and QEMU right after.
// Both start again: what the guest had synced is there, it writes on and is
// powered off in good order. Then nothing is wrong with the images, nor with
// the file system, and the lower image is what it was.
func TestDebianOnAnOverlayOutlivesAKill(t *testing.T) {
	t.Parallel()
	Require(t)
	for _, tool := range []string{"qemu-img", "nbdcopy", "e2fsck", "debugfs"} {
		if _, err := testenv.Tool(tool); err != nil {
			lacks(t, err)
		}
	}
	base, top := overlayOfDebian(t)
	baseSum := fileSum(t, base)
	o := testenv.Options{Image: top, Format: "qcow2", Extra: []string{"--backing=same-dir"}}

	s := testenv.StartToKill(t, o)
	files, _ := bootExport(t, s.Socket, writeOn, syncedFiles, func(q *os.Process) {
		awaitWrite(t, top)
		s.Kill()
		_ = q.Kill()
	})
	if len(files) < syncedFiles {
		t.Fatalf("the guest has synced %d files, want %d", len(files), syncedFiles)
	}
	takeBackLeaks(t, top)

	s = testenv.StartToKill(t, o)
	more, status := bootExport(t, s.Socket, readBack, 0, nil)
	if status != "0" {
		t.Errorf("the script of the second boot ends with status %q, want 0", status)
	}
	disk := filepath.Join(testenv.TempDir(t), "disk.raw")
	testenv.Run(t, "nbdcopy", s.URI, disk)
	if err := s.Stop(); err != nil {
		t.Error(err)
	}
	checkDisk(t, disk, append(files, more...))
	testenv.Run(t, "qemu-img", "compare", "-f", "raw", "-F", "qcow2", disk, top)
	wantCleanImage(t, top)
	wantCleanImage(t, base)
	if got := fileSum(t, base); got != baseSum {
		t.Errorf("the lower image has the sum %s, want %s as before", got, baseSum)
	}
}
