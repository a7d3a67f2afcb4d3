package layer

import (
	"context"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// RequestLogOptions say where requests are written down.
type RequestLogOptions struct {
	Log *slog.Logger // carries what names the disk
	On  bool         // from the beginning
}

// RequestLog writes down each request when it ends: what it was, how long it
// took, its error; never its payload. It is switched while the disk is in use.
//
// While it is on, nothing is mapped, so that every request is seen at its full
// length; while it is off, it costs one look at a flag. It writes at most
// limits.RequestLogLines a second and then says how many it left out.
type RequestLog struct {
	backing.Transparent
	log     *slog.Logger
	on      atomic.Bool
	lines   bucket
	skipped atomic.Int64
}

// NewRequestLog stands on dev.
func NewRequestLog(dev backing.Device, o RequestLogOptions) *RequestLog {
	l := &RequestLog{Transparent: over(dev), log: o.Log}
	l.on.Store(o.On)
	l.lines.init()
	l.lines.set(limits.RequestLogLines, time.Second)
	return l
}

// Set switches the log. Requests in progress are not affected.
func (l *RequestLog) Set(on bool) { l.on.Store(on) }

// On tells whether requests are written down.
func (l *RequestLog) On() bool { return l.on.Load() }

// request is what is written down of one.
type request struct {
	op     string
	off, n int64
	flags  backing.Flags
}

// seen does a request and writes it down.
func (l *RequestLog) seen(ctx context.Context, r request, do func() error) error {
	if !l.on.Load() {
		return do()
	}
	begin := time.Now()
	err := do()
	took := time.Since(begin)
	if !l.lines.try(1) {
		l.skipped.Add(1)
		return err
	}
	attrs := make([]slog.Attr, 0, 7)
	attrs = append(attrs, slog.String("op", r.op), slog.Int64("off", r.off), slog.Int64("len", r.n))
	if r.flags != 0 {
		attrs = append(attrs, slog.String("flags", flagNames(r.flags)))
	}
	attrs = append(attrs, slog.Duration("took", took))
	if err != nil {
		attrs = append(attrs, slog.String("error", err.Error()))
	}
	if n := l.skipped.Swap(0); n > 0 {
		attrs = append(attrs, slog.Int64("skipped", n))
	}
	l.log.LogAttrs(ctx, slog.LevelInfo, "request", attrs...)
	return err
}

// flagNames are in the order of their bits, joined by commas. Partial has none: all
// block status requests of clients have it.
func flagNames(f backing.Flags) string {
	names := ""
	for _, x := range []struct {
		f    backing.Flags
		name string
	}{{backing.FUA, "fua"}, {backing.NoHole, "no-hole"}, {backing.FastZero, "fast-zero"}, {backing.ReqOne, "req-one"}, {backing.AsRead, "as-read"}} {
		if f&x.f == 0 {
			continue
		}
		if names != "" {
			names += ","
		}
		names += x.name
	}
	return names
}

func (l *RequestLog) ReadAt(ctx context.Context, p []byte, off int64) error {
	return l.seen(ctx, request{"read", off, int64(len(p)), 0}, func() error { return l.Next.ReadAt(ctx, p, off) })
}

func (l *RequestLog) WriteAt(ctx context.Context, p []byte, off int64, f backing.Flags) error {
	return l.seen(ctx, request{"write", off, int64(len(p)), f}, func() error { return l.Next.WriteAt(ctx, p, off, f) })
}

func (l *RequestLog) Zero(ctx context.Context, off, n int64, f backing.Flags) error {
	return l.seen(ctx, request{"zero", off, n, f}, func() error { return l.Next.Zero(ctx, off, n, f) })
}

func (l *RequestLog) Trim(ctx context.Context, off, n int64, f backing.Flags) error {
	return l.seen(ctx, request{"trim", off, n, f}, func() error { return l.Next.Trim(ctx, off, n, f) })
}

func (l *RequestLog) Flush(ctx context.Context) error {
	return l.seen(ctx, request{op: "flush"}, func() error { return l.Next.Flush(ctx) })
}

func (l *RequestLog) Cache(ctx context.Context, off, n int64) error {
	return l.seen(ctx, request{"cache", off, n, 0}, func() error { return l.Next.Cache(ctx, off, n) })
}

func (l *RequestLog) Extents(ctx context.Context, off, n int64, f backing.Flags, yield func(backing.Extent) bool) error {
	return l.seen(ctx, request{"extents", off, n, f}, func() error { return l.Next.Extents(ctx, off, n, f, yield) })
}

func (l *RequestLog) Describe(ctx context.Context, name string, off, n int64, f backing.Flags, yield func(backing.Status) bool) error {
	return l.seen(ctx, request{"describe " + name, off, n, f}, func() error { return l.Transparent.Describe(ctx, name, off, n, f, yield) })
}

func (l *RequestLog) Resize(ctx context.Context, size int64) error {
	return l.seen(ctx, request{op: "resize", n: size}, func() error { return l.Transparent.Resize(ctx, size) })
}

// Map forwards while the log is off.
func (l *RequestLog) Map(op engine.Op, off, n int64, m *backing.Mapping) error {
	if l.on.Load() {
		return backing.ErrNotMappable
	}
	return l.Next.Map(op, off, n, m)
}
