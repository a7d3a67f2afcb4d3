package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	served "github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
	control "github.com/vmdiskd/vmdiskd/internal/control/client"
	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// serviceName is vmdiskd with a configuration: "service N" has N exports, and
// the first of them is the image of the case. A third word changes it:
// "adding" adds and removes an export addsPerSecond times while it is measured,
// "rate=BYTES" limits the first export.
const serviceName = "service"

// mostExports bounds N.
const mostExports = 10000

// addsPerSecond is more than an operator has guests to start. Without a pause
// the case would measure how a processor is shared by two loops.
const addsPerSecond = 20

// rateMiB is the limit of the case s-rate.
const rateMiB = 100

// idleBytes is the size of the exports that nobody uses.
const idleBytes = 1 << 20

// service is how a peer is a service; the zero value is none.
type service struct {
	exports int
	adding  bool
	rate    served.Size
}

// parseService reads the words behind the name.
func parseService(words []string) (s service, err error) {
	if len(words) < 1 || len(words) > 2 {
		return s, fmt.Errorf("%s wants a number of exports and at most one more word", serviceName)
	}
	if s.exports, err = strconv.Atoi(words[0]); err != nil || s.exports < 1 || s.exports > mostExports {
		return s, fmt.Errorf("%s: %q is not between 1 and %d", serviceName, words[0], mostExports)
	}
	if len(words) == 1 {
		return s, nil
	}
	rate, limited := strings.CutPrefix(words[1], "rate=")
	switch {
	case limited:
		if err := s.rate.UnmarshalText([]byte(rate)); err != nil {
			return s, fmt.Errorf("%s: rate: %w", serviceName, err)
		}
	case words[1] == "adding":
		s.adding = true
	default:
		return s, fmt.Errorf("%s: %q is neither adding nor rate=BYTES", serviceName, words[1])
	}
	return s, nil
}

// serviceKind is the program with a configuration that lies beside its socket.
var serviceKind = testenv.Kind{Name: serviceName, Args: func(_ testenv.Options, socket string) []string {
	return []string{"--config", filepath.Join(filepath.Dir(socket), "conf")}
}}

// controlSocket is where the control API of a service is.
func controlSocket(dir string) string { return filepath.Join(dir, "control") }

// configure writes the configuration of the service into dir.
func (b *bench) configure(dir, image string, s service) error {
	idle := filepath.Join(b.dir, "idle")
	if err := os.MkdirAll(idle, 0o700); err != nil {
		return err
	}
	var text strings.Builder
	fmt.Fprintf(&text, "[control]\nsocket = %q\n[images]\nroots = [%q]\n[[listener]]\nuri = %q\n",
		controlSocket(dir), b.dir, "nbd+unix:///?socket="+filepath.Join(dir, serviceName+".sock"))
	fmt.Fprintf(&text, "[[export]]\nname = \"busy\"\ndefault = true\nimage = %q\n", image)
	if s.rate > 0 {
		fmt.Fprintf(&text, "[export.rate]\nbytes = %d\n", s.rate)
	}
	for i := 1; i < s.exports; i++ {
		path := filepath.Join(idle, strconv.Itoa(i))
		if err := sparse(path); err != nil {
			return err
		}
		fmt.Fprintf(&text, "[[export]]\nname = \"idle%d\"\nimage = %q\n", i, path)
	}
	return errors.Join(sparse(filepath.Join(idle, "added")),
		os.WriteFile(filepath.Join(dir, "conf"), []byte(text.String()), 0o600))
}

// sparse makes the image of an export that nobody uses.
func sparse(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	return errors.Join(f.Truncate(idleBytes), f.Close())
}

// disturb adds and removes an export until stop is called, which returns how
// often it did and the first error.
func (b *bench) disturb(ctx context.Context, dir string) (stop func() (int, error)) {
	ctx, cancel := context.WithCancel(ctx)
	c := control.Dial(controlSocket(dir))
	add := api.AddExport{Export: served.Export{Name: "added", Image: filepath.Join(b.dir, "idle", "added")}}
	type result struct {
		n   int
		err error
	}
	ended := make(chan result, 1)
	go func() {
		var r result
		pace := time.NewTicker(time.Second / addsPerSecond)
		defer pace.Stop()
		for ; r.err == nil && ctx.Err() == nil; r.n++ {
			// What has begun is finished: the server ends in good order.
			whole := context.WithoutCancel(ctx)
			if _, r.err = c.Add(whole, add); r.err == nil {
				r.err = c.Remove(whole, add.Name, false, 0)
			}
			select {
			case <-pace.C:
			case <-ctx.Done():
			}
		}
		ended <- r
	}()
	return func() (int, error) {
		cancel()
		r := <-ended
		return r.n, r.err
	}
}
