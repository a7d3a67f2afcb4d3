package daemon

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/engine/bufpool"
	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd"
)

// silentImages are files whose storage does not answer until answer has it: FUSE with
// a server that is stopped.
func silentImages(t *testing.T, n int) (paths []string, answer func(bool)) {
	t.Helper()
	dir := t.TempDir()
	var args []string
	for i := range n {
		path := filepath.Join(dir, fmt.Sprint(i))
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		paths = append(paths, path)
		args = append(args, "--blockdev", fmt.Sprintf("null-co,node-name=n%d,size=1048576,read-zeroes=on", i),
			"--export", fmt.Sprintf("fuse,id=e%d,node-name=n%d,writable=on,mountpoint=%s", i, i, path))
	}
	cmd := exec.Command("qemu-storage-daemon", args...)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { // by force: it does not always end of itself with requests in flight
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		for _, path := range paths {
			_ = unix.Unmount(path, unix.MNT_DETACH)
		}
	})
	for _, path := range paths {
		eventually(t, "the file is that of FUSE", func() bool {
			var st unix.Statfs_t
			return unix.Statfs(path, &st) == nil && st.Type == unix.FUSE_SUPER_MAGIC
		})
	}
	answer = func(yes bool) {
		sig := syscall.SIGSTOP
		if yes {
			sig = syscall.SIGCONT
		}
		if err := cmd.Process.Signal(sig); err != nil {
			t.Error(err)
		}
	}
	answer(false)
	return paths, answer
}

// eventually waits until something is so.
func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for late := time.After(time.Minute); !is(); {
		select {
		case <-tick.C:
		case <-late:
			t.Fatalf("it is not so that %s", what)
		}
	}
}

// readyService is an emptyService that opens images as one that serves does.
func readyService(t *testing.T) *daemon {
	d := emptyService(t)
	d.engine, d.buffers = engine.NewPool(2), bufpool.New(limits.BufferBudget)
	d.server = nbd.NewServer(nbd.Options{Exports: d.exports, Engine: d.engine, Buffers: d.buffers})
	t.Cleanup(func() {
		_ = d.server.Shutdown(context.Background())
		for _, x := range d.exports.Status() {
			_ = d.retire(context.Background(), d.disks.get(x.Spec.Name), nil)
		}
		_ = d.engine.Close()
	})
	return d
}

// wantAllAsked waits until n calls wait for storage, has it answer, and returns what
// came of step, which may not have ended before.
func wantAllAsked(t *testing.T, d *daemon, n int, answer func(bool), step func() error) {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- step() }()
	eventually(t, fmt.Sprintf("%d images are asked for at a time", n), func() bool {
		return len(d.asking.places()) == n || len(done) > 0
	})
	if len(done) > 0 {
		t.Errorf("the step ended with %d images asked for, want all %d to be waited for", len(d.asking.places()), n)
	}
	answer(true)
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// wantServed checks the images of the exports that are open.
func wantServed(t *testing.T, d *daemon, images []string) {
	t.Helper()
	for i, path := range images {
		if k := d.disks.find(fmt.Sprint(i)); k == nil || k.cfg.Image != path {
			t.Errorf("export %d is %+v, want it open with %s", i, k, path)
		}
	}
}

// changes are those of exports of raw images, named by their places.
func changes(what config.What, images []string) (list []config.ExportChange) {
	for i, path := range images {
		x := config.Export{Name: fmt.Sprint(i), Format: "raw", Image: path}
		x.SetDefaults()
		list = append(list, config.ExportChange{What: what, Name: x.Name, New: &x})
	}
	return list
}

// TestReloadAsksForAllImagesAtOnce, whether they are new, or what an export is opened
// anew with. What it was is open.
func TestReloadAsksForAllImagesAtOnce(t *testing.T) {
	const n = 3
	answering := func(t *testing.T) (paths []string) {
		dir := t.TempDir()
		for i := range n {
			paths = append(paths, filepath.Join(dir, fmt.Sprint(i)))
			if err := os.WriteFile(paths[i], make([]byte, 4096), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		return paths
	}
	add := func(t *testing.T, d *daemon, images []string) func() error {
		return func() error {
			r := &reload{d: d, change: &config.Change{Exports: changes(config.Add, images)}}
			err := r.addExports(t.Context())
			if err == nil && len(r.opened) != n {
				t.Errorf("%d exports can be taken back, want %d", len(r.opened), n)
			}
			return err
		}
	}
	alter := func(t *testing.T, d *daemon, images []string) func() error {
		return func() error {
			_, over, err := d.reopen(t.Context(), changes(config.Alter, images)...)
			over()
			return err
		}
	}
	t.Run("new", func(t *testing.T) {
		d := readyService(t)
		silent, answer := silentImages(t, n)
		wantAllAsked(t, d, n, answer, add(t, d, silent))
		wantServed(t, d, silent)
	})
	t.Run("opened anew", func(t *testing.T) {
		well := answering(t)
		d := readyService(t)
		silent, answer := silentImages(t, n)
		if err := add(t, d, well)(); err != nil {
			t.Fatal(err)
		}
		wantAllAsked(t, d, n, answer, alter(t, d, silent))
		wantServed(t, d, silent)
	})
}
