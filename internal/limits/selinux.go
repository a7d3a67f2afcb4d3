package limits

const (
	// Categories is how many categories a level may have: c0 to c1023, as
	// the policies of Fedora, Debian and Gentoo define them.
	Categories = 1024

	// Sensitivities is how many sensitivities a level may have: the policies
	// of distributions have 1 or 16.
	Sensitivities = 16

	// GrantTypes bounds the SELinux types that one grant names: QEMU runs as
	// one of two or three.
	GrantTypes = 16
)
