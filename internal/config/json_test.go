package config_test

import (
	"encoding/json"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

func TestExportsAreReadStrictly(t *testing.T) {
	for _, tt := range []struct{ name, in, want string }{
		{"unknown", `{"name":"a","size":1}`, `unknown field "size"`},
		{"unknown inside", `{"rate":{"bits":1}}`, `unknown field "bits"`},
		{"other case", `{"Name":"a"}`, `unknown field "Name"`},
		{"kelvin", "{\"bac\u212aing\":\"deny\"}", `unknown field`},
		{"twice", `{"name":"a","name":"b"}`, `field "name" is given twice`},
		{"twice by escape", `{"name":"a","n\u0061me":"b"}`, `field "name" is given twice`},
		{"twice inside", `{"rate":{"ops":1,"ops":2}}`, `field "ops" is given twice`},
		{"twice in a list", `{"protect":[{"offset":1},{"offset":1,"offset":2}]}`, `field "offset" is given twice`},
		{"trailing", `{"name":"a"} {}`, "byte 14: "},
		{"trailing text", `{"name":"a"}x`, "byte 13: "},
		{"cut", `{"name":"a"`, "byte 11: "},
		{"empty", ``, "byte 0: "},
		{"list", `[]`, "it is not an object"},
		{"text", `"a"`, "it is not an object"},
		{"null", `null`, "it is not an object"},
		{"null inside", `{"name":null}`, "null is no value"},
		{"no utf-8", "{\"name\":\"a\xff\"}", "it is not UTF-8"},
		{"high half", `{"name":"\ud800"}`, "byte 10: half a pair"},
		{"high half and text", `{"name":"\ud800\u0041"}`, "byte 10: half a pair"},
		{"low half", `{"name":"a\\\udc00"}`, "byte 13: half a pair"},
		{"deep", `{"protect":` + strings.Repeat("[", limits.ExportDepth) + strings.Repeat("]", limits.ExportDepth) + "}", "it has more than 16 levels"},
		{"very deep", strings.Repeat(`{"a":`, 12000), "byte "},
		{"large", `{"name":"` + strings.Repeat("a", limits.ExportJSON) + `"}`, "it has 65547 bytes"},
		{"wrong kind", `{"name":1}`, "cannot unmarshal number"},
		{"number for duration", `{"rate":{"burst":5}}`, "cannot unmarshal number"},
		{"negative size", `{"overlay":{"quota":-1}}`, `size "-1"`},
		{"fraction", `{"overlay":{"quota":1.0}}`, `size "1.0"`},
		{"exponent", `{"overlay":{"quota":1e3}}`, `size "1e3"`},
		{"large size", `{"overlay":{"quota":9223372036854775808}}`, `size "9223372036854775808"`},
		{"large uid", `{"grants":[{"access":"rw","uid":[4294967296]}]}`, "cannot unmarshal number"},
		{"raw newline", "{\"name\":\"a\nb\"}", "byte 11: "},
	} {
		t.Run(tt.name, func(t *testing.T) {
			e, err := decodeExport([]byte(tt.in))
			if err == nil || !strings.HasPrefix(err.Error(), tt.want) {
				t.Errorf("got %+v, %v; want %q", e, err, tt.want)
			}
		})
	}
}

func TestExportsAreRead(t *testing.T) {
	e, err := decodeExport([]byte(` {"name":"a\ud83d\ude00\"\\u","overlay":{"quota":"10G"},
		"rate":{"bytes":1048576,"burst":"1s"},"grants":[{"access":"ro","cid":[3]}],"faults":[{"ops":["read"],"probability":0.25}]} `))
	if err != nil || e.Name != "a\U0001F600\"\\u" || e.Overlay.Quota != 10<<30 || e.Rate.Bytes != 1<<20 ||
		time.Duration(e.Rate.Burst) != time.Second || e.Grants[0].CIDs[0] != 3 || e.Faults[0].Probability != 0.25 {
		t.Errorf("got %+v, %v", e, err)
	}
	depth := `{"protect":` + strings.Repeat("[", limits.ExportDepth-1) + strings.Repeat("]", limits.ExportDepth-1) + "}"
	if _, err := decodeExport([]byte(depth)); err == nil || strings.Contains(err.Error(), "levels") {
		t.Errorf("%d levels: %v", limits.ExportDepth, err)
	}
}

// Keys of TOML and JSON are the same, but for lists: one [[export]] is one, and
// "exports" are many.
func TestKeysOfJSONCanBeRead(t *testing.T) {
	seen := map[reflect.Type]bool{}
	var walk func(reflect.Type)
	walk = func(rt reflect.Type) {
		for rt.Kind() == reflect.Pointer || rt.Kind() == reflect.Slice {
			rt = rt.Elem()
		}
		if rt.Kind() != reflect.Struct || seen[rt] {
			return
		}
		seen[rt] = true
		for i := range rt.NumField() {
			f := rt.Field(i)
			key, option, _ := strings.Cut(f.Tag.Get("json"), ",")
			toml := f.Tag.Get("toml")
			if key != toml && key != toml+"s" || option != "" && option != "omitempty" {
				t.Errorf("%v.%s: JSON %q, TOML %q", rt, f.Name, f.Tag.Get("json"), toml)
			}
			if strings.Trim(key, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" || key == "" {
				t.Errorf("%v.%s: %q cannot be read", rt, f.Name, key)
			}
			walk(f.Type)
		}
	}
	walk(reflect.TypeFor[config.Export]())
	if len(seen) != 9 {
		t.Errorf("looked at %d types", len(seen))
	}
}

func FuzzDecodeExport(f *testing.F) {
	c, err := config.Parse("f", []byte(whole))
	if err != nil {
		f.Fatal(err)
	}
	for _, e := range c.Exports {
		b, err := json.Marshal(e)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte(`{"name":"\ud83d\ude00","overlay":{"quota":"1T"}}`))
	f.Add([]byte(`{"name":"\ud800","name":null}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := decodeExport(b)
		if err != nil {
			return
		}
		text, err := json.Marshal(e)
		if err != nil {
			t.Fatalf("%q is read and cannot be written: %v", b, err)
		}
		again, err := decodeExport(text)
		if err != nil && len(text) <= limits.ExportJSON {
			t.Fatalf("%q is read and written as %q: %v", b, text, err)
		}
		if err == nil && !sameJSON(t, e, again) {
			t.Fatalf("%q: %+v became %+v", b, e, again)
		}
		e.SetDefaults()
		if err := e.Validate(config.Scope{Anywhere: true, Descriptors: 2}); err == nil && e.Name == "" {
			t.Fatalf("%q: an export without a name is valid", b)
		}
	})
}

func sameJSON(t testing.TB, a, b any) bool {
	t.Helper()
	x, err := json.Marshal(a)
	if err != nil {
		t.Fatal(err)
	}
	y, err := json.Marshal(b)
	if err != nil {
		t.Fatal(err)
	}
	return string(x) == string(y)
}

func decodeExport(b []byte) (e config.Export, err error) {
	err = config.DecodeJSON(b, &e)
	return e, err
}
