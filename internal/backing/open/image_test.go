package open_test

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/open"
)

func TestOpenImageKnowsItsFiles(t *testing.T) {
	dir, want := newChain(t)
	at := func(name string) string { return filepath.Join(dir, name) }
	s := chainSpec(t, at("top.qcow2"), open.Policy{Mode: open.SameDir})
	before := descriptors(t)
	i, err := open.OpenImage(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	names := []string{"top.qcow2", "mid.qcow2", "base.raw"}
	var files []open.LayerFiles
	for _, name := range names {
		files = append(files, open.LayerFiles{Path: at(name), Data: at(name)})
	}
	if !slices.Equal(i.Files, files) {
		t.Errorf("files: got %v, want %v", i.Files, files)
	}
	for _, name := range append(names, "want") {
		f, err := os.Open(at(name))
		if err != nil {
			t.Fatal(err)
		}
		if got, err := i.Has(f); err != nil || got != slices.Contains(names, name) {
			t.Errorf("has %s: got %v, %v", name, got, err)
		}
		_ = f.Close()
	}
	d := i.Device()
	wantContents(t, d, want)
	if err := d.Close(); err != nil {
		t.Errorf("close: %v", err)
	}
	if got := descriptors(t); got != before {
		t.Errorf("descriptors: got %d, want %d", got, before)
	}
}

func TestOpenImageRefuses(t *testing.T) {
	dir, _ := newChain(t)
	top := filepath.Join(dir, "top.qcow2")
	for name, change := range map[string]func(*open.Spec){
		"writing":  func(s *open.Spec) { s.ReadOnly = false },
		"memory":   func(s *open.Spec) { s.Format, s.Path = "mem", "1M" },
		"cache":    func(s *open.Spec) { s.Cache = "some" },
		"the gate": func(s *open.Spec) { s.Backing = open.Policy{} },
	} {
		t.Run(name, func(t *testing.T) {
			s := chainSpec(t, top, open.Policy{Mode: open.SameDir})
			change(&s)
			if _, err := open.OpenImage(t.Context(), s); !errors.Is(err, backing.ErrInvalid) {
				t.Errorf("open: got %v, want %v", err, backing.ErrInvalid)
			}
		})
	}
}
