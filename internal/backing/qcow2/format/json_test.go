package format

import (
	"strings"
	"testing"
)

func TestJSONFile(t *testing.T) {
	for _, tt := range []struct{ in, format, filename string }{
		{`json:{"driver": "raw", "file": {"driver": "file", "filename": "/a/b"}}`, "raw", "/a/b"},
		{`json:{"driver":"qcow2","file":{"driver":"file","filename":"c"}}`, "qcow2", "c"},
		{`json:{"file.filename":"c","file.driver":"file","driver":"qcow2"}`, "qcow2", "c"},
		{`json:{"file":{"driver":"file"},"file.filename":"c","driver":"raw"}`, "raw", "c"},
		{` json: `, "", ""},
		{"json:\t{\"driver\":\"raw\",\"file.driver\":\"file\",\"file.filename\":\"\\u00e4 \\\"\"}\n", "raw", `ä "`},
	} {
		format, filename, err := ParseJSONFile(tt.in)
		if format != tt.format || filename != tt.filename || (err == nil) != (tt.format != "") {
			t.Errorf("%s: got %q, %q, %v", tt.in, format, filename, err)
		}
	}
}

func TestJSONFileRefusals(t *testing.T) {
	const inner = `"file":{"driver":"file","filename":"a"}`
	for _, tt := range []struct{ in, want string }{
		{`/a/b`, "does not begin"},
		{`json:`, "not an object"},
		{`json:[]`, "not an object"},
		{`json:"a"`, "not an object"},
		{`json:{`, "json:"},
		{`json:{}`, `driver "" is not supported`},
		{`json:{` + inner + `}`, `driver "" is not supported`},
		{`json:{"driver":"vmdk",` + inner + `}`, `driver "vmdk"`},
		{`json:{"driver":"raw"}`, `file driver ""`},
		{`json:{"driver":"raw","file":{"filename":"a"}}`, `file driver ""`},
		{`json:{"driver":"raw","file":{"driver":"nbd","filename":"a"}}`, `file driver "nbd"`},
		{`json:{"driver":"raw","file":{"driver":"host_device","filename":"a"}}`, `file driver "host_device"`},
		{`json:{"driver":"raw","file":{"driver":"file"}}`, "no file name"},
		{`json:{"driver":"raw","file":{"driver":"file","filename":""}}`, "no file name"},
		{`json:{"driver":"raw","file":{"driver":"file","filename":1}}`, "is not a string"},
		{`json:{"driver":"raw","file":{"driver":"file","filename":null}}`, "is not a string"},
		{`json:{"driver":"raw","file":{"driver":"file","filename":{}}}`, "is not a string"},
		{`json:{"driver":"raw","file":"a"}`, `"file" is not an object`},
		{`json:{"driver":"raw","file":{"file":{}}}`, `"file.file" is not supported`},
		{`json:{"driver":"raw","file":{},` + inner + `}`, `"file" is said twice`},
		{`json:{"driver":"raw","driver":"qcow2",` + inner + `}`, `"driver" is said twice`},
		{`json:{"driver":"raw","file.filename":"b",` + inner + `}`, `"file.filename" is said twice`},
		{`json:{"Driver":"raw",` + inner + `}`, `"Driver" is not supported`},
		{`json:{"driver":"raw","size":1,` + inner + `}`, `"size" is not supported`},
		{`json:{"driver":"raw","backing":{},` + inner + `}`, `"backing" is not supported`},
		{`json:{"driver":"raw","file":{"driver":"file","filename":"a","locking":"off"}}`, `"file.locking" is not supported`},
		{`json:{"driver":"raw",` + inner + `} x`, "behind its end"},
		{`json:{"driver":"raw",` + inner + `}{}`, "behind its end"},
		{`json:{"driver":"raw",` + inner + `,}`, "json:"},
		{`json:{"driver":"raw",` + inner, "json:"},
		{`json:{'driver':'raw'}`, "json:"},
		{`json:{"driver":"raw","file":{"driver":"file","filename":"a\u0000b"}}`, "control characters"},
		{`json:{"driver":"raw","file":{"driver":"file","filename":"a\nb"}}`, "control characters"},
		{`json:{"driver":"raw","file":{"driver":"file","filename":"\ud800"}}`, "control characters"},
		{"json:{\"driver\":\"raw\",\"file\":{\"driver\":\"file\",\"filename\":\"\xff\"}}", "not UTF-8"},
		{`json:` + strings.Repeat(" ", 4096), "too long"},
		{`json:` + strings.Repeat("[", 4000), "not an object"},
		{`json:{"driver":` + strings.Repeat("[", 4000), "is not a string"},
	} {
		format, filename, err := ParseJSONFile(tt.in)
		switch {
		case err == nil:
			t.Errorf("%.99s: got %q, %q", tt.in, format, filename)
		case !strings.Contains(err.Error(), tt.want):
			t.Errorf("%.99s: got %q, want it to have %q", tt.in, err, tt.want)
		}
	}
}
