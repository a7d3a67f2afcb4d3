package wire

import "strconv"

func name[K comparable](m map[K]string, k K, prefix string, n uint64) string {
	if s, ok := m[k]; ok {
		return s
	}
	return prefix + strconv.FormatUint(n, 10)
}

var optNames = map[Opt]string{
	OptExportName:      "NBD_OPT_EXPORT_NAME",
	OptAbort:           "NBD_OPT_ABORT",
	OptList:            "NBD_OPT_LIST",
	OptPeekExport:      "NBD_OPT_PEEK_EXPORT",
	OptStartTLS:        "NBD_OPT_STARTTLS",
	OptInfo:            "NBD_OPT_INFO",
	OptGo:              "NBD_OPT_GO",
	OptStructuredReply: "NBD_OPT_STRUCTURED_REPLY",
	OptListMeta:        "NBD_OPT_LIST_META_CONTEXT",
	OptSetMeta:         "NBD_OPT_SET_META_CONTEXT",
	OptExtendedHeaders: "NBD_OPT_EXTENDED_HEADERS",
}

// String is the protocol's name of the option.
func (o Opt) String() string { return name(optNames, o, "NBD_OPT_", uint64(o)) }

var repNames = map[Rep]string{
	RepAck:              "NBD_REP_ACK",
	RepServer:           "NBD_REP_SERVER",
	RepInfo:             "NBD_REP_INFO",
	RepMetaContext:      "NBD_REP_META_CONTEXT",
	RepErrUnsup:         "NBD_REP_ERR_UNSUP",
	RepErrPolicy:        "NBD_REP_ERR_POLICY",
	RepErrInvalid:       "NBD_REP_ERR_INVALID",
	RepErrPlatform:      "NBD_REP_ERR_PLATFORM",
	RepErrTLSReqd:       "NBD_REP_ERR_TLS_REQD",
	RepErrUnknown:       "NBD_REP_ERR_UNKNOWN",
	RepErrShutdown:      "NBD_REP_ERR_SHUTDOWN",
	RepErrBlockSizeReqd: "NBD_REP_ERR_BLOCK_SIZE_REQD",
	RepErrTooBig:        "NBD_REP_ERR_TOO_BIG",
	RepErrExtHeaderReqd: "NBD_REP_ERR_EXT_HEADER_REQD",
}

// String is the protocol's name of the reply.
func (r Rep) String() string { return name(repNames, r, "NBD_REP_", uint64(r)) }

var cmdNames = map[Cmd]string{
	CmdRead:    "NBD_CMD_READ",
	CmdWrite:   "NBD_CMD_WRITE",
	CmdDisc:    "NBD_CMD_DISC",
	CmdFlush:   "NBD_CMD_FLUSH",
	CmdTrim:    "NBD_CMD_TRIM",
	CmdCache:   "NBD_CMD_CACHE",
	CmdZero:    "NBD_CMD_WRITE_ZEROES",
	CmdExtents: "NBD_CMD_BLOCK_STATUS",
}

// String is the protocol's name of the command.
func (c Cmd) String() string { return name(cmdNames, c, "NBD_CMD_", uint64(c)) }

var chunkNames = map[ChunkType]string{
	ChunkNone:        "NBD_REPLY_TYPE_NONE",
	ChunkData:        "NBD_REPLY_TYPE_OFFSET_DATA",
	ChunkHole:        "NBD_REPLY_TYPE_OFFSET_HOLE",
	ChunkExtents:     "NBD_REPLY_TYPE_BLOCK_STATUS",
	ChunkExtentsExt:  "NBD_REPLY_TYPE_BLOCK_STATUS_EXT",
	ChunkError:       "NBD_REPLY_TYPE_ERROR",
	ChunkErrorOffset: "NBD_REPLY_TYPE_ERROR_OFFSET",
}

// String is the protocol's name of the chunk type.
func (t ChunkType) String() string { return name(chunkNames, t, "NBD_REPLY_TYPE_", uint64(t)) }

var errnoNames = map[Errno]string{
	OK:        "OK",
	EPERM:     "EPERM",
	EIO:       "EIO",
	ENOMEM:    "ENOMEM",
	EINVAL:    "EINVAL",
	ENOSPC:    "ENOSPC",
	EOVERFLOW: "EOVERFLOW",
	ENOTSUP:   "ENOTSUP",
	ESHUTDOWN: "ESHUTDOWN",
}

// String is the name of the error number.
func (e Errno) String() string { return name(errnoNames, e, "errno ", uint64(e)) }

// Error makes an Errno usable as an error by the client.
func (e Errno) Error() string { return e.String() }
