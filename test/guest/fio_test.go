package guest

import (
	"encoding/json"
	"testing"

	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// TestFioOfAGuestSurvivesRestarts gives a guest a disk that its fio writes and
// verifies: the service stops and starts while requests are in flight, the disk
// grows, the service is killed and starts again, without one request that fails. A
// rate has a round last longer than a restart.
func TestFioOfAGuestSurvivesRestarts(t *testing.T) {
	t.Parallel()
	e := newEstate(t, "fio")
	e.memory = 768 // fio has libraries of 80 MiB, which are there twice while the kernel unpacks them
	e.boot(t)
	const serial = "FIO0"
	disk := e.run(t, "attach", e.image(t, "disk.img", 16<<20), "--persist", "--rate=ops=200", "--serial="+serial).Disk
	e.expect(t, serial+" has 16 MiB")
	e.load(t, serial, 1)
	e.expect(t, serial+" another block is noticed")
	e.underFio(t, serial, e.restart)
	e.run(t, "resize", disk, "24M")
	e.expect(t, serial+" has 24 MiB")
	e.underFio(t, serial, e.kill)
	e.run(t, "detach", disk)
	e.expect(t, serial+" gone")
}

// underFio restarts the service, as restart does it, while requests of a round
// are in flight, and waits until the guest has read back all of the round.
func (e *estate) underFio(t *testing.T, serial string, restart func(*testing.T)) {
	t.Helper()
	e.await(t, "requests are in flight", func() bool {
		text := testenv.Run(t, e.ctl, "clients", "--json", "--socket", e.dir+"/control")
		var clients []struct {
			InFlight int `json:"in-flight"`
		}
		if err := json.Unmarshal([]byte(text), &clients); err != nil {
			t.Fatalf("clients: %v, %s", err, text)
		}
		// The service may see some time later that the first client has left.
		for _, c := range clients {
			if c.InFlight > 0 {
				return true
			}
		}
		return false
	})
	restart(t)
	e.load(t, serial, 1)
}
