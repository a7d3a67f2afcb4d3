package psk

import (
	"testing"
)

// needBuild skips in a build that cannot do it at all, which is one without
// the overlay of make.
func needBuild(t *testing.T) {
	t.Helper()
	if err := Supported(); err != nil {
		t.Skipf("this build has no overlay of crypto/tls, make test has: %v", err)
	}
}

func TestSelfTestTellsLabelsApart(t *testing.T) {
	external, resumption := selfTest("ext binder"), selfTest("res binder")
	if (external == nil) == (resumption == nil) {
		t.Errorf("with the label of external keys: %v; with that of resumption: %v; want one error", external, resumption)
	}
}
