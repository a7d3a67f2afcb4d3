//go:build race

package nbd

// underRace: the detector makes the conformance suite five times as slow, so
// it runs on fewer combinations.
const underRace = true
