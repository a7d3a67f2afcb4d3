package daemon

import (
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/config"
)

// TestUndoneGroupsAreTheSame: exports that are open, and those that are opened
// later, share one limiter with the rates that it had.
func TestUndoneGroupsAreTheSame(t *testing.T) {
	var g groups
	if _, err := g.set(map[string]config.Rate{"stays": {Ops: 1}, "goes": {Ops: 2}}); err != nil {
		t.Fatal(err)
	}
	stays, goes := g.find("stays"), g.find("goes")
	undo, err := g.set(map[string]config.Rate{"stays": {Ops: 10}, "comes": {Ops: 3}})
	if err != nil {
		t.Fatal(err)
	}
	if g.find("stays") != stays || stays.Rates().Total.Ops != 10 || g.find("comes") == nil {
		t.Errorf("next: got %+v, want the new rate and the new group", g.byName)
	}
	if g.find("goes") != goes {
		t.Error("next: what goes is missing before anybody could leave it")
	}
	undo()
	if g.find("stays") != stays || g.find("goes") != goes || g.find("comes") != nil {
		t.Errorf("undone: got %v, want the limiters that there were", g.byName)
	}
	if got, want := stays.Rates().Total.Ops, int64(1); got != want {
		t.Errorf("undone: got %d requests in a second, want %d", got, want)
	}
	if _, err := g.set(map[string]config.Rate{"stays": {Ops: 5}, "bad": {Ops: -1}}); err == nil {
		t.Error("a negative rate was taken")
	}
	if got := stays.Rates().Total.Ops; got != 1 || g.find("bad") != nil {
		t.Errorf("after rates that are bad: got %d requests in a second, want 1", got)
	}
	g.keep(map[string]config.Rate{"stays": {Ops: 1}})
	if g.find("stays") != stays || g.find("goes") != nil {
		t.Errorf("kept: got %v, want one group", g.byName)
	}
}
