// Package export keeps the named disks of a server and decides which of them
// a peer may see and open.
package export

import (
	"context"
	"errors"
	"fmt"
	"sort"
	"sync"
	"unicode/utf8"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd"
	"github.com/vmdiskd/vmdiskd/internal/transport"
)

// Spec describes an export.
type Spec struct {
	Name        string
	Description string
	Device      backing.Device // owned by the registry from Add on
	ReadOnly    bool
	NeedTLS     bool // only for connections that are encrypted
}

// Registry is safe for concurrent use.
type Registry struct {
	mu      sync.Mutex
	byName  map[string]*entry // guarded by mu
	dfault  string            // guarded by mu; what "" stands for
	hasDflt bool              // guarded by mu
	closed  bool              // guarded by mu
}

type entry struct {
	spec  Spec
	users sync.WaitGroup // open views
}

// ErrExists is returned by Add for a name that is taken.
var ErrExists = errors.New("export exists")

// NewRegistry makes an empty registry.
func NewRegistry() *Registry { return &Registry{byName: make(map[string]*entry)} }

// Add publishes an export. The first one is the default: the empty name opens
// it too.
func (r *Registry) Add(s Spec) error {
	if len(s.Name) > limits.MaxString || len(s.Description) > limits.MaxString ||
		!utf8.ValidString(s.Name) || !utf8.ValidString(s.Description) {
		return fmt.Errorf("export name and description must be UTF-8 of at most %d bytes", limits.MaxString)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, ok := r.byName[s.Name]; ok {
		return fmt.Errorf("%w: %q", ErrExists, s.Name)
	}
	r.byName[s.Name] = &entry{spec: s}
	if !r.hasDflt {
		r.dfault, r.hasDflt = s.Name, true
	}
	return nil
}

// List implements nbd.Exports, sorted by name.
func (r *Registry) List(*transport.Peer) []nbd.ExportInfo {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := make([]nbd.ExportInfo, 0, len(r.byName))
	for _, e := range r.byName {
		out = append(out, e.info())
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Name < out[j].Name })
	return out
}

// Find implements nbd.Exports.
func (r *Registry) Find(name string, _ *transport.Peer) (nbd.ExportInfo, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	e, err := r.findLocked(name)
	if err != nil {
		return nbd.ExportInfo{}, err
	}
	return e.info(), nil
}

// Open implements nbd.Exports: the view that it returns has the size that the
// device has now, and no right to write if the export is read-only.
func (r *Registry) Open(_ context.Context, name string, _ *transport.Peer) (*nbd.Export, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	e, err := r.findLocked(name)
	if err != nil {
		return nil, err
	}
	var deny backing.Caps
	if e.spec.ReadOnly {
		deny = backing.CanWrite
	}
	e.users.Add(1)
	return &nbd.Export{
		ExportInfo: e.info(),
		Device:     backing.NewChecked(e.spec.Device, deny),
		Close:      sync.OnceFunc(e.users.Done),
	}, nil
}

func (r *Registry) findLocked(name string) (*entry, error) {
	if name == "" && r.hasDflt {
		name = r.dfault
	}
	e := r.byName[name]
	if e == nil || r.closed {
		return nil, nbd.ErrUnknownExport
	}
	return e, nil
}

func (e *entry) info() nbd.ExportInfo {
	x := nbd.ExportInfo{Name: e.spec.Name, Description: e.spec.Description, NeedTLS: e.spec.NeedTLS}
	if d, ok := e.spec.Device.(backing.Describer); ok {
		x.Contexts = d.Descriptions()
	}
	return x
}

// Close waits until no connection uses an export any more, flushes the
// writable ones and closes all. It returns the first error.
func (r *Registry) Close(ctx context.Context) error {
	r.mu.Lock()
	r.closed = true
	r.mu.Unlock()
	var first error
	for _, e := range r.byName {
		e.users.Wait()
		if !e.spec.ReadOnly {
			first = keep(first, e.spec.Device.Flush(ctx))
		}
		first = keep(first, e.spec.Device.Close())
	}
	return first
}

func keep(first, err error) error {
	if first == nil {
		return err
	}
	return first
}
