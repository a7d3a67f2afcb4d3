package main

import (
	"bytes"
	"strings"
	"testing"
)

// TestEmptyDriveOfAMachineIsNoDisk in the table.
func TestEmptyDriveOfAMachineIsNoDisk(t *testing.T) {
	v := vmShown{vmRow: vmRow{VM: "/qmp", State: "running"}}
	v.Disks = []vmDisk{{}, {Device: "d", Driver: "raw", Node: "n", Size: 5 << 30, Source: "/i"}}
	var out bytes.Buffer
	must(t, v.print(&printer{w: &out}))
	if s := out.String(); strings.Contains(s, `""`) || !strings.Contains(s, roundSize(5<<30)) || strings.Contains(s, "5368709120") {
		t.Errorf("got %s", s)
	}
}
