package confine

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// LockMemory makes the memory of the process resident, and all that it will
// get, for good, and returns how much that is, in bytes. It is called when all
// threads and buffers are there.
//
// Go's runtime and libraries have some tables of 32 MiB that nobody touches:
// long runs of such pages are not made, and stay once somebody does touch them.
func LockMemory() (resident int64, err error) {
	if Without(SwapLocked) {
		return 0, nil
	}
	if err := lockAll(); err != nil {
		return 0, &Missing{Protection: SwapLocked, Err: err, Remedy: lockRemedy(err)}
	}
	locked, resident, err := lockedMemory()
	if err == nil && locked < resident {
		err = fmt.Errorf("%d bytes of %d resident ones are locked", locked, resident)
	}
	if err != nil {
		return resident, &Missing{Protection: SwapLocked, Err: err}
	}
	return resident, nil
}

func lockRemedy(err error) string {
	switch {
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.ENOMEM):
		return "RLIMIT_MEMLOCK must be infinite (in a unit: LimitMEMLOCK=infinity), and the machine needs the memory"
	case errors.Is(err, unix.EAGAIN):
		return "the machine, or the unit's MemoryMax=, has too little memory"
	}
	return ""
}

// lockAll locks what is there, makes all of it but long untouched runs, and
// lets new mappings be made and locked at once.
func lockAll() error {
	if err := unix.Mlockall(unix.MCL_CURRENT | unix.MCL_ONFAULT); err != nil {
		return fmt.Errorf("mlockall: %w", err)
	}
	if err := unix.Mlockall(unix.MCL_FUTURE); err != nil {
		return fmt.Errorf("mlockall: %w", err)
	}
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(maps)) {
		r, ok, err := parseMapping(line)
		if err != nil {
			return err
		}
		if !ok {
			continue
		}
		touched, err := r.touched()
		if err != nil {
			return err
		}
		for _, t := range touched {
			if _, _, e := unix.Syscall(unix.SYS_MLOCK, t.from, t.to-t.from, 0); e != 0 {
				return fmt.Errorf("mlock %x-%x: %w", t.from, t.to, e)
			}
		}
	}
	return nil
}

// span is a range of addresses.
type span struct{ from, to uintptr }

// parseMapping reads a line of /proc/PID/maps; ok is false for what has no
// memory of the process: reserved addresses and pages of the kernel.
func parseMapping(line string) (r span, ok bool, err error) {
	f := strings.Fields(line)
	if len(f) < 5 {
		return r, false, fmt.Errorf("mapping %q has %d fields, want 5", line, len(f))
	}
	from, to, _ := strings.Cut(f[0], "-")
	a, err := strconv.ParseUint(from, 16, 64)
	if err != nil {
		return r, false, err
	}
	b, err := strconv.ParseUint(to, 16, 64)
	if err != nil {
		return r, false, err
	}
	kernels := len(f) > 5 && strings.HasPrefix(f[5], "[v")
	return span{uintptr(a), uintptr(b)}, !strings.HasPrefix(f[1], "---") && !kernels && a < b, nil
}

// touched is r without what is at least limits.SwapMargin inside of a run of
// absent pages of limits.SwapUntouched.
func (r span) touched() ([]span, error) {
	if r.to-r.from < limits.SwapUntouched {
		return []span{r}, nil
	}
	page := uintptr(os.Getpagesize())
	present := make([]byte, (r.to-r.from)/page)
	_, _, e := unix.Syscall(unix.SYS_MINCORE, r.from, r.to-r.from, uintptr(unsafe.Pointer(unsafe.SliceData(present))))
	if e != 0 {
		return nil, fmt.Errorf("mincore %x-%x: %w", r.from, r.to, e)
	}
	return r.without(present, page), nil
}

// without leaves out long runs of pages that are not present.
func (r span) without(present []byte, page uintptr) (out []span) {
	base := r.from
	for i := 0; i < len(present); {
		n := absent(present[i:])
		if uintptr(n)*page >= limits.SwapUntouched {
			at := base + uintptr(i)*page
			out = append(out, span{r.from, at + limits.SwapMargin})
			r.from = at + uintptr(n)*page - limits.SwapMargin
		}
		i += n + 1
	}
	return append(out, r)
}

// absent counts the pages at the front that are not present: the lowest bit of
// what mincore(2) tells is 0.
func absent(present []byte) int {
	for i, c := range present {
		if c&1 != 0 {
			return i
		}
	}
	return len(present)
}

// lockedMemory reads VmLck and VmRSS, in bytes.
func lockedMemory() (locked, resident int64, err error) {
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0, 0, err
	}
	for line := range strings.Lines(string(b)) {
		name, value, _ := strings.Cut(line, ":")
		to := map[string]*int64{"VmLck": &locked, "VmRSS": &resident}[name]
		if to == nil {
			continue
		}
		kib, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 10, 50)
		if err != nil {
			return 0, 0, err
		}
		*to = kib << 10
	}
	return locked, resident, nil
}
