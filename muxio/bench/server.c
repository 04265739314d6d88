/* The limit that the contestants of `muxio bench echo` are measured against: an echo server with nothing but epoll.
 *
 * One receive an event, level-triggered. What the kernel does not take is kept, and nothing is received meanwhile.
 * Listens on a free port of 127.0.0.1, tells it on stdout as `muxio serve` does, and serves until it is killed. */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum { RECEIVE_SIZE = 65536, BACKLOG = 1024, BATCH = 1024 };

struct connection {
    int fd;
    char *kept; /* what is still to be sent: `length` bytes from `offset` on; NULL if nothing */
    size_t offset, length;
};

static int epoll;

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static void watch(int operation, int fd, unsigned events, struct connection *connection)
{
    struct epoll_event event = {.events = events, .data.ptr = connection};
    if (epoll_ctl(epoll, operation, fd, &event) < 0)
        die("epoll_ctl");
}

static void lose(struct connection *connection)
{
    close(connection->fd);
    free(connection->kept);
    free(connection);
}

static void welcome(int listener)
{
    int fd, on = 1;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
        struct connection *connection = calloc(1, sizeof *connection);
        if (!connection)
            die("calloc");
        connection->fd = fd;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        watch(EPOLL_CTL_ADD, fd, EPOLLIN, connection);
    }
}

static void echo(struct connection *connection)
{
    static char buffer[RECEIVE_SIZE];
    ssize_t received = recv(connection->fd, buffer, sizeof buffer, 0);
    if (received <= 0) {
        if (received == 0 || errno != EAGAIN)
            lose(connection);
        return;
    }
    ssize_t sent = send(connection->fd, buffer, (size_t)received, MSG_NOSIGNAL);
    if (sent == received)
        return;
    if (sent < 0 && errno != EAGAIN) {
        lose(connection);
        return;
    }
    connection->offset = 0;
    connection->length = (size_t)(received - (sent < 0 ? 0 : sent));
    connection->kept = malloc(connection->length);
    if (!connection->kept)
        die("malloc");
    memcpy(connection->kept, buffer + (sent < 0 ? 0 : sent), connection->length);
    watch(EPOLL_CTL_MOD, connection->fd, EPOLLOUT, connection);
}

static void flush(struct connection *connection)
{
    ssize_t sent = send(connection->fd, connection->kept + connection->offset, connection->length, MSG_NOSIGNAL);
    if (sent < 0) {
        if (errno != EAGAIN)
            lose(connection);
        return;
    }
    connection->offset += (size_t)sent;
    connection->length -= (size_t)sent;
    if (!connection->length) {
        free(connection->kept);
        connection->kept = NULL;
        watch(EPOLL_CTL_MOD, connection->fd, EPOLLIN, connection);
    }
}

int main(void)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (listener < 0 || bind(listener, (struct sockaddr *)&address, size) < 0 || listen(listener, BACKLOG) < 0 ||
        getsockname(listener, (struct sockaddr *)&address, &size) < 0)
        die("listen");
    epoll = epoll_create1(EPOLL_CLOEXEC);
    if (epoll < 0)
        die("epoll_create1");
    watch(EPOLL_CTL_ADD, listener, EPOLLIN, NULL);
    printf("listening on 127.0.0.1:%d (C)\n", ntohs(address.sin_port));
    fflush(stdout);
    for (;;) {
        struct epoll_event events[BATCH];
        int ready = epoll_wait(epoll, events, BATCH, -1);
        if (ready < 0 && errno != EINTR)
            die("epoll_wait");
        for (int place = 0; place < ready; place++) {
            struct connection *connection = events[place].data.ptr;
            if (!connection)
                welcome(listener);
            else if (connection->kept)
                flush(connection);
            else
                echo(connection);
        }
    }
}
