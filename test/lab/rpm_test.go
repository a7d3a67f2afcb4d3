package lab

import (
	"errors"
	"os"
	"testing"

	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// rpmScenario runs in the root file system of a Debian, as root of a mount
// namespace, with two versions of the package. That it has been installed by
// dpkg, which knows none of what it needs, is what --nodeps is for.
const rpmScenario = `
old=$1
new=$2
mount --rbind /dev dev
mount -t proc proc proc
run() { rpm --root "$PWD" "$@"; }
version() { [ "$(chroot . vmdiskd --version)" = "vmdiskd $1" ] && [ "$(run -q vmdiskd)" = "vmdiskd-$1-1.x86_64" ]; }
find . -xdev -name '*vmdiskd*' | sort >tmp/before

# Installed: its files are as it says, its user, group and folders are made.
run -i --nodeps "$old"
version 0.1.0
run -V --nodeps vmdiskd
chroot . id vmdiskd | grep -q '(kvm)'
[ "$(chroot . stat -c '%U %G %a' /run/vmdiskd)" = 'vmdiskd kvm 2711' ]
[ "$(chroot . stat -c '%U %a' /var/lib/vmdiskd/images)" = 'vmdiskd 750' ]
chroot . vmdiskd --config /etc/vmdiskd/vmdiskd.toml --check
chroot . systemd-analyze verify --man=no /usr/lib/systemd/system/vmdiskd.service
chroot . systemctl enable vmdiskd.service
fails run -i --nodeps "$old"

# It is noticed if one of its files is another.
cp -p usr/bin/vmdiskctl tmp/kept
echo >>usr/bin/vmdiskctl
fails run -V --nodeps vmdiskd >tmp/said
grep -q '^S.5.*/usr/bin/vmdiskctl$' tmp/said
cp -p tmp/kept usr/bin/vmdiskctl
run -V --nodeps vmdiskd

# Upgraded: what the operator has written stays, and what is enabled.
echo '# mine' >>etc/vmdiskd/vmdiskd.toml
echo x >var/lib/vmdiskd/images/a.img
run -U --nodeps "$new"
version 0.2.0
grep -q '# mine' etc/vmdiskd/vmdiskd.toml
chroot . systemctl is-enabled vmdiskd.service
fails run -U --nodeps "$old"

# Erased: the image stays, and its owner; without it nothing does.
run -e vmdiskd
fails run -q vmdiskd
fails chroot . systemctl is-enabled vmdiskd.service
chroot . getent passwd vmdiskd
[ "$(cat var/lib/vmdiskd/images/a.img)" = x ]
[ -e etc/vmdiskd/vmdiskd.toml.rpmsave ]
rm -r etc/vmdiskd var/lib/vmdiskd/images/a.img
run -i --nodeps "$new"
run -e vmdiskd
find . -xdev -name '*vmdiskd*' | sort >tmp/after
diff tmp/before tmp/after
`

// TestRPMFromInstallationToErase does with the RPM package what an operator
// does with it. Its scripts run in a Debian, where no service manager is.
func TestRPMFromInstallationToErase(t *testing.T) {
	t.Parallel()
	Require(t)
	testenv.Require(t, "rpm", "unshare")
	if os.Getuid() != 0 {
		lacks(t, errors.New("needs root: files of packages belong to root"))
	}
	old, next := builtPackage(t, "0.1.0", "rpm"), builtPackage(t, "0.2.0", "rpm")
	archive, err := unpacked(imagePackages)
	if err != nil {
		lacks(t, err)
	}
	tree, err := unpack(t.Context(), archive, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	out, err := testenv.Command(t.Context(), tree, "unshare", "--mount", "sh", "-exc", functions+rpmScenario, "sh", old, next)
	if err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}
