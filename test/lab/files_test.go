package lab

import (
	"archive/tar"
	"bytes"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// archived reads an archive: what is in it, by its path.
func archived(t *testing.T, data []byte) map[string]tar.Header {
	t.Helper()
	found := map[string]tar.Header{}
	for r := tar.NewReader(bytes.NewReader(data)); ; {
		h, err := r.Next()
		if err == io.EOF {
			return found
		}
		if err != nil {
			t.Fatal(err)
		}
		found[h.Name] = *h
	}
}

func TestFilesOfTheGuestKeepTheirModes(t *testing.T) {
	dir := testenv.TempDir(t)
	program := filepath.Join(dir, "program")
	if err := os.WriteFile(program, []byte("x"), 0o750); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	a := &archive{w: tar.NewWriter(&out)}
	a.file("/usr/bin/program", program)
	a.text("/etc/a.conf", "text")
	a.text("/usr/bin/script", "#!/bin/sh\n")
	a.steps([]Step{{Name: "one", Script: "true", Seconds: 3}})
	if err := a.close(); err != nil {
		t.Fatal(err)
	}
	found := archived(t, out.Bytes())
	for name, mode := range map[string]int64{
		"usr/bin/program": 0o750, "etc/a.conf": 0o644, "usr/bin/script": 0o755, "lab/steps/000/script": 0o644,
	} {
		if h, ok := found[name]; !ok || h.Mode != mode {
			t.Errorf("%s: %v, mode %o; want %o", name, ok, h.Mode, mode)
		}
	}
	for _, name := range []string{"/usr/bin/program", "/lab/run", "/etc/systemd/system/lab-steps.service"} {
		if !bytes.Contains(out.Bytes(), []byte(name+"\n")) {
			t.Errorf("%s is not among what is labelled", name)
		}
	}
}

func TestMissingFileIsAnErrorThatNamesIt(t *testing.T) {
	for _, from := range []string{"/nowhere/file", "/proc"} {
		a := &archive{w: tar.NewWriter(io.Discard)}
		a.file("/x", from)
		if err := a.close(); err == nil || !strings.Contains(err.Error(), from) {
			t.Errorf("%s is answered %v", from, err)
		}
	}
}

func TestStatusesAreReadFromTheLog(t *testing.T) {
	r := Result{Log: "\nLAB-BEGIN a\n+ x\nno newline\nLAB-STEP=0 a\n\nLAB-BEGIN b (2)\nword\n\nLAB-STEP=124 b (2)\n\nLAB-BEGIN c\nhalf"}
	r.codes = codes(r.Log)
	for step, want := range map[string]int{"a": 0, "b (2)": 124, "c": -1, "d": -1} {
		if got := r.Code(step); got != want {
			t.Errorf("%s has the status %d, want %d", step, got, want)
		}
	}
	if got := r.stepLog("b (2)"); got != "word\n" {
		t.Errorf("the log of a step is %q", got)
	}
}

func TestStepsHaveNamesOfTheirOwn(t *testing.T) {
	for _, steps := range [][]Step{{{Name: "a"}, {Name: "a"}}, {{Name: ""}}, {{Name: "a\nb"}}, {{Name: "a/b"}}} {
		s := Scenario{Steps: steps}
		if _, err := s.steps(); err == nil {
			t.Errorf("%+v are taken", steps)
		}
	}
	s := Scenario{Script: "true", Steps: []Step{{Name: "a", Seconds: 5}}}
	got, err := s.steps()
	if err != nil || len(got) != 2 || got[1].Name != "script" || got[0].Seconds != 5 || got[1].Seconds != StepSeconds {
		t.Errorf("got %+v, %v", got, err)
	}
}

func TestDenialsAreFoundInTheJournal(t *testing.T) {
	const line = `[1.2] lab kernel: audit: avc:  denied  { write } for  pid=1 scontext=a tcontext=b tclass=sock_file`
	r := Result{Outputs: map[string]string{"journal": "x\n" + line + "\ny\n"}}
	if got := r.Denials(); len(got) != 1 || got[0] != line {
		t.Errorf("got %q", got)
	}
}
