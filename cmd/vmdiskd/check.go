package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"unicode"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
	control "github.com/vmdiskd/vmdiskd/internal/control/client"
	"github.com/vmdiskd/vmdiskd/internal/daemon"
)

// check is what --check says of a configuration without mistakes: what a reload
// of the service that has this file would change, or what a start with it opens.
// That the service cannot be asked, or needs a restart, is no error; that it refuses
// the file, or that this machine lacks what any start with it needs, is one.
func check(file string, c *config.Config) (string, error) {
	if err := daemon.Lacks(c); err != nil {
		return "", fmt.Errorf("%s: %w", file, err)
	}
	if c.Control.Socket == "" {
		return "no control.socket to ask a service at: a start opens\n" + opened(c), nil
	}
	at := fmt.Sprintf("%q", c.Control.Socket)
	changes, restart, err := askService(file, control.Dial(c.Control.Socket))
	refusal := control.RefusalOf(err)
	switch {
	case err == nil && len(changes) == 0:
		return "a reload of the service at " + at + " changes nothing\n", nil
	case err == nil && restart:
		return "the service at " + at + " refuses a reload and needs a restart, which does\n" + strings.Join(changes, "\n") + "\n", nil
	case err == nil:
		return "a reload of the service at " + at + " does\n" + strings.Join(changes, "\n") + "\n", nil
	case errors.Is(err, syscall.ENOENT), errors.Is(err, syscall.ECONNREFUSED):
		return "no service answers at " + at + ": a start opens\n" + opened(c), nil
	case refusal != nil && refusesFile[refusal.Code]:
		return "", fmt.Errorf("the service at %s refuses the file: %s", at, visible(refusal.Text))
	case refusal != nil && refusesReload[refusal.Code]:
		return "the service at " + at + " refuses a reload (" + visible(refusal.Text) + "): a start opens\n" + opened(c), nil
	}
	return "the service at " + at + " cannot say what a reload changes (" + visible(err.Error()) + "): a start opens\n" + opened(c), nil
}

// refusesFile are the codes by which a service that was asked for a reload says
// that the file is wrong, and refusesReload those by which it says that it takes a
// restart, or another moment.
var (
	refusesFile   = map[string]bool{api.CodeInvalid: true, api.CodeExists: true}
	refusesReload = map[string]bool{api.CodeInUse: true, api.CodeUnsupported: true}
)

// askService asks for a reload that changes nothing, if the service has that
// file. What the service says is for a terminal.
func askService(file string, s *control.Client) (changes []string, restart bool, err error) {
	ctx := context.Background()
	is, err := s.Status(ctx)
	if err != nil {
		return nil, false, err
	}
	if !sameFile(is.Config, file) {
		return nil, false, fmt.Errorf("its file is %q", is.Config)
	}
	r, err := s.Reload(ctx, true)
	for _, line := range r.Changes {
		changes = append(changes, visible(line))
	}
	return changes, r.Restart, err
}

// sameFile tells whether the file of a service is the one that is checked.
func sameFile(its, file string) bool {
	a, err := os.Stat(its)
	if err != nil || !filepath.IsAbs(its) {
		return false
	}
	b, err := os.Stat(file)
	return err == nil && os.SameFile(a, b)
}

// visible is a line in which nothing is what a terminal would obey.
func visible(s string) string {
	if strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return strconv.Quote(s)
	}
	return s
}

// opened is what a start does: the difference to a configuration that serves
// nothing, or where there is none the sockets beside it.
func opened(c *config.Config) string {
	nothing := *c
	nothing.Listeners, nothing.Exports, nothing.Groups = nil, nil, nil
	if d := config.Diff(&nothing, c); !d.Empty() {
		return d.String()
	}
	var lines string
	if at := c.Control.Socket; at != "" {
		lines += fmt.Sprintf("control socket %q\n", at)
	}
	if at := c.Metrics.Listen; at != "" {
		lines += fmt.Sprintf("metrics at %q\n", at)
	}
	return cmp.Or(lines, "nothing yet\n")
}
