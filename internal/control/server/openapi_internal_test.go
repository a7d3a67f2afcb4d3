package server

import (
	"fmt"
	"maps"
	"net/http"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/obs"
	"go.yaml.in/yaml/v3"
)

type object = map[string]any

const refPrefix = "#/components/schemas/"

func openAPI(t *testing.T) object {
	t.Helper()
	b, err := os.ReadFile("../openapi.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var doc object
	if err := yaml.Unmarshal(b, &doc); err != nil {
		t.Fatal(err)
	}
	return doc
}

// at walks down to what must be there.
func at(t *testing.T, o object, path ...string) object {
	t.Helper()
	for i, p := range path {
		next, ok := o[p].(object)
		if !ok {
			t.Fatalf("openapi.yaml: no %s", strings.Join(path[:i+1], " > "))
		}
		o = next
	}
	return o
}

func items(v any) []any {
	l, _ := v.([]any)
	return l
}

// replies are the types of the replies to each operation, nil for none, and
// bodies those of the requests. They are what the handlers' signatures say.
var replies = map[string]any{
	"status": api.Status{}, "exports": []api.Export{}, "add": api.Export{}, "export": api.Export{}, "patch": api.Export{},
	"remove": nil, "pause": nil, "resume": nil, "resize": api.Export{}, "snapshot": api.Export{}, "forget": api.Forgotten{}, "clients": []api.Client{},
	"disconnect": nil, "leases": []api.Lease{}, "openLease": api.Lease{}, "closeLease": nil, "stats": []api.Stats{}, "events": api.Event{}, "reload": api.Reload{}, "metrics": "",
}

var bodies = map[string]any{
	"add": api.AddExport{}, "patch": api.Patch{}, "pause": api.Pause{}, "resize": api.Resize{}, "snapshot": api.Snapshot{}, "openLease": api.OpenLease{},
}

func TestOpenAPIHasTheRoutesAndNoOthers(t *testing.T) {
	doc := openAPI(t)
	paths := at(t, doc, "paths")
	described := map[string]bool{}
	for path, item := range paths {
		for method := range item.(object) {
			if method != "parameters" {
				described[strings.ToUpper(method)+" "+path] = true
			}
		}
	}
	for _, r := range routes {
		if !described[r.method+" "+r.path] {
			t.Errorf("%s %s is not described", r.method, r.path)
			continue
		}
		delete(described, r.method+" "+r.path)
		checkOperation(t, r, at(t, paths, r.path), at(t, paths, r.path, strings.ToLower(r.method)))
	}
	for d := range described {
		t.Errorf("%s is described and does not exist", d)
	}
}

func checkOperation(t *testing.T, r route, item, op object) {
	t.Helper()
	id := op["operationId"].(string)
	where := r.method + " " + r.path
	var query, segments []string
	for _, p := range append(items(item["parameters"]), items(op["parameters"])...) {
		if ref, ok := p.(object)["$ref"].(string); ok {
			segments = append(segments, "{"+strings.TrimPrefix(ref, "#/components/parameters/")+"}")
		} else {
			query = append(query, p.(object)["name"].(string))
		}
	}
	if !slices.Equal(query, r.query) {
		t.Errorf("%s: parameters %q, want %q", where, query, r.query)
	}
	for _, s := range strings.Split(r.path, "/") {
		if strings.HasPrefix(s, "{") != slices.Contains(segments, s) {
			t.Errorf("%s: segment %s is described by %q", where, s, segments)
		}
	}
	body, has := op["requestBody"].(object)
	if has != (r.body != noBody) || has && body["required"] != (r.body == mustHaveBody) {
		t.Errorf("%s: request body %v", where, body)
	}
	if has {
		checkSchema(t, where+" body", at(t, body, "content", "application/json", "schema"), reflect.TypeOf(bodies[id]))
	}
	if text, _ := op["description"].(string); strings.Contains(text, "escriptor") != r.files {
		t.Errorf("%s: descriptors are not described as they are", where)
	}
	checkReplies(t, where, id, at(t, op, "responses"))
}

func checkReplies(t *testing.T, where, id string, responses object) {
	t.Helper()
	want, known := replies[id]
	if !known {
		t.Fatalf("%s: operation %q is not in the table", where, id)
	}
	status := strconv.Itoa(http.StatusOK)
	switch {
	case want == nil:
		status = strconv.Itoa(http.StatusNoContent)
	case id == "add":
		status = strconv.Itoa(http.StatusCreated)
	}
	if got := slices.Sorted(maps.Keys(responses)); !slices.Equal(got, []string{status, "default"}) {
		t.Errorf("%s: replies %q", where, got)
		return
	}
	content, has := responses[status].(object)["content"].(object)
	if has != (want != nil) {
		t.Errorf("%s: content %v", where, content)
	}
	for _, c := range content {
		checkSchema(t, where+" reply", at(t, c.(object), "schema"), reflect.TypeOf(want))
	}
}

// checkSchema compares a schema with the type that is encoded by it, one level
// deep: what it refers to is compared by name here and for itself elsewhere.
func checkSchema(t *testing.T, where string, schema object, typ reflect.Type) {
	t.Helper()
	got := object{}
	for k, v := range schema {
		if k != "description" {
			got[k] = v
		}
	}
	if want := schemaOf(typ); !reflect.DeepEqual(got, want) {
		t.Errorf("%s: described as %v, want %v", where, got, want)
	}
}

// schemaOf is how a field of the type is described.
func schemaOf(t reflect.Type) object {
	switch {
	case t == reflect.TypeFor[time.Time]():
		return object{"type": "string", "format": "date-time"}
	case t == reflect.TypeFor[config.Size](), t == reflect.TypeFor[config.Duration](), t.Kind() == reflect.Struct:
		return object{"$ref": refPrefix + schemaName(t)}
	}
	switch t.Kind() {
	case reflect.Pointer:
		return schemaOf(t.Elem())
	case reflect.Slice:
		return object{"type": "array", "items": schemaOf(t.Elem())}
	case reflect.Map:
		return object{"type": "object", "additionalProperties": schemaOf(t.Elem())}
	case reflect.Bool:
		return object{"type": "boolean"}
	case reflect.Float64:
		return object{"type": "number"}
	case reflect.String:
		return object{"type": "string"}
	case reflect.Int, reflect.Int64, reflect.Uint32, reflect.Uint64:
		return object{"type": "integer"}
	}
	return object{"type": "unknown: " + t.String()}
}

func schemaName(t reflect.Type) string {
	if t == reflect.TypeFor[config.Export]() {
		return "Settings"
	}
	return t.Name()
}

// reach collects the structs that t is made of.
func reach(t reflect.Type, seen map[string]reflect.Type) {
	switch t.Kind() {
	case reflect.Pointer, reflect.Slice, reflect.Map:
		reach(t.Elem(), seen)
	case reflect.Struct:
		if t == reflect.TypeFor[time.Time]() || seen[schemaName(t)] != nil {
			return
		}
		seen[schemaName(t)] = t
		for i := range t.NumField() {
			reach(t.Field(i).Type, seen)
		}
	}
}

func TestOpenAPISchemasAreTheTypes(t *testing.T) {
	schemas := at(t, openAPI(t), "components", "schemas")
	types := map[string]reflect.Type{}
	reach(reflect.TypeFor[api.Error](), types)
	for _, v := range replies {
		if v != nil {
			reach(reflect.TypeOf(v), types)
		}
	}
	for _, v := range bodies {
		reach(reflect.TypeOf(v), types)
	}
	for name := range schemas {
		if types[name] == nil && name != "Size" && name != "Duration" {
			t.Errorf("schema %s is no type", name)
		}
	}
	for name, typ := range types {
		checkObject(t, name, at(t, schemas, name), typ)
	}
}

func checkObject(t *testing.T, name string, schema object, typ reflect.Type) {
	t.Helper()
	props := maps.Clone(at(t, schema, "properties"))
	var required []string
	var parts []any
	for i := range typ.NumField() {
		f := typ.Field(i)
		if f.Anonymous {
			parts = append(parts, schemaOf(f.Type))
			continue
		}
		field, opt, _ := strings.Cut(f.Tag.Get("json"), ",")
		if field == "-" {
			continue
		}
		if opt == "" {
			required = append(required, field)
		}
		p, ok := props[field].(object)
		if !ok {
			t.Errorf("%s: %s is not described", name, field)
			continue
		}
		delete(props, field)
		enum := p["enum"]
		delete(p, "enum")
		checkSchema(t, name+"."+field, p, f.Type)
		if enum != nil {
			p["enum"] = enum
		}
	}
	if all := items(schema["allOf"]); !slices.EqualFunc(all, parts, reflect.DeepEqual) {
		t.Errorf("%s is made of %v, want %v", name, all, parts)
	}
	for field := range props {
		t.Errorf("%s: %s is described and does not exist", name, field)
	}
	var got []string
	for _, r := range items(schema["required"]) {
		got = append(got, r.(string))
	}
	if !slices.Equal(got, required) {
		t.Errorf("%s: required are %q, want %q", name, got, required)
	}
}

func TestOpenAPIHasTheCodes(t *testing.T) {
	doc := openAPI(t)
	var got []string
	for _, c := range items(at(t, doc, "components", "schemas", "Error", "properties", "code")["enum"]) {
		got = append(got, c.(string))
	}
	slices.Sort(got)
	if want := slices.Sorted(maps.Keys(statusOf)); !slices.Equal(got, want) {
		t.Errorf("codes are %q, want %q", got, want)
	}
	text := at(t, doc, "components", "responses", "Error")["description"].(string)
	for code, status := range statusOf {
		if i := strings.Index(text, code); i < 0 || !strings.Contains(text[i:], strconv.Itoa(status)) {
			t.Errorf("%s is not said to be %d", code, status)
		}
	}
}

func TestOpenAPISaysTheBounds(t *testing.T) {
	b, err := os.ReadFile("../openapi.yaml")
	if err != nil {
		t.Fatal(err)
	}
	text := strings.Join(strings.Fields(string(b)), " ")
	for _, want := range []string{
		fmt.Sprintf("at most %d connections", limits.ControlConnsPerUID),
		fmt.Sprintf("headers %d KiB in %.0f seconds, body %d KiB in %.0f seconds", limits.ControlHeader>>10,
			limits.ControlHeaderTime.Seconds(), limits.ControlBody>>10, limits.ControlBodyTime.Seconds()),
		fmt.Sprintf("by holder, of which there are at most %d.", limits.LeaseHolders),
		fmt.Sprintf("at most %d levels", limits.ExportDepth),
		fmt.Sprintf("at most %d bytes of UTF-8", limits.ControlName),
		fmt.Sprintf("and so on, at most %d.", limits.ControlFiles),
		fmt.Sprintf("at most %.0fm. Without, %s.", limits.ControlRemoveMost.Minutes(), limits.ControlRemove),
		fmt.Sprintf("at most %d KiB", limits.ControlErrorText>>10),
		fmt.Sprintf("At most %d listen at a time, and %d of one user; of those who may only read %d, and %d of one user.",
			limits.EventSubscribers, limits.EventsPerUser, limits.EventReaders, limits.EventsPerReader),
	} {
		if !strings.Contains(text, want) {
			t.Errorf("openapi.yaml does not say %q", want)
		}
	}
}

func TestOpenAPINamesTheKindsOfEvents(t *testing.T) {
	kind := at(t, openAPI(t), "components", "schemas", "Event", "properties", "kind")
	said := strings.Split(kind["description"].(string), ", ")
	for _, k := range []obs.Kind{
		obs.ClientConnected, obs.ClientLeft, obs.IOError, obs.SlowRequest, obs.StuckRequest,
		obs.ExportState, obs.ExportPoisoned, obs.WriteThreshold, "reloaded", "lost",
	} {
		if !slices.Contains(said, string(k)) {
			t.Errorf("%q is not among %q", k, said)
		}
	}
}
