package qcow2_test

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/storetest"
)

// qemu runs qemu-img or qemu-io in dir.
func qemu(t testing.TB, dir, program string, args ...string) []byte {
	t.Helper()
	cmd := exec.Command(program, args...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", program, args, err, out)
	}
	return out
}

// made creates t.qcow2 with options and a size, runs qemu-io commands on it,
// and returns its bytes.
func made(t testing.TB, options, size string, commands ...string) []byte {
	t.Helper()
	dir := t.TempDir()
	qemu(t, dir, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "compat=1.1,"+options, "t", size)
	for _, c := range commands {
		if name, ok := strings.CutPrefix(c, "snapshot "); ok {
			qemu(t, dir, "qemu-img", "snapshot", "-c", name, "t")
			continue
		}
		qemu(t, dir, "qemu-io", "-f", "qcow2", "-c", c, "t")
	}
	b, err := os.ReadFile(filepath.Join(dir, "t"))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// patch is a copy of b with the bytes of a hexadecimal number at off.
func patch(t testing.TB, b []byte, off int, digits string) []byte {
	t.Helper()
	p, err := hex.DecodeString(strings.ReplaceAll(digits, " ", ""))
	if err != nil || off+len(p) > len(b) {
		t.Fatalf("patch of %q at %d: %v", digits, off, err)
	}
	b = append([]byte(nil), b...)
	copy(b[off:], p)
	return b
}

// quiet opens images without a log.
func quiet() qcow2.Options {
	return qcow2.Options{Path: "test", Log: slog.New(slog.NewTextHandler(io.Discard, nil))}
}

func open(t testing.TB, b []byte, o qcow2.Options) *qcow2.Image {
	t.Helper()
	m, err := qcow2.OpenImage(context.Background(), storetest.New(b), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = m.Close() })
	return m
}

// spans are all of a range, which they must fill.
func spans(t testing.TB, l qcow2.Layer, off, n int64) []qcow2.Span {
	t.Helper()
	var list []qcow2.Span
	var sum int64
	err := l.Spans(context.Background(), off, n, func(s qcow2.Span) bool {
		if s.Len <= 0 || (s.Kind == qcow2.Damaged) != (s.Err != nil) {
			t.Fatalf("span %+v", s)
		}
		sum += s.Len
		list = append(list, s)
		return true
	})
	if err != nil || sum != n {
		t.Fatalf("Spans(%d, %d) has %d bytes, %v", off, n, sum, err)
	}
	return list
}

// at is the span of one byte.
func at(t testing.TB, l qcow2.Layer, off int64) qcow2.Span {
	t.Helper()
	return spans(t, l, off, 1)[0]
}

const (
	base    = 0x30000 // L1 table of an image with 64 KiB clusters
	l2Table = 0x40000
	written = "write -q -P 17 0 64k"
)

// TestDamageIsFoundWhereItIs patches the entries of an image with data at 0 and
// at 1 GiB, which another L2 table maps.
func TestDamageIsFoundWhereItIs(t *testing.T) {
	const far = 1 << 30
	d := made(t, "cluster_size=64k", "2G", written, "write -q -P 34 1G 64k")
	c := made(t, "cluster_size=64k", "2G", "write -q -c -P 65 0 64k", "write -q -P 34 1G 64k")
	x := made(t, "cluster_size=64k,extended_l2=on", "2G", written, "write -q -P 34 1G 64k")
	old := patch(t, patch(t, d, 4, "00000002"), 100, "00000000") // version 2
	for _, tt := range []struct {
		name  string
		image []byte
		off   int
		hex   string
		want  qcow2.SpanKind
	}{
		{"nothing", d, 0, "", qcow2.Data},
		{"M1 L1 table as L2 table", d, base, "8000000000030000", qcow2.Damaged},
		{"M1 header as L2 table", d, base, "8000000000000000", qcow2.Absent},
		{"M2 unaligned L2 table", d, base, "8000000000042a00", qcow2.Damaged},
		{"M3 reserved bits in L1", d, base, "c000000000040001", qcow2.Damaged},
		{"M4 refcount table as L2 table", d, base, "8000000000010000", qcow2.Damaged},
		{"M4 refcount block as L2 table", d, base, "8000000000020000", qcow2.Damaged},
		{"M5 L2 table beyond the end", d, base, "8000001000000000", qcow2.Damaged},
		{"M6 unaligned cluster", d, l2Table, "8000000000052a00", qcow2.Damaged},
		{"M6 unaligned zero cluster", d, l2Table, "8000000000052a01", qcow2.Damaged},
		{"M7 cluster in refcount table", d, l2Table, "8000000000010000", qcow2.Damaged},
		{"M7 cluster in refcount block", d, l2Table, "8000000000020000", qcow2.Damaged},
		{"M7 cluster in L1 table", d, l2Table, "8000000000030000", qcow2.Damaged},
		{"M7 cluster in L2 table", d, l2Table, "8000000000040000", qcow2.Damaged},
		{"M8 reserved bits in L2", d, l2Table, "b0000000000500fe", qcow2.Damaged},
		{"M9 cluster at 64 GiB", d, l2Table, "8000001000000000", qcow2.Damaged},
		{"M10 cluster at the largest offset", d, l2Table, "80ffffffffff0000", qcow2.Damaged},
		{"M11 zero flag in version 2", old, l2Table, "8000000000050001", qcow2.Damaged},
		{"M12 one host cluster twice", d, l2Table + 8, "8000000000050000", qcow2.Data},
		{"copied without cluster", d, l2Table, "8000000000000000", qcow2.Damaged},
		{"C0", c, 0, "", qcow2.Compressed},
		{"C1 data beyond the end", c, l2Table, "4000001000000000", qcow2.Damaged},
		{"C4 copied and compressed", c, l2Table, "c000000000050000", qcow2.Compressed},
		{"C5 data at the header", c, l2Table, "4000000000000000", qcow2.Damaged},
		{"data ending in L2 table", c, l2Table, "4040000000040000", qcow2.Damaged},
		{"X0", x, 0, "", qcow2.Data},
		{"X1 allocated and zero", x, l2Table + 8, "0000000100000001", qcow2.Damaged},
		{"X2 allocated without cluster", x, l2Table, "0000000000000000 0000000000000001", qcow2.Damaged},
		{"X3 bit 0 of an extended entry", x, l2Table + 7, "01", qcow2.Data},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := open(t, patch(t, tt.image, tt.off, tt.hex), quiet())
			s := at(t, m, 0)
			if s.Kind != tt.want {
				t.Errorf("span %+v, want kind %d", s, tt.want)
			}
			if tt.want == qcow2.Damaged && (!errors.Is(s.Err, backing.ErrIO) || !strings.Contains(s.Err.Error(), `"test"`)) {
				t.Errorf("error %v does not say that it is I/O, and where", s.Err)
			}
			if s := at(t, m, far); s.Kind != qcow2.Data {
				t.Errorf("elsewhere: span %+v, want data", s)
			}
			spans(t, m, 0, m.Size())
		})
	}
}

func TestHeaderIsCheckedAgainstTheFile(t *testing.T) {
	d := made(t, "cluster_size=64k", "64M", written)
	for _, tt := range []struct {
		name string
		off  int
		hex  string
		kind backing.Kind // "" when it opens
	}{
		{"nothing", 0, "", ""},
		{"H1", 0, "51464900", backing.ErrInvalid},
		{"H2", 4, "00000004", backing.ErrNotSupported},
		{"H3", 20, "00000028", backing.ErrInvalid},
		{"H6", 72, "8000000000000000", backing.ErrNotSupported},
		{"H7 corrupt", 72, "0000000000000002", ""},
		{"H8 dirty", 72, "0000000000000001", ""},
		{"H17 too large", 36, "ffffffff", backing.ErrInvalid},
		{"H17 beyond the end", 36, "00400000", backing.ErrInvalid},
		{"H17 too small", 36, "00000000", backing.ErrInvalid},
		{"H18", 40, "1234567890abcdef", backing.ErrInvalid},
		{"H19", 40, "0000000100000000", backing.ErrInvalid},
		{"H20", 40, "0000000000000000", backing.ErrInvalid},
		{"H21 none", 56, "00000000", backing.ErrInvalid},
		{"H21 too large", 56, "ffffffff", backing.ErrInvalid},
		{"H22 unaligned", 48, "1234567890abcdef", backing.ErrInvalid},
		{"H22 none", 48, "0000000000000000", ""},
		{"S6 too many", 60, "00010001", backing.ErrInvalid},
		{"S6 offset", 60, "00000001 ffffffffffff0000", backing.ErrInvalid},
		{"data file", 72, "0000000000000004", backing.ErrInvalid},
	} {
		t.Run(tt.name, func(t *testing.T) {
			st := storetest.New(patch(t, d, tt.off, tt.hex))
			m, err := qcow2.OpenImage(context.Background(), st, quiet())
			if tt.kind == "" {
				if err != nil || at(t, m, 0).Kind != qcow2.Data {
					t.Fatalf("OpenImage: %v, want data at 0", err)
				}
				return
			}
			var e *backing.Error
			if !errors.As(err, &e) || e.Op != "open" || e.Path != "test" || e.Kind != tt.kind || e.Err == nil {
				t.Errorf("OpenImage: %v, want kind %q", err, tt.kind)
			}
			if st.Closed() != 1 {
				t.Errorf("the file was closed %d times, want once", st.Closed())
			}
		})
	}
}

func TestImageSaysWhatItIs(t *testing.T) {
	b := made(t, "cluster_size=64k,extended_l2=on,refcount_bits=8", "64M")
	m := open(t, b, quiet())
	h, err := qcow2.ReadHeader(context.Background(), storetest.New(b))
	if err != nil || m.Header().Size != h.Size || h.Size != 64<<20 || m.Geometry() != h.Geometry() || m.Below() != nil {
		t.Errorf("header %+v, %v; geometry %+v", h, err, m.Geometry())
	}
	var _ qcow2.Clustered = m
	for _, n := range []int{0, 3, 23, 71, 103} {
		if _, err := qcow2.ReadHeader(context.Background(), storetest.New(b[:n])); !errors.Is(err, backing.ErrInvalid) {
			t.Errorf("header of %d bytes: %v", n, err)
		}
	}
	st := storetest.New(b)
	if _, err := qcow2.ReadHeader(context.Background(), st); err != nil || st.Bytes(storetest.Read) > 64<<10 {
		t.Errorf("the header took %d bytes, %v", st.Bytes(storetest.Read), err)
	}
}

// TestLastClusterMayBeMissing is M14 and the bound beyond it.
func TestLastClusterMayBeMissing(t *testing.T) {
	d := made(t, "cluster_size=64k", "64M", written)
	m := open(t, d[:0x50000+40960], quiet())
	if got := spans(t, m, 0, 64<<10); len(got) != 2 || got[0].Kind != qcow2.Data || got[0].Len != 40960 ||
		got[0].Off != 0x50000 || got[1].Kind != qcow2.Zero {
		t.Errorf("partly missing cluster: %+v", got)
	}
	if s := at(t, open(t, d[:0x50000], quiet()), 0); s.Kind != qcow2.Zero {
		t.Errorf("cluster right behind the end: %+v", s)
	}
	if s := at(t, open(t, patch(t, d, l2Table, "8000000000070000"), quiet()), 0); s.Kind != qcow2.Damaged {
		t.Errorf("cluster two behind the end: %+v", s)
	}
}

// TestCompressedDataEndWithTheFile is C2.
func TestCompressedDataEndWithTheFile(t *testing.T) {
	c := made(t, "cluster_size=64k", "64M", "write -q -c -P 65 0 64k")
	m := open(t, patch(t, c, l2Table, "7fc0000000050000"), quiet())
	s := spans(t, m, 100, 1000)[0]
	if s.Kind != qcow2.Compressed || s.Off != 0x50000 || s.InLen != int64(len(c)-0x50000) || s.Skip != 100 ||
		s.Len != 1000 || s.Cluster != 64<<10 {
		t.Errorf("span %+v in a file of %#x bytes", s, len(c))
	}
}

// u64 reads a number of an image.
func u64(b []byte, off int) int { return int(binary.BigEndian.Uint64(b[off:])) }

// TestSmallClusters are M13 and M15.
func TestSmallClusters(t *testing.T) {
	b := made(t, "cluster_size=512", "1M", "write -q -P 1 0 512", "write -q -P 2 32k 512")
	shared := open(t, patch(t, b, 1544, hex.EncodeToString(b[1536:1544])), quiet())
	if a, b := at(t, shared, 0), at(t, shared, 32<<10); a.Kind != qcow2.Data || a.Off != b.Off {
		t.Errorf("shared L2 table: %+v, %+v", a, b)
	}
	l2 := u64(b, 1536) & 0xffffff
	st := storetest.New(patch(t, b, l2+8, "0080000000000000"))
	m, err := qcow2.OpenImage(context.Background(), st, quiet())
	if err != nil {
		t.Fatal(err)
	}
	if got := spans(t, m, 0, 1024); len(got) != 2 || got[0].Kind != qcow2.Data || got[1].Kind != qcow2.Damaged {
		t.Errorf("cluster at 32 PiB: %+v", got)
	}
}

// TestDataFileHasClustersAtTheirOwnPlace are C8 and E10.
func TestDataFileHasClustersAtTheirOwnPlace(t *testing.T) {
	b := made(t, "cluster_size=64k,data_file=t.data,data_file_raw=on", "64M", written, "write -q -P 2 1M 64k")
	for _, tt := range []struct {
		name string
		hex  string
		want qcow2.SpanKind
	}{
		{"nothing", "", qcow2.Data},
		{"C8 compressed", "4000000000050000", qcow2.Damaged},
		{"E10 elsewhere", "8000000000010000", qcow2.Damaged},
		{"E10 elsewhere and zero", "8000000000010001", qcow2.Damaged},
		{"not allocated", "0000000000000000", qcow2.Absent},
	} {
		for _, lenient := range []bool{false, true} {
			t.Run(fmt.Sprint(tt.name, ",", lenient), func(t *testing.T) {
				o, data := quiet(), storetest.New(nil)
				data.Cut(64 << 20)
				o.DataFile, o.Lenient = data, lenient
				m := open(t, patch(t, b, u64(b, 0x30000)&0xffffff, tt.hex), o)
				if s := at(t, m, 0); s.Kind != tt.want {
					t.Errorf("span %+v, want kind %d", s, tt.want)
				}
				if s := at(t, m, 1<<20+5); s.Kind != qcow2.Data || s.Off != 1<<20+5 || s.Store != data {
					t.Errorf("elsewhere: %+v", s)
				}
			})
		}
	}
}

// TestFilesThatAnImageNeeds refuses an image without them, and closes all.
func TestFilesThatAnImageNeeds(t *testing.T) {
	dir := t.TempDir()
	qemu(t, dir, "qemu-img", "create", "-q", "-f", "qcow2", "-b", "below", "-F", "raw", "-u", "t", "1M")
	overlay, err := os.ReadFile(filepath.Join(dir, "t"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := qcow2.OpenImage(context.Background(), storetest.New(overlay), quiet()); !errors.Is(err, backing.ErrInvalid) {
		t.Errorf("without its backing file: %v", err)
	}
	below, data, st := storetest.New(nil), storetest.New(nil), storetest.New(overlay)
	o := quiet()
	if o.Backing, err = qcow2.NewRawLayer(below); err != nil {
		t.Fatal(err)
	}
	o.DataFile = data
	if _, err := qcow2.OpenImage(context.Background(), st, o); !errors.Is(err, backing.ErrInvalid) {
		t.Errorf("with a data file that it does not need: %v", err)
	}
	if below.Closed() != 1 || data.Closed() != 1 || st.Closed() != 1 {
		t.Errorf("closed %d, %d, %d times, want once each", below.Closed(), data.Closed(), st.Closed())
	}
}

// TestEveryFailedCallIsReported makes each call of opening and mapping fail.
func TestEveryFailedCallIsReported(t *testing.T) {
	b := made(t, "cluster_size=64k", "64M", written, "snapshot s1")
	boom := errors.New("boom")
	use := func(st *storetest.Mem) error {
		m, err := qcow2.OpenImage(context.Background(), st, snapshotOf("s1"))
		if err == nil {
			err = m.Spans(context.Background(), 0, m.Size(), func(qcow2.Span) bool { return true })
		}
		return err
	}
	whole := storetest.New(b)
	if err := use(whole); err != nil || whole.Calls() < 8 {
		t.Fatalf("%d calls, %v", whole.Calls(), err)
	}
	for n := range whole.Calls() {
		st := storetest.New(b)
		st.FailCall(n+1, boom)
		var e *backing.Error
		if err := use(st); !errors.Is(err, boom) || !errors.As(err, &e) || e.Kind != backing.ErrIO || e.Path != "test" {
			t.Errorf("call %d: %v", n+1, err)
		}
	}
}

func TestTablesAreReadInPieces(t *testing.T) {
	b := made(t, "cluster_size=2M", "512G", written)
	st := storetest.New(b)
	m, err := qcow2.OpenImage(context.Background(), st, quiet())
	if err != nil {
		t.Fatal(err)
	}
	before := st.Bytes(storetest.Read)
	if at(t, m, 0).Kind != qcow2.Data || st.Bytes(storetest.Read)-before > 16 {
		t.Errorf("one entry took %d bytes", st.Bytes(storetest.Read)-before)
	}
	reads := st.Count(storetest.Read)
	if got := spans(t, m, 0, m.Size()); len(got) != 2 || st.Count(storetest.Read)-reads != 32 {
		t.Errorf("%d spans with %d reads, want 2 with 32", len(got), st.Count(storetest.Read)-reads)
	}
	if err := m.Spans(context.Background(), 1, m.Size(), nil); !errors.Is(err, backing.ErrOutOfRange) {
		t.Errorf("beyond the end: %v", err)
	}
	n := 0
	if err := m.Spans(context.Background(), 0, m.Size(), func(qcow2.Span) bool { n++; return false }); err != nil || n != 1 {
		t.Errorf("stopped after %d spans, %v", n, err)
	}
}

func TestRawLayerIsDataAndHoles(t *testing.T) {
	st := storetest.New([]byte{4096: 1, 8191: 1})
	st.Cut(9000)
	l, err := qcow2.NewRawLayer(st)
	if err != nil {
		t.Fatal(err)
	}
	if l.Size() != 9000 || l.Below() != nil {
		t.Errorf("size %d, below %v", l.Size(), l.Below())
	}
	got := spans(t, l, 100, 8900)
	if want := []qcow2.Span{
		{Kind: qcow2.Zero, Len: 3996},
		{Kind: qcow2.Data, Len: 512, Store: st, Off: 4096},
		{Kind: qcow2.Zero, Len: 3072},
		{Kind: qcow2.Data, Len: 512, Store: st, Off: 7680},
		{Kind: qcow2.Zero, Len: 808},
	}; !slices.Equal(got, want) {
		t.Errorf("spans %+v, want %+v", got, want)
	}
	st.FailOp(storetest.Extents, 1, backing.ErrNotSupported)
	if got := spans(t, l, 0, 9000); len(got) != 1 || got[0].Kind != qcow2.Data || got[0].Len != 9000 {
		t.Errorf("without extents: %+v", got)
	}
	st.FailOp(storetest.Extents, 1, errors.New("boom"))
	if err := l.Spans(context.Background(), 0, 1, nil); !errors.Is(err, backing.ErrIO) {
		t.Errorf("failed extents: %v", err)
	}
	if err := l.Close(); err != nil || st.Closed() != 1 {
		t.Errorf("Close: %v, %d times", err, st.Closed())
	}
}
