package lab

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// rule is a line of sesearch: what it is about, and its condition.
var rule = regexp.MustCompile(`(?m)^allow (\S+) (\S+):\S+ .*?;(?: \[ (\S+) \]:True)?$`)

// checkPolicy holds all that the loaded policy allows vmdiskd_t, by whatever
// module and attribute, to what the daemon needs.
func checkPolicy(t *testing.T, policy string) {
	t.Helper()
	if policy == "" {
		t.Error("the guest gave no policy back")
		return
	}
	file := filepath.Join(t.TempDir(), "policy")
	if err := os.WriteFile(file, []byte(policy), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ name, source, class, perms, want string }{
		{"may change only what is its own", "vmdiskd_t", "file", "write,append,create,unlink,rename,relabelto",
			"init_tmpfs_t nfs_t?vmdiskd_use_nfs security_t virt_image_type vmdiskd_image_t vmdiskd_runtime_t vmdiskd_t vmdiskd_tmp_t vmdiskd_tmpfs_t vmdiskd_var_lib_t"},
		{"may remove no image", "vmdiskd_t", "file", "unlink,rename", "vmdiskd_runtime_t vmdiskd_tmp_t vmdiskd_tmpfs_t vmdiskd_var_lib_t"},
		{"may execute nothing but itself", "vmdiskd_t", "file", "execute_no_trans", "vmdiskd_exec_t"},
		{"may map no image as a program", "vmdiskd_t", "file", "execute,execmod", "ld_so_t lib_t textrel_shlib_t vmdiskd_exec_t"},
		{"has capabilities for swap only", "vmdiskd_t", "capability,capability2,cap_userns", "", "vmdiskd_t?vmdiskd_use_swap"},
		{"reads how much memory is kept free for swap only", "vmdiskd_t", "file", "read", "...sysctl_vm_t?vmdiskd_use_swap"},
		{"touches no other process", "vmdiskd_t", "process", "ptrace,sigkill,sigstop,signal,transition,dyntransition,setexec,setcurrent,execmem,setrlimit", "vmdiskd_t"},
		{"is connected to by machines", "svirt_t", "unix_stream_socket", "connectto", "...vmdiskd_t"},
	} {
		t.Run(tt.name, func(t *testing.T) { checkRules(t, file, tt.source, tt.class, tt.perms, tt.want) })
	}
}

// checkRules compares the targets of the rules; want "...TARGET" demands only
// that it is among them.
func checkRules(t *testing.T, file, source, class, perms, want string) {
	args := []string{"--allow", "--source=" + source, "--class=" + class}
	if perms != "" {
		args = append(args, "--perms="+perms)
	}
	out, err := testenv.Command(t.Context(), t.TempDir(), "sesearch", append(args, file)...)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, m := range rule.FindAllStringSubmatch(out, -1) {
		target := m[2]
		if m[3] != "" {
			target += "?" + m[3]
		}
		got = append(got, target)
	}
	slices.Sort(got)
	got = slices.Compact(got)
	if one, only := strings.CutPrefix(want, "..."); only {
		if !slices.Contains(got, one) {
			t.Errorf("%s is not allowed:\n%s", one, out)
		}
		return
	}
	if list := strings.Join(got, " "); list != want {
		t.Errorf("%s:%s: got %s, want %s\n%s", class, perms, list, want, out)
	}
}
