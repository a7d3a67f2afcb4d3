package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// same fails unless qemu-img finds both images equal.
func same(t *testing.T, a, b string) {
	t.Helper()
	if out, err := exec.Command("qemu-img", "compare", "-f", "raw", "-F", "raw", a, b).CombinedOutput(); err != nil {
		t.Errorf("qemu-img compare %s %s: %v: %s", a, b, err, out)
	}
}

func allocated(t *testing.T, path string) int64 {
	t.Helper()
	var st syscall.Stat_t
	must(t, syscall.Stat(path, &st))
	return st.Blocks * 512
}

func TestCopyInAllDirections(t *testing.T) {
	img := disk(t)
	file := func() string { return filepath.Join(t.TempDir(), "copy") }
	for _, tt := range []struct{ name, from, to string }{
		{"file to file", img, file()},
		{"nbdkit to file", nbdkit(t, "file", img), file()},
		{"qemu-nbd to file", uri(serve(t, "qemu-nbd", "-t", "-r", "-f", "raw", img), ""), file()},
		{"file to nbdkit", img, nbdkit(t, "memory", "4M")},
		{"file to larger nbdkit", img, nbdkit(t, "memory", "5M")},
		{"nbdkit to nbdkit", nbdkit(t, "file", img), nbdkit(t, "memory", "4M")},
		{"simple replies", nbdkit(t, "--no-sr", "file", img), nbdkit(t, "--no-sr", "memory", "4M")},
		{"oldstyle to file", nbdkit(t, "-o", "file", img), file()},
		{"without zero command", img, nbdkit(t, "--filter=nozero", "memory", "4M")},
		{"block size 4096", img, nbdkit(t, "--filter=blocksize-policy", "memory", "4M", "blocksize-minimum=4096",
			"blocksize-maximum=64K", "blocksize-error-policy=error")},
	} {
		t.Run(tt.name, func(t *testing.T) {
			want(t, exitDone, "copy", "--verify", tt.from, tt.to)
			same(t, img, tt.to)
		})
	}
}

// TestCopyMakesDoWithTheConnectionsItGets unless it was told how many.
func TestCopyMakesDoWithTheConnectionsItGets(t *testing.T) {
	img := disk(t)
	for _, tt := range []struct {
		limit string
		code  int
		args  []string
	}{
		{"1", exitDone, nil},
		{"3", exitDone, nil},
		{"2", exitDone, []string{"--connections=2"}},
		{"2", exitFailed, []string{"--connections=4"}},
	} {
		full := nbdkit(t, "--filter=limit", "file", img, "limit="+tt.limit)
		dst := filepath.Join(t.TempDir(), "copy")
		want(t, tt.code, append([]string{"copy", full, dst}, tt.args...)...)
		if tt.code == exitDone {
			same(t, img, dst)
		}
	}
}

func TestCopyOverNonZeroDestination(t *testing.T) {
	img := disk(t)
	dst := filepath.Join(t.TempDir(), "old")
	must(t, os.WriteFile(dst, []byte(strings.Repeat("old data", 1<<20)), 0o600))
	want(t, exitDone, "copy", img, dst)
	got, err := os.ReadFile(dst)
	must(t, err)
	src, err := os.ReadFile(img)
	must(t, err)
	if string(got[:len(src)]) != string(src) || string(got[len(src):]) != strings.Repeat("old data", 1<<19) {
		t.Error("the destination is not the source followed by what was there")
	}
}

func TestCopyKeepsHoles(t *testing.T) {
	img := disk(t)
	for _, from := range []string{img, nbdkit(t, "file", img), nbdkit(t, "--no-sr", "file", img)} {
		dst := filepath.Join(t.TempDir(), "sparse")
		want(t, exitDone, "copy", from, dst)
		// 2 MiB of data; zeroes that were allocated are made holes as well.
		if n := allocated(t, dst); n > 2<<20+128<<10 {
			t.Errorf("%s: %d bytes are allocated", from, n)
		}
		full := filepath.Join(t.TempDir(), "full")
		want(t, exitDone, "copy", "--allocated", from, full)
		if n := allocated(t, full); n < 4<<20 {
			t.Errorf("%s: %d bytes are allocated with --allocated", from, n)
		}
		same(t, dst, full)
	}
}

func TestHolesReachTheExport(t *testing.T) {
	u := nbdkit(t, "memory", "4M")
	want(t, exitDone, "copy", disk(t), u)
	got := want(t, exitDone, "info", "--map", "--totals", u)
	if !strings.Contains(got, "2097152  50.0%   3 hole,zero") {
		t.Errorf("map of the destination: %s", got)
	}
}

func TestSmallerDestinationIsRefused(t *testing.T) {
	img := disk(t)
	small := filepath.Join(t.TempDir(), "small")
	must(t, os.WriteFile(small, []byte("keep me"), 0o600))
	want(t, exitRefused, "copy", img, small)
	if got, err := os.ReadFile(small); err != nil || string(got) != "keep me" {
		t.Errorf("the refused destination is now %q, %v", got, err)
	}
	want(t, exitRefused, "copy", img, nbdkit(t, "memory", "4194303"))
	want(t, exitRefused, "copy", img, nbdkit(t, "-r", "memory", "4M"))
	want(t, exitRefused, "copy", img, img)
	link := filepath.Join(t.TempDir(), "link")
	must(t, os.Link(img, link))
	want(t, exitRefused, "copy", img, link)
}

// TestDiskInUseIsNotCopied neither to nor from: its bytes change under the copy,
// or under the machine that has it.
func TestDiskInUseIsNotCopied(t *testing.T) {
	img, used := disk(t), filepath.Join(t.TempDir(), "used")
	must(t, os.WriteFile(used, []byte(strings.Repeat("guest's.", 1<<19)), 0o600))
	u := uri(serve(t, "qemu-nbd", "-t", "-f", "raw", used), "")
	want(t, exitDone, "info", u) // it has opened the image
	_, _, stderr := ctl(t, "copy", img, used)
	if !strings.Contains(stderr, "has it open for writing") {
		t.Errorf("a copy over a disk in use says %q", stderr)
	}
	want(t, exitFailed, "copy", img, used)
	if got, err := os.ReadFile(used); err != nil || string(got) != strings.Repeat("guest's.", 1<<19) {
		t.Errorf("the disk in use was overwritten: it begins with %q, %v", got[:min(8, len(got))], err)
	}
	to := filepath.Join(t.TempDir(), "copy")
	want(t, exitFailed, "copy", used, to)
	if _, err := os.Stat(to); err == nil {
		t.Error("a copy that was not begun has left a file")
	}
	want(t, exitDone, "copy", "-U", used, to)
	same(t, used, to)
	want(t, exitUsage, "copy", "--force-share", u, to)
}

func TestErrorsFailTheCopy(t *testing.T) {
	img := disk(t)
	for _, tt := range []struct {
		name     string
		from, to string
	}{
		{"all reads", nbdkit(t, "--filter=error", "file", img, "error-pread=EIO", "error-pread-rate=100%"), ""},
		{"some reads", nbdkit(t, "--filter=error", "file", img, "error-pread=EIO", "error-pread-rate=20%"), ""},
		{"some reads of simple replies", nbdkit(t, "--no-sr", "--filter=error", "file", img, "error-pread=EIO", "error-pread-rate=30%"), ""},
		{"writes", img, nbdkit(t, "--filter=error", "memory", "4M", "error-pwrite=ENOSPC", "error-pwrite-rate=100%")},
		{"zeroes", img, nbdkit(t, "--filter=error", "memory", "4M", "error-zero=EIO", "error-zero-rate=100%")},
		{"flush", img, nbdkit(t, "eval", "get_size=echo 4M", "pread=head -c $3 /dev/zero", "pwrite=cat >/dev/null",
			"can_write=exit 0", "can_flush=exit 0", "flush=echo EIO >&2; exit 1", "can_multi_conn=exit 0")},
	} {
		t.Run(tt.name, func(t *testing.T) {
			to := tt.to
			if to == "" {
				to = filepath.Join(t.TempDir(), "copy")
			}
			want(t, exitFailed, "copy", "--request-size=32K", tt.from, to)
			if _, err := os.Stat(to); err == nil {
				t.Error("half a copy was left behind")
			}
		})
	}
}

func TestUnreadableExtentsAreCopiedAsData(t *testing.T) {
	img := disk(t)
	dst := filepath.Join(t.TempDir(), "copy")
	want(t, exitDone, "copy", nbdkit(t, "--filter=error", "file", img, "error-extents=EIO", "error-extents-rate=100%"), dst)
	same(t, img, dst)
}

func TestVerifyCatchesAServerThatLies(t *testing.T) {
	liar := nbdkit(t, "eval", "get_size=echo 4M", "pread=head -c $3 /dev/zero", "pwrite=cat >/dev/null", "can_write=exit 0")
	img := disk(t)
	want(t, exitDone, "copy", img, liar)
	want(t, exitFailed, "copy", "--verify", img, liar)
}

func TestDestinationIsZeroIsBelieved(t *testing.T) {
	u := nbdkit(t, "pattern", "4M")
	dirty := filepath.Join(t.TempDir(), "dirty")
	want(t, exitDone, "copy", u, dirty)
	want(t, exitDone, "copy", "--destination-is-zero", disk(t), dirty)
	p, err := os.ReadFile(dirty)
	must(t, err)
	if p[1<<20+15] == 0 {
		t.Error("zeroes were written where the destination was said to be zero")
	}
}

func TestProgressIsShownWhenAsked(t *testing.T) {
	img := disk(t)
	code, _, stderr := ctl(t, "copy", "--progress", img, filepath.Join(t.TempDir(), "copy"))
	if code != exitDone || !strings.Contains(stderr, "100% 4.00 MiB of 4.00 MiB") {
		t.Errorf("exit code %d, %q", code, stderr)
	}
	if _, _, stderr := ctl(t, "copy", img, filepath.Join(t.TempDir(), "copy")); stderr != "" {
		t.Errorf("a pipe was shown %q", stderr)
	}
}

func TestInterruptedCopyFailsAndLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	dst, log := filepath.Join(dir, "copy"), filepath.Join(dir, "log")
	// A read takes longer than any test may.
	u := nbdkit(t, "--filter=log", "--filter=delay", "pattern", "1M", "delay-read=3600", "logfile="+log)
	exe, err := os.Executable()
	must(t, err)
	cmd := exec.Command(exe, "copy", "--request-size=4K", u, dst)
	cmd.Env = append(os.Environ(), asMain+"=1")
	var said strings.Builder
	cmd.Stderr = &said
	must(t, cmd.Start())
	t.Cleanup(func() { cmd.Process.Kill() })
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for {
		if b, _ := os.ReadFile(log); strings.Contains(string(b), " Read id=") {
			break
		}
		<-tick.C
	}
	must(t, cmd.Process.Signal(os.Interrupt))
	cmd.Wait()
	if cmd.ProcessState.ExitCode() != exitFailed || !strings.Contains(said.String(), "interrupted") {
		t.Errorf("%v: %s", cmd.ProcessState, said.String())
	}
	if _, err := os.Stat(dst); err == nil {
		t.Error("half a copy was left behind")
	}
}

// TestCopiesAreTheirMakers: nobody else reads what may be a guest's disk.
func TestCopiesAreTheirMakers(t *testing.T) {
	img, dir := disk(t), t.TempDir()
	defer syscall.Umask(syscall.Umask(0))
	for _, args := range [][]string{{img, filepath.Join(dir, "raw")}, {"-O", "qcow2", img, filepath.Join(dir, "qcow2")}} {
		want(t, exitDone, append([]string{"copy"}, args...)...)
		if st, err := os.Stat(args[len(args)-1]); err != nil || st.Mode() != 0o600 {
			t.Errorf("%s: %v, %v", args, st.Mode(), err)
		}
	}
}
