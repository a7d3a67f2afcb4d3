package main

import (
	"bufio"
	"fmt"
	"os"
	"path"
	"regexp"
	"strings"
)

// rule allows the tests of a package whose name the pattern matches to be
// skipped.
type rule struct {
	pkg    string // relative to the module, as in test/interop
	name   *regexp.Regexp
	reason string
}

// readAllowed reads the list; no file name is an empty list.
func readAllowed(file string) ([]rule, error) {
	if file == "" {
		return nil, nil
	}
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var rules []rule
	lines := bufio.NewScanner(f)
	for n := 1; lines.Scan(); n++ {
		r, ok, err := parseRule(lines.Text())
		if err != nil {
			return nil, fmt.Errorf("%s:%d: %w", file, n, err)
		}
		if ok {
			rules = append(rules, r)
		}
	}
	return rules, lines.Err()
}

// parseRule reads one line: package, pattern of the whole test name, reason.
// ok is false for an empty line and for a comment.
func parseRule(line string) (r rule, ok bool, err error) {
	line = strings.TrimSpace(line)
	if line == "" || line[0] == '#' {
		return rule{}, false, nil
	}
	fields := strings.Fields(line)
	if len(fields) < 3 {
		return rule{}, false, fmt.Errorf("%q: want package, test pattern and reason", line)
	}
	name, err := regexp.Compile("^(?:" + fields[1] + ")$")
	if err != nil {
		return rule{}, false, err
	}
	return rule{fields[0], name, strings.Join(fields[2:], " ")}, true, nil
}

func allows(rules []rule, t test) bool {
	for _, r := range rules {
		if (t.pkg == r.pkg || strings.HasSuffix(t.pkg, path.Join("/", r.pkg))) && r.name.MatchString(t.name) {
			return true
		}
	}
	return false
}
