// Bench compares NBD servers side by side: nbdkit, qemu-nbd and vmdiskd serve
// the same image in turn, and what is compared first of all is the processor
// time that the server spends per request.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"syscall"

	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// config is the command line.
type config struct {
	peers, cases string
	rounds       int
	secs         float64
	mib          int64
	dir          string // where the image is made; empty: .cache of the module
	out          string // Markdown file; empty: none
	json         bool
}

func main() {
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer cancel()
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	testenv.Cleanup()
	if errors.Is(err, flag.ErrHelp) {
		return
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func parseFlags(args []string, stderr io.Writer) (c config, err error) {
	fs := flag.NewFlagSet("bench", flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.StringVar(&c.peers, "peers", "nbdkit,qemu-nbd,qemu-nbd-uring,vmdiskd", "servers, the first is the baseline; 'NAME ARG ARG' adds arguments")
	fs.StringVar(&c.cases, "cases", "", "cases to run (default all: "+caseNames()+")")
	fs.IntVar(&c.rounds, "rounds", 3, "rounds of every case")
	fs.Float64Var(&c.secs, "secs", 2, "seconds of one measurement")
	fs.Int64Var(&c.mib, "size", 1024, "MiB of the image")
	fs.StringVar(&c.dir, "dir", "", "folder on a disk for the image (default .cache)")
	fs.StringVar(&c.out, "out", "", "write the result as Markdown to this file")
	fs.BoolVar(&c.json, "json", false, "print every sample as JSON instead of the table")
	if err := fs.Parse(args); err != nil {
		return c, err
	}
	if fs.NArg() > 0 || c.rounds < 1 || c.secs <= 0 || c.mib < 1 {
		return c, errors.New("rounds, secs and size must be positive, and there are no arguments")
	}
	return c, nil
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	c, err := parseFlags(args, stderr)
	if err != nil {
		return err
	}
	peers, err := parsePeers(c.peers)
	if err != nil {
		return err
	}
	chosen, err := chooseCases(c.cases)
	if err != nil {
		return err
	}
	if runtime.NumCPU() < 2 {
		return errors.New("needs two processors: one for the server, one for the load")
	}
	dir, err := imageDir(c.dir)
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	b, err := newBench(ctx, dir, c.mib<<20, c.secs)
	if err != nil {
		return err
	}
	samples, err := b.runAll(ctx, chosen, peers, c.rounds, stderr)
	if err != nil {
		return err
	}
	f := gatherFacts(ctx, peers, c.secs, c.rounds, c.mib<<20)
	return report(stdout, c, f, chosen, samples, peers[0].name)
}

// imageDir makes the folder that holds the image, which the caller removes.
func imageDir(parent string) (string, error) {
	if parent == "" {
		parent = filepath.Join(testenv.Root(), ".cache")
		if err := os.MkdirAll(parent, 0o755); err != nil {
			return "", err
		}
	}
	if err := onDisk(parent); err != nil {
		return "", err
	}
	return os.MkdirTemp(parent, "bench")
}

func report(stdout io.Writer, c config, f facts, chosen []testCase, samples []sample, baseline string) error {
	rows := summarize(samples, baseline)
	if c.json {
		enc := json.NewEncoder(stdout)
		enc.SetIndent("", " ")
		if err := enc.Encode(map[string]any{"facts": f, "samples": samples}); err != nil {
			return err
		}
	} else {
		writeTable(stdout, rows)
	}
	if c.out == "" {
		return nil
	}
	file, err := os.Create(c.out)
	if err != nil {
		return err
	}
	writeMarkdown(file, f, chosen, rows)
	return file.Close()
}
