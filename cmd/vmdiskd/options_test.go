package main

import (
	"errors"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"

	"github.com/vmdiskd/vmdiskd/internal/daemon"
	"github.com/vmdiskd/vmdiskd/internal/nbd"
	"github.com/vmdiskd/vmdiskd/internal/obs"
	"github.com/vmdiskd/vmdiskd/internal/transport"
)

func TestCommandLineMeansWhatNbdkitMeans(t *testing.T) {
	first := func(c daemon.Config) transport.Endpoint { return c.Endpoints[0] }
	for _, tt := range []struct {
		line string
		ok   func(daemon.Config) bool
	}{
		{"disk.img", func(c daemon.Config) bool {
			return first(c).Kind == transport.TCP && first(c).Port == 10809 && c.Disk.Image == "disk.img" &&
				c.Disk.Format == "" && c.MaskHandshake == 0xffff && c.TLS == nbd.TLSOff
		}},
		{"-U /run/s disk.img", func(c daemon.Config) bool {
			return first(c).Kind == transport.Unix && first(c).Path == "/run/s" && first(c).Mode == 0o600
		}},
		{"-U- disk.img", func(c daemon.Config) bool { return first(c).Path == transport.PrivatePath }},
		{"-p0 -i 127.0.0.1 -4 disk.img", func(c daemon.Config) bool {
			return first(c).Port == 0 && first(c).Address == "127.0.0.1" && first(c).Family == "4"
		}},
		{"-6 disk.img", func(c daemon.Config) bool { return first(c).Family == "6" }},
		{"--vsock -p 70000 -r disk.img", func(c daemon.Config) bool {
			return first(c).Kind == transport.VSock && first(c).Port == 70000 && len(c.Disk.Grants) == 0 && !c.Disk.TrustCID
		}},
		{"--vsock --vsock-trust-cid disk.img", func(c daemon.Config) bool {
			return first(c).Kind == transport.VSock && !c.Disk.ReadOnly && c.Disk.TrustCID
		}},
		{"--vsock --vsock-local --vsock-trust-cid disk.img", func(c daemon.Config) bool {
			return len(c.Disk.Grants) == 2 && slices.Contains(c.Disk.Grants[0].CIDs, 1) && len(c.Disk.Grants[1].CIDs) == 0
		}},
		{"-rfv -e vm1 -P /run/p -t 16 disk.img", func(c daemon.Config) bool {
			return c.Disk.ReadOnly && c.Disk.Name == "vm1" && c.PIDFile == "/run/p" && c.Requests == 16 &&
				c.Log.Level == slog.LevelDebug
		}},
		{"-s disk.img", func(c daemon.Config) bool { return c.Stdio && len(c.Endpoints) == 0 }},
		{"--stdin disk.img", func(c daemon.Config) bool { return c.Stdio }},
		{"disk.img --run true", func(c daemon.Config) bool {
			return c.Run == "true" && first(c).Path == transport.PrivatePath
		}},
		{"-p 0 --run true disk.img", func(c daemon.Config) bool { return first(c).Kind == transport.TCP }},
		{"--tls=require --tls-certificates=/pki disk.img", func(c daemon.Config) bool {
			return c.TLS == nbd.TLSRequire && c.TLSCertificates == "/pki" && c.TLSVerifyPeer == nil
		}},
		{"--tls=on --tls-verify-peer disk.img", func(c daemon.Config) bool {
			return c.TLS == nbd.TLSOn && *c.TLSVerifyPeer
		}},
		{"--tls=on --tls-verify-peer=false disk.img", func(c daemon.Config) bool { return !*c.TLSVerifyPeer }},
		{"-o disk.img", func(c daemon.Config) bool { return c.Oldstyle }},
		{"-n --no-sr --no-mc --mask-handshake=0x1 disk.img", func(c daemon.Config) bool {
			return c.NoStructured && c.NoMeta && c.MaskHandshake == 1
		}},
		{"-u nobody -g nogroup --exit-with-parent disk.img", func(c daemon.Config) bool {
			return c.User == "nobody" && c.Group == "nogroup" && c.ExitWithParent
		}},
		{"--log=default -D nbd=debug disk.img", func(c daemon.Config) bool {
			return c.Log.Sink == "stderr" && c.Log.Components["nbd"] == slog.LevelDebug
		}},
		{"--log=/var/log/x disk.img", func(c daemon.Config) bool { return c.Log.Sink == "/var/log/x" }},
		{"--timeout 3s --drain-timeout 1m disk.img", func(c daemon.Config) bool {
			return c.Handshake == 3*time.Second && c.Drain == time.Minute
		}},
		{"--unix-owner 107:64055 --unix-mode 660 -U s disk.img", func(c daemon.Config) bool {
			o := first(c).Owner
			return o.UID == 107 && o.GID == 64055 && first(c).Mode == 0o660
		}},
		{"-r --format=qcow2 disk.img", func(c daemon.Config) bool {
			return c.Disk.Format == "qcow2" && c.Disk.Backing == "" && c.Disk.Snapshot == ""
		}},
		{"-r --format=qcow2 --backing=same-dir --snapshot=s1 disk.img", func(c daemon.Config) bool {
			return c.Disk.Backing == "same-dir" && c.Disk.Snapshot == "s1"
		}},
		{"--format=qcow2 --l2-cache-size=4M disk.img", func(c daemon.Config) bool { return c.Disk.L2CacheSize == 4<<20 }},
		{"-r --format=qcow2 --lenient disk.img", func(c daemon.Config) bool { return c.Disk.Lenient && c.Disk.ReadOnly }},
		{"-r --format=qcow2 --backing=beneath=/images disk.img", func(c daemon.Config) bool {
			return c.Disk.Backing == "beneath=/images"
		}},
		{"-r --format=qcow2 --backing-file=a:qcow2 --backing-file b,c:raw --data-file=d disk.img", func(c daemon.Config) bool {
			return slices.Equal(c.Disk.BackingFiles, []string{"a:qcow2", "b,c:raw"}) && slices.Equal(c.Disk.DataFiles, []string{"d"})
		}},
		{"--selinux-label u:r:t:s0:c1,c2 --selinux-path-label u:r:p:s0 -U s disk.img", func(c daemon.Config) bool {
			return first(c).Label == "u:r:t:s0:c1,c2" && first(c).PathLabel == "u:r:p:s0"
		}},
		{"--unix-owner :0 -U s disk.img", func(c daemon.Config) bool {
			return first(c).Owner.UID == -1 && first(c).Owner.GID == 0
		}},
	} {
		t.Run(tt.line, func(t *testing.T) {
			o, err := parse(strings.Fields(tt.line), nil)
			if err != nil {
				t.Fatalf("refused: %v", err)
			}
			if !tt.ok(o.config) {
				t.Errorf("understood as %+v", o.config)
			}
		})
	}
}

func TestMistakesAreUsageErrors(t *testing.T) {
	for _, line := range []string{
		"", "a b", "--nonsense disk", "-p x disk", "-p 70000 disk", "-4 -6 disk", "-s -U x disk", "-s -p 1 disk",
		"-U x -p 1 disk", "--vsock -4 disk", "--vsock-local disk", "--vsock-local -U x disk",
		"--vsock disk", "--vsock --vsock-local disk", "--vsock --run true disk", "--vsock-trust-cid disk", "--vsock-trust-cid -U x disk", "--tls=maybe disk", "--tls-certificates=/x disk",
		"--tls=require -o disk", "-o -n disk", "--format=vmdk disk", "--cache=x disk", "--engine=x disk",
		"--tls=on -o disk", "-t 0 disk", "-D tsl=debug disk", "--check disk", "--enable-fault-injection disk", "--check=false disk",
		"--user=no-such-user disk", "--group=no-such-group disk",
		"--mask-handshake=x disk", "--mask-handshake=0x10000 disk", "-t -1 disk", "-t 129 disk", "-D nbd disk",
		"-D nbd=loud disk", "--log=x disk", "--unix-mode=9 -U x disk", "--unix-mode=0 -U x disk",
		"--unix-owner=no-such-user -U x disk", "-U fd:3 disk", "--unix=fd:0 disk", "--timeout=0s disk", "--image-lock=x disk", "-s --run true disk",
		"--backing=same-dir disk", "--snapshot=1 disk", "--backing-file=b disk", "--format=qcow2 --backing=allow disk",
		"--format=qcow2 --backing=beneath disk", "--format=qcow2 --backing=explicit disk", "--format=qcow2 --snapshot= disk",
		"--format=qcow2 --backing=deny --backing-file=b disk", "--format=qcow2 --data-file= disk",
		"--insecure-plaintext -U x disk", "--insecure-plaintext --vsock -r disk",
		"--insecure-plaintext --confine=strict disk", "--selinux-label=u:r:t:s0 disk", "--selinux-path-label=u:r:t:s0 -p 1 disk", "--selinux-label=u:r:t:s0 --vsock -r disk",
		"--selinux-label=u:r:t:s0 -s disk", "--selinux-label= -U x disk", "--format=qcow2 --lenient disk", "-r --lenient disk",
		"--l2-cache-size=4M disk", "--format=qcow2 --l2-cache-size=1K disk", "--format=qcow2 --l2-cache-size=5G disk", "--format=qcow2 --l2-cache-size=x disk",
	} {
		_, err := parse(strings.Fields(line), nil)
		var usage usageError
		if !errors.As(err, &usage) {
			t.Errorf("%q: got %v, want a usage error", line, err)
		}
	}
}

// TestVariableThatIsNotSetIsNoAnswer: it asks neither for root, nor for all addresses,
// nor for whatever else an option means that is left out.
func TestVariableThatIsNotSetIsNoAnswer(t *testing.T) {
	for _, name := range []string{"unix", "ipaddr", "port", "unix-owner", "tls-certificates", "user", "group", "pidfile", "run", "config"} {
		line := []string{"--" + name + "=", "--tls=require", "disk"}
		_, err := parse(line, nil)
		var usage usageError
		if want := "--" + name + ": it is empty"; !errors.As(err, &usage) || usage.text != want {
			t.Errorf("%q: got %v, want the usage error %q", line, err, want)
		}
	}
}

func TestMistakesSayWhatToWrite(t *testing.T) {
	for line, want := range map[string]string{
		"-f qcow2 disk":                       "-f is --foreground, the format is --format=qcow2",
		"-f x disk":                           "want one IMAGE, got 2 arguments",
		"--check disk":                        "--check goes with --config",
		"-k /run/s disk":                      "--unix=PATH",
		"-U fd:3 disk":                        "sockets that are open already are passed as systemd does it, by LISTEN_FDS and LISTEN_PID",
		"--bind ::1 disk":                     "--ipaddr=ADDRESS",
		"--shared=3 disk":                     "always shared",
		"--persistent disk":                   "always goes on",
		"-x name disk":                        "--exportname",
		"--read-only disk":                    "--readonly",
		"--dump-plugin":                       "--dump-config",
		"--cach=none disk":                    "did you mean --cache?",
		"--timeout 10 disk":                   `--timeout: "10": want a time such as 10s`,
		"--tls-verify-peer=maybe disk":        "want true or false",
		"-D tsl=debug disk":                   "daemon, nbd, backing, engine, tls, control, requests",
		"-D tls=loud disk":                    "debug, info, warn or error",
		"-t 0 disk":                           "want 1 to 128",
		"--config x --run true":               "--run does not go with --config: it is for one IMAGE",
		"--config x --swap":                   "it is for one IMAGE",
		"--config x --engine=pool":            "the file says it",
		"--format=qcow2 --backing=explicit x": "--backing=explicit needs --backing-file or --data-file",
	} {
		if _, err := parse(strings.Fields(line), nil); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %v, want %s", line, err, want)
		}
	}
}

// TestOptionsOfOthersAreNotOurs: what says that an option is called otherwise
// here would never be seen.
func TestOptionsOfOthersAreNotOurs(t *testing.T) {
	f := (&raw{}).flags()
	for name := range elsewhere {
		if len(name) > 1 && f.Lookup(name) != nil || len(name) == 1 && f.ShorthandLookup(name) != nil {
			t.Errorf("%s is an option of vmdiskd", name)
		}
	}
}

// TestComponentsAreThoseOfTheDaemon holds the list against the loggers.
func TestComponentsAreThoseOfTheDaemon(t *testing.T) {
	files, err := filepath.Glob("../../internal/daemon/*.go")
	if err != nil {
		t.Fatal(err)
	}
	there := map[string]bool{}
	for _, name := range files {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range regexp.MustCompile(`logs\.For\("(\w+)"\)`).FindAllSubmatch(text, -1) {
			there[string(m[1])] = true
		}
	}
	want := slices.Sorted(slices.Values(obs.Components))
	if got := slices.Sorted(maps.Keys(there)); !slices.Equal(got, want) {
		t.Errorf("loggers are made for %v, and the list is %v", got, want)
	}
}

func TestCheckSaysWhatAStartOpens(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "vmdiskd.toml")
	const disk = "[[export]]\nname = \"a\"\nimage = \"1M\"\nformat = \"mem\"\n"
	socket := "[control]\nsocket = \"" + dir + "/control\"\n"
	for _, tt := range []struct{ text, want string }{
		{"engine = \"pool\"\n", "no control.socket to ask a service at: a start opens\nnothing yet\n"},
		{disk, "no control.socket to ask a service at: a start opens\nadd export \"a\"\n"},
		{socket + disk, "no service answers at \"" + dir + "/control\": a start opens\nadd export \"a\"\n"},
	} {
		if err := os.WriteFile(path, []byte(tt.text), 0o600); err != nil {
			t.Fatal(err)
		}
		if o, err := parse([]string{"--config", path, "--check"}, nil); err != nil || o.text != tt.want {
			t.Errorf("%q: got %q, %v; want %q", tt.text, o.text, err, tt.want)
		}
	}
	if err := os.WriteFile(path, []byte("disk\x00\xff"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := parse([]string{"--config", path, "--check"}, nil); err == nil || !strings.Contains(err.Error(), "is that a configuration file?") {
		t.Errorf("a disk as a configuration: %v", err)
	}
}

func TestSocketsOfAnotherProcessAreIgnored(t *testing.T) {
	t.Setenv("LISTEN_FDS", "1")
	t.Setenv("LISTEN_PID", "1")
	o, err := parse([]string{"-U", "x", "disk"}, nil)
	if err != nil || o.config.Activated || len(o.config.Endpoints) != 1 {
		t.Errorf("got %+v, %v; want the socket of the command line", o.config.Endpoints, err)
	}
	// Who expects sockets from systemd does not want to listen everywhere.
	if o, err = parse([]string{"disk"}, nil); err != nil || !o.config.Activated || len(o.config.Endpoints) != 0 {
		t.Errorf("got %+v, %v; want no other sockets than passed ones", o.config.Endpoints, err)
	}
}

func TestPassedSocketsExcludeOthers(t *testing.T) {
	t.Setenv("LISTEN_FDS", "1")
	t.Setenv("LISTEN_PID", strconv.Itoa(os.Getpid()))
	o, err := parse([]string{"disk"}, nil)
	if err != nil || !o.config.Activated || len(o.config.Endpoints) != 0 {
		t.Errorf("got %+v, %v; want the passed sockets alone", o.config, err)
	}
	if o, err := parse([]string{"--vsock-trust-cid", "disk"}, nil); err != nil || !o.config.Disk.TrustCID {
		t.Errorf("got %+v, %v; want a passed socket whose CIDs are trusted", o.config, err)
	}
	for _, args := range [][]string{{"-U", "x", "disk"}, {"--selinux-label=u:r:t:s0", "disk"}} {
		if _, err := parse(args, nil); err == nil {
			t.Errorf("%q beside passed sockets was accepted", args)
		}
	}
}

func TestManPageListsEveryOption(t *testing.T) {
	b, err := os.ReadFile(filepath.Join("..", "..", "docs", "man", "vmdiskd.8"))
	if err != nil {
		t.Fatal(err)
	}
	page := strings.ReplaceAll(string(b), `\-`, "-")
	var r raw
	r.flags().VisitAll(func(f *pflag.Flag) {
		if !strings.Contains(page, "--"+f.Name) {
			t.Errorf("--%s is not in the man page", f.Name)
		}
		if f.Shorthand != "" && !strings.Contains(page, "-"+f.Shorthand+" ") {
			t.Errorf("-%s is not in the man page", f.Shorthand)
		}
	})
}

func TestTextsGoToStandardOutput(t *testing.T) {
	for _, line := range []string{"--help", "-h", "-V", "--dump-config"} {
		o, err := parse([]string{line}, nil)
		if err != nil || o.text == "" {
			t.Errorf("%s: got %q, %v", line, o.text, err)
		}
	}
}

// TestTextThatIsLostIsAFailure, as where a script keeps what --check says on a disk
// that is full.
func TestTextThatIsLostIsAFailure(t *testing.T) {
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer full.Close()
	cmd := program("--dump-config")
	var stderr strings.Builder
	cmd.Stdout, cmd.Stderr = full, &stderr
	err = cmd.Run()
	if cmd.ProcessState.ExitCode() != exitFailed || !strings.Contains(stderr.String(), "no space left") {
		t.Errorf("got %v, %q, want exit status %d for want of space", err, stderr.String(), exitFailed)
	}
}
