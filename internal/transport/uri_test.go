package transport_test

import (
	"reflect"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/transport"
)

func tcpURI(host string, port uint32, export string) transport.URI {
	return transport.URI{Target: transport.Target{Kind: transport.TCP, Address: host, Port: port}, Export: export}
}

func unixURI(path, export string) transport.URI {
	return transport.URI{Target: transport.Target{Kind: transport.Unix, Path: path}, Export: export}
}

func vsockURI(cid, port uint32, export string) transport.URI {
	return transport.URI{Target: transport.Target{Kind: transport.VSock, CID: cid, Port: port}, Export: export}
}

func with(u transport.URI, change func(*transport.URI)) transport.URI {
	change(&u)
	return u
}

func secure(u *transport.URI) { u.TLS = true }

var parsed = []struct {
	in   string
	want transport.URI
}{
	{"nbd://host", tcpURI("host", 10809, "")},
	{"nbd://host/", tcpURI("host", 10809, "")},
	{"NBD://host/disk", tcpURI("host", 10809, "disk")},
	{"nbd://host:1/disk", tcpURI("host", 1, "disk")},
	{"nbd://host//disk", tcpURI("host", 10809, "/disk")},
	{"nbd://host///", tcpURI("host", 10809, "//")},
	{"nbd://host/a/b", tcpURI("host", 10809, "a/b")},
	{"nbd://host/a%2Fb", tcpURI("host", 10809, "a/b")},
	{"nbd://host/%C3%A4%20%3F%23%25+", tcpURI("host", 10809, "ä ?#%+")},
	{"nbd://[::1]:2/x", tcpURI("::1", 2, "x")},
	{"nbd://[fe80::1%25eth0]/", tcpURI("fe80::1%eth0", 10809, "")},
	{"nbd:///x", tcpURI("localhost", 10809, "x")},
	{"nbds://host", with(tcpURI("host", 10809, ""), secure)},
	{"nbds://alice@host/x?tls-verify-peer=true&tls-certificates=/etc/pki", with(tcpURI("host", 10809, "x"), func(u *transport.URI) {
		u.TLS, u.User = true, "alice"
		u.Params = map[string]string{"tls-verify-peer": "true", "tls-certificates": "/etc/pki"}
	})},
	{"nbd+unix:///?socket=/run/s", unixURI("/run/s", "")},
	{"nbd+unix://?socket=/run/s", unixURI("/run/s", "")},
	{"nbd+unix:///disk?socket=/run/s", unixURI("/run/s", "disk")},
	{"nbd+unix:////disk?socket=/run/s", unixURI("/run/s", "/disk")},
	{"nbd+unix:///?socket=/run/a+b%26c%3Dd%20e", unixURI("/run/a+b&c=d e", "")},
	{"nbds+unix:///x?socket=s&tls-hostname=h", with(unixURI("s", "x"), func(u *transport.URI) {
		u.TLS, u.Params = true, map[string]string{"tls-hostname": "h"}
	})},
	{"nbd+vsock://2", vsockURI(2, 10809, "")},
	{"nbd+vsock:///x", vsockURI(2, 10809, "x")},
	{"nbd+vsock://42:4294967294/x", vsockURI(42, 4294967294, "x")},
	{"nbds+vsock://3:1/", with(vsockURI(3, 1, ""), secure)},
	{"nbd://host/x?flag", with(tcpURI("host", 10809, "x"), func(u *transport.URI) {
		u.Params = map[string]string{"flag": ""}
	})},
}

func TestURIsAreParsed(t *testing.T) {
	for _, tt := range parsed {
		got, err := transport.ParseURI(tt.in)
		if err != nil {
			t.Errorf("parse %q: %v", tt.in, err)
			continue
		}
		if len(got.Params) == 0 {
			got.Params = nil
		}
		if d := cmp.Diff(tt.want, got); d != "" {
			t.Errorf("parse %q (-want +got):\n%s", tt.in, d)
		}
	}
}

func TestURIsThatCannotBe(t *testing.T) {
	for in, want := range map[string]string{
		"":                                "scheme",
		"host":                            "scheme",
		"http://host/":                    "scheme",
		"nbd+tcp://host":                  "scheme",
		"nbd:host:10809":                  "//",
		"nbd:unix:/run/s":                 "//",
		"nbd://host:65536":                "port",
		"nbd://host:99999999999999999999": "port",
		"nbd://host:x":                    "port",
		"nbd://a!b/":                      "neither",
		"nbd://ä/":                        "neither",
		"nbd://::1/":                      "neither",
		"nbd://host/%zz":                  "escape",
		"nbd://host/?a=%zz":               "escape",
		"nbd://host/?%zz=a":               "escape",
		"nbd://host/%ff":                  "UTF-8",
		"nbd://host/a%00b":                "zero byte",
		"nbd://host/a#b":                  "%23",
		"nbd://host/a#":                   "%23",
		"nbd://u:secret@host/":            "password",
		"nbd://host/?a=1&a=2":             "twice",
		"nbd://host/?socket=/s":           "Unix",
		"nbd+unix:///":                    "socket",
		"nbd+unix:///?socket=":            "socket",
		"nbd+unix://host/?socket=/s":      "host",
		"nbd+vsock://host/":               "context id",
		"nbd+vsock://4294967296/":         "context id",
		"nbd+vsock://2:4294967295/":       "port",
		"nbd://host/" + strings.Repeat("x", limits.MaxString+1): "bytes",
	} {
		if u, err := transport.ParseURI(in); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("parse %.40q: got %+v and error %v, want one that says %q", in, u, err, want)
		}
	}
}

func TestURIsReadBackAsWritten(t *testing.T) {
	names := []string{
		"", "disk", "/disk", "//", "a/b", "a b", "a+b", "a%2Fb", "?socket=x", "#", "&=;", "..", "./../x",
		"ä€𝄞", "\"<>\\^`{|}", "\x01\n\x7f", "[::1]:80", "@", ":", strings.Repeat("%", 1000),
	}
	var all []transport.URI
	for _, tt := range parsed {
		all = append(all, tt.want)
	}
	for _, n := range names {
		all = append(all, tcpURI("host", 10809, n), unixURI("/run/"+n, n), vsockURI(3, 7, n),
			with(tcpURI("::1", 9, n), func(u *transport.URI) {
				u.TLS, u.User, u.Params = true, n, map[string]string{"k" + n: n, "z": "1"}
			}))
	}
	for _, u := range all {
		s := u.String()
		got, err := transport.ParseURI(s)
		if err != nil {
			t.Errorf("parse %q: %v", s, err)
			continue
		}
		if len(got.Params) == 0 {
			got.Params = nil
		}
		if !reflect.DeepEqual(got, u) {
			t.Errorf("%q reads as %+v, was written for %+v", s, got, u)
		}
	}
}

func TestURIsHaveOneSpelling(t *testing.T) {
	for in, want := range map[string]string{
		"nbd://host:10809/":          "nbd://host",
		"nbd+unix://?socket=/run/s":  "nbd+unix:///?socket=/run/s",
		"nbd+vsock:///x":             "nbd+vsock://2/x",
		"nbds://h/x?tls-b=2&tls-a=1": "nbds://h/x?tls-a=1&tls-b=2",
		"nbd://[::1]/a%2fb%20c":      "nbd://[::1]/a/b%20c",
		"nbd+unix:////d?socket=/a+b": "nbd+unix:////d?socket=/a%2Bb",
		"nbd://[fe80::1%25eth0]:1/":  "nbd://[fe80::1%25eth0]:1",
	} {
		u, err := transport.ParseURI(in)
		if err != nil || u.String() != want {
			t.Errorf("%q is spelt %q, %v; want %q", in, u.String(), err, want)
		}
	}
}

func TestListenerURIs(t *testing.T) {
	u, path := listenUnix(t)
	if got, want := u.URI("a b", true), "nbds+unix:///a%20b?socket="+path; got != want {
		t.Errorf("unix listener: %q, want %q", got, want)
	}
	for address, host := range map[string]string{"127.0.0.1": "127.0.0.1", "": "localhost"} {
		l := listen(t, transport.Endpoint{Kind: transport.TCP, Address: address, Family: "4"})[0]
		_, port, _ := strings.Cut(l.Addr(), ":")
		if got, want := l.URI("", false), "nbd://"+host+":"+port; got != want {
			t.Errorf("listener on %q: %q, want %q", address, got, want)
		}
	}
}

func FuzzURI(f *testing.F) {
	for _, tt := range parsed {
		f.Add(tt.in)
	}
	f.Fuzz(func(t *testing.T, s string) {
		u, err := transport.ParseURI(s)
		if err != nil {
			return
		}
		again, err := transport.ParseURI(u.String())
		if err != nil {
			t.Fatalf("%q was written as %q: %v", s, u.String(), err)
		}
		if u.String() != again.String() {
			t.Errorf("%q is written as %q and then as %q", s, u.String(), again.String())
		}
	})
}
