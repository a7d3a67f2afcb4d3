package confine

// States of a Control.
const (
	Enforced = "enforced"
	Degraded = "degraded" // in force, but for what Reason says
	Off      = "off"
)

// Control is one of the measures that confine the process, as an operator sees
// it.
type Control struct {
	Name   string `json:"name"`
	State  string `json:"state"`            // Enforced, Degraded or Off
	Reason string `json:"reason,omitempty"` // why it is not enforced
}

// Names of controls.
const (
	ControlStages       = "stages"       // the worker is another program image than what opened files
	ControlUser         = "user"         // it does not run as root
	ControlCapabilities = "capabilities" // it has none and cannot get any
	ControlNoNewPrivs   = "no-new-privileges"
	ControlLandlock     = "landlock" // paths, TCP connections, signals
	ControlSeccomp      = "seccomp"
	ControlRing         = "io_uring" // rings take only the operations in use
	ControlDumpable     = "no-core-dumps"
	ControlSELinux      = "selinux" // the policy of the machine; no mode demands it
)

// Mode is what becomes of a process that cannot be confined as it should.
type Mode string

// Modes.
const (
	Strict Mode = "strict" // it does not start
	Auto   Mode = "auto"   // it says so and goes on
	None   Mode = "off"    // nothing is tried
)

// Staged tells whether the process is to be confined.
func (m Mode) Staged() bool { return m == Strict || m == Auto }
