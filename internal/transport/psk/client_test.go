package psk

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"math/big"
	"strings"
	"testing"
	"time"
)

func TestClientTakesTheFirstKeyOfItsIdentity(t *testing.T) {
	needBuild(t)
	path := keyFile(t, "vm1:"+hexKey(32, 1)+"\nvm2:"+hexKey(32, 2)+"\nvm1:"+hexKey(32, 3), 0o600)
	cfg, err := ClientConfig(path, "vm1")
	if err != nil {
		t.Fatal(err)
	}
	for range 2 { // a configuration is good for many connections
		if got, serverErr, clientErr := meet(t, someKeys(t, "vm1:"+hexKey(32, 1)), cfg, nil); got != "vm1" || serverErr != nil || clientErr != nil {
			t.Errorf("got %q, %v, %v; want vm1", got, serverErr, clientErr)
		}
	}
	if _, err := ClientConfig(path, "vm3"); err == nil || !strings.Contains(err.Error(), `no identity "vm3"`) {
		t.Errorf("another identity: %v", err)
	}
	if _, err := ClientConfig(keyFile(t, "vm1:"+hexKey(32, 1), 0o644), "vm1"); err == nil {
		t.Error("a file that others may read was taken")
	}
}

// A server that does not know the key may have any certificate: it is refused.
func TestClientRefusesAServerWithoutTheKey(t *testing.T) {
	needBuild(t)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), DNSNames: []string{"psk"}}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	a, b := pair(t)
	cfg, err := ClientConfig(keyFile(t, "vm1:"+hexKey(32, 1), 0o600), "vm1")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() {
		s := tls.Server(a, &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{cert}, PrivateKey: key}}})
		done <- s.Handshake()
		a.Close()
	}()
	if err := tls.Client(b, cfg).Handshake(); err == nil || !strings.Contains(err.Error(), "does not know the key") {
		t.Errorf("got %v", err)
	}
	b.Close()
	<-done
}
