package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
	control "github.com/vmdiskd/vmdiskd/internal/control/client"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

func newToken() *cobra.Command {
	return group("token", "Make tokens that open exports", newTokenNew(), newTokenList())
}

// tokenPair is a token and what a grant has of it.
type tokenPair struct {
	Token   string     `json:"token"`
	SHA     string     `json:"token-sha256"`
	Expires *time.Time `json:"expires,omitempty"`
}

func newTokenNew() *cobra.Command {
	var asJSON bool
	var expires string
	c := &cobra.Command{
		Use:   "new",
		Short: "Make a random token",
		Long: `Make a random token. Whoever asks for NAME?TOKEN opens the export NAME if one of
its grants has the SHA-256 of the token; in a URI that is NAME%3FTOKEN. Nobody
keeps the token: it is printed here and nowhere else. Pre-shared keys are
better: see psk.

A token that --expires is wrong from then on, by the clock of the daemon: the
time is part of what the grant gets. Connections that are open stay.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			p, err := makeToken(expires, time.Now())
			if err != nil {
				return err
			}
			if asJSON {
				return writeJSON(c.OutOrStdout(), p)
			}
			return p.print(c.OutOrStdout())
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "write JSON")
	c.Flags().StringVar(&expires, "expires", "", "`WHEN` it becomes wrong: after a time, as 24h, or at one, as 2026-11-21T12:00:00Z")
	return c
}

func makeToken(expires string, now time.Time) (p tokenPair, err error) {
	var t config.Token
	if expires != "" {
		if t.Expires, err = parseExpiry(expires, now); err != nil {
			return p, err
		}
		p.Expires = &t.Expires
	}
	b := make([]byte, limits.TokenDigits/2)
	if _, err := rand.Read(b); err != nil {
		return p, err
	}
	p.Token = fmt.Sprintf("%x", b)
	t.SHA256 = sha256.Sum256([]byte(p.Token))
	p.SHA = t.String()
	return p, nil
}

// parseExpiry reads a time from now on, or a time of RFC 3339, that is to come.
func parseExpiry(s string, now time.Time) (time.Time, error) {
	at, err := config.ParseExpiry(s)
	if d, derr := time.ParseDuration(s); derr == nil {
		at, err = now.Add(d).UTC().Truncate(time.Second), nil
	}
	switch {
	case err != nil:
		return at, usage("--expires: %q is neither a time from now on, as 24h, nor one as 2026-11-21T12:00:00Z", s)
	case !at.After(now):
		return at, usage("--expires: %v is not in the future", at.Format(time.RFC3339))
	}
	return at, nil
}

func (t *tokenPair) print(w io.Writer) error {
	p := &printer{w: w}
	p.print("token:        %s\ntoken-sha256: %s\n", t.Token, t.SHA)
	if t.Expires != nil {
		p.print("expires:      %s\n", t.Expires.Format(time.RFC3339))
	}
	return p.err
}

// tokenRow is a token that opens an export.
type tokenRow struct {
	Export  string     `json:"export"`
	Access  string     `json:"access"`
	SHA     string     `json:"token-sha256"`
	Expires *time.Time `json:"expires,omitempty"`
	Expired bool       `json:"expired"`
}

func newTokenList() *cobra.Command {
	f := &ctlFlags{}
	return f.reading(&cobra.Command{
		Use:   "list",
		Short: "List the tokens that open exports, and when they expire",
		Long: `List the tokens that the grants of exports have, by their SHA-256, which opens
nothing, and when they expire.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			return f.call(c.Context(), func(ctx context.Context, cl *control.Client) error {
				list, err := cl.Exports(ctx)
				if err != nil {
					return err
				}
				rows := tokensOf(list, time.Now())
				if f.json {
					return writeJSON(c.OutOrStdout(), rows)
				}
				return tokenTable(rows).print(c.OutOrStdout())
			})
		},
	})
}

// tokensOf are the tokens of all grants, by export. Those of a grant that cannot
// be read, of an export that does not work, have their text.
func tokensOf(list []api.Export, now time.Time) []tokenRow {
	rows := []tokenRow{}
	slices.SortFunc(list, func(a, b api.Export) int { return cmp.Compare(a.Name, b.Name) })
	for i := range list {
		for _, g := range list[i].Grants {
			for _, text := range g.Tokens {
				r := tokenRow{Export: list[i].Name, Access: g.Access, SHA: text}
				if t, err := config.ParseToken(text); err == nil && !t.Expires.IsZero() {
					at := t.Expires
					r.Expires, r.Expired = &at, !now.Before(at)
					t.Expires = time.Time{}
					r.SHA = t.String()
				}
				rows = append(rows, r)
			}
		}
	}
	return rows
}

func tokenTable(rows []tokenRow) *table {
	t := &table{head: []string{"EXPORT", "ACCESS", "EXPIRES", "TOKEN-SHA256"}}
	for _, r := range rows {
		expires := "never"
		if r.Expires != nil {
			expires = r.Expires.Format(time.RFC3339)
		}
		if r.Expired {
			expires += " (expired)"
		}
		t.add(shown(r.Export), shown(r.Access), expires, shown(r.SHA))
	}
	return t
}
