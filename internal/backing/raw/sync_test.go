package raw

import (
	"errors"
	"os"
	"testing"
)

// TestFolderOfANameIsTheKernels also where it leads out of a link's target.
func TestFolderOfANameIsTheKernels(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	if err := errors.Join(os.MkdirAll("far/sub", 0o700), os.Symlink("far/sub", "link")); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		"x": dir, "./x": dir, "far/x": dir + "/far", "link/x": dir + "/far/sub", "link/../x": dir + "/far", dir + "/link/../x": dir + "/far", "/x": "/",
	} {
		got, err := os.Stat(folderOf(path))
		if err != nil {
			t.Fatal(err)
		}
		if there, err := os.Stat(want); err != nil || !os.SameFile(got, there) {
			t.Errorf("%s is looked for in %s, want %s (%v)", path, folderOf(path), want, err)
		}
	}
}
