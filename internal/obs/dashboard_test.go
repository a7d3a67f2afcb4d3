package obs

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// dashboard is what the test wants of Grafana's format.
type dashboard struct {
	Panels []struct {
		ID      int
		Title   string
		Type    string
		GridPos struct{ X, Y, W, H int }
		Targets []struct{ Expr string }
	}
	Templating struct {
		List []struct{ Name, Definition string }
	}
	Annotations struct {
		List []struct{ Expr string }
	}
}

func readDashboard(t *testing.T) (d dashboard) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("..", "..", "packaging", "grafana", "vmdiskd.json"))
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, &d); err != nil {
		t.Fatal(err)
	}
	return d
}

// queries are all expressions of a dashboard.
func (d *dashboard) queries() (all []string) {
	for _, p := range d.Panels {
		for _, x := range p.Targets {
			all = append(all, x.Expr)
		}
	}
	for _, v := range d.Templating.List {
		if v.Definition != "" {
			all = append(all, v.Definition)
		}
	}
	for _, a := range d.Annotations.List {
		all = append(all, a.Expr)
	}
	return all
}

// series are the names and labels that the exposition of m really has.
func series(t *testing.T, m *Metrics) map[string][]string {
	t.Helper()
	var b bytes.Buffer
	if err := WriteMetrics(&b, m); err != nil {
		t.Fatal(err)
	}
	labelled := regexp.MustCompile(`([a-z]+)="(?:[^"\\]|\\.)*"[,}]`)
	all := map[string][]string{}
	for line := range strings.Lines(b.String()) {
		if strings.HasPrefix(line, "#") {
			continue
		}
		name := line[:strings.IndexAny(line, "{ ")]
		labels := []string{"instance"} // Prometheus adds it
		for _, l := range labelled.FindAllStringSubmatch(line, -1) {
			labels = append(labels, l[1])
		}
		all[name] = labels
	}
	return all
}

func TestDashboardAsksForWhatThereIs(t *testing.T) {
	m := exampleMetrics()
	m.Exports, m.Clients = m.Exports[:1], m.Clients[:1]
	have, d := series(t, m), readDashboard(t)
	selector := regexp.MustCompile(`(vmdiskd_[a-z_]+)(?:\{([^}]*)\})?`)
	matcher := regexp.MustCompile(`([a-z]+)=~?"`)
	asked := map[string]bool{}
	for _, q := range d.queries() {
		found := selector.FindAllStringSubmatch(q, -1)
		if len(found) == 0 {
			t.Errorf("query %q asks for no metric of ours", q)
		}
		for _, s := range found {
			asked[s[1]] = true
			labels, ok := have[s[1]]
			if !ok {
				t.Errorf("query %q: there is no %s", q, s[1])
				continue
			}
			for _, l := range matcher.FindAllStringSubmatch(s[2], -1) {
				if !slices.Contains(labels, l[1]) {
					t.Errorf("query %q: %s has no label %s", q, s[1], l[1])
				}
			}
		}
		if strings.Count(q, "(") != strings.Count(q, ")") || strings.Count(q, "{") != strings.Count(q, "}") {
			t.Errorf("query %q has unbalanced brackets", q)
		}
	}
	for _, name := range []string{"vmdiskd_export_requests_total", "vmdiskd_export_bytes_total", "vmdiskd_export_errors_total",
		"vmdiskd_export_request_duration_seconds_bucket", "vmdiskd_export_requests_waiting", "vmdiskd_client_info"} {
		if !asked[name] {
			t.Errorf("nothing shows %s", name)
		}
	}
}

func TestDashboardPanelsDoNotOverlap(t *testing.T) {
	d := readDashboard(t)
	seen, cells := map[int]bool{}, map[[2]int]string{}
	for _, p := range d.Panels {
		if seen[p.ID] || p.Title == "" {
			t.Errorf("panel %q has no title, or the number %d of another", p.Title, p.ID)
		}
		seen[p.ID] = true
		if p.Type != "row" && len(p.Targets) == 0 {
			t.Errorf("panel %q asks for nothing", p.Title)
		}
		g := p.GridPos
		if g.W < 1 || g.H < 1 || g.X < 0 || g.X+g.W > 24 {
			t.Errorf("panel %q is at %+v, outside of the grid", p.Title, g)
		}
		for x := g.X; x < g.X+g.W; x++ {
			for y := g.Y; y < g.Y+g.H; y++ {
				if other, taken := cells[[2]int{x, y}]; taken {
					t.Fatalf("panels %q and %q overlap", p.Title, other)
				}
				cells[[2]int{x, y}] = p.Title
			}
		}
	}
}
