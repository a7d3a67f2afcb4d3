package config_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/config"
)

// TestProblemsHaveTheirLineAndColumn: of the key, or of its table where the key
// is missing.
func TestProblemsHaveTheirLineAndColumn(t *testing.T) {
	const text = `engine = "aio"

[[listener]]
uri = "nbd://localhost:99999"
[[listener]]
  uri = "localhost:1"

[rate-group."a.b"]
ops = -1

[[export]]
name = "a"
image = "a.img"
cache = "fast"
rate = { burst = "1s", ops = -2 }
protect = [ { offset = 0, length = 1 },
  { offset = 0, length = 0 } ]
[[export.listener]]
uri = "nbd+unix:///?socket=s"
[[export]]
name = "a"
image = "/b"
[[export.grant]]
access = "rw"
[[export.grant]]
access = "all"
[export.window]
partition = 1000
[[export]]
name = "c"
`
	_, err := config.LoadText("f", []byte(text))
	es, ok := errors.AsType[config.Errors](err)
	if !ok {
		t.Fatalf("got %T: %v", err, err)
	}
	got := es.Error()
	for _, want := range []string{
		`f:1:1: engine: "aio" is not one of`,
		`f:4:1: listener 1: uri: "nbd://localhost:99999"`,
		`f:6:3: listener 2: uri: "localhost:1"`,
		`f:9:1: rate-group "a.b": ops: -1 is negative`,
		`f:13:1: export "a": image: "a.img" is not an absolute path`,
		`f:14:1: export "a": cache: "fast"`,
		`f:15:24: export "a", rate: ops`,
		`f:17:17: export "a", protect 2: length`,
		`f:19:1: export "a", listener 1: uri`,
		`f:20:3: export "a": export 1 has the same name`,
		`f:26:1: export "a", grant 2: access`,
		`f:28:1: export "a", window: partition`,
		`f:29:3: export "c": image: it needs a path`,
	} {
		if !strings.Contains(got, want) {
			t.Errorf("there is no %s", want)
		}
	}
	for i := 1; i < len(es); i++ {
		if es[i].Line < es[i-1].Line {
			t.Errorf("line %d stands behind line %d", es[i].Line, es[i-1].Line)
		}
	}
	if t.Failed() {
		t.Log("\n" + got)
	}
}

func TestModeIsText(t *testing.T) {
	for in, want := range map[string]string{
		"mode = 0660": `a mode is text, as "0660"`,
		"mode = 660":  `want text in quotes, as "0660"`,
	} {
		_, err := config.Parse("f", []byte("[control]\n"+in+"\n"))
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %s", in, err, want)
		}
	}
}
