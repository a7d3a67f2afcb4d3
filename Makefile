# Bare `make` lists the targets.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.PHONY: help build run demo test deps check fmt vet lint unit race plain fuzz timing endtoend interop guest lab lab-shell selinux bench clean

GO        ?= go
# A count: a time makes `go test` fail now and then with "context deadline exceeded".
FUZZTIME  ?= 2000x
# What is tested is compiled as the product is: static, without cgo, in any folder.
export CGO_ENABLED := 0
# The end-to-end tests have targets of their own.
E2E       := -e /test/interop -e /test/guest -e /test/lab -e /test/packages
UNIT       = $$($(GO) list ./... | grep -v $(E2E))
# The race detector has nothing to see in the house rules, in the conformance
# suite as it runs against the servers of others, nor in the tests of test tools.
RACELESS  := -e /internal/lint -e /test/bench -e /nbdtest -e /disktest -e /qcowtest
RACE       = $$($(GO) list ./... | grep -v $(E2E) $(RACELESS))
# Those, and the packages that test otherwise under it.
PLAIN      = $$($(GO) list ./... | grep $(RACELESS)) \
	$$(grep -rl '^//go:build race' --include='*.go' ./cmd ./internal | xargs dirname | sort -u)
# What is not built under it, in the other packages.
NORACE     = $$(grep -rl '^//go:build !race' --include='*_test.go' ./cmd ./internal | \
	grep -v $$(printf -- '-e ^%s/[^/]*$$ ' $(PLAIN)))
# crypto/tls with one constant changed, for pre-shared keys: internal/transport/psk.
OVERLAY   := $(CURDIR)/.cache/tls
export GOFLAGS := $(shell $(GO) env GOFLAGS) -trimpath -overlay=$(OVERLAY)/overlay.json
OVERLAID  := $(shell GOFLAGS= $(GO) run ./scripts/tlsoverlay $(OVERLAY) >&2 || echo failed)
$(if $(OVERLAID),$(error there is no overlay of crypto/tls))
# Three packages for each processor: daemons, guests and time limits are waited for.
PACKAGES  := $(shell echo $$((3 * $$(nproc))))
# And two tests of a package, for the same reason.
TESTS     := $(shell echo $$((2 * $$(nproc))))
GOTEST    := $(GO) run ./test/skipcheck -allowed test/skips.allowed -- $(GO) test -json

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## build the static binaries into bin/
	$(GO) build -o bin/ ./cmd/...

run: build ## serve a demo disk, or IMAGE=disk.img, on a Unix socket
	@scripts/run.sh bin/vmdiskd $(IMAGE)

demo: build ## attach a disk to a guest, grow it, restart the service, detach it
	@GO=$(GO) scripts/demo.sh bin

test: deps fmt vet race plain fuzz endtoend ## install what the tests need and run all of them

deps: ## install the packages that the tests need
	scripts/install-test-deps.sh

check: fmt vet lint unit ## format, vet, house rules and unit tests

fmt:
	@files=$$(gofmt -l $$(git ls-files '*.go')); \
	if [ -n "$$files" ]; then echo "gofmt would change:" $$files; exit 1; fi

vet:
	$(GO) vet ./...

lint:
	$(GO) test ./internal/lint/...

unit: ## unit tests
	$(GOTEST) -p $(PACKAGES) $(UNIT)

race: ## unit tests with the race detector
	CGO_ENABLED=1 $(GOTEST) -race -p $(PACKAGES) -parallel $(TESTS) -timeout 20m $(RACE)

plain:
	$(GOTEST) -p $(PACKAGES) $(PLAIN)
	@files="$(NORACE)"; \
	$(GOTEST) -p $(PACKAGES) -run "^($$(sed -n 's/^func \(Test[^(]*\)(.*/\1/p' $$files | paste -sd '|'))$$" \
		$$(dirname $$files | sort -u)

fuzz: ## every fuzz target for FUZZTIME, as go test takes it
	scripts/fuzz.sh $(FUZZTIME)

timing: ## TLS handshakes that must take one time, at length
	$(GOTEST) -count=1 -run TakeTheSameTime ./internal/transport/psk -timing

# Two packages at a time, with a guest for each processor: what guests wait for
# leaves a third of its time.
endtoend:
	$(GOTEST) -count=1 -timeout 30m $$($(GO) list ./... | grep $(E2E))

interop: ## the server against libnbd, QEMU, fio, nbd-client, systemd
	$(GOTEST) -count=1 ./test/interop/...

guest: ## Debian's kernel in QEMU: root disk, /dev/nbd0, vsock
	$(GOTEST) -count=1 -timeout 10m ./test/guest/...

lab: ## systemd, SELinux and vsock in a guest of Debian; the image takes root and is cached
	$(GOTEST) -count=1 -timeout 20m ./test/packages/... ./test/lab/...

lab-shell: ## the guest of the lab with a root shell on the terminal
	@$(GO) run ./test/lab/labshell

SELINUX_OUT ?= $(CURDIR)/bin/selinux
selinux: ## build the SELinux policy module into bin/selinux/
	@$(MAKE) -s -C selinux OUT=$(SELINUX_OUT)

bench: ## compare with nbdkit and qemu-nbd, write docs/benchmarks.md
	$(GO) run ./test/bench --out docs/benchmarks.md

.PHONY: packages
packages: ## build the Debian and the RPM package into dist/
	@GO=$(GO) scripts/packages.sh dist

clean: ## remove what was built and cached
	rm -rf bin dist .cache
