// Command hog takes memory, and watches what becomes of it.
//
// "hog MIB PASSES" takes MIB mebibytes, writes a value of its own to each word
// of them, and then reads all of them back PASSES times, changing them between
// passes.
// Memory that was swapped out has to come back as it was. It ends with status
// 2 when a word is not what was written.
//
// "hog keep MIB" goes on with that until SIGTERM, and to the end of a pass.
//
// "hog watch SECONDS" says STUCK on the kernel's console and ends the machine
// when for so long no page was swapped in or out.
package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "hog:", err)
		os.Exit(2)
	}
}

func run(args []string) error {
	if len(args) != 2 {
		return errors.New("want MIB PASSES, keep MIB, or watch SECONDS")
	}
	n, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	switch args[0] {
	case "watch":
		return watch(n)
	case "keep":
		ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
		defer stop()
		return fill(n, func(int) bool { return ctx.Err() == nil })
	}
	mib, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	return fill(mib, func(passes int) bool { return passes < n })
}

// fill takes memory and verifies it for as long as more wants a pass after so
// many.
func fill(mib int, more func(passes int) bool) error {
	mem, err := unix.Mmap(-1, 0, mib<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return err
	}
	words := unsafe.Slice((*uint64)(unsafe.Pointer(unsafe.SliceData(mem))), len(mem)/8)
	for i := range words {
		words[i] = value(i, 0)
	}
	fmt.Println("hog: filled", mib, "MiB")
	p := 0
	for ; more(p); p++ {
		for i := range words {
			if words[i] != value(i, p) {
				return fmt.Errorf("pass %d: word %d is %#x, want %#x", p, i, words[i], value(i, p))
			}
			words[i] = value(i, p+1)
		}
	}
	fmt.Println("hog:", p, "passes verified")
	return nil
}

// value is what word i has after pass p: no two words of a page are alike.
func value(i, p int) uint64 { return (uint64(i) + uint64(p)<<48) * 0x9E3779B97F4A7C15 }

// watch ends the machine when it is stuck. Its own memory stays, and it may use
// what is kept back from others.
func watch(seconds int) error {
	if err := unix.SchedSetAttr(0, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_RR, Priority: 50}, 0); err != nil {
		return err
	}
	if err := unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE | unix.MCL_ONFAULT); err != nil {
		return err
	}
	vmstat, err := os.Open("/proc/vmstat")
	if err != nil {
		return err
	}
	buf := make([]byte, 64<<10)
	last, still := "", 0
	for range time.Tick(time.Second) {
		n, err := vmstat.ReadAt(buf, 0)
		if n == 0 {
			return err
		}
		if now := moved(buf[:n]); now != last {
			last, still = now, 0
			continue
		}
		if still++; still >= seconds {
			fmt.Println("\nSTUCK: for", seconds, "seconds no page was swapped:", last)
			return end()
		}
	}
	return nil
}

// end has the kernel tell of its memory and of tasks that wait, all of it on the
// console (9), and ends the machine.
func end() error {
	for _, key := range "9mwlb" {
		if err := os.WriteFile("/proc/sysrq-trigger", []byte(string(key)), 0); err != nil {
			return err
		}
		time.Sleep(time.Second) // a serial console is slow
	}
	return nil
}

// moved is the part of /proc/vmstat that changes with each page swapped.
func moved(vmstat []byte) string {
	_, from, _ := bytes.Cut(vmstat, []byte("\npswpin "))
	in, from, _ := bytes.Cut(from, []byte("\npswpout "))
	out, _, _ := bytes.Cut(from, []byte("\n"))
	return string(in) + " in, " + string(out) + " out"
}
