package client

import "time"

// WaitForRoom sets how long a call waits for a place.
func (c *Client) WaitForRoom(d time.Duration) { c.room = d }

// EndAfter sets how long a call may take.
func (c *Client) EndAfter(d time.Duration) { c.bound = d }
