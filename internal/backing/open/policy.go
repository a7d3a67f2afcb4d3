package open

import (
	"errors"
	"fmt"
	"strings"
)

// Mode says which files an image may name.
type Mode string

// Modes; "" is Deny.
const (
	Deny     Mode = "deny"     // none
	SameDir  Mode = "same-dir" // those in the directory of the image
	Beneath  Mode = "beneath"  // those in a directory and below it
	Explicit Mode = "explicit" // none: the operator names them instead
)

// Policy says what may be opened because an image asks for it: its backing
// file, and so on down the chain, and data files. The zero value refuses all.
type Policy struct {
	Mode Mode
	Root string // Beneath: the directory

	// Explicit: Files are the chain below the image, from its backing file
	// downwards, and DataFiles the data files of those images that have one,
	// in the same order. What the images themselves say is not looked at, but
	// for files that are Named.
	Files     []File
	DataFiles []string
}

// File is an image that the operator names.
type File struct {
	Path   string
	Format string // "raw", "qcow2", or "" for what the image above it says
	Named  bool   // the image above must name it: it was made so, and may have been rebased
}

// ErrDenied is the cause of a refusal by a Policy. Its kind is
// backing.ErrInvalid.
var ErrDenied = errors.New("not opened")

// ParsePolicy reads "deny", "same-dir", "beneath=DIR" or "explicit"; "" is
// "explicit" if there are files, else "deny". Files are written PATH or
// PATH:FORMAT.
func ParsePolicy(word string, files, dataFiles []string) (Policy, error) {
	p := Policy{Mode: Mode(word), DataFiles: dataFiles}
	named := len(files)+len(dataFiles) > 0
	mode, root, beneath := strings.Cut(word, "=")
	switch {
	case word == "" && named:
		p.Mode = Explicit
	case word == "":
		p.Mode = Deny
	case beneath && Mode(mode) == Beneath && root != "":
		p.Mode, p.Root = Beneath, root
	case p.Mode == Deny, p.Mode == SameDir, p.Mode == Explicit:
	default:
		return Policy{}, fmt.Errorf("backing policy %q is not one of deny, same-dir, beneath=DIR, explicit", word)
	}
	switch {
	case p.Mode == Explicit && !named:
		return Policy{}, errors.New("--backing=explicit needs --backing-file or --data-file")
	case p.Mode != Explicit && named:
		return Policy{}, fmt.Errorf("--backing=%s: --backing-file and --data-file go with --backing=explicit", word)
	}
	for _, f := range files {
		p.Files = append(p.Files, parseFile(f))
	}
	for _, f := range append(dataFiles, fileNames(p.Files)...) {
		if f == "" {
			return Policy{}, errors.New("a backing or data file needs a path")
		}
	}
	return p, nil
}

// parseFile takes a format off the end of s. Other colons belong to the path.
func parseFile(s string) File {
	for _, format := range layerFormats {
		if path, ok := strings.CutSuffix(s, ":"+format); ok {
			return File{Path: path, Format: format}
		}
	}
	return File{Path: s}
}

func fileNames(files []File) (list []string) {
	for _, f := range files {
		list = append(list, f.Path)
	}
	return list
}
