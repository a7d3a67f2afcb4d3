package main

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"testing"
	"time"
)

// cpuTicks is what the service has used, in ticks of 10 ms (proc(5)).
func (s *testService) cpuTicks() (ticks int) {
	s.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", s.cmd.Process.Pid))
	if err != nil {
		s.Fatal(err)
	}
	f := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:])
	for _, i := range []int{11, 12} { // utime and stime, behind the name
		n, err := strconv.Atoi(string(f[i]))
		if err != nil {
			s.Fatal(err)
		}
		ticks += n
	}
	return ticks
}

// TestIdleConnectionsCostLittle is LM-08 in short: 256 connections of 16 peers do
// nothing, for a second. The first of each peer are there before what is counted.
func TestIdleConnectionsCostLittle(t *testing.T) {
	t.Parallel()
	addr, listener := tcpListener(t)
	s := newService(t, listener+exportA)
	open := func(peers, each int) {
		t.Helper()
		for p := range peers {
			for range each {
				k, _ := mustGo(t, dialFrom(t, fmt.Sprintf("127.0.1.%d", p+1), addr), "a")
				k.reads(1)
			}
		}
	}
	open(16, 1)
	before := s.use()
	const peers, each = 16, 15
	open(peers, each)
	after := s.use()
	if grown := (after.rssKiB - before.rssKiB) / (peers * each); grown > idleKiB {
		t.Errorf("an idle connection costs %d KiB of resident memory, allowed are %d", grown, idleKiB)
	}
	ticks := s.cpuTicks()
	<-time.After(time.Second) // time in which nothing shall happen
	if used := s.cpuTicks() - ticks; used > 10 {
		t.Errorf("%d idle connections used %d ms of CPU in a second", peers*(1+each), 10*used)
	}
	s.stop()
}
