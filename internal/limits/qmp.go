package limits

import "time"

// The talk of vmdiskctl with QEMU's monitor, with guest agents and with
// libvirt. A QEMU whose guest has taken it over is a hostile peer, and a guest
// agent always may be one.
const (
	// QMPLine bounds one line from a monitor. query-qmp-schema of QEMU 7.2 is
	// 200 KiB; the block nodes of a machine with hundreds of disks fit.
	QMPLine = 16 << 20

	// QMPGreeting bounds the greeting of a monitor, which has less than 1 KiB, and
	// each event before it.
	QMPGreeting = 1 << 20

	// QMPCommand bounds one command that is sent: names and paths of 4 KiB
	// fit many times.
	QMPCommand = 1 << 20

	// QMPEvent bounds an event that is kept. QEMU's are below 1 KiB; longer
	// ones are counted as lost.
	QMPEvent = 64 << 10

	// QMPEventQueue bounds the events that wait for one subscriber. Older
	// ones are lost and counted.
	QMPEventQueue = 256

	// QMPSubscribers bounds the subscribers of one monitor.
	QMPSubscribers = 64

	// QMPPending bounds the commands of one monitor that have no reply yet,
	// those that nobody waits for any more included.
	QMPPending = 64

	// QMPForeign bounds the replies to commands of the client before, which QEMU
	// gives to the one that connects next.
	QMPForeign = QMPPending

	// QMPFiles bounds the descriptors that go with one command: as many as
	// QEMU's character devices take.
	QMPFiles = 16

	// QMPErrorText bounds the text of an error reply that is kept.
	QMPErrorText = 1 << 10

	// QMPName bounds a name that a monitor reports: of a device, a bus, a
	// node, a command.
	QMPName = 256

	// QMPItems bounds the devices, nodes, buses, commands or file systems
	// that one reply is believed to list.
	QMPItems = 16 << 10

	// QMPLookups bounds the questions that one search for a free place asks.
	QMPLookups = 4096

	// NodeName bounds the name of a block node (QEMU's
	// sizeof(BlockDriverState.node_name) less its end).
	NodeName = 31

	// DeviceID bounds the id of a device. QEMU has no bound of its own.
	DeviceID = 128

	// AgentLine bounds one line of a guest agent: the file systems of a
	// large guest are some 100 KiB.
	AgentLine = 4 << 20

	// AgentNoise bounds what is read past while looking for the answer to
	// guest-sync-delimited: old replies to clients that have gone.
	AgentNoise = 8 << 20

	// AgentStale bounds the delimited replies among it: one for each client
	// that asked guest-sync-delimited and left. Reading more is a guest's way
	// to keep its host busy.
	AgentStale = 4096

	// LibvirtMessage bounds one message from libvirt: its own
	// VIR_NET_MESSAGE_MAX with the header.
	LibvirtMessage = 32<<20 + 64

	// DomainXML bounds the description of a domain: libvirt's bound on
	// strings (REMOTE_STRING_MAX).
	DomainXML = 4 << 20

	// LibvirtDomains bounds the domains that a host is believed to have:
	// libvirt's REMOTE_DOMAIN_LIST_MAX.
	LibvirtDomains = 16 << 10
)

// Time in which QEMU, agents and libvirt must answer, where the caller's
// context sets no earlier deadline.
const (
	// QMPDial bounds the connection to a monitor up to its greeting. A
	// monitor that serves somebody else accepts and stays silent.
	QMPDial = 5 * time.Second

	// QMPQuery bounds a command that only asks, from sending to reply. QEMU
	// answers from memory, as soon as its main loop comes round: as with the
	// negotiation, for which QMPDial is enough.
	QMPQuery = 5 * time.Second

	// QMPChange bounds any other command, and one that asks but waits behind
	// such a one. blockdev-add waits for the server as long as its
	// open-timeout, which is shorter; what changes nodes and devices waits
	// for their requests in flight.
	QMPChange = 30 * time.Second

	// QMPRest bounds the rest of a line that has begun.
	QMPRest = 30 * time.Second

	// QMPUnplug is how long a guest may take to release a device.
	QMPUnplug = 30 * time.Second

	// AgentSync bounds the wait for a guest agent to show that it is there.
	AgentSync = 5 * time.Second

	// AgentReply bounds a command of a guest agent. Freezing writes out
	// everything that is dirty in the guest.
	AgentReply = 60 * time.Second

	// LibvirtDial bounds the connection to libvirt with authentication.
	LibvirtDial = 10 * time.Second

	// LibvirtCall bounds a call. Detaching a disk waits for the guest, 5 s
	// by libvirt's own limit; a busy domain's job lock costs 30 s.
	LibvirtCall = 60 * time.Second

	// LibvirtAgent is how long libvirt waits for a guest agent: it gives up
	// and answers before the call does, which would end the session.
	LibvirtAgent = LibvirtCall - 10*time.Second
)
