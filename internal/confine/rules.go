package confine

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/landlock-lsm/go-landlock/landlock"
	llsys "github.com/landlock-lsm/go-landlock/landlock/syscall"
	"golang.org/x/sys/unix"
)

// Right is what may be done with the files of a Path.
type Right uint8

// Rights.
const (
	Read   Right = 1 << iota // files
	List                     // folders
	Write                    // files that are there, their size included
	Create                   // regular files
	Remove                   // files of any kind
	Socket                   // make Unix sockets
	Rmdir                    // remove empty folders
	Run                      // execute
)

// Images are the rights that images need that are opened later on.
const Images = Read | List | Write | Create | Remove

// Path is a file, or a folder with everything beneath it, that the worker may
// go on using. One that does not exist, or that cannot be looked at, is left out.
type Path struct {
	Path string
	May  Right
}

// rights are the kernel's names; those of the second column are for folders
// only.
var rights = map[Right][2]landlock.AccessFSSet{
	Read:   {llsys.AccessFSReadFile, 0},
	List:   {0, llsys.AccessFSReadDir},
	Write:  {llsys.AccessFSWriteFile | llsys.AccessFSTruncate | llsys.AccessFSIoctlDev, 0},
	Create: {0, llsys.AccessFSMakeReg},
	Remove: {0, llsys.AccessFSRemoveFile},
	Socket: {0, llsys.AccessFSMakeSock},
	Rmdir:  {0, llsys.AccessFSRemoveDir},
	Run:    {llsys.AccessFSExecute, 0},
}

// rule is p as the library takes it, or nothing if the path does not exist.
func (p Path) rule() (landlock.Rule, bool, error) {
	fi, err := os.Stat(p.Path)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
		return nil, false, nil
	}
	if err != nil {
		return nil, false, err
	}
	var set landlock.AccessFSSet
	for r, names := range rights {
		if p.May&r == 0 {
			continue
		}
		set |= names[0]
		if fi.IsDir() {
			set |= names[1]
		}
	}
	return landlock.PathAccess(set, p.Path), set != 0, nil
}

// landlockABI is the version that the kernel has, 0 and why if it has none.
func landlockABI() (int, error) {
	n, _, e := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	if e != 0 {
		return 0, e
	}
	return int(n), nil
}

// abiComplete is the version that knows all that restrict asks for.
const abiComplete = 6

// restrict confines all threads to those paths, forbids them TCP connections,
// and signals and abstract sockets of processes outside; without BindTCP also
// new TCP ports. It sets no_new_privs.
func (p *Plan) restrict(paths []Path) error {
	c := landlock.V6
	c.HandledAccessNet = llsys.AccessNetConnectTCP
	if !p.BindTCP {
		c.HandledAccessNet |= llsys.AccessNetBindTCP
	}
	if p.AbstractSockets {
		c.Scoped = llsys.ScopeSignal
	}
	var rules []landlock.Rule
	for _, p := range paths {
		r, ok, err := p.rule()
		if err != nil {
			return fmt.Errorf("landlock: %w", err)
		}
		if ok {
			rules = append(rules, r)
		}
	}
	return c.BestEffort().Restrict(rules...)
}
