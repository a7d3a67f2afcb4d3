package daemon

import (
	"errors"
	"fmt"
	"os"

	"github.com/vmdiskd/vmdiskd/internal/transport/psk"
)

// loadKeys reads the pre-shared keys, if there shall be any.
func (d *daemon) loadKeys() (err error) {
	if d.cfg.TLSKeys == "" {
		return nil
	}
	if err := psk.Supported(); err != nil {
		return err
	}
	f, err := d.cfg.Handed.keys()
	if err == nil && f == nil {
		f, err = psk.Open(d.cfg.TLSKeys)
	}
	if err != nil {
		return err
	}
	if d.keys, err = psk.LoadFrom(f, d.cfg.TLSKeys); err != nil {
		return errors.Join(err, f.Close())
	}
	d.keys.Keep(f)
	d.warnOfKeys()
	return nil
}

// openKeys opens the key file for the worker, and shows mistakes in it before
// anything is made. It returns nil if there shall be none.
func (s *stage0) openKeys() (*os.File, error) {
	if s.cfg.TLSKeys == "" {
		return nil, nil
	}
	if err := psk.Supported(); err != nil {
		return nil, err
	}
	f, err := psk.Open(s.cfg.TLSKeys)
	if err != nil {
		return nil, err
	}
	if _, err := psk.LoadFrom(f, s.cfg.TLSKeys); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// keys is the key file that stage 0 has opened, or nil.
func (t *Handed) keys() (*os.File, error) {
	if t == nil || t.in.Keys == 0 {
		return nil, nil
	}
	return file(t.in.Keys, "keys")
}

func (d *daemon) warnOfKeys() {
	if short := d.keys.Short(); len(short) > 0 {
		d.logs.For("tls").Warn("pre-shared keys are short: `vmdiskctl psk new` makes better ones", "identities", short)
	}
}

// warnUnseen tells of certificates and keys whose folder is closed to this process: that
// they have not changed is more than it can know.
func (d *daemon) warnUnseen() {
	const text = "cannot be looked at: only what becomes of the files that were there at the start is noticed"
	if d.creds != nil {
		if err := d.creds.Unseen(); err != nil {
			d.logs.For("tls").Warn("certificates "+text, "error", err)
		}
	}
	if d.keys != nil {
		if err := d.keys.Unseen(); err != nil {
			d.logs.For("tls").Warn("pre-shared keys "+text, "error", err)
		}
	}
}

// readSecrets reads certificates and pre-shared keys again, and says what has
// changed. The keys count when take is called, which is never nil without an error;
// certificates do at once, as at any handshake, unless it is a dry run. What is wrong
// with a file is an error, and changes nothing of it.
func (d *daemon) readSecrets(dryRun bool) (changes []string, take func(), err error) {
	d.warnUnseen()
	certificates, take := d.creds.Look, func() {}
	if dryRun {
		certificates = d.creds.Check
	}
	if d.creds != nil {
		changed, wrong := certificates()
		if changed {
			changes = append(changes, "certificates")
		}
		err = wrong
	}
	if d.keys != nil {
		changed, now, wrong := d.keys.Check()
		if wrong != nil {
			return changes, nil, errors.Join(err, fmt.Errorf("pre-shared keys stay as they were: %w", wrong))
		}
		take = now
		if changed {
			changes = append(changes, "pre-shared keys")
			take = func() {
				now()
				d.logs.For("tls").Info("pre-shared keys reloaded", "identities", d.keys.Len())
				d.warnOfKeys()
			}
		}
	}
	return changes, take, err
}
