package config

import (
	"encoding/hex"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/units"
)

// check looks at everything of an export but its listeners.
func (e *Export) check(k checker, s Scope) {
	k.name(e.Name)
	if endsInToken(e.Name) {
		k.fail("name: it ends like one with a token, in \"?\" and %d hexadecimal digits", limits.TokenDigits)
	}
	k.text("description", e.Description, limits.MaxString, "\n\t")
	k.word("format", e.ImageFormat(), "raw", "qcow2", "mem", "null")
	k.word("cache", e.Cache, "writeback", "none", "writethrough", "directsync", "unsafe")
	k.word("image-lock", e.Lock, "auto", "on", "off")
	k.notNegative("max-connections", int64(e.Connections))
	k.notNegative("write-threshold", e.Threshold())
	e.checkImage(k, s)
	if e.Format == "qcow2" {
		e.checkChain(k, s)
	} else {
		e.checkNoChain(k)
	}
	if k.most("grant", len(e.Grants), limits.Grants) {
		e.checkGrants(k, s.onlyVsock(e))
	}
	e.checkLayers(k, s)
}

// endsInToken tells whether a client that asks for the name would show a token by
// it, so that no server has an export of that name.
func endsInToken(name string) bool {
	i := strings.LastIndexByte(name, '?')
	if i < 0 || len(name)-i-1 != limits.TokenDigits {
		return false
	}
	_, err := hex.DecodeString(name[i+1:])
	return err == nil
}

func (e *Export) checkImage(k checker, s Scope) {
	if e.Format != "mem" && e.Format != "null" {
		k.file("image", e.Image, s)
		return
	}
	if n, err := units.ParseSize(e.Image); err != nil || n == 0 {
		k.fail("image: for format %s it is a size, as 10G, and %q is none", e.Format, cut(e.Image))
	}
	if e.Cache == "none" || e.Cache == "directsync" {
		k.fail("cache: mode %s needs a file", e.Cache)
	}
	if e.Threshold() != 0 {
		k.fail("write-threshold: format %s has no file", e.Format)
	}
}

// file demands the path of an image within the scope, or a descriptor.
func (c checker) file(key, s string, sc Scope) {
	if n, ok := descriptor(s); ok && sc.Descriptors > 0 {
		if n >= sc.Descriptors {
			c.fail("%s: %d descriptors came, and %q is not among them", key, sc.Descriptors, s)
		}
		return
	}
	switch {
	case s == "":
		c.fail("%s: it needs a path", key)
	case c.path(key, s) && !sc.Contains(s):
		c.outside(key, s, sc)
	}
}

// outside is that an image lies where none may.
func (c checker) outside(key, s string, sc Scope) {
	way := "add its folder there, and restart"
	if sc.API {
		way = "--fd hands it over, or add its folder there and restart the daemon"
	}
	n := len(*c.problems)
	c.fail("%s: %q is not in a folder that images.roots names: %s", key, cut(s), way)
	if len(*c.problems) > n {
		(*c.problems)[n].Outside = true
	}
}

// descriptor reads "fd:N", where N has one form only.
func descriptor(s string) (n int, ok bool) {
	digits, ok := strings.CutPrefix(s, "fd:")
	u, err := strconv.ParseUint(digits, 10, 16)
	return int(u), ok && err == nil && strconv.FormatUint(u, 10) == digits
}

// Descriptors is how many files come with e: one more than the highest "fd:N" among
// the names of its files.
func (e *Export) Descriptors() (count int) {
	for _, path := range slices.Concat([]string{e.Image}, e.BackingFiles, e.DataFiles) {
		if n, ok := descriptor(withoutFormat(path)); ok {
			count = max(count, n+1)
		}
	}
	return count
}

// checkChain looks at what is for qcow2 images only.
func (e *Export) checkChain(k checker, s Scope) {
	k.word("discard", e.Discard, "unmap", "keep", "ignore")
	if n := e.L2CacheSize; n != 0 && (n < limits.MapCacheLeast || n > limits.MapCacheMost) {
		k.fail("l2-cache-size: %d is not from %d to %d", n, limits.MapCacheLeast, limits.MapCacheMost)
	}
	if e.Lenient && !e.ReadOnly {
		k.fail("lenient: it needs readonly")
	}
	k.text("snapshot", e.Snapshot, limits.MaxString, "")
	named := len(e.BackingFiles)+len(e.DataFiles) > 0
	dir, beneath := strings.CutPrefix(e.Backing, "beneath=")
	switch {
	case beneath:
		if k.path("backing", dir) && !s.Contains(dir) && !slices.Contains(s.Roots, dir) {
			k.outside("backing", dir, s)
		}
	default:
		k.word("backing", e.Backing, "deny", "same-dir", "beneath=DIR", "explicit")
	}
	if named != (e.Backing == "explicit") {
		k.fail("backing: explicit, and backing-files or data-files, need each other")
	}
	if k.most("backing-files", len(e.BackingFiles), limits.ChainDepth) {
		for _, f := range e.BackingFiles {
			k.file("backing-files", withoutFormat(f), s)
		}
	}
	if k.most("data-files", len(e.DataFiles), limits.ChainDepth) {
		for _, f := range e.DataFiles {
			k.file("data-files", f, s)
		}
	}
}

// withoutFormat is the path of PATH or PATH:FORMAT.
func withoutFormat(s string) string {
	for _, f := range [...]string{":raw", ":qcow2"} {
		if path, ok := strings.CutSuffix(s, f); ok {
			return path
		}
	}
	return s
}

func (e *Export) checkNoChain(k checker) {
	for _, w := range [...]struct {
		key   string
		given bool
	}{
		{"backing", e.Backing != ""}, {"backing-files", len(e.BackingFiles) > 0},
		{"data-files", len(e.DataFiles) > 0}, {"snapshot", e.Snapshot != ""},
		{"discard", e.Discard != ""}, {"lenient", e.Lenient}, {"l2-cache-size", e.L2CacheSize != 0},
	} {
		if w.given {
			k.fail("%s: it needs format qcow2", w.key)
		}
	}
}

func (e *Export) checkLayers(k checker, s Scope) {
	if w := e.Window; w != nil {
		w.check(k.in("window"))
	}
	if o := e.Overlay; o != nil && o.Quota <= 0 {
		k.in("overlay").fail("quota: it must be larger than 0")
	}
	if k.most("protect", len(e.Protect), limits.ProtectRanges) {
		for i, r := range e.Protect {
			k.in("protect %d", i+1).span(r.Offset, r.Length, false)
		}
	}
	if b := e.BlockSize; b != nil {
		b.check(k.in("block-size"))
	}
	if r := e.Rate; r != nil {
		r.check(k.in("rate"))
	}
	if _, ok := s.Groups[e.RateGroup]; e.RateGroup != "" && !ok {
		k.fail("rate-group: there is none that is called %q", cut(e.RateGroup))
	}
	if k.most("fault", len(e.Faults), limits.FaultRules) {
		for i := range e.Faults {
			e.Faults[i].check(k.in("fault %d", i+1))
		}
	}
}

func (w *Window) check(k checker) {
	k.span(w.Offset, w.Length, true)
	switch {
	case w.Partition < 0 || w.Partition > limits.Partitions:
		k.fail("partition: want 1 to %d", limits.Partitions)
	case w.Partition > 0 && (w.Offset != 0 || w.Length != 0):
		k.fail("partition excludes offset and length")
	case w.SectorSize != 0 && w.Partition == 0:
		k.fail("sector-size: it needs partition")
	case w.SectorSize != 0 && (w.SectorSize < 512 || w.SectorSize > limits.LargestBlock || w.SectorSize&(w.SectorSize-1) != 0):
		k.fail("sector-size: want a power of two from 512 to %d", limits.LargestBlock)
	}
}

func (b *BlockSize) check(k checker) {
	for _, n := range [...]struct {
		key     string
		n, most Size
	}{
		{"minimum", b.Minimum, limits.LargestBlock}, {"preferred", b.Preferred, limits.MaxIO}, {"maximum", b.Maximum, limits.MaxIO},
	} {
		if n.n < 0 || n.n&(n.n-1) != 0 || n.n > n.most {
			k.fail("%s: want a power of two up to %d", n.key, n.most)
		}
	}
	if b.Maximum != 0 && b.Maximum < b.Minimum {
		k.fail("maximum: it is smaller than minimum")
	}
}

func (f *Fault) check(k checker) {
	for _, op := range f.Ops {
		k.word("ops", op, "read", "write", "zero", "trim", "flush")
	}
	k.span(f.Offset, f.Length, true)
	if !(f.Probability >= 0 && f.Probability <= 1) {
		k.fail("probability: %v is not between 0 and 1", f.Probability)
	}
	k.notNegative("count", int64(f.Count))
	k.word("error", f.Error, "", "EIO", "ENOSPC")
	switch {
	case f.Delay < 0 || time.Duration(f.Delay) > limits.InjectDelay:
		k.fail("delay: want 0s to %v", limits.InjectDelay)
	case f.Delay == 0 && f.Error == "":
		k.fail("it has neither an error nor a delay")
	}
}
