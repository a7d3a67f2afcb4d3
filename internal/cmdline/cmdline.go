// Package cmdline words mistakes on a command line so that they say what to
// write instead.
package cmdline

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/pflag"
)

// Nearest is the word of list that s is a misspelling of, or "": the closest by
// the number of letters to insert, delete or replace, if these are few.
func Nearest(s string, list []string) string {
	best, least := "", min(2, (len(s)+1)/3)+1
	for _, word := range list {
		if d := distance(s, word); d < least {
			best, least = word, d
		}
	}
	return best
}

// distance is the one of Levenshtein, in bytes.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			replace := diagonal
			if a[i] != b[j] {
				replace++
			}
			diagonal = row[j+1]
			row[j+1] = min(replace, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}

// FlagError words an error of f.Parse. foreign are options of other programs,
// without dashes, and what to say of each here.
func FlagError(err error, f *pflag.FlagSet, foreign map[string]string) error {
	if unknown, ok := errors.AsType[*pflag.NotExistError](err); ok {
		return unknownFlag(unknown, f, foreign)
	}
	invalid, ok := errors.AsType[*pflag.InvalidValueError](err)
	if !ok {
		return err
	}
	flag := invalid.GetFlag()
	want := wanted[flag.Value.Type()]
	if want == "" {
		return fmt.Errorf("--%s: %w", flag.Name, invalid.Unwrap())
	}
	return fmt.Errorf("--%s: %q: want %s", flag.Name, invalid.GetValue(), want)
}

// wanted is, by the type of a flag, what its value looks like.
var wanted = map[string]string{
	"duration": "a time such as 10s or 250ms",
	"bool":     "true or false",
	"int":      "a whole number",
	"uint32":   "a whole number from 0",
}

func unknownFlag(e *pflag.NotExistError, f *pflag.FlagSet, foreign map[string]string) error {
	name, dashes := e.GetSpecifiedName(), "--"
	if e.GetSpecifiedShortnames() != "" {
		name, dashes = e.GetSpecifiedShortnames()[:1], "-"
	}
	said := foreign[name]
	if said == "" && dashes == "--" {
		if near := Nearest(name, names(f)); near != "" {
			said = "did you mean --" + near + "?"
		}
	}
	text := fmt.Sprintf("there is no option %s%s", dashes, strings.ToValidUTF8(name, "?"))
	if said != "" {
		text += ": " + said
	}
	return errors.New(text)
}

// names are those of the flags of f that help shows.
func names(f *pflag.FlagSet) (list []string) {
	f.VisitAll(func(x *pflag.Flag) {
		if !x.Hidden {
			list = append(list, x.Name)
		}
	})
	return list
}
