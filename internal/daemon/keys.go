package daemon

import "github.com/vmdiskd/vmdiskd/internal/transport/psk"

// loadKeys reads the pre-shared keys, if there shall be any.
func (d *daemon) loadKeys() (err error) {
	if d.cfg.TLSKeys == "" {
		return nil
	}
	if err := psk.Supported(); err != nil {
		return err
	}
	if d.keys, err = psk.Load(d.cfg.TLSKeys); err != nil {
		return err
	}
	d.warnOfKeys()
	return nil
}

func (d *daemon) warnOfKeys() {
	if short := d.keys.Short(); len(short) > 0 {
		d.logs.For("tls").Warn("pre-shared keys are short: `vmdiskctl psk new` makes better ones", "identities", short)
	}
}

// reloadKeys reads them again; what is wrong with the file is for the log.
func (d *daemon) reloadKeys() {
	if d.keys == nil {
		return
	}
	if err := d.keys.Reload(); err != nil {
		d.logs.For("tls").Warn("pre-shared keys stay as they were", "error", err)
		return
	}
	d.logs.For("tls").Info("pre-shared keys reloaded", "identities", d.keys.Len())
	d.warnOfKeys()
}
