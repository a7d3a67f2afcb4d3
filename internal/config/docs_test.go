package config_test

import (
	"encoding/xml"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/config"
)

func TestExampleIsValid(t *testing.T) {
	c, err := config.Load(filepath.Join("..", "..", "packaging", "examples", "vmdiskd.toml"))
	if err != nil {
		t.Fatal(err)
	}
	if len(c.Exports) != 2 || len(c.Listeners) != 1 {
		t.Errorf("read %+v", c)
	}
}

// The disk of the libvirt example is one that the example of a service serves,
// where it serves it.
func TestLibvirtExampleFitsTheService(t *testing.T) {
	b, err := os.ReadFile(filepath.Join("..", "..", "packaging", "examples", "libvirt-disk.xml"))
	if err != nil {
		t.Fatal(err)
	}
	var disk struct {
		Driver struct {
			Type string `xml:"type,attr"`
		} `xml:"driver"`
		Source struct {
			Protocol string `xml:"protocol,attr"`
			Name     string `xml:"name,attr"`
			Host     struct {
				Socket string `xml:"socket,attr"`
			} `xml:"host"`
		} `xml:"source"`
	}
	if err := xml.Unmarshal(b, &disk); err != nil {
		t.Fatal(err)
	}
	c, err := config.Load(filepath.Join("..", "..", "packaging", "examples", "vmdiskd.toml"))
	if err != nil {
		t.Fatal(err)
	}
	uri := "nbd+unix:///?socket=" + disk.Source.Host.Socket
	if disk.Driver.Type != "raw" || disk.Source.Protocol != "nbd" || disk.Source.Name != c.Exports[0].Name || uri != c.Listeners[0].URI {
		t.Errorf("the example of libvirt has %+v; the service has %q at %q", disk, c.Exports[0].Name, c.Listeners[0].URI)
	}
}

func manual(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("..", "..", "docs", "man", "vmdiskd.toml.5"))
	if err != nil {
		t.Fatal(err)
	}
	return strings.ReplaceAll(string(b), `\-`, "-")
}

func TestManualHasEveryKey(t *testing.T) {
	var bold []string // the lines that print something in bold
	for line := range strings.Lines(manual(t)) {
		if strings.HasPrefix(line, ".B") || strings.HasPrefix(line, ".SS [") {
			bold = append(bold, line)
		}
	}
	words := strings.FieldsFunc(strings.Join(bold, ""), func(r rune) bool { return strings.ContainsRune("\n ,.[]\"", r) })
	has := map[string]bool{}
	for _, w := range words {
		has[w] = true
	}
	for key := range allKeys(reflect.TypeFor[config.Config]()) {
		if !has[key] {
			t.Errorf("key %q is not in vmdiskd.toml(5)", key)
		}
	}
}

func TestManualsExampleIsValid(t *testing.T) {
	_, text, _ := strings.Cut(manual(t), ".SH EXAMPLE\n.nf\n")
	text, _, ok := strings.Cut(text, "\n.fi")
	if !ok {
		t.Fatal("there is no example")
	}
	c := parsed(t, text)
	if err := c.Validate(); err != nil || len(c.Exports) != 1 {
		t.Errorf("%v", err)
	}
}

// allKeys are the keys of a struct and of all structs in it.
func allKeys(rt reflect.Type) map[string]bool {
	list := map[string]bool{}
	for i := range rt.NumField() {
		f := rt.Field(i)
		if key := f.Tag.Get("toml"); key != "-" {
			list[key] = true
		}
		ft := f.Type
		for ft.Kind() == reflect.Pointer || ft.Kind() == reflect.Slice || ft.Kind() == reflect.Map {
			ft = ft.Elem()
		}
		if ft.Kind() == reflect.Struct {
			for key := range allKeys(ft) {
				list[key] = true
			}
		}
	}
	return list
}
