/* The load generator of `muxio bench echo`. load.py says what its parameters mean and what it prints.
 *
 * One epoll, level-triggered, one thread. Each connection sends the bytes of one long random pattern from its own place
 * on, whose period is a prime, and compares every byte that comes back: an echo that is lost, doubled, cut short or of
 * another connection is found. Latencies go to a histogram with 128 classes between two powers of two. */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

enum { PERIOD = 65521, STRIDE = 7919, CHUNK = 65536, BATCH = 1024, RESET_BYTES = 16384 };

/* How many connections come from one address. connect() finds half of its ephemeral ports quickly, 14,116 by default;
 * when these are taken it looks at each of them first, which takes 2 ms (measured; Linux, __inet_hash_connect). */
enum { PER_SOURCE = 10000 };

#define SECOND 1000000000LL
#define NEVER INT64_MAX

/* Parameters, as name=value */

static double port, busy, size, idle, hello, drip, deaf, reset, window, warmup, duration, rate, patience;

/* The CPU clocks of the server's processes */
enum { MOST_CLOCKS = 64 };
static clockid_t server_clocks[MOST_CLOCKS];
static size_t clocks;

static const struct {
    const char *name;
    double *value;
} PARAMETERS[] = {
    {"port", &port},
    {"busy", &busy},     {"size", &size},         {"rate", &rate},
    {"idle", &idle},     {"hello", &hello},
    {"drip", &drip},     {"deaf", &deaf},         {"reset", &reset},
    {"window", &window}, {"warmup", &warmup},     {"duration", &duration}, {"patience", &patience},
};

static void read_parameters(char **arguments)
{
    for (; *arguments; arguments++) {
        bool known = !strncmp(*arguments, "clock=", 6);
        if (known) { /* several are separated by commas */
            for (char *word = strtok(*arguments + 6, ","); word && clocks < MOST_CLOCKS; word = strtok(NULL, ","))
                server_clocks[clocks++] = (clockid_t)atoi(word);
            continue;
        }
        for (size_t place = 0; place < sizeof PARAMETERS / sizeof *PARAMETERS; place++) {
            size_t length = strlen(PARAMETERS[place].name);
            if (!strncmp(*arguments, PARAMETERS[place].name, length) && (*arguments)[length] == '=') {
                *PARAMETERS[place].value = atof(*arguments + length + 1);
                known = true;
            }
        }
        if (!known) {
            fprintf(stderr, "no such parameter: %s\n", *arguments);
            exit(2);
        }
    }
}

/* Time, in nanoseconds */

static int64_t read_clock(clockid_t clock)
{
    struct timespec time;
    if (clock_gettime(clock, &time) < 0)
        return 0;
    return time.tv_sec * SECOND + time.tv_nsec;
}

static int64_t read_server_clocks(void)
{
    int64_t sum = 0;
    for (size_t place = 0; place < clocks; place++)
        sum += read_clock(server_clocks[place]);
    return sum;
}

static int64_t now(void)
{
    return read_clock(CLOCK_MONOTONIC);
}

/* Histograms */

struct histogram {
    uint64_t classes[57 * 128 + 256], total;
    int64_t max;
};

static void record(struct histogram *histogram, int64_t value)
{
    if (value < 0)
        value = 0;
    int shift = value < 256 ? 0 : 63 - __builtin_clzll((uint64_t)value) - 7;
    histogram->classes[(shift << 7) + (value >> shift)]++;
    histogram->total++;
    if (value > histogram->max)
        histogram->max = value;
}

static double percentile(const struct histogram *histogram, double percent)
{
    uint64_t seen = 0, wanted = (uint64_t)((double)histogram->total * percent / 100);
    for (int place = 0; place < 57 * 128 + 256; place++) {
        seen += histogram->classes[place];
        if (seen > wanted || seen == histogram->total) {
            int shift = place < 256 ? 0 : (place >> 7) - 1;
            double middle = (double)((int64_t)(place - (shift << 7)) << shift) + (double)(1LL << shift) / 2;
            return (middle < (double)histogram->max ? middle : (double)histogram->max) / 1000;
        }
    }
    return 0;
}

static void print_histogram(const char *name, const struct histogram *histogram)
{
    printf(", \"%s\": ", name);
    if (!histogram->total) {
        printf("null");
        return;
    }
    printf("{\"p50\": %.1f, \"p75\": %.1f, \"p90\": %.1f, \"p99\": %.1f, \"p99.9\": %.1f, \"max\": %.1f}",
           percentile(histogram, 50), percentile(histogram, 75), percentile(histogram, 90), percentile(histogram, 99),
           percentile(histogram, 99.9), (double)histogram->max / 1000);
}

/* Connections */

enum kind { BUSY, IDLE, DRIP, DEAF, RESET };

static const char *const KINDS[] = {"busy", "idle", "drip", "deaf", "reset"};

static const int64_t DRIP_PAUSE = SECOND / 10, RESET_PAUSE = SECOND / 2, TICK = SECOND / 100;

struct connection {
    int fd; /* -1: not connected */
    enum kind kind;
    bool connecting, served, waiting;
    uint32_t interest;
    uint64_t sent, received, target; /* places in the stream; the target is the end of the message under way */
    int64_t started;                 /* when it was sent, or in an open loop ought to have been */
    uint64_t message, due;           /* open loop: the number of that message, and how many more are due by now */
    int64_t next;                    /* a hostile peer's next deed */
    uint64_t echoes;                 /* in the measured window */
};

enum phase { SETUP, WARMUP, WINDOW, DRAIN };

static struct connection *connections;
static size_t total, dialled, opening, unserved, waiting;
static char pattern[PERIOD + CHUNK];
static int epoll, timer;
static enum phase phase;
static int64_t phase_end, tick = NEVER, loop_start, began, setup_time;
static uint64_t messages, cuts; /* messages released in an open loop; hostile peers that the server cut */
static struct histogram latency, lateness;
static int64_t window_start, window_time, server_start, server_time, own_start, own_time;

static void fail(const struct connection *connection, const char *what, int number)
{
    printf("{\"error\": \"%s connection %zu: %s%s%s\"}\n", KINDS[connection->kind], connection - connections, what,
           number ? ": " : "", number ? strerror(number) : "");
    exit(1);
}

static void die(const char *what)
{
    printf("{\"error\": \"the load generator: %s: %s\"}\n", what, strerror(errno));
    exit(1);
}

static void hang_up(struct connection *connection, int64_t time)
{
    struct linger at_once = {1, 0};
    setsockopt(connection->fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once); /* a reset */
    close(connection->fd);
    connection->fd = -1;
    connection->next = time + RESET_PAUSE;
}

static void serve_first(struct connection *connection, int64_t time);

/* The server ended it, which it may do to hostile peers only. */
static void lost(struct connection *connection, const char *what, int number)
{
    if (connection->kind == BUSY || connection->kind == IDLE)
        fail(connection, what, number);
    cuts++;
    serve_first(connection, now());
    hang_up(connection, now());
}

static void watch(struct connection *connection, int operation)
{
    bool reads = connection->kind != DEAF && connection->kind != RESET;
    bool writes = connection->connecting || connection->sent < connection->target;
    uint32_t interest = (reads ? EPOLLIN : 0) | (writes ? EPOLLOUT : 0);
    if (operation == EPOLL_CTL_MOD && interest == connection->interest)
        return;
    connection->interest = interest;
    struct epoll_event event = {.events = interest, .data.ptr = connection};
    if (epoll_ctl(epoll, operation, connection->fd, &event) < 0)
        die("epoll_ctl");
}

static const char *bytes_at(const struct connection *connection, uint64_t place)
{
    return pattern + ((uint64_t)(connection - connections) * STRIDE + place) % PERIOD;
}

static void push(struct connection *connection)
{
    for (int sends = 0; connection->sent < connection->target && sends < 16; sends++) {
        uint64_t left = connection->target - connection->sent;
        ssize_t sent = send(connection->fd, bytes_at(connection, connection->sent), left < CHUNK ? left : CHUNK,
                            MSG_NOSIGNAL);
        if (sent < 0) {
            if (errno == EAGAIN)
                break;
            lost(connection, "send", errno);
            return;
        }
        connection->sent += (uint64_t)sent;
    }
    watch(connection, EPOLL_CTL_MOD);
}

static void start(struct connection *connection, uint64_t length, int64_t time)
{
    connection->started = time;
    connection->target += length;
    if (!connection->waiting) {
        connection->waiting = true;
        waiting += connection->kind == BUSY;
    }
    push(connection);
}

static void dial(struct connection *connection)
{
    struct sockaddr_in address = {
        .sin_family = AF_INET, .sin_port = htons((uint16_t)port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int on = 1, small = 4096, segment = 536;
    connection->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (connection->fd < 0)
        die("socket");
    size_t source = (size_t)(connection - connections) / PER_SOURCE;
    if (source) {
        struct sockaddr_in from = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK + (uint32_t)source)};
        if (bind(connection->fd, (struct sockaddr *)&from, sizeof from) < 0)
            die("bind");
    }
    setsockopt(connection->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (connection->kind == DEAF || connection->kind == RESET) {
        /* Small buffers and segments keep the kernel's buffers small at both ends: else each such peer gets the server
         * 2.6 MB of the kernel's memory for TCP before its writes are stuck, and other connections go without. */
        setsockopt(connection->fd, SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
        setsockopt(connection->fd, SOL_SOCKET, SO_SNDBUF, &small, sizeof small);
        setsockopt(connection->fd, IPPROTO_TCP, TCP_MAXSEG, &segment, sizeof segment);
    }
    if (connect(connection->fd, (struct sockaddr *)&address, sizeof address) < 0 && errno != EINPROGRESS)
        fail(connection, "connect", errno);
    connection->sent = connection->received = connection->target = 0;
    connection->connecting = true;
    connection->waiting = false;
    watch(connection, EPOLL_CTL_ADD);
}

static void dial_more(void)
{
    while (dialled < total && opening < (size_t)window) {
        opening++;
        dial(connections + dialled++);
    }
}

static void serve_first(struct connection *connection, int64_t time)
{
    if (!connection->served) {
        connection->served = true;
        opening--;
        unserved--;
        int64_t pause = connection->kind == DRIP ? DRIP_PAUSE : RESET_PAUSE;
        connection->next = time + (connection - connections) * STRIDE % 1000 * pause / 1000;
        dial_more();
    }
}

static void connected(struct connection *connection)
{
    int number = 0;
    socklen_t length = sizeof number;
    getsockopt(connection->fd, SOL_SOCKET, SO_ERROR, &number, &length);
    if (number) {
        lost(connection, "connect", number);
        return;
    }
    connection->connecting = false;
    int64_t time = now();
    switch (connection->kind) {
    case BUSY:
        start(connection, (uint64_t)size, time);
        break;
    case IDLE:
        start(connection, (uint64_t)hello, time);
        break;
    case DRIP:
        start(connection, 1, time);
        break;
    case DEAF:
        serve_first(connection, time);
        start(connection, UINT64_MAX, time);
        break;
    case RESET:
        serve_first(connection, time);
        start(connection, RESET_BYTES, time);
        break;
    }
}

/* When a message of an open loop is to be sent. */
static int64_t time_of(uint64_t message)
{
    return loop_start + (int64_t)((double)message * (double)SECOND / rate);
}

static void echoed(struct connection *connection)
{
    int64_t time = now();
    connection->waiting = false;
    waiting -= connection->kind == BUSY;
    if (!connection->served) {
        serve_first(connection, time);
        return;
    }
    if (connection->kind != BUSY)
        return;
    record(&latency, time - connection->started);
    if (phase == DRAIN)
        return;
    connection->echoes++;
    if (!rate)
        start(connection, (uint64_t)size, time);
    else if (connection->due) {
        connection->due--;
        connection->message += (uint64_t)busy;
        start(connection, (uint64_t)size, time_of(connection->message));
    }
}

static void pull(struct connection *connection)
{
    static char buffer[CHUNK];
    ssize_t received = recv(connection->fd, buffer, sizeof buffer, 0);
    if (received < 0 && errno == EAGAIN)
        return;
    if (received <= 0) {
        lost(connection, received ? "recv" : "closed by the server", received ? errno : 0);
        return;
    }
    if (connection->received + (uint64_t)received > connection->sent)
        fail(connection, "more bytes came back than were sent", 0);
    if (memcmp(buffer, bytes_at(connection, connection->received), (size_t)received))
        fail(connection, "wrong bytes", 0);
    connection->received += (uint64_t)received;
    if (connection->received == connection->target)
        echoed(connection);
}

static void handle(struct connection *connection, uint32_t events)
{
    if (connection->fd < 0)
        return;
    if (connection->connecting) {
        connected(connection);
        return;
    }
    if (events & EPOLLOUT)
        push(connection);
    if (connection->fd >= 0 && events & (EPOLLIN | EPOLLERR | EPOLLHUP)) {
        if (connection->interest & EPOLLIN)
            pull(connection);
        else if (events & (EPOLLERR | EPOLLHUP))
            lost(connection, "hung up", 0);
    }
}

/* Open loop: send what is due. */
static void release(int64_t time)
{
    for (int64_t intended; (intended = time_of(messages)) <= time; messages++) {
        struct connection *connection = connections + messages % (uint64_t)busy;
        if (connection->waiting) {
            connection->due++;
            continue;
        }
        connection->message = messages;
        record(&lateness, now() - intended);
        start(connection, (uint64_t)size, intended);
    }
}

static void do_harm(int64_t time)
{
    for (size_t place = (size_t)(busy + idle); place < total; place++) {
        struct connection *connection = connections + place;
        if (!connection->served || time < connection->next)
            continue;
        if (connection->fd < 0) {
            connection->next = time + RESET_PAUSE;
            dial(connection);
        } else if (connection->kind == RESET) {
            hang_up(connection, time);
        } else if (connection->kind == DRIP && !connection->connecting) {
            connection->next += DRIP_PAUSE;
            if (!connection->waiting)
                start(connection, 1, time);
        }
    }
    tick = time + TICK;
}

static void report(void)
{
    uint64_t echoes = 0, slowest = UINT64_MAX, starved = 0;
    for (size_t place = 0; place < (size_t)busy; place++) {
        uint64_t own = connections[place].echoes;
        echoes += own;
        starved += !own;
        if (own < slowest)
            slowest = own;
    }
    printf("{\"error\": null, \"setup\": %.6f, \"connections\": %.0f, \"seconds\": %.6f, \"echoes\": %llu, "
           "\"slowest\": %llu, \"starved\": %llu",
           (double)setup_time / SECOND, busy, (double)window_time / SECOND, (unsigned long long)echoes,
           busy ? (unsigned long long)slowest : 0, (unsigned long long)starved);
    if (clocks)
        printf(", \"server_cpu\": %.9f", (double)server_time / SECOND);
    else
        printf(", \"server_cpu\": null");
    printf(", \"own_cpu\": %.9f, \"cuts\": %llu", (double)own_time / SECOND, (unsigned long long)cuts);
    print_histogram("latency", &latency);
    print_histogram("lateness", &lateness);
    printf("}\n");
    fflush(stdout);
    while (getchar() != EOF) /* so long everything stays connected */
        ;
    for (size_t place = 0; place < total; place++)
        if (connections[place].fd >= 0)
            hang_up(connections + place, 0);
    exit(0);
}

static void begin_loop(int64_t time)
{
    loop_start = time;
    if (!rate)
        for (size_t place = 0; place < (size_t)busy; place++)
            start(connections + place, (uint64_t)size, time);
}

static void begin_window(int64_t time)
{
    memset(&latency, 0, sizeof latency);
    memset(&lateness, 0, sizeof lateness);
    for (size_t place = 0; place < (size_t)busy; place++)
        connections[place].echoes = 0;
    window_start = time;
    server_start = read_server_clocks();
    own_start = read_clock(CLOCK_PROCESS_CPUTIME_ID);
}

static void end_window(int64_t time)
{
    window_time = time - window_start;
    server_time = read_server_clocks() - server_start;
    own_time = read_clock(CLOCK_PROCESS_CPUTIME_ID) - own_start;
    for (size_t place = 0; place < (size_t)busy; place++) /* what was not even sent counts with its age */
        for (struct connection *connection = connections + place; connection->due; connection->due--)
            record(&latency, time - time_of(connection->message + connection->due * (uint64_t)busy));
}

static void move_on(int64_t time)
{
    if (phase == SETUP && !unserved) {
        setup_time = time - began;
        if (!busy || !duration)
            report();
        phase = WARMUP;
        phase_end = time + (int64_t)(warmup * (double)SECOND);
        begin_loop(time);
    } else if (phase == WARMUP && time >= phase_end) {
        phase = WINDOW;
        phase_end = time + (int64_t)(duration * (double)SECOND);
        begin_window(time);
    } else if (phase == WINDOW && time >= phase_end) {
        phase = DRAIN;
        phase_end = time + (int64_t)(patience * (double)SECOND);
        end_window(time);
    }
    if (phase == DRAIN && !waiting)
        report();
    if (time >= phase_end && phase == SETUP) {
        printf("{\"error\": \"%zu of %zu connections were not served within %g s\"}\n", unserved, total, patience);
        exit(1);
    }
    if (time >= phase_end && phase == DRAIN) {
        printf("{\"error\": \"%zu echoes did not come within %g s\"}\n", waiting, patience);
        exit(1);
    }
}

static void arm(int64_t time)
{
    static int64_t armed;
    if (time != armed) {
        struct itimerspec when = {.it_value = {time / SECOND, time % SECOND}};
        if (timerfd_settime(timer, TFD_TIMER_ABSTIME, &when, NULL) < 0)
            die("timerfd_settime");
        armed = time;
    }
}

static int64_t earlier(int64_t one, int64_t other)
{
    return one < other ? one : other;
}

static void make_connections(void)
{
    const double counts[] = {busy, idle, drip, deaf, reset};
    for (int kind = 0; kind < 5; kind++)
        total += (size_t)counts[kind];
    unserved = total;
    connections = calloc(total, sizeof *connections);
    if (!connections)
        die("calloc");
    size_t place = 0;
    for (int kind = 0; kind < 5; kind++)
        for (size_t number = 0; number < (size_t)counts[kind]; number++, place++) {
            connections[place].fd = -1;
            connections[place].kind = (enum kind)kind;
        }
}

static void make_pattern(void)
{
    uint64_t state = 88172645463325252ULL; /* xorshift64 */
    for (int place = 0; place < PERIOD; place++) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        pattern[place] = (char)(state >> 32);
    }
    for (int place = 0; place < CHUNK; place++)
        pattern[PERIOD + place] = pattern[place % PERIOD];
}

int main(int count, char **arguments)
{
    (void)count;
    read_parameters(arguments + 1);
    make_pattern();
    make_connections();
    epoll = epoll_create1(EPOLL_CLOEXEC);
    timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    struct epoll_event alarm = {.events = EPOLLIN, .data.ptr = NULL};
    if (epoll < 0 || timer < 0 || epoll_ctl(epoll, EPOLL_CTL_ADD, timer, &alarm) < 0)
        die("epoll");
    began = now();
    phase_end = began + (int64_t)(patience * (double)SECOND);
    if (drip + deaf + reset)
        tick = began;
    dial_more();
    for (;;) {
        int64_t time = now();
        move_on(time);
        if (time >= tick)
            do_harm(time);
        bool releasing = rate && (phase == WARMUP || phase == WINDOW);
        if (releasing)
            release(time);
        arm(earlier(earlier(phase_end, tick), releasing ? time_of(messages) : NEVER));
        struct epoll_event events[BATCH];
        int ready = epoll_wait(epoll, events, BATCH, -1);
        if (ready < 0 && errno != EINTR)
            die("epoll_wait");
        for (int place = 0; place < ready; place++)
            if (events[place].data.ptr)
                handle(events[place].data.ptr, events[place].events);
    }
}
