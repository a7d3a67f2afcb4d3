// Package codec turns compressed clusters of qcow2 images into bytes and back.
// Compressed data come from files that nobody vouches for: output, input,
// memory and time of every call are bounded by the size of one cluster.
package codec

import (
	"fmt"

	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
)

// Decode fills dst, which is one cluster, with what src says. src begins with
// the compressed data and may go on with something else, which is ignored
// (section "Compressed Clusters Descriptor"). Decode fails unless the data
// are whole and amount to exactly len(dst) bytes; dst is then undefined. It
// writes nowhere but into dst, keeps neither slice and, apart from errors,
// allocates nothing once its pools are warm. Safe for concurrent use.
func Decode(t format.Compression, dst, src []byte) error {
	// No descriptor can name more than two clusters of input.
	src = src[:min(len(src), 2*len(dst))]
	switch t {
	case format.Deflate:
		return inflate(dst, src)
	case format.Zstd:
		return decodeZstd(dst, src)
	}
	return unknown(t)
}

// Encode appends the compressed form of src, which is one cluster, to dst. It
// returns dst as it was, and false, if that form would not be shorter than
// src, which then is better stored as it is. Safe for concurrent use.
func Encode(t format.Compression, dst, src []byte) ([]byte, bool) {
	switch t {
	case format.Deflate:
		return deflate(dst, src)
	case format.Zstd:
		return encodeZstd(dst, src)
	}
	return dst, false
}

func unknown(t format.Compression) error {
	return format.Corrupt(fmt.Sprintf("compression type %d is not known", t))
}
