package main

import (
	"cmp"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/vmdiskd/vmdiskd/internal/cmdline"
)

// helpColumns is how wide help is: a terminal that nobody has made larger.
const helpColumns = 80

// explain has root and all commands below it say what to write where a command
// line is wrong, and wrap their help.
func explain(root *cobra.Command) {
	root.SetUsageTemplate(strings.ReplaceAll(root.UsageTemplate(), "Flags.FlagUsages ", fmt.Sprintf("Flags.FlagUsagesWrapped %d ", helpColumns)))
	root.SetFlagErrorFunc(flagError)
	var walk func(*cobra.Command)
	walk = func(c *cobra.Command) {
		check := c.Args
		c.Args = func(c *cobra.Command, args []string) error {
			if check == nil || check(c, args) == nil {
				return nil
			}
			return argumentError(c, args)
		}
		for _, sub := range c.Commands() {
			walk(sub)
		}
	}
	walk(root)
}

// explainDefaults adds cobra's own commands, which write where root does by now,
// and explains them: they would show help for a word that they do not know, as
// if that had been asked for.
func explainDefaults(root *cobra.Command) {
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd()
	for _, c := range root.Commands() {
		switch c.Name() {
		case "help":
			c.Args = func(_ *cobra.Command, args []string) error {
				at, rest, err := root.Find(args)
				if err != nil || len(rest) == 0 {
					return err
				}
				return unknownCommand(at, rest[0])
			}
		case "completion":
			c.Args, c.RunE = noArguments, missingCommand
		}
	}
}

func noArguments(c *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	return argumentError(c, args)
}

// missingCommand runs a command that is nothing without another behind it.
func missingCommand(c *cobra.Command, _ []string) error {
	return usage("a command is missing: see %s --help", c.CommandPath())
}

// isGroup tells whether c is nothing without another command behind it.
func isGroup(c *cobra.Command) bool { return c.HasSubCommands() && c.Use == c.Name() }

// argumentError says which arguments c has.
func argumentError(c *cobra.Command, args []string) error {
	if isGroup(c) && len(args) > 0 {
		return unknownCommand(c, args[0])
	}
	want := strings.TrimPrefix(strings.TrimPrefix(c.Use, c.Name()), " ")
	if want == "" {
		want = "no argument"
	}
	got := fmt.Sprintf("%d arguments", len(args))
	if len(args) == 1 {
		got = "1"
	}
	return usage("want %s, got %s; see %s --help", want, got, c.CommandPath())
}

func unknownCommand(c *cobra.Command, word string) error {
	var names []string
	for _, sub := range c.Commands() {
		if sub.IsAvailableCommand() {
			names = append(names, sub.Name())
		}
	}
	meant := ""
	if near := cmp.Or(cmdline.Nearest(word, names), strings.Join(below(c, word), " or ")); near != "" {
		meant = ": did you mean " + near + "?"
	}
	return usage("there is no command %q%s; see %s --help", word, meant, c.CommandPath())
}

// below are the commands called word of the groups of c, with these.
func below(c *cobra.Command, word string) (list []string) {
	for _, group := range c.Commands() {
		for _, sub := range group.Commands() {
			if isGroup(group) && sub.IsAvailableCommand() && sub.Name() == word {
				list = append(list, group.Name()+" "+word)
			}
		}
	}
	return list
}

// flagError words an error of the flags of c.
func flagError(c *cobra.Command, err error) error {
	if isGroup(c) && c.Flags().NArg() > 0 { // the flags may be those of what was meant
		return unknownCommand(c, c.Flags().Arg(0))
	}
	if e, ok := errors.AsType[*pflag.NotExistError](err); ok && c.Name() == "resize" {
		if number := e.GetSpecifiedShortnames(); number != "" && number[0] >= '0' && number[0] <= '9' {
			return usage("-%s: disks do not shrink", number)
		}
	}
	return usage("%w; see %s --help", cmdline.FlagError(err, c.Flags(), elsewhere), c.CommandPath())
}

// elsewhere has options of qemu-img, nbdinfo and nbdcopy that are not here, or
// not by that name, and what to do instead.
var elsewhere = map[string]string{
	"U": "an image that is in use is looked at without an option, if its locks allow it", "force-share": "an image that is in use is looked at without an option, if its locks allow it",
	"read-only": "it is --readonly",
	"F":         "it is --backing-format", "b": "it is --backing-file",
	"output": "it is --json",
	"image":  "an image is an argument, without an option", "target-is-zero": "it is --destination-is-zero",
}
