package layer_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"hash/crc32"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/backingtest"
	"github.com/vmdiskd/vmdiskd/internal/backing/layer"
	"github.com/vmdiskd/vmdiskd/internal/backing/mem"
)

// sfdisk makes a table by a script on the disk at path, and returns what sfdisk
// itself says of it, by number.
func sfdisk(t *testing.T, path, script string, sector int64) map[int]layer.Range {
	t.Helper()
	tool, err := exec.LookPath("sfdisk")
	if err != nil {
		if tool, err = exec.LookPath("/usr/sbin/sfdisk"); err != nil {
			t.Fatalf("needs sfdisk of the package fdisk: %v", err)
		}
	}
	cmd := exec.Command(tool, "--quiet", "--no-reread", "--no-tell-kernel", path)
	cmd.Stdin = strings.NewReader(script)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("sfdisk: %v\n%s", err, out)
	}
	out, err := exec.Command(tool, "--json", path).Output()
	if err != nil {
		t.Fatalf("sfdisk --json: %v", err)
	}
	var said struct {
		PartitionTable struct {
			SectorSize int64
			Partitions []struct {
				Node, Type  string
				Start, Size int64
			}
		}
	}
	if err := json.Unmarshal(out, &said); err != nil {
		t.Fatal(err)
	}
	if got := said.PartitionTable.SectorSize; got != sector {
		t.Fatalf("sfdisk counts in %d bytes, want %d", got, sector)
	}
	list := map[int]layer.Range{}
	for _, p := range said.PartitionTable.Partitions {
		no, err := strconv.Atoi(strings.TrimPrefix(strings.TrimPrefix(p.Node, path), "p"))
		if err != nil {
			t.Fatal(err)
		}
		if p.Type != "5" && p.Type != "f" {
			list[no] = layer.Range{Off: p.Start * sector, Len: p.Size * sector}
		}
	}
	if len(list) < 3 {
		t.Fatalf("sfdisk made %v", list)
	}
	return list
}

// scriptSectors is how many sectors a disk needs for the scripts.
const scriptSectors = 32 << 10

// emptyDisk is the path of a file with room for the scripts in sectors of a size.
func emptyDisk(t *testing.T, sector int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.img")
	if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, scriptSectors*sector)); err != nil {
		t.Fatal(err)
	}
	return path
}

// sfdiskFile is a file with a table, and what sfdisk says of that.
func sfdiskFile(t *testing.T, script string) ([]byte, map[int]layer.Range) {
	t.Helper()
	path := emptyDisk(t, 512)
	list := sfdisk(t, path, script, 512)
	return must(os.ReadFile(path)), list
}

func diskOf(p []byte) backing.Device { return mem.New(int64(len(p)), p) }

// findsAll compares all numbers up to 40.
func findsAll(t *testing.T, d backing.Device, sector int64, want map[int]layer.Range) {
	t.Helper()
	for n := 1; n <= 40; n++ {
		r, err := layer.FindPartition(t.Context(), d, n, sector)
		if w, ok := want[n]; ok && (err != nil || r != w) {
			t.Errorf("partition %d: got %+v, %v, want %+v", n, r, err, w)
		} else if !ok {
			isKind(t, "partition "+strconv.Itoa(n), err, backing.ErrInvalid)
		}
	}
}

const (
	dosScript = "label: dos\nstart=2048,size=2048,type=83\nstart=8192,size=20480,type=5\nstart=4096,size=100,type=82\n" +
		"start=10240,size=1000,type=83\nstart=14336,size=2048,type=83\nstart=20480,size=4096,type=83\n"
	gptScript = "label: gpt\n2: start=2048,size=2048\n5: start=8192,size=1\n30: start=10240\n"
)

// forScripts runs a test with a table of each kind.
func forScripts(t *testing.T, test func(t *testing.T, script string)) {
	for name, script := range map[string]string{"dos": dosScript, "gpt": gptScript} {
		t.Run(name, func(t *testing.T) { test(t, script) })
	}
}

func TestPartitionsAreWhereSfdiskPutThem(t *testing.T) {
	forScripts(t, func(t *testing.T, script string) {
		disk, want := sfdiskFile(t, script)
		findsAll(t, diskOf(disk), 0, want)
	})
}

// TestTableCountsInTheSectorsOfItsDisk: those of the block device that has the disk,
// whatever is in between, and of its copy in a file those that are given.
func TestTableCountsInTheSectorsOfItsDisk(t *testing.T) {
	for _, sector := range []int64{512, 4096} {
		t.Run(strconv.FormatInt(sector, 10), func(t *testing.T) {
			forScripts(t, func(t *testing.T, script string) {
				path := emptyDisk(t, sector)
				node := backingtest.Loop(t, path, uint32(sector))
				want := sfdisk(t, node, script, sector)
				d := closing(t, openRaw(t, "pool", node, 0))
				if got := d.Info().Sector; got != sector {
					t.Errorf("a device with sectors of %d bytes says %d", sector, got)
				}
				findsAll(t, layer.NewSwap(backing.NewChecked(d, 0)), 0, want)
				findsAll(t, closing(t, openRaw(t, "pool", path, 0)), sector, want)
			})
		})
	}
}

func TestGPTIsReadFromTheEnd(t *testing.T) {
	disk, want := sfdiskFile(t, gptScript)
	for _, at := range []int{512 + 20, 1024 + 128, 1024 + 5000} { // header, entries
		spoilt := bytes.Clone(disk)
		spoilt[at] ^= 1
		findsAll(t, diskOf(spoilt), 0, want)
		spoilt[len(disk)-512+56] ^= 1
		_, err := layer.FindPartition(t.Context(), diskOf(spoilt), 2, 0)
		isKind(t, "both copies damaged", err, backing.ErrInvalid)
	}
}

// The copy at the end is not asked for what a whole table does not have.
func TestStaleCopyIsNotRead(t *testing.T) {
	disk, _ := sfdiskFile(t, gptScript)
	e := disk[1024:][:128*128]
	clear(e[128:256]) // number 2
	seal(disk, 512)
	_, err := layer.FindPartition(t.Context(), diskOf(disk), 2, 0)
	isKind(t, "partition that was deleted", err, backing.ErrInvalid)
}

// seal makes the sums of a GPT in blocks of some size right.
func seal(disk []byte, sector int) {
	h := disk[sector:][:92]
	at, n := binary.LittleEndian.Uint64(h[72:]), binary.LittleEndian.Uint32(h[80:])*binary.LittleEndian.Uint32(h[84:])
	if at < uint64(len(disk)/sector) && uint64(n) <= uint64(len(disk))-at*uint64(sector) {
		binary.LittleEndian.PutUint32(h[88:], crc32.ChecksumIEEE(disk[at*uint64(sector):][:n]))
	}
	clear(h[16:20])
	binary.LittleEndian.PutUint32(h[16:], crc32.ChecksumIEEE(h))
}

// makeGPT makes a disk with one partition, number 1.
func makeGPT(sector int, first, last uint64) []byte {
	disk := make([]byte, 1<<20)
	disk[446+4], disk[510], disk[511] = 0xee, 0x55, 0xaa
	h := disk[sector:]
	copy(h, "EFI PART")
	le := binary.LittleEndian
	le.PutUint32(h[12:], 92)
	le.PutUint64(h[24:], 1)
	le.PutUint64(h[72:], 2)
	le.PutUint32(h[80:], 4)
	le.PutUint32(h[84:], 128)
	e := disk[2*sector:]
	e[0] = 1
	le.PutUint64(e[32:], first)
	le.PutUint64(e[40:], last)
	seal(disk, sector)
	return disk
}

func TestGPTOfLargeBlocks(t *testing.T) {
	findsAll(t, diskOf(makeGPT(4096, 10, 19)), 0, map[int]layer.Range{1: {Off: 40960, Len: 40960}})
	coarse := checkedBlocks(diskOf(makeGPT(4096, 10, 19)), 4096)
	if r, err := layer.FindPartition(t.Context(), coarse, 1, 0); err != nil || r != (layer.Range{Off: 40960, Len: 40960}) {
		t.Errorf("on a disk of large blocks: got %+v, %v", r, err)
	}
}

// sectored is a disk that tells its sectors.
type sectored struct {
	backing.Device
	sector int64
}

func (d sectored) Info() backing.Info {
	i := d.Device.Info()
	i.Sector = d.sector
	return i
}

func TestGPTsOfTwoSizesOfSectors(t *testing.T) {
	const size = 1 << 20
	small, large := layer.Range{Off: 51200, Len: 51200}, layer.Range{Off: 40960, Len: 40960}
	// both has a table for each size, and those in same agree.
	both, same := makeGPT(4096, 10, 19), makeGPT(4096, 10, 19)
	copy(both[512:2048], makeGPT(512, 100, 199)[512:])
	copy(same[512:2048], makeGPT(512, 80, 159)[512:])
	// stale has a table for large sectors, and of that for small ones which was
	// there before the copy at the end.
	stale := makeGPT(512, 100, 199)
	binary.LittleEndian.PutUint64(stale[512+24:], size/512-1)
	seal(stale, 512)
	copy(stale[size-512:], stale[512:1024])
	clear(stale[512:1024])
	copy(stale[4096:12288], makeGPT(4096, 10, 19)[4096:])
	for _, tt := range []struct {
		name         string
		disk         []byte
		says, sector int64
		want         layer.Range // none is ErrInvalid
	}{
		{"nothing is known", both, 0, 0, layer.Range{}},
		{"they agree", same, 0, 0, large},
		{"512 is given", both, 0, 512, small},
		{"4096 is given", both, 0, 4096, large},
		{"the disk says 512", both, 512, 0, small},
		{"the disk says 4096", both, 4096, 0, large},
		{"the disk says another", both, 1024, 0, layer.Range{}},
		{"512 is given for a disk of 4096", both, 4096, 512, small},
		{"one that is not there is given", both, 512, 1024, layer.Range{}},
		{"one is a copy", stale, 0, 0, large},
		{"the disk says that of the copy", stale, 512, 0, small},
		{"one that a guest made", makeGPT(512, 100, 199), 4096, 0, small},
	} {
		r, err := layer.FindPartition(t.Context(), sectored{diskOf(tt.disk), tt.says}, 1, tt.sector)
		switch {
		case tt.want == layer.Range{}:
			isKind(t, tt.name, err, backing.ErrInvalid)
		case err != nil || r != tt.want:
			t.Errorf("%s: got %+v, %v, want %+v", tt.name, r, err, tt.want)
		}
	}
}

func TestHostileTablesAreRefused(t *testing.T) {
	set := func(at int, v uint64, n int) func([]byte) {
		return func(d []byte) {
			var b [8]byte
			binary.LittleEndian.PutUint64(b[:], v)
			copy(d[at:], b[:n])
		}
	}
	h, e := 512, 1024
	for name, spoil := range map[string]func([]byte){
		"no table":               func(d []byte) { d[511] = 0 },
		"first after last":       set(e+32, 500, 8),
		"last beyond the disk":   set(e+40, 2048, 8),
		"last of all":            set(e+40, 1<<64-1, 8),
		"first of all":           set(e+32, 1<<64-1, 8),
		"short header":           set(h+12, 91, 4),
		"long header":            set(h+12, 1<<32-1, 4),
		"no entries":             set(h+80, 0, 4),
		"many entries":           set(h+80, 1<<32-1, 4),
		"small entries":          set(h+84, 127, 4),
		"odd entries":            set(h+84, 200, 4),
		"large entries":          set(h+84, 1<<31, 4),
		"entries beyond":         set(h+72, 2047, 8),
		"entries far beyond":     set(h+72, 1<<63, 8),
		"entries nearly at 2^64": set(h+72, 1<<64-1, 8),
		"header of elsewhere":    set(h+24, 2, 8),
	} {
		disk := makeGPT(512, 100, 199)
		spoil(disk)
		seal(disk, 512)
		_, err := layer.FindPartition(t.Context(), diskOf(disk), 1, 0)
		isKind(t, name, err, backing.ErrInvalid)
	}
	for _, size := range []int64{0, 1, 511, 512, 600, 1024} {
		_, err := layer.FindPartition(t.Context(), mem.New(size, makeGPT(512, 1, 1)), 1, 0)
		isKind(t, "disk of "+strconv.FormatInt(size, 10), err, backing.ErrInvalid)
	}
	for _, n := range []int{-1, 0, 129, 1 << 40} {
		_, err := layer.FindPartition(t.Context(), diskOf(makeGPT(512, 100, 199)), n, 0)
		isKind(t, "number "+strconv.Itoa(n), err, backing.ErrInvalid)
	}
	for _, sector := range []int64{-512, 1, 256, 1000, 128 << 10, 1 << 62} {
		_, err := layer.FindPartition(t.Context(), diskOf(makeGPT(512, 100, 199)), 1, sector)
		isKind(t, "sectors of "+strconv.FormatInt(sector, 10), err, backing.ErrInvalid)
	}
}

// mbrDisk has an extended partition whose EBR names itself and a partition.
func mbrDisk(kind byte, first, count, next uint32) []byte {
	disk := make([]byte, 1<<20)
	entry := func(at int, kind byte, first, count uint32) {
		disk[at+4] = kind
		binary.LittleEndian.PutUint32(disk[at+8:], first)
		binary.LittleEndian.PutUint32(disk[at+12:], count)
	}
	entry(446, 5, 10, 1000)
	entry(10*512+446, kind, first, count)
	entry(10*512+462, 5, next, 100)
	for _, at := range []int{510, 10*512 + 510, 20*512 + 510} {
		disk[at], disk[at+1] = 0x55, 0xaa
	}
	return disk
}

func TestChainOfLogicalPartitionsMayBeHostile(t *testing.T) {
	for name, disk := range map[string][]byte{
		"loop without a partition":  mbrDisk(0, 0, 0, 0),
		"loop over two":             mbrDisk(0, 0, 0, 10),
		"far away":                  mbrDisk(0, 0, 0, 1<<32-1),
		"outside of the partition":  mbrDisk(0, 0, 0, 1000),
		"no table there":            mbrDisk(0, 0, 0, 11),
		"partition beyond the disk": mbrDisk(0x83, 1, 1<<32-1, 0),
		"partition far away":        mbrDisk(0x83, 1<<32-1, 1, 0),
		"partition without sectors": mbrDisk(0x83, 1, 0, 0),
	} {
		_, err := layer.FindPartition(t.Context(), diskOf(disk), 5, 0)
		isKind(t, name, err, backing.ErrInvalid)
	}
	findsAll(t, diskOf(mbrDisk(0x83, 1, 5, 0)), 0, map[int]layer.Range{5: {Off: 11 * 512, Len: 5 * 512}})
}

func TestErrorOfReadingATableIsItself(t *testing.T) {
	for _, at := range []int64{0, 512, 1024} {
		lost := faulty(diskOf(makeGPT(512, 100, 199)), 0, layer.Fault{Ops: layer.FaultRead, Range: layer.Range{Off: at, Len: 1}, Probability: 1, Error: backing.ErrIO})
		_, err := layer.FindPartition(t.Context(), lost, 1, 0)
		isKind(t, "read of "+strconv.FormatInt(at, 10), err, backing.ErrIO)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	late := paused(t, diskOf(makeGPT(512, 100, 199)))
	if _, err := layer.FindPartition(ctx, late, 1, 0); !errors.Is(err, context.Canceled) {
		t.Errorf("with a context that has ended: got %v, want %v", err, context.Canceled)
	}
}

// paused is a disk that is paused.
func paused(t *testing.T, d backing.Device) backing.Device {
	p := layer.NewPause(d)
	h := must(p.Pause(t.Context(), 1<<36))
	t.Cleanup(func() { _ = h.Resume() })
	return p
}

// FuzzFindPartition checks that what is found lies in the disk, and that no
// table takes the parser down.
func FuzzFindPartition(f *testing.F) {
	f.Add(makeGPT(512, 100, 199)[:4096], 1, uint8(0))
	f.Add(makeGPT(4096, 1, 5)[:16384], 1, uint8(3))
	f.Add(mbrDisk(0x83, 1, 5, 0)[:8192], 5, uint8(7))
	f.Fuzz(func(t *testing.T, p []byte, n int, log uint8) {
		disk := bytes.Clone(p)
		if len(disk) >= 2048 {
			seal(disk, 512)
		}
		d := diskOf(disk)
		r, err := layer.FindPartition(t.Context(), sectored{d, 512 << (log % 8)}, n, 0)
		if err != nil {
			isKind(t, "error", err, backing.ErrInvalid)
			return
		}
		if _, err := layer.NewWindow(d, layer.WindowOptions{Off: r.Off, Size: r.Len}); err != nil {
			t.Errorf("window at %+v: %v", r, err)
		}
	})
}
