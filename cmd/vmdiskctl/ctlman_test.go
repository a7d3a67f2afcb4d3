package main

import (
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// manualPart is a section of the manual, or a part of one, up to the next heading.
type manualPart struct {
	title    string
	commands []string // whose options are in it
	also     []string // other parts that have options of these commands
}

// manualParts are those that have options, with every command once.
var manualParts = []manualPart{
	{"THE DAEMON", []string{"status", "reload", "clients", "clients kick", "top", "events"}, nil},
	{"EXPORT", []string{"export list", "export show", "export remove", "export set", "export pause", "export resume",
		"export resize", "export snapshot", "export forget"}, []string{"THE DAEMON"}},
	{"Options of export add", []string{"export add"}, []string{"THE DAEMON"}},
	{"RUNNING MACHINES", []string{"attach", "detach", "resize", "snapshot", "vm list", "vm show", "domain-xml"},
		[]string{"THE DAEMON", "Options of export add"}},
	{"LEASES OF VSOCK ADDRESSES", []string{"vm lease"}, []string{"THE DAEMON"}},
	{"PRE-SHARED KEYS", []string{"psk new", "psk list"}, []string{"THE DAEMON"}},
	{"TOKENS", []string{"token new", "token list"}, []string{"THE DAEMON"}},
	{"DEVICES OF THE KERNEL", []string{"device attach", "device list", "device detach"}, nil},
	{"INFO", []string{"info"}, nil},
	{"COPY", []string{"copy"}, nil},
	{"IMAGE", []string{"image check", "image info", "image map", "image snapshot list"}, nil},
	{"IMAGE CREATE", []string{"image create"}, nil},
	{"IMAGE RESIZE", []string{"image resize"}, nil},
}

// optionsOfOthers are those of the daemon, or of commands that another part is
// about, which a part of the manual names.
var optionsOfOthers = map[string][]string{
	"THE DAEMON":            {"--config", "--readonly"},
	"EXPORT":                {"--persist"},
	"Options of export add": {"--enable-fault-injection"},
	"PRE-SHARED KEYS":       {"--tls-psk"},
}

// manual is the page as people read it, by the titles of its parts.
func manual(t *testing.T) map[string]string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("..", "..", "docs", "man", "vmdiskctl.1"))
	must(t, err)
	parts := map[string]string{}
	heading := regexp.MustCompile(`(?m)^\.S[HS] (.*)$`)
	text := strings.ReplaceAll(string(b), `\-`, "-")
	for _, at := range heading.FindAllStringSubmatchIndex(text, -1) {
		part := text[at[1]:]
		if next := heading.FindStringIndex(part); next != nil {
			part = part[:next[0]]
		}
		parts[text[at[2]:at[3]]] = part
	}
	return parts
}

// anOption is a long option anywhere, or a short one where an item is for it.
var anOption = regexp.MustCompile(`(?:^|[^-\w])(--[a-z][-a-z0-9]*)|(?m:^\.TP\n\.BR? (-[a-zA-Z])\b)`)

// optionsIn are the options that a part of the manual names.
func optionsIn(part string) map[string]bool {
	all := map[string]bool{}
	for _, m := range anOption.FindAllStringSubmatch(part, -1) {
		all[m[1]+m[2]] = true
	}
	return all
}

// optionsOf are those of a command, long and short.
func optionsOf(c *cobra.Command) map[string]bool {
	all := map[string]bool{}
	c.Flags().VisitAll(func(f *pflag.Flag) {
		all["--"+f.Name] = true
		if f.Shorthand != "" {
			all["-"+f.Shorthand] = true
		}
	})
	return all
}

// runnable are the commands that do something, by their words.
func runnable(c *cobra.Command) map[string]*cobra.Command {
	all := map[string]*cobra.Command{}
	if c.HasParent() && !isGroup(c) {
		_, words, _ := strings.Cut(c.CommandPath(), " ")
		all[words] = c
	}
	for _, sub := range c.Commands() {
		maps.Copy(all, runnable(sub))
	}
	return all
}

// TestManualHasTheOptionsOfEachCommand and no others, in the part that is about
// the command.
func TestManualHasTheOptionsOfEachCommand(t *testing.T) {
	text, commands := manual(t), runnable(newRoot(os.Stderr))
	delete(commands, "version")
	for _, part := range manualParts {
		named := optionsIn(text[part.title])
		has := maps.Clone(named)
		for _, title := range part.also {
			there := optionsIn(text[title])
			for _, o := range optionsOfOthers[title] {
				delete(there, o)
			}
			maps.Copy(has, there)
		}
		known := map[string]bool{}
		for _, o := range optionsOfOthers[part.title] {
			known[o] = true
		}
		for _, words := range part.commands {
			c := commands[words]
			if c == nil {
				t.Errorf("the part %q is about %q, which is no command or has another part", part.title, words)
				continue
			}
			delete(commands, words)
			for o := range optionsOf(c) {
				if known[o] = true; !has[o] {
					t.Errorf("the part %q does not name %s of %s", part.title, o, words)
				}
			}
		}
		for o := range named {
			if !known[o] {
				t.Errorf("the part %q names %s, which no command has that it is about", part.title, o)
			}
		}
	}
	for words := range commands {
		t.Errorf("no part of the manual is about %s", words)
	}
}

// TestManualHasEveryCommandAndKey: those of the synopsis and of export set. What
// the examples say is there.
func TestManualHasEveryCommandAndKey(t *testing.T) {
	text := manual(t)
	known := map[string]bool{}
	for words, c := range runnable(newRoot(os.Stderr)) {
		maps.Copy(known, optionsOf(c))
		if !strings.Contains(text["SYNOPSIS"], c.Name()) {
			t.Errorf("the synopsis does not name %s", words)
		}
	}
	for o := range optionsIn(text["EXAMPLES"]) {
		if !known[o] {
			t.Errorf("the examples have %s, which no command has", o)
		}
	}
	for key := range patchKeys {
		if !strings.Contains(text["Keys of export set"], key) {
			t.Errorf("the manual does not name the key %s of export set", key)
		}
	}
}

func TestCompletionKnowsTheWordsOfFlags(t *testing.T) {
	for flag, word := range map[string]string{
		"export add --format": "qcow2", "export add --cache": "writethrough", "export add --image-lock": "auto",
		"export add --backing": "same-dir", "export add --discard": "unmap", "top --sort": "latency", "events --kind": "io-error",
		"image create --preallocation": "falloc", "image create --compat": "1.1",
		"image create --compression-type": "zstd", "copy --source-format": "qcow2", "copy --destination-format": "qcow2", "image check --repair": "bitmaps",
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
