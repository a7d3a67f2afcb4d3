package transport

import (
	"crypto/sha256"
	"encoding/hex"
	"regexp"
	"strconv"
	"strings"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// A token comes with the name of an export: NAME?TOKEN, TOKEN being
// limits.TokenDigits hexadecimal digits. No export has a name of that form, so
// that a token is never taken for a part of a name and told to somebody.

// CutToken takes the token off a name of an export, as it is written; it is "" if there
// is none.
func CutToken(name string) (export, token string) {
	i := strings.LastIndexByte(name, '?')
	if i < 0 || len(name)-i-1 != limits.TokenDigits {
		return name, ""
	}
	if _, err := hex.DecodeString(name[i+1:]); err != nil {
		return name, ""
	}
	return name[:i], name[i+1:]
}

// tokenShown tells tokens apart and is too short to be taken for one.
const tokenShown = 8

var tokens = regexp.MustCompile(`(\?|%3[Ff])([0-9A-Fa-f]{` + strconv.Itoa(limits.TokenDigits) + `})`)

// ShownToken is what everybody may know of a token: the first digits of its SHA-256,
// of which "vmdiskctl token list" has the others.
func ShownToken(token string) string {
	sum := sha256.Sum256([]byte(strings.ToLower(token)))
	return hex.EncodeToString(sum[:])[:tokenShown]
}

// HideTokens is a text, such as a message with a name in it, with ShownToken for
// each token.
func HideTokens(text string) string {
	return tokens.ReplaceAllStringFunc(text, func(s string) string {
		n := len(s) - limits.TokenDigits
		return s[:n] + ShownToken(s[n:])
	})
}

// Shown is u as everybody may know it.
func (u URI) Shown() string { return HideTokens(u.String()) }
