package server

import (
	"bytes"
	"encoding/json"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// TestDecodeIsStrict has one of each kind that config.DecodeJSON refuses, whose
// own tests have them all.
func TestDecodeIsStrict(t *testing.T) {
	for _, tt := range []struct{ name, in, want string }{
		{"null", `null`, "not an object"},
		{"null value", `{"name":null}`, "null"},
		{"another behind it", `{"name":"a"}{}`, ""},
		{"unknown", `{"name":"a","nmae":"a"}`, "unknown field"},
		{"upper case", `{"Name":"a"}`, "unknown field"},
		{"twice by an escape", `{"name":"a","\u006eame":"b"}`, "twice"},
		{"half a pair", `{"name":"\ud800"}`, "half a pair"},
		{"not UTF-8", "{\"name\":\"\xc0\x80\"}", "UTF-8"},
		{"wrong kind", `{"name":5}`, "cannot unmarshal"},
		{"list of the wrong kind", `{"name":"a","grants":[5]}`, "cannot unmarshal"},
		{"deep", `{"grants":` + strings.Repeat("[", limits.ExportDepth) + strings.Repeat("]", limits.ExportDepth) + `}`, "levels"},
		{"long", `{"name":"` + strings.Repeat("a", limits.ControlBody) + `"}`, "more than"},

		{"no name", `{"image":"/x"}`, `"name" is missing`},
		{"nothing in it", `{}`, `"name" is missing`},
		{"no quota", `{"name":"a","overlay":{}}`, `overlay: "quota" is missing`},
		{"a grant without access", `{"name":"a","grants":[{"access":"ro"},{"uid":[1]}]}`, `grants: "access" is missing`},
	} {
		var a api.AddExport
		err := decode([]byte(tt.in), &a)
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: got %v, want %q", tt.name, err, tt.want)
		}
	}
}

func TestDecodeReadsEverythingTheAPICanSay(t *testing.T) {
	no := false
	for _, v := range []any{
		&api.AddExport{Persist: true, Export: config.Export{
			Name: "a\n\"☃😀", Image: "fd:0", BackingFiles: []string{"fd:1", ""}, Rate: &config.Rate{Bytes: 1 << 40, Burst: config.Duration(time.Second)},
			Grants:  []config.Grant{{Access: "rw", UIDs: []uint32{0, 4294967295}}},
			Protect: []config.Range{{Offset: 1, Length: 2}}, Faults: []config.Fault{{Ops: []string{"read"}, Probability: 0.5}},
			Listeners: []config.Listener{{URI: "nbd://x"}},
		}},
		&api.Patch{ReadOnly: &no, Grants: &[]config.Grant{}, RateKeys: map[string]string{"ops": "5"}},
		&api.Pause{Limit: config.Duration(time.Minute)},
		&api.Resize{Size: 1<<63 - 1},
		&api.Resize{By: 1},
		&api.Snapshot{Overlay: "/x"},
	} {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		got := reflect.New(reflect.TypeOf(v).Elem()).Interface()
		if err := decode(b, got); err != nil || !reflect.DeepEqual(got, v) {
			t.Errorf("%s: got %+v, %v", b, got, err)
		}
	}
}

// FuzzDecode holds that what is taken is one JSON object, means the same when
// it is written again, and never ends the program.
func FuzzDecode(f *testing.F) {
	for _, s := range []string{
		`{}`, `{"name":"a","image":"fd:0","rate":{"bytes":"10G","burst":"1s"},"persist":true}`, `{"name":"\ud83d\ude00"}`,
		`{"grants":[{"access":"ro","uid":[1]}],"protect":[{"offset":0,"length":512}]}`, `{"name":"a","name":"b"}`, `{"x":[[[[`, "{}\n", `{"limit":"1s"}`, `{"size":1}`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, v := range []any{&api.AddExport{}, &api.Patch{}, &api.Pause{}, &api.Resize{}, &api.Snapshot{}} {
			if decode(b, v) != nil {
				continue
			}
			if b = bytes.TrimSpace(b); !json.Valid(b) || b[0] != '{' {
				t.Fatalf("took %q", b)
			}
			again, err := json.Marshal(v)
			if err != nil {
				t.Fatal(err)
			}
			w := reflect.New(reflect.TypeOf(v).Elem()).Interface()
			if err := decode(again, w); err != nil {
				t.Fatalf("%q became %q: %v", b, again, err)
			}
			third, err := json.Marshal(w)
			if err != nil || !bytes.Equal(again, third) {
				t.Fatalf("%q became %q and then %q", b, again, third)
			}
		}
	})
}

// FuzzPath holds that a name in a path is what it was before it was escaped,
// and that no text finds two routes.
func FuzzPath(f *testing.F) {
	f.Add("/v1/exports/a%2Fb")
	f.Add("/v1/exports/a/pause")
	f.Add("/v1/clients/%zz")
	f.Fuzz(func(t *testing.T, path string) {
		found := map[string]string{}
		for _, r := range routes {
			name, ok, err := match(r.path, strings.Split(path, "/"))
			if err != nil && ok {
				t.Fatalf("%q: both found and refused", path)
			}
			if other := found[r.method]; ok && other != "" {
				t.Fatalf("%s %q finds %s and %s", r.method, path, other, r.path)
			}
			if ok {
				found[r.method] = r.path
			}
			if len(name) > limits.ControlName || strings.ContainsRune(name, 0) {
				t.Fatalf("%q: name %q", path, name)
			}
		}
	})
}
