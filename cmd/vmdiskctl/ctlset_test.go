package main

import (
	"encoding/json"
	"errors"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
	ctlserver "github.com/vmdiskd/vmdiskd/internal/control/server"
)

func TestSettingsBecomeAPatch(t *testing.T) {
	for _, tt := range []struct {
		args []string
		want string // the patch in JSON
	}{
		{[]string{"description="}, `{"description":""}`},
		{[]string{"description=a=b, \"c\"", "readonly=true", "default=false"}, `{"description":"a=b, \"c\"","readonly":true,"default":false}`},
		{[]string{"max-connections=0", "log-requests=true"}, `{"max-connections":0,"log-requests":true}`},
		{[]string{"write-threshold=3G"}, `{"write-threshold":3221225472}`},
		{[]string{"write-threshold=0"}, `{"write-threshold":0}`},
		{[]string{"rate=10M"}, `{"rate":{"bytes":10485760}}`},
		{[]string{"rate=none"}, `{"rate":{}}`},
		{[]string{"rate=read-bytes=1K,write-bytes=2,ops=3,read-ops=4,write-ops=5,burst=6s"},
			`{"rate":{"read-bytes":1024,"write-bytes":2,"ops":3,"read-ops":4,"write-ops":5,"burst":"6s"}}`},
		{[]string{"rate.bytes=10M", "rate.burst=1s"}, `{"rate-keys":{"burst":"1s","bytes":"10M"}}`},
		{[]string{"grant=rw"}, `{"grants":[{"access":"rw"}]}`},
		{[]string{"grant=rw,uid=1,gid=2,uid=3", "grant=ro,cid=4", "grant=none,address=10.0.0.0/8,address=::1"},
			`{"grants":[{"access":"rw","uid":[1,3],"gid":[2]},{"access":"ro","cid":[4]},{"access":"none","address":["10.0.0.0/8","::1"]}]}`},
		{[]string{"grant=ro,cert-name=CN=x,O=y"}, `{"grants":[{"access":"ro","cert-name":["CN=x,O=y"]}]}`},
		{[]string{"grant=ro,uid=5,label=u:r:t:s0:c1,c2"}, `{"grants":[{"access":"ro","uid":[5],"label":"u:r:t:s0:c1,c2"}]}`},
		{[]string{"grant=rw,selinux-type=svirt_t,selinux-type=svirt_tcg_t,selinux-level=s0:c1,c2"},
			`{"grants":[{"access":"rw","selinux-type":["svirt_t","svirt_tcg_t"],"selinux-level":"s0:c1,c2"}]}`},
		{[]string{`grant={"access":"rw","uid":[7]}`}, `{"grants":[{"access":"rw","uid":[7]}]}`},
		{[]string{"grants=[]"}, `{"grants":[]}`},
		{[]string{`grants=[{"access":"ro"}]`}, `{"grants":[{"access":"ro"}]}`},
		{[]string{`faults=[{"ops":["read"],"error":"EIO"}]`}, `{"faults":[{"ops":["read"],"error":"EIO"}]}`},
	} {
		p, err := parsePatch(tt.args)
		b, _ := json.Marshal(p)
		if err != nil || string(b) != tt.want {
			t.Errorf("%q: got %s, %v, want %s", tt.args, b, err, tt.want)
		}
	}
}

func TestSettingsThatMakeNoSenseAreRefused(t *testing.T) {
	for _, args := range [][]string{
		{""}, {"readonly"}, {"readonly=yes"}, {"readonly=TRUE"}, {"name=x"}, {"rate.=1"}, {"rate.x=1"}, {"rate.ops=1K"}, {"rate.bytes=x"},
		{"rate="}, {"rate=-1"}, {"rate=1,2"}, {"rate=bytes=1,bytes=2"}, {"rate=burst=5"}, {"rate=ops=9223372036854775808"},
		{"write-threshold="}, {"write-threshold=-1"}, {"write-threshold=none"}, {"write-threshold=1", "write-threshold=2"},
		{"rate=1", "rate=2"}, {"rate=1", "rate.ops=2"}, {"rate.ops=1", "rate.ops=2"}, {"max-connections=-1"}, {"max-connections=4294967296"},
		{"grant="}, {"grant=rw,"}, {"grant=rw,uid"}, {"grant=rw,uid="}, {"grant=rw,uid=-1"}, {"grant=rw,uid=4294967296"}, {"grant=rw,user=x"},
		{"grant={}}"}, {`grant={"access":"rw","access":"ro"}`}, {`grant={"what":1}`}, {"grant=rw", "grants=[]"},
		{"grants="}, {"grants=x"}, {"grants=null"}, {"grants={}"}, {`grants=[],"readonly":true`}, {`faults=[{"what":1}]`},
	} {
		if p, err := parsePatch(args); !errors.As(err, new(usageError)) {
			t.Errorf("%q: got %+v, %v", args, p, err)
		}
	}
}

func TestOneRateLeavesTheOthers(t *testing.T) {
	s := controlled(t, ctlserver.Change)
	e := exportOf("web")
	e.Rate = &config.Rate{Bytes: 5, Ops: 6}
	s.Put(e)
	s.Put(exportOf("free"))
	for _, tt := range []struct {
		args []string
		want config.Rate
	}{
		{[]string{"web", "rate.ops=7", "rate.burst=1s"}, config.Rate{Bytes: 5, Ops: 7, Burst: 1e9}},
		{[]string{"web", "rate.bytes=0"}, config.Rate{Ops: 7, Burst: 1e9}},
		{[]string{"web", "rate=8"}, config.Rate{Bytes: 8}},
		{[]string{"free", "rate.read-ops=9"}, config.Rate{ReadOps: 9}},
	} {
		var got api.Export
		must(t, json.Unmarshal([]byte(want(t, exitDone, append([]string{"export", "set", "--json"}, tt.args...)...)), &got))
		if got.Rate == nil || *got.Rate != tt.want {
			t.Errorf("%q: got %+v, want %+v", tt.args, got.Rate, tt.want)
		}
	}
}

func FuzzSettings(f *testing.F) {
	for _, s := range []string{"grant=rw,uid=1,label=x", "rate=10M,ops=5", "rate.burst=5s", `grants=[{"access":"ro"}]`, "faults=[]"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		p, err := parsePatch([]string{s})
		if err != nil && !errors.As(err, new(usageError)) {
			t.Fatalf("%q: %v is no usage error", s, err)
		}
		if _, err := json.Marshal(p); err != nil {
			t.Fatalf("%q: %v", s, err)
		}
	})
}
