package attach_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/attach"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/internal/nbd/client"
	"github.com/vmdiskd/vmdiskd/internal/qmp"
	"github.com/vmdiskd/vmdiskd/internal/transport/psk"
	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// TestDiskComesWithAPreSharedKey attaches disks of a service that takes nothing
// but TLS and a key, over TCP and a Unix socket: QEMU reads the image through
// it, the disk grows, and no key is left behind.
func TestDiskComesWithAPreSharedKey(t *testing.T) {
	t.Parallel()
	if err := psk.Supported(); err != nil {
		t.Skipf("this build has no overlay of crypto/tls, make test has: %v", err)
	}
	l := &lab{dir: testenv.TempDir(t)}
	keys, port := filepath.Join(l.dir, "keys.psk"), testenv.FreePort(t)
	must(t, os.WriteFile(keys, []byte("vm1:"+strings.Repeat("1a", 32)+"\n"), 0o600))
	m, image := l.startWeb(t, fmt.Sprintf("[tls]\npsk = %q\n[[listener]]\nuri = \"nbds://127.0.0.1:%d\"\n[[listener]]\nuri = \"nbds+unix:///?socket=%s/sock\"", keys, port, l.dir))
	ctx := testenv.Context(t)
	objects, err := qmp.Objects(ctx, m.Monitor)
	must(t, err)
	for name, s := range map[string]attach.Source{
		"TCP":            {URI: fmt.Sprintf("nbds://vm1@127.0.0.1:%d/web?tls-psk-file=%s", port, keys)},
		"a Unix socket":  {URI: fmt.Sprintf("nbds+unix:///web?socket=%s/sock", l.dir), Keys: keys, Identity: "vm1"},
		"the export web": {Export: "web", Keys: keys, Identity: "vm1"},
	} {
		t.Run(name, func(t *testing.T) {
			p, err := m.Attach(ctx, s, attach.Options{Model: qmp.SCSIDisk, ID: "d0"})
			must(t, err)
			if want := fmt.Sprintf("give the machine the pre-shared key of \"vm1\" in %q", keys); !strings.HasPrefix(p.Steps[0].Name, want) {
				t.Errorf("step %q, want %q", p.Steps[0].Name, want)
			}
			if !do(t, p, nil) {
				t.Error("nothing was changed")
			}
			again, err := m.Attach(ctx, s, attach.Options{Model: qmp.SCSIDisk, ID: "d0"})
			if do(t, again, err) {
				t.Error("the second attach changed something")
			}
			l.wantUsable(t, m, image)
			left, err := qmp.Objects(ctx, m.Monitor)
			if err != nil || !maps.Equal(left, objects) || strings.Contains(l.state(t, m.Monitor), "node") {
				t.Errorf("left after detach: %q, %v; %s", left, err, l.state(t, m.Monitor))
			}
		})
	}
	before := l.state(t, m.Monitor) // the image has grown
	tcp := fmt.Sprintf("nbds://vm1@127.0.0.1:%d/web", port)
	for name, s := range map[string]attach.Source{
		"no key":                   {URI: tcp},
		"no identity":              {URI: strings.Replace(tcp, "vm1@", "", 1), Keys: keys},
		"an identity and no key":   {Export: "web", Identity: "vm1"},
		"no identity, an export":   {Export: "web", Keys: keys},
		"a file of another name":   {URI: tcp, Keys: l.dir + "/other.psk"},
		"a relative folder":        {URI: tcp + "?tls-psk-file=keys.psk"},
		"no TLS":                   {URI: strings.Replace(tcp, "nbds", "nbd", 1), Keys: keys},
		"certificates too":         {URI: tcp, Keys: keys, Certificates: l.dir},
		"certificates in the URI":  {URI: tcp + "?tls-certificates=" + l.dir, Keys: keys},
		"both in the URI":          {URI: tcp + "?tls-psk-file=" + keys + "&tls-certificates=" + l.dir},
		"an identity of two lines": {URI: tcp, Keys: keys, Identity: "a\nb"},
		"a long identity":          {URI: tcp, Keys: keys, Identity: strings.Repeat("a", 129)},
	} {
		if _, err := m.Attach(ctx, s, attach.Options{Model: qmp.SCSIDisk, ID: "d0"}); !errors.Is(err, qmp.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, identity := range []string{"vm2", "VM1"} {
		p, err := m.Attach(ctx, attach.Source{URI: tcp, Keys: keys, Identity: identity}, attach.Options{Model: qmp.SCSIDisk, ID: "d0"})
		must(t, err)
		_, err = p.Run(ctx)
		if left := l.state(t, m.Monitor); !errors.As(err, new(*qmp.Error)) || errors.Is(err, attach.ErrIncomplete) || left != before {
			t.Errorf("as %q: %v, left %s", identity, err, left)
		}
	}
	wrong := filepath.Join(testenv.TempDir(t), "keys.psk")
	must(t, os.WriteFile(wrong, []byte("vm1:"+strings.Repeat("2b", 32)+"\n"), 0o600))
	p, err := m.Attach(ctx, attach.Source{URI: tcp, Keys: wrong, Identity: "vm1"}, attach.Options{Model: qmp.SCSIDisk, ID: "d0"})
	must(t, err)
	if _, err := p.Run(ctx); !errors.Is(err, client.ErrTLS) || errors.As(err, new(*qmp.Error)) || l.state(t, m.Monitor) != before {
		t.Errorf("with another key: %v, left %s", err, l.state(t, m.Monitor))
	}
	if _, err := attach.Element(attach.Source{URI: tcp, Keys: keys}, attach.Options{Model: qmp.VirtIOBlk, ID: "vda"}); !errors.Is(err, attach.ErrLibvirt) || !strings.Contains(err.Error(), "pre-shared") {
		t.Errorf("an element for libvirt: %v", err)
	}
}

func addExport(name, image string) (a api.AddExport) {
	a.Name, a.Image = name, image
	return a
}

// startWeb starts a service with the configuration, whose export web has the
// image, and a machine.
func (l *lab) startWeb(t *testing.T, conf string) (m *attach.Machine, image string) {
	t.Helper()
	l.startService(t, conf)
	l.startMachine(t, q35...)
	image = l.image(t, "disk.img", diskSize)
	_, err := l.service.Add(testenv.Context(t), addExport("web", image))
	must(t, err)
	return l.machine(t, l.monitor, nil), image
}

// wantUsable checks that the disk d0 of the machine is that of the export web,
// grows with it, and goes.
func (l *lab) wantUsable(t *testing.T, m *attach.Machine, image string) {
	t.Helper()
	ctx := testenv.Context(t)
	l.wantCopied(t, m.Monitor, image)
	p, err := m.Resize(ctx, "d0", "web", attach.Size{Bytes: diskSize, More: true})
	do(t, p, err)
	l.wantCopied(t, m.Monitor, image)
	p, err = m.Detach(ctx, "d0", true)
	do(t, p, err)
}

// wantCopied has QEMU copy its only disk, which must be the image.
func (l *lab) wantCopied(t *testing.T, m *qmp.Monitor, image string) {
	t.Helper()
	ctx := testenv.Context(t)
	want, err := os.ReadFile(image)
	must(t, err)
	disks, err := qmp.QueryBlock(ctx, m)
	must(t, err)
	if len(disks) != 1 || disks[0].Inserted == nil {
		t.Fatalf("disks %+v", disks)
	}
	path := filepath.Join(l.dir, "copy")
	must(t, errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, int64(len(want)))))
	execute := func(name string, args any) json.RawMessage {
		t.Helper()
		r, err := m.Execute(ctx, name, args)
		must(t, err)
		return r
	}
	execute("blockdev-add", map[string]any{"driver": "file", "node-name": "copy", "filename": path})
	execute("blockdev-backup", map[string]any{"job-id": "copying", "device": disks[0].Inserted.Name, "target": "copy", "sync": "full"})
	await(t, func() bool { return string(execute("query-block-jobs", nil)) == "[]" })
	execute("blockdev-del", map[string]any{"node-name": "copy"})
	if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, want) {
		t.Errorf("QEMU reads something else, %v", err)
	}
}
