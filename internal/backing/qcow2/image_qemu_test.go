package qcow2_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/qcowtest"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/storetest"
)

// mapped is an entry of `qemu-img map --output=json`.
type mapped struct {
	Start, Length int64
	Depth         int
	Present       bool
	Zero, Data    bool
	Offset        *int64
}

// agrees reports whether s, which lies in e and begins skip bytes after it, is
// what QEMU says of the top layer.
func (e mapped) agrees(s qcow2.Span, skip int64) bool {
	switch {
	case e.Depth > 0 || !e.Present:
		return s.Kind == qcow2.Absent
	case e.Offset != nil && s.Kind == qcow2.Data:
		return s.Off == *e.Offset+skip
	case e.Offset != nil:
		return e.Zero && s.Kind == qcow2.Zero && s.Store != nil
	case e.Zero:
		return s.Kind == qcow2.Zero && s.Store == nil
	}
	return s.Kind == qcow2.Compressed && e.Data
}

// someOptions takes some images of all kinds whose files are small.
func someOptions() []qcowtest.Options {
	var few []qcowtest.Options
	for i, o := range qcowtest.Pairwise(qcowtest.Seed) {
		if i%4 == 0 && (o.Preallocation == "off" || o.Size() <= 64<<20) {
			few = append(few, o)
		}
	}
	return few
}

// TestSpansAreWhatQEMUMaps compares whole images of all kinds.
func TestSpansAreWhatQEMUMaps(t *testing.T) {
	kinds := map[qcow2.SpanKind]int{}
	for _, image := range qcowtest.Make(t, qcowtest.Seed, someOptions()) {
		t.Run(image.Name, func(t *testing.T) {
			b, err := os.ReadFile(image.Path)
			if err != nil {
				t.Fatal(err)
			}
			o := quiet()
			if image.Options.Backing != qcowtest.NoBacking {
				o.Backing, _ = qcow2.NewRawLayer(storetest.New(nil))
			}
			if image.Options.DataFile != "" {
				o.DataFile = sparse(t, image.Path+".data")
			}
			m := open(t, b, o)
			if m.Size() != image.Options.Size() || m.ClusterSize() != image.Options.ClusterSize {
				t.Errorf("size %d, clusters of %d", m.Size(), m.ClusterSize())
			}
			compareMap(t, m, image.Path, kinds)
		})
	}
	for _, k := range []qcow2.SpanKind{qcow2.Absent, qcow2.Zero, qcow2.Data, qcow2.Compressed} {
		if kinds[k] == 0 {
			t.Errorf("no image had a span of kind %d", k)
		}
	}
}

// sparse is a file of the size of the one at path.
func sparse(t *testing.T, path string) *storetest.Mem {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	st := storetest.New(nil)
	st.Cut(info.Size())
	return st
}

// compareMap compares the spans of m with the map of the image at path.
func compareMap(t *testing.T, m *qcow2.Image, path string, kinds map[qcow2.SpanKind]int) {
	t.Helper()
	var list []mapped
	out := qemu(t, filepath.Dir(path), "qemu-img", "map", "-f", "qcow2", "--output=json", path)
	if err := json.Unmarshal(out, &list); err != nil {
		t.Fatal(err)
	}
	var off int64
	for _, e := range list {
		if e.Start != off {
			t.Fatalf("qemu-img map goes from %d to %d", off, e.Start)
		}
		var skip int64
		for _, s := range spans(t, m, e.Start, e.Length) {
			kinds[s.Kind]++
			if !e.agrees(s, skip) {
				t.Fatalf("at %d: span %+v, QEMU says %+v", e.Start+skip, s, e)
			}
			skip += s.Len
		}
		off += e.Length
	}
	if off != m.Size() {
		t.Fatalf("qemu-img map ends at %d, the disk at %d", off, m.Size())
	}
}
