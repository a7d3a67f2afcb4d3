package main

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/pelletier/go-toml/v2"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/qmp/libvirtd"
)

// machinesFile names machines, unless machinesVariable names another file.
const (
	machinesFile     = "/etc/vmdiskd/vmdiskctl.toml"
	machinesVariable = "VMDISKCTL_CONFIG"
)

// machines is the file: what each name stands for.
type machines struct {
	Machines map[string]namedMachine `toml:"machines"`
}

// namedMachine is a QMP socket or a libvirt domain.
type namedMachine struct {
	QMP         string `toml:"qmp"`
	Agent       string `toml:"agent"`
	SocketOwner string `toml:"socket-owner"`

	Libvirt       string `toml:"libvirt"` // URI
	LibvirtSocket string `toml:"libvirt-socket"`
	Domain        string `toml:"domain"` // empty: as the machine
}

// check refuses what is neither, or a mix.
func (m *namedMachine) check(name string) error {
	over := m.Libvirt != "" || m.LibvirtSocket != "" || m.Domain != ""
	switch {
	case name == "" || strings.Contains(name, "/"):
		return fmt.Errorf("machine %q: a name is not empty and has no slash", name)
	case m.QMP == "" && !over:
		return fmt.Errorf("machine %q: neither qmp nor libvirt says where it is", name)
	case m.QMP != "" && over:
		return fmt.Errorf("machine %q: both qmp and libvirt", name)
	case m.QMP == "" && m.Agent != "":
		return fmt.Errorf("machine %q: agent goes with qmp: libvirt knows that of its domain", name)
	case m.QMP != "" && !strings.HasPrefix(m.QMP, "/"), m.Agent != "" && !strings.HasPrefix(m.Agent, "/"), m.LibvirtSocket != "" && !strings.HasPrefix(m.LibvirtSocket, "/"):
		return fmt.Errorf("machine %q: sockets have absolute paths", name)
	case m.Libvirt != "" && m.Libvirt != libvirtd.System && m.Libvirt != libvirtd.Private:
		return fmt.Errorf("machine %q: libvirt %q is neither %s nor %s", name, m.Libvirt, libvirtd.System, libvirtd.Private)
	}
	return nil
}

// loadMachines reads the file. That there is none is no error, unless it was
// named.
func loadMachines() (*machines, error) {
	named := os.Getenv(machinesVariable)
	path := cmp.Or(named, machinesFile)
	text, err := config.ReadText(path)
	if errors.Is(err, fs.ErrNotExist) && named == "" {
		return &machines{}, nil
	}
	if err != nil {
		return nil, err
	}
	m := &machines{}
	if err := toml.NewDecoder(bytes.NewReader(text)).DisallowUnknownFields().Decode(m); err != nil {
		return nil, placed(path, err)
	}
	for name, one := range m.Machines {
		if err := one.check(name); err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
	}
	return m, nil
}

// placed says where in a file a mistake is.
func placed(path string, err error) error {
	if strict, ok := errors.AsType[*toml.StrictMissingError](err); ok && len(strict.Errors) > 0 {
		row, column := strict.Errors[0].Position()
		return fmt.Errorf("%s:%d:%d: there is no key %q", path, row, column, strings.Join(strict.Errors[0].Key(), "."))
	}
	if one, ok := errors.AsType[*toml.DecodeError](err); ok {
		row, column := one.Position()
		return fmt.Errorf("%s:%d:%d: %w", path, row, column, err)
	}
	return fmt.Errorf("%s: %w", path, err)
}

// find makes of VM what it stands for, if it is a name of the file and no flag
// says what it is; flags that are given have the last word.
func (f *vmFlags) find(vm string) (found string, err error) {
	if f.asked == vm {
		return f.found, nil
	}
	if found, err = f.look(vm); err == nil {
		f.asked, f.found = vm, found
	}
	return found, err
}

// look is find the first time.
func (f *vmFlags) look(vm string) (string, error) {
	if f.via != "" || strings.Contains(vm, "/") {
		return vm, nil
	}
	all, err := loadMachines()
	if err != nil {
		return "", err
	}
	m, ok := all.Machines[vm]
	switch {
	case !ok:
		return vm, nil
	case m.QMP != "":
		f.via, f.owner = viaQMP, m.SocketOwner
		f.agent = cmp.Or(f.agent, m.Agent)
		return m.QMP, nil
	}
	f.via, f.owner = viaLibvirt, m.SocketOwner
	f.libvirt.socket = cmp.Or(f.libvirt.socket, m.LibvirtSocket)
	f.libvirt.uri = cmp.Or(f.libvirt.uri, m.Libvirt)
	return cmp.Or(m.Domain, vm), nil
}
