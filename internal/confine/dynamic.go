package confine

import (
	"debug/elf"
	"os"
	"strings"
)

// libraries are the paths that a program needs that is not static, as a build
// for the race detector is; none for one that is.
func libraries(program *os.File) []Path {
	f, err := elf.NewFile(program)
	if err != nil {
		return nil // the exec will say what is wrong
	}
	for _, p := range f.Progs {
		if p.Type != elf.PT_INTERP || p.Filesz > maxInterpreter {
			continue
		}
		name := make([]byte, p.Filesz)
		if _, err := p.ReadAt(name, 0); err != nil {
			return nil
		}
		list := []Path{{strings.TrimRight(string(name), "\x00"), Read | Run}}
		for _, dir := range [...]string{"/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache"} {
			list = append(list, Path{dir, Read})
		}
		return list
	}
	return nil
}

// maxInterpreter is more than the longest path, PATH_MAX.
const maxInterpreter = 4097
