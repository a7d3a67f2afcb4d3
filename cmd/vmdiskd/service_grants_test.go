package main

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

const exportB = "[[export]]\nname = \"b\"\nimage = \"DIR/b.img\"\n"

func grant(access, address string) string {
	return "[[export.grant]]\naccess = \"" + access + "\"\naddress = [\"" + address + "\"]\n"
}

// TestFirstGrantThatMatchesDecides is AU-09 and AU-10: no union of two that
// match, and who may only read is told so and held to it.
func TestFirstGrantThatMatchesDecides(t *testing.T) {
	t.Parallel()
	addr, listener := tcpListener(t)
	s := newService(t, listener+
		exportA+grant("ro", "127.0.0.2")+grant("rw", "127.0.0.0/8")+
		exportB+grant("rw", "127.0.0.0/8")+grant("ro", "127.0.0.2"))
	for _, tt := range []struct {
		from, export string
		readOnly     bool
	}{{"127.0.0.2", "a", true}, {"127.0.0.3", "a", false}, {"127.0.0.2", "b", false}} {
		k, flags := mustGo(t, dialFrom(t, tt.from, addr), tt.export)
		if got := flags&wire.ReadOnly != 0; got != tt.readOnly {
			t.Errorf("%s from %s: read-only is %v, want %v", tt.export, tt.from, got, tt.readOnly)
		}
		want := wire.OK
		if tt.readOnly {
			want = wire.EPERM
		}
		k.request(wire.CmdWrite, 7, 0, 512, make([]byte, 512))
		if e, cookie := k.reply(); e != want || cookie != 7 {
			t.Errorf("write to %s from %s: got %v for %d, want %v for 7", tt.export, tt.from, e, cookie, want)
		}
		k.request(wire.CmdZero, 8, 0, 512, nil)
		if e, _ := k.reply(); e != want {
			t.Errorf("zeroing %s from %s: got %v, want %v", tt.export, tt.from, e, want)
		}
		k.reads(1)
	}
	s.stop()
}

// TestWhatAPeerMayNotSeeDoesNotExist is AU-11 and the part of AU-13 that can
// be seen: the answer has the same bytes, the list leaves it out, no client of
// it is counted.
func TestWhatAPeerMayNotSeeDoesNotExist(t *testing.T) {
	t.Parallel()
	addr, listener := tcpListener(t)
	s := newService(t, listener+exportA+grant("rw", "127.0.0.2")+exportB+grant("rw", "127.0.0.3"))
	for _, o := range []wire.Opt{wire.OptGo, wire.OptInfo} {
		c := greet(t, dialFrom(t, "127.0.0.3", addr))
		hidden, raw := c.option(o, wire.AppendInfoRequest(nil, wire.InfoRequest{Name: "a"}))
		_, missing := c.option(o, wire.AppendInfoRequest(nil, wire.InfoRequest{Name: "x"}))
		if hidden != wire.RepErrUnknown || !bytes.Equal(raw, missing) {
			t.Errorf("%v: hidden %v %q, missing %q; want the same bytes", o, hidden, raw, missing)
		}
	}
	c := greet(t, dialFrom(t, "127.0.0.3", addr))
	if rep, raw := c.option(wire.OptList, nil); rep != wire.RepAck || bytes.Count(raw, []byte("\x00\x00\x00\x01b")) != 1 || bytes.Contains(raw, []byte("\x00\x00\x00\x01a")) {
		t.Errorf("list: %v %q, want b alone", rep, raw)
	}
	// EXPORT_NAME knows no error: the connection ends.
	c = greet(t, dialFrom(t, "127.0.0.3", addr))
	c.send(wire.AppendOption(nil, wire.OptExportName, []byte("a")))
	if n, err := c.Conn.Read(make([]byte, 1)); n != 0 || err == nil {
		t.Errorf("EXPORT_NAME of what is hidden: got %d bytes, %v; want the end", n, err)
	}
	if x, err := s.ctl.Export(t.Context(), "a"); err != nil || x.Clients != 0 {
		t.Errorf("a: got %+v, %v, want no clients", x, err)
	}
	s.stop()
}

// fails starts a second service on the configuration of the first.
func (s *testService) fails(what string) {
	s.Helper()
	cmd := program("--config", filepath.Join(s.dir, "conf"))
	ctx, cancel := context.WithTimeout(s.Context(), hangLimit)
	defer cancel()
	var out bytes.Buffer
	cmd.Stderr = &out
	if err := cmd.Start(); err != nil {
		s.Fatal(err)
	}
	stop := context.AfterFunc(ctx, func() { _ = cmd.Process.Kill() })
	defer stop()
	if err := cmd.Wait(); err == nil || cmd.ProcessState.ExitCode() != 1 {
		s.Errorf("%s: got %v, want exit status 1: %s", what, err, out.String())
	}
}

// TestServiceTakesNobodysPath is AU-14, for the control socket and for that of
// the disks.
func TestServiceTakesNobodysPath(t *testing.T) {
	t.Parallel()
	s := newService(t, exportA)
	s.fails("a service that is alive")
	if got := s.size(s.uri("a")); got != "1048576" {
		t.Errorf("the one that was there: size %q", got)
	}
	s.stop()
	file := filepath.Join(s.dir, "file")
	if err := os.WriteFile(file, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"control", "nbd"} {
		path := filepath.Join(s.dir, name)
		for what, put := range map[string]func() error{
			"a file":    func() error { return os.WriteFile(path, []byte("mine"), 0o600) },
			"a symlink": func() error { return os.Symlink(file, path) },
		} {
			if err := put(); err != nil {
				t.Fatal(err)
			}
			s.fails(what + " under the path of " + name)
			for _, p := range []string{path, file} {
				if b, err := os.ReadFile(p); err != nil || string(b) != "mine" {
					t.Errorf("%s under the path of %s: %s has %q, %v", what, name, p, b, err)
				}
			}
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// TestSocketsOfAKilledServiceAreReplaced is AU-15.
func TestSocketsOfAKilledServiceAreReplaced(t *testing.T) {
	t.Parallel()
	s := newService(t, exportA)
	s.open("a").works()
	if err := s.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	<-s.done
	for _, name := range []string{"control", "nbd"} {
		if !exists(filepath.Join(s.dir, name)) {
			t.Fatalf("%s is gone: nothing is left to be replaced", name)
		}
	}
	s.start()
	s.open("a").works()
	s.stop()
}

// TestImagesLieInTheirRoots is CT-03.
func TestImagesLieInTheirRoots(t *testing.T) {
	t.Parallel()
	s := newService(t, "")
	outside := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(outside, make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	in := func(name string) string { return filepath.Join(s.dir, name) }
	for name, to := range map[string]string{
		"link": outside, "dirlink": filepath.Dir(outside), "inner": "a.img", "proc": "/proc/self/root",
	} {
		if err := os.Symlink(to, in(name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(in("sub"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(in("fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	bad := []string{
		outside, s.dir + "/../" + filepath.Base(filepath.Dir(outside)) + "/secret", s.dir + "/sub/../../x", in("link"),
		in("dirlink/secret"), in("proc") + outside, s.dir + "x/a.img", "/proc/self/root" + in("a.img"), "a.img",
		"/proc/self/fd/0", "/dev/zero", "/dev/null", in("fifo"), in("sub"), in("control"), "fd:0", "fd:-1", "fd:999999999999999999999",
		"json:{\"driver\":\"file\",\"filename\":\"" + in("a.img") + "\"}", "file:" + in("a.img"), "-" + in("a.img"), in("a.img") + "\x00x", "",
	}
	for _, path := range bad {
		_, err := s.ctl.Add(t.Context(), api.AddExport{Export: config.Export{Name: "x", Image: path}})
		var e *api.Error
		if !errors.As(err, &e) || e.Code != api.CodeInvalid && e.Code != api.CodeForbidden {
			t.Errorf("image %q: got %v, want it invalid or forbidden", path, err)
		}
	}
	if got := s.states(); len(got) != 0 {
		t.Errorf("exports: got %q, want none", got)
	}
	if _, err := s.ctl.Add(t.Context(), api.AddExport{Export: config.Export{Name: "x", Image: in("a.img")}}); err != nil {
		t.Errorf("a path within the root: %v", err)
	}
	s.stop()
}

// TestDescriptorNeedsNoRoot is the other half of CT-03: the form for an image
// on another mount, which no root covers. What is no disk is refused.
func TestDescriptorNeedsNoRoot(t *testing.T) {
	t.Parallel()
	s := newService(t, "")
	dir, err := os.MkdirTemp("/dev/shm", "vmdiskd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "disk")
	if err := os.WriteFile(path, make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	add := func(name, image string, files ...*os.File) error {
		_, err := s.ctl.Add(t.Context(), api.AddExport{Export: config.Export{Name: name, Image: image}}, files...)
		return err
	}
	wantCode(t, "another mount by its path", add("x", path), api.CodeForbidden)
	for _, bad := range []string{"/dev/null", dir} {
		f, err := os.Open(bad)
		if err != nil {
			t.Fatal(err)
		}
		wantCode(t, bad+" by descriptor", add("x", "fd:0", f), api.CodeInvalid)
		f.Close()
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := add("x", "fd:0", f); err != nil {
		t.Errorf("another mount by descriptor: %v", err)
	}
	if got := s.states(); !slices.Equal(got, []string{"x ready"}) {
		t.Errorf("exports: got %q, want x alone", got)
	}
	s.stop()
}

// TestDescriptorNeedsNoPathToBeChanged: files that came as descriptors are open, and
// what can be set on any export can be on theirs. What needs their names is refused.
func TestDescriptorNeedsNoPathToBeChanged(t *testing.T) {
	t.Parallel()
	s := newService(t, "")
	at := func(name string) string { return filepath.Join(s.dir, name) }
	if err := os.WriteFile(at("c.img"), make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	s.images("-b b.img -F raw q.qcow2", "-b c.img -F raw path.qcow2")
	for _, tt := range []struct {
		x     config.Export
		files []string
	}{
		{config.Export{Name: "raw", Image: "fd:0"}, []string{"a.img"}},
		{config.Export{Name: "chain", Image: "fd:1", Format: "qcow2", BackingFiles: []string{"fd:0:raw"}}, []string{"b.img", "q.qcow2"}},
		{config.Export{Name: "path", Image: at("path.qcow2"), Format: "qcow2", BackingFiles: []string{"fd:0:raw"}}, []string{"c.img"}},
	} {
		var files []*os.File
		for _, name := range tt.files {
			f, err := os.OpenFile(at(name), os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			files = append(files, f)
		}
		_, err := s.ctl.Add(t.Context(), api.AddExport{Export: tt.x, Persist: true}, files...)
		wantCode(t, tt.x.Name+" to be kept", err, api.CodeInvalid)
		if _, err := s.ctl.Add(t.Context(), api.AddExport{Export: tt.x}, files...); err != nil {
			t.Fatal(err)
		}
		_, err = s.ctl.Snapshot(t.Context(), tt.x.Name, api.Snapshot{Overlay: at("top.qcow2")})
		wantCode(t, "snapshot of "+tt.x.Name, err, api.CodeUnsupported)
		s.wantChanged(tt.x.Name, tt.x.Image)
	}
	s.stop()
}

// wantChanged changes all of an export in use that shows, of a disk of 1 MiB.
func (s *testService) wantChanged(name, image string) {
	s.Helper()
	set := func(p api.Patch) api.Export {
		s.Helper()
		x, err := s.ctl.Patch(s.Context(), name, p)
		if err != nil {
			s.Errorf("change of %s: %v", name, err)
		}
		return x
	}
	yes, no := true, false
	if x := set(api.Patch{ReadOnly: &yes, Rate: &config.Rate{Ops: 1000}}); x.Writable || x.Rate == nil || x.Image != image {
		s.Errorf("%s: got %+v, want it read-only and with a rate", name, x)
	}
	set(api.Patch{ReadOnly: &no})
	s.write(name, "0x21", "0")
	if x, err := s.ctl.Resize(s.Context(), name, api.Resize{Size: 2 << 20}); err != nil || x.Size != 2<<20 {
		s.Errorf("resize of %s: got %+v, %v, want 2 MiB", name, x, err)
	}
	set(api.Patch{Grants: &[]config.Grant{{Access: "rw", UIDs: []uint32{4242}}}})
	if got := s.size(s.uri(name)); got != "" {
		s.Errorf("%s can be opened without its grant, and has %s bytes", name, got)
	}
}
