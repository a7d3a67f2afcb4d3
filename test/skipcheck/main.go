// Skipcheck runs `go test -json` and makes its output readable: one line per
// package as it ends, the full output of what failed, then a summary with the
// slowest packages and tests, and every skip with its reason. With CI=true a
// skip that the list of allowed ones does not name is a failure: there, a
// missing tool must not turn a test into nothing.
//
//	skipcheck [-allowed FILE] [-strict] -- go test -json ./...
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
)

func main() {
	os.Exit(run(os.Args[1:], os.Stdout, os.Stderr))
}

func run(args []string, stdout, stderr io.Writer) int {
	fs := flag.NewFlagSet("skipcheck", flag.ContinueOnError)
	fs.SetOutput(stderr)
	allowedFile := fs.String("allowed", "", "file that lists the allowed skips")
	strict := fs.Bool("strict", os.Getenv("CI") == "true", "fail on a skip that is not allowed")
	if err := fs.Parse(args); err != nil {
		return 2
	}
	if fs.NArg() == 0 {
		fmt.Fprintln(stderr, "skipcheck: give the go test command")
		return 2
	}
	allowed, err := readAllowed(*allowedFile)
	if err != nil {
		fmt.Fprintln(stderr, "skipcheck:", err)
		return 2
	}
	r := newReport(stdout)
	code, err := follow(fs.Args(), r, stderr)
	if err != nil {
		fmt.Fprintln(stderr, "skipcheck:", err)
		return 1
	}
	unknown := r.summary(allowed)
	if code == 0 && *strict && unknown > 0 {
		fmt.Fprintf(stdout, "FAIL: %d skips are not in %q\n", unknown, *allowedFile)
		return 1
	}
	return code
}

// follow runs the command, feeds its output to the report and returns the
// command's own exit status.
func follow(argv []string, r *report, stderr io.Writer) (code int, err error) {
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Stderr = stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return 0, err
	}
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	readErr := r.read(stdout)
	err = cmd.Wait()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		// A signal has no status of its own: -1 must not pass for success.
		return max(exit.ExitCode(), 1), readErr
	}
	return 0, errors.Join(readErr, err)
}
