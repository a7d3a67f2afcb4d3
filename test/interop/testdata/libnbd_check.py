#!/usr/bin/python3
"""libnbd_check.py URI CHECK [ARGUMENT]: one check of an NBD server through
libnbd's Python binding. Prints nothing and exits with 0, or fails with a
traceback. The export must be writable and hold at least 8 MiB."""
import errno
import random
import sys

import nbd

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


def connect(uri, structured=True, contexts=()):
    h = nbd.NBD()
    # The server's own checks are what is asked for; flags that the negotiated
    # headers demand are still libnbd's business.
    h.set_strict_mode(getattr(nbd, "STRICT_AUTO_FLAG", 0))
    h.set_request_structured_replies(structured)
    for context in contexts:
        h.add_meta_context(context)
    if uri.startswith("nbds"):
        h.set_uri_allow_local_file(True)
        h.set_tls(nbd.TLS_REQUIRE)
    h.connect_uri(uri)
    return h


def pattern(rng, n):
    return rng.randbytes(n)


def expect_errno(want, call, *args):
    try:
        call(*args)
    except nbd.Error as e:
        assert e.errnum == want, f"{call.__name__}{args[1:]}: got {e}, want {errno.errorcode[want]}"
        return
    raise AssertionError(f"{call.__name__}{args[1:]} succeeds")


def random_ops(h, seed, ops=400):
    """Random commands against a model of the first 4 MiB."""
    rng = random.Random(seed)
    size = 4 * MIB
    model = bytearray(h.pread(size, 0))
    for step in range(ops):
        off = rng.randrange(size)
        n = min(rng.choice((1, 511, 512, 4 * KIB, 64 * KIB, 300 * KIB)), size - off)
        what = rng.choice(("read", "read", "write", "write", "fua", "zero", "nohole", "trim", "cache", "flush"))
        if what == "read":
            assert h.pread(n, off) == model[off:off + n], f"seed {seed} step {step}: read {n} at {off} differs"
        elif what in ("write", "fua"):
            data = pattern(rng, n)
            h.pwrite(data, off, nbd.CMD_FLAG_FUA if what == "fua" else 0)
            model[off:off + n] = data
        elif what in ("zero", "nohole"):
            h.zero(n, off, nbd.CMD_FLAG_NO_HOLE if what == "nohole" else 0)
            model[off:off + n] = bytes(n)
        elif what == "trim":
            h.trim(n, off)
            model[off:off + n] = h.pread(n, off)  # undefined, but then constant
        elif what == "cache":
            if h.can_cache():
                h.cache(n, off)
        else:
            h.flush()
    assert h.pread(size, 0) == model, f"seed {seed}: the disk differs at the end"


def check_structured(uri):
    h = connect(uri)
    assert h.get_structured_replies_negotiated(), "no structured replies"
    random_ops(h, 1)
    h.shutdown()


def check_simple(uri):
    h = connect(uri, structured=False)
    assert not h.get_structured_replies_negotiated()
    random_ops(h, 2)
    h.shutdown()


def check_chunks(uri):
    """Chunks of a structured read cover the range exactly once."""
    h = connect(uri)
    h.pwrite(b"x" * (64 * KIB), 0)
    h.zero(64 * KIB, 64 * KIB)
    for flags in (0, nbd.CMD_FLAG_DF):
        seen = []

        def chunk(data, off, status, err):
            assert err.value == 0 and status in (nbd.READ_DATA, nbd.READ_HOLE)
            seen.append((off, len(data)))

        n = 128 * KIB if not flags else 64 * KIB
        h.pread_structured(n, 0, chunk, flags)
        at = 0
        for off, length in sorted(seen):
            assert off == at, f"chunks {seen} have a gap or overlap at {at}"
            at += length
        assert at == n, f"chunks {seen} end at {at}, want {n}"
        assert not flags or len(seen) == 1, f"DF is answered in {len(seen)} chunks"
    h.shutdown()


def check_errors(uri):
    h = connect(uri)
    size = h.get_size()
    expect_errno(errno.EINVAL, h.pread, 512, size)
    expect_errno(errno.EINVAL, h.pread, 512, size - 511)
    expect_errno(errno.ENOSPC, h.pwrite, b"x" * 512, size)
    expect_errno(errno.ENOSPC, h.pwrite, b"x" * 512, size - 511)
    expect_errno(errno.ENOSPC, h.zero, 512, size)
    expect_errno(errno.EINVAL, h.trim, 512, size)
    expect_errno(errno.EINVAL, h.pread, 512, (1 << 63) - 512)
    expect_errno(errno.EINVAL, h.block_status, 512, 0, lambda *a: 0)  # no context was selected
    assert len(h.pread(512, size - 512)) == 512, "the connection is gone after errors"
    h.shutdown()


def check_readonly(uri):
    h = connect(uri)
    assert h.is_read_only()
    expect_errno(errno.EPERM, h.pwrite, b"x" * 512, 0)
    expect_errno(errno.EPERM, h.zero, 512, 0)
    expect_errno(errno.EPERM, h.trim, 512, 0)
    h.pread(512, 0)
    h.shutdown()


def check_status(uri):
    """base:allocation tells data from holes and covers what was asked."""
    h = connect(uri, contexts=(nbd.CONTEXT_BASE_ALLOCATION,))
    assert h.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    h.pwrite(b"d" * MIB, 0)
    h.zero(MIB, MIB)
    h.pwrite(b"d" * MIB, 2 * MIB)
    h.flush()
    flags, at = bytearray(), 0
    while at < 3 * MIB:
        got = []
        h.block_status(3 * MIB - at, at, lambda ctx, off, entries, err: got.extend(entries))
        assert got, f"no extent at {at}"
        for length, state in zip(got[::2], got[1::2]):
            assert length > 0, f"empty extent at {at}"
            flags += bytes([state]) * (length // (64 * KIB))
            at += length
    flags = flags[:48]
    assert flags[:16] == bytes(16), f"data is reported as {flags[:16].hex()}"
    assert all(f & nbd.STATE_ZERO for f in flags[16:32]), f"zeroes are reported as {flags[16:32].hex()}"
    assert flags[32:] == bytes(16), f"data is reported as {flags[32:].hex()}"
    one = []
    h.block_status(3 * MIB, 0, lambda ctx, off, entries, err: one.extend(entries), nbd.CMD_FLAG_REQ_ONE)
    assert len(one) == 2 and one[0] <= 3 * MIB, f"REQ_ONE is answered {one}"
    h.shutdown()


def check_options(uri, name=""):
    """Options before GO: list, info, unknown export, then go."""
    h = nbd.NBD()
    h.set_opt_mode(True)
    h.connect_uri(uri)
    names = []
    h.opt_list(lambda n, desc: names.append(n) or 0)
    assert name in names, f"{name!r} is not in {names}"
    contexts = []
    h.add_meta_context("base:")
    h.opt_list_meta_context(lambda c: contexts.append(c) or 0)
    assert nbd.CONTEXT_BASE_ALLOCATION in contexts, f"contexts {contexts}"
    h.clear_meta_contexts()
    h.opt_info()
    size = h.get_size()
    h.opt_go()
    assert h.get_size() == size > 0
    h.shutdown()
    h = nbd.NBD()
    h.set_opt_mode(True)
    h.connect_uri(uri)
    h.opt_abort()


def check_multi_conn(uri):
    """A flush on one connection covers what others have written."""
    handles = [connect(uri) for _ in range(4)]
    assert all(h.can_multi_conn() for h in handles)
    for i, h in enumerate(handles):
        h.pwrite(bytes([i + 1]) * 64 * KIB, i * 64 * KIB)
    handles[0].flush()
    for h in handles:
        for i in range(4):
            assert h.pread(64 * KIB, i * 64 * KIB) == bytes([i + 1]) * 64 * KIB
    for h in handles:
        h.shutdown()


def check_in_flight(uri):
    """64 reads and writes in flight at once, answered in any order."""
    h = connect(uri)
    data = pattern(random.Random(3), 4 * MIB)
    block = 64 * KIB
    cookies = []
    for off in range(0, len(data), block):
        cookies.append(h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data[off:off + block])), off))
    wait(h, cookies)
    buffers, cookies = [], []
    for off in range(0, len(data), block):
        buffers.append(nbd.Buffer(block))
        cookies.append(h.aio_pread(buffers[-1], off))
    wait(h, cookies)
    assert b"".join(bytes(b.to_bytearray()) for b in buffers) == data
    h.shutdown()


def wait(h, cookies):
    while cookies:
        h.poll(-1)
        cookies[:] = [c for c in cookies if not h.aio_command_completed(c)]


def check_command(*argv):
    """The server is a child that speaks on its standard input."""
    h = nbd.NBD()
    h.connect_command(list(argv))
    random_ops(h, 4, 50)
    h.shutdown()


def check_extended(uri):
    """64-bit effects (libnbd 1.18): needs a sparse export above 4 GiB."""
    h = connect(uri, contexts=(nbd.CONTEXT_BASE_ALLOCATION,))
    assert h.get_extended_headers_negotiated(), "no extended headers"
    far = 6 * GIB
    h.pwrite(b"far" * 1024, far - 4096)
    got = []
    h.block_status_64(far - 8192, 0, lambda ctx, off, entries, err: got.extend(entries))
    assert got[0][0] > 4 * GIB, f"a hole of 6 GiB is reported as {got}"
    assert got[0][1] & nbd.STATE_ZERO
    h.zero(far, 0)  # one request
    assert h.pread(4096, far - 4096) == bytes(4096), "a zero of 6 GiB does not reach its end"
    h.pwrite(b"far" * 1024, far - 4096)
    h.trim(far, 0)
    random_ops(h, 5, 100)
    h.shutdown()


def main():
    uri, check, *rest = sys.argv[1:]
    globals()["check_" + check](uri, *rest)


main()
