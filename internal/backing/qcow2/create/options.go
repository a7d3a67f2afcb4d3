package create

import (
	"errors"
	"fmt"
	"math/bits"

	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/store"
)

// Preallocation says what of the disk is allocated from the start.
type Preallocation string

const (
	Off      Preallocation = "off"      // nothing; also the zero value
	Metadata Preallocation = "metadata" // the mapping; the storage is left to the host
	Falloc   Preallocation = "falloc"   // the storage too, unwritten
	Full     Preallocation = "full"     // and written
)

// Defaults of Options.
const (
	DefaultClusterSize  = 64 << 10
	DefaultRefcountBits = 16
	DefaultVersion      = 3
)

// Options says what image to make. The zero value is an empty disk.
type Options struct {
	Size         int64 // of the disk in bytes, a multiple of 512
	Version      int   // 2 or 3; 0 is DefaultVersion
	ClusterSize  int64 // bytes; 0 is DefaultClusterSize
	RefcountBits int   // 0 is DefaultRefcountBits
	ExtendedL2   bool
	Compression  format.Compression

	// Backing is the name of the backing file as the image shall have it, such as
	// format.FileName makes, and BackingFormat its format, "raw" or "qcow2": never
	// to be guessed.
	Backing, BackingFormat string

	// DataFile is the name of the external data file as the image shall have
	// it, and Data the file itself, which is as empty as that of the image.
	// DataFileRaw promises that it is the guest's disk byte for byte.
	DataFile    string
	Data        store.Store
	DataFileRaw bool

	Preallocation Preallocation
}

// OptionError refuses an option.
type OptionError struct {
	Option string // in words
	Why    string
}

func (e *OptionError) Error() string { return e.Option + ": " + e.Why }

func refuse(option, why string, args ...any) error {
	return &OptionError{Option: option, Why: fmt.Sprintf(why, args...)}
}

// withDefaults fills in what was not said.
func (o Options) withDefaults() Options {
	if o.Version == 0 {
		o.Version = DefaultVersion
	}
	if o.ClusterSize == 0 {
		o.ClusterSize = DefaultClusterSize
	}
	if o.RefcountBits == 0 {
		o.RefcountBits = DefaultRefcountBits
	}
	if o.Preallocation == "" {
		o.Preallocation = Off
	}
	if o.DataFileRaw && o.Preallocation == Off {
		// A reader of the image must find in it what the raw file has.
		o.Preallocation = Metadata
	}
	return o
}

const (
	minClusterSize = 1 << format.MinClusterBits
	maxClusterSize = 1 << format.MaxClusterBits
	minExtended    = 16 << 10 // below, a subcluster is less than a sector
	maxRefcount    = 64       // bits
	sector         = 512
)

// check refuses what no image can have. Defaults have been filled in.
func (o *Options) check() error {
	switch {
	case o.Size < 0:
		return refuse("size", "%d is negative", o.Size)
	case o.Size%sector != 0:
		return refuse("size", "%d is not a multiple of %d", o.Size, sector)
	case o.Version != 2 && o.Version != 3:
		return refuse("version", "%d is neither 2 nor 3", o.Version)
	case o.ClusterSize < minClusterSize || o.ClusterSize > maxClusterSize || !powerOfTwo(o.ClusterSize):
		return refuse("cluster size", "%d is not a power of two from %d to %d", o.ClusterSize, minClusterSize, maxClusterSize)
	case o.RefcountBits < 1 || o.RefcountBits > maxRefcount || !powerOfTwo(int64(o.RefcountBits)):
		return refuse("refcount bits", "%d is not a power of two from 1 to %d", o.RefcountBits, maxRefcount)
	case o.Compression != format.Deflate && o.Compression != format.Zstd:
		return refuse("compression type", "%d is unknown", o.Compression)
	case o.ExtendedL2 && o.ClusterSize < minExtended:
		return refuse("extended L2", "needs clusters of at least %d bytes", minExtended)
	}
	if o.Version == 2 {
		if err := o.checkVersion2(); err != nil {
			return err
		}
	}
	if err := o.checkNames(); err != nil {
		return err
	}
	return o.checkPreallocation()
}

// checkVersion2 refuses what came with version 3.
func (o *Options) checkVersion2() error {
	for _, f := range []struct {
		on     bool
		option string
	}{
		{o.RefcountBits != DefaultRefcountBits, "refcount bits"}, {o.ExtendedL2, "extended L2"},
		{o.Compression != format.Deflate, "compression type"}, {o.DataFile != "", "data file"},
	} {
		if f.on {
			return refuse(f.option, "needs an image of version 3")
		}
	}
	return nil
}

// checkNames looks at the names of other files and what goes with them.
func (o *Options) checkNames() error {
	switch {
	case o.Backing == "" && o.BackingFormat != "":
		return refuse("backing format", "there is no backing file")
	case o.Backing != "" && o.BackingFormat == "":
		return refuse("backing format", "must be said")
	case o.Backing != "" && o.BackingFormat != "raw" && o.BackingFormat != "qcow2":
		return refuse("backing format", "%q is neither raw nor qcow2", o.BackingFormat)
	case len(o.Backing) > format.MaxBackingName:
		return refuse("backing file", "a name of %d bytes is longer than %d", len(o.Backing), format.MaxBackingName)
	case format.HasControl(o.Backing):
		return refuse("backing file", "%q has control characters", o.Backing)
	case format.HasControl(o.DataFile):
		return refuse("data file", "%q has control characters", o.DataFile)
	case int64(len(o.DataFile)) > o.ClusterSize:
		return refuse("data file", "a name of %d bytes does not fit into the header", len(o.DataFile))
	case o.DataFileRaw && o.DataFile == "":
		return refuse("raw data file", "there is no data file")
	case o.DataFileRaw && o.Backing != "":
		return refuse("raw data file", "cannot be combined with a backing file")
	}
	return errors.Join(checkLocal("backing file", o.Backing), checkLocal("data file", o.DataFile))
}

// checkLocal refuses a name that QEMU would not read as that of this file: with
// "file:" it would be that of another.
func checkLocal(option, name string) error {
	if protocol, ok := format.Protocol(name); ok {
		return refuse(option, "%q begins with protocol %q; a file of that name is %q", name, protocol, format.FileName(name))
	}
	return nil
}

func (o *Options) checkPreallocation() error {
	switch o.Preallocation {
	case Off:
		return nil
	case Metadata, Falloc, Full:
	default:
		return refuse("preallocation", "%q is not one of off, metadata, falloc and full", string(o.Preallocation))
	}
	if o.Backing != "" && !o.ExtendedL2 {
		return refuse("preallocation", "would hide the backing file, unless L2 entries are extended")
	}
	return nil
}

func powerOfTwo(n int64) bool { return bits.OnesCount64(uint64(n)) == 1 }
