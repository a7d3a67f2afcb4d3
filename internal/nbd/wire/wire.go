// Package wire knows the bytes of the NBD protocol and nothing else: numbers,
// their names, and codecs that turn headers into values and back. It does no
// I/O and keeps no state. Rules and section names are those of the protocol
// document (proto.md of the NBD project, with its extension-ext-header branch
// for extended headers).
//
// All integers on the wire are big-endian.
package wire

// Magic numbers of the handshake and of transmission.
const (
	MagicInit     = 0x4e42444d41474943 // "NBDMAGIC", first bytes of any server
	MagicOption   = 0x49484156454f5054 // "IHAVEOPT", newstyle
	MagicOldstyle = 0x00420281861253   // oldstyle
	MagicOptReply = 0x0003e889045565a9

	MagicRequest     = 0x25609513
	MagicReply       = 0x67446698 // simple reply
	MagicChunk       = 0x668e33ef // structured reply
	MagicExtRequest  = 0x21e41c71
	MagicExtResponse = 0x6e8a278c
)

// Handshake flags (16 bits, server) and client flags (32 bits) share values.
const (
	FlagFixedNewstyle = 1 << 0
	FlagNoZeroes      = 1 << 1
)

// Opt is the number of an option of the handshake.
type Opt uint32

const (
	OptExportName      Opt = 1
	OptAbort           Opt = 2
	OptList            Opt = 3
	OptPeekExport      Opt = 4 // withdrawn
	OptStartTLS        Opt = 5
	OptInfo            Opt = 6
	OptGo              Opt = 7
	OptStructuredReply Opt = 8
	OptListMeta        Opt = 9
	OptSetMeta         Opt = 10
	OptExtendedHeaders Opt = 11
)

// Rep is the type of an option reply. Errors have the top bit set.
type Rep uint32

const (
	RepAck         Rep = 1
	RepServer      Rep = 2
	RepInfo        Rep = 3
	RepMetaContext Rep = 4

	RepErrUnsup         Rep = 1<<31 + 1
	RepErrPolicy        Rep = 1<<31 + 2
	RepErrInvalid       Rep = 1<<31 + 3
	RepErrPlatform      Rep = 1<<31 + 4
	RepErrTLSReqd       Rep = 1<<31 + 5
	RepErrUnknown       Rep = 1<<31 + 6
	RepErrShutdown      Rep = 1<<31 + 7
	RepErrBlockSizeReqd Rep = 1<<31 + 8
	RepErrTooBig        Rep = 1<<31 + 9
	RepErrExtHeaderReqd Rep = 1<<31 + 10
)

// IsError reports whether the reply ends the option with an error.
func (r Rep) IsError() bool { return r&(1<<31) != 0 }

// Info is the type of one piece of information in a RepInfo.
type Info uint16

const (
	InfoExport      Info = 0
	InfoName        Info = 1
	InfoDescription Info = 2
	InfoBlockSize   Info = 3
)

// ExportFlags are the transmission flags of an export.
type ExportFlags uint16

const (
	HasFlags               ExportFlags = 1 << 0
	ReadOnly               ExportFlags = 1 << 1
	SendFlush              ExportFlags = 1 << 2
	SendFUA                ExportFlags = 1 << 3
	Rotational             ExportFlags = 1 << 4
	SendTrim               ExportFlags = 1 << 5
	SendZero               ExportFlags = 1 << 6 // NBD_FLAG_SEND_WRITE_ZEROES
	SendDF                 ExportFlags = 1 << 7
	CanMultiConn           ExportFlags = 1 << 8
	SendResize             ExportFlags = 1 << 9 // experimental, never sent
	SendCache              ExportFlags = 1 << 10
	SendFastZero           ExportFlags = 1 << 11
	SendBlockStatusPayload ExportFlags = 1 << 12
)

// Cmd is the number of a transmission request. The verbs are those of the
// backing package; the protocol's own names are given by String.
type Cmd uint16

const (
	CmdRead    Cmd = 0
	CmdWrite   Cmd = 1
	CmdDisc    Cmd = 2
	CmdFlush   Cmd = 3
	CmdTrim    Cmd = 4
	CmdCache   Cmd = 5
	CmdZero    Cmd = 6 // NBD_CMD_WRITE_ZEROES
	CmdExtents Cmd = 7 // NBD_CMD_BLOCK_STATUS
)

// CmdFlags modify one request.
type CmdFlags uint16

const (
	FlagFUA        CmdFlags = 1 << 0
	FlagNoHole     CmdFlags = 1 << 1
	FlagDF         CmdFlags = 1 << 2
	FlagReqOne     CmdFlags = 1 << 3
	FlagFastZero   CmdFlags = 1 << 4
	FlagPayloadLen CmdFlags = 1 << 5
)

// ChunkFlags modify one chunk of a structured or extended reply.
type ChunkFlags uint16

// ChunkDone marks the last chunk of a reply.
const ChunkDone ChunkFlags = 1 << 0

// ChunkType says what a chunk carries. Errors have the top bit set.
type ChunkType uint16

const (
	ChunkNone        ChunkType = 0
	ChunkData        ChunkType = 1 // NBD_REPLY_TYPE_OFFSET_DATA
	ChunkHole        ChunkType = 2 // NBD_REPLY_TYPE_OFFSET_HOLE
	ChunkExtents     ChunkType = 5 // NBD_REPLY_TYPE_BLOCK_STATUS
	ChunkExtentsExt  ChunkType = 6 // NBD_REPLY_TYPE_BLOCK_STATUS_EXT
	ChunkError       ChunkType = 1<<15 + 1
	ChunkErrorOffset ChunkType = 1<<15 + 2
)

// IsError reports whether the chunk is one of the error chunks.
func (t ChunkType) IsError() bool { return t&(1<<15) != 0 }

// Errno is an error number of the wire. Only these eight are ever sent
// (proto.md, "Error values").
type Errno uint32

const (
	OK        Errno = 0
	EPERM     Errno = 1
	EIO       Errno = 5
	ENOMEM    Errno = 12
	EINVAL    Errno = 22
	ENOSPC    Errno = 28
	EOVERFLOW Errno = 75
	ENOTSUP   Errno = 95
	ESHUTDOWN Errno = 108
)

// ContextAllocation is the name of the metadata context that every export
// offers, with its two flag bits. The bits are independent: a hole need not
// read as zeroes, and zeroes need not be a hole.
const (
	ContextAllocation = "base:allocation"
	StateHole         = 1 << 0
	StateZero         = 1 << 1
)

// Sizes of the fixed parts, in bytes.
const (
	OptionHeaderSize   = 16
	OptReplyHeaderSize = 20
	RequestSize        = 28
	ExtRequestSize     = 32
	SimpleReplySize    = 16
	ChunkSize          = 20
	ExtChunkSize       = 32
	// ExportNameZeroes follow the answer to EXPORT_NAME unless the client
	// set FlagNoZeroes.
	ExportNameZeroes = 124
)
