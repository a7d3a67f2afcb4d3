package backingtest

import (
	"bufio"
	"io"
	"os/exec"
	"testing"
)

// Converse starts cmd with pipes as its standard input and output. The test
// ends cmd: to close in ends most programs.
func Converse(t testing.TB, cmd *exec.Cmd) (in io.WriteCloser, out *bufio.Reader) {
	t.Helper()
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	r, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return in, bufio.NewReader(r)
}
