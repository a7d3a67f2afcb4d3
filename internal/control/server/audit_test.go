package server_test

import (
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/internal/control/controltest"
	"github.com/vmdiskd/vmdiskd/internal/control/server"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// TestLogSaysWhatWasChanged, and not only of what: bounded, whatever was asked for.
func TestLogSaysWhatWasChanged(t *testing.T) {
	w := start(t, &controltest.Service{}, server.Change)
	// What the service makes of them is another matter: who asked is logged.
	readonly, long := true, strings.Repeat("prose ", 1000)
	grants := []config.Grant{{Access: "rw", UIDs: []uint32{1000}}}
	_, _ = w.client.Patch(t.Context(), "a", api.Patch{ReadOnly: &readonly, Grants: &grants, RateKeys: map[string]string{"ops": "2000"}})
	_, _ = w.client.Patch(t.Context(), "a", api.Patch{Description: &long})
	_, _ = w.client.Add(t.Context(), api.AddExport{Export: config.Export{Name: "b", Image: "/srv/b.img", Description: long}, Persist: true})
	_, _ = w.client.Resize(t.Context(), "a", api.Resize{By: 4096})
	_, _ = w.client.Snapshot(t.Context(), "a", api.Snapshot{Overlay: "/srv/o.qcow2"})
	many := make([]config.Grant, 200)
	_, _ = w.client.Patch(t.Context(), "a", api.Patch{Grants: &many})
	eventually(t, "a line for each request", func() bool { return strings.Count(w.log.String(), "PATCH") == 3 })
	log := w.log.String()
	for _, want := range []string{
		`{\"readonly\":true,\"grants\":[{\"access\":\"rw\",\"uid\":[1000]}],\"rate-keys\":{\"ops\":\"2000\"}}`,
		`{\"name\":\"b\",\"description\":\"prose prose`, `{\"description\":\"prose prose`, `{\"by\":4096}`, `{\"overlay\":\"/srv/o.qcow2\"}`,
	} {
		if !strings.Contains(log, "change=\""+want) {
			t.Errorf("the log lacks %s:\n%s", want, log)
		}
	}
	for line := range strings.Lines(log) {
		if len(line) > 2*limits.ControlAuditChange || strings.Count(line, "prose") > limits.ControlAuditText/len("prose ")+1 {
			t.Errorf("a line of %d bytes: %.100s", len(line), line)
		}
	}
}
