package testenv

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"
)

// buildPatience bounds a build with a cold cache on a busy machine.
const buildPatience = 10 * time.Minute

// built remembers the binaries of this process.
var built struct {
	mu   sync.Mutex
	dir  string            // guarded by mu; removed by Cleanup
	path map[string]string // guarded by mu
}

// Build returns the path of one of the module's commands, as the product is
// built: static, without cgo. VMDISKD_RACE=1 builds it with the race detector
// instead. Each process builds each command once; the caller's main or
// TestMain calls Cleanup.
func Build(ctx context.Context, command string) (string, error) {
	return BuildAs(ctx, command, "./cmd/"+command)
}

// BuildAs is Build for a package of the module, with more flags for go build.
// name, a file name, stands for both.
func BuildAs(ctx context.Context, name, pkg string, flags ...string) (string, error) {
	built.mu.Lock()
	defer built.mu.Unlock()
	if path := built.path[name]; path != "" {
		return path, nil
	}
	if built.dir == "" {
		dir, err := os.MkdirTemp("", "vmdiskd-bin")
		if err != nil {
			return "", err
		}
		built.dir, built.path = dir, map[string]string{}
	}
	path := filepath.Join(built.dir, name)
	args, env := []string{"build", "-trimpath", "-o", path}, "CGO_ENABLED=0"
	if os.Getenv("VMDISKD_RACE") == "1" {
		args, env = append(args, "-race"), "CGO_ENABLED=1"
	}
	cmd := exec.CommandContext(ctx, "go", append(append(args, flags...), pkg)...)
	cmd.Dir, cmd.Env = Root(), append(os.Environ(), env)
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build %s: %w\n%s", name, err, out)
	}
	built.path[name] = path
	return path, nil
}

// Binary is Build for a test.
func Binary(t testing.TB, command string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), buildPatience)
	defer cancel()
	path, err := Build(ctx, command)
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// Cleanup removes the binaries of this process.
func Cleanup() {
	built.mu.Lock()
	defer built.mu.Unlock()
	if built.dir != "" {
		os.RemoveAll(built.dir)
	}
	built.dir, built.path = "", nil
}

// Main runs the tests of a package that builds commands: its TestMain.
func Main(m *testing.M) {
	code := m.Run()
	Cleanup()
	os.Exit(code)
}
