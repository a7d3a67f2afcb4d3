package confine

import (
	"bytes"
	"encoding/gob"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// handoverVar is the environment variable by which stage 0 tells the worker
// the number of the descriptor with what it hands over.
const handoverVar = "VMDISKD_HANDOVER"

// Handover is what a worker gets from stage 0.
type Handover struct {
	Mode     Mode      `json:"mode"`
	Controls []Control `json:"controls"` // as stage 0 left them
	Procs    int       `json:"procs"`    // CPUs that Go may use; the worker cannot look
	State    []byte    `json:"state"`    // what keep has made; Take reads it
}

// keep encodes the state of the caller of Plan.Exec. Paths are in it, which JSON would
// not leave as they are: they have any bytes, and it has UTF-8 only.
func (h *Handover) keep(state any) error {
	var b bytes.Buffer
	err := gob.NewEncoder(&b).Encode(state)
	h.State = b.Bytes()
	return err
}

// Take puts Plan.State into what to points to, which is of its type.
func (h *Handover) Take(to any) error { return gob.NewDecoder(bytes.NewReader(h.State)).Decode(to) }

const seals = unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE

// seal makes a file in memory of h that nobody can change any more.
func (h *Handover) seal() (*os.File, error) {
	b, err := json.Marshal(h)
	if err != nil {
		return nil, err
	}
	if len(b) > limits.Handover {
		return nil, fmt.Errorf("what the worker is told has %d bytes, more than %d", len(b), limits.Handover)
	}
	fd, err := unix.MemfdCreate("vmdiskd-handover", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	f := os.NewFile(uintptr(fd), "handover")
	if _, err = f.Write(b); err == nil {
		_, err = unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, seals)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// IsWorker tells whether stage 0 started this process. It is true until
// Inherit.
func IsWorker() bool { return os.Getenv(handoverVar) != "" }

// Inherit takes what stage 0 hands over, or returns nil if there was none. It
// forbids core dumps and being traced. An error is that what is there is no
// sealed file in memory, or says what no stage 0 of this program says.
func Inherit() (*Handover, error) {
	word := os.Getenv(handoverVar)
	if word == "" {
		return nil, nil
	}
	if err := os.Unsetenv(handoverVar); err != nil {
		return nil, err
	}
	h, err := readHandover(word)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", handoverVar, err)
	}
	// It is reset by the exec, so it cannot be done before.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return nil, os.NewSyscallError("prctl", err)
	}
	h.Controls = append(h.Controls, Control{Name: ControlDumpable, State: Enforced})
	if h.Procs > 0 {
		runtime.GOMAXPROCS(h.Procs)
	}
	return h, nil
}

func readHandover(word string) (*Handover, error) {
	fd, err := strconv.ParseUint(word, 10, 31)
	if err != nil || fd < 3 {
		return nil, fmt.Errorf("%q is no descriptor", word)
	}
	got, err := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0)
	if err != nil {
		return nil, fmt.Errorf("descriptor %d is no file in memory: %w", fd, err)
	}
	if got&seals != seals {
		return nil, fmt.Errorf("descriptor %d is not sealed", fd)
	}
	f := os.NewFile(uintptr(fd), "handover")
	defer f.Close()
	b, err := io.ReadAll(io.NewSectionReader(f, 0, limits.Handover+1))
	if err != nil {
		return nil, err
	}
	if len(b) > limits.Handover {
		return nil, fmt.Errorf("more than %d bytes", limits.Handover)
	}
	h := new(Handover)
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(h); err != nil {
		return nil, err
	}
	if h.Mode != Strict && h.Mode != Auto || h.Procs < 0 || h.Procs > limits.HandoverProcs {
		return nil, errors.New("it says what stage 0 never says")
	}
	return h, nil
}
