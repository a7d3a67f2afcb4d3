package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

func TestManualHasEveryCommandAndFlagOfTheDaemon(t *testing.T) {
	b, err := os.ReadFile(filepath.Join("..", "..", "docs", "man", "vmdiskctl.1"))
	must(t, err)
	manual := strings.ReplaceAll(string(b), `\-`, "-")
	var look func(c *cobra.Command)
	look = func(c *cobra.Command) {
		if !strings.Contains(manual, c.Name()) {
			t.Errorf("the manual does not name the command %s", c.Name())
		}
		c.Flags().VisitAll(func(f *pflag.Flag) {
			if !strings.Contains(manual, "--"+f.Name) {
				t.Errorf("the manual does not name --%s of %s", f.Name, c.Name())
			}
		})
		for _, sub := range c.Commands() {
			look(sub)
		}
	}
	for _, c := range []*cobra.Command{newStatus(), newExport(), newClients(), newTop(), newEvents(), newReload(), newAttach(), newDetach(), newResize(), newSnapshot(), newVM(), newPSK(), newToken(), newDomainXML(), newDevice()} {
		look(c)
	}
	for key := range patchKeys {
		if !strings.Contains(manual, key) {
			t.Errorf("the manual does not name the key %s of export set", key)
		}
	}
}

func TestCompletionKnowsTheWordsOfFlags(t *testing.T) {
	for flag, word := range map[string]string{
		"export add --format": "qcow2", "export add --cache": "writethrough", "export add --image-lock": "auto",
		"export add --backing": "same-dir", "export add --discard": "unmap", "top --sort": "latency", "events --kind": "io-error",
		"image create --preallocation": "falloc", "image create --compat": "1.1",
		"image create --compression-type": "zstd", "copy --source-format": "qcow2", "copy --destination-format": "qcow2", "image check --repair": "leaks",
	} {
		args := append(append([]string{"__complete"}, strings.Fields(flag)...), "")
		if got := want(t, exitDone, args...); !strings.Contains(got, word+"\n") {
			t.Errorf("%s: got %q, want %s among them", flag, got, word)
		}
	}
	if got := want(t, exitDone, "__complete", "info", "--map="); !strings.Contains(got, "qemu:allocation-depth\n") {
		t.Errorf("info --map=: got %q", got)
	}
}
