package main

import (
	"context"
	"fmt"
	"os"

	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// roundInParts measures a case in c.parts pairs, or rows of more peers. In each
// of them the servers run at once and are loaded one after the other, so that
// as little as can be changes in between; and in each they are started anew,
// so that what depends on where a process comes to lie in memory is a part of
// the spread and not of the result. The image is in the page cache throughout.
func (b *bench) roundInParts(ctx context.Context, c testCase, peers []peer, round int) (all []sample, err error) {
	if err := b.warm(c.small); err != nil {
		return nil, err
	}
	for i := range c.parts {
		part := round*c.parts + i
		some, err := b.part(ctx, c, inTurn(peers, part))
		if err != nil {
			return nil, err
		}
		for _, s := range some {
			s.Round = part
			all = append(all, s)
		}
	}
	return all, nil
}

// part returns a sample of each peer.
func (b *bench) part(ctx context.Context, c testCase, peers []peer) (all []sample, err error) {
	dir, err := os.MkdirTemp("", "vmdb")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	servers := make([]*testenv.Server, len(peers))
	for i, p := range peers {
		own, err := os.MkdirTemp(dir, "")
		if err != nil {
			return nil, err
		}
		if servers[i], err = b.launch(ctx, c, p, own); err != nil {
			return nil, err
		}
		defer servers[i].Stop()
	}
	for i, p := range peers {
		s, err := b.runLoad(ctx, servers[i], c)
		if err != nil {
			return nil, fmt.Errorf("%s, %s: %w\n%s", c.name, p.name, err, servers[i].Log())
		}
		s.Case, s.Peer = c.name, p.name
		all = append(all, s)
	}
	return all, nil
}
