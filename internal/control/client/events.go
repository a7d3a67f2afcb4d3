package client

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"iter"
	"math"

	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// Events are the events from the moment it returns. The sequence is used once
// and ends with the server, without an error, or with an error: the context's
// for one. Breaking off the loop, or ending ctx without one, closes the
// connection.
func (c *Client) Events(ctx context.Context) (iter.Seq2[api.Event, error], error) {
	r, err := c.open(ctx, request{method: "GET", path: api.PathEvents})
	if err != nil {
		return nil, err
	}
	r.most.left = math.MaxInt64
	stop := context.AfterFunc(ctx, r.close)
	return func(yield func(api.Event, error) bool) {
		defer r.close()
		defer stop()
		r.events(yield)
	}, nil
}

func (r *reply) events(yield func(api.Event, error) bool) {
	lines := bufio.NewReaderSize(r.body(), limits.ControlEventLine)
	for {
		line, err := lines.ReadSlice('\n')
		if errors.Is(err, io.EOF) && len(line) == 0 {
			return
		}
		var e api.Event
		if err == nil {
			err = json.Unmarshal(line, &e)
		}
		if err != nil {
			yield(api.Event{}, r.cause(err))
			return
		}
		if !yield(e, nil) {
			return
		}
	}
}
