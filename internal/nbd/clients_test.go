package nbd

import (
	"crypto/tls"
	"crypto/x509"
	"io"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
	"github.com/vmdiskd/vmdiskd/internal/obs"
	"github.com/vmdiskd/vmdiskd/internal/transport"
	"github.com/vmdiskd/vmdiskd/internal/transport/psk"
	"github.com/vmdiskd/vmdiskd/internal/transport/transporttest"
)

func TestClientsAreDescribed(t *testing.T) {
	r := memRig(t, 1<<20)
	before := time.Now()
	c := r.simple()
	r.ask(c, wire.CmdRead, 0, 4096)
	r.ask(c, wire.CmdWrite, 0, 1<<17)
	r.exports.deny = backing.CanWrite
	r.structured().do(wire.Request{Cmd: wire.CmdRead, Len: 512})
	r.ask(c, wire.CmdRead, 0, 512)

	l := r.server.Clients()
	if len(l) != 2 {
		t.Fatalf("clients: got %d, want 2", len(l))
	}
	a, b := l[0], l[1]
	if a.ID != 1 || b.ID != 2 || a.Export != "disk" || a.Peer.Kind != transport.Unix || a.Since.Before(before) {
		t.Errorf("clients: got %+v and %+v, want IDs 1 and 2 of export disk", a, b)
	}
	if !a.Writable || b.Writable {
		t.Errorf("writable: got %v and %v, want true and false", a.Writable, b.Writable)
	}
	if a.Agreed.Structured || a.Agreed.Contexts != nil {
		t.Errorf("first client: got %+v, want nothing negotiated", a.Agreed)
	}
	if want := (Features{Structured: true, Contexts: []string{wire.ContextAllocation}}); !reflect.DeepEqual(b.Agreed, want) {
		t.Errorf("second client: got %+v, want %+v", b.Agreed, want)
	}
	if a.TLSVersion != "" || a.TLSCipher != "" || a.CertName != "" {
		t.Errorf("first client: got %+v, want no TLS", a)
	}
}

func TestBytesOfAClientAreCounted(t *testing.T) {
	for _, n := range []uint64{512, 1 << 20} {
		for _, cached := range []string{"", "none"} {
			r := fileRig(t, 4<<20, "pool", cached)
			c := r.simple()
			r.ask(c, wire.CmdRead, 0, n)
			r.ask(c, wire.CmdWrite, 0, n)
			x := r.server.sessions()[0]
			r.leave(c)
			i := x.info()
			if want := 3*wire.RequestSize + n; i.BytesIn != want {
				t.Errorf("requests of %d bytes: %d bytes in, want %d", n, i.BytesIn, want)
			}
			if want := 2*wire.SimpleReplySize + n; i.BytesOut != want {
				t.Errorf("requests of %d bytes: %d bytes out, want %d", n, i.BytesOut, want)
			}
			if i.Requests != 3 || i.InFlight != 0 {
				t.Errorf("requests of %d bytes: %d requests and %d in flight, want 3 and 0", n, i.Requests, i.InFlight)
			}
		}
	}
}

// await waits until there is one client and it is as wanted. A client may be in
// transmission before the server lists it.
func (r *rig) await(wanted func(*session) bool) *session {
	for {
		if l := r.server.sessions(); len(l) == 1 && wanted(l[0]) {
			return l[0]
		}
		time.Sleep(time.Millisecond)
	}
}

// unread waits until the only client leaves a reply unread.
func (r *rig) unread() *session {
	return r.await(func(s *session) bool { return s.sending.waiting.Load() })
}

func TestBytesThatThePeerTakesLateAreCounted(t *testing.T) {
	const n = 8 << 20 // more than any socket buffer
	r := fileRig(t, n, "pool", "")
	c := r.simple()
	r.send(c, message(wire.CmdRead, 1, 0, n))
	x := r.unread()
	r.expect(c, wire.SimpleReplySize+n)
	r.leave(c)
	if got := x.info().BytesOut; got != wire.SimpleReplySize+n {
		t.Errorf("bytes out: got %d, want %d", got, wire.SimpleReplySize+n)
	}
}

func TestDisconnectAnswersWhatIsInFlight(t *testing.T) {
	r, g := gateRig(t)
	defer g.release()
	next := r.events()
	stays := r.simple()
	next(obs.ClientConnected)
	c := r.simple()
	next(obs.ClientConnected)
	r.send(c, message(wire.CmdFlush, 7, 0, 0))
	<-g.entered
	if r.server.Disconnect(99) {
		t.Error("a client that does not exist was disconnected")
	}
	if !r.server.Disconnect(2) || !r.server.Clients()[1].Leaving {
		t.Error("client 2 was not found, or does not count as leaving")
	}
	g.release()
	if e, cookie := r.reply(c); e != wire.OK || cookie != 7 {
		t.Errorf("reply in flight: got %v for %d, want OK for 7", e, cookie)
	}
	if n, err := c.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("afterwards: got %d, %v, want EOF", n, err)
	}
	if e := next(obs.ClientLeft); e.Client != 2 || e.Reason != "told to leave" {
		t.Errorf("event: got %+v, want that client 2 was told to leave", e)
	}
	if e := r.ask(stays, wire.CmdRead, 0, 512); e != wire.OK {
		t.Errorf("the other client's read: got %v, want OK", e)
	}
}

// secure makes the server speak TLS, and returns the configuration of a client
// that it takes.
func (r *rig) secure(t *testing.T, mode TLSMode) *tls.Config {
	t.Helper()
	return r.secureBeside(t, mode, nil)
}

// secureBeside is secure for a server that takes keys as well, if there are any.
func (r *rig) secureBeside(t *testing.T, mode TLSMode, keys *psk.Keys) *tls.Config {
	t.Helper()
	dir := t.TempDir()
	ca := transporttest.NewCA(t, "test")
	transporttest.WriteServer(t, dir, ca, ca.IssueServer("localhost"))
	cert := ca.IssueClient("a guest")
	pair, err := tls.X509KeyPair(cert.CertPEM(), cert.KeyPEM(t))
	if err != nil {
		t.Fatal(err)
	}
	creds, err := transport.LoadCredentials(dir, transport.TLSOptions{})
	if err != nil {
		t.Fatal(err)
	}
	r.opt.TLS, r.opt.Encrypt = mode, (&transport.ServerSecurity{Certificates: creds, Keys: keys}).Encrypt
	pool := x509.NewCertPool()
	pool.AddCert(ca.Cert)
	return &tls.Config{ServerName: "localhost", RootCAs: pool, Certificates: []tls.Certificate{pair}}
}

// simpleInsideTLS is simple for a server that secure has changed.
func (r *rig) simpleInsideTLS(cfg *tls.Config) net.Conn {
	r.t.Helper()
	plain := r.dial(r.t)
	plain.SetDeadline(time.Now().Add(hangLimit))
	r.expect(plain, 18)
	r.send(plain, wire.AppendOption([]byte{0, 0, 0, wire.FlagFixedNewstyle}, wire.OptStartTLS, nil))
	r.expect(plain, wire.OptReplyHeaderSize)
	c := tls.Client(plain, cfg)
	r.send(c, wire.AppendOption(nil, wire.OptExportName, nil))
	r.expect(c, 10+wire.ExportNameZeroes)
	return c
}

// ticketCache counts the session tickets that a client is given.
type ticketCache struct{ given atomic.Int32 }

func (*ticketCache) Get(string) (*tls.ClientSessionState, bool) { return nil, false }
func (c *ticketCache) Put(string, *tls.ClientSessionState)      { c.given.Add(1) }

// TestNoSessionTicketIsGiven: every connection is verified anew, with what is
// revoked by then.
func TestNoSessionTicketIsGiven(t *testing.T) {
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		r := memRig(t, 1<<20)
		cfg, cache := r.secure(t, TLSRequire), new(ticketCache)
		cfg.MaxVersion, cfg.ClientSessionCache = version, cache
		c := r.simpleInsideTLS(cfg)
		r.ask(c, wire.CmdRead, 0, 512) // tickets would come before the reply
		if n := cache.given.Load(); n != 0 {
			t.Errorf("%s: %d session tickets, want none", tls.VersionName(version), n)
		}
	}
}

func TestClientInsideTLSIsDescribed(t *testing.T) {
	r := memRig(t, 1<<20)
	c := r.simpleInsideTLS(r.secure(t, TLSRequire))
	r.ask(c, wire.CmdRead, 0, 512)

	x := r.server.sessions()[0]
	i := x.info()
	if i.TLSVersion != "TLS 1.3" || i.TLSCipher == "" || i.CertName != "a guest" {
		t.Errorf("got %q, %q, %q, want TLS 1.3, a cipher and the name of the certificate", i.TLSVersion, i.TLSCipher, i.CertName)
	}
	r.leave(c)
	if i = x.info(); i.BytesIn != 2*wire.RequestSize || i.BytesOut != wire.SimpleReplySize+512 {
		t.Errorf("bytes inside TLS: %d in and %d out, want %d and %d", i.BytesIn, i.BytesOut, 2*wire.RequestSize, wire.SimpleReplySize+512)
	}
}

// logged gives the server a log. read closes it and returns its lines.
func (r *rig) logged(t *testing.T) (read func() []string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "log")
	logs, err := obs.Open(obs.Options{Sink: path})
	if err != nil {
		t.Fatal(err)
	}
	r.opt.Log = logs.For("nbd")
	return func() []string {
		logs.Close()
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return strings.Split(strings.TrimSuffix(string(b), "\n"), "\n")
	}
}

// wantLines compares lines with patterns, one for each.
func wantLines(t *testing.T, got []string, want ...string) {
	t.Helper()
	for i, line := range got {
		if i >= len(want) || !regexp.MustCompile(want[i]).MatchString(line) {
			t.Errorf("line %d is %q", i+1, line)
		}
	}
	if len(got) != len(want) {
		t.Errorf("got %d lines, want %d", len(got), len(want))
	}
}

// TestLogSaysWhoUsedAnExport, and nothing of who has chosen none.
func TestLogSaysWhoUsedAnExport(t *testing.T) {
	r := memRig(t, 1<<20)
	read, cfg := r.logged(t), r.secure(t, TLSOn)
	r.dial(t).Close()
	<-r.errs
	c := r.simple()
	r.ask(c, wire.CmdRead, 0, 4096)
	r.ask(c, wire.CmdWrite, 0, 512)
	r.leave(c)
	r.exports.deny = backing.CanWrite
	c = r.simpleInsideTLS(cfg)
	r.send(c, make([]byte, wire.RequestSize)) // not the magic of one
	<-r.errs
	wantLines(t, read(),
		`level=INFO msg="client connected" in=nbd peer="unix:\S+" export=disk client=1 tls=off readonly=false$`,
		`level=INFO msg="client left" in=nbd peer="unix:\S+" export=disk client=1 lasted=\S+ requests=3 bytes-in=596 bytes-out=4128$`,
		`level=INFO msg="client connected" in=nbd peer="unix:\S+" export=disk client=2 tls="TLS 1.3" certificate="a guest" readonly=true$`,
		`level=INFO msg="client left" in=nbd peer="unix:\S+" export=disk client=2 lasted=\S+ requests=0 bytes-in=28 bytes-out=0 reason=".*magic.*"$`,
	)
}

// TestLogSaysWhoIsRefusedForItsConnections: not each time, and for how many.
func TestLogSaysWhoIsRefusedForItsConnections(t *testing.T) {
	const n = limits.EventBurst + 3
	r := memRig(t, 1<<20)
	read := r.logged(t)
	r.server = NewServer(r.opt)
	key := (&transport.Peer{Kind: transport.Unix, UID: uint32(os.Getuid())}).Key()
	for range limits.ConnectionsPerPeer {
		enter(t, r.server.admt, key).established()
	}
	for range n {
		r.dial(t)
		<-r.errs
	}
	warning := regexp.MustCompile(`level=WARN msg="connection refused" in=nbd peer=` + key + ` error="too many connections of this peer" remedy="max-connections .*"$`)
	leftOut := regexp.MustCompile(`msg="log lines were left out" in=nbd text="connection refused" peer=` + key + ` count=(\d+)$`)
	told := 0
	for _, line := range read() {
		if left := leftOut.FindStringSubmatch(line); left != nil {
			cut, _ := strconv.Atoi(left[1])
			told += cut
		} else if warning.MatchString(line) {
			told++
		} else {
			t.Errorf("line %q", line)
		}
	}
	if told != n {
		t.Errorf("the log accounts for %d refusals, want %d", told, n)
	}
}

// TestClientThatComesAndGoesFillsNoLog: its lines are counted by export.
func TestClientThatComesAndGoesFillsNoLog(t *testing.T) {
	const n = 3000
	r := memRig(t, 1<<20)
	read := r.logged(t)
	began := time.Now()
	for range n {
		r.leave(r.simple())
	}
	intervals := 1 + int(time.Since(began)/limits.EventInterval)
	told := map[string]int{} // lines, and what was left out, by their text
	lines := read()
	for _, line := range lines {
		for _, text := range []string{"client connected", "client left"} {
			switch left := regexp.MustCompile(`msg="log lines were left out".* text="` + text + `" export=disk count=(\d+)$`).FindStringSubmatch(line); {
			case left != nil:
				cut, _ := strconv.Atoi(left[1])
				told[text] += cut
			case strings.Contains(line, `msg="`+text+`"`):
				told[text]++
			}
		}
	}
	if told["client connected"] != n || told["client left"] != n {
		t.Errorf("the log accounts for %v, want %d of each", told, n)
	}
	// Twice what passes in an interval, and what was left out in it.
	if most := (intervals + 1) * (2*limits.EventBurst + 2); len(lines) > most {
		t.Errorf("%d lines in %d intervals, want at most %d", len(lines), intervals, most)
	}
}
