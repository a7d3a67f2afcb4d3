package qcowtest

import (
	"bytes"
	"os"
	"os/exec"
	"slices"
	"testing"
)

func TestPairwiseIsTheSameForTheSameSeed(t *testing.T) {
	if a, b := Pairwise(7), Pairwise(7); !slices.Equal(a, b) {
		t.Errorf("seed 7 gave %d options, then %d others", len(a), len(b))
	}
}

func TestPairwiseHasTheValuesOfEveryAxis(t *testing.T) {
	all := Pairwise(Seed)
	if len(all) < 40 || len(all) > 90 {
		t.Errorf("%d images, want 40 to 90", len(all))
	}
	for a := range axes {
		for v, set := range axes[a] {
			if !slices.ContainsFunc(all, func(o Options) bool {
				p := o
				set(&p)
				return p == o
			}) {
				t.Errorf("value %d of axis %d is in no image", v, a)
			}
		}
	}
}

func TestCasesAreSoundAndReadable(t *testing.T) {
	images, written := Cases(t), 0
	for _, img := range images {
		if out, err := exec.Command("qemu-img", "check", "-f", img.Format, img.Path).CombinedOutput(); err != nil {
			t.Errorf("%s: qemu-img check: %v\n%s", img.Name, err, out)
		}
		st, err := os.Stat(img.Raw())
		if err != nil {
			t.Fatal(err)
		}
		if st.Size() != img.Options.Size() {
			t.Errorf("%s: raw file has %d bytes, want %d", img.Name, st.Size(), img.Options.Size())
		}
		p, err := os.ReadFile(img.Raw())
		if err != nil {
			t.Fatal(err)
		}
		if bytes.IndexFunc(p, func(r rune) bool { return r != 0 }) >= 0 {
			written++
		}
	}
	if written < len(images)*2/3 {
		t.Errorf("only %d of %d images have data", written, len(images))
	}
}
