package daemon

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/transport"
)

// Lacks is what this machine does not have of what a start with c cannot do
// without, nil for nothing: users and groups that have names, and certificates. An
// export that needs more than there is keeps no other from being served.
func Lacks(c *config.Config) error {
	_, err := rulesOf(&c.Control)
	list := []error{inKey("[control]", err)}
	if c.Control.Owner != "" {
		_, err := transport.ParseOwner(c.Control.Owner)
		list = append(list, inKey("control.owner", err))
	}
	for _, l := range c.Listeners {
		if l.Owner != "" {
			_, err := transport.ParseOwner(l.Owner)
			list = append(list, inKey(fmt.Sprintf("owner of listener %q", l.URI), err))
		}
	}
	if encrypts(c) && c.TLS.Certificates != "" {
		if _, err := os.Stat(c.TLS.Certificates); errors.Is(err, fs.ErrNotExist) {
			list = append(list, inKey("tls.certificates", err))
		}
	}
	return errors.Join(list...)
}

// inKey gives an error of a configuration its place.
func inKey(where string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", where, err)
}
