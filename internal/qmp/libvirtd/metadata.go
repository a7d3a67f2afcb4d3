package libvirtd

import (
	"context"
	"encoding/xml"
	"fmt"

	libvirt "github.com/digitalocean/go-libvirt"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/qmp"
)

// namespace begins those of our elements in the metadata of a domain.
const namespace = "https://github.com/vmdiskd/vmdiskd/"

// kept is such an element.
type kept struct {
	XMLName xml.Name `xml:"kept"`
	Value   string   `xml:"value,attr"`
}

// Keep keeps a text with a running domain, under a name, in the metadata that
// libvirt shows in its description and forgets at the machine's end. "" ends that.
func (s *Session) Keep(ctx context.Context, d Domain, name, text string) error {
	var element libvirt.OptString
	if text != "" {
		b, err := xml.Marshal(kept{Value: text})
		if err != nil {
			return fmt.Errorf("%w metadata: %w", qmp.ErrInvalid, err)
		}
		element = libvirt.OptString{string(b)}
	}
	_, err := call(ctx, s, "keep metadata", func() (struct{}, error) {
		return struct{}{}, s.l.DomainSetMetadata(d.handle, int32(libvirt.DomainMetadataElement), element,
			libvirt.OptString{"vmdiskd"}, libvirt.OptString{namespace + name}, libvirt.DomainAffectLive)
	})
	return err
}

// Kept is the text that a running domain has by Keep, "" for none. Whoever may
// change the domain may have put another there.
func (s *Session) Kept(ctx context.Context, d Domain, name string) (string, error) {
	const what = "read metadata"
	text, err := call(ctx, s, what, func() (string, error) {
		return s.l.DomainGetMetadata(d.handle, int32(libvirt.DomainMetadataElement), libvirt.OptString{namespace + name}, libvirt.DomainAffectLive)
	})
	if HasCode(err, libvirt.ErrNoDomainMetadata) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	var k kept
	if len(text) > limits.MaxString {
		return "", fmt.Errorf("%s: %w: %d bytes", what, qmp.ErrProtocol, len(text))
	}
	if err := xml.Unmarshal([]byte(text), &k); err != nil {
		return "", fmt.Errorf("%s: %w: %w", what, qmp.ErrProtocol, err)
	}
	return k.Value, nil
}
