package libvirtd

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"time"

	libvirt "github.com/digitalocean/go-libvirt"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/qmp"
)

var _ qmp.Executor = (*Agent)(nil)

// Agent is the agent in a domain's guest by way of libvirt, which holds its
// channel. libvirt marks the domain as tainted. The guest is a hostile peer:
// nothing that it says is more than a claim. Safe for concurrent use.
type Agent struct {
	s *Session
	d Domain
}

// Agent belongs to the session. That there is one is found out by the first
// command.
func (s *Session) Agent(d Domain) *Agent { return &Agent{s: s, d: d} }

// Execute is as that of qmp.Agent: first it finds out whether there is an
// agent, else qmp.ErrNoAgent, and whether it has the command, else *qmp.Error
// of class qmp.ClassCommandNotFound: libvirt does not tell the class of a
// refusal, which is *Error. A command that was sent is waited for, within
// limits.LibvirtAgent, whatever becomes of ctx: its guest may be frozen by it.
func (a *Agent) Execute(ctx context.Context, command string, arguments any, files ...*os.File) (json.RawMessage, error) {
	if len(files) > 0 {
		return nil, fmt.Errorf("%s: %w: a guest agent takes no descriptors", command, qmp.ErrInvalid)
	}
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("%s: %w", command, err)
	}
	info, err := qmp.GuestInfo(ctx, called(a.present))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", qmp.ErrNoAgent, err)
	}
	if !info.Has(command) {
		return nil, &qmp.Error{Command: command, Class: qmp.ClassCommandNotFound, Desc: "the guest agent does not offer it"}
	}
	out, err := a.command(ctx, command, arguments, limits.LibvirtAgent)
	if HasCode(err, libvirt.ErrAgentUnresponsive) || HasCode(err, libvirt.ErrAgentUnsynced) || HasCode(err, libvirt.ErrAgentCommandTimeout) {
		err = fmt.Errorf("%w: %w", qmp.ErrUnanswered, err)
	}
	return out, err
}

// called makes a function an executor.
type called func(ctx context.Context, command string, arguments any, files ...*os.File) (json.RawMessage, error)

// Execute calls f.
func (f called) Execute(ctx context.Context, command string, arguments any, files ...*os.File) (json.RawMessage, error) {
	return f(ctx, command, arguments, files...)
}

// present is for the command that finds out whether there is an agent.
func (a *Agent) present(ctx context.Context, command string, arguments any, _ ...*os.File) (json.RawMessage, error) {
	return a.command(ctx, command, arguments, limits.AgentSync)
}

// command has libvirt wait for the reply for so long. The end of ctx must not
// close the session, without which no guest is thawed.
func (a *Agent) command(ctx context.Context, command string, arguments any, wait time.Duration) (json.RawMessage, error) {
	line, err := qmp.EncodeCommand(command, arguments)
	if err != nil {
		return nil, err
	}
	reply, err := call(context.WithoutCancel(ctx), a.s, command, func() (libvirt.OptString, error) {
		return a.s.l.QEMUDomainAgentCommand(a.d.handle, string(line), int32(wait/time.Second), 0)
	})
	if err != nil {
		return nil, err
	}
	if len(reply) != 1 || len(reply[0]) > limits.AgentLine {
		return nil, fmt.Errorf("%s: %w: no reply that an agent gives", command, qmp.ErrProtocol)
	}
	return qmp.DecodeReply(command, []byte(reply[0]))
}

// Filesystem is a mounted file system of a guest, as the guest claims, on
// disks that libvirt has found by their places. The texts are printable.
type Filesystem struct {
	Name       string // of the guest's device, such as vda1
	Mountpoint string
	Targets    []string // such as vda; a disk that libvirt has not found is left out
}

// Filesystems asks a domain's guest agent for what is mounted, at most
// limits.QMPItems. Without an agent the error is *Error. libvirt waits for the agent
// without bound: the question has a session of its own, for a guest that is silent to
// end.
func (s *Session) Filesystems(ctx context.Context, d Domain) ([]Filesystem, error) {
	const name = "list file systems"
	own, err := Dial(ctx, s.path, s.uri)
	if err != nil {
		return nil, err
	}
	defer own.Close()
	list, err := call(ctx, own, name, func() ([]libvirt.DomainFsinfo, error) {
		all, _, err := own.l.DomainGetFsinfo(d.handle, 0)
		return all, err
	})
	if err != nil {
		return nil, err
	}
	total := len(list)
	var out []Filesystem
	for _, l := range list {
		if total += len(l.DevAliases); total > limits.QMPItems {
			return nil, fmt.Errorf("%s: %w: more than %d file systems and disks", name, qmp.ErrProtocol, limits.QMPItems)
		}
		f := Filesystem{Name: qmp.Printable(l.Name, limits.QMPName), Mountpoint: qmp.Printable(l.Mountpoint, limits.MaxString)}
		for _, target := range l.DevAliases {
			f.Targets = append(f.Targets, qmp.Printable(target, limits.QMPName))
		}
		out = append(out, f)
	}
	return out, nil
}
