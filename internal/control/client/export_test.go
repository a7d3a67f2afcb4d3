package client

import "time"

// WaitForRoom sets how long a call waits for a place.
func (c *Client) WaitForRoom(d time.Duration) { c.room = d }
