package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/vmdiskd/vmdiskd/internal/control/api"
	control "github.com/vmdiskd/vmdiskd/internal/control/client"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// Where the control socket is, if --socket does not say: what the variable
// says, and else the place that the packages have it in.
const (
	socketVariable = "VMDISKD_SOCKET"
	defaultSocket  = "/run/vmdiskd/control.sock"
)

// ctlFlags are the flags of all commands on the control socket.
type ctlFlags struct {
	socket string
	json   bool
	dryRun bool
}

func (f *ctlFlags) addSocket(c *cobra.Command) {
	path := defaultSocket
	if s := os.Getenv(socketVariable); s != "" {
		path = s
	}
	c.Flags().StringVar(&f.socket, "socket", path, "control socket of the daemon; also "+socketVariable)
}

// reading makes c a command that shows something.
func (f *ctlFlags) reading(c *cobra.Command) *cobra.Command {
	f.addSocket(c)
	c.PreRunE = checkText
	c.Flags().BoolVar(&f.json, "json", false, "write JSON in the words of the control API")
	return c
}

// checkText refuses what JSON has no words for: it would arrive as another
// name.
func checkText(c *cobra.Command, args []string) error {
	var wrong error
	check := func(s string) {
		if !utf8.ValidString(s) {
			wrong = usage("%q is not UTF-8", s)
		}
	}
	for _, s := range args {
		check(s)
	}
	c.Flags().Visit(func(g *pflag.Flag) { check(g.Value.String()) })
	return wrong
}

// changing makes c a command that changes something.
func (f *ctlFlags) changing(c *cobra.Command) *cobra.Command {
	f.reading(c)
	c.Flags().BoolVar(&f.dryRun, "dry-run", false, "only say what would be done")
	return c
}

// dial does not connect yet. A path that is too long for a socket is the
// user's mistake.
func (f *ctlFlags) dial() (*control.Client, error) {
	if f.socket == "" || len(f.socket) > limits.SocketPath || strings.ContainsRune(f.socket, 0) {
		return nil, usage("--socket: want a path of at most %d bytes", limits.SocketPath)
	}
	return control.Dial(f.socket), nil
}

// call runs do with the daemon.
func (f *ctlFlags) call(ctx context.Context, do func(context.Context, *control.Client) error) error {
	cl, err := f.dial()
	if err != nil {
		return err
	}
	return told(do(ctx, cl))
}

// controlError is an error of the daemon, or of the way to it, for a
// terminal: its text may come from anybody.
type controlError struct{ err error }

func (e controlError) Error() string { return visible(e.err.Error()) }
func (e controlError) Unwrap() error { return e.err }

// told makes an error of the control client one that can be shown. A mistake
// on the command line stays one.
func told(err error) error {
	if err == nil || errors.As(err, new(usageError)) {
		return err
	}
	return controlError{err}
}

// forbidden tells whether the daemon, what it has already, or the mode of its
// socket or of a machine's keeps the user from what was asked for. A file that
// cannot be read is another matter: image check has the code for leaks.
func forbidden(err error) bool {
	var e *api.Error
	if errors.As(err, &e) {
		return e.Code == api.CodeForbidden || e.Code == api.CodeExists
	}
	spoken := errors.As(err, new(controlError)) || errors.As(err, new(machineError))
	return spoken && errors.Is(err, os.ErrPermission)
}

// shown is text of the daemon or of its clients for people: as it is where
// that leaves no doubt, and else quoted. A terminal obeys control characters,
// and a blank would end the column.
func shown(s string) string {
	doubtful := func(r rune) bool {
		return !unicode.IsPrint(r) || unicode.IsSpace(r) || r == '"' || r == '\\' || r == unicode.ReplacementChar
	}
	if s == "" || strings.ContainsFunc(s, doubtful) {
		return strconv.Quote(s)
	}
	return s
}

// notesOf writes notes for people where the errors of a command go.
func notesOf(c *cobra.Command) func(text string) {
	return func(text string) { fmt.Fprintln(c.ErrOrStderr(), "vmdiskctl: note: "+visible(text)) }
}

// visible is text for people in which what a terminal would obey, or not show,
// is written as Go does.
func visible(s string) string {
	var b strings.Builder
	for _, r := range s {
		if unicode.IsPrint(r) && r != unicode.ReplacementChar {
			b.WriteRune(r)
			continue
		}
		q := strconv.QuoteRune(r)
		b.WriteString(q[1 : len(q)-1])
	}
	return b.String()
}

// oneLine is v in JSON, for people.
func oneLine(v any) (string, error) {
	var b strings.Builder
	j := json.NewEncoder(&b)
	j.SetEscapeHTML(false)
	err := j.Encode(v)
	return visible(strings.TrimSuffix(b.String(), "\n")), err
}

// group is a command that is nothing without another.
func group(use, short string, list ...*cobra.Command) *cobra.Command {
	c := &cobra.Command{
		Use:   use,
		Short: short,
		Args:  cobra.NoArgs,
		RunE:  missingCommand,
	}
	c.AddCommand(list...)
	return c
}

// completionTime is what a shell waits for names.
const completionTime = 2 * time.Second

// exportNames completes the name of an export as the first argument. Names that
// a shell would not take as they are, or this command not as names, are left out.
func (f *ctlFlags) exportNames(c *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	const directive = cobra.ShellCompDirectiveNoFileComp
	cl, err := f.dial()
	if err != nil || len(args) > 0 {
		return nil, directive
	}
	ctx, cancel := context.WithTimeout(c.Context(), completionTime)
	defer cancel()
	list, err := cl.Exports(ctx)
	if err != nil {
		return nil, directive
	}
	var names []string
	for i := range list {
		if name := list[i].Name; plainWord(name) {
			names = append(names, name+"\t"+shown(list[i].State)+", "+byteSize(list[i].Size).String())
		}
	}
	return names, directive
}

// plainWord tells whether s is the same word on the command line of every shell,
// without quotes, and no option. Bash puts what all completions begin with on the
// line as it is, and evaluates that line when it completes again: a name of the
// daemon must not be a command there.
func plainWord(s string) bool {
	special := func(r rune) bool {
		letter := 'A' <= r && r <= 'Z' || 'a' <= r && r <= 'z' || '0' <= r && r <= '9'
		return !letter && !strings.ContainsRune("._:@%+/-", r)
	}
	return s != "" && s[0] != '-' && !strings.ContainsFunc(s, special)
}

// flagWords completes a flag that takes one of a few words.
func flagWords(c *cobra.Command, flag string, words ...string) {
	_ = c.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(words, cobra.ShellCompDirectiveNoFileComp)) // the flag is there
}

// table prints rows with columns as wide as their widest text. Columns whose
// head ends with a blank are of numbers, and stand at the right.
type table struct {
	head []string
	rows [][]string
}

func (t *table) add(cells ...string) { t.rows = append(t.rows, cells) }

// lines are those of the table, the head first.
func (t *table) lines() []string {
	widths := make([]int, len(t.head))
	all := append([][]string{t.head}, t.rows...)
	for _, row := range all {
		for i, cell := range row {
			widths[i] = max(widths[i], len([]rune(strings.TrimSpace(cell))))
		}
	}
	lines := make([]string, len(all))
	for n, row := range all {
		var b strings.Builder
		for i, cell := range row {
			cell = strings.TrimSpace(cell)
			pad := strings.Repeat(" ", widths[i]-len([]rune(cell)))
			if strings.HasSuffix(t.head[i], " ") {
				cell, pad = pad+cell, ""
			}
			b.WriteString(cell + pad + "  ")
		}
		lines[n] = strings.TrimRight(b.String(), " ")
	}
	return lines
}

func (t *table) print(w io.Writer) error {
	_, err := io.WriteString(w, strings.Join(t.lines(), "\n")+"\n")
	return err
}

// stamp is a moment for people.
func stamp(t time.Time) string { return t.UTC().Format("2006-01-02T15:04:05Z") }
