// nbdload generates NBD requests as cheaply as it can, so that the server is
// what is measured: one thread and one epoll set for all connections, one
// write for as many requests as are due, one large read for as many replies
// as have arrived, and no work per byte of data. It prints one line of JSON.
//
//   cc -O2 -Wall -Wextra -o nbdload nbdload.c
//   nbdload -u SOCKET | -T ADDRESS:PORT | -K CID:PORT
//           [-e EXPORT] [-o read|write|randread|randwrite|mix|idle]
//           [-b BLOCK] [-q DEPTH] [-c CONNECTIONS] [-t SECONDS] [-w WARMUP]
//           [-l BYTES] [-p SERVERPID] [-j MILLISECONDS] [-f PERCENT]
//           [-B ADDRESS] [-s] [-V]
//
// -s asks for structured replies, -l uses the first BYTES of the export only,
// -V compares what is read with the benchmark's pattern: each aligned 8 bytes
// hold offset * 0x9e3779b97f4a7c15 + 1 in little endian. "mix" is 70 % random
// reads and 30 % random writes. "idle" opens the connections, prints "ready"
// and keeps them open until standard input ends. -j looks at what comes in
// within windows of so many milliseconds, and prints the least and the most as
// parts of their mean. -f makes so many of a hundred requests flushes, -B is
// the address that a TCP connection comes from.

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <inttypes.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>
#include <linux/vm_sockets.h>

enum {
	MAX_CONNECTIONS = 256,
	MAX_DEPTH = 1024,
	IN_SIZE = 512 << 10,       // of a connection's input buffer
	SOCKET_BUFFER = 4 << 20,   // asked of the kernel in both directions
	GREETING_SIZE = 18,
	REQUEST_SIZE = 28,
	SIMPLE_SIZE = 16,
	CHUNK_SIZE = 20,
	MAX_OPTION_REPLY = 64 << 10,
	SUB_BITS = 4,              // buckets per doubling: 16, about 6 % wide
	BUCKETS = 64 << SUB_BITS,
};

enum { CMD_READ = 0, CMD_WRITE = 1, CMD_DISC = 2, CMD_FLUSH = 3 };
enum { OPT_GO = 7, OPT_STRUCTURED = 8 };
enum { REP_ACK = 1, REP_INFO = 3, INFO_EXPORT = 0 };
enum { CHUNK_DATA = 1, CHUNK_HOLE = 2, CHUNK_ERROR = 1 << 15, CHUNK_DONE = 1 };

static const uint64_t OPTION_MAGIC = 0x49484156454F5054;
static const uint64_t OPTION_REPLY_MAGIC = 0x0003e889045565a9;
static const uint32_t REQUEST_MAGIC = 0x25609513;
static const uint32_t SIMPLE_MAGIC = 0x67446698;
static const uint32_t CHUNK_MAGIC = 0x668e33ef;
static const uint64_t PATTERN_FACTOR = 0x9e3779b97f4a7c15;

struct slot {
	uint64_t off;
	uint64_t sent_ns;
	bool data; // its reply carries data
};

// A reply in progress: its payload may arrive in many pieces.
struct incoming {
	uint64_t left; // bytes of payload that are still to come
	uint64_t off;  // where on the disk the next of them belongs
	uint32_t slot;
	bool data;     // the payload is disk contents
	bool last;     // the request is complete once left is 0
	bool active;
};

struct conn {
	int fd;
	uint64_t size;
	uint64_t seq, rng;
	struct slot *slots;
	uint32_t *free_slots;
	uint32_t nfree;
	char *out;
	size_t out_len, out_off;
	char *in;
	size_t in_len;
	struct incoming reply;
	bool wants_out;
};

static struct {
	const char *unix_path, *tcp, *vsock, *from, *export_name, *op;
	uint32_t block, depth, connections;
	double seconds, warmup;
	uint64_t limit;
	uint32_t window_ms, flushes;
	int pid;
	bool structured, verify;
} opt = {
	.export_name = "", .op = "randread", .block = 4096, .depth = 32,
	.connections = 1, .seconds = 3, .warmup = 0.2,
};

static struct {
	uint64_t requests, errors, mismatches;
	uint64_t latency[BUCKETS];
} stats;

// What comes in the present window of -j, and in those before it.
static struct {
	uint64_t number, bytes, count, sum, min, max;
} window;

static bool random_offsets;
static uint32_t write_percent;
static uint64_t now_ns; // read once per turn of the loop
static bool stopping;   // no new requests

static void __attribute__((noreturn, format(printf, 1, 2))) die(const char *fmt, ...)
{
	va_list args;
	va_start(args, fmt);
	fprintf(stderr, "nbdload: ");
	vfprintf(stderr, fmt, args);
	fprintf(stderr, "\n");
	va_end(args);
	exit(1);
}

static void *must_alloc(size_t n)
{
	void *p = calloc(1, n);
	if (!p)
		die("out of memory");
	return p;
}

static uint64_t clock_ns(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

// Unaligned big-endian fields, as the protocol has them.

static uint16_t get16(const void *p) { uint16_t v; memcpy(&v, p, 2); return be16toh(v); }
static uint32_t get32(const void *p) { uint32_t v; memcpy(&v, p, 4); return be32toh(v); }
static uint64_t get64(const void *p) { uint64_t v; memcpy(&v, p, 8); return be64toh(v); }
static void put16(void *p, uint16_t v) { v = htobe16(v); memcpy(p, &v, 2); }
static void put32(void *p, uint32_t v) { v = htobe32(v); memcpy(p, &v, 4); }
static void put64(void *p, uint64_t v) { v = htobe64(v); memcpy(p, &v, 8); }

// The handshake: blocking and short.

static void write_all(int fd, const void *buf, size_t n)
{
	for (const char *p = buf; n > 0;) {
		ssize_t r = write(fd, p, n);
		if (r < 0 && errno != EINTR)
			die("write: %s", strerror(errno));
		if (r > 0) {
			p += r;
			n -= (size_t)r;
		}
	}
}

static void read_all(int fd, void *buf, size_t n)
{
	for (char *p = buf; n > 0;) {
		ssize_t r = read(fd, p, n);
		if (r == 0)
			die("server hung up in the handshake");
		if (r < 0 && errno != EINTR)
			die("read: %s", strerror(errno));
		if (r > 0) {
			p += r;
			n -= (size_t)r;
		}
	}
}

// come_from binds a TCP socket to the address of -B.
static void come_from(int fd)
{
	struct sockaddr_in a = {.sin_family = AF_INET};
	if (inet_pton(AF_INET, opt.from, &a.sin_addr) != 1)
		die("\"%s\" is no IPv4 address", opt.from);
	if (bind(fd, (const struct sockaddr *)&a, sizeof a) < 0)
		die("bind: %s", strerror(errno));
}

static int connect_to(int family, const void *addr, socklen_t len)
{
	int fd = socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (fd >= 0 && family == AF_INET && opt.from)
		come_from(fd);
	if (fd < 0 || connect(fd, addr, len) < 0)
		die("connect: %s", strerror(errno));
	return fd;
}

// split_port cuts "HOST:PORT" and returns the port.
static unsigned split_port(const char *s, char *host, size_t n)
{
	const char *colon = strrchr(s, ':');
	if (!colon || (size_t)(colon - s) >= n)
		die("\"%s\" is not of the form HOST:PORT", s);
	memcpy(host, s, (size_t)(colon - s));
	host[colon - s] = 0;
	return (unsigned)strtoul(colon + 1, NULL, 10);
}

static int dial(void)
{
	char host[64];
	if (opt.unix_path) {
		struct sockaddr_un a = {.sun_family = AF_UNIX};
		if (strlen(opt.unix_path) >= sizeof a.sun_path)
			die("socket path is too long");
		strcpy(a.sun_path, opt.unix_path);
		return connect_to(AF_UNIX, &a, sizeof a);
	}
	if (opt.vsock) {
		struct sockaddr_vm a = {.svm_family = AF_VSOCK};
		a.svm_port = split_port(opt.vsock, host, sizeof host);
		a.svm_cid = (unsigned)strtoul(host, NULL, 10);
		return connect_to(AF_VSOCK, &a, sizeof a);
	}
	struct sockaddr_in a = {.sin_family = AF_INET};
	a.sin_port = htons((uint16_t)split_port(opt.tcp, host, sizeof host));
	if (inet_pton(AF_INET, host, &a.sin_addr) != 1)
		die("\"%s\" is no IPv4 address", host);
	int fd = connect_to(AF_INET, &a, sizeof a), one = 1;
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
	return fd;
}

static void send_option(int fd, uint32_t option, const void *data, uint32_t n)
{
	char head[16];
	put64(head, OPTION_MAGIC);
	put32(head + 8, option);
	put32(head + 12, n);
	write_all(fd, head, sizeof head);
	write_all(fd, data, n);
}

// option_reply reads one reply and returns its type; *n becomes its length.
static uint32_t option_reply(int fd, char *data, uint32_t *n)
{
	char head[20];
	read_all(fd, head, sizeof head);
	if (get64(head) != OPTION_REPLY_MAGIC)
		die("bad magic in an option reply");
	*n = get32(head + 16);
	if (*n > MAX_OPTION_REPLY)
		die("option reply of %u bytes", *n);
	read_all(fd, data, *n);
	return get32(head + 12);
}

static void agree_structured(int fd, char *data)
{
	uint32_t n;
	send_option(fd, OPT_STRUCTURED, "", 0);
	if (option_reply(fd, data, &n) != REP_ACK)
		die("server refuses structured replies");
}

// go_export enters transmission and returns the size of the export.
static uint64_t go_export(int fd, char *data)
{
	uint32_t len = (uint32_t)strlen(opt.export_name), n;
	uint64_t size = 0;
	char *request = must_alloc(len + 6);
	put32(request, len);
	memcpy(request + 4, opt.export_name, len);
	put16(request + 4 + len, 0);
	send_option(fd, OPT_GO, request, len + 6);
	free(request);
	for (;;) {
		uint32_t type = option_reply(fd, data, &n);
		if (type == REP_ACK)
			return size;
		if (type >> 31)
			die("server refuses the export: %.*s", (int)n, data);
		if (type == REP_INFO && n >= 12 && get16(data) == INFO_EXPORT)
			size = get64(data + 2);
	}
}

static void handshake(struct conn *c)
{
	char greeting[GREETING_SIZE], flags[4];
	char *data = must_alloc(MAX_OPTION_REPLY);
	read_all(c->fd, greeting, sizeof greeting);
	if (memcmp(greeting, "NBDMAGICIHAVEOPT", 16))
		die("not a newstyle NBD server");
	put32(flags, get16(greeting + 16) & 3);
	write_all(c->fd, flags, sizeof flags);
	if (opt.structured)
		agree_structured(c->fd, data);
	c->size = go_export(c->fd, data);
	free(data);
	if (opt.limit && opt.limit < c->size)
		c->size = opt.limit;
	if (c->size < opt.block)
		die("export of %" PRIu64 " bytes is smaller than one block", c->size);
}

static void open_conn(struct conn *c, uint32_t id)
{
	int size = SOCKET_BUFFER;
	c->fd = dial();
	handshake(c);
	setsockopt(c->fd, SOL_SOCKET, SO_RCVBUF, &size, sizeof size);
	setsockopt(c->fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
	uint64_t blocks = c->size / opt.block;
	c->seq = blocks / opt.connections * id;
	c->rng = 88172645463325252u + id * 7919u;
	c->slots = must_alloc(opt.depth * sizeof *c->slots);
	c->free_slots = must_alloc(opt.depth * sizeof *c->free_slots);
	for (c->nfree = 0; c->nfree < opt.depth; c->nfree++)
		c->free_slots[c->nfree] = c->nfree;
	size_t per = REQUEST_SIZE + (write_percent ? opt.block : 0);
	c->out = must_alloc(per * opt.depth);
	memset(c->out, 0x5a, per * opt.depth);
	c->in = must_alloc(IN_SIZE);
}

// Requests.

static uint64_t next_random(struct conn *c)
{
	c->rng ^= c->rng << 13;
	c->rng ^= c->rng >> 7;
	c->rng ^= c->rng << 17;
	return c->rng;
}

static uint64_t next_offset(struct conn *c)
{
	uint64_t blocks = c->size / opt.block;
	uint64_t n = random_offsets ? next_random(c) >> 8 : c->seq++;
	return n % blocks * opt.block;
}

// percent is true in n of a hundred cases.
static bool percent(struct conn *c, uint32_t n)
{
	return n == 100 || (n && (uint32_t)(next_random(c) >> 32) % 100 < n);
}

static void put_request(char *p, uint16_t type, uint64_t cookie, uint64_t off, uint32_t len)
{
	put32(p, REQUEST_MAGIC);
	put16(p + 4, 0);
	put16(p + 6, type);
	put64(p + 8, cookie);
	put64(p + 16, off);
	put32(p + 24, len);
}

// fill puts a request into the output for every free slot. The data of a write
// is whatever lies behind its header.
static void fill(struct conn *c)
{
	c->out_len = c->out_off = 0;
	while (c->nfree > 0) {
		uint32_t id = c->free_slots[--c->nfree];
		struct slot *s = &c->slots[id];
		s->off = next_offset(c);
		s->sent_ns = now_ns;
		s->data = false;
		if (percent(c, opt.flushes)) {
			put_request(c->out + c->out_len, CMD_FLUSH, id, 0, 0);
			c->out_len += REQUEST_SIZE;
			continue;
		}
		s->data = !percent(c, write_percent);
		put_request(c->out + c->out_len, s->data ? CMD_READ : CMD_WRITE, id, s->off, opt.block);
		c->out_len += REQUEST_SIZE + (s->data ? 0 : opt.block);
	}
}

static void send_some(struct conn *c)
{
	while (c->out_off < c->out_len) {
		ssize_t r = write(c->fd, c->out + c->out_off, c->out_len - c->out_off);
		if (r < 0 && errno == EAGAIN)
			return;
		if (r < 0 && errno != EINTR)
			die("send: %s", strerror(errno));
		if (r > 0)
			c->out_off += (size_t)r;
	}
}

// Replies.

static unsigned bucket_of(uint64_t ns)
{
	if (ns < 1u << SUB_BITS)
		return (unsigned)ns;
	unsigned top = 63 - (unsigned)__builtin_clzll(ns);
	unsigned sub = (unsigned)(ns >> (top - SUB_BITS)) & ((1u << SUB_BITS) - 1);
	return ((top - SUB_BITS + 1) << SUB_BITS) + sub;
}

// bucket_ns is the middle of a bucket.
static double bucket_ns(unsigned b)
{
	if (b < 1u << SUB_BITS)
		return b;
	unsigned shift = (b >> SUB_BITS) - 1;
	uint64_t low = (uint64_t)((1u << SUB_BITS) + (b & ((1u << SUB_BITS) - 1))) << shift;
	return (double)low + (double)(1ull << shift) / 2;
}

static double percentile_us(double fraction)
{
	uint64_t want = (uint64_t)(fraction * (double)stats.requests), seen = 0;
	for (unsigned b = 0; b < BUCKETS; b++) {
		seen += stats.latency[b];
		if (seen > want)
			return bucket_ns(b) / 1000;
	}
	return 0;
}

static struct slot *slot_of(struct conn *c, uint64_t cookie)
{
	if (cookie >= opt.depth)
		die("reply to a request that was never sent: cookie %" PRIu64, cookie);
	return &c->slots[cookie];
}

// next_window ends windows: one that is skipped had nothing, and the first one
// had begun before it was looked at, so that the next is the first to count.
static void next_window(uint64_t number)
{
	if (!window.number) {
		window.number = number + 1;
		return;
	}
	for (uint64_t n = window.number; n < number; n++) {
		uint64_t bytes = n == window.number ? window.bytes : 0;
		if (!window.count++ || bytes < window.min)
			window.min = bytes;
		if (bytes > window.max)
			window.max = bytes;
		window.sum += bytes;
	}
	window.number = number;
	window.bytes = 0;
}

static void complete(struct conn *c, uint32_t id)
{
	if (opt.window_ms) {
		uint64_t number = now_ns / (opt.window_ms * 1000000ull);
		if (number > window.number)
			next_window(number);
		if (number == window.number)
			window.bytes += opt.block;
	}
	stats.requests++;
	stats.latency[bucket_of(now_ns - c->slots[id].sent_ns)]++;
	if (c->nfree == opt.depth)
		die("one reply too many");
	c->free_slots[c->nfree++] = id;
}

static bool matches(const unsigned char *p, size_t n, uint64_t off)
{
	for (size_t i = 0; i < n; i++) {
		uint64_t at = off + i, word = (at & ~7ull) * PATTERN_FACTOR + 1;
		if (p[i] != (unsigned char)(word >> (at % 8 * 8)))
			return false;
	}
	return true;
}

// take_payload consumes up to n bytes of the reply in progress.
static size_t take_payload(struct conn *c, const char *p, size_t n)
{
	struct incoming *r = &c->reply;
	if (n > r->left)
		n = (size_t)r->left;
	if (opt.verify && r->data && !matches((const unsigned char *)p, n, r->off))
		stats.mismatches++;
	r->off += n;
	r->left -= n;
	if (r->left == 0) {
		r->active = false;
		if (r->last)
			complete(c, r->slot);
	}
	return n;
}

static size_t take_simple(struct conn *c, const char *p)
{
	uint64_t cookie = get64(p + 8);
	struct slot *s = slot_of(c, cookie);
	uint32_t error = get32(p + 4);
	if (error)
		stats.errors++;
	c->reply = (struct incoming){
		.active = true, .last = true, .data = true, .slot = (uint32_t)cookie,
		.off = s->off, .left = error || !s->data ? 0 : opt.block,
	};
	return SIMPLE_SIZE;
}

// take_chunk starts a structured reply chunk. It returns 0 when the offset
// that belongs to its head is not there yet.
static size_t take_chunk(struct conn *c, const char *p, size_t n)
{
	uint16_t flags = get16(p + 4), type = get16(p + 6);
	uint64_t cookie = get64(p + 8);
	uint32_t length = get32(p + 16);
	slot_of(c, cookie);
	struct incoming r = {
		.active = true, .last = flags & CHUNK_DONE, .slot = (uint32_t)cookie, .left = length,
	};
	size_t head = CHUNK_SIZE;
	if (type == CHUNK_DATA) {
		if (n < CHUNK_SIZE + 8)
			return 0;
		if (length < 8)
			die("data chunk of %u bytes", length);
		r.data = true;
		r.off = get64(p + CHUNK_SIZE);
		r.left -= 8;
		head += 8;
	} else if (type & CHUNK_ERROR) {
		stats.errors++;
	} else if (type == CHUNK_HOLE && opt.verify) {
		stats.mismatches++; // the pattern has no zeroes
	}
	c->reply = r;
	return head;
}

// take_head starts the next reply; 0 means that its head is incomplete.
static size_t take_head(struct conn *c, const char *p, size_t n)
{
	if (n < SIMPLE_SIZE)
		return 0;
	if (get32(p) == SIMPLE_MAGIC)
		return take_simple(c, p);
	if (get32(p) != CHUNK_MAGIC)
		die("bad reply magic 0x%08x", get32(p));
	return n < CHUNK_SIZE ? 0 : take_chunk(c, p, n);
}

static void parse(struct conn *c)
{
	size_t at = 0;
	for (;;) {
		if (c->reply.active)
			at += take_payload(c, c->in + at, c->in_len - at);
		if (c->reply.active)
			break;
		size_t head = take_head(c, c->in + at, c->in_len - at);
		if (head == 0)
			break;
		at += head;
	}
	memmove(c->in, c->in + at, c->in_len - at);
	c->in_len -= at;
}

static void receive(struct conn *c)
{
	size_t room;
	ssize_t r;
	do {
		room = IN_SIZE - c->in_len;
		r = read(c->fd, c->in + c->in_len, room);
		if (r == 0)
			die("server hung up with %u requests in flight", opt.depth - c->nfree);
		if (r < 0 && errno != EAGAIN && errno != EINTR)
			die("receive: %s", strerror(errno));
		if (r > 0) {
			c->in_len += (size_t)r;
			parse(c);
		}
	} while (r == (ssize_t)room);
}

// The loop.

static void watch(int ep, struct conn *c, int how)
{
	struct epoll_event ev = {.events = EPOLLIN, .data.ptr = c};
	c->wants_out = c->out_off < c->out_len;
	if (c->wants_out)
		ev.events |= EPOLLOUT;
	if (epoll_ctl(ep, how, c->fd, &ev) < 0)
		die("epoll_ctl: %s", strerror(errno));
}

static void turn(int ep, struct conn *c, uint32_t events)
{
	if (events & (EPOLLIN | EPOLLHUP | EPOLLERR))
		receive(c);
	if (!stopping && c->out_off == c->out_len && c->nfree > 0)
		fill(c);
	send_some(c);
	if (c->wants_out != (c->out_off < c->out_len))
		watch(ep, c, EPOLL_CTL_MOD);
}

static void poll_until(int ep, uint64_t deadline)
{
	struct epoll_event events[MAX_CONNECTIONS];
	for (now_ns = clock_ns(); now_ns < deadline; now_ns = clock_ns()) {
		int wait_ms = (int)((deadline - now_ns) / 1000000) + 1;
		int n = epoll_wait(ep, events, MAX_CONNECTIONS, wait_ms);
		if (n < 0 && errno != EINTR)
			die("epoll_wait: %s", strerror(errno));
		now_ns = clock_ns();
		for (int i = 0; i < n; i++)
			turn(ep, events[i].data.ptr, events[i].events);
	}
}

static bool idle(const struct conn *conns)
{
	for (uint32_t i = 0; i < opt.connections; i++)
		if (conns[i].nfree < opt.depth)
			return false;
	return true;
}

// drain waits for the replies of what is in flight, 30 seconds at most.
static void drain(int ep, const struct conn *conns)
{
	stopping = true;
	for (int i = 0; i < 3000 && !idle(conns); i++)
		poll_until(ep, clock_ns() + 10000000);
	if (!idle(conns))
		die("requests were never answered");
}

// server_cpu is the processor time of all threads of the server, ended ones too,
// in seconds: to the nanosecond, which /proc/PID/stat has in ticks only.
static double server_cpu(void)
{
	struct timespec t;
	clockid_t clock;
	if (!opt.pid)
		return 0;
	int err = clock_getcpuclockid(opt.pid, &clock);
	if (!err && clock_gettime(clock, &t) < 0)
		err = errno;
	if (err)
		die("processor time of process %d: %s", opt.pid, strerror(err));
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

// window_part is a window's bytes as part of the mean.
static double window_part(uint64_t bytes)
{
	return window.sum ? (double)bytes * (double)window.count / (double)window.sum : 0;
}

static void report(double seconds, double cpu)
{
	double n = (double)stats.requests;
	printf("{\"op\":\"%s\",\"block\":%u,\"depth\":%u,\"connections\":%u,\"seconds\":%.3f,"
		"\"requests\":%" PRIu64 ",\"errors\":%" PRIu64 ",\"mismatches\":%" PRIu64 ","
		"\"iops\":%.0f,\"mb_per_s\":%.1f,\"p50_us\":%.1f,\"p99_us\":%.1f,"
		"\"server_cpu_s\":%.6f,\"server_us_per_io\":%.3f,\"window_min\":%.3f,\"window_max\":%.3f}\n",
		opt.op, opt.block, opt.depth, opt.connections, seconds,
		stats.requests, stats.errors, stats.mismatches,
		n / seconds, n * opt.block / seconds / 1e6,
		percentile_us(0.5), percentile_us(0.99),
		cpu, stats.requests ? cpu / n * 1e6 : 0, window_part(window.min), window_part(window.max));
}

static void load(struct conn *conns)
{
	int ep = epoll_create1(EPOLL_CLOEXEC);
	if (ep < 0)
		die("epoll_create: %s", strerror(errno));
	now_ns = clock_ns();
	for (uint32_t i = 0; i < opt.connections; i++) {
		fcntl(conns[i].fd, F_SETFL, O_NONBLOCK);
		fill(&conns[i]);
		send_some(&conns[i]);
		watch(ep, &conns[i], EPOLL_CTL_ADD);
	}
	poll_until(ep, clock_ns() + (uint64_t)(opt.warmup * 1e9));
	// What went wrong while warming up counts too.
	uint64_t errors = stats.errors, mismatches = stats.mismatches;
	memset(&stats, 0, sizeof stats);
	memset(&window, 0, sizeof window);
	stats.errors = errors;
	stats.mismatches = mismatches;
	double cpu = server_cpu();
	uint64_t start = clock_ns();
	poll_until(ep, start + (uint64_t)(opt.seconds * 1e9));
	double seconds = (double)(clock_ns() - start) / 1e9;
	report(seconds, server_cpu() - cpu);
	drain(ep, conns);
	close(ep);
}

static void hold(void)
{
	char sink[256];
	puts("ready");
	fflush(stdout);
	while (read(0, sink, sizeof sink) > 0)
		;
}

static void close_conn(struct conn *c)
{
	char request[REQUEST_SIZE];
	put_request(request, CMD_DISC, 0, 0, 0);
	fcntl(c->fd, F_SETFL, 0);
	write_all(c->fd, request, sizeof request);
	close(c->fd);
	free(c->slots);
	free(c->free_slots);
	free(c->out);
	free(c->in);
}

static void choose_op(void)
{
	static const struct { const char *name; bool random; uint32_t writes; } ops[] = {
		{"read", false, 0}, {"write", false, 100}, {"randread", true, 0},
		{"randwrite", true, 100}, {"mix", true, 30}, {"idle", false, 0},
	};
	for (size_t i = 0; i < sizeof ops / sizeof *ops; i++) {
		if (!strcmp(opt.op, ops[i].name)) {
			random_offsets = ops[i].random;
			write_percent = ops[i].writes;
			return;
		}
	}
	die("unknown operation \"%s\"", opt.op);
}

static void parse_options(int argc, char **argv)
{
	for (int o; (o = getopt(argc, argv, "u:T:K:B:e:o:b:q:c:t:w:l:p:j:f:sV")) != -1;) {
		switch (o) {
		case 'u': opt.unix_path = optarg; break;
		case 'T': opt.tcp = optarg; break;
		case 'K': opt.vsock = optarg; break;
		case 'B': opt.from = optarg; break;
		case 'e': opt.export_name = optarg; break;
		case 'o': opt.op = optarg; break;
		case 'b': opt.block = (uint32_t)strtoul(optarg, NULL, 0); break;
		case 'q': opt.depth = (uint32_t)strtoul(optarg, NULL, 0); break;
		case 'c': opt.connections = (uint32_t)strtoul(optarg, NULL, 0); break;
		case 't': opt.seconds = strtod(optarg, NULL); break;
		case 'w': opt.warmup = strtod(optarg, NULL); break;
		case 'l': opt.limit = strtoull(optarg, NULL, 0); break;
		case 'p': opt.pid = atoi(optarg); break;
		case 'j': opt.window_ms = (uint32_t)strtoul(optarg, NULL, 0); break;
		case 'f': opt.flushes = (uint32_t)strtoul(optarg, NULL, 0); break;
		case 's': opt.structured = true; break;
		case 'V': opt.verify = true; break;
		default: exit(2);
		}
	}
	if (!!opt.unix_path + !!opt.tcp + !!opt.vsock != 1)
		die("give one of -u, -T and -K");
	if (opt.block == 0 || opt.block > 32 << 20 || opt.seconds <= 0)
		die("block size or seconds out of range");
	if (opt.depth == 0 || opt.depth > MAX_DEPTH)
		die("depth must be 1 to %d", MAX_DEPTH);
	if (opt.connections == 0 || opt.connections > MAX_CONNECTIONS)
		die("connections must be 1 to %d", MAX_CONNECTIONS);
	if (opt.flushes > 100)
		die("flushes are more than 100 %%");
	choose_op();
	if (opt.verify && write_percent)
		die("-V is for reads");
}

int main(int argc, char **argv)
{
	parse_options(argc, argv);
	struct conn *conns = must_alloc(opt.connections * sizeof *conns);
	for (uint32_t i = 0; i < opt.connections; i++)
		open_conn(&conns[i], i);
	if (strcmp(opt.op, "idle"))
		load(conns);
	else
		hold();
	for (uint32_t i = 0; i < opt.connections; i++)
		close_conn(&conns[i]);
	free(conns);
	return stats.mismatches ? 3 : 0;
}
