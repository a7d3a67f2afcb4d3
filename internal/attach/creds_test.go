package attach_test

import (
	"errors"
	"fmt"
	"maps"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/attach"
	"github.com/vmdiskd/vmdiskd/internal/nbd/client"
	"github.com/vmdiskd/vmdiskd/internal/qmp"
	"github.com/vmdiskd/vmdiskd/internal/transport/transporttest"
	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// TestDiskComesOverTLS attaches a disk of a server that takes nothing but TLS
// and certificates, and leaves none of them behind.
func TestDiskComesOverTLS(t *testing.T) {
	t.Parallel()
	l := start(t, q35...)
	var notes []string
	m := l.machine(t, l.monitor, &notes)
	ctx := testenv.Context(t)
	dir := testenv.Certificates(t)
	s := testenv.Start(t, testenv.Options{Image: testenv.PatternImage(t, diskSize), TLSDir: dir})
	before := l.state(t, m.Monitor)
	objects, err := qmp.Objects(ctx, m.Monitor)
	must(t, err)
	uri, _, _ := strings.Cut(s.URI, "&tls-certificates=")
	attached := func(s attach.Source) error {
		p, err := m.Attach(ctx, s, attach.Options{Model: qmp.SCSIDisk, ID: "d0"})
		if err == nil {
			_, err = p.Run(ctx)
		}
		return err
	}
	for name, s := range map[string]attach.Source{
		"no certificates":     {URI: uri},
		"relative folder":     {URI: uri, Certificates: "certs"},
		"others for no TLS":   {URI: strings.Replace(uri, "nbds", "nbd", 1), Certificates: dir},
		"unknown parameter":   {URI: uri + "&tls-what=1", Certificates: dir},
		"a pre-shared key":    {URI: strings.Replace(uri, "://", "://alice@", 1), Certificates: dir},
		"parameter, no TLS":   {URI: strings.Replace(uri, "nbds", "nbd", 1) + "&tls-hostname=h"},
		"pre-shared key file": {URI: uri + "&tls-psk-file=/k", Certificates: dir},
	} {
		if err := attached(s); !errors.Is(err, qmp.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, tt := range map[string]struct {
		attach.Source
		byQEMU bool // else by the handshake before
	}{
		"another authority": {attach.Source{URI: uri, Certificates: testenv.Certificates(t)}, false},
		"another host":      {attach.Source{URI: uri + "&tls-hostname=other.example", Certificates: dir}, false},
		"no such folder":    {attach.Source{URI: uri, Certificates: dir + "/none"}, true},
	} {
		notes = nil
		err := attached(tt.Source)
		byQEMU := errors.As(err, new(*qmp.Error))
		if byQEMU != tt.byQEMU || !byQEMU && !errors.Is(err, client.ErrTLS) || errors.Is(err, attach.ErrIncomplete) {
			t.Errorf("%s: %v", name, err)
		}
		if told := strings.Contains(strings.Join(notes, " "), "nobody tried"); told != tt.byQEMU {
			t.Errorf("%s: notes %q", name, notes)
		}
		left, err := qmp.Objects(ctx, m.Monitor)
		if err != nil || !maps.Equal(left, objects) || l.state(t, m.Monitor) != before {
			t.Errorf("%s: left %q, %v", name, left, err)
		}
	}
	// What an attempt that was killed has left is of another folder.
	other := testenv.Certificates(t)
	p, err := m.Attach(ctx, attach.Source{URI: uri, Certificates: dir}, attach.Options{Model: qmp.SCSIDisk, ID: "d0"})
	must(t, err)
	_, object, _ := strings.Cut(p.Steps[0].Name, "as object ")
	_, err = m.Monitor.Execute(ctx, "object-add", map[string]any{"qom-type": "tls-creds-x509", "id": object, "endpoint": "client", "dir": other})
	must(t, err)
	if err := attached(attach.Source{URI: uri, Certificates: other}); !errors.Is(err, client.ErrTLS) {
		t.Errorf("another authority, of which there is an object: %v", err)
	}
	must(t, attached(attach.Source{URI: uri + "&tls-certificates=" + dir}))
	for _, s := range []attach.Source{{URI: uri, Certificates: other}, {URI: uri + "&tls-hostname=other.example", Certificates: dir}} {
		if err := attached(s); !errors.Is(err, attach.ErrDiffers) {
			t.Errorf("others than those of the disk: %v", err)
		}
	}
	must(t, attached(attach.Source{URI: uri, Certificates: dir}))
	disks, err := qmp.QueryBlock(ctx, m.Monitor)
	if err != nil || len(disks) != 1 || disks[0].Inserted == nil || disks[0].Inserted.Image.VirtualSize != diskSize {
		t.Errorf("disks %+v, %v", disks, err)
	}
	p, err = m.Detach(ctx, "d0", true)
	do(t, p, err)
	if left, err := qmp.Objects(ctx, m.Monitor); err != nil || !maps.Equal(left, objects) || l.state(t, m.Monitor) != before {
		t.Errorf("left after detach: %q, %v", left, err)
	}
}

// TestExportComesOverTLSByASocket: there is no name of a host on the way, the
// certificate is for localhost or for a host that is said. The disk grows by a
// second client, unless that could not shake hands.
func TestExportComesOverTLSByASocket(t *testing.T) {
	t.Parallel()
	l := &lab{dir: testenv.TempDir(t)}
	dir := testenv.TempDir(t)
	ca := transporttest.NewCA(t, "test authority")
	serverFor := func(name string) {
		transporttest.WriteServer(t, dir, ca, ca.IssueServer(name, transporttest.Names(name)))
	}
	serverFor("localhost")
	transporttest.WriteClient(t, dir, ca, ca.IssueClient("client"))
	m, image := l.startWeb(t, fmt.Sprintf("[tls]\ncertificates = %q\n[[listener]]\nuri = \"nbds+unix:///?socket=%s/sock\"", dir, l.dir))
	objects, err := qmp.Objects(testenv.Context(t), m.Monitor)
	must(t, err)
	attached := func(s attach.Source) {
		s.Certificates = dir
		p, err := m.Attach(testenv.Context(t), s, attach.Options{Model: qmp.SCSIDisk, ID: "d0"})
		do(t, p, err)
	}
	attached(attach.Source{Export: "web"})
	l.wantUsable(t, m, image)

	serverFor("disks.example")
	attached(attach.Source{URI: fmt.Sprintf("nbds+unix:///web?socket=%s/sock&tls-hostname=disks.example", l.dir)})
	serverFor("other.example")
	before := l.state(t, m.Monitor)
	p, err := m.Resize(testenv.Context(t), "d0", "web", attach.Size{Bytes: diskSize, More: true})
	must(t, err)
	if _, err := p.Run(testenv.Context(t)); !errors.Is(err, client.ErrTLS) || errors.Is(err, attach.ErrIncomplete) || l.state(t, m.Monitor) != before {
		t.Errorf("a certificate for another host: %v, left %s", err, l.state(t, m.Monitor))
	}
	serverFor("disks.example")
	l.wantUsable(t, m, image)
	if left, err := qmp.Objects(testenv.Context(t), m.Monitor); err != nil || !maps.Equal(left, objects) {
		t.Errorf("left after detach: %q, %v", left, err)
	}
}
