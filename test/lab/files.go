package lab

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/vmdiskd/vmdiskd/test/guest"
	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// enter goes on in the initramfs: it unpacks the second disk into the first
// and gives the files their labels, as long as no policy is loaded that could
// refuse it, and hands over to systemd. A folder is labelled with all that is in
// it: only those that are new are.
const enter = `
i=0
while [ ! -b /dev/vda ] || [ ! -b /dev/vdb ] && [ $i -lt 100 ]; do sleep 0.1; i=$((i+1)); done
mount -t ext4 /dev/vda /mnt
tar -xf /dev/vdb -C / lab/folders
while read -r dir; do
	[ -e "/mnt$dir" ] || [ ! -e "/mnt${dir%/*}" ] || echo "$dir"
done </lab/folders >/new
tar -xf /dev/vdb -C /mnt || echo "lab: cannot unpack the files"
cat /new >>/mnt/lab/labels
mount -t proc proc /mnt/proc
chroot /mnt /sbin/setfiles -F -f /lab/labels /etc/selinux/default/contexts/files/file_contexts || echo "lab: cannot label the files"
mount --move /dev /mnt/dev
umount /mnt/proc /run /sys /proc
exec switch_root /mnt /sbin/init
`

// runner is the service that runs the steps. Its context is that of root at a
// terminal.
const runner = `[Unit]
Description=Steps of the scenario
After=basic.target

[Service]
Type=exec
ExecStart=/bin/sh /lab/run
SELinuxContext=unconfined_u:unconfined_r:unconfined_t:s0-s0:c0.c1023
StandardInput=null
StandardOutput=file:/dev/ttyS1
StandardError=inherit
Environment=HOME=/root
`

// runSteps ends the guest itself: systemd would take its time.
const runSteps = `mkdir -p /lab/out
for dir in /lab/steps/*/; do
	name=$(cat "$dir/name")
	printf '\nLAB-BEGIN %s\n' "$name"
	timeout -k 5 "$(cat "$dir/seconds")" sh -ec '. /lab/functions; set -x; . "$0"' "$dir/script"
	printf '\nLAB-STEP=%s %s\n' "$?" "$name"
done
journalctl --boot --no-pager --output=short-monotonic >/lab/out/journal
tar -cf /dev/vdc -C /lab/out .
printf '\nLAB-RC=%s\n' "$?"
sync
poweroff --force --force
`

// functions are there in each step.
const functions = `fails() {
	if "$@"; then
		echo "does not fail: $*"
		exit 9
	fi
}
await() {
	until "$@"; do
		sleep 0.2
	done
}
`

// archive writes the files of a guest. The first error sticks.
type archive struct {
	w     *tar.Writer
	names []string
	err   error
}

func (a *archive) add(h tar.Header, data []byte) {
	h.Name = strings.TrimPrefix(path.Clean(h.Name), "/")
	h.Size, h.ModTime = int64(len(data)), time.Now()
	a.names = append(a.names, "/"+h.Name)
	if a.err == nil {
		a.err = a.w.WriteHeader(&h)
	}
	if a.err == nil {
		_, a.err = a.w.Write(data)
	}
}

// text adds a file, which is executable if it begins with "#!".
func (a *archive) text(name, data string) {
	mode := int64(0o644)
	if strings.HasPrefix(data, "#!") {
		mode = 0o755
	}
	a.add(tar.Header{Name: name, Mode: mode}, []byte(data))
}

// file adds a file of the host.
func (a *archive) file(name, from string) {
	st, err := os.Stat(from)
	if err == nil && !st.Mode().IsRegular() {
		err = fmt.Errorf("%q is no file", from)
	}
	if err != nil {
		a.err = errors.Join(a.err, err)
		return
	}
	data, err := os.ReadFile(from)
	if err != nil {
		a.err = errors.Join(a.err, err)
		return
	}
	a.add(tar.Header{Name: name, Mode: int64(st.Mode().Perm())}, data)
}

// close adds the lists of what has to be labelled, and of the folders that may
// be new.
func (a *archive) close() error {
	folders := map[string]bool{}
	for _, name := range a.names {
		for dir := path.Dir(name); dir != "/"; dir = path.Dir(dir) {
			folders[dir] = true
		}
	}
	a.text("/lab/labels", strings.Join(a.names, "\n")+"\n/lab\n")
	a.text("/lab/folders", strings.Join(slices.Sorted(maps.Keys(folders)), "\n")+"\n")
	return errors.Join(a.err, a.w.Close())
}

// writeFiles writes all that the guest has beside the image.
func (s *Scenario) writeFiles(name string, kernel testenv.Kernel, steps []Step) error {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	a := &archive{w: tar.NewWriter(f)}
	err = a.kernelModules(kernel, append(slices.Clone(Modules), s.Modules...))
	for _, to := range slices.Sorted(maps.Keys(s.Files)) {
		a.file(to, s.Files[to])
	}
	for _, to := range slices.Sorted(maps.Keys(s.Text)) {
		a.text(to, s.Text[to])
	}
	for _, to := range slices.Sorted(maps.Keys(s.Links)) {
		a.add(tar.Header{Typeflag: tar.TypeSymlink, Name: to, Linkname: s.Links[to], Mode: 0o777}, nil)
	}
	if len(steps) > 0 {
		a.steps(steps)
	}
	return errors.Join(err, a.close(), f.Close())
}

func (a *archive) steps(steps []Step) {
	const unit = "/etc/systemd/system/lab-steps.service"
	a.text(unit, runner)
	a.add(tar.Header{Typeflag: tar.TypeSymlink, Name: "/etc/systemd/system/multi-user.target.wants/lab-steps.service",
		Linkname: unit, Mode: 0o777}, nil)
	a.text("/lab/run", runSteps)
	a.text("/lab/functions", functions)
	for i, step := range steps {
		dir := fmt.Sprintf("/lab/steps/%03d/", i)
		a.text(dir+"name", step.Name)
		a.text(dir+"seconds", fmt.Sprint(step.Seconds))
		a.add(tar.Header{Name: dir + "script", Mode: 0o644}, []byte(step.Script))
	}
}

// kernelModules adds modules with what they need, and depmod's lists.
func (a *archive) kernelModules(kernel testenv.Kernel, names []string) error {
	files, err := guest.ModuleFiles(kernel, names...)
	if err != nil {
		return err
	}
	lists, err := filepath.Glob(filepath.Join(kernel.Modules, "modules.*"))
	if err != nil {
		return err
	}
	for _, list := range lists {
		files = append(files, filepath.Base(list))
	}
	for _, file := range files {
		a.file(path.Join("/lib/modules", filepath.Base(kernel.Modules), file), filepath.Join(kernel.Modules, file))
	}
	return nil
}

// outputs reads the archive that a guest has written on its third disk.
func outputs(name string) (map[string]string, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	files := map[string]string{}
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if err == io.EOF {
			return files, nil
		}
		if err != nil {
			return files, fmt.Errorf("outputs of the guest: %w", err)
		}
		if h.Typeflag != tar.TypeReg {
			continue
		}
		data, err := io.ReadAll(r)
		if err != nil {
			return files, fmt.Errorf("output %q of the guest: %w", h.Name, err)
		}
		files[path.Clean(h.Name)] = string(data)
	}
}
