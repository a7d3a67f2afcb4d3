package main

import (
	"crypto/rand"
	"crypto/sha256"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

func newToken() *cobra.Command {
	return group("token", "Make tokens that open exports", newTokenNew())
}

// tokenPair is a token and what a grant has of it.
type tokenPair struct {
	Token string `json:"token"`
	SHA   string `json:"token-sha256"`
}

func newTokenNew() *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:   "new",
		Short: "Make a random token",
		Long: `Make a random token. Whoever asks for NAME?TOKEN opens the export NAME if one of
its grants has the SHA-256 of the token. Nobody keeps the token: it is printed
here and nowhere else. Pre-shared keys are better: see psk.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			b := make([]byte, limits.TokenDigits/2)
			if _, err := rand.Read(b); err != nil {
				return err
			}
			p := tokenPair{Token: fmt.Sprintf("%x", b)}
			p.SHA = fmt.Sprintf("%x", sha256.Sum256([]byte(p.Token)))
			if asJSON {
				return writeJSON(c.OutOrStdout(), p)
			}
			_, err := fmt.Fprintf(c.OutOrStdout(), "token:        %s\ntoken-sha256: %s\n", p.Token, p.SHA)
			return err
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "write JSON")
	return c
}
