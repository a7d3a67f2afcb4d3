// Package packages_test builds the packages and looks at what is in them.
package packages_test

import (
	"debug/elf"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/test/testenv"
)

const version = "9.8.7"

// run gives the standard output of a command that has to work.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s%s", name, args, err, out, stderr.String())
	}
	return string(out)
}

// build makes both packages of the version.
func build(t *testing.T) (deb, rpm string) {
	t.Helper()
	dir := t.TempDir()
	cmd := exec.Command(filepath.Join(testenv.Root(), "scripts", "packages.sh"), dir)
	cmd.Env = append(os.Environ(), "VERSION="+version)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("packages.sh: %v\n%s", err, out)
	}
	one := func(pattern string) string {
		list, err := filepath.Glob(filepath.Join(dir, pattern))
		if err != nil || len(list) != 1 {
			t.Fatalf("%s: %q, %v", pattern, list, err)
		}
		return list[0]
	}
	return one("vmdiskd_" + version + "_*.deb"), one("vmdiskd-" + version + "-1.*.rpm")
}

// content is what a package has at a path: its mode and owner.
type content map[string]string

func debContent(t *testing.T, deb string) content {
	c := content{}
	for line := range strings.Lines(run(t, "dpkg-deb", "-c", deb)) {
		f := strings.Fields(line)
		if path := strings.TrimPrefix(f[5], "."); !strings.HasPrefix(f[0], "d") || strings.HasPrefix(path, "/etc/vmdiskd") {
			c[strings.TrimSuffix(path, "/")] = f[0] + " " + f[1]
		}
	}
	return c
}

func rpmContent(t *testing.T, rpm string) content {
	c := content{}
	format := `[%{FILENAMES} %{FILEMODES:perms} %{FILEUSERNAME}/%{FILEGROUPNAME}\n]`
	for line := range strings.Lines(run(t, "rpm", "-qp", "--qf", format, rpm)) {
		path, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
		c[path] = rest
	}
	return c
}

// wanted are the paths of both packages but those that are named by files of
// the project.
func wanted(t *testing.T) content {
	t.Helper()
	c := content{}
	file := func(path string) { c[path] = "-rw-r--r-- root/root" }
	each := func(pattern string, to func(base string) string) {
		list, err := filepath.Glob(filepath.Join(testenv.Root(), pattern))
		if err != nil || len(list) == 0 {
			t.Fatalf("%s: %q, %v", pattern, list, err)
		}
		for _, path := range list {
			file(to(filepath.Base(path)))
		}
	}
	into := func(folder string) func(string) string { return func(base string) string { return folder + base } }
	c["/usr/sbin/vmdiskd"], c["/usr/bin/vmdiskctl"] = "-rwxr-xr-x root/root", "-rwxr-xr-x root/root"
	for _, dir := range []string{"/etc/vmdiskd", "/etc/vmdiskd/swap", "/etc/vmdiskd/vm"} {
		c[dir] = "drwxr-xr-x root/root"
	}
	for _, kind := range []string{"service", "socket", "slice"} {
		each("systemd/*."+kind, into("/usr/lib/systemd/system/"))
	}
	each("docs/man/*.[1-9]", func(base string) string { return "/usr/share/man/man" + base[len(base)-1:] + "/" + base + ".gz" })
	each("docs/*.md", into("/usr/share/doc/vmdiskd/"))
	each("selinux/*", into("/usr/share/vmdiskd/selinux/"))
	each("packaging/examples/*", into("/usr/share/doc/vmdiskd/examples/"))
	for _, path := range []string{
		"/usr/lib/sysusers.d/vmdiskd.conf", "/usr/lib/tmpfiles.d/vmdiskd.conf", "/etc/vmdiskd/vmdiskd.toml",
		"/usr/share/bash-completion/completions/vmdiskctl", "/usr/share/fish/vendor_completions.d/vmdiskctl.fish",
		"/usr/share/doc/vmdiskd/README.md", "/usr/share/doc/vmdiskd/SECURITY.md", "/usr/share/doc/vmdiskd/openapi.yaml", "/usr/share/doc/vmdiskd/copyright",
		"/usr/share/doc/vmdiskd/examples/grafana.json",
	} {
		file(path)
	}
	return c
}

func compare(t *testing.T, got, want content) {
	t.Helper()
	for path, how := range want {
		if got[path] != how {
			t.Errorf("%s: got %q, want %q", path, got[path], how)
		}
	}
	for path := range got {
		if want[path] == "" {
			t.Errorf("%s is in the package, and nobody asked for it", path)
		}
	}
}

func TestPackages(t *testing.T) {
	deb, rpm := build(t)
	t.Run("deb", func(t *testing.T) {
		want := wanted(t)
		for _, path := range []string{
			"/usr/share/zsh/vendor-completions/_vmdiskctl", "/etc/apparmor.d/vmdiskd", "/usr/share/doc/vmdiskd/examples/apparmor-libvirt-qemu",
		} {
			want[path] = "-rw-r--r-- root/root"
		}
		compare(t, debContent(t, deb), want)
		if got := run(t, "dpkg-deb", "-f", deb, "Package", "Version"); got != "Package: vmdiskd\nVersion: "+version+"\n" {
			t.Errorf("control file has %q", got)
		}
		control := t.TempDir()
		run(t, "dpkg-deb", "-e", deb, control)
		if got := run(t, "cat", control+"/conffiles"); got != "/etc/apparmor.d/vmdiskd\n/etc/vmdiskd/vmdiskd.toml\n" {
			t.Errorf("configuration files are %q", got)
		}
		for _, script := range []string{"postinst", "prerm", "postrm"} {
			run(t, "sh", "-n", filepath.Join(control, script))
		}
	})
	t.Run("rpm", func(t *testing.T) {
		want := wanted(t)
		want["/usr/share/zsh/site-functions/_vmdiskctl"] = "-rw-r--r-- root/root"
		for _, dir := range []string{"/usr/share/vmdiskd", "/usr/share/vmdiskd/selinux", "/usr/share/doc/vmdiskd", "/usr/share/doc/vmdiskd/examples"} {
			want[dir] = "drwxr-xr-x root/root"
		}
		compare(t, rpmContent(t, rpm), want)
		if got := run(t, "rpm", "-qp", "--qf", "%{NAME} %{VERSION} %{RELEASE} %{LICENSE}", rpm); got != "vmdiskd "+version+" 1 MIT" {
			t.Errorf("header has %q", got)
		}
		if got := run(t, "rpm", "-qp", "--configfiles", rpm); got != "/etc/vmdiskd/vmdiskd.toml\n" {
			t.Errorf("configuration files are %q", got)
		}
		scripts := run(t, "rpm", "-qp", "--scripts", rpm)
		for _, want := range []string{"postinstall scriptlet", "preuninstall scriptlet", "postuninstall scriptlet"} {
			if !strings.Contains(scripts, want) {
				t.Errorf("no %s in\n%s", want, scripts)
			}
		}
	})
	t.Run("programs", func(t *testing.T) { checkPrograms(t, deb) })
}

// checkPrograms unpacks the programs: they are static, have the version, know
// no path of the machine that built them, and accept the configuration.
func checkPrograms(t *testing.T, deb string) {
	dir := t.TempDir()
	run(t, "dpkg-deb", "-x", deb, dir)
	daemon, ctl := filepath.Join(dir, "usr/sbin/vmdiskd"), filepath.Join(dir, "usr/bin/vmdiskctl")
	for _, path := range []string{daemon, ctl} {
		f, err := elf.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		if slices.ContainsFunc(f.Progs, func(p *elf.Prog) bool { return p.Type == elf.PT_INTERP }) {
			t.Errorf("%s is not static", path)
		}
		f.Close()
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(b), testenv.Root()+"/") {
			t.Errorf("%s has the path of its sources", path)
		}
	}
	if got := run(t, daemon, "--version"); got != "vmdiskd "+version+"\n" {
		t.Errorf("vmdiskd says %q", got)
	}
	if got := run(t, ctl, "version"); !regexp.MustCompile(`^vmdiskctl ` + regexp.QuoteMeta(version) + ` `).MatchString(got) {
		t.Errorf("vmdiskctl says %q", got)
	}
	run(t, daemon, "--config", filepath.Join(dir, "etc/vmdiskd/vmdiskd.toml"), "--check")
	run(t, "bash", "-n", filepath.Join(dir, "usr/share/bash-completion/completions/vmdiskctl"))
}
