// Package lint holds the rules of the house as tests: who may import whom,
// where unsafe may stand, that every exported name is documented.
package lint
