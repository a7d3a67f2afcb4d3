package psk

import (
	"crypto/tls"
	"fmt"
)

// ClientConfig is for connections to servers that know the key of an identity:
// the first that the key file has for it, which QEMU and libnbd take too. A
// server that does not prove that key is refused, whatever certificate it has.
// The file is held to the same rules as a server's.
func ClientConfig(path, identity string) (*tls.Config, error) {
	if err := Supported(); err != nil {
		return nil, err
	}
	data, err := readSecret(path)
	if err != nil {
		return nil, err
	}
	defer clear(data)
	list, err := parse(data)
	if err != nil {
		return nil, fmt.Errorf("key file %q: %w", path, err)
	}
	for _, id := range list {
		if id.name != identity {
			continue
		}
		cert, err := decoyCertificate()
		if err != nil {
			return nil, err
		}
		return clientConfig(identity, id.keys[0], cert)
	}
	return nil, fmt.Errorf("key file %q has no identity %q", path, identity)
}
