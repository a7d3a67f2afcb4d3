package limits

import "time"

// The control socket. Its peers are operators and their tools; one that is
// compromised must not take the service down with it.
const (
	// ControlHeader bounds the request line and the headers of a request: a
	// path with an export's name of ControlName bytes in percent-encoding, which
	// makes three of one, and curl's own headers, which are below 200 bytes.
	ControlHeader = 16 << 10

	// ControlBody bounds the JSON of a request: the largest is an export.
	ControlBody = ExportJSON

	// ControlName bounds the name of an export in a path: that of any name.
	ControlName = MaxString

	// ControlFiles bounds the descriptors that come with one request: an image
	// with a chain of backing files, and with its data file.
	ControlFiles = 16

	// ControlConnsPerUID and ControlConns bound the connections at a time of
	// one user and of all that may only read. Each has one request, or a
	// stream of events.
	ControlConnsPerUID = 32
	ControlConns       = 256

	// ControlHeaderTime and ControlBodyTime are how long a peer may take to
	// send the headers, and then the body.
	ControlHeaderTime = 5 * time.Second
	ControlBodyTime   = 5 * time.Second

	// ControlReplyTime is how long a peer may take to read a reply, and a
	// listener to make room for one more event. A stopped terminal holds a
	// stream up for a while.
	ControlReplyTime = 60 * time.Second

	// ControlRemove is how long a removal waits for what the clients of an
	// export have in flight if the request does not say, and ControlRemoveMost
	// at most.
	ControlRemove     = Drain
	ControlRemoveMost = 10 * time.Minute

	// ControlErrorText bounds the text of an error that is sent.
	ControlErrorText = 2 << 10

	// StatusNotes bounds the notes of the status: one for each export that failed
	// would be more than ControlObject.
	StatusNotes = 100

	// ControlAuditPath bounds the path of a request in the log.
	ControlAuditPath = 1 << 10

	// ControlAuditChange bounds what a request changes, as JSON in the log: a
	// list of some grants is there as a whole. ControlAuditText bounds the
	// description of an export in it, which is anybody's prose.
	ControlAuditChange = 2 << 10
	ControlAuditText   = 64

	// MetricsConns bounds the connections at a time to the listener that has
	// only the metrics: a few collectors.
	MetricsConns = 16
)

// What a server may cost a client of the control API.
const (
	// ControlReply bounds a reply that is passed on as it comes: the metrics
	// of ten thousand exports.
	ControlReply = 256 << 20

	// ControlList bounds a list: the counters of ten thousand exports, or the
	// exports themselves with three kilobytes each.
	ControlList = 32 << 20

	// ControlObject bounds one object, of a list or alone, and ControlObjects
	// the objects of one reply, those within others included. A short "{}"
	// becomes some hundred bytes in memory.
	ControlObject  = 2 << 20
	ControlObjects = 128 << 10

	// ControlRoom is how long a call waits for a place if there is no room for
	// one more connection: hundreds of commands of a second each pass in that
	// time. It asks again after ControlRoomFirst at most, later after
	// ControlRoomMost: a refusal costs the server as much as a short request.
	ControlRoom      = 30 * time.Second
	ControlRoomFirst = 20 * time.Millisecond
	ControlRoomMost  = time.Second

	// ControlReplyHeader bounds the headers of a reply.
	ControlReplyHeader = 16 << 10

	// ControlEventLine bounds one event: an export's name in which each byte
	// is escaped, and a text.
	ControlEventLine = 64 << 10
)
