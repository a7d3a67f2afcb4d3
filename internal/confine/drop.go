// Package confine takes rights away from the process.
package confine

import (
	"errors"
	"fmt"
	"math"
	"os"
	"os/user"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// Drop makes the process, with all its threads, run as a user and a group for
// good: real, effective and saved ids, and no supplementary groups. Each is a
// name or a number, and "" leaves it, but that a user without a group brings
// its own. Descriptors that are open stay open.
//
// A process that may not change its ids and has those already is left as it
// is, supplementary groups included. After any other error the process may
// have part of its rights left, and has to end.
func Drop(userName, groupName string) error {
	if userName == "" && groupName == "" {
		return nil
	}
	to, err := resolveIDs(userName, groupName)
	if err != nil {
		return err
	}
	if err := to.become(); err != nil {
		return fmt.Errorf("become user %q, group %q: %w", userName, groupName, err)
	}
	return nil
}

// CredentialOf is a user and a group, as Drop takes them, for a child process;
// nil leaves the child as this process is. That is so too for a process that
// is not root, which has no other user to give.
func CredentialOf(userName, groupName string) (*syscall.Credential, error) {
	if userName == "" && groupName == "" || os.Geteuid() != 0 {
		return nil, nil
	}
	to, err := resolveIDs(userName, groupName)
	if err != nil {
		return nil, err
	}
	c := &syscall.Credential{Uid: uint32(os.Geteuid()), Gid: uint32(os.Getegid())}
	if to.uid != keep {
		c.Uid = uint32(to.uid)
	}
	if to.gid != keep {
		c.Gid = uint32(to.gid)
	}
	return c, nil
}

// CheckIDs tells whether user and group, names or numbers as Drop takes them,
// exist.
func CheckIDs(userName, groupName string) error {
	_, err := resolveIDs(userName, groupName)
	return err
}

// keep is the id that setresuid(2) leaves alone.
const keep = -1

// identity is what to become; each id may be keep.
type identity struct {
	uid, gid int
}

func resolveIDs(userName, groupName string) (identity, error) {
	to := identity{uid: keep, gid: keep}
	if userName != "" {
		uid, primary, err := lookupUser(userName)
		if err != nil {
			return to, fmt.Errorf("user %q: %w", userName, err)
		}
		to.uid, to.gid = uid, primary
	}
	if groupName != "" {
		gid, err := lookupGroup(groupName)
		if err != nil {
			return to, fmt.Errorf("group %q: %w", groupName, err)
		}
		to.gid = gid
	}
	if to.uid != keep && to.gid == keep {
		return to, fmt.Errorf("user %q: has no group of its own: name one too", userName)
	}
	return to, nil
}

// lookupUser returns keep as the group of a number that no user has. A name
// comes before a number, as chown(1) has it.
func lookupUser(s string) (uid, gid int, err error) {
	u, err := user.Lookup(s)
	if err != nil {
		n, numErr := parseID(s)
		if numErr != nil {
			return 0, 0, errors.New("no such user")
		}
		if u, err = user.LookupId(strconv.Itoa(n)); err != nil {
			return n, keep, nil
		}
	}
	if uid, err = parseID(u.Uid); err != nil {
		return 0, 0, err
	}
	gid, err = parseID(u.Gid)
	return uid, gid, err
}

func lookupGroup(s string) (int, error) {
	g, err := user.LookupGroup(s)
	if err == nil {
		return parseID(g.Gid)
	}
	n, err := parseID(s)
	if err != nil {
		return 0, errors.New("no such group")
	}
	return n, nil
}

// parseID refuses the largest number, which the kernel takes for "leave".
func parseID(s string) (int, error) {
	n, err := strconv.ParseUint(s, 10, 32)
	if err == nil && n == math.MaxUint32 {
		err = strconv.ErrRange
	}
	return int(n), err
}

// setters are the system calls that change ids: those of package syscall
// change all threads, those of x/sys/unix the calling one.
type setters struct {
	groups   func([]int) error
	gid, uid func(real, effective, saved int) error
}

var (
	allThreads = setters{syscall.Setgroups, syscall.Setresgid, syscall.Setresuid}
	thisThread = setters{unix.Setgroups, unix.Setresgid, unix.Setresuid}
)

// become changes all threads.
func (to identity) become() error { return to.set(allThreads) }

// becomeThread changes the calling thread, which must be locked.
func (to identity) becomeThread() error { return to.set(thisThread) }

// set changes the groups first, because a user without rights may not.
func (to identity) set(by setters) error {
	if err := by.groups([]int{}); err != nil {
		if errors.Is(err, syscall.EPERM) && to.verify() == nil {
			return nil
		}
		return fmt.Errorf("leave supplementary groups: %w", err)
	}
	if to.gid != keep {
		if err := by.gid(to.gid, to.gid, to.gid); err != nil {
			return fmt.Errorf("set group id %d: %w", to.gid, err)
		}
	}
	if to.uid != keep {
		if err := by.uid(to.uid, to.uid, to.uid); err != nil {
			return fmt.Errorf("set user id %d: %w", to.uid, err)
		}
	}
	if err := to.verify(); err != nil {
		return err
	}
	return to.verifyLost(by)
}

// verify compares all three ids of each kind.
func (to identity) verify() error {
	ru, eu, su := unix.Getresuid()
	if to.uid != keep && (ru != to.uid || eu != to.uid || su != to.uid) {
		return fmt.Errorf("user ids are %d, %d, %d, want %d", ru, eu, su, to.uid)
	}
	rg, eg, sg := unix.Getresgid()
	if to.gid != keep && (rg != to.gid || eg != to.gid || sg != to.gid) {
		return fmt.Errorf("group ids are %d, %d, %d, want %d", rg, eg, sg, to.gid)
	}
	return nil
}

// verifyLost tries to get root back. That must fail even if the process had
// the capabilities to change ids without being root.
func (to identity) verifyLost(by setters) error {
	if to.uid == keep || to.uid == 0 {
		return nil
	}
	if err := by.uid(keep, 0, keep); err == nil {
		return errors.New("root can be regained")
	}
	if to.gid == 0 {
		return nil
	}
	if err := by.gid(keep, 0, keep); err == nil {
		return errors.New("root's group can be regained")
	}
	return nil
}
